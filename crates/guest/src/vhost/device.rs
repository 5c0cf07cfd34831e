//! A virtio block device of one front end: what its messages change, and the rings that run.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use block::{Answer, Errno, Op, Payload, Reply, Request, Ticket};
use runtime::{BoxFuture, Fd, Handle, join_all};

use super::bell::{self, NoBell};
use super::config::{self, Shape, feature};
use super::inflight::{Inflight, InflightError};
use super::memory::{Memory, RegionError, RegionSpec};
use super::queue::Queue;
use super::request::{ID_LEN, Terms};
use super::ring::{self, Addresses, Ring, RingError, Ways};
use super::run::{Bells, Failure, Run};
use crate::complaints::Complaints;
use crate::fault;
use crate::signal::Signal;
use crate::{Disk, Session};

/// Regions of memory that a front end may have, which is as many as KVM has for a guest.
pub(crate) const MEMORY_REGIONS_MAX: usize = 509;

/// What a front end gets to see.
#[derive(Clone, Debug)]
pub struct Settings {
    /// As the log calls the disk.
    pub name: String,
    /// How many rings, from 1 on.
    pub queues: u16,
    /// Bytes of a block: 512 or 4096.
    pub block: u32,
    /// What the guest sees as the disk's serial number; what does not fit into 20 bytes is cut off.
    pub id: String,
    /// Register the guest's memory with the kernel, which pins all of it.
    pub pin_memory: bool,
}

/// What a front end may not do: what was found, and what is expected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Violation {
    #[error("features {found:#x}: no others than {offered:#x} are offered")]
    Features { found: u64, offered: u64 },
    #[error("{len} bytes of the configuration space from byte {offset} on: it has 256")]
    Config { offset: u32, len: u32 },
    #[error(
        "a change of {len} bytes of the configuration space from byte {offset} on: only the write cache may change, to 0 or 1"
    )]
    ConfigChange { offset: u32, len: usize },
    #[error("{0} regions of memory: there may be {MEMORY_REGIONS_MAX}")]
    Regions(usize),
    #[error(transparent)]
    Map(#[from] RegionError),
    #[error("no region like {0:?} was added")]
    NoRegion(RegionSpec),
    #[error("ring {index}: there are {queues}")]
    NoRing { index: u32, queues: u16 },
    #[error("ring {index} of {len}: a power of two is expected, {} at most, as in QEMU", ring::SIZE_MAX)]
    RingLen { index: u32, len: u32 },
    #[error("ring {index} from base {base}: a number below 65536 is expected")]
    RingBase { index: u32, base: u32 },
    #[error("ring {0} is running: it must be stopped first (GET_VRING_BASE)")]
    Running(u32),
    #[error("ring {0} without a descriptor for kicks: one is needed")]
    NoKick(u32),
    #[error("ring {index}: {reason}")]
    Bell { index: u32, reason: NoBell },
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error("the write cache cannot be turned off, since what is in it cannot be made durable: {0}")]
    WriteCache(Errno),
    #[error("an in-flight region for {found} rings: there are {queues}")]
    InflightQueues { found: u16, queues: u16 },
}

/// How a front end changes its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// All of it at once: what is not there now is gone.
    Table,
    /// A region at a time: what is gone may come back with the next one.
    Region,
}

/// What all rings of a device have in common.
pub(crate) struct Common {
    pub(crate) handle: Handle,
    pub(crate) disk: Rc<dyn Disk>,
    settings: Settings,
    id: [u8; ID_LEN],
    memory: RefCell<Rc<Memory>>,
    features: Cell<u64>,
    wce: Cell<bool>,
    /// Whether the front end has learnt of it on this connection, or a predecessor has noted it. If not, the guest may
    /// believe something else: monitors keep what they once read, and do not say it again to a successor of ours.
    wce_is_known: Cell<bool>,
    complaints: Rc<Complaints>,
}

impl Common {
    pub(crate) fn memory(&self) -> Rc<Memory> {
        self.memory.borrow().clone()
    }

