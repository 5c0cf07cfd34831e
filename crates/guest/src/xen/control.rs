//! The handshake of one disk: a thread that watches the xenstore and does what the states of both ends call for.
//!
//! What concerns the rings it asks of the disk's thread, and waits. All that is known of the guest is in the store: when the
//! connection to the store is lost, or this process dies, whoever comes next looks there and goes on. Meanwhile the
//! disk is served.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use ::xen::store::{Client, Connect, Error, Woken};
use block::Limits;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::device::{Connection, Offered, Parting, Start};
use super::negotiate::{self, ORDER_MAX, Quoted, Terms, negotiate, number};
use super::nodes::{self, Nodes, Owner, Server, State};
use super::situation::{Said, Situation, Step, judge};
use super::{DataPath, Features, OnFailedSync, Settings};
use crate::complaints::Complaints;

/// Segments of an indirect request that are offered: 1 MiB, as Linux's back end does.
const INDIRECT: u16 = 256;
/// The most rings that a front end can have been told of.
const QUEUES_MAX: u16 = 256;
/// Bytes of the unit of `sectors`.
const SECTOR: u64 = 512;
/// How long a toolstack's nodes, and the end of a process before us, are waited for.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });
/// How long after a failure the store is tried again.
const PAUSE: Duration = Duration::from_secs(1);
/// So many connections may come at once; then there is one in each [`TURN`].
const CONNECTIONS: u32 = 32;
const TURN: Duration = Duration::from_millis(100);
/// The same of looks at the store.
const LOOKS: u32 = 256;
const LOOK: Duration = Duration::from_millis(5);
/// Steps that one look may lead to. More than the table of states needs: then a guest keeps changing its own.
const STEPS_MAX: u32 = 16;

/// What the store has under `info` (VDISK_* of blkif.h).
const CDROM: u32 = 1;
const REMOVABLE: u32 = 2;
const READ_ONLY: u32 = 4;

/// Why a disk is not served any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It was taken from the guest in order.
    Detached,
    /// The guest is no more.
    GuestGone,
    /// A sync has failed, and so it was taken from the guest, as was asked for.
    Taken,
    /// It cannot be served: why, and what to do.
    Failed(String),
}

/// The rings, as this thread sees them: each call waits until it is done.
pub(super) trait Rings {
    /// Serves what a front end and we have agreed on. How many bytes the disk has from then on.
    fn connect(&mut self, connection: Connection) -> Result<u64, String>;

    /// Serves it no more. Nothing of the guest is in use afterwards.
    fn disconnect(&mut self, how: Parting);
}

/// The disk, as the store tells of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Bytes.
    pub(super) size: u64,
    pub(super) limits: Limits,
}

/// What the disk's thread tells this one.
#[derive(Debug)]
pub(super) enum Order {
    /// Touch nothing any more.
    Stop,
    /// The disk has as many bytes now.
    Resized(u64),
    /// A sync has failed, and the guest is to lose the disk.
    SyncFailed,
}

/// Where orders come in.
pub(super) struct Orders {
    orders: Receiver<Order>,
    bell: OwnedFd,
    /// The last one has come.
    is_over: Cell<bool>,
}

/// Where they are given.
pub(super) struct Orderer {
    orders: Sender<Order>,
    bell: OwnedFd,
}

/// A way for orders.
///
/// # Errors
/// When there are no more descriptors.
pub(super) fn orders() -> std::io::Result<(Orderer, Orders)> {
    let (sender, receiver) = channel();
    let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let other = bell.try_clone()?;
    Ok((
        Orderer { orders: sender, bell: other },
        Orders { orders: receiver, bell, is_over: Cell::new(false) },
    ))
}

impl Orderer {
    pub(super) fn give(&self, order: Order) {
        if self.orders.send(order).is_err() {
            return; // the thread has ended
        }
        if let Err(errno) = rustix::io::write(&self.bell, &1_u64.to_ne_bytes()) {
            tracing::debug!(%errno, "the bell rings already");
        }
    }
}

/// Without the disk's thread there is nothing to attend to.
impl Drop for Orderer {
    fn drop(&mut self) {
        self.give(Order::Stop);
    }
}

