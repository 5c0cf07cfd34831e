//! The raw format: the disk's bytes are the storage's bytes.

use std::rc::Rc;

use block::Span;
use storage::{Io, Storage, Zeroing};

use crate::{Extent, Image, Placement};

/// A storage that is a disk as it is.
pub struct Raw {
    storage: Rc<dyn Storage>,
}

impl Raw {
    /// The disk with the bytes of this storage.
    pub fn new(storage: Rc<dyn Storage>) -> Raw {
        Raw { storage }
    }
}

impl Image for Raw {
    fn size(&self) -> u64 {
        self.storage.size()
    }

    fn storage(&self) -> &Rc<dyn Storage> {
        &self.storage
    }

    fn map(&self, span: Span) -> Io<'_, Extent> {
        let extent = Extent::Data { at: span.at(), len: span.len(), pin: None };
        Box::pin(std::future::ready(Ok(extent)))
    }

    fn place(&self, span: Span) -> Io<'_, Placement> {
        let placement = Placement { at: span.at(), len: span.len(), undo: None };
        Box::pin(std::future::ready(Ok(placement)))
    }

    fn commit(&self, _placement: Placement) -> Io<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        self.storage.zero(span, how)
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.storage.discard(span)
    }

    fn flush(&self) -> Io<'_> {
        self.storage.flush()
    }

    fn grow(&self) -> Io<'_, u64> {
        self.storage.grow()
    }
}
