//! The raw format: the disk's bytes are the storage's bytes.

use std::rc::Rc;

use block::Span;
use storage::{Io, Storage, Zeroing};

use crate::{Extent, Image, Placement, Zeroed};

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

    fn mapped(&self, span: Span) -> Option<Extent> {
        Some(Extent::Data { at: span.at(), len: span.len(), pin: None })
    }

    fn map(&self, span: Span) -> Io<'_, Extent> {
        let extent = Extent::Data { at: span.at(), len: span.len(), pin: None };
        Box::pin(std::future::ready(Ok(extent)))
    }

    fn placed(&self, span: Span) -> Option<Placement> {
        Some(Placement::shown(span.at(), span.len(), None))
    }

    fn place(&self, span: Span) -> Io<'_, Placement> {
        Box::pin(std::future::ready(Ok(Placement::shown(span.at(), span.len(), None))))
    }

    fn commit(&self, _placement: Placement) -> Io<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn committed(&self, _placement: &Placement) -> bool {
        true
    }

    fn give_up(&self, _placement: Placement) {}

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_, Zeroed> {
        Box::pin(async move {
            self.storage.zero(span, how).await?;
            Ok(Zeroed::Done { len: span.len() })
        })
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

    fn resize(&self, bytes: u64) -> Io<'_> {
        self.storage.resize(bytes)
    }

    fn close(&self) -> Io<'_> {
        self.storage.flush()
    }
}