impl Orders {
    fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Waits for an order, for this long.
    fn wait(&self, time: Duration) {
        let mut fds = [PollFd::new(&self.bell, PollFlags::IN)];
        let time = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) };
        if let Err(errno) = rustix::event::poll(&mut fds, Some(&time)) {
            tracing::debug!(%errno, "the wait is over");
        }
    }

    fn take(&self) -> Option<Order> {
        if let Err(errno) = rustix::io::read(&self.bell, &mut [0; 8]) {
            tracing::trace!(%errno, "nobody has rung");
        }
        self.orders.try_recv().ok()
    }
}

/// Why the handshake cannot go on.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Store(#[from] Error),
    #[error("{0}")]
    Words(String),
}

/// What of the disk's life this thread remembers.
pub(super) struct Control<R> {
    way: Arc<dyn Connect>,
    settings: Settings,
    /// This process.
    ours: Owner,
    rings: R,
    orders: Orders,
    shape: Shape,
    /// Where the nodes are, once they are there.
    nodes: Option<Nodes>,
    is_connected: bool,
    has_offered: bool,
    has_seen_front: bool,
    is_retired: bool,
    /// A takeover at state 5 was refused: the front end is waited for.
    has_given_up: bool,
    /// A guest was taken over, and perhaps nothing in the store says yet with what image.
    owes_image: bool,
    /// Sectors that the guest was told of last, and bytes of a block: a predecessor may have told it of others than ours.
    sectors_told: u64,
    block_told: u32,
    complaints: Complaints,
    since: Instant,
    turns: Turns,
    looks: Turns,
}

impl<R: Rings> Control<R> {
    pub(super) fn new(
        way: Arc<dyn Connect>,
        settings: Settings,
        rings: R,
        orders: Orders,
        shape: Shape,
    ) -> Control<R> {
        Control {
            way,
            settings,
            ours: Owner::this(),
            rings,
            orders,
            shape,
            nodes: None,
            is_connected: false,
            has_offered: false,
            has_seen_front: false,
            is_retired: false,
            has_given_up: false,
            owes_image: false,
            sectors_told: 0,
            block_told: 0,
            complaints: Complaints::default(),
            since: Instant::now(),
            turns: Turns::new(CONNECTIONS, TURN),
            looks: Turns::new(LOOKS, LOOK),
        }
    }

    /// Attends to the disk until it ends; `None` when told to stop.
    pub(super) fn run(mut self, client: Client) -> Option<End> {
        let mut next = Some(client);
        loop {
            let attended = match next.take() {
                Some(client) => self.attend(client),
                None => match Client::connect(&*self.way) {
                    Ok(client) => {
                        tracing::info!(disk = self.settings.name, "the xenstore is back");
                        self.attend(client)
                    }
                    Err(error) => Err(error.into()),
                },
            };
            match attended {
                Ok(end) => return end,
                Err(Failure::Store(error)) if error.is_lost() && self.nodes.is_some() => {
                    self.complain(|untold| {
                        tracing::warn!(%error, untold, "the xenstore is gone: the disk is served, and nothing else changes");
                    });
                    self.orders.wait(PAUSE);
                    if self.obey() {
                        return None;
                    }
                }
                Err(failure) => return Some(End::Failed(failure.to_string())),
            }
        }
    }

    /// Attends to the disk over one connection to the store.
    fn attend(&mut self, mut client: Client) -> Result<Option<End>, Failure> {
        let nodes = match self.nodes.clone() {
            Some(nodes) => nodes,
            None => match self.set_up(&mut client)? {
                Some(nodes) => nodes,
                None => return Ok(None),
            },
        };
        self.nodes = Some(nodes.clone());
        client.watch(&nodes.back("state"), "back")?;
        client.watch(&nodes.back("online"), "online")?;
        client.watch(&nodes.front("state"), "front")?;
        client.watch("@releaseDomain", "domain")?;
        loop {
            if self.obey() {
                return Ok(None);
            }
            // Whatever has come is seen by the look that follows.
            while client.event().is_some() {}
            if let Some(time) = self.looks.take() {
                // A guest can change its state much faster than it can be looked at.
                self.orders.wait(time);
                continue;
            }
            let (end, time) = self.look(&mut client, &nodes)?;
            if end.is_some() || self.is_stopped() {
                return Ok(end);
            }
            client.wait(self.orders.bell(), time)?;
        }
    }

