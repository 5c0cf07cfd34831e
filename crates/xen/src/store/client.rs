//! A connection to the xenstore: one question after the other, each waited for, and the events of watches in between.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use block::Errno;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::wire::{self, Inbox, Kind, Message, PATH_MAX, PAYLOAD_MAX};
use super::{Connect, ConnectError, Permission};
use crate::Domain;

/// So often a transaction is begun anew that others have got in the way of.
const TRIES: u32 = 100;
/// Events that are kept apart; more of the same watch become one.
const EVENTS_MAX: usize = 128;

/// Why the xenstore did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is none.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It said no.
    #[error("the xenstore does not {doing} {path}: {errno}")]
    Refused {
        /// What it was asked to do.
        doing: &'static str,
        /// With which node.
        path: String,
        /// What it said.
        errno: Errno,
    },
    /// The connection has ended.
    #[error("the connection to the xenstore is lost: {0}")]
    Lost(std::io::Error),
    /// It said something that the protocol does not know.
    #[error("the xenstore does not keep to its protocol: {0}")]
    Nonsense(String),
    /// We were about to ask something that the protocol cannot carry.
    #[error("{path} and its value are too long for the xenstore, or hold a NUL")]
    TooLong {
        /// Which node was meant.
        path: String,
    },
    /// Others have changed the same nodes again and again.
    #[error("a transaction of the xenstore was in the way of others {TRIES} times")]
    Contended,
}

impl Error {
    /// Whether a new connection may help.
    pub fn is_lost(&self) -> bool {
        match self {
            Error::Connect(_) | Error::Lost(_) | Error::Nonsense(_) => true,
            Error::Refused { .. } | Error::TooLong { .. } | Error::Contended => false,
        }
    }
}

/// Something has changed under a watch: look there anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// A node that has changed; others of the same watch may have, too.
    pub path: String,
    /// Which watch it is, as it was called when it was set.
    pub token: String,
}

/// Why a wait is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// There is an event to be taken.
    Event,
    /// The other descriptor is readable.
    Other,
    /// The time is up.
    Timeout,
}

/// A connection of one thread. Its watches end with it.
#[derive(Debug)]
pub struct Client {
    stream: OwnedFd,
    inbox: Inbox,
    request: u32,
    events: VecDeque<Event>,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// If there is no xenstore.
    pub fn connect(way: &dyn Connect) -> Result<Client, Error> {
        Ok(Client { stream: way.connect()?, inbox: Inbox::default(), request: 0, events: VecDeque::new() })
    }

