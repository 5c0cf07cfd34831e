//! Bytes that can fail: a file, memory, later an NBD export, or a filter over another storage.

pub mod conformance;
pub mod file;
pub mod filter;
mod permits;
mod ram;
mod range_lock;

use block::{Buf, Limits, Result, Run, Span};
use runtime::BoxFuture;

pub use file::File;
pub use permits::{Permit, Permits};
pub use ram::{Null, Ram};
pub use range_lock::{Access, RangeGuard, RangeLocks};

/// An operation of a storage under way.
pub type Io<'a, T = ()> = BoxFuture<'a, Result<T>>;

/// How bytes are to become zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeroing {
    /// The space behind them may be given back.
    pub unmap: bool,
    /// Fail with EOPNOTSUPP rather than be as slow as writing zeroes.
    pub fast: bool,
}

/// A run of bytes that can fail.
///
/// An operation succeeds as a whole or fails: a short transfer never passes this trait. One that has failed may have
/// changed any of its own bytes to what was to be written, and no others. Operations may run side by side; of two
/// that overlap either may come last. A future that is dropped before it is done leaves its bytes as a failed
/// operation would; what the kernel was given it keeps until it is done (see `runtime`).
///
/// Spans lie within `size`: the caller has checked.
pub trait Storage {
    /// Bytes.
    fn size(&self) -> u64;

    /// What it asks of its users and what it can do.
    fn limits(&self) -> Limits;

    /// Fills `buf` with the bytes from `at` on. After an error its content is arbitrary.
    fn read(&self, at: u64, buf: Buf) -> Io<'_>;

    /// Stores the bytes of `buf` from `at` on. They are durable only after a flush.
    fn write(&self, at: u64, buf: Buf) -> Io<'_>;

    /// Makes bytes read as zero.
    fn zero(&self, span: Span, how: Zeroing) -> Io<'_>;

    /// Says that bytes are no longer needed. They may read as anything of this disk's afterwards, or as zero. Success
    /// does not promise that space is given back.
    fn discard(&self, span: Span) -> Io<'_>;

    /// Makes everything that was done before it was called durable.
    ///
    /// Once it has failed it never succeeds again, and neither does a write, a zero or a discard (FAILURES: poison):
    /// the kernel tells of lost data once and then forgets.
    fn flush(&self) -> Io<'_>;

    /// What the bytes of `span` are, from its first on. At least one run; together they may be shorter than `span`,
    /// never longer.
    fn extents(&self, span: Span) -> Io<'_, Vec<Run>>;

    /// Gets ready for a read of these bytes, if that helps. Failing to is no error.
    fn prefetch(&self, span: Span) -> Io<'_>;

    /// Takes in what was added at its end since it was opened; gives the size, in bytes, which then is `size`. It
    /// never shrinks.
    ///
    /// What is smaller than it was is an error that says so, and EOPNOTSUPP is that of one that cannot grow; neither
    /// changes anything.
    fn grow(&self) -> Io<'_, u64>;

    /// Makes it this many bytes long, for an image format whose file grows as it is filled. What is added reads as
    /// zero; what is cut off is gone. Spans of operations under way lie within both sizes. `size` tells of a larger one when
    /// this has ended: a flush that begins then covers it.
    ///
    /// A block device has the size it has: asked for more it answers ENOSPC, asked for less it stays as it is.
    fn resize(&self, bytes: u64) -> Io<'_>;

    /// Asks for space behind these bytes where they have none, so that first writes to them cost less and there is room for
    /// them. No byte changes. EOPNOTSUPP where there is no such thing.
    fn reserve(&self, _span: Span) -> Io<'_> {
        Box::pin(std::future::ready(Err(block::Errno::EOPNOTSUPP.into())))
    }

    /// Why it is poisoned, if it is: the error that every flush and write fails with.
    fn poison(&self) -> Option<block::Error>;
}
