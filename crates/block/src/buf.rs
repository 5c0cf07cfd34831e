//! Memory that bytes move through: pieces of a guest's request or of our own, with whatever keeps them valid.
//!
//! A kernel, and later a guest, may write this memory while we hold it, so there is never a Rust reference to its
//! bytes: they are copied in and out through raw pointers.

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::rc::{Rc, Weak};

use crate::Span;

/// One contiguous piece of memory. Laid out like the kernel's `struct iovec`, so that a slice of segments is an
/// array of those.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    ptr: NonNull<u8>,
    len: usize,
}

impl Segment {
    /// Its first byte.
    pub fn ptr(self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Bytes.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// `len` bytes of it from byte `at` on; `at + len` is within it.
    fn part(self, at: usize, len: usize) -> Segment {
        debug_assert!(at <= self.len && len <= self.len - at);
        // SAFETY: `at` is within the allocation that this segment lies in (the callers stay within `self.len`),
        // so the sum does not leave it.
        Segment { ptr: unsafe { self.ptr.add(at) }, len }
    }
}

const _: () = assert!(size_of::<Segment>() == size_of::<libc::iovec>());

#[derive(Clone)]
enum Segments {
    One(Segment),
    Many(Rc<[Segment]>),
}

/// A run of memory in one or more segments. Cloning it is cheap and names the same bytes; the memory lives until
/// the last clone is gone.
#[derive(Clone)]
pub struct Buf {
    segments: Segments,
    len: usize,
    registered: Option<u16>,
    keep: Rc<dyn Any>,
}

impl Buf {
    /// Describes memory that somebody else owns. `registered` is its number where the kernel was told of it (registered
    /// buffers).
    ///
    /// # Safety
    /// The `len` bytes from `ptr` on are readable and writable for as long as `keep` lives, and nobody holds a
    /// Rust reference to them meanwhile. Others (a kernel, a guest) may write them at any time.
    pub unsafe fn from_raw(ptr: NonNull<u8>, len: usize, registered: Option<u16>, keep: Rc<dyn Any>) -> Buf {
        Buf { segments: Segments::One(Segment { ptr, len }), len, registered, keep }
    }

    /// Memory of its own with these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Buf {
        let buf = Buf::zeroed(bytes.len());
        buf.put(0, bytes);
        buf
    }

    /// Memory of its own, `len` bytes of zero.
    pub fn zeroed(len: usize) -> Buf {
        crate::pool::zeroed(len)
    }

    /// These buffers one after the other, as one.
    pub fn concat(parts: Vec<Buf>) -> Buf {
        let mut segments = Vec::with_capacity(parts.len());
        for part in &parts {
            segments.extend_from_slice(part.segments());
        }
        let len = parts.iter().map(Buf::len).sum();
        let registered = None;
        Buf { segments: Segments::Many(segments.into()), len, registered, keep: Rc::new(parts) }
    }

    /// The same memory without keeping it: for who is promised that others keep it, and checks that (a simulated
    /// kernel).
    pub fn downgrade(&self) -> WeakBuf {
        let keep = Rc::downgrade(&self.keep);
        WeakBuf { segments: self.segments.clone(), len: self.len, registered: self.registered, keep }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its pieces, in order.
    pub fn segments(&self) -> &[Segment] {
        match &self.segments {
            Segments::One(segment) => std::slice::from_ref(segment),
            Segments::Many(segments) => segments,
        }
    }

    /// The number of the memory registered with the kernel in which it is one segment, if it is.
    pub fn registered(&self) -> Option<u16> {
        self.registered
    }

    /// Whether each segment starts and ends at a multiple of `align`, a power of two.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.segments().iter().all(|segment| (segment.ptr.as_ptr().addr() | segment.len) & (align - 1) == 0)
    }

    /// `len` bytes of it from byte `at` on.
    ///
    /// # Panics
    /// If that is not within it: offsets are ours, never a guest's.
    pub fn slice(&self, at: usize, len: usize) -> Buf {
        self.check(at, len);
        let segments = match &self.segments {
            Segments::One(segment) => Segments::One(segment.part(at, len)),
            Segments::Many(_) => Segments::Many(self.parts(at, len).collect()),
        };
        Buf { segments, len, registered: self.registered, keep: self.keep.clone() }
    }

    /// The part of it that holds `part` of the disk, where the whole holds the disk's bytes from `at` on.
    ///
    /// # Panics
    /// If it does not hold that part.
    pub fn part(&self, at: u64, part: Span) -> Buf {
        let skip = part.at().checked_sub(at).expect("a part lies after the whole's first byte");
        self.slice(skip as usize, part.len() as usize)
    }

