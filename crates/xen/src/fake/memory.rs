//! A domain's memory, and the grants of all domains as a back end sees them.

use std::cell::RefCell;
use std::ffi::c_void;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use block::Errno;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::events::ring;
use super::{Deed, Fate, Shared, State};
use crate::copy::{Copier, SOURCE_GREF, Segment, Status};
use crate::grants::{Access, Farewell, GrantRef, Grants, Mapping, Transfer};
use crate::{Domain, PAGE};

/// The pages of a domain, one after the other in a file without a name. Places are bytes from their start.
///
/// Somebody else reads and writes them meanwhile, so they are copied, and words that order others are atomic.
pub(super) struct Memory {
    file: File,
    base: NonNull<u8>,
    pages: usize,
    /// How many pages are mapped by others.
    pub(super) mapped: AtomicUsize,
}

// SAFETY: the mapping belongs to no thread; its bytes are only copied and its words are atomic.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(super) fn new(pages: usize) -> Memory {
        let file = File::from(memfd_create("domain", MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len((pages * PAGE) as u64).expect("a memfd may grow");
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the place, so this replaces no mapping; it ends with `Memory`.
        let base = unsafe { mmap(ptr::null_mut(), pages * PAGE, protection, MapFlags::SHARED, &file, 0) };
        let base = NonNull::new(base.expect("room for a domain").cast()).expect("not at zero");
        Memory { file, base, pages, mapped: AtomicUsize::new(0) }
    }

    pub(super) fn pages(&self) -> usize {
        self.pages
    }

    /// The first of these bytes, all of which are inside.
    fn at(&self, at: usize, len: usize) -> *mut u8 {
        let is_inside = at.checked_add(len).is_some_and(|end| end <= self.pages * PAGE);
        assert!(is_inside, "{len} bytes at {at} are not within {} pages", self.pages);
        // SAFETY: inside of the mapping, as was just seen.
        unsafe { self.base.as_ptr().add(at) }
    }

    pub(super) fn write(&self, at: usize, bytes: &[u8]) {
        // SAFETY: the destination is inside of the mapping; nobody holds a reference to it.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(at, bytes.len()), bytes.len()) }
    }

    pub(super) fn read(&self, at: usize, bytes: &mut [u8]) {
        // SAFETY: the source is inside of the mapping.
        unsafe {
            ptr::copy_nonoverlapping(self.at(at, bytes.len()).cast_const(), bytes.as_mut_ptr(), bytes.len())
        }
    }

    pub(super) fn word(&self, at: usize) -> &AtomicU32 {
        let word = self.at(at, 4).cast::<u32>();
        assert!(word.is_aligned(), "a word of four bytes at {at}");
        // SAFETY: inside of the mapping, which lives as long as `self`, and aligned; it is only used as an atomic.
        unsafe { AtomicU32::from_ptr(word) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody can have a pointer or reference to it: they borrow `self`.
        unsafe { munmap(self.base.as_ptr().cast::<c_void>(), self.pages * PAGE) }.expect("it is mapped");
    }
}

/// Implements [`Grants`].
pub(super) struct Granted {
    world: Arc<Shared>,
    copier: RefCell<Copier>,
}

impl Granted {
    pub(super) fn new(world: Arc<Shared>) -> Granted {
        Granted { world, copier: RefCell::default() }
    }

    fn map_pages(
        &self,
        domain: Domain,
        refs: &[GrantRef],
        access: Access,
        farewell: Farewell,
    ) -> Result<Mapping, Errno> {
        let mut state = self.world.lock();
        state.counts.maps += 1;
        state.call(Deed::Map)?;
        if refs.is_empty() || farewell.clear.is_some_and(|at| at >= refs.len() * PAGE) {
            return Err(Errno::EINVAL);
        }
        let bell = match farewell.ring {
            Some(port) => Some(state.bells.get(&port.0).cloned().ok_or(Errno::EINVAL)?),
            None => None,
        };
        let body = state.domains.get_mut(&domain).ok_or(Errno::EINVAL)?;
        let mut pages = Vec::new();
        for gref in refs {
            let grant = body.grants.get(&gref.0).ok_or(Errno::EINVAL)?;
            if (access, grant.access) == (Access::Write, Access::Read) {
                return Err(Errno::EINVAL);
            }
            pages.push(grant.page);
        }
        let view = View::new(&body.memory.file, &pages, access);
        let refs: Vec<u32> = refs.iter().map(|gref| gref.0).collect();
        for gref in &refs {
            body.grants.get_mut(gref).expect("seen before").mapped += 1;
        }
        body.memory.mapped.fetch_add(refs.len(), Ordering::Relaxed);
        let (birth, memory) = (body.birth, body.memory.clone());
        state.counts.mapped += refs.len();
        let deaths = state.deaths;
        drop(state);
        let start = view.start();
        let clear = farewell.clear.map(|at| pages[at / PAGE] * PAGE + at % PAGE);
        let (world, len) = (self.world.clone(), refs.len());
        let mapped = Mapped { view: Some(view), world, deaths, domain, birth, refs, memory, clear, bell };
        // SAFETY: the pages are mapped one after the other from there on, until `mapped` is dropped, and only their
        // address is shared.
        Ok(unsafe { Mapping::new(start, len, Box::new(mapped)) })
    }
}

impl Grants for Granted {
    fn map(&self, domain: Domain, refs: &[GrantRef], access: Access) -> Result<Mapping, Errno> {
        self.map_pages(domain, refs, access, Farewell::default())
    }

    fn map_telling(
        &self,
        domain: Domain,
        refs: &[GrantRef],
        access: Access,
        farewell: Farewell,
    ) -> Result<Mapping, Errno> {
        self.map_pages(domain, refs, access, farewell)
    }

    fn copy(&self, domain: Domain, transfers: &mut [Transfer]) {
        let mut state = self.world.lock();
        self.copier.borrow_mut().copy(domain, transfers, &mut |segments| {
            state.counts.copies += 1;
            state.call(Deed::Copy)?;
            for segment in segments {
                match state.fate(Deed::Piece) {
                    Fate::Do => segment.status = state.copy_piece(segment).0,
                    Fate::Say(status) => segment.status = status,
                    Fate::SayNothing => {}
                    Fate::Fail(errno) => panic!("{errno} is for calls, and a piece has a status"),
                }
            }
            Ok(())
        });
    }
}

impl State {
    /// GNTTABOP_copy of one piece.
    fn copy_piece(&mut self, segment: &Segment) -> Status {
        let from_guest = segment.flags == SOURCE_GREF;
        let (foreign, local) =
            if from_guest { (segment.source, segment.dest) } else { (segment.dest, segment.source) };
        let (domain, gref, offset) = foreign.grant();
        let (offset, len) = (usize::from(offset), usize::from(segment.len));
        let Some(body) = self.domains.get(&domain) else { return Status::BAD_DOMAIN };
        let Some(grant) = body.grants.get(&gref.0) else { return Status::BAD_GNTREF };
        if !from_guest && grant.access == Access::Read {
            return Status::GENERAL_ERROR;
        }
        if offset + len > PAGE {
            return Status::BAD_COPY_ARG;
        }
        let at = body.memory.at(grant.page * PAGE + offset, len);
        let (from, to) = if from_guest { (at, local.pointer()) } else { (local.pointer(), at) };
        // SAFETY: `at` and what follows lies within the domain's memory; the local side within a `Buf` that the
        // transfer keeps. They are different memory, or a page of a guest twice, so they may overlap.
        unsafe { ptr::copy(from, to, len) };
        self.counts.pieces += 1;
        Status::OKAY
    }
}

/// Pages of a domain, in the order that somebody wants, between two pages that nobody may touch.
struct View {
    start: NonNull<c_void>,
    pages: usize,
}

impl View {
    fn new(memory: &File, pages: &[usize], access: Access) -> View {
        let len = (pages.len() + 2) * PAGE;
        // SAFETY: the kernel chooses the place, so this replaces no mapping.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), len, ProtFlags::empty(), MapFlags::PRIVATE) };
        let start = NonNull::new(start.expect("room for some pages")).expect("not at zero");
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::Write => ProtFlags::READ | ProtFlags::WRITE,
        };
        for (number, page) in pages.iter().enumerate() {
            let at = start.as_ptr().wrapping_byte_add((number + 1) * PAGE);
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            // SAFETY: replaces a page of the range that was just reserved, and nothing else.
            unsafe { mmap(at, PAGE, protection, flags, memory, (page * PAGE) as u64) }.expect("a page");
        }
        View { start, pages: pages.len() }
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: behind the first page of the range there is another.
        unsafe { self.start.byte_add(PAGE) }.cast()
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; who has a pointer into it has promised not to use it any more (`Mapping`).
        unsafe { munmap(self.start.as_ptr(), (self.pages + 2) * PAGE) }.expect("it is mapped");
    }
}

/// Unmaps when it is dropped, and then tells the world.
struct Mapped {
    view: Option<View>,
    world: Arc<Shared>,
    /// How often back ends had died before.
    deaths: u64,
    domain: Domain,
    birth: u64,
    refs: Vec<u32>,
    memory: Arc<Memory>,
    /// The byte of the domain that is cleared then.
    clear: Option<usize>,
    /// What is rung then.
    bell: Option<Arc<OwnedFd>>,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        drop(self.view.take());
        if self.world.lock().deaths != self.deaths {
            return;
        }
        if let Some(at) = self.clear {
            self.memory.write(at, &[0]);
        }
        if let Some(bell) = &self.bell {
            ring(bell);
        }
        self.world.lock().unmap(self.domain, self.birth, &self.refs, &self.memory);
    }
}
