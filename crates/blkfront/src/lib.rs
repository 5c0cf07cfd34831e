//! A front end of Xen's block interface for tests: a driver that says exactly what a test wants.
//!
//! It is a guest of [`xen::fake`]. Rings and requests are written against the text of xen/include/public/io/blkif.h only,
//! so that they share no code, and no mistake, with the back end. Each answer is checked to the last byte; what a real
//! front end would take as a reason to give the disk up is an error here.

mod abi;
mod driver;
mod pages;
mod request;
mod ring;
mod watch;
mod xenbus;

pub use abi::Abi;
pub use driver::{Answer, Driver, RingSpec, Ticket, UNWRITTEN, Wish};
pub use request::{Request, SECTOR, SEGMENTS_MAX, op, status};
pub use ring::Ring;
pub use watch::Watch;
pub use xenbus::{Front, Nodes, Told, state};

/// What can go wrong for a driver, in words.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// What a driver can do.
pub type Result<T> = std::result::Result<T, Error>;
