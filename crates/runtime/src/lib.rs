//! One thread's executor: tasks, timers, and a ring through which the kernel does I/O.
//!
//! Everything of a disk runs on one thread, so nothing here but [`Inbox`] and what wakes through it is shared.
//! What does the I/O is an [`Engine`]: io_uring on a real host, a simulated kernel under a seed.

mod clock;
mod executor;
mod inbox;
mod join;
mod mailbox;
mod ring;
mod source;

pub use clock::{Instant, Sleep};
pub use executor::{Handle, Runtime};
pub use inbox::Inbox;
pub use join::{BoxFuture, join_all};
pub use mailbox::{Mailbox, Sender};
pub use ring::engine::{Allocate, Engine, Idle, Io, Seek, Wait};
pub use ring::uring::{OpenError, RingFlags, Uring};
pub use ring::{Completion, Fd, RegisteredMemory};
pub use source::{Source, Watch};
