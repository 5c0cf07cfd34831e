//! Serves a disk to the guests of virtual machine monitors as a virtio disk: vhost-user-blk.
//!
//! The monitor (the *front end*) connects to a unix socket and hands over its guest's memory and the rings in it. Its
//! messages are read by a thread of its own (`control`), and each is done on the disk's thread, by a `Device` with one
//! method for each. Memory and rings are the guest's, and hostile: `memory` and `crate::fault` make them safe to touch, `ring`
//! and `request` judge what is found there, `queue` puts the two together and `inflight` keeps what a successor needs.
//! A `run` is a ring between its start and its stop, with the tasks that serve it. Data moves between the guest's
//! memory and the file without a copy.
//!
//! Sources: the vhost-user protocol (docs/interop/vhost-user.rst of QEMU), and virtio 1.3 (2.7 split virtqueues, 5.2
//! block device).

mod bell;
mod channel;
mod config;
mod control;
mod device;
mod growth;
mod inflight;
#[allow(unsafe_code)] // one of the few rooms: memory that a guest shares
mod memory;
mod queue;
mod request;
mod ring;
mod run;
mod server;
mod status;
#[cfg(test)]
mod tests;

pub use device::Settings;
pub(crate) use device::{Device, MEMORY_REGIONS_MAX}; // for `crate::fuzzing`, for `crate::room`
pub(crate) use memory::RegionSpec;
pub use server::Server;
