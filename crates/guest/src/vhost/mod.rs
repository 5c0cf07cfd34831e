//! Serves a disk to the guests of other processes by vhost-user: what lives on the disk's thread.
//!
//! A [`device::Device`] is told what the front end says, one method for each message, and runs the rings. Memory and
//! rings are the guest's, and hostile: `memory` and `fault` make them safe to touch, `ring` and `request` judge what
//! is found there, `queue` puts the two together and `inflight` keeps what a successor needs. A `run` is a ring
//! between its start and its stop, with the tasks that serve it.

mod bell;
pub(crate) mod config;
pub(crate) mod device;
#[allow(unsafe_code)] // one of the few rooms: handles the signal for memory that is gone
mod fault;
mod inflight;
#[allow(unsafe_code)] // one of the few rooms: memory that a guest shares
mod memory;
mod queue;
mod request;
mod ring;
mod run;
mod status;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tripwire;

pub(crate) use device::{Device, MEMORY_REGIONS_MAX, Settings, Violation};
pub(crate) use memory::RegionSpec;
