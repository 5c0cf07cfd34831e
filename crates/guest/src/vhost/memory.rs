//! A guest's memory: regions of files that the front end shares, found by the guest's or by the front end's addresses.
//!
//! Nothing in it can be trusted, and all of it may change at any time. So each word is read once, into a copy, and
//! nobody holds a Rust reference to it.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use block::Buf;
use runtime::{Handle, RegisteredMemory};

use crate::mapping::{MapError, Mapping};
use crate::room::Room;
use crate::words::{Words, may_store};

/// Where a region lies, as the front end tells it ("Memory region description"). All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionSpec {
    /// First address, as the guest counts.
    pub(crate) guest: u64,
    /// How much.
    pub(crate) len: u64,
    /// First address in the front end's process; it names rings by these.
    pub(crate) user: u64,
    /// Where in the file it starts.
    pub(crate) offset: u64,
}

/// Why a region cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RegionError {
    #[error("a region of {len} bytes at {at:#x} in memory")]
    Range { at: u64, len: u64 },
    #[error("regions overlap: {len} bytes at {at:#x} and {other_len} bytes at {other:#x}")]
    Overlap { at: u64, len: u64, other: u64, other_len: u64 },
    #[error(transparent)]
    Map(#[from] MapError),
}

/// Why bytes of the guest's memory cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Outside {
    #[error("{len} bytes at {at:#x} are not all in the memory that the front end shares")]
    Hole { at: u64, len: u64 },
    #[error("the file behind the memory at {at:#x} was cut short")]
    Gone { at: u64 },
}

/// One byte of a guest's memory, to be written later: a status.
pub(crate) struct Byte {
    ptr: NonNull<u8>,
    mapping: Rc<Mapping>,
}

impl Byte {
    #[inline]
    pub(crate) fn put(&self, byte: u8) {
        if may_store() {
            // SAFETY: within the mapping, which `mapping` keeps; a byte is always aligned.
            unsafe { AtomicU8::from_ptr(self.ptr.as_ptr()) }.store(byte, Ordering::Relaxed);
        }
    }

    #[inline]
    pub(crate) fn is_broken(&self) -> bool {
        self.mapping.is_broken()
    }
}

struct Region {
    spec: RegionSpec,
    ptr: NonNull<u8>,
    /// Its pieces of [`PIECE_LEN`] bytes as the kernel knows them; none where it was not told of them.
    registered: Vec<RegisteredMemory>,
    mapping: Rc<Mapping>,
}

/// Bytes that io_uring takes as one registered buffer, as a power of two: 1 GiB.
const PIECE_SHIFT: u32 = 30;
const PIECE_LEN: usize = 1 << PIECE_SHIFT;

impl Region {
    fn new(
        spec: RegionSpec,
        fd: BorrowedFd<'_>,
        registrar: Option<&Handle>,
        room: &Rc<Room>,
    ) -> Result<Rc<Region>, RegionError> {
        let RegionSpec { guest, len, user, offset } = spec;
        for at in [guest, user] {
            if len == 0 || at.checked_add(len).is_none() {
                return Err(RegionError::Range { at, len });
            }
        }
        let mapping = Mapping::new(fd, offset, len, room)?;
        let registered = registrar.map(|handle| register(handle, &mapping)).unwrap_or_default();
        Ok(Rc::new(Region { spec, ptr: mapping.ptr(), registered, mapping }))
    }

    /// The number under which the kernel knows these bytes of it, if it does and they lie in one piece.
    #[inline]
    fn registered(&self, offset: usize, len: usize) -> Option<u16> {
        if self.registered.is_empty() {
            return None;
        }
        let (first, last) = (offset >> PIECE_SHIFT, (offset + len.saturating_sub(1)) >> PIECE_SHIFT);
        if first == last { self.registered.get(first).map(RegisteredMemory::index) } else { None }
    }

    /// How far into it an address of the guest is.
    #[inline]
    fn offset(&self, guest: u64) -> Option<usize> {
        let offset = guest.wrapping_sub(self.spec.guest);
        (offset < self.spec.len).then_some(offset as usize)
    }
}

/// Tells the kernel of all of a mapping, or of nothing: then I/O on it costs a little more.
fn register(handle: &Handle, mapping: &Mapping) -> Vec<RegisteredMemory> {
    // SAFETY: within the mapping, which the region keeps for longer than the registration.
    let whole = unsafe { Buf::from_raw(mapping.ptr(), mapping.len(), None, Rc::new(())) };
    let mut registered = Vec::new();
    for at in (0..mapping.len()).step_by(PIECE_LEN) {
        let piece = whole.slice(at, PIECE_LEN.min(mapping.len() - at));
        for segment in piece.segments() {
            // SAFETY: the mapping stays for as long as the region, which owns what is registered.
            match unsafe { handle.register_memory(*segment) } {
                Ok(piece) => registered.push(piece),
                Err(errno) => {
                    let bytes = mapping.len();
                    tracing::warn!(
                        bytes,
                        %errno,
                        "guest memory is not pinned, a little more CPU for each request: ENOMEM asks for a higher limit \
                         on locked memory (ulimit -l, LimitMEMLOCK=), EOPNOTSUPP for guest memory that is no ordinary file"
                    );
                    return Vec::new();
                }
            }
        }
    }
    registered
}

