//! What a backend needs of Xen: other domains' memory, event channels and the xenstore, without a C library.
//!
//! Memory and event channels are traits with two implementations: the kernel's devices (/dev/xen/gntdev,
//! /dev/xen/evtchn), and a fake within the process. The xenstore's seam is its wire protocol: the client speaks it over
//! /dev/xen/xenbus, over the daemon's socket, or over a socket to a fake store.

mod copy;
#[allow(unsafe_code)] // one of the few rooms: ioctls
mod device;
pub mod events;
#[allow(unsafe_code)] // one of the few rooms: ioctls
pub mod evtchn;
#[cfg(feature = "fake")]
#[allow(unsafe_code)] // one of the few rooms: memory of domains
pub mod fake;
#[allow(unsafe_code)] // one of the few rooms: memory of other domains
pub mod gntdev;
#[allow(unsafe_code)] // one of the few rooms: memory of other domains
pub mod grants;
pub mod store;
mod vdev;

pub use device::OpenError;

use std::fmt;

pub use vdev::{Vdev, VdevError};

/// A domain's number (`domid_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Domain(pub u16);

impl fmt::Display for Domain {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Bytes of a page that is granted, on every architecture.
pub const PAGE: usize = 4096;
