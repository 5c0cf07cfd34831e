//! A server of NBD: it accepts clients, looks after them, and shows them out.

use runtime::Handle;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};

use super::connection::{Connection, DropOnPanic, FinishWhenDropped};
use super::export::Exports;
use super::negotiation::Negotiation;
use super::peer::{End, Patience, Peer};
use super::session;
use super::stream::LargeBuffers;
use crate::budget::Budget;
use crate::complaints::Complaints;
use crate::listen::{Listener, Origin};
use crate::signal::Signal;

/// What an operator can choose.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Connections at a time; who comes when there are so many is sent away.
    pub connections_max: usize,
    /// Bytes of memory for the payloads of all clients' requests; at least [`Budget::MIN`] is used.
    pub memory: usize,
    /// What clients are given time for.
    pub patience: Patience,
}

impl Default for Settings {
    /// 1024 connections, 256 MiB.
    fn default() -> Settings {
        Settings { connections_max: 1024, memory: 256 << 20, patience: Patience::default() }
    }
}

/// What a server is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Connections that are open, or that have requests with a disk.
    pub connections: usize,
    /// Requests taken so far.
    pub requests: u64,
    /// Requests with a disk.
    pub unanswered: usize,
    /// Bytes of memory that requests use.
    pub memory: usize,
    /// Bytes of memory that busy clients' stream buffers use beside it.
    pub buffers: usize,
}

/// Serves disks to NBD clients, on the thread of those disks. A clone is the same server.
#[derive(Clone)]
pub struct Server(Rc<Shared>);

struct Shared {
    handle: Handle,
    exports: Rc<Exports>,
    settings: Settings,
    budget: Budget,
    large_buffers: LargeBuffers,
    peers: RefCell<BTreeMap<u64, Rc<Peer>>>,
    ids: Cell<u64>,
    /// Requests of clients that are gone.
    requests: Cell<u64>,
    /// Set when no client is to be accepted any more.
    closing: Signal,
    /// Set when the last client and the last listener are gone after that.
    emptied: Signal,
    listeners: Cell<usize>,
    is_watching: Cell<bool>,
    watcher: RefCell<Option<Waker>>,
    complaints: Complaints,
}

impl Server {
    /// A server of these exports that nobody can reach yet.
    pub fn new(handle: Handle, exports: Exports, settings: Settings) -> Server {
        Server(Rc::new(Shared {
            budget: Budget::new(settings.memory),
            handle,
            exports: Rc::new(exports),
            settings,
            large_buffers: LargeBuffers::default(),
            peers: RefCell::default(),
            ids: Cell::new(1),
            requests: Cell::new(0),
            closing: Signal::default(),
            emptied: Signal::default(),
            listeners: Cell::new(0),
            is_watching: Cell::new(false),
            watcher: RefCell::default(),
            complaints: Complaints::default(),
        }))
    }

    /// Accepts clients here until the server is drained.
    pub fn listen(&self, listener: Listener) {
        let shared = self.0.clone();
        shared.listeners.set(shared.listeners.get() + 1);
        self.0.handle.spawn(async move {
            let _end = EndOfListening(&shared);
            shared.accept_clients(listener).await;
        });
    }

    /// Serves the client at the other end of this connected socket.
    pub fn adopt(&self, socket: OwnedFd) {
        let origin = Origin::of(&socket);
        self.0.welcome(socket, origin);
    }

    /// What it is doing.
    pub fn stats(&self) -> Stats {
        let peers = self.0.peers.borrow();
        Stats {
            connections: peers.len(),
            requests: self.0.requests.get() + peers.values().map(|peer| peer.taken.get()).sum::<u64>(),
            unanswered: peers.values().map(|peer| peer.unanswered.get()).sum(),
            memory: self.0.budget.used(),
            buffers: self.0.large_buffers.used(),
        }
    }

    /// Stops accepting clients and taking requests, answers those that were taken, and closes all connections.
    ///
    /// It waits for the disk for as long as that takes (who holds requests answers them before, or meanwhile),
    /// then up to [`Patience::leave`] for clients that do not read their answers.
    pub async fn drain(&self) {
        self.0.closing.happen();
        for peer in self.0.peers.borrow().values() {
            peer.leave();
        }
        self.0.tell_if_empty();
        self.0.emptied.wait().await;
    }
}

impl Shared {
    async fn accept_clients(self: &Rc<Self>, listener: Listener) {
        let mut door = match listener.open(&self.handle) {
            Ok(door) => door,
            Err(errno) => return tracing::error!(%errno, "a listener cannot be used"),
        };
        while let Some(client) = door.next(&self.closing).await {
            let origin = Origin::of(&client);
            self.welcome(client, origin);
        }
    }

