//! A part of a file in our address space, which whoever else has that file may write, and cut short.

use std::os::fd::BorrowedFd;
#[cfg(test)]
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::rc::Rc;

use block::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::backing::{self, Unfit};
use crate::fault::{self, Refusal, Watched};
use crate::room::{NoRoom, Room, Taken};
use crate::words::Words;

/// Why a part of a file cannot be mapped.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MapError {
    #[error("a region of {len} bytes at {offset:#x} in its file")]
    Range { len: u64, offset: u64 },
    #[error("a region of {len} bytes from byte {offset} of a file of {file} bytes")]
    FileTooShort { file: u64, offset: u64, len: u64 },
    #[error("the memory cannot be mapped: {0}")]
    Map(Errno),
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error(transparent)]
    Room(#[from] NoRoom),
    #[error(transparent)]
    Watch(#[from] Refusal),
}

/// A part of a file in our address space, shared with whoever else has that file.
pub(crate) struct Mapping {
    /// The first byte that was asked for.
    ptr: NonNull<u8>,
    len: usize,
    /// What was reserved for that: the whole pages that hold it, and pages around them that nobody may touch.
    reserved: NonNull<u8>,
    reserved_len: usize,
    watched: Option<Watched>,
    /// Given back after it is unmapped.
    _taken: Option<Taken>,
}

/// `f_type` of hugetlbfs (linux/magic.h).
const HUGETLBFS: i64 = 0x9584_58f6;

impl Mapping {
    /// Maps `len` bytes of somebody else's file from byte `offset` on, for reading and writing, where there is `room`
    /// for them.
    pub(crate) fn new(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        room: &Rc<Room>,
    ) -> Result<Rc<Mapping>, MapError> {
        backing::check(fd)?;
        Mapping::map(fd, offset, len, Some(room))
    }

    /// Maps the first `len` bytes of a file of our own, for reading and writing.
    pub(crate) fn own(fd: BorrowedFd<'_>, len: u64) -> Result<Rc<Mapping>, MapError> {
        Mapping::map(fd, 0, len, None)
    }

    fn map(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        room: Option<&Rc<Room>>,
    ) -> Result<Rc<Mapping>, MapError> {
        let range = || MapError::Range { len, offset };
        let end =
            offset.checked_add(len).filter(|end| len > 0 && *end <= i64::MAX as u64).ok_or_else(range)?;
        let failed =
            |errno: rustix::io::Errno| MapError::Map(Errno::new(errno.raw_os_error()).unwrap_or(Errno::EIO));
        let stat = rustix::fs::fstat(fd).map_err(failed)?;
        let is_regular =
            rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile;
        let file = u64::try_from(stat.st_size).unwrap_or(0);
        if is_regular && file < end {
            return Err(MapError::FileTooShort { file, offset, len });
        }
        let mut page = rustix::param::page_size() as u64;
        let filesystem = rustix::fs::fstatfs(fd).map_err(failed)?;
        if filesystem.f_type as i64 == HUGETLBFS {
            // Its mappings start and end at its own pages.
            page = (filesystem.f_bsize as u64).max(page);
        }
        if !page.is_power_of_two() {
            return Err(range());
        }
        let from = offset & !(page - 1);
        let to = end.checked_next_multiple_of(page).ok_or_else(range)?;
        let mapped = usize::try_from(to - from).ok().filter(|len| *len <= isize::MAX as usize);
        let (mapped, page) = (mapped.ok_or_else(range)?, page as usize);
        // A page before it, one behind it, and one to start at a multiple of a page that is not the machine's.
        let reserved_len = mapped.checked_add(3 * page).ok_or_else(range)?;
        let taken = room.map(|room| room.take(reserved_len as u64)).transpose()?;
        let (none, flags) = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping, wherever the kernel puts it.
        let reserved = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), reserved_len, none, flags) };
        let reserved = reserved.map_err(failed)?.cast::<u8>();
        let skip = reserved.addr().next_multiple_of(page) - reserved.addr() + page;
        // SAFETY: less than two pages, and so within what was reserved, as are `mapped` bytes from there on.
        let (base, ptr) = unsafe { (reserved.add(skip), reserved.add(skip + (offset - from) as usize)) };
        let (Some(reserved), Some(ptr)) = (NonNull::new(reserved), NonNull::new(ptr)) else {
            return Err(MapError::Map(Errno::ENOMEM));
        };
        // From here on dropping it unmaps.
        let len = len as usize;
        let mut mapping = Mapping { ptr, len, reserved, reserved_len, watched: None, _taken: taken };
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: in the place of pages that were just reserved and that nobody else knows of.
        let mapped_at =
            unsafe { rustix::mm::mmap(base.cast(), mapped, access, flags | MapFlags::FIXED, fd, from) };
        mapped_at.map_err(failed)?;
        // A guest's memory is its own affair: it does not go into a core dump of ours.
        // SAFETY: advice about what was just mapped, which changes nothing of its contents.
        let advised = unsafe { rustix::mm::madvise(base.cast(), mapped, Advice::LinuxDontDump) };
        if let Err(errno) = advised {
            tracing::debug!(%errno, "guest memory would be in a core dump");
        }
        mapping.watched = Some(Watched::new(base.addr(), mapped)?);
        Ok(Rc::new(mapping))
    }

    /// A mapping that nobody watches over, as the process may have others: a test shows what becomes of these.
    #[cfg(test)]
    pub(crate) fn new_unwatched(fd: &OwnedFd, len: u64) -> Rc<Mapping> {
        let mapping = Mapping::new(fd.as_fd(), 0, len, &Rc::default());
        let mut mapping = Rc::into_inner(mapping.expect("a file of that length"));
        mapping.iter_mut().for_each(|mapping| mapping.watched = None);
        Rc::new(mapping.expect("nobody else has it yet"))
    }

    /// Whether its file was cut short under somebody's hands.
    #[inline]
    pub(crate) fn is_broken(&self) -> bool {
        // Almost always that is known without a look at the mapping.
        fault::count() != 0 && self.watched.as_ref().is_some_and(Watched::is_broken)
    }

    /// The first byte that was asked for. What lies there may change at any time.
    #[inline]
    pub(crate) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// Bytes.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// `len` bytes of it from byte `at` on; `None` where that is not within it.
    pub(crate) fn words(self: &Rc<Self>, at: usize, len: usize) -> Option<Words<Mapping>> {
        let end = at.checked_add(len)?;
        if end > self.len {
            return None;
        }
        // SAFETY: within the mapping, as was just checked. It can be read and written (a page that is gone is replaced,
        // see `fault`), and nobody holds a reference into it.
        Some(unsafe { Words::new(self.ptr.add(at), len, self.clone()) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First, so that nothing is put in the place of memory that is somebody else's by then.
        self.watched = None;
        // SAFETY: reserved in `new`, and whoever uses it has a clone of the `Rc` that is being dropped.
        if let Err(errno) = unsafe { rustix::mm::munmap(self.reserved.as_ptr().cast(), self.reserved_len) } {
            tracing::error!(%errno, "guest memory could not be unmapped (a bug in tapdisk)");
        }
    }
}

impl Words<Mapping> {
    /// Whether the file behind it was cut short.
    #[inline]
    pub(crate) fn is_broken(&self) -> bool {
        self.mapping().is_broken()
    }
}