    /// Whether no file behind the guest's memory was cut short. Almost always that is known without a look.
    pub(crate) fn memory_is_whole(&self) -> bool {
        fault::count() == 0 || self.memory.borrow().is_whole()
    }

    fn shape(&self) -> Shape {
        Shape {
            size: self.disk.size(),
            block: self.settings.block,
            limits: self.disk.limits(),
            queues: self.settings.queues,
            wce: self.wce.get(),
        }
    }

    /// What requests are measured by at the moment: the disk may have grown.
    pub(crate) fn terms(&self) -> Terms {
        let (shape, features, durable) = (self.shape(), self.features.get(), self.is_durable());
        let (capacity, block) = (shape.capacity(), shape.block);
        Terms { capacity, block, read_only: shape.limits.read_only, features, durable, id: self.id }
    }

    /// Whether what changes the disk is to be durable before its answer: a guest that was told of no write cache sends
    /// no flush, and one that turned it off sends none either.
    #[inline]
    pub(crate) fn is_durable(&self) -> bool {
        self.features.get() & feature::FLUSH == 0 || !self.wce.get() || !self.wce_is_known.get()
    }

    /// Tells of a ring that waits for its memory, unless a front end made us tell too much lately.
    pub(crate) fn miss(&self, ring: u16, error: &RingError) {
        if let Some(kept_back) = self.complaints.admit(self.handle.now()) {
            let disk = &*self.settings.name;
            tracing::warn!(
                disk,
                ring,
                %error,
                kept_back,
                "a guest's ring waits for the memory that it lies in, which the VMM has taken away"
            );
        }
    }

    /// Tells of a ring that cannot go on, unless a hostile guest made us tell too much lately.
    pub(crate) fn complain(&self, ring: u16, failure: &Failure) {
        if let Some(kept_back) = self.complaints.admit(self.handle.now()) {
            let disk = &*self.settings.name;
            tracing::error!(
                disk,
                ring,
                %failure,
                kept_back,
                "a guest's ring is stopped: what the guest or its VMM put there has no meaning"
            );
        }
    }
}

/// What is known of a ring, whether or not it runs.
#[derive(Default)]
struct Setup {
    size: Option<u16>,
    addresses: Option<Addresses>,
    base: u16,
    kick: Option<Rc<Fd>>,
    call: Option<Rc<Fd>>,
    err: Option<Rc<Fd>>,
    enabled: bool,
    run: Option<Rc<Run>>,
}

/// One front end's device. For the disk's thread; its methods are the messages of the protocol.
pub(crate) struct Device {
    common: Rc<Common>,
    rings: Vec<RefCell<Setup>>,
    inflight: RefCell<Option<Rc<Inflight>>>,
    /// For the flush that turning the write cache off asks for.
    session: Box<dyn Session>,
    /// Bytes of the disk as the front end has last read them on this connection.
    told_capacity: Cell<Option<u64>>,
    /// The connection has ended: no ring starts any more.
    ended: Cell<bool>,
}

impl Device {
    /// A device that nobody has set up yet.
    pub(crate) fn new(
        handle: &Handle,
        disk: Rc<dyn Disk>,
        settings: Settings,
        complaints: Rc<Complaints>,
    ) -> Rc<Device> {
        assert!(settings.queues > 0 && matches!(settings.block, 512 | 4096), "{settings:?}");
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(settings.id.bytes()) {
            *to = from;
        }
        let rings = (0..settings.queues).map(|_| RefCell::default()).collect();
        let session = disk.session();
        let common = Rc::new(Common {
            handle: handle.clone(),
            disk,
            settings,
            id,
            memory: RefCell::default(),
            features: Cell::new(0),
            wce: Cell::new(true),
            wce_is_known: Cell::new(false),
            complaints,
        });
        Rc::new(Device {
            common,
            rings,
            inflight: RefCell::default(),
            session,
            told_capacity: Cell::new(None),
            ended: Cell::new(false),
        })
    }

