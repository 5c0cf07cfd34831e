//! Who asks: the interfaces through which guests and clients reach a disk. Each turns what it is asked into
//! [`block::Request`]s and each answer into its own protocol's words.

mod backing;
pub mod budget;
mod complaints;
#[allow(unsafe_code)] // one of the few rooms: handles the signal for memory that is gone
mod fault;
#[doc(hidden)]
pub mod fuzzing;
pub mod listen;
#[allow(unsafe_code)] // one of the few rooms: memory that others share
mod mapping;
pub mod nbd;
mod room;
mod signal;
#[cfg(test)]
mod tripwire;
pub mod vhost;
#[allow(unsafe_code)] // one of the few rooms: memory that others share
mod words;
pub mod xen;

use block::{Limits, Request};
pub use disk::GiveUp;
use runtime::BoxFuture;

/// A disk as its guests see it.
pub trait Disk {
    /// Begins to ask: one session for each ring or connection.
    fn session(&self) -> Box<dyn Session>;

    /// Bytes. It may grow while it is served, and never shrinks.
    fn size(&self) -> u64;

    /// What suits it, and whether it refuses writes.
    fn limits(&self) -> Limits;

    /// Ends when the size changes next, counted from this call.
    fn resized(&self) -> BoxFuture<'static, ()>;
}

/// One that asks a disk. Dropping it changes nothing for its requests.
pub trait Session {
    /// Takes over a request and answers it, now or later. Its bytes lie within the disk; a write to a read-only
    /// disk may be submitted and is refused there.
    fn submit(&self, request: Request);

    /// Ends this session's requests: those that wait for the cause of an error to go away at once, as `how` says,
    /// the others when they are done. It returns when none is left and the kernel touches no memory of theirs any
    /// more. The session can be used again then.
    fn stop(&self, how: GiveUp) -> BoxFuture<'_, ()>;
}

impl Disk for disk::Disk {
    fn session(&self) -> Box<dyn Session> {
        Box::new(disk::Disk::session(self))
    }

    fn size(&self) -> u64 {
        disk::Disk::size(self)
    }

    fn limits(&self) -> Limits {
        disk::Disk::limits(self)
    }

    fn resized(&self) -> BoxFuture<'static, ()> {
        Box::pin(disk::Disk::resized(self))
    }
}

impl Session for disk::Session {
    fn submit(&self, request: Request) {
        disk::Session::submit(self, request);
    }

    fn stop(&self, how: GiveUp) -> BoxFuture<'_, ()> {
        Box::pin(disk::Session::stop(self, how))
    }
}