    /// Takes the orders that have come; whether one is to stop.
    fn obey(&mut self) -> bool {
        if self.is_stopped() {
            return true;
        }
        while let Some(order) = self.orders.take() {
            match order {
                Order::Stop => {
                    self.orders.is_over.set(true);
                    return true;
                }
                Order::Resized(size) => self.shape.size = size,
                Order::SyncFailed => {
                    self.is_retired = self.settings.on_failed_sync == OnFailedSync::Disconnect
                }
            }
        }
        false
    }

    /// Finds the nodes of the disk, or makes them; `None` when told to stop meanwhile.
    fn set_up(&mut self, client: &mut Client) -> Result<Option<Nodes>, Failure> {
        let (domain, device) = (self.settings.domain, self.settings.device);
        let mut nodes = Nodes::find(client, domain, device, &self.settings.kind)?;
        if !client.is_introduced(domain)? {
            if client.now().read(&nodes.back("state"))?.is_some() {
                // It died while nobody served it: what it has left is cleared away by the first look.
                return Ok(self.take(client, &nodes)?.then_some(nodes));
            }
            return Err(Failure::Words(format!(
                "there is no domain {domain}: `xl list` shows those there are"
            )));
        }
        if self.settings.create_nodes {
            // Before anything that it uses is made anew.
            if !self.wait_for_turn(client, &nodes, |client, nodes, ours| {
                Ok(match nodes.server(&mut client.now())? {
                    Server::Alive(other) => Some(other).filter(|other| *other != ours),
                    Server::Unknown | Server::Gone(_) | Server::Other(_) => None,
                })
            })? {
                return Ok(None);
            }
            self.make_nodes(client, &nodes)?;
        } else if !self.wait_until(client, &nodes.backend, |client| {
            Ok(client.now().read(&nodes.back("frontend"))?.is_some()
                && client.now().read(&nodes.back("state"))?.is_some())
        })? {
            if self.is_stopped() {
                return Ok(None);
            }
            return Err(Failure::Words(format!(
                "the xenstore has no disk at {}: attach it with a toolstack, as in \
                 `xl block-attach {domain} 'format=raw,vdev={},backendtype=tap,target=…'`, or let tapdisk write the \
                 nodes with --create-nodes",
                nodes.backend,
                nodes::name(device)
            )));
        }
        if let Some(path) = client.now().read(&nodes.back("frontend"))? {
            nodes.frontend = path;
        }
        let owner = client.now().read(&nodes.back("frontend-id"))?;
        if owner.as_deref().is_some_and(|owner| owner != domain.to_string()) {
            return Err(Failure::Words(format!(
                "{} is {}, not {domain}",
                nodes.back("frontend-id"),
                Quoted::new(&owner.unwrap_or_default())
            )));
        }
        let mode = client.now().read(&nodes.back("mode"))?.unwrap_or_default();
        if mode.starts_with('r') && !self.shape.limits.read_only {
            return Err(Failure::Words(
                "the toolstack made this disk read-only (mode r): serve it with --read-only".into(),
            ));
        }
        if !self.take(client, &nodes)? {
            return Ok(None);
        }
        tracing::info!(
            disk = self.settings.name,
            nodes = nodes.backend,
            "attends to its nodes in the xenstore"
        );
        Ok(Some(nodes))
    }

