//! A paravirtual disk of one guest, from when its front end is connected until it is disconnected.

use ::xen::Domain;
use ::xen::events::Port;
use ::xen::grants::GrantRef;
use block::Errno;

use super::layout::{Abi, RING_PAGES_MAX};

/// What a front end and its back end have agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Connection {
    /// Whose memory it is.
    pub(crate) domain: Domain,
    /// How the guest lays requests out.
    pub(crate) abi: Abi,
    /// Its rings, one for each queue.
    pub(crate) rings: Vec<RingSpec>,
    /// What it was told that it may ask for.
    pub(crate) offered: Offered,
    /// Both sides keep to persistent grants.
    pub(crate) persistent: bool,
    /// Whether somebody has served it before.
    pub(crate) start: Start,
}

/// Where a ring is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RingSpec {
    /// Its pages in order: 1, 2, 4, 8 or 16.
    pub(crate) refs: Vec<GrantRef>,
    /// The front end's end of its event channel.
    pub(crate) port: Port,
}

/// What the xenstore tells this guest. After a takeover that is what a predecessor wrote there, whatever the command line
/// says now: the guest has read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offered {
    /// `feature-flush-cache`.
    pub(crate) flush_cache: bool,
    /// `feature-barrier`.
    pub(crate) barrier: bool,
    /// `feature-discard`.
    pub(crate) discard: bool,
    /// `feature-max-indirect-segments`; 0 where there are to be none.
    pub(crate) indirect: u16,
    /// `sector-size`, in bytes: 512 or 4096.
    pub(crate) block: u32,
}

/// Whether somebody has served a front end before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// Nobody has: it waits for us to say that we are connected.
    Fresh,
    /// A predecessor of ours has: the back end's state was "connected" already.
    TakeOver,
}

/// How a front end is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parting {
    /// A successor goes on: what is not answered stays in the journal.
    Leave,
    /// The front end closes: all is answered, and what is held is told its error. The journal is removed.
    Tell,
    /// The front end is gone, or has forgotten its requests: nothing is answered. The journal is removed.
    Forget,
}

/// Why a front end cannot be connected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("{found} rings: from 1 to {max} are expected")]
    Rings { found: usize, max: u16 },
    #[error("ring {ring} in {pages} pages: 1, 2, 4, 8 or {RING_PAGES_MAX} are expected")]
    Pages { ring: usize, pages: usize },
    #[error("ring {ring}: its pages cannot be mapped: {errno}")]
    Map { ring: usize, errno: Errno },
    #[error("ring {ring}: event channel {port} of the guest cannot be bound: {errno}", port = port.0)]
    Bind { ring: usize, port: Port, errno: Errno },
}