/// All regions of one guest. Replaced as a whole when the front end changes them; what is in use of the old ones
/// stays mapped until then.
#[derive(Default)]
pub(crate) struct Memory {
    /// In the order of the guest's addresses.
    regions: Vec<Rc<Region>>,
    /// Where the last address was found: the next one mostly is in the same region.
    last: Cell<usize>,
    /// Of all the memory that the front end has, had, and will have.
    room: Rc<Room>,
}

impl Memory {
    /// These regions of the same front end in the place of all others, registered with the kernel by `registrar`.
    pub(crate) fn replaced_by(
        &self,
        regions: Vec<(RegionSpec, OwnedFd)>,
        registrar: Option<&Handle>,
    ) -> Result<Memory, RegionError> {
        let mut memory = Memory { room: self.room.clone(), ..Memory::default() };
        for (spec, fd) in regions {
            memory = memory.with(spec, fd.as_fd(), registrar)?;
        }
        Ok(memory)
    }

    /// These regions and one more.
    pub(crate) fn with(
        &self,
        spec: RegionSpec,
        fd: BorrowedFd<'_>,
        registrar: Option<&Handle>,
    ) -> Result<Memory, RegionError> {
        // Only for the guest: a front end may have mapped its memory more than once, or may show it twice.
        for region in &self.regions {
            let other = region.spec;
            let is_apart = spec.guest >= other.guest.saturating_add(other.len)
                || other.guest >= spec.guest.saturating_add(spec.len);
            if !is_apart {
                let (at, len, other, other_len) = (spec.guest, spec.len, other.guest, other.len);
                return Err(RegionError::Overlap { at, len, other, other_len });
            }
        }
        let mut regions = self.regions.clone();
        regions.push(Region::new(spec, fd, registrar, &self.room)?);
        regions.sort_by_key(|region| region.spec.guest);
        Ok(Memory { regions, last: Cell::new(0), room: self.room.clone() })
    }

    /// These regions without one; `None` where it is not among them. Where it lies in its file is not looked at: the
    /// specification identifies it by the other three.
    pub(crate) fn without(&self, spec: RegionSpec) -> Option<Memory> {
        let is_it = |region: &Rc<Region>| {
            (region.spec.guest, region.spec.user, region.spec.len) == (spec.guest, spec.user, spec.len)
        };
        let index = self.regions.iter().position(is_it)?;
        let mut regions = self.regions.clone();
        regions.remove(index);
        Some(Memory { regions, last: Cell::new(0), room: self.room.clone() })
    }

    /// Whether none of the files behind it was cut short.
    pub(crate) fn is_whole(&self) -> bool {
        !self.regions.iter().any(|region| region.mapping.is_broken())
    }

    /// How many regions.
    pub(crate) fn count(&self) -> usize {
        self.regions.len()
    }

    /// The region of this address, and how far into it that is.
    #[inline(always)]
    fn find(&self, at: u64) -> Option<(&Rc<Region>, usize)> {
        if let Some(region) = self.regions.get(self.last.get())
            && let Some(offset) = region.offset(at)
        {
            return Some((region, offset));
        }
        self.search(at)
    }

    #[cold]
    fn search(&self, at: u64) -> Option<(&Rc<Region>, usize)> {
        let index = self.regions.partition_point(|region| region.spec.guest <= at).checked_sub(1)?;
        let region = &self.regions[index];
        let offset = region.offset(at)?;
        self.last.set(index);
        Some((region, offset))
    }

    /// Calls `each` with the pieces of these bytes, in order. An error may come after some of them.
    fn pieces(
        &self,
        at: u64,
        len: usize,
        mut each: impl FnMut(&Rc<Region>, NonNull<u8>, usize),
    ) -> Result<(), Outside> {
        let hole = Outside::Hole { at, len: len as u64 };
        let (mut next, mut left) = (at, len);
        while left > 0 {
            let (region, offset) = self.find(next).ok_or(hole)?;
            if region.mapping.is_broken() {
                return Err(Outside::Gone { at: next });
            }
            let part = left.min(region.mapping.len() - offset);
            // SAFETY: `offset` is within the region, and so is `offset + part`.
            each(region, unsafe { region.ptr.add(offset) }, part);
            left -= part;
            if left > 0 {
                // No wrap around the end of the address space: a region's end is checked, but may be 2^64 - 1.
                next = next.checked_add(part as u64).ok_or(hole)?;
            }
        }
        Ok(())
    }