    /// Copies `bytes` to byte `at` of it.
    pub fn put(&self, at: usize, bytes: &[u8]) {
        self.check(at, bytes.len());
        let mut from = bytes.as_ptr();
        for part in self.parts(at, bytes.len()) {
            // SAFETY: `part` lies within memory that `keep` keeps (`from_raw`); `from` has advanced by the parts
            // before, which together are no longer than `bytes`. A Rust slice and this memory never overlap,
            // since nobody holds a reference into it.
            unsafe {
                std::ptr::copy_nonoverlapping(from, part.ptr(), part.len());
                from = from.add(part.len());
            }
        }
    }

    /// Copies bytes out, from byte `at` on.
    pub fn get(&self, at: usize, bytes: &mut [u8]) {
        self.check(at, bytes.len());
        let mut to = bytes.as_mut_ptr();
        for part in self.parts(at, bytes.len()) {
            // SAFETY: as in `put`, the other way round.
            unsafe {
                std::ptr::copy_nonoverlapping(part.ptr(), to, part.len());
                to = to.add(part.len());
            }
        }
    }

    /// Copies all of `from` to byte `at` of it. The two may be the same memory.
    pub fn copy_from(&self, at: usize, from: &Buf) {
        self.check(at, from.len);
        let mut done = 0;
        for piece in from.segments() {
            let mut source = piece.ptr();
            for part in self.parts(at + done, piece.len()) {
                // SAFETY: both lie within memory that their `keep` keeps, and `source` advances by no more than
                // the piece's length in total. `copy` allows the two to overlap.
                unsafe {
                    std::ptr::copy(source, part.ptr(), part.len());
                    source = source.add(part.len());
                }
            }
            done += piece.len();
        }
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        for segment in self.segments() {
            // SAFETY: the segment lies within memory that `keep` keeps.
            unsafe { std::ptr::write_bytes(segment.ptr(), byte, segment.len()) }
        }
    }

    /// A copy of all its bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.get(0, &mut bytes);
        bytes
    }

    fn check(&self, at: usize, len: usize) {
        assert!(
            at <= self.len && len <= self.len - at,
            "{at}+{len} is not within {} bytes of memory",
            self.len
        );
    }

    /// The pieces of `len` bytes from byte `at` on; within it.
    fn parts(&self, at: usize, len: usize) -> impl Iterator<Item = Segment> {
        let (mut skip, mut left) = (at, len);
        self.segments().iter().filter_map(move |segment| {
            if skip >= segment.len || left == 0 {
                skip = skip.saturating_sub(segment.len);
                return None;
            }
            let part = segment.part(skip, left.min(segment.len - skip));
            skip = 0;
            left -= part.len;
            Some(part)
        })
    }
}

/// A run of memory that may be gone; see [`Buf::downgrade`].
#[derive(Clone)]
pub struct WeakBuf {
    segments: Segments,
    len: usize,
    registered: Option<u16>,
    keep: Weak<dyn Any>,
}

impl WeakBuf {
    /// The memory, if anybody still keeps it.
    pub fn upgrade(&self) -> Option<Buf> {
        let keep = self.keep.upgrade()?;
        Some(Buf { segments: self.segments.clone(), len: self.len, registered: self.registered, keep })
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes in {})", self.len, self.segments().len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_in_and_out_of_pieces() {
        let whole =
            Buf::concat(vec![Buf::from_bytes(b"abc"), Buf::from_bytes(b""), Buf::from_bytes(b"defgh")]);
        assert_eq!(whole.len(), 8);
        assert_eq!(whole.to_vec(), b"abcdefgh");
        assert_eq!(whole.slice(2, 3).to_vec(), b"cde");
        whole.put(1, b"WXYZ");
        assert_eq!(whole.to_vec(), b"aWXYZfgh");
        let other = Buf::zeroed(10);
        other.copy_from(1, &whole.slice(1, 7));
        assert_eq!(other.to_vec(), b"\0WXYZfgh\0\0");
        other.slice(4, 2).fill(b'.');
        assert_eq!(other.to_vec(), b"\0WXY..gh\0\0");
    }

    #[test]
    fn a_clone_names_the_same_bytes_and_keeps_them() {
        let first = Buf::from_bytes(b"one");
        let second = first.slice(1, 2);
        first.put(0, b"two");
        drop(first);
        assert_eq!(second.to_vec(), b"wo");
    }

    #[test]
    fn a_weak_buffer_keeps_nothing() {
        let whole = Buf::concat(vec![Buf::from_bytes(b"ab"), Buf::from_bytes(b"cd")]);
        let weak = whole.slice(1, 2).downgrade();
        assert_eq!(weak.upgrade().map(|buf| buf.to_vec()), Some(b"bc".to_vec()));
        drop(whole);
        assert!(weak.upgrade().is_none());
    }

    #[test]
    #[should_panic(expected = "is not within 3 bytes")]
    fn a_slice_outside_is_refused() {
        drop(Buf::from_bytes(b"one").slice(2, 2));
    }

    #[test]
    fn a_part_is_found_by_its_place_on_the_disk() {
        let buf = Buf::from_bytes(b"0123456789");
        assert_eq!(buf.part(1000, Span::new(1004, 3).unwrap()).to_vec(), b"456");
    }
}
