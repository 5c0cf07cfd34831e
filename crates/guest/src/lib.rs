//! Who asks: the interfaces through which guests and clients reach a disk. Each turns what it is asked into
//! [`block::Request`]s and each answer into its own protocol's words.

pub mod budget;
mod complaints;
#[doc(hidden)]
pub mod fuzzing;
pub mod listen;
pub mod nbd;
mod signal;

use block::{Limits, Request};

/// A disk as its guests see it.
pub trait Disk {
    /// Takes over a request and answers it, now or later. Its bytes lie within the disk; a write to a read-only
    /// disk may be submitted and is refused there.
    fn submit(&self, request: Request);

    /// Bytes. It may grow while it is served, and never shrinks.
    fn size(&self) -> u64;

    /// What suits it, and whether it refuses writes.
    fn limits(&self) -> Limits;
}

impl Disk for disk::Disk {
    fn submit(&self, request: Request) {
        disk::Disk::submit(self, request);
    }

    fn size(&self) -> u64 {
        disk::Disk::size(self)
    }

    fn limits(&self) -> Limits {
        disk::Disk::limits(self)
    }
}
