//! Serves disks to NBD clients: fixed newstyle negotiation; simple, structured and extended replies.
//!
//! A connection has two tasks. One receives requests and hands them to the disk (`session`); the other sends the
//! answers that have gathered meanwhile, many in one call (`connection`). Neither waits for the other, so that
//! requests are taken while answers are sent; what keeps a client within bounds is a limit on the requests that it
//! has out and the memory that it shares with all others (`crate::budget`).

mod complaints;
mod connection;
mod export;
mod listen;
mod negotiation;
mod outbox;
mod peer;
mod reply;
mod request;
mod server;
mod session;
mod signal;
mod status;
mod stream;
mod wire;

pub use export::{BadName, Export, Exports};
pub use listen::{Address, BadAddress, ListenError, Listener};
pub use peer::Patience;
pub use server::{Server, Settings, Stats};