    /// Takes the disk for this process, once no other one serves it; false when told to stop meanwhile.
    fn take(&mut self, client: &mut Client, nodes: &Nodes) -> Result<bool, Failure> {
        let image = nodes::identity(&self.settings);
        self.wait_for_turn(client, nodes, |client, nodes, ours| {
            client.transaction(|view| {
                // What was removed meanwhile is not brought back.
                let Some(state) = view.read(&nodes.back("state"))? else { return Ok(None) };
                let other = nodes.claim(view, ours)?;
                // What a guest has in use is said there, and compared with ours before it is taken over.
                let may_be_in_use =
                    matches!(Said::new(Some(&state)), Said::State(State::Connected | State::Closing));
                if other.is_none() && !may_be_in_use {
                    view.write(&nodes.back(nodes::IMAGE), &image)?;
                }
                Ok(other)
            })
        })
    }

    /// Waits until no other process is in the way, for as long as [`PATIENCE`]; false when told to stop meanwhile.
    fn wait_for_turn(
        &mut self,
        client: &mut Client,
        nodes: &Nodes,
        mut who: impl FnMut(&mut Client, &Nodes, Owner) -> Result<Option<Owner>, Error>,
    ) -> Result<bool, Failure> {
        let (ours, mut other) = (self.ours, None);
        let is_free = self.wait_until(client, &nodes.back(nodes::SERVER), |client| {
            other = who(client, nodes, ours)?;
            Ok(other.is_none())
        })?;
        match other {
            Some(other) if !is_free && !self.is_stopped() => Err(served_already(other)),
            Some(_) | None => Ok(is_free),
        }
    }

    /// Makes the nodes, unless a predecessor has.
    fn make_nodes(&self, client: &mut Client, nodes: &Nodes) -> Result<(), Failure> {
        let back_is_there = client.now().read(&nodes.backend)?.is_some();
        let others = client.now().read(&nodes.front("backend"))?;
        if back_is_there && !nodes.are_ours(&mut client.now())? {
            return Err(Failure::Words(format!(
                "{} is there already, and tapdisk has not made it: without --create-nodes tapdisk attaches to it",
                nodes.backend
            )));
        }
        match others {
            Some(other) if other != nodes.backend => {
                return Err(Failure::Words(format!(
                    "domain {} has this disk already, from {}: choose another device",
                    self.settings.domain,
                    Quoted::new(&other)
                )));
            }
            // A predecessor's. One that was to go, and has gone as far as the guest is concerned, is made anew.
            Some(_) if back_is_there => {
                let online = client.now().read(&nodes.back("online"))?;
                let front = client.now().read(&nodes.front("state"))?;
                let is_over = online.as_deref() != Some("1")
                    && matches!(
                        Said::new(front.as_deref()),
                        Said::Absent | Said::State(State::Closed | State::Initialising)
                    );
                if !is_over {
                    return Ok(());
                }
            }
            Some(_) | None => {}
        }
        match nodes.create(client, &self.settings, self.shape.limits.read_only, self.ours)? {
            Some(other) => Err(served_already(other)),
            None => Ok(()),
        }
    }

    /// Waits until something is so, for as long as [`PATIENCE`]; false if it is not, or if told to stop.
    fn wait_until(
        &mut self,
        client: &mut Client,
        path: &str,
        mut is_so: impl FnMut(&mut Client) -> Result<bool, Error>,
    ) -> Result<bool, Failure> {
        let end = Instant::now() + PATIENCE;
        let mut has_waited = false;
        client.watch(path, "awaited")?;
        let is_so = loop {
            if is_so(client)? {
                break true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break false;
            }
            if !std::mem::replace(&mut has_waited, true) {
                tracing::info!(node = path, seconds = left.as_secs(), "waits for it in the xenstore");
            }
            // Processes end without a word in the store.
            let time = left.min(PAUSE / 4);
            if client.wait(self.orders.bell(), Some(time))? == Woken::Other && self.obey() {
                break false;
            }
            while client.event().is_some() {}
        };
        client.unwatch(path, "awaited")?;
        Ok(is_so)
    }

    fn is_stopped(&self) -> bool {
        self.orders.is_over.get()
    }