    fn welcome(self: &Rc<Self>, socket: OwnedFd, origin: Origin) {
        if self.closing.has_happened() {
            return;
        }
        if self.peers.borrow().len() >= self.settings.connections_max {
            if let Some(untold) = self.complaints.admit(self.handle.now()) {
                let max = self.settings.connections_max;
                tracing::warn!(peer = %origin, max, untold, "too many connections: this one is closed at once");
            }
            return;
        }
        origin.tune(&socket);
        let id = self.ids.replace(self.ids.get() + 1);
        let is_tcp = origin.is_tcp();
        let socket = self.handle.register(socket);
        let peer = Peer::new(id, origin.to_string(), is_tcp, socket, self.handle.clone(), &self.budget);
        let peer = Rc::new(peer);
        self.peers.borrow_mut().insert(id, peer.clone());
        if !self.is_watching.replace(true) {
            let shared = self.clone();
            self.handle.spawn(async move { shared.watch().await });
        }
        let shared = self.clone();
        self.handle.spawn(async move {
            let _guard = Farewell { shared: &shared, peer: &peer };
            let _panic = DropOnPanic(&peer);
            shared.serve(&peer).await;
        });
    }

    async fn serve(&self, peer: &Rc<Peer>) {
        tracing::debug!(client = peer.id, peer = peer.name, "connected");
        let negotiation = Negotiation::new(self.exports.clone());
        let mut result = None;
        let end = peer
            .until_told(async {
                match session::negotiate(peer, negotiation).await {
                    Ok(Some(agreed)) => {
                        result = Some(agreed);
                        End::Disconnected // not yet, see below
                    }
                    Ok(None) => End::Disconnected,
                    Err(end) => end,
                }
            })
            .await;
        let Some((agreed, received)) = result else {
            return self.tell(peer, &end, None);
        };
        let connection = Rc::new(Connection::new(peer.clone(), agreed.style, agreed.export.disk().clone()));
        tracing::info!(
            client = peer.id,
            peer = peer.name,
            export = agreed.export.name(),
            style = ?agreed.style,
            "client connected"
        );
        self.handle.spawn(connection.clone().send_answers());
        let finish = FinishWhenDropped(&connection);
        let end = session::transmit(&connection, &agreed, received, self.large_buffers.clone()).await;
        drop(finish);
        self.tell(peer, &end, Some(peer.taken.get()));
    }

    /// Logs how a connection ended, after so many requests if it got that far.
    fn tell(&self, peer: &Peer, end: &End, requests: Option<u64>) {
        let client = peer.id;
        match end {
            End::Handshake(_) | End::Request(_) | End::Dropped(_) => {
                match self.complaints.admit(self.handle.now()) {
                    Some(0) => tracing::warn!(client, peer = peer.name, requests, "client dropped: {end}"),
                    Some(untold) => {
                        tracing::warn!(
                            client,
                            peer = peer.name,
                            requests,
                            untold,
                            "client dropped: {end} (and others before, untold)"
                        );
                    }
                    None => tracing::debug!(client, peer = peer.name, requests, "client dropped: {end}"),
                }
            }
            End::Closed | End::Truncated | End::Disconnected | End::Failed(_) | End::Drained => {
                match requests {
                    Some(requests) => {
                        tracing::info!(client, peer = peer.name, requests, "client disconnected: {end}");
                    }
                    None => tracing::debug!(client, peer = peer.name, "disconnected in the handshake: {end}"),
                }
            }
        }
    }

    fn tell_if_empty(&self) {
        let is_empty = self.peers.borrow().is_empty() && self.listeners.get() == 0;
        if is_empty && self.closing.has_happened() {
            self.emptied.happen();
        }
    }

    /// Looks after all connections while there are any.
    async fn watch(&self) {
        while self.next_round().await {
            let peers: Vec<_> = self.peers.borrow().values().cloned().collect();
            for peer in peers {
                peer.look_after(&self.budget, &self.settings.patience);
            }
        }
        self.is_watching.set(false);
    }

    /// Waits for the time of the next round; false as soon as there is nobody left to look after.
    async fn next_round(&self) -> bool {
        let mut sleep = pin!(self.handle.sleep(self.settings.patience.round));
        std::future::poll_fn(|cx| {
            if self.peers.borrow().is_empty() {
                return Poll::Ready(false);
            }
            *self.watcher.borrow_mut() = Some(cx.waker().clone());
            sleep.as_mut().poll(cx).map(|()| true)
        })
        .await
    }
}

/// Takes a client off the list when its task ends, however it ends.
struct Farewell<'a> {
    shared: &'a Shared,
    peer: &'a Peer,
}

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        let mut peers = self.shared.peers.borrow_mut();
        peers.remove(&self.peer.id);
        if let (true, Some(watcher)) = (peers.is_empty(), self.shared.watcher.take()) {
            watcher.wake();
        }
        drop(peers);
        self.shared.requests.set(self.shared.requests.get() + self.peer.taken.get());
        self.shared.tell_if_empty();
    }
}

/// Counts a listener out when its task ends, however it ends.
struct EndOfListening<'a>(&'a Shared);

impl Drop for EndOfListening<'_> {
    fn drop(&mut self) {
        self.0.listeners.set(self.0.listeners.get() - 1);
        self.0.tell_if_empty();
    }
}
