//! A vhost-user-blk front end for tests: a driver that says exactly what a test wants.
//!
//! The `vhost` crate carries the messages; rings and requests are written against the text of VIRTIO 1.2 only, so that
//! they share no code, and no mistake, with the server.

mod arena;
mod config;
mod driver;
mod link;
mod memory;
mod request;
mod ring;
mod watchdog;

pub use config::Config;
pub use driver::{Driver, Ticket, UNWRITTEN, Wish};
pub use link::{Link, Talk, feature};
pub use memory::Memory;
pub use request::{Answer, HEADER_LEN, Request, SECTOR, Status, UNMAP, kind};
pub use ring::{INDIRECT, NEXT, Piece, Ring, Used, WRITE};

/// What can go wrong for a driver, in words.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// What a driver can do.
pub type Result<T> = std::result::Result<T, Error>;