    /// What is asked outside of any transaction.
    pub fn now(&mut self) -> View<'_> {
        View { client: self, transaction: 0 }
    }

    /// Does all of `work` at once or, where it fails, nothing. It is done anew as long as others are in the way.
    ///
    /// # Errors
    /// Those of `work`, and where the store fails.
    pub fn transaction<T>(
        &mut self,
        mut work: impl FnMut(&mut View<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        for _ in 0..TRIES {
            let begun = self.ask(Kind::TransactionStart, 0, "begin a transaction", "", b"\0")?;
            let transaction = match wire::text(&begun).parse() {
                Ok(number @ 1_u32..) => number,
                Ok(0) | Err(_) => {
                    return Err(Error::Nonsense(format!("transaction {:?}", wire::text(&begun))));
                }
            };
            let done = work(&mut View { client: self, transaction });
            let word: &[u8] = if done.is_ok() { b"T\0" } else { b"F\0" };
            let ended = self.ask(Kind::TransactionEnd, transaction, "end a transaction", "", word);
            match (done, ended) {
                (Ok(value), Ok(_)) => return Ok(value),
                (Ok(_), Err(Error::Refused { errno: Errno::EAGAIN, .. })) => {}
                (Ok(_), Err(error)) => return Err(error),
                (Err(error), _) => return Err(error),
            }
        }
        Err(Error::Contended)
    }

    /// Sets a watch on a node and all below it; `@introduceDomain` and `@releaseDomain` are special. It fires at once, and
    /// then whenever something changes.
    ///
    /// # Errors
    /// If the store fails or refuses.
    pub fn watch(&mut self, path: &str, token: &str) -> Result<(), Error> {
        let payload = joined(path, &[token])?;
        self.ask(Kind::Watch, 0, "watch", path, &payload).map(drop)
    }

    /// Takes a watch away. Events of it that are there already stay.
    ///
    /// # Errors
    /// If the store fails, or there is no such watch.
    pub fn unwatch(&mut self, path: &str, token: &str) -> Result<(), Error> {
        let payload = joined(path, &[token])?;
        self.ask(Kind::Unwatch, 0, "take a watch from", path, &payload).map(drop)
    }

    /// Whether the store knows this domain: it forgets one that is dying.
    ///
    /// # Errors
    /// If the store fails.
    pub fn is_introduced(&mut self, domain: Domain) -> Result<bool, Error> {
        let domain = domain.to_string();
        let payload = joined(&domain, &[])?;
        let answer = self.ask(Kind::IsDomainIntroduced, 0, "tell of domain", &domain, &payload)?;
        match wire::text(&answer).as_str() {
            "T" => Ok(true),
            "F" => Ok(false),
            other => Err(Error::Nonsense(format!("{other:?} about a domain"))),
        }
    }

    /// Where the nodes of a domain are.
    ///
    /// # Errors
    /// If the store fails.
    pub fn domain_path(&mut self, domain: Domain) -> Result<String, Error> {
        let domain = domain.to_string();
        let payload = joined(&domain, &[])?;
        Ok(wire::text(&self.ask(Kind::GetDomainPath, 0, "tell the path of domain", &domain, &payload)?))
    }

    /// Takes the event that came first.
    pub fn event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Waits until there is an event, `other` is readable, or the time is up; for ever without a time.
    ///
    /// # Errors
    /// If the connection ends.
    pub fn wait(&mut self, other: BorrowedFd<'_>, time: Option<Duration>) -> Result<Woken, Error> {
        let end = time.and_then(|time| Instant::now().checked_add(time));
        loop {
            self.sort_messages()?;
            if !self.events.is_empty() {
                return Ok(Woken::Event);
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let mut fds =
                [PollFd::new(&self.stream, PollFlags::IN), PollFd::from_borrowed_fd(other, PollFlags::IN)];
            let ready = poll(&mut fds, left).map_err(lost)?;
            let [ours, others] = fds.map(|fd| !fd.revents().is_empty());
            if others {
                return Ok(Woken::Other);
            }
            if ours {
                self.receive()?;
            } else if ready == 0 && left.is_some_and(|left| left.is_zero()) {
                return Ok(Woken::Timeout);
            }
        }
    }

    /// Puts the messages that have come into the queue of events. Nothing else comes unasked.
    fn sort_messages(&mut self) -> Result<(), Error> {
        while let Some(message) = self.next_message()? {
            self.keep_event(&message)?;
        }
        Ok(())
    }

    fn keep_event(&mut self, message: &Message) -> Result<(), Error> {
        if message.kind() != Some(Kind::WatchEvent) {
            return Err(Error::Nonsense(format!("a message of kind {} that nobody asked for", message.kind)));
        }
        let mut texts = wire::texts(&message.payload).into_iter();
        let (Some(path), Some(token)) = (texts.next(), texts.next()) else {
            return Err(Error::Nonsense("an event without a path and a token".into()));
        };
        // A guest decides how often, and with which paths below its own nodes: XSA-349.
        let is_known =
            self.events.iter().any(|event| event.token == token && (event.path == path || self.is_full()));
        if !is_known {
            self.events.push_back(Event { path, token });
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.events.len() >= EVENTS_MAX
    }

    /// Asks, and waits for the answer.
    fn ask(
        &mut self,
        kind: Kind,
        transaction: u32,
        doing: &'static str,
        path: &str,
        payload: &[u8],
    ) -> Result<Vec<u8>, Error> {
        self.request = self.request.wrapping_add(1);
        let request = self.request;
        self.send(&Message { kind: kind as u32, request, transaction, payload: payload.to_vec() })?;
        loop {
            let Some(answer) = self.next_message()? else {
                self.receive()?;
                continue;
            };
            // The kernel's events carry any number there.
            if answer.kind() == Some(Kind::WatchEvent) {
                self.keep_event(&answer)?;
                continue;
            }
            if answer.request != request {
                let (found, expected) = (answer.request, request);
                return Err(Error::Nonsense(format!("an answer to request {found} instead of {expected}")));
            }
            return match answer.kind() {
                Some(Kind::Error) => {
                    let errno = wire::errno(&answer.payload);
                    Err(Error::Refused { doing, path: path.to_owned(), errno })
                }
                Some(same) if same == kind => Ok(answer.payload),
                Some(_) | None => {
                    let found = answer.kind;
                    Err(Error::Nonsense(format!("an answer of kind {found} to one of kind {}", kind as u32)))
                }
            };
        }
    }

    /// In one call where possible: the kernel's device takes a message as it comes.
    fn send(&mut self, message: &Message) -> Result<(), Error> {
        let bytes = message.bytes();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match write(self.stream.as_fd(), rest) {
                Ok(0) => return Err(Error::Lost(std::io::ErrorKind::WriteZero.into())),
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(lost(errno)),
            }
        }
        Ok(())
    }

    fn next_message(&mut self) -> Result<Option<Message>, Error> {
        self.inbox.take().map_err(|error| Error::Nonsense(error.to_string()))
    }

    /// Waits for bytes.
    fn receive(&mut self) -> Result<(), Error> {
        let mut bytes = [0; wire::HEADER_LEN + PAYLOAD_MAX];
        loop {
            match rustix::io::read(&self.stream, &mut bytes) {
                Ok(0) => return Err(Error::Lost(std::io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => {
                    self.inbox.push(bytes.get(..count).unwrap_or_default());
                    return Ok(());
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(lost(errno)),
            }
        }
    }
}

/// The store as it is, or as a transaction sees it.
#[derive(Debug)]
pub struct View<'a> {
    client: &'a mut Client,
    transaction: u32,
}

impl View<'_> {
    /// The value of a node; `None` where there is no such node. What is not text in it becomes replacement characters,
    /// which are in no number and no name.
    ///
    /// # Errors
    /// If the store fails or refuses.
    pub fn read(&mut self, path: &str) -> Result<Option<String>, Error> {
        let payload = joined(path, &[])?;
        let value = absent_is_none(self.ask(Kind::Read, "read", path, &payload))?;
        Ok(value.map(|value| String::from_utf8_lossy(&value).into_owned()))
    }

    /// The names of the nodes right below this one; `None` where there is no such node.
    ///
    /// # Errors
    /// If the store fails or refuses.
    pub fn list(&mut self, path: &str) -> Result<Option<Vec<String>>, Error> {
        let payload = joined(path, &[])?;
        let names = absent_is_none(self.ask(Kind::Directory, "list", path, &payload))?;
        Ok(names.map(|names| wire::texts(&names)))
    }

    /// Gives a node a value, and makes it and those above it where there are none.
    ///
    /// # Errors
    /// If the store fails or refuses, or the value is too long.
    pub fn write(&mut self, path: &str, value: &str) -> Result<(), Error> {
        let mut payload = joined(path, &[])?;
        payload.extend_from_slice(value.as_bytes());
        if payload.len() > PAYLOAD_MAX {
            return Err(Error::TooLong { path: path.to_owned() });
        }
        self.ask(Kind::Write, "write", path, &payload).map(drop)
    }

    /// Makes a node without a value, unless it is there.
    ///
    /// # Errors
    /// If the store fails or refuses.
    pub fn make(&mut self, path: &str) -> Result<(), Error> {
        let payload = joined(path, &[])?;
        self.ask(Kind::Mkdir, "make", path, &payload).map(drop)
    }

    /// Removes a node with all below it; fine where there is none.
    ///
    /// # Errors
    /// If the store fails or refuses.
    pub fn remove(&mut self, path: &str) -> Result<(), Error> {
        let payload = joined(path, &[])?;
        absent_is_none(self.ask(Kind::Rm, "remove", path, &payload)).map(drop)
    }

    /// Who may do what with a node; `None` where there is no such node.
    ///
    /// # Errors
    /// If the store fails or refuses.
    pub fn permissions(&mut self, path: &str) -> Result<Option<Vec<Permission>>, Error> {
        let payload = joined(path, &[])?;
        let Some(answer) = absent_is_none(self.ask(Kind::GetPerms, "tell who may use", path, &payload))?
        else {
            return Ok(None);
        };
        let parse =
            |text: &String| text.parse().map_err(|()| Error::Nonsense(format!("permission {text:?}")));
        wire::texts(&answer).iter().map(parse).collect::<Result<_, _>>().map(Some)
    }

    /// Says who may do what with a node. The first one is its owner, who may do everything; what is said there holds for
    /// those whom the others do not name.
    ///
    /// # Errors
    /// If the store fails or refuses.
    pub fn set_permissions(&mut self, path: &str, permissions: &[Permission]) -> Result<(), Error> {
        let texts: Vec<String> = permissions.iter().map(ToString::to_string).collect();
        let payload = joined(path, &texts.iter().map(String::as_str).collect::<Vec<_>>())?;
        self.ask(Kind::SetPerms, "change who may use", path, &payload).map(drop)
    }

    fn ask(&mut self, kind: Kind, doing: &'static str, path: &str, payload: &[u8]) -> Result<Vec<u8>, Error> {
        self.client.ask(kind, self.transaction, doing, path, payload)
    }
}

fn absent_is_none(answer: Result<Vec<u8>, Error>) -> Result<Option<Vec<u8>>, Error> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(Error::Refused { errno: Errno::ENOENT, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A path and words, each with the NUL that ends it.
fn joined(path: &str, words: &[&str]) -> Result<Vec<u8>, Error> {
    let mut payload = Vec::new();
    for word in std::iter::once(&path).chain(words) {
        payload.extend_from_slice(word.as_bytes());
        payload.push(0);
    }
    let nuls = payload.iter().filter(|byte| **byte == 0).count();
    if path.len() > PATH_MAX || payload.len() > PAYLOAD_MAX || nuls != 1 + words.len() {
        return Err(Error::TooLong { path: path.replace('\0', "␀") });
    }
    Ok(payload)
}

fn lost(errno: rustix::io::Errno) -> Error {
    Error::Lost(errno.into())
}

/// As `poll(2)`, for ever without a time; 0 also where a signal came first.
fn poll(fds: &mut [PollFd<'_>], time: Option<Duration>) -> rustix::io::Result<usize> {
    let time = time.map(|time| Timespec::try_from(time).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 }));
    match rustix::event::poll(fds, time.as_ref()) {
        Err(rustix::io::Errno::INTR) => Ok(0),
        other => other,
    }
}

/// A socket whose peer is gone fails, instead of ending the process by a signal.
fn write(stream: BorrowedFd<'_>, bytes: &[u8]) -> rustix::io::Result<usize> {
    match rustix::net::send(stream, bytes, rustix::net::SendFlags::NOSIGNAL) {
        Err(rustix::io::Errno::NOTSOCK) => rustix::io::write(stream, bytes),
        other => other,
    }
}