    /// GET_FEATURES.
    pub(crate) fn features(&self) -> u64 {
        self.common.shape().features()
    }

    /// SET_FEATURES. What concerns rings holds for those that start afterwards.
    pub(crate) fn set_features(&self, features: u64) -> Result<(), Violation> {
        let offered = self.features();
        let features = features & !feature::IGNORED;
        if features & !offered != 0 {
            return Err(Violation::Features { found: features, offered });
        }
        self.common.features.set(features);
        for setup in &self.rings {
            let setup = setup.borrow();
            if let Some(run) = &setup.run {
                run.enable(self.is_enabled(&setup));
            }
        }
        Ok(())
    }

    /// GET_CONFIG.
    pub(crate) fn config(&self, offset: u32, len: u32) -> Result<Vec<u8>, Violation> {
        let bytes = self.common.shape().read(offset, len).ok_or(Violation::Config { offset, len })?;
        if config::holds_capacity(offset, len) {
            self.told_capacity.set(Some(self.common.shape().capacity()));
        }
        if config::holds_wce(offset, len) {
            self.common.wce_is_known.set(true);
        }
        Ok(bytes)
    }

    /// SET_CONFIG: the guest turns its write cache on or off.
    ///
    /// Once it is off the guest believes that all it has written is durable. So what was answered is made durable
    /// before this returns, and what is out, before its answer.
    pub(crate) async fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<(), Violation> {
        let change = || Violation::ConfigChange { offset, len: bytes.len() };
        let wce = self.common.shape().write(offset, bytes).ok_or_else(change)?;
        let was_on = self.set_wce(wce);
        if was_on && !wce {
            let flushed = Rc::new(Flushed::default());
            let reply = Reply::new(flushed.clone(), Ticket(0));
            self.session.submit(Request { op: Op::Flush, reply });
            flushed.over.wait().await;
            if let Some(errno) = flushed.errno.get() {
                self.set_wce(true);
                return Err(Violation::WriteCache(errno));
            }
        }
        Ok(())
    }

    /// Notes it where a successor finds it, and says whether it was on, or may have been.
    fn set_wce(&self, wce: bool) -> bool {
        let was_on = self.common.wce.replace(wce) || !self.common.wce_is_known.replace(true);
        if let Some(inflight) = &*self.inflight.borrow() {
            inflight.set_wce(wce);
        }
        was_on
    }

    /// SET_MEM_TABLE: these regions in the place of all others. Rings that run go on with them; I/O under way keeps
    /// the old ones until it is done.
    pub(crate) fn set_memory(&self, regions: Vec<(RegionSpec, OwnedFd)>) -> Result<(), Violation> {
        if regions.len() > MEMORY_REGIONS_MAX {
            return Err(Violation::Regions(regions.len()));
        }
        let memory = self.common.memory().replaced_by(regions, self.registrar())?;
        self.use_memory(memory, Change::Table);
        Ok(())
    }

    /// ADD_MEM_REG.
    pub(crate) fn add_memory(&self, spec: RegionSpec, fd: OwnedFd) -> Result<(), Violation> {
        let memory = self.common.memory();
        if memory.count() >= MEMORY_REGIONS_MAX {
            return Err(Violation::Regions(memory.count() + 1));
        }
        self.use_memory(memory.with(spec, fd.as_fd(), self.registrar())?, Change::Region);
        Ok(())
    }

    /// REM_MEM_REG. A ring that lies there waits until it is added again: this is how QEMU cuts memory into other
    /// regions while rings run.
    pub(crate) fn remove_memory(&self, spec: RegionSpec) -> Result<(), Violation> {
        let memory = self.common.memory().without(spec).ok_or(Violation::NoRegion(spec))?;
        self.use_memory(memory, Change::Region);
        Ok(())
    }

    /// Who tells the kernel of memory, where that is wanted.
    fn registrar(&self) -> Option<&Handle> {
        self.common.settings.pin_memory.then_some(&self.common.handle)
    }

