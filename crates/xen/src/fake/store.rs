//! A xenstore within the process: clients speak the wire protocol with it, tests look into it and disturb it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block::Errno;

use super::tree::{Change, Tree, is_within};
use crate::Domain;
use crate::store::wire::{self, Inbox, Kind, Message};
use crate::store::{Connect, ConnectError, Permission};

/// A store. A clone is the same one.
#[derive(Clone)]
pub struct Store(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Something has changed.
    changed: Condvar,
}

struct State {
    tree: Tree,
    introduced: BTreeSet<Domain>,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    next_transaction: u32,
    /// Counts changes.
    now: u64,
    /// When each path was changed last, or removed.
    changes: BTreeMap<String, u64>,
    /// What was asked, oldest first.
    requests: Vec<(Kind, String)>,
    failures: Vec<Failure>,
    is_refusing: bool,
}

/// A request that is to fail.
struct Failure {
    /// After so many others.
    after: u64,
    errno: Errno,
}

struct Connection {
    domain: Domain,
    socket: UnixStream,
    /// To the thread that writes, so that a client that does not read keeps nobody waiting.
    outgoing: Sender<Message>,
    /// Paths and tokens.
    watches: Vec<(String, String)>,
    transactions: BTreeMap<u32, Transaction>,
}

struct Transaction {
    begun: u64,
    tree: Tree,
    changes: Vec<Change>,
    /// What was read or changed.
    touched: BTreeSet<String>,
}

impl Default for Store {
    fn default() -> Store {
        Store::new()
    }
}

