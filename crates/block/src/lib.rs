//! The vocabulary of tapdisk: errors, requests and their one answer, memory, spans of bytes. No I/O happens here.

#[allow(unsafe_code)] // one of the few rooms: raw memory that a kernel or a guest writes
pub mod buf;
mod errno;
#[allow(unsafe_code)] // hands out the memory that `buf` describes
pub mod pool;
mod request;
mod span;

pub use buf::{Buf, Segment, WeakBuf};
pub use errno::{Errno, Error};
pub use pool::Pool;
pub use request::{Answer, Op, OpKind, Payload, Reply, Request, Run, Ticket};
pub use span::{Limits, Span};

/// The result of anything on the data path.
pub type Result<T, E = Error> = std::result::Result<T, E>;