    /// Does what is to be done. Why it is over, if so, or when to look again.
    fn look(
        &mut self,
        client: &mut Client,
        nodes: &Nodes,
    ) -> Result<(Option<End>, Option<Duration>), Failure> {
        for _ in 0..STEPS_MAX {
            if self.is_stopped() {
                return Ok((None, None));
            }
            let situation = self.survey(client, nodes)?;
            match judge(&situation) {
                Step::Wait => {
                    self.tell_image(client, nodes)?;
                    self.tell_size(client, nodes)?;
                    return Ok((None, None));
                }
                Step::Offer => self.offer(client, nodes)?,
                Step::Connect => {
                    if let Some(time) = self.turns.take() {
                        return Ok((None, Some(time)));
                    }
                    self.connect(client, nodes)?;
                }
                Step::TakeOver => match self.take_over(client, nodes) {
                    Err(Failure::Words(why)) if situation.back == Said::State(State::Closing) => {
                        tracing::warn!(
                            why,
                            "the guest is asked to close the disk, and is not served until then"
                        );
                        self.has_given_up = true;
                    }
                    other => other?,
                },
                Step::Close => self.put(client, nodes, &[], State::Closing)?,
                Step::Closed => {
                    self.disconnect(parting(situation.front));
                    self.put(client, nodes, &[], State::Closed)?;
                }
                Step::Detach => {
                    self.disconnect(parting(situation.front));
                    self.leave(client, nodes)?;
                    let end = if self.is_retired { End::Taken } else { End::Detached };
                    return Ok((Some(end), None));
                }
                Step::Bury => {
                    self.disconnect(Parting::Forget);
                    self.leave(client, nodes)?;
                    return Ok((Some(End::GuestGone), None));
                }
            }
        }
        Ok((None, Some(TURN)))
    }

    fn survey(&mut self, client: &mut Client, nodes: &Nodes) -> Result<Situation, Failure> {
        let guest_lives = client.is_introduced(self.settings.domain)?;
        let mut view = client.now();
        let back = Said::new(view.read(&nodes.back("state"))?.as_deref());
        // Nodes that another process has taken are not those we knew: a toolstack has removed those, and made others.
        let back = if nodes.is_claimed_by(&mut view, self.ours)? { back } else { Said::Absent };
        let online = view.read(&nodes.back("online"))?;
        let front = Said::new(view.read(&nodes.front("state"))?.as_deref());
        let situation = Situation {
            guest_lives,
            back,
            front,
            online: online.and_then(|online| number(&online)).is_some_and(|online| online != 0),
            connected: self.is_connected,
            offered: self.has_offered,
            front_was_there: self.has_seen_front,
            retired: self.is_retired,
            given_up: self.has_given_up,
        };
        self.has_seen_front |= front != Said::Absent;
        Ok(situation)
    }

    /// Writes nodes of ours, and the state last, all at once; nothing where they have been removed meanwhile, or are another's.
    fn put(
        &self,
        client: &mut Client,
        nodes: &Nodes,
        values: &[(&str, String)],
        state: State,
    ) -> Result<(), Failure> {
        client.transaction(|view| {
            let Some(now) = view.read(&nodes.back("state"))? else { return Ok(()) };
            if !nodes.is_claimed_by(view, self.ours)? {
                return Ok(());
            }
            // A toolstack takes the disk away meanwhile: the next look sees to that.
            if state < State::Closing && now == State::Closing.text() {
                return Ok(());
            }
            for (key, value) in values {
                view.write(&nodes.back(key), value)?;
            }
            view.write(&nodes.back("state"), state.text())
        })?;
        Ok(())
    }

    /// Tells what rings the front end may have. Before state 2, since it reads that then.
    fn offer(&mut self, client: &mut Client, nodes: &Nodes) -> Result<(), Failure> {
        let Features { multi_page, multi_queue, .. } = self.settings.features;
        let order = if multi_page { ORDER_MAX } else { 0 };
        let queues = if multi_queue { self.settings.queues } else { 1 };
        let values =
            [("max-ring-page-order", order.to_string()), ("multi-queue-max-queues", queues.to_string())];
        self.put(client, nodes, &values, State::InitWait)?;
        self.has_offered = true;
        Ok(())
    }

