//! Memory that another domain has granted us: mapped into our address space, or copied from and to.

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::rc::Rc;

use block::{Buf, Errno};

use crate::events::Port;
use crate::{Domain, PAGE};

/// A number under which a domain has granted us one of its pages (`grant_ref_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GrantRef(pub u32);

/// What we may do with a page that we map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read it: all that a page which the guest writes to disk from is granted for.
    Read,
    /// Read and write it.
    Write,
}

/// Pages of another domain in our address space, one after the other. Dropping it unmaps them, and then the domain can
/// have them back.
pub struct Mapping {
    start: NonNull<u8>,
    pages: usize,
    /// Unmaps when it is dropped.
    _owner: Box<dyn Any>,
}

impl Mapping {
    /// Takes charge of memory that `owner` unmaps when it is dropped.
    ///
    /// # Safety
    /// The `pages` pages from `start` on can be read, and written if so mapped, for as long as `owner` lives, and nobody
    /// has a Rust reference to them.
    pub unsafe fn new(start: NonNull<u8>, pages: usize, owner: Box<dyn Any>) -> Mapping {
        Mapping { start, pages, _owner: owner }
    }

    /// Its first byte. What lies there may change at any time.
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.pages * PAGE
    }

    /// `len` bytes of it from byte `at` on, which keep all of it mapped. Where it was mapped for reading, they are for who
    /// only reads: a store to them ends the process.
    ///
    /// # Panics
    /// If they are not within it: offsets are ours, never a guest's.
    pub fn buf(self: &Rc<Self>, at: usize, len: usize) -> Buf {
        let all = self.len();
        assert!(at <= all && len <= all - at, "{at}+{len} is not within {all} bytes of granted memory");
        // SAFETY: within the mapping, which lives as long as the `Rc` that is handed over, and whose memory nobody names
        // by a reference (`Mapping::new`).
        unsafe { Buf::from_raw(self.start.add(at), len, None, self.clone()) }
    }

    /// Whether it holds no page.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Mapping({} pages at {:p})", self.pages, self.start)
    }
}

/// A part of a granted page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which page.
    pub gref: GrantRef,
    /// First byte within the page.
    pub offset: u16,
    /// Bytes, from 1 on; they do not reach beyond the page.
    pub len: u16,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the domain's pages into our memory: what a guest writes to its disk.
    FromGuest,
    /// From our memory into the domain's pages.
    ToGuest,
}

/// A copy between our memory and pages of a domain.
#[derive(Debug)]
pub struct Transfer {
    /// Which way.
    pub direction: Direction,
    /// Our side; as long as all pieces together.
    pub buf: Buf,
    /// The domain's side, in order.
    pub pieces: Vec<Piece>,
    /// What became of it. Whatever it is set to before, afterwards it is a success only where the hypervisor said so of
    /// each piece.
    pub result: Result<(), Errno>,
}

/// What happens when pages are unmapped, also by the death of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Farewell {
    /// This byte of the mapping becomes zero, so that the domain sees it.
    pub clear: Option<usize>,
    /// This end of ours of an event channel rings ([`Channel::port`](crate::events::Channel::port)).
    pub ring: Option<Port>,
}

/// Access to memory that other domains have granted.
pub trait Grants {
    /// Maps pages of a domain, one after the other.
    ///
    /// # Errors
    /// If one of them is not granted (EINVAL and the like) or there is no room; then none is mapped.
    fn map(&self, domain: Domain, refs: &[GrantRef], access: Access) -> Result<Mapping, Errno>;

    /// Maps pages of a domain as [`Grants::map`] does, and leaves word of what is to happen when they are unmapped.
    ///
    /// # Errors
    /// As for `map`; EINVAL too if the byte is not within the pages or the port is not ours.
    fn map_telling(
        &self,
        domain: Domain,
        refs: &[GrantRef],
        access: Access,
        farewell: Farewell,
    ) -> Result<Mapping, Errno>;

    /// Does all these copies in one go. Each has its own result: one that fails leaves the others alone.
    fn copy(&self, domain: Domain, transfers: &mut [Transfer]);
}
