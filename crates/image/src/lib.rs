//! Where the bytes of a disk are: a map from the disk to storages. Formats say where; only [`Chain`] moves data.

mod chain;
pub mod conformance;
mod error;
mod format;
mod frozen;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod header;
pub mod metadata;
mod open;
mod places;
pub mod probe;
pub mod qcow;
pub mod qcow2;
mod raw;
mod report;
pub mod tool;
pub mod vhd;
mod walk;

use std::any::Any;
use std::rc::Rc;

use block::{Buf, Errno, Error, Limits, Result, Span};
use storage::{Io, Storage, Zeroing};

pub use chain::Chain;
pub use error::ImageError;
pub use format::{Backing, Format, UnknownFormat};
pub use header::Header;
pub use open::{Disk, open};
pub use places::{Allowed, named};
pub use raw::Raw;
pub use report::{Repair, Report};
pub use walk::{Filter, Held, Layer, Options, walk};

/// How an image is opened.
#[derive(Default)]
pub struct Settings {
    /// Whether it is written. What is not is left as it is, to the last bit.
    pub writable: bool,
    /// Bytes of memory for its metadata; 0 for what suits most.
    pub cache: usize,
    /// Where changes of its map are noted until they are in the image. Without one each is in the image before the
    /// request that needs it is answered, if the image is `lasting`.
    pub ledger: Option<Box<dyn metadata::Ledger>>,
    /// Whether what was answered must be there after the death of this process. Tools need not that: they begin anew.
    pub lasting: bool,
}

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
    /// In the image, compressed: [`Image::unpack`] gives them.
    Packed {
        /// How many bytes of the disk.
        len: u64,
        /// As in `Data`.
        pin: Option<Rc<dyn Any>>,
    },
}

impl Extent {
    /// How many bytes.
    pub fn len(&self) -> u64 {
        match self {
            Extent::Data { len, .. }
            | Extent::Zero { len }
            | Extent::Below { len }
            | Extent::Packed { len, .. } => *len,
        }
    }

    /// Whether it has no byte; none that an image gives has.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A place for bytes that are about to be written. Until it is committed the disk shows the old bytes.
///
/// A place that is new to the disk may be larger than what is written: then the bytes around it belong there too. Whoever
/// fills the place brings them, as the disk shows them until then (zeroes beyond its end).
#[must_use = "what is written to a place shows only after it has been committed"]
pub struct Placement {
    /// Byte of the storage for the first of the bytes asked for.
    pub at: u64,
    /// How many of the bytes asked for have their place here, from the first on; at least one.
    pub len: u64,
    /// So many bytes right before them, on the disk and in the storage, belong to the place and are not there yet.
    pub before: u64,
    /// So many right after them.
    pub after: u64,
    /// Nothing but zeroes is there so far: zeroes need not be written.
    pub blank: bool,
    /// Keeps the place from being used for something else while it is written, if it shows already.
    pub pin: Option<Rc<dyn Any>>,
    /// What the image keeps of one that is new: its locks, what is to be published. Dropped without a word (`commit`,
    /// `give_up`), the place is not used again before the image is opened anew, for something may still be written to it.
    pub keep: Option<Box<dyn Any>>,
}

impl Placement {
    /// A place that shows already: an overwrite.
    pub fn shown(at: u64, len: u64, pin: Option<Rc<dyn Any>>) -> Placement {
        Placement { at, len, before: 0, after: 0, blank: false, pin, keep: None }
    }
}

/// What came of making bytes read as zero, from the first of those asked for on. Each is at least one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroed {
    /// So many read as zero now.
    Done {
        /// Bytes.
        len: u64,
    },
    /// The map cannot say this of so many: zeroes have to be written there.
    Write {
        /// Bytes.
        len: u64,
    },
}

/// A map from a disk's bytes to those of a storage, and what changes it.
///
/// Spans lie within `size` and are not empty. Errors leave the old map, or space that nothing uses; never a map to a wrong
/// place. No operation waits for one that is behind it on the way to the kernel: not for a buffer, not for a request.
pub trait Image {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Where its data lies.
    fn storage(&self) -> &Rc<dyn Storage>;

    /// What suits the disk and what it can do.
    fn limits(&self) -> Limits {
        self.storage().limits()
    }

    /// As `map`, where the answer is at hand.
    fn mapped(&self, _span: Span) -> Option<Extent> {
        None
    }

    /// Where the bytes from the span's first on are; a run of at least one byte, no longer than the span.
    fn map(&self, span: Span) -> Io<'_, Extent>;

    /// As `place`, where the bytes have their place already and nothing is to be waited for.
    fn placed(&self, _span: Span) -> Option<Placement> {
        None
    }

    /// Finds or makes a place for the bytes from the span's first on.
    ///
    /// A new place is this caller's alone until it is committed, given up or dropped: others who would write to the same
    /// unit wait. One caller asks for places of rising bytes only, so that no two wait for each other.
    fn place(&self, span: Span) -> Io<'_, Placement>;

    /// Lets the disk show what was written to the place. Once it has returned, a successor of this process finds it too.
    fn commit(&self, placement: Placement) -> Io<'_>;

    /// As `commit`, where there is nothing to wait for: whether the place shows, and a successor finds it, without that.
    fn committed(&self, _placement: &Placement) -> bool {
        false
    }

    /// Gives a place back: nothing will be written to it any more.
    fn give_up(&self, placement: Placement);

    /// Fills `buf` with the disk's bytes from `at` on, which lie within one `Packed` extent.
    fn unpack(&self, at: u64, _buf: Buf) -> Io<'_> {
        let error = Error::new(Errno::EIO, format!("unpack what is at {at}: nothing is compressed here"));
        Box::pin(std::future::ready(Err(error)))
    }

    /// Makes bytes read as zero, as many as one step takes.
    fn zero(&self, span: Span, how: Zeroing) -> Io<'_, Zeroed>;

    /// Says that bytes are no longer needed.
    fn discard(&self, span: Span) -> Io<'_>;

    /// Makes durable all that was committed before it was called, map and data.
    fn flush(&self) -> Io<'_>;

    /// Takes in what was added to the disk from outside; gives the size in bytes ([`Storage::grow`]).
    fn grow(&self) -> Io<'_, u64>;

    /// Makes the disk this many bytes large. What is added reads as zero.
    fn resize(&self, bytes: u64) -> Io<'_>;

    /// Flushes, then leaves the files as one who comes later expects them after an orderly end: no mark of being in use,
    /// no space at the end that nothing uses. Nothing is asked of it afterwards.
    fn close(&self) -> Io<'_>;

    /// Bytes of memory that its metadata takes now.
    fn memory(&self) -> usize {
        0
    }

    /// Why no flush or write succeeds any more, if that is so.
    fn poison(&self) -> Option<Error> {
        self.storage().poison()
    }
}

/// One result of many: success only if all succeeded, else the first error by severity, never the last part's word.
pub(crate) fn worst(results: Vec<Result<()>>) -> Result<()> {
    let worst = results.into_iter().reduce(|worst, result| match (worst, result) {
        (Ok(()), result) => result,
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(other)) => Err(error.worse(other)),
    });
    worst.unwrap_or(Ok(()))
}