    /// What the store tells the front end of its rings, be it from us or from a predecessor.
    fn terms(&self, client: &mut Client, nodes: &Nodes, persistent: bool) -> Result<Terms, Failure> {
        let mut read = |key: &str, most: u16| {
            let told = client.now().read(&nodes.back(key))?.and_then(|text| number(&text));
            Ok::<_, Error>(told.map_or(0, |told| u16::try_from(told).unwrap_or(most).min(most)))
        };
        let queues = read("multi-queue-max-queues", QUEUES_MAX)?.max(1);
        Ok(Terms { queues, order: read("max-ring-page-order", ORDER_MAX)?, persistent })
    }

    fn connect(&mut self, client: &mut Client, nodes: &Nodes) -> Result<(), Failure> {
        self.disconnect(Parting::Forget);
        let features = self.settings.features;
        let terms = self.terms(client, nodes, self.offers_persistence())?;
        let agreed = match negotiate(&terms, |key| client.now().read(&nodes.front(key)))? {
            Ok(agreed) => agreed,
            Err(wrong) => return self.refuse(client, nodes, &wrong.to_string()),
        };
        let may_discard = client.now().read(&nodes.back("discard-enable"))?.as_deref() != Some("0");
        let offered = Offered {
            flush_cache: features.flush_cache,
            barrier: features.barrier,
            discard: features.discard && may_discard && !self.shape.limits.read_only,
            indirect: if features.indirect { INDIRECT } else { 0 },
            block: self.settings.block,
        };
        let connection = self.connection(agreed, offered, Start::Fresh);
        let (rings, pages) =
            (connection.rings.len(), connection.rings.first().map_or(0, |ring| ring.refs.len()));
        let (abi, persistent) = (connection.abi, connection.persistent);
        match self.rings.connect(connection) {
            Ok(size) => self.connected(size),
            // Nothing is connected any more when we are to stop, and a successor will be.
            Err(_stopping) if self.obey() => return Ok(()),
            Err(error) => return self.refuse(client, nodes, &error),
        }
        let values = self.values(client, nodes, &offered)?;
        self.put(client, nodes, &values, State::Connected)?;
        self.complain(|untold| {
            tracing::info!(rings, pages, ?abi, persistent, untold, "the guest is connected");
        });
        Ok(())
    }

    fn connected(&mut self, size: u64) {
        self.is_connected = true;
        // Word of its growth may still be on the way.
        self.shape.size = self.shape.size.max(size);
    }

    /// What the front end wrote makes no sense: it may close, and try again.
    fn refuse(&mut self, client: &mut Client, nodes: &Nodes, why: &str) -> Result<(), Failure> {
        self.complain(|untold| tracing::warn!(why, untold, "the guest is not connected"));
        self.put(client, nodes, &[], State::Closing)
    }

    fn connection(&self, agreed: negotiate::Agreed, offered: Offered, start: Start) -> Connection {
        let negotiate::Agreed { abi, rings, persistent } = agreed;
        Connection { domain: self.settings.domain, abi, rings, offered, persistent, start }
    }

    /// What the front end reads when we are connected, and what toolstacks do.
    fn values(
        &mut self,
        client: &mut Client,
        nodes: &Nodes,
        offered: &Offered,
    ) -> Result<Vec<(&'static str, String)>, Failure> {
        let (limits, block) = (self.shape.limits, offered.block);
        let flag = |is_so: bool| if is_so { "1".to_owned() } else { "0".to_owned() };
        let mut view = client.now();
        let is_cdrom = view.read(&nodes.back("device-type"))?.as_deref() == Some("cdrom");
        let is_removable = view.read(&nodes.back("removable"))?.as_deref() == Some("1");
        let info = [(is_cdrom, CDROM), (is_removable, REMOVABLE), (limits.read_only, READ_ONLY)];
        let info: u32 = info.iter().filter(|(is_so, _)| *is_so).map(|(_, bit)| bit).sum();
        let sectors = self.sectors(block);
        // Whole ones of these make up the disk (blkif.h, "sectors").
        let physical = Some(limits.align.max(block))
            .filter(|physical| (sectors * SECTOR).is_multiple_of(u64::from(*physical)))
            .unwrap_or(block);
        let mut values = vec![
            ("sectors", sectors.to_string()),
            ("sector-size", block.to_string()),
            ("physical-sector-size", physical.to_string()),
            ("info", info.to_string()),
            ("feature-barrier", flag(offered.barrier)),
            ("feature-flush-cache", flag(offered.flush_cache)),
            ("feature-discard", flag(offered.discard)),
            ("feature-persistent", flag(self.offers_persistence())),
            ("feature-max-indirect-segments", offered.indirect.to_string()),
            ("hotplug-status", "connected".to_owned()),
            (nodes::IMAGE, nodes::identity(&self.settings)),
        ];
        if offered.discard {
            values.push(("discard-granularity", limits.preferred.max(block).to_string()));
            values.push(("discard-alignment", "0".to_owned()));
            values.push(("discard-secure", "0".to_owned()));
        }
        if view.read(&nodes.back("physical-device-path"))?.is_none() {
            values.push(("physical-device-path", nodes::identity(&self.settings)));
        }
        (self.sectors_told, self.block_told) = (sectors, block);
        Ok(values)
    }

