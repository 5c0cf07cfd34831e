//! A paravirtual disk of one guest, from when its front end is connected until it is disconnected.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use ::xen::Domain;
use ::xen::events::{Channel, Events, Port};
use ::xen::grants::{GrantRef, Grants, Mapping};
use block::{Answer, Errno, Op, Payload, Reply, Request, Ticket};
use runtime::{BoxFuture, Fd, Handle, join_all};

use super::barrier::Barrier;
use super::data::Data;
use super::journal::{self, Journal, JournalError, Shape};
use super::layout::{Abi, RING_PAGES_MAX};
use super::queue::Queue;
use super::request::Terms;
use super::ring::Ring;
use super::run::{Failure, Run};
use super::stats::Counts;
use super::{OnFailedSync, Settings};
use crate::budget::Budget;
use crate::complaints::Complaints;
use crate::signal::Signal;
use crate::words::Words;
use crate::{Disk, Session};

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
    /// The front end has closed, and may still wait: as [`Parting::Tell`], but no data goes to its pages any more. Linux
    /// closes first and then waits for each answer, until it lets go of its disk (xen-blkfront.c, blkfront_closing and
    /// blkfront_remove).
    Closed,
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
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What all rings of a connection have in common.
pub(crate) struct Common {
    pub(super) handle: Handle,
    pub(super) disk: Rc<dyn Disk>,
    pub(super) budget: Budget,
    pub(super) barrier: Barrier,
    pub(super) counts: Rc<Counts>,
    offered: Offered,
    name: String,
    complaints: Rc<Complaints>,
    on_failed_sync: OnFailedSync,
    sync_failed: Rc<Signal>,
    /// Such a flush is under way.
    doubting: Cell<bool>,
    /// For flushes that no guest asked for.
    session: Box<dyn Session>,
}

impl Common {
    /// What requests are measured by at the moment: the disk may have grown.
    pub(super) fn terms(&self) -> Terms {
        let read_only = self.disk.limits().read_only;
        Terms { capacity: self.disk.size(), read_only, offered: self.offered }
    }

    /// Whether what changes the disk is to be durable before its answer: a guest that was told of neither flushes nor
    /// barriers believes that it is.
    pub(super) fn is_durable(&self) -> bool {
        !self.offered.flush_cache && !self.offered.barrier
    }

    /// Something failed that was to be durable. If that is because of a sync, none succeeds any more: a flush tells. It is
    /// asked for only where somebody is to hear of that.
    pub(super) fn doubt(self: &Rc<Self>) {
        match self.on_failed_sync {
            OnFailedSync::FailWrites => return,
            OnFailedSync::Disconnect => {}
        }
        if self.sync_failed.has_happened() || self.doubting.replace(true) {
            return;
        }
        // A task, since who hears of an answer must not submit.
        let common = self.clone();
        self.handle.spawn(async move {
            let asked = Rc::new(Doubt(common.clone()));
            common.session.submit(Request { op: Op::Flush, reply: Reply::new(asked, Ticket(0)) });
        });
    }

    /// Tells of a ring that cannot go on, unless a hostile guest made us tell too much lately.
    pub(super) fn complain(&self, ring: usize, failure: &Failure) {
        if let Some(kept_back) = self.complaints.admit(self.handle.now()) {
            let disk = &*self.name;
            tracing::error!(disk, ring, %failure, kept_back, "a ring of a guest's disk is not served any more");
        }
    }

    /// Tells of a request whose bytes are not to be had, unless a hostile guest made us tell too much lately.
    pub(super) fn miss(&self, ring: usize, errno: Errno) {
        if let Some(kept_back) = self.complaints.admit(self.handle.now()) {
            let disk = &*self.name;
            let what = "a request failed, since the guest's memory for it cannot be had";
            tracing::warn!(disk, ring, %errno, kept_back, "{what}");
        }
    }
}

/// A flush that tells whether a sync has failed.
struct Doubt(Rc<Common>);

impl Answer for Doubt {
    fn answer(&self, _: Ticket, result: Result<Payload, Errno>) {
        self.0.doubting.set(false);
        // A disk that is being closed takes no request any more, which says nothing of its syncs.
        if result.is_err_and(|errno| errno != Errno::ESHUTDOWN) {
            self.0.sync_failed.happen();
        }
    }

    /// The process ends before it is known; a successor will find out.
    fn leave(&self, _: Ticket) {
        self.0.doubting.set(false);
    }
}

/// One guest's disk. For the disk's thread.
pub(crate) struct Device {
    handle: Handle,
    disk: Rc<dyn Disk>,
    grants: Rc<dyn Grants>,
    events: Rc<dyn Events>,
    settings: Rc<Settings>,
    budget: Budget,
    complaints: Rc<Complaints>,
    sync_failed: Rc<Signal>,
    counts: Rc<Counts>,
    connected: RefCell<Option<Connected>>,
}

/// What there is while a front end is connected.
struct Connected {
    /// In the order of dropping: each has its ring's pages mapped.
    runs: Vec<Rc<Run>>,
    journal: Journal,
    common: Rc<Common>,
}

/// What a ring is made of.
struct Parts {
    words: Words<Mapping>,
    size: u16,
    channel: Box<dyn Channel>,
    bell: Rc<Fd>,
}

impl Device {
    /// A disk whose front end is not connected.
    pub(crate) fn new(
        handle: &Handle,
        disk: Rc<dyn Disk>,
        grants: Rc<dyn Grants>,
        events: Rc<dyn Events>,
        settings: Rc<Settings>,
    ) -> Rc<Device> {
        Rc::new(Device {
            handle: handle.clone(),
            disk,
            grants,
            events,
            budget: Budget::new(settings.memory),
            settings,
            complaints: Rc::default(),
            sync_failed: Rc::default(),
            counts: Rc::default(),
            connected: RefCell::default(),
        })
    }

