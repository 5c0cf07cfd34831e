//! A hypervisor within the process, for tests: domains with memory, grants and event channels, and a script of what
//! goes wrong.
//!
//! The back end gets [`World::grants`] and [`World::events`] as it would get the kernel's devices; a test's front end has
//! a [`Guest`], also on another thread. What happens follows Xen 4.17 and Linux 6.1: a grant in use cannot be ended, an
//! event channel that a back end leaves can be bound again and starts pending, and of a domain that dies the pages stay
//! that somebody has mapped.

mod events;
mod guest;
mod memory;
pub mod store;
mod tree;

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use block::Errno;

use crate::Domain;
use crate::events::Events;
use crate::grants::{Access, GrantRef, Grants};
pub use guest::Guest;
use memory::Memory;

/// What the hypervisor is asked to do and may be told to fail at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Deed {
    /// A call that maps pages.
    Map,
    /// A call that copies any number of pieces.
    Copy,
    /// One piece of such a call.
    Piece,
    /// Binding an event channel.
    Bind,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is done, if it can be.
    Do,
    /// A call fails as a whole, and nothing of it is done. Not for a piece.
    Fail(Errno),
    /// Nothing is copied, and this status is said (`GNTST_*`, -12 for "again"). For a piece.
    Say(i16),
    /// Nothing is copied, and the status is left as it was (XSA-318). For a piece.
    SayNothing,
}

/// What becomes of the nth deed of its kind, counted from 0 since the script was set.
type Script = Box<dyn FnMut(Deed, u64) -> Fate + Send>;

/// What the hypervisor has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages that are mapped now, of all domains, dead ones too.
    pub mapped: usize,
    /// Event channels that are bound now.
    pub bound: usize,
    /// Calls that mapped pages.
    pub maps: u64,
    /// Calls that copied.
    pub copies: u64,
    /// Pieces that were copied.
    pub pieces: u64,
}

/// The hypervisor. A clone is the same one.
#[derive(Clone, Default)]
pub struct World(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    domains: BTreeMap<Domain, Body>,
    /// How many domains there ever were.
    born: u64,
    /// How many ends of event channels back ends ever had.
    ends: u32,
    /// What a back end's end rings, by its number.
    bells: BTreeMap<u32, Arc<OwnedFd>>,
    /// How often the processes of all back ends have died.
    deaths: u64,
    /// Of all domains that ever were.
    memories: Vec<Weak<Memory>>,
    counts: Counts,
    script: Option<Script>,
    done: BTreeMap<Deed, u64>,
}

/// A domain that lives.
struct Body {
    /// Tells it from another of the same number.
    birth: u64,
    memory: Arc<Memory>,
    grants: BTreeMap<u32, Grant>,
    /// Numbers of grants that have ended; the last of them is used next, as Linux does.
    free_grants: Vec<u32>,
    /// Numbers from here on were not given yet.
    next_grant: u32,
    ports: BTreeMap<u32, events::Line>,
}

/// Numbers of grants below this one are Xen's own (`GNTTAB_NR_RESERVED_ENTRIES`).
const RESERVED: u32 = 8;

impl Body {
    /// A number that no page is granted under.
    fn free_grant(&mut self) -> u32 {
        loop {
            let gref = self.free_grants.pop().unwrap_or_else(|| {
                self.next_grant += 1;
                self.next_grant - 1
            });
            // Somebody may have chosen it.
            if !self.grants.contains_key(&gref) {
                return gref;
            }
        }
    }

    fn grant(&mut self, gref: GrantRef, memory: &Memory, page: usize, access: Access) {
        assert!(page < memory.pages(), "page {page} of {}", memory.pages());
        let before = self.grants.insert(gref.0, Grant { page, access, mapped: 0 });
        assert!(before.is_none(), "grant {} is free", gref.0);
    }
}

/// A page that dom0 may use.
struct Grant {
    page: usize,
    access: Access,
    /// How often it is mapped.
    mapped: usize,
}

impl World {
    /// A world without domains but the one that its back ends are in.
    pub fn new() -> World {
        World::default()
    }

