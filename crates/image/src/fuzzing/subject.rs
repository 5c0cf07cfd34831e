//! A format under trial.

use std::rc::Rc;

use runtime::{BoxFuture, Handle};
use storage::Storage;

use crate::{Image, ImageError, Repair, Report, Settings};

/// What comes of trying to open an image.
pub(super) type Tried<'a, T> = BoxFuture<'a, Result<T, ImageError>>;

/// A format.
pub(super) trait Subject {
    /// Its name.
    fn name(&self) -> &'static str;

    /// A sound image with some content. The same options give the same bytes, and none of them is [`POISON`].
    fn base(&self, options: u8) -> Vec<u8>;

    /// Where its metadata is: bytes of the file, of words that are worth damaging.
    fn words(&self, base: &[u8]) -> Vec<usize>;

    /// Sets the checksums right.
    fn seal(&self, bytes: &mut [u8]);

    /// Whether what a guest writes is where it must never get to: in what says where other files are.
    fn is_breached(&self, head: &[u8], tail: &[u8], mark: &[u8]) -> bool;

    /// Whether there is an image below.
    fn has_backing<'a>(&'a self, file: &'a Rc<dyn Storage>) -> Tried<'a, bool>;

    /// Opens it.
    fn open<'a>(
        &'a self,
        handle: &'a Handle,
        file: &'a Rc<dyn Storage>,
        settings: Settings,
    ) -> Tried<'a, Rc<dyn Image>>;

    /// Checks it.
    fn check<'a>(&'a self, file: &'a Rc<dyn Storage>, repair: Repair) -> Tried<'a, Report>;
}

/// What fresh memory is full of in debug builds (`block::Pool`). No byte of an image is this, so that it can be told.
pub(super) const POISON: u8 = 0xa5;