    fn use_memory(&self, memory: Memory, change: Change) {
        let memory = Rc::new(memory);
        *self.common.memory.borrow_mut() = memory.clone();
        for index in 0..self.common.settings.queues {
            if let Some(run) = &self.rings[usize::from(index)].borrow().run {
                run.move_to(&memory, change);
            }
            // A ring may have waited for nothing but its memory.
            self.start(index);
        }
    }

    fn ring(&self, index: u32) -> Result<&RefCell<Setup>, Violation> {
        let queues = self.common.settings.queues;
        self.rings.get(index as usize).ok_or(Violation::NoRing { index, queues })
    }

    fn stopped_ring(&self, index: u32) -> Result<&RefCell<Setup>, Violation> {
        let ring = self.ring(index)?;
        if ring.borrow().run.is_some() { Err(Violation::Running(index)) } else { Ok(ring) }
    }

    /// SET_VRING_NUM.
    pub(crate) fn set_ring_size(&self, index: u32, len: u32) -> Result<(), Violation> {
        let size = u16::try_from(len).ok().filter(|size| size.is_power_of_two() && *size <= ring::SIZE_MAX);
        let size = size.ok_or(Violation::RingLen { index, len })?;
        self.stopped_ring(index)?.borrow_mut().size = Some(size);
        self.start(index as u16);
        Ok(())
    }

    /// SET_VRING_ADDR, with addresses of the front end's process.
    pub(crate) fn set_ring_addresses(
        &self,
        index: u32,
        descriptors: u64,
        avail: u64,
        used: u64,
    ) -> Result<(), Violation> {
        let addresses = Addresses { descriptors, avail, used };
        let ring = self.ring(index)?;
        // Said again to a ring that runs, as some do to change what is logged, it changes nothing.
        if ring.borrow().run.is_some() && ring.borrow().addresses != Some(addresses) {
            return Err(Violation::Running(index));
        }
        ring.borrow_mut().addresses = Some(addresses);
        self.start(index as u16);
        Ok(())
    }

    /// SET_VRING_BASE.
    pub(crate) fn set_ring_base(&self, index: u32, base: u32) -> Result<(), Violation> {
        let base = u16::try_from(base).map_err(|_too_large| Violation::RingBase { index, base })?;
        self.stopped_ring(index)?.borrow_mut().base = base;
        Ok(())
    }

    /// GET_VRING_BASE: stops the ring. Waits for what the kernel works on, and for nothing else.
    pub(crate) async fn ring_base(self: &Rc<Self>, index: u32) -> Result<u32, Violation> {
        let ring = self.ring(index)?;
        let run = {
            let mut setup = ring.borrow_mut();
            // Only a new descriptor starts it again.
            setup.kick = None;
            setup.run.clone()
        };
        if let Some(run) = run {
            let base = run.stop().await;
            let mut setup = ring.borrow_mut();
            setup.base = base;
            setup.run = None;
        }
        Ok(ring.borrow().base.into())
    }

    /// SET_VRING_KICK: starts the ring, if all else is known.
    pub(crate) fn set_kick(&self, index: u32, fd: Option<OwnedFd>) -> Result<(), Violation> {
        let ring = self.ring(index)?;
        let kick = self.bell(index, fd)?.ok_or(Violation::NoKick(index))?;
        let run = {
            let mut setup = ring.borrow_mut();
            setup.kick = Some(kick.clone());
            setup.run.clone()
        };
        match run {
            Some(run) => run.set_kick(kick),
            None => self.start(index as u16),
        }
        Ok(())
    }

    /// SET_VRING_CALL.
    pub(crate) fn set_call(&self, index: u32, fd: Option<OwnedFd>) -> Result<(), Violation> {
        let ring = self.ring(index)?;
        let call = self.bell(index, fd)?;
        let mut setup = ring.borrow_mut();
        self.give_up(std::mem::replace(&mut setup.call, call.clone()));
        if let Some(run) = &setup.run {
            run.set_call(call);
        }
        Ok(())
    }