    /// Maps the front end's rings, and serves them. The back end may say that it is connected then: the record is there
    /// that a successor needs.
    ///
    /// A ring that makes no sense is not served; the others are.
    ///
    /// # Errors
    /// If there is nothing to map or to ring, or no record of what a predecessor has left. Then nothing is mapped or bound.
    pub(crate) async fn connect(self: &Rc<Self>, connection: Connection) -> Result<(), ConnectError> {
        assert!(self.connected.borrow().is_none(), "a front end is connected already");
        let (found, max) = (connection.rings.len(), self.settings.queues);
        // What a predecessor has agreed on holds, whatever its limits were.
        if found == 0 || (connection.start == Start::Fresh && found > usize::from(max)) {
            return Err(ConnectError::Rings { found, max });
        }
        let layout = connection.abi.layout();
        let mut parts = Vec::new();
        for (ring, spec) in connection.rings.iter().enumerate() {
            parts.push(self.parts(ring, spec, &connection)?);
        }
        let rings: Vec<Ring> =
            parts.iter().map(|parts| Ring::new(parts.words.clone(), layout, parts.size)).collect();
        let (directory, device) = (&*self.settings.journals, self.settings.device);
        let journal = match connection.start {
            Start::Fresh => {
                let shape = |ring: &Ring| Shape { size: ring.size(), answered: ring.answered() };
                let shapes: Vec<Shape> = rings.iter().map(shape).collect();
                Journal::create(directory, &connection, device, &shapes)?
            }
            Start::TakeOver => Journal::open(directory, &connection, device, rings.iter().map(Ring::size))?,
        };
        let common = Rc::new(Common {
            handle: self.handle.clone(),
            disk: self.disk.clone(),
            budget: self.budget.clone(),
            barrier: Barrier::default(),
            counts: self.counts.clone(),
            offered: connection.offered,
            name: self.settings.name.clone(),
            complaints: self.complaints.clone(),
            on_failed_sync: self.settings.on_failed_sync,
            sync_failed: self.sync_failed.clone(),
            doubting: Cell::new(false),
            session: self.disk.session(),
        });
        let mut runs = Vec::new();
        for (index, (ring, parts)) in rings.into_iter().zip(parts).enumerate() {
            match Queue::new(ring, journal.part(index), layout) {
                Ok(queue) => {
                    let data = self.data(&connection);
                    runs.push(Run::start(&common, index, queue, data, parts.channel, parts.bell));
                }
                Err(error) => common.complain(index, &error.into()),
            }
        }
        if connection.start == Start::TakeOver {
            // The predecessor may have died between an answer and the event for it.
            runs.iter().for_each(|run| run.notify());
        }
        *self.connected.borrow_mut() = Some(Connected { runs, journal, common });
        Ok(())
    }

    fn data(&self, connection: &Connection) -> Data {
        let (path, persistent) = (self.settings.data, connection.persistent);
        Data::new(&self.grants, connection.domain, self.handle.pool(), path, persistent)
    }

    /// Maps a ring, and binds its event channel.
    fn parts(&self, ring: usize, spec: &RingSpec, connection: &Connection) -> Result<Parts, ConnectError> {
        let pages = spec.refs.len();
        if !pages.is_power_of_two() || pages > RING_PAGES_MAX {
            return Err(ConnectError::Pages { ring, pages });
        }
        let words = Words::granted(&*self.grants, connection.domain, &spec.refs)
            .map_err(|errno| ConnectError::Map { ring, errno })?;
        let port = spec.port;
        let unbound = |errno| ConnectError::Bind { ring, port, errno };
        let channel = self.events.bind(connection.domain, port).map_err(unbound)?;
        let bell = self.handle.register(channel.descriptor().map_err(unbound)?);
        Ok(Parts { words, size: connection.abi.layout().ring_size(pages), channel, bell })
    }

    /// Stops to serve the front end, if one is connected. It returns when nothing is in flight, and all is unmapped and
    /// unbound. It waits for what the kernel works on, but for no cause of an error to go away.
    pub(crate) async fn disconnect(&self, how: Parting) {
        let Some(connected) = self.connected.take() else { return };
        let Connected { runs, journal, common } = connected;
        // All of them before any is waited for: a barrier on one waits for the others.
        runs.iter().for_each(|run| run.begin_end(how));
        join_all(runs.iter().map(|run| Box::pin(run.end()) as BoxFuture<'_, ()>).collect()).await;
        common.session.stop(crate::GiveUp::Tell).await;
        drop(runs);
        match how {
            Parting::Leave => {}
            Parting::Tell | Parting::Closed | Parting::Forget => journal.remove(),
        }
    }

    /// Whether there is a record of what a guest has under way, be it ours or one that a predecessor has left.
    pub(crate) fn has_journal(&self) -> bool {
        self.journal_path().exists()
    }

    /// Removes such a record: nobody waits for what is in it.
    pub(crate) fn forget(&self) {
        journal::forget(&self.journal_path());
    }

    fn journal_path(&self) -> std::path::PathBuf {
        journal::path(&self.settings.journals, self.settings.domain, self.settings.device)
    }

    /// Whether a front end is connected.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected.borrow().is_some()
    }

    /// What its front ends have asked for.
    pub(crate) fn counts(&self) -> &Rc<Counts> {
        &self.counts
    }

    /// Ends when a sync of the disk has failed, now or before, where a guest's disk is to be taken away for that.
    pub(crate) async fn sync_failed(&self) {
        self.sync_failed.wait().await;
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // It was disconnected, unless a panic came in between.
        if let Some(connected) = self.connected.take() {
            connected.runs.iter().for_each(|run| run.abandon());
        }
    }
}
