//! A domain as its own kernel sees it: memory, grants that it gives, and its ends of event channels.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use block::Errno;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::events::{Line, rung};
use super::memory::Memory;
use super::{Shared, State};
use crate::Domain;
use crate::events::Port;
use crate::grants::{Access, GrantRef};

/// A domain. A clone is the same one; it can be on another thread than the back end.
#[derive(Clone)]
pub struct Guest {
    world: Arc<Shared>,
    domain: Domain,
    birth: u64,
    memory: Arc<Memory>,
}

impl Guest {
    pub(super) fn new(world: Arc<Shared>, domain: Domain, birth: u64, memory: Arc<Memory>) -> Guest {
        Guest { world, domain, birth, memory }
    }

    /// Its number.
    pub fn domain(&self) -> Domain {
        self.domain
    }

    /// How many pages it has. All places are bytes from the start of the first.
    pub fn pages(&self) -> usize {
        self.memory.pages()
    }

    /// Whether it has not been destroyed.
    pub fn is_alive(&self) -> bool {
        self.world.lock().body(self.domain, self.birth).is_some()
    }

    /// How many of its pages others have mapped, counting each mapping; it cannot vanish before that is none.
    pub fn mapped(&self) -> usize {
        self.memory.mapped.load(Ordering::Relaxed)
    }

    /// Copies bytes out.
    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(at, &mut bytes);
        bytes
    }

    /// Copies bytes in.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        self.memory.write(at, bytes);
    }

    /// A word in this machine's order; what was written before it by who wrote it is seen after this.
    pub fn load(&self, at: usize) -> u32 {
        self.memory.word(at).load(Ordering::SeqCst)
    }

    /// Writes a word in this machine's order; who sees it sees what was written before it.
    pub fn store(&self, at: usize, value: u32) {
        self.memory.word(at).store(value, Ordering::SeqCst);
    }

    /// Lets the back ends' domain have a page.
    pub fn grant(&self, page: usize, access: Access) -> GrantRef {
        let mut state = self.world.lock();
        let Some(body) = state.body(self.domain, self.birth) else { return GrantRef(u32::MAX) };
        let gref = GrantRef(body.free_grant());
        body.grant(gref, &self.memory, page, access);
        gref
    }

    /// Lets the back ends' domain have a page, under a number that is free.
    pub fn grant_as(&self, gref: GrantRef, page: usize, access: Access) {
        let mut state = self.world.lock();
        if let Some(body) = state.body(self.domain, self.birth) {
            body.grant(gref, &self.memory, page, access);
        }
    }

    /// Takes a page back.
    ///
    /// # Errors
    /// EBUSY while somebody has it mapped, ENOENT if it is not granted.
    pub fn end(&self, gref: GrantRef) -> Result<(), Errno> {
        let mut state = self.world.lock();
        let body = state.body(self.domain, self.birth).ok_or(Errno::ENOENT)?;
        let grant = body.grants.get(&gref.0).ok_or(Errno::ENOENT)?;
        if grant.mapped > 0 {
            return Err(Errno::EBUSY);
        }
        body.grants.remove(&gref.0);
        body.free_grants.push(gref.0);
        Ok(())
    }

    /// How often a page that it has granted is mapped.
    pub fn mappings(&self, gref: GrantRef) -> usize {
        self.with(|state| {
            let body = state.body(self.domain, self.birth)?;
            Some(body.grants.get(&gref.0)?.mapped)
        })
        .unwrap_or(0)
    }

    /// Pages that it grants.
    pub fn granted(&self) -> usize {
        self.with(|state| Some(state.body(self.domain, self.birth)?.grants.len())).unwrap_or(0)
    }

    /// Offers the back ends' domain an end of an event channel.
    pub fn offer(&self) -> Port {
        let mut state = self.world.lock();
        let Some(body) = state.body(self.domain, self.birth) else { return Port(u32::MAX) };
        let port = (1..).find(|port| !body.ports.contains_key(port)).expect("a port that is free");
        body.ports.insert(port, Line::new());
        Port(port)
    }

    /// Closes its end. A back end that rings is not heard any more, and learns nothing of it.
    pub fn close(&self, port: Port) {
        let mut state = self.world.lock();
        let line = state.body(self.domain, self.birth).and_then(|body| body.ports.remove(&port.0));
        if line.is_some_and(|line| line.is_bound()) {
            state.counts.bound -= 1;
        }
    }

    /// Whether a back end has bound the other end.
    pub fn is_bound(&self, port: Port) -> bool {
        self.line(port, Line::is_bound).unwrap_or(false)
    }

    /// Rings for the back end; without one it is lost.
    pub fn ring(&self, port: Port) {
        self.line(port, Line::ring);
    }

    /// How often a back end has rung since this was last asked.
    pub fn rung(&self, port: Port) -> u64 {
        self.line(port, |line| rung(&*line.domains)).unwrap_or(0)
    }

    /// Waits until a back end has rung, for so long at most; how often it has, since this was last asked.
    pub fn wait(&self, port: Port, patience: Duration) -> u64 {
        let Some(bell) = self.line(port, |line| line.domains.clone()) else { return 0 };
        let due = Instant::now() + patience;
        loop {
            let left = due.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).expect("not for that long");
            match poll(&mut [PollFd::new(&*bell, PollFlags::IN)], Some(&left)) {
                Ok(_) => return rung(&*bell),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => panic!("an eventfd: {errno}"),
            }
        }
    }

    fn line<T>(&self, port: Port, ask: impl FnOnce(&Line) -> T) -> Option<T> {
        self.with(|state| state.body(self.domain, self.birth)?.ports.get(&port.0).map(ask))
    }

    fn with<T>(&self, ask: impl FnOnce(&mut State) -> Option<T>) -> Option<T> {
        ask(&mut self.world.lock())
    }
}