    /// SET_VRING_ERR.
    pub(crate) fn set_err(&self, index: u32, fd: Option<OwnedFd>) -> Result<(), Violation> {
        let ring = self.ring(index)?;
        let err = self.bell(index, fd)?;
        let mut setup = ring.borrow_mut();
        self.give_up(std::mem::replace(&mut setup.err, err.clone()));
        if let Some(run) = &setup.run {
            run.set_err(err);
        }
        Ok(())
    }

    /// Waits no longer for room in an eventfd that was replaced.
    fn give_up(&self, bell: Option<Rc<Fd>>) {
        if let Some(bell) = bell {
            self.common.handle.end_signal(&bell);
        }
    }

    fn bell(&self, index: u32, fd: Option<OwnedFd>) -> Result<Option<Rc<Fd>>, Violation> {
        let bell = fd.map(|fd| bell::take_in(&self.common.handle, fd)).transpose();
        bell.map_err(|reason| Violation::Bell { index, reason })
    }

    /// SET_VRING_ENABLE.
    pub(crate) fn enable(&self, index: u32, on: bool) -> Result<(), Violation> {
        let mut setup = self.ring(index)?.borrow_mut();
        setup.enabled = on;
        let is_enabled = self.is_enabled(&setup);
        if let Some(run) = &setup.run {
            run.enable(is_enabled);
        }
        Ok(())
    }

    /// "If VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts directly in the enabled state".
    fn is_enabled(&self, setup: &Setup) -> bool {
        setup.enabled || self.common.features.get() & feature::PROTOCOL_FEATURES == 0
    }

    /// GET_INFLIGHT_FD: a new region, its length and where in the file it starts.
    pub(crate) fn make_inflight(
        &self,
        queues: u16,
        queue_len: u16,
    ) -> Result<(OwnedFd, u64, u64), Violation> {
        self.check_inflight(queues)?;
        let (fd, len) = Inflight::make(queues, queue_len)?;
        Ok((fd, len, 0))
    }

    /// SET_INFLIGHT_FD: a region of ours, or of a predecessor. Rings that start afterwards use it.
    pub(crate) fn set_inflight(
        &self,
        fd: OwnedFd,
        len: u64,
        offset: u64,
        queues: u16,
        queue_len: u16,
    ) -> Result<(), Violation> {
        self.check_inflight(queues)?;
        if let Some(index) = self.rings.iter().position(|setup| setup.borrow().run.is_some()) {
            return Err(Violation::Running(index as u32));
        }
        let inflight = Inflight::open(fd.as_fd(), len, offset, queues, queue_len)?;
        if let Some(wce) = inflight.wce() {
            self.common.wce.set(wce);
            self.common.wce_is_known.set(true);
            if !wce {
                // The predecessor may have died between its note and its flush.
                let disk = self.common.settings.name.clone();
                let reply = Reply::new(Rc::new(Unasked { disk }), Ticket(0));
                self.session.submit(Request { op: Op::Flush, reply });
            }
        }
        if self.common.wce_is_known.get() {
            inflight.set_wce(self.common.wce.get());
        }
        *self.inflight.borrow_mut() = Some(Rc::new(inflight));
        Ok(())
    }

    fn check_inflight(&self, found: u16) -> Result<(), Violation> {
        let queues = self.common.settings.queues;
        if found > queues { Err(Violation::InflightQueues { found, queues }) } else { Ok(()) }
    }

