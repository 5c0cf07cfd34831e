//! The ledger: what of the map was changed and is not written yet, where a successor of this process finds it.
//!
//! The death of a process is no power cut: its guests live on, and what they were answered must be there. But the map is
//! written in rounds, with syncs between, and most answers leave before their round. So each change is noted outside of the
//! process first, in a file that need not outlive the boot.

use std::io;

/// One changed word: 8 bytes of an image's file, as a big-endian number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Byte of the file, a multiple of 8.
    pub at: u64,
    /// What it was.
    pub old: u64,
    /// What it is.
    pub new: u64,
    /// When a round writes it: see [`Stage`](super::Stage).
    pub stage: u8,
}

/// Where changes are noted.
///
/// Rounds divide what is noted: at the end of one, what was noted before its begin is in the image and is forgotten.
pub trait Ledger {
    /// What was noted and not forgotten, by this process or one before, in order. A group that was noted only in part is
    /// left out.
    ///
    /// # Errors
    /// The ledger cannot be read; it may hold changes all the same.
    fn changes(&self) -> io::Result<Vec<Change>>;

    /// Whether `changes` is all that was changed since the first of them: no note has failed that is not in the image yet.
    ///
    /// # Errors
    /// As `changes`.
    fn is_whole(&self) -> io::Result<bool>;

    /// Notes a group of changes, which count together or not at all. Once it has returned, a successor finds them.
    ///
    /// # Errors
    /// They are not noted; the image has to be written instead. A successor that finds what was noted before finds, too, that
    /// it is not all.
    fn note(&self, group: &[Change]) -> io::Result<()>;

    /// A round begins: it writes all that was noted so far. One that fails has no end, and the next one begins.
    fn begin(&self);

    /// The round that began last has ended well: what was noted before it is forgotten. Gives whether that is all of it.
    /// Where it is not, a successor may still bring any of it back to where it was: no place of which it speaks may be used
    /// for anything else before another round has ended with `true`.
    fn end(&self) -> bool;
}