    /// Bytes of the guest's memory, in as many segments as there are regions.
    #[inline(always)]
    pub(crate) fn buf(&self, at: u64, len: usize) -> Result<Buf, Outside> {
        if let Some((region, offset)) = self.find(at)
            && len <= region.mapping.len() - offset
            && !region.mapping.is_broken()
        {
            // SAFETY: `offset` is within the region.
            let ptr = unsafe { region.ptr.add(offset) };
            return Ok(part(region, ptr, len, region.registered(offset, len)));
        }
        self.scattered(at, len)
    }

    #[cold]
    fn scattered(&self, at: u64, len: usize) -> Result<Buf, Outside> {
        if len == 0 {
            return Ok(Buf::zeroed(0));
        }
        let mut parts = Vec::new();
        self.pieces(at, len, |region, ptr, len| parts.push(part(region, ptr, len, None)))?;
        Ok(Buf::concat(parts))
    }

    /// Copies bytes out of the guest's memory.
    #[inline]
    pub(crate) fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), Outside> {
        let mut to = bytes.as_mut_ptr();
        let len = bytes.len();
        let mut broken = false;
        self.pieces(at, len, |region, ptr, len| {
            // SAFETY: both are valid for `len` bytes: `pieces` has looked at the one, and all its lengths are those of
            // the other.
            unsafe {
                copy_out(ptr, to, len);
                to = to.add(len);
            }
            broken |= region.mapping.is_broken();
        })?;
        if broken { Err(Outside::Gone { at }) } else { Ok(()) }
    }

    /// 16 bytes of the guest's memory, as a number.
    #[inline(always)]
    pub(crate) fn u128(&self, at: u64) -> Result<u128, Outside> {
        let mut bytes = [0; 16];
        if let Some((region, offset)) = self.find(at)
            && bytes.len() <= region.mapping.len() - offset
            && !region.mapping.is_broken()
        {
            // SAFETY: within the region, as was just checked.
            unsafe { copy_out(region.ptr.add(offset), bytes.as_mut_ptr(), bytes.len()) };
            if region.mapping.is_broken() {
                return Err(Outside::Gone { at });
            }
        } else {
            self.read(at, &mut bytes)?;
        }
        Ok(u128::from_le_bytes(bytes))
    }

    /// A byte of the guest's memory.
    #[inline(always)]
    pub(crate) fn byte(&self, at: u64) -> Result<Byte, Outside> {
        let (region, offset) = self.find(at).ok_or(Outside::Hole { at, len: 1 })?;
        if region.mapping.is_broken() {
            return Err(Outside::Gone { at });
        }
        // SAFETY: `offset` is within the region.
        Ok(Byte { ptr: unsafe { region.ptr.add(offset) }, mapping: region.mapping.clone() })
    }

    /// Words at an address of the front end's process: parts of a ring, which lie within one region.
    pub(crate) fn words(&self, user: u64, len: usize) -> Result<Words<Mapping>, Outside> {
        let hole = Outside::Hole { at: user, len: len as u64 };
        let holds = |region: &&Rc<Region>| user.wrapping_sub(region.spec.user) < region.spec.len;
        let region = self.regions.iter().find(holds).ok_or(hole)?;
        if region.mapping.is_broken() {
            return Err(Outside::Gone { at: user });
        }
        region.mapping.words((user - region.spec.user) as usize, len).ok_or(hole)
    }
}

/// Copies bytes out of shared memory. Others may write there meanwhile: then some are old and some are new. But each is
/// read once, so that what was checked in the copy is what is used; of a plain copy the compiler may make two reads.
///
/// # Safety
/// `len` bytes may be read from `from` on, where nobody names them by a reference that is not to an atomic, and written
/// from `to` on.
#[inline]
unsafe fn copy_out(from: NonNull<u8>, to: *mut u8, len: usize) {
    const WORD: usize = size_of::<u64>();
    // SAFETY: within `len`, as are all `at`; a byte is always aligned.
    let byte = |at: usize| unsafe {
        to.add(at).write(AtomicU8::from_ptr(from.as_ptr().add(at)).load(Ordering::Relaxed));
    };
    let head = (from.addr().get().wrapping_neg() % WORD).min(len);
    (0..head).for_each(byte);
    let mut at = head;
    while len - at >= WORD {
        // SAFETY: within `len`, and aligned behind the head; where it goes to need not be.
        unsafe {
            let word = AtomicU64::from_ptr(from.as_ptr().add(at).cast()).load(Ordering::Relaxed);
            to.add(at).cast::<u64>().write_unaligned(word);
        }
        at += WORD;
    }
    (at..len).for_each(byte);
}

/// Memory within a region.
#[inline(always)]
fn part(region: &Rc<Region>, ptr: NonNull<u8>, len: usize, registered: Option<u16>) -> Buf {
    // SAFETY: the callers stay within the region. Its mapping lives as long as `keep`, is readable and writable (a page
    // of it that is gone is replaced, see `fault`), and nobody holds a reference into it.
    unsafe { Buf::from_raw(ptr, len, registered, region.clone()) }
}