    /// A front end that keeps its grants copies all bytes through them. Only who maps them has something of it.
    fn offers_persistence(&self) -> bool {
        self.settings.features.persistent && self.settings.data == DataPath::Map
    }

    /// The disk's size in the unit of `sectors`, whole blocks only.
    fn sectors(&self, block: u32) -> u64 {
        let block = u64::from(block.max(1));
        self.shape.size / block * block / SECTOR
    }

    /// Goes on with the rings that a predecessor has served.
    fn take_over(&mut self, client: &mut Client, nodes: &Nodes) -> Result<(), Failure> {
        let ours = nodes::identity(&self.settings);
        match client.now().read(&nodes.back(nodes::IMAGE))? {
            Some(image) if image != ours => {
                return Err(Failure::Words(format!(
                    "the guest uses this disk, and it is {}, not {ours}: serve that one, or detach the disk first",
                    Quoted::new(&image)
                )));
            }
            Some(_) | None => {}
        }
        let mut view = client.now();
        let mut is = |key: &str| Ok::<_, Error>(view.read(&nodes.back(key))?.as_deref() == Some("1"));
        let (flush_cache, barrier) = (is("feature-flush-cache")?, is("feature-barrier")?);
        let (discard, persistent) = (is("feature-discard")?, is("feature-persistent")?);
        let mut told =
            |key: &str| Ok::<_, Error>(view.read(&nodes.back(key))?.and_then(|text| number(&text)));
        let indirect = told("feature-max-indirect-segments")?.unwrap_or(0);
        let indirect = u16::try_from(indirect).unwrap_or(u16::MAX);
        let block = told("sector-size")?;
        let Some(block @ (512 | 4096)) = block else {
            return Err(Failure::Words(format!("{} is neither 512 nor 4096", nodes.back("sector-size"))));
        };
        let told = view.read(&nodes.back("sectors"))?.and_then(|text| text.parse().ok()).unwrap_or(0);
        let offered = Offered { flush_cache, barrier, discard, indirect, block };
        let terms = self.terms(client, nodes, persistent)?;
        let agreed = negotiate(&terms, |key| client.now().read(&nodes.front(key)))?
            .map_err(|wrong| not_taken_over(&wrong.to_string()))?;
        let connection = self.connection(agreed, offered, Start::TakeOver);
        let size = self.rings.connect(connection).map_err(|error| not_taken_over(&error))?;
        self.connected(size);
        self.has_offered = true;
        (self.sectors_told, self.block_told) = (told, block);
        self.owes_image = true;
        tracing::info!(disk = self.settings.name, "goes on with the guest of a predecessor");
        Ok(())
    }

    /// Says what a guest that was taken over uses, where a predecessor has not.
    fn tell_image(&mut self, client: &mut Client, nodes: &Nodes) -> Result<(), Failure> {
        if !self.owes_image {
            return Ok(());
        }
        let (image, ours) = (nodes::identity(&self.settings), self.ours);
        client.transaction(|view| {
            if nodes.is_claimed_by(view, ours)? && view.read(&nodes.back(nodes::IMAGE))?.is_none() {
                view.write(&nodes.back(nodes::IMAGE), &image)?;
            }
            Ok(())
        })?;
        self.owes_image = false;
        Ok(())
    }