    /// RESET_DEVICE: all rings are stopped and forgotten, as the guest has forgotten them.
    pub(crate) async fn reset(self: &Rc<Self>) {
        let runs = self.runs();
        join_all(runs.iter().map(|run| Box::pin(run.forget()) as BoxFuture<'_, ()>).collect()).await;
        if let Some(inflight) = self.inflight.take() {
            inflight.forget();
        }
        for setup in &self.rings {
            *setup.borrow_mut() = Setup::default();
        }
        self.common.features.set(0);
        // Not the write cache: the front end keeps what the guest has chosen, and does not say it again.
    }

    /// The connection has ended, or the process is to end: takes nothing more, and waits until the kernel is done with
    /// what was taken. What waits for the cause of an error to go away is left to a successor, or told its error
    /// where there is no in-flight region.
    pub(crate) async fn stop(self: &Rc<Self>) {
        self.ended.set(true);
        let runs = self.runs();
        join_all(runs.iter().map(|run| Box::pin(run.stop()) as BoxFuture<'_, u16>).collect()).await;
        for setup in &self.rings {
            setup.borrow_mut().run = None;
        }
    }

    /// Whether the guest runs and its front end may not know how large the disk is.
    pub(crate) fn has_untold_size(&self) -> bool {
        let runs = self.rings.iter().any(|setup| setup.borrow().run.is_some());
        runs && self.told_capacity.get() != Some(self.common.shape().capacity())
    }

    /// Ends when the disk's size changes next.
    pub(crate) fn resized(&self) -> BoxFuture<'static, ()> {
        self.common.disk.resized()
    }

    /// Whether there is a record of the guest's requests, so that it lives on when we end.
    pub(crate) fn has_record(&self) -> bool {
        self.inflight.borrow().is_some()
    }

    fn runs(&self) -> Vec<Rc<Run>> {
        self.rings.iter().filter_map(|setup| setup.borrow().run.clone()).collect()
    }

    /// Starts a ring if all that it needs is known.
    fn start(&self, index: u16) {
        let mut setup = self.rings[usize::from(index)].borrow_mut();
        let (Some(size), Some(addresses), Some(kick)) = (setup.size, setup.addresses, setup.kick.clone())
        else {
            return;
        };
        if setup.run.is_some() || self.ended.get() || self.common.memory().count() == 0 {
            return;
        }
        match self.open(index, size, addresses, setup.base) {
            Ok(queue) => {
                let bells = Bells { kick, call: setup.call.clone(), err: setup.err.clone() };
                let is_enabled = self.is_enabled(&setup);
                setup.run = Some(Run::start(&self.common, index, queue, addresses, bells, is_enabled));
            }
            Err(failure) => {
                self.common.complain(index, &failure);
                if let Some(err) = &setup.err {
                    self.common.handle.signal(err);
                }
            }
        }
    }

    fn open(&self, index: u16, size: u16, addresses: Addresses, base: u16) -> Result<Queue, Failure> {
        let features = self.common.features.get();
        let ways = Ways {
            indirect: features & feature::INDIRECT_DESC != 0,
            event_idx: features & feature::EVENT_IDX != 0,
        };
        let ring = Ring::new(&self.common.memory(), addresses, size, ways)?;
        let inflight = self.inflight.borrow().clone();
        let marks = inflight.map(|inflight| inflight.marks(index, size)).transpose();
        Ok(Queue::new(ring, marks.map_err(RingError::from)?, base)?)
    }
}

/// A flush that is waited for.
#[derive(Default)]
struct Flushed {
    over: Signal,
    errno: Cell<Option<Errno>>,
}

impl Answer for Flushed {
    fn answer(&self, _: Ticket, result: Result<Payload, Errno>) {
        self.errno.set(result.err());
        self.over.happen();
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Its rings have stopped, unless a panic came in between. The front end that comes next may show the same memory.
        for setup in &self.rings {
            let setup = setup.borrow();
            if let Some(run) = &setup.run {
                run.abandon();
            }
            [&setup.call, &setup.err]
                .into_iter()
                .flatten()
                .for_each(|bell| self.common.handle.end_signal(bell));
        }
    }
}

/// A flush that no guest asked for.
struct Unasked {
    disk: String,
}

impl Answer for Unasked {
    fn answer(&self, _: Ticket, result: Result<Payload, Errno>) {
        if let Err(errno) = result {
            let disk = &*self.disk;
            tracing::error!(disk, %errno, "the guest has turned its write cache off, and the flush for that failed");
        }
    }
}
