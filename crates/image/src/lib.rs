//! Where the bytes of a disk are: a map from the disk to storages. Formats say where; only [`Chain`] moves data.

mod chain;
mod raw;

use std::any::Any;
use std::rc::Rc;

use block::Span;
use storage::{Io, Storage, Zeroing};

pub use chain::Chain;
pub use raw::Raw;

/// Where a run of the disk's bytes is; `len` is in bytes and counts from the run's first byte on.
pub enum Extent {
    /// In the image's storage.
    Data {
        /// Byte of the storage.
        at: u64,
        /// How many bytes.
        len: u64,
        /// Keeps the place from being used for something else while it is read.
        pin: Option<Rc<dyn Any>>,
    },
    /// They are zero.
    Zero {
        /// How many bytes.
        len: u64,
    },
    /// The image says nothing of them: they are what the image below says.
    Below {
        /// How many bytes.
        len: u64,
    },
}

/// A place for bytes that are about to be written. Until it is committed the disk shows the old bytes; dropped
/// without, it is undone.
#[must_use = "what is written to a place shows only after it has been committed"]
pub struct Placement {
    /// Byte of the storage.
    pub at: u64,
    /// How many of the bytes asked for have their place here, from the first on; at least one.
    pub len: u64,
    /// What the image keeps of it; its drop undoes what was prepared.
    pub undo: Option<Box<dyn Any>>,
}

/// A map from a disk's bytes to those of a storage, and what changes it.
///
/// Spans lie within `size`. Errors leave the old map, or space that nothing uses; never a map to a wrong place.
pub trait Image {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Where its data lies.
    fn storage(&self) -> &Rc<dyn Storage>;

    /// Where the bytes from the span's first on are; a run of at least one byte, no longer than the span.
    fn map(&self, span: Span) -> Io<'_, Extent>;

    /// Finds or makes a place for the bytes from the span's first on.
    fn place(&self, span: Span) -> Io<'_, Placement>;

    /// Lets the disk show what was written to the place.
    fn commit(&self, placement: Placement) -> Io<'_>;

    /// Makes bytes read as zero.
    fn zero(&self, span: Span, how: Zeroing) -> Io<'_>;

    /// Says that bytes are no longer needed.
    fn discard(&self, span: Span) -> Io<'_>;

    /// Makes durable all that was committed before it was called, map and data.
    fn flush(&self) -> Io<'_>;

    /// Takes in what was added to the disk from outside; gives the size in bytes ([`Storage::grow`]).
    fn grow(&self) -> Io<'_, u64>;
}