impl Store {
    /// An empty one, which knows domain 0 alone.
    pub fn new() -> Store {
        let state = State {
            tree: Tree::new(),
            introduced: BTreeSet::from([Domain(0)]),
            connections: BTreeMap::new(),
            next_connection: 0,
            next_transaction: 1,
            now: 0,
            changes: BTreeMap::new(),
            requests: Vec::new(),
            failures: Vec::new(),
            is_refusing: false,
        };
        Store(Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, who: Domain, change: Change) -> Result<(), Errno> {
        let mut state = self.state();
        let done = state.apply(who, &change);
        self.0.changed.notify_all();
        done
    }

    /// Gives a node a value, as domain 0.
    ///
    /// # Panics
    /// If the path is wrong.
    pub fn write(&self, path: &str, value: &str) {
        self.write_as(Domain(0), path, value).expect("domain 0 may write everything");
    }

    /// Gives a node a value, as any domain.
    ///
    /// # Errors
    /// If that domain may not.
    pub fn write_as(&self, who: Domain, path: &str, value: &str) -> Result<(), Errno> {
        self.change(who, Change::Write(path.to_owned(), value.into()))
    }

    /// The value of a node, as text.
    pub fn read(&self, path: &str) -> Option<String> {
        self.read_as(Domain(0), path).ok()
    }

    /// The value of a node, as text, for any domain.
    ///
    /// # Errors
    /// If there is none, or that domain may not read it.
    pub fn read_as(&self, who: Domain, path: &str) -> Result<String, Errno> {
        Ok(String::from_utf8_lossy(&self.state().tree.read(who, path)?).into_owned())
    }

    /// The names of the nodes right below this one.
    pub fn list(&self, path: &str) -> Vec<String> {
        self.state().tree.list(Domain(0), path).unwrap_or_default()
    }

    /// Removes a node with all below it, if it is there.
    pub fn remove(&self, path: &str) {
        if let Err(errno) = self.change(Domain(0), Change::Remove(path.to_owned())) {
            tracing::debug!(%errno, path, "nothing was removed");
        }
    }

    /// Who may do what with a node, as the protocol writes it: `n0 r5`. Empty where there is none.
    pub fn permissions(&self, path: &str) -> String {
        let permissions = self.state().tree.permissions(Domain(0), path).unwrap_or_default();
        permissions.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }

    /// Says who may do what with a node, written as `n0 r5`.
    ///
    /// # Panics
    /// If there is no such node, or a word is wrong.
    pub fn set_permissions(&self, path: &str, words: &str) {
        let permissions: Vec<Permission> =
            words.split(' ').map(|word| word.parse().expect("a permission")).collect();
        self.change(Domain(0), Change::SetPermissions(path.to_owned(), permissions)).expect("a node");
    }

    /// A domain comes into being.
    pub fn introduce(&self, domain: Domain) {
        let mut state = self.state();
        state.introduced.insert(domain);
        state.fire("@introduceDomain");
        self.0.changed.notify_all();
    }

    /// A domain dies. Its nodes stay, as in a real store, until a toolstack removes them.
    pub fn release(&self, domain: Domain) {
        let mut state = self.state();
        state.introduced.remove(&domain);
        state.fire("@releaseDomain");
        self.0.changed.notify_all();
    }

    /// Waits until a node has this value.
    ///
    /// # Panics
    /// If that does not happen within half a minute.
    pub fn wait_for(&self, path: &str, value: &str) {
        self.wait_until(&format!("{path} is {value:?}"), |store| store(path).as_deref() == Some(value));
    }

    /// Waits until a node is gone.
    ///
    /// # Panics
    /// If that does not happen within half a minute.
    pub fn wait_for_absence(&self, path: &str) {
        self.wait_until(&format!("{path} is gone"), |store| store(path).is_none());
    }

    /// Waits until something is true of the values of nodes.
    ///
    /// # Panics
    /// If that does not happen within half a minute.
    pub fn wait_until(&self, what: &str, mut is_so: impl FnMut(&dyn Fn(&str) -> Option<String>) -> bool) {
        let end = Instant::now() + Duration::from_secs(30);
        let mut state = self.state();
        loop {
            let tree = state.tree.clone();
            let read = move |path: &str| {
                tree.read(Domain(0), path).ok().map(|value| String::from_utf8_lossy(&value).into_owned())
            };
            if is_so(&read) {
                return;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited half a minute until {what}: {:#?}", state.tree);
            // What is waited for may depend on more than the store.
            let waited = self.0.changed.wait_timeout(state, left.min(Duration::from_millis(20)));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What clients have asked so far, oldest first: the kind and the path.
    pub fn requests(&self) -> Vec<(Kind, String)> {
        self.state().requests.clone()
    }

    /// The request after the next `after` ones is answered with this error, and not done.
    pub fn fail(&self, after: u64, errno: Errno) {
        self.state().failures.push(Failure { after, errno });
    }

    /// Ends all connections, with their watches and transactions. New ones are let in.
    pub fn disconnect(&self) {
        for connection in std::mem::take(&mut self.state().connections).into_values() {
            hang_up(&connection.socket);
        }
    }

    /// Whether new connections are refused from now on.
    pub fn refuse(&self, is_refusing: bool) {
        self.state().is_refusing = is_refusing;
    }

    /// A connection of a domain.
    ///
    /// # Errors
    /// If new ones are refused, or the system has no more sockets.
    pub fn connect_as(&self, domain: Domain) -> std::io::Result<OwnedFd> {
        let mut state = self.state();
        if state.is_refusing {
            return Err(std::io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        let (outgoing, messages) = channel();
        let number = state.next_connection;
        state.next_connection += 1;
        let connection = Connection {
            domain,
            socket: ours.try_clone()?,
            outgoing,
            watches: Vec::new(),
            transactions: BTreeMap::new(),
        };
        state.connections.insert(number, connection);
        let (store, writer) = (self.clone(), ours.try_clone()?);
        std::thread::Builder::new()
            .name("fake-store-out".into())
            .spawn(move || write_all(writer, &messages))?;
        std::thread::Builder::new().name("fake-store-in".into()).spawn(move || store.attend(number, ours))?;
        Ok(theirs.into())
    }

    /// Answers a client until it is gone.
    fn attend(&self, number: u64, mut socket: UnixStream) {
        let mut inbox = Inbox::default();
        let mut bytes = [0; 4096];
        loop {
            match inbox.take() {
                Ok(Some(request)) => self.answer(number, &request),
                Ok(None) => match socket.read(&mut bytes) {
                    Ok(0) | Err(_) => break,
                    Ok(count) => inbox.push(bytes.get(..count).unwrap_or_default()),
                },
                Err(_too_long) => break,
            }
        }
        hang_up(&socket);
        self.state().connections.remove(&number);
    }

    fn answer(&self, number: u64, request: &Message) {
        let mut state = self.state();
        let answered = state.serve(number, request);
        let (kind, payload) = match answered {
            Ok(payload) => (request.kind, payload),
            Err(errno) => (Kind::Error as u32, format!("{}\0", errno.name().unwrap_or("EIO")).into_bytes()),
        };
        let answer = Message { kind, payload, ..*request };
        state.send(number, answer);
        // A watch fires at once, and after the answer.
        if kind == Kind::Watch as u32
            && let [path, token] = &wire::texts(&request.payload)[..]
        {
            let event = Message {
                kind: Kind::WatchEvent as u32,
                request: 0,
                transaction: 0,
                payload: format!("{path}\0{token}\0").into_bytes(),
            };
            state.send(number, event);
        }
        self.0.changed.notify_all();
    }
}

impl Connect for Store {
    fn connect(&self) -> Result<OwnedFd, ConnectError> {
        self.connect_as(Domain(0))
            .map_err(|error| ConnectError { tried: vec![("a store within the process".into(), error)] })
    }
}

impl State {
    fn send(&self, number: u64, message: Message) {
        if let Some(connection) = self.connections.get(&number)
            && connection.outgoing.send(message).is_err()
        {
            tracing::debug!("a client is gone");
        }
    }

    /// Changes the tree, and tells those who watch.
    fn apply(&mut self, who: Domain, change: &Change) -> Result<(), Errno> {
        let changed = self.tree.change(who, change)?;
        self.now += 1;
        for path in &changed {
            self.changes.insert(path.clone(), self.now);
        }
        // The children that a node has are something that can be read of it.
        for path in &changed {
            self.changes.insert(super::tree::parent(path).to_owned(), self.now);
        }
        if let Some(first) = changed.first() {
            self.fire(first);
        }
        // A removal is seen below, too.
        for path in changed.iter().skip(1) {
            self.fire_at(path);
        }
        Ok(())
    }

    /// Tells those who watch this path, or one above it.
    fn fire(&self, path: &str) {
        self.tell(path, |watched| watched == path || !path.starts_with('@') && is_within(path, watched));
    }

    /// Tells those who watch exactly this path.
    fn fire_at(&self, path: &str) {
        self.tell(path, |watched| watched == path);
    }

    fn tell(&self, path: &str, is_meant: impl Fn(&str) -> bool) {
        for (number, connection) in &self.connections {
            let may_know = path.starts_with('@') || self.tree.is_readable(connection.domain, path);
            for (watched, token) in &connection.watches {
                if may_know && is_meant(&absolute(connection.domain, watched)) {
                    let payload = format!("{path}\0{token}\0").into_bytes();
                    let kind = Kind::WatchEvent as u32;
                    self.send(*number, Message { kind, request: 0, transaction: 0, payload });
                }
            }
        }
    }

    fn serve(&mut self, number: u64, request: &Message) -> Result<Vec<u8>, Errno> {
        let kind = request.kind().ok_or(Errno::ENOSYS)?;
        let texts = wire::texts(&request.payload);
        let connection = self.connections.get(&number).ok_or(Errno::EIO)?;
        let domain = connection.domain;
        let first = texts.first().cloned().unwrap_or_default();
        self.requests.push((kind, first.clone()));
        if let Some(errno) = self.failure() {
            return Err(errno);
        }
        let path = absolute(domain, &first);
        match kind {
            Kind::Read => self.look(number, request, &path, |tree| tree.read(domain, &path)),
            Kind::Directory => self.look(number, request, &path, |tree| {
                Ok(tree
                    .list(domain, &path)?
                    .iter()
                    .flat_map(|name| [name.as_bytes(), b"\0"].concat())
                    .collect())
            }),
            Kind::GetPerms => self.look(number, request, &path, |tree| {
                let permissions = tree.permissions(domain, &path)?;
                Ok(permissions.iter().flat_map(|one| format!("{one}\0").into_bytes()).collect())
            }),
            Kind::Write => {
                let at = first.len() + 1;
                let value = request.payload.get(at..).ok_or(Errno::EINVAL)?.to_vec();
                self.put(number, request, Change::Write(path, value))
            }
            Kind::Mkdir => self.put(number, request, Change::Make(path)),
            Kind::Rm => self.put(number, request, Change::Remove(path)),
            Kind::SetPerms => {
                let words = texts.iter().skip(1).map(|word| word.parse().map_err(|()| Errno::EINVAL));
                self.put(number, request, Change::SetPermissions(path, words.collect::<Result<_, _>>()?))
            }
            Kind::Watch | Kind::Unwatch => self.set_watch(number, kind, &texts),
            Kind::TransactionStart => self.begin(number),
            Kind::TransactionEnd => self.end(number, request, first == "T"),
            Kind::GetDomainPath => Ok(format!("/local/domain/{first}\0").into_bytes()),
            Kind::IsDomainIntroduced => {
                let asked = Domain(first.parse().map_err(|_number| Errno::EINVAL)?);
                Ok(if self.introduced.contains(&asked) { b"T\0".to_vec() } else { b"F\0".to_vec() })
            }
            Kind::WatchEvent | Kind::Error => Err(Errno::EINVAL),
        }
    }

    fn failure(&mut self) -> Option<Errno> {
        let due = self.failures.iter().position(|failure| failure.after == 0);
        for failure in &mut self.failures {
            failure.after = failure.after.saturating_sub(1);
        }
        Some(self.failures.remove(due?).errno)
    }

    fn transaction(&mut self, number: u64, request: &Message) -> Result<Option<&mut Transaction>, Errno> {
        if request.transaction == 0 {
            return Ok(None);
        }
        let connection = self.connections.get_mut(&number).ok_or(Errno::EIO)?;
        connection.transactions.get_mut(&request.transaction).ok_or(Errno::ENOENT).map(Some)
    }

    fn look(
        &mut self,
        number: u64,
        request: &Message,
        path: &str,
        read: impl FnOnce(&Tree) -> Result<Vec<u8>, Errno>,
    ) -> Result<Vec<u8>, Errno> {
        match self.transaction(number, request)? {
            Some(transaction) => {
                transaction.touched.insert(path.to_owned());
                read(&transaction.tree)
            }
            None => read(&self.tree),
        }
    }

    fn put(&mut self, number: u64, request: &Message, change: Change) -> Result<Vec<u8>, Errno> {
        let domain = self.connections.get(&number).ok_or(Errno::EIO)?.domain;
        match self.transaction(number, request)? {
            Some(transaction) => {
                transaction.tree.change(domain, &change)?;
                transaction.touched.insert(change.path().to_owned());
                transaction.changes.push(change);
            }
            None => self.apply(domain, &change)?,
        }
        Ok(b"OK\0".to_vec())
    }

    fn set_watch(&mut self, number: u64, kind: Kind, texts: &[String]) -> Result<Vec<u8>, Errno> {
        let [path, token] = texts else { return Err(Errno::EINVAL) };
        let watches = &mut self.connections.get_mut(&number).ok_or(Errno::EIO)?.watches;
        let watch = (path.clone(), token.clone());
        let known = watches.iter().position(|known| *known == watch);
        match (kind, known) {
            (Kind::Watch, Some(_)) => return Err(Errno::EEXIST),
            (Kind::Watch, None) => watches.push(watch),
            (_, Some(at)) => drop(watches.remove(at)),
            (_, None) => return Err(Errno::ENOENT),
        }
        Ok(b"OK\0".to_vec())
    }

    fn begin(&mut self, number: u64) -> Result<Vec<u8>, Errno> {
        let (name, begun, tree) = (self.next_transaction, self.now, self.tree.clone());
        self.next_transaction += 1;
        let transaction = Transaction { begun, tree, changes: Vec::new(), touched: BTreeSet::new() };
        let connection = self.connections.get_mut(&number).ok_or(Errno::EIO)?;
        connection.transactions.insert(name, transaction);
        Ok(format!("{name}\0").into_bytes())
    }

    fn end(&mut self, number: u64, request: &Message, is_to_be: bool) -> Result<Vec<u8>, Errno> {
        let connection = self.connections.get_mut(&number).ok_or(Errno::EIO)?;
        let domain = connection.domain;
        let transaction = connection.transactions.remove(&request.transaction).ok_or(Errno::ENOENT)?;
        let is_stale = |path: &String| self.changes.get(path).is_some_and(|at| *at > transaction.begun);
        if is_to_be && transaction.touched.iter().any(is_stale) {
            return Err(Errno::EAGAIN);
        }
        if is_to_be {
            for change in &transaction.changes {
                self.apply(domain, change)?;
            }
        }
        Ok(b"OK\0".to_vec())
    }
}

/// Paths that do not begin at the root are a domain's own.
fn absolute(domain: Domain, path: &str) -> String {
    match path {
        special if special.starts_with(['/', '@']) => special.to_owned(),
        relative => format!("/local/domain/{domain}/{relative}"),
    }
}

fn write_all(mut socket: UnixStream, messages: &Receiver<Message>) {
    while let Ok(message) = messages.recv() {
        if let Err(error) = socket.write_all(&message.bytes()) {
            tracing::debug!(%error, "a client is gone");
            return;
        }
    }
}

fn hang_up(socket: &UnixStream) {
    if let Err(error) = socket.shutdown(Shutdown::Both) {
        tracing::debug!(%error, "the client was gone already");
    }
}