    /// Creates a domain with so many pages of zeroes.
    ///
    /// # Panics
    /// If there is one of this number.
    pub fn domain(&self, domain: Domain, pages: usize) -> Guest {
        let memory = Arc::new(Memory::new(pages));
        let mut state = self.0.lock();
        state.born += 1;
        let birth = state.born;
        state.memories.push(Arc::downgrade(&memory));
        let (grants, free_grants, next_grant) = (BTreeMap::new(), Vec::new(), RESERVED);
        let ports = BTreeMap::new();
        let body = Body { birth, memory: memory.clone(), grants, free_grants, next_grant, ports };
        let before = state.domains.insert(domain, body);
        assert!(before.is_none(), "there are two domains {domain}");
        drop(state);
        Guest::new(self.0.clone(), domain, birth, memory)
    }

    /// Ends a domain, if it lives: its grants and event channels are gone. Pages that are mapped stay, as those of a
    /// zombie do.
    pub fn destroy(&self, domain: Domain) {
        let mut state = self.0.lock();
        if let Some(body) = state.domains.remove(&domain) {
            state.counts.bound -= body.ports.values().filter(|line| line.is_bound()).count();
        }
    }

    /// The processes of all back ends die: what they have mapped and bound is let go of, as their kernel does it, but
    /// without farewells. Whatever is left of them in this process must do nothing any more; dropping it is nothing.
    pub fn kill_back_ends(&self) {
        let mut state = self.0.lock();
        state.deaths += 1;
        state.bells.clear();
        for body in state.domains.values_mut() {
            body.ports.values_mut().for_each(events::Line::unbind);
            body.grants.values_mut().for_each(|grant| grant.mapped = 0);
        }
        for memory in state.memories.iter().filter_map(Weak::upgrade) {
            memory.mapped.store(0, Ordering::Relaxed);
        }
        (state.counts.mapped, state.counts.bound) = (0, 0);
    }

    /// Its domains' memory, as the one domain sees it that all grants are for.
    pub fn grants(&self) -> Rc<dyn Grants> {
        Rc::new(memory::Granted::new(self.0.clone()))
    }

    /// Its domains' event channels, seen from there.
    pub fn events(&self) -> Rc<dyn Events> {
        Rc::new(events::Exchange::new(self.0.clone()))
    }

    /// From now on a script says what becomes of each deed. It must not ask this world for anything.
    pub fn script(&self, script: impl FnMut(Deed, u64) -> Fate + Send + 'static) {
        let mut state = self.0.lock();
        state.script = Some(Box::new(script));
        state.done.clear();
    }

    /// Nothing fails any more but what cannot be done.
    pub fn unscript(&self) {
        self.0.lock().script = None;
    }

    /// What has been done.
    pub fn counts(&self) -> Counts {
        self.0.lock().counts
    }
}

impl fmt::Debug for World {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "World({:?})", self.counts())
    }
}

impl Shared {
    /// A test that has panicked with it has said so; the others go on to unmap and unbind.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The domain of this number, if it is the one that was born then.
    fn body(&mut self, domain: Domain, birth: u64) -> Option<&mut Body> {
        self.domains.get_mut(&domain).filter(|body| body.birth == birth)
    }

    fn fate(&mut self, deed: Deed) -> Fate {
        let done = self.done.entry(deed).or_default();
        let nth = std::mem::replace(done, *done + 1);
        self.script.as_mut().map_or(Fate::Do, |script| script(deed, nth))
    }

    /// The fate of a call.
    fn call(&mut self, deed: Deed) -> Result<(), Errno> {
        match self.fate(deed) {
            Fate::Do => Ok(()),
            Fate::Fail(errno) => Err(errno),
            fate @ (Fate::Say(_) | Fate::SayNothing) => panic!("{fate:?} is for pieces"),
        }
    }

    /// Takes note that pages of a domain are not mapped any more.
    fn unmap(&mut self, domain: Domain, birth: u64, refs: &[u32], memory: &Memory) {
        self.counts.mapped -= refs.len();
        memory.mapped.fetch_sub(refs.len(), Ordering::Relaxed);
        let Some(body) = self.body(domain, birth) else { return };
        for gref in refs {
            // A grant that is mapped cannot have been ended.
            let grant = body.grants.get_mut(gref).expect("a grant that is mapped");
            grant.mapped -= 1;
        }
    }
}

#[cfg(test)]
mod tests;
