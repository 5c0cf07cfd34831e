//! A run of bytes on a disk or in a file, that cannot wrap around.

use std::fmt;

/// `len` bytes from byte `at`; the end never wraps around.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span {
    at: u64,
    len: u64,
}

impl Span {
    /// The span of `len` bytes from byte `at`; `None` where its end would not fit 63 bits, which is as far as a
    /// Linux file reaches (`loff_t`).
    pub const fn new(at: u64, len: u64) -> Option<Span> {
        match at.checked_add(len) {
            Some(end) if end <= i64::MAX as u64 => Some(Span { at, len }),
            _ => None,
        }
    }

    /// The span of a buffer that holds a disk's bytes from `at` on.
    ///
    /// # Panics
    /// If it wraps around: this is for those whose callers have checked that it lies within the disk.
    pub fn of(at: u64, buf: &crate::Buf) -> Span {
        Span::new(at, buf.len() as u64).expect("the caller has checked that the request lies within the disk")
    }

    /// The first byte.
    pub const fn at(self) -> u64 {
        self.at
    }

    /// How many bytes.
    pub const fn len(self) -> u64 {
        self.len
    }

    /// The byte after the last one.
    pub const fn end(self) -> u64 {
        self.at + self.len
    }

    /// Whether it holds no byte.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether some byte is in both.
    pub const fn overlaps(self, other: Span) -> bool {
        self.at < other.end() && other.at < self.end() && self.len > 0 && other.len > 0
    }

    /// Whether every byte lies before `size`.
    pub const fn is_within(self, size: u64) -> bool {
        self.end() <= size
    }

    /// Whether both ends are multiples of `align`, a power of two.
    pub const fn is_aligned(self, align: u64) -> bool {
        (self.at | self.len) & (align - 1) == 0
    }

    /// The smallest aligned span around it; `align` is a power of two and no more than 2^32.
    pub const fn align_out(self, align: u64) -> Span {
        let at = self.at & !(align - 1);
        // Cannot wrap: the end is at most 2^63 - 1 and the padding less than 2^32.
        let end = (self.end() + align - 1) & !(align - 1);
        Span { at, len: end - at }
    }

    /// The largest aligned span within it; empty where there is none.
    pub const fn align_in(self, align: u64) -> Span {
        let at = (self.at + align - 1) & !(align - 1);
        let end = self.end() & !(align - 1);
        if end <= at { Span { at: self.at, len: 0 } } else { Span { at, len: end - at } }
    }

    /// The part before byte `at` of the disk and the part from it on.
    pub const fn split_at(self, at: u64) -> (Span, Span) {
        let cut = if at < self.at {
            self.at
        } else if at > self.end() {
            self.end()
        } else {
            at
        };
        (Span { at: self.at, len: cut - self.at }, Span { at: cut, len: self.end() - cut })
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.at, self.len)
    }
}

/// What a storage asks of those who use it fast, and what it can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes, a power of two: requests aligned to it are passed on as they are; others are served too, slower.
    pub align: u32,
    /// Bytes, a power of two: the block size that suits it best.
    pub preferred: u32,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Whether zeroing without writing zeroes is possible (NBD's fast zero).
    pub fast_zero: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_cannot_wrap_around() {
        assert_eq!(Span::new(u64::MAX, 1), None);
        assert_eq!(Span::new(u64::MAX - 511, 512), None);
        assert_eq!(Span::new(i64::MAX as u64, 1), None);
        assert!(Span::new(i64::MAX as u64, 0).is_some());
    }

    #[test]
    fn aligning_out_covers_and_aligning_in_is_covered() {
        let span = Span::new(1000, 3200).unwrap();
        assert_eq!(span.align_out(512), Span::new(512, 4096).unwrap());
        assert_eq!(span.align_in(512), Span::new(1024, 3072).unwrap());
        assert!(Span::new(10, 20).unwrap().align_in(512).is_empty());
        assert!(Span::new(512, 1024).unwrap().is_aligned(512));
    }

    #[test]
    fn empty_spans_overlap_nothing() {
        let span = Span::new(0, 10).unwrap();
        assert!(!span.overlaps(Span::new(5, 0).unwrap()));
        assert!(!span.overlaps(Span::new(10, 5).unwrap()));
        assert!(span.overlaps(Span::new(9, 5).unwrap()));
    }
}
