//! Memory that is shared with a back end: a file without a name, mapped.
//!
//! Somebody else reads and writes these bytes meanwhile, so they are copied in and out, and words that order others
//! are atomic.

#![allow(unsafe_code)] // a room of ARCHITECTURE.md

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A mapping of a whole file, or of a part of it. All places in it are offsets in bytes from its start.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    len: usize,
    file: File,
}

// SAFETY: the mapping belongs to no thread; its bytes are only copied and its words are atomic.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// So many bytes of zeroes.
    pub fn new(len: u64) -> io::Result<Memory> {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC)?);
        file.set_len(len)?;
        Memory::of(file, 0, len)
    }

    /// The bytes of a file that somebody else made.
    pub fn of(file: File, at: u64, len: u64) -> io::Result<Memory> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        // SAFETY: the kernel chooses the place, so the mapping replaces none; it ends with `Memory`.
        let base = unsafe {
            mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, at)
        }?;
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Memory { base, len, file })
    }

    /// Where it is in this process.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether it holds no byte, which it does not.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first of these bytes, all of which are inside.
    fn at(&self, at: u64, len: usize) -> *mut u8 {
        let at = usize::try_from(at).expect("a place in this process");
        let is_inside = at.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(is_inside, "{len} bytes at {at} are not within {} bytes", self.len);
        // SAFETY: inside of the mapping, as was just seen.
        unsafe { self.base.as_ptr().add(at) }
    }

    /// Copies bytes in.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        // SAFETY: the destination is inside of the mapping; nobody holds a reference to it.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(at, bytes.len()), bytes.len()) }
    }

    /// Copies bytes out.
    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        // SAFETY: the source is inside of the mapping.
        unsafe { ptr::copy_nonoverlapping(self.at(at, len).cast_const(), bytes.as_mut_ptr(), len) }
        bytes
    }

    fn word(&self, at: u64) -> &AtomicU16 {
        let word = self.at(at, 2).cast::<u16>();
        assert!(word.is_aligned(), "a word of two bytes at {at}");
        // SAFETY: inside of the mapping, which lives as long as `self`, and aligned; it is only used as an atomic.
        unsafe { AtomicU16::from_ptr(word) }
    }

    /// A word of two bytes; what was written before it by who wrote it is seen after this.
    pub fn load_u16(&self, at: u64) -> u16 {
        u16::from_le(self.word(at).load(Ordering::Acquire))
    }

    /// Writes a word of two bytes; who sees it sees what was written before it.
    pub fn store_u16(&self, at: u64, value: u16) {
        self.word(at).store(value.to_le(), Ordering::Release);
    }

    /// A word of eight bytes.
    pub fn load_u64(&self, at: u64) -> u64 {
        let word = self.at(at, 8).cast::<u64>();
        assert!(word.is_aligned(), "a word of eight bytes at {at}");
        // SAFETY: as for `word`.
        u64::from_le(unsafe { AtomicU64::from_ptr(word) }.load(Ordering::Acquire))
    }

    /// The bytes as a slice, for a driver that hands out their address and is to be trusted with the rest: while a
    /// back end has a request for some of them, they must not be looked at.
    pub fn slice(&mut self) -> &mut [u8] {
        // SAFETY: the mapping lives as long as the borrow, and every byte of a file is initialised. Another process
        // may write them: whoever asks a back end to do that does not look until it is done.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Memory {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody can have a pointer or reference to it: they borrow `self`.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast::<c_void>(), self.len) };
        if let Err(error) = unmapped {
            eprintln!("could not unmap {} bytes: {error}", self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_of_one_file_show_the_same_bytes() {
        let one = Memory::new(8192).unwrap();
        let two = Memory::of(File::from(one.as_fd().try_clone_to_owned().unwrap()), 4096, 4096).unwrap();
        assert_eq!((one.len(), two.len()), (8192, 4096));
        one.put(4100, b"word");
        assert_eq!(two.get(4, 4), b"word");
        two.store_u16(10, 0x1234);
        assert_eq!(one.get(4106, 2), [0x34, 0x12]);
        assert_eq!((one.load_u16(4106), one.load_u64(4096 + 8)), (0x1234, 0x1234 << 16));
    }

    #[test]
    #[should_panic(expected = "not within")]
    fn bytes_outside_are_refused() {
        Memory::new(4096).unwrap().put(4095, b"ab");
    }
}