    /// Lets the guest know if the disk has grown: the size, then our state once more.
    fn tell_size(&mut self, client: &mut Client, nodes: &Nodes) -> Result<(), Failure> {
        let sectors = self.sectors(self.block_told);
        if !self.is_connected || sectors <= self.sectors_told {
            return Ok(());
        }
        client.transaction(|view| {
            // Not beside a close that is under way.
            if view.read(&nodes.back("state"))?.as_deref() == Some(State::Connected.text()) {
                view.write(&nodes.back("sectors"), &sectors.to_string())?;
                view.write(&nodes.back("state"), State::Connected.text())?;
            }
            Ok(())
        })?;
        self.sectors_told = sectors;
        tracing::info!(disk = self.settings.name, sectors, "the guest is told of the new size");
        Ok(())
    }

    fn disconnect(&mut self, how: Parting) {
        if std::mem::replace(&mut self.is_connected, false) {
            self.rings.disconnect(how);
        }
    }

    /// The last that we write: a toolstack waits for state 6. What we have made is removed. What is another's by now is
    /// left alone.
    fn leave(&self, client: &mut Client, nodes: &Nodes) -> Result<(), Failure> {
        let ours = self.ours;
        let is_to_be_removed = client.transaction(|view| {
            if !nodes.is_claimed_by(view, ours)? {
                return Ok(false);
            }
            view.write(&nodes.back("state"), State::Closed.text())?;
            let are_ours = nodes.are_ours(view)?;
            if !are_ours {
                nodes.release(view)?;
            }
            Ok(are_ours)
        })?;
        if is_to_be_removed {
            client.transaction(|view| match nodes.is_claimed_by(view, ours)? {
                true => nodes.remove(view),
                false => Ok(()),
            })?;
        }
        Ok(())
    }

    /// Says something unless the guest has made us say too much lately.
    fn complain(&self, say: impl FnOnce(u64)) {
        let nanos = u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        if let Some(untold) = self.complaints.admit(runtime::Instant(nanos)) {
            say(untold);
        }
    }
}

/// How a front end is left that is at this state.
fn parting(front: Said) -> Parting {
    match front {
        Said::State(State::Initialised | State::Connected | State::Closing) => Parting::Tell,
        // It lets go of its rings only after we have closed too.
        Said::State(State::Closed) => Parting::Closed,
        // It has started anew, or is gone.
        Said::State(State::Initialising | State::InitWait | State::Reconfiguring | State::Reconfigured)
        | Said::Absent
        | Said::Nonsense => Parting::Forget,
    }
}

fn not_taken_over(why: &str) -> Failure {
    Failure::Words(format!(
        "the guest uses this disk, but its rings cannot be taken over: {why}. Detach the disk (tapdisk detach, or \
         xl block-detach), then attach it anew"
    ))
}

fn served_already(other: Owner) -> Failure {
    Failure::Words(format!("process {} serves this disk already", other.pid))
}

/// How often a guest may make us do something that costs us much more than it costs the guest.
struct Turns {
    most: u32,
    every: Duration,
    left: u32,
    since: Instant,
}

impl Turns {
    /// So many at once, and then one for each of these times.
    fn new(most: u32, every: Duration) -> Turns {
        Turns { most, every, left: most, since: Instant::now() }
    }

    /// Takes one, or says how long to wait for it.
    fn take(&mut self) -> Option<Duration> {
        let gained =
            u32::try_from(self.since.elapsed().as_nanos() / self.every.as_nanos()).unwrap_or(self.most);
        self.left = self.left.saturating_add(gained).min(self.most);
        self.since = if self.left == self.most { Instant::now() } else { self.since + self.every * gained };
        if self.left == 0 {
            return Some(self.every.saturating_sub(self.since.elapsed()).max(Duration::from_millis(1)));
        }
        self.left -= 1;
        None
    }
}

#[cfg(test)]
mod tests;
