//! Serves a disk to a guest of Xen as a paravirtual disk: blkif over xenbus.
//!
//! The handshake with the guest's driver (the *front end*) goes through the xenstore, on a thread of its own with calls
//! that block: `nodes` knows the paths, `negotiate` judges what the front end wrote, `control` keeps the states. What
//! they find is done on the disk's thread, by a device that maps the rings and serves them. Everything that a front end
//! writes, be it in the store or in memory, is hostile until it was judged.
//!
//! Sources: xen/include/public/io/blkif.h and xenbus.h, docs/misc/xenstore.txt of Xen.

mod barrier;
mod control;
mod data;
mod detach;
mod device;
mod journal;
mod kept;
mod layout;
mod negotiate;
mod nodes;
mod queue;
mod request;
mod ring;
mod run;
mod server;
mod situation;
mod stats;
mod status;
#[cfg(test)]
mod tests;
mod turn;

#[cfg(feature = "fuzzing")]
pub(crate) use device::{Connection, Device, Offered, Parting, Start};
// For `crate::fuzzing`.
pub(crate) use device::RingSpec;
pub(crate) use layout::Abi;
pub(crate) use negotiate::{Terms, negotiate};

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use ::xen::Domain;
use ::xen::events::Events;
use ::xen::grants::Grants;
use ::xen::store::Connect;
pub use control::End;
pub use detach::{DetachError, detach};
pub use server::{Server, StartError};

/// One disk of one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// As the log calls the disk.
    pub name: String,
    /// Whose disk it is.
    pub domain: Domain,
    /// The virtual device's number as of vbd-interface(7): 51728 is xvdb.
    pub device: u32,
    /// The kind of back end, which is a part of the path of its nodes: `vbd3`.
    pub kind: String,
    /// Write the nodes of both ends, and remove them at the end; otherwise a toolstack has written them.
    pub create_nodes: bool,
    /// What the guest may be offered.
    pub features: Features,
    /// How many rings it may have, from 1 on.
    pub queues: u16,
    /// Bytes of a block that it is told of (`sector-size`): 512 or 4096.
    pub block: u32,
    /// How bytes get from and to its memory.
    pub data: DataPath,
    /// What becomes of it when a sync has failed.
    pub on_failed_sync: OnFailedSync,
    /// Bytes of memory for the data of all its requests.
    pub memory: usize,
    /// The directory for what outlives this process.
    pub journals: PathBuf,
    /// The image, to be named in the store.
    pub image: Option<PathBuf>,
}

/// What may be offered to a guest. What is not offered it does without, or asks for in another way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Flushes (`feature-flush-cache`).
    pub flush_cache: bool,
    /// Writes that all earlier ones precede and all later ones follow (`feature-barrier`).
    pub barrier: bool,
    /// To discard (`feature-discard`).
    pub discard: bool,
    /// To grant the same pages again and again, so that they stay mapped (`feature-persistent`).
    pub persistent: bool,
    /// Requests of up to 256 segments (`feature-max-indirect-segments`).
    pub indirect: bool,
    /// Rings of up to 16 pages (`max-ring-page-order`).
    pub multi_page: bool,
    /// More rings than one (`multi-queue-max-queues`).
    pub multi_queue: bool,
}

impl Default for Features {
    fn default() -> Features {
        Features {
            flush_cache: true,
            barrier: true,
            discard: true,
            persistent: true,
            indirect: true,
            multi_page: true,
            multi_queue: true,
        }
    }
}

/// How bytes get from and to a guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DataPath {
    /// As it is faster here.
    #[default]
    Auto,
    /// The hypervisor copies them.
    Copy,
    /// The guest's pages are mapped, and the kernel works on them.
    Map,
}

/// What becomes of a guest's disk when a sync of it has failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailedSync {
    /// Flushes and writes fail from then on. Linux tells fsync of a failed flush once, or not at all.
    #[default]
    FailWrites,
    /// It is taken away, so that nothing that the guest believes to be written can get lost unnoticed.
    Disconnect,
}

/// The ways to a hypervisor and its guests.
#[derive(Clone)]
pub struct Platform {
    /// To guests' memory.
    pub grants: Rc<dyn Grants>,
    /// To event channels.
    pub events: Rc<dyn Events>,
    /// To the xenstore.
    pub store: Arc<dyn Connect>,
}
