//! A file that is being made, until somebody says that it is not to be: formats that write much of it need not ask.

use std::rc::Rc;

use block::{Buf, Errno, Error, Limits, Result, Run, Span};
use image::tool::{ToolError, Watch};
use storage::{Io, Storage, Zeroing};

/// Bytes that are made zero at a time, which may mean that they are written.
const PIECE: u64 = 256 << 20;

/// All of the storage; but once the work is told to stop, what would change a byte fails.
pub(super) struct Stoppable {
    pub(super) storage: Rc<dyn Storage>,
    pub(super) watch: Rc<dyn Watch>,
}

/// What became of the work, where it failed since it was told to stop.
pub(super) fn told(done: anyhow::Result<()>, watch: &Rc<dyn Watch>) -> anyhow::Result<()> {
    done.map_err(|error| if watch.is_stopped() { ToolError::Stopped.into() } else { error })
}

impl Stoppable {
    fn check(&self) -> Result<()> {
        match self.watch.is_stopped() {
            true => Err(Error::new(Errno::ECANCELED, "make an image: told to stop")),
            false => Ok(()),
        }
    }
}

impl Storage for Stoppable {
    fn size(&self) -> u64 {
        self.storage.size()
    }

    fn limits(&self) -> Limits {
        self.storage.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        self.storage.read(at, buf)
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move {
            self.check()?;
            self.storage.write(at, buf).await
        })
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        Box::pin(async move {
            let mut rest = span;
            while !rest.is_empty() {
                self.check()?;
                let (piece, others) = rest.split_at(rest.at().saturating_add(PIECE));
                self.storage.zero(piece, how).await?;
                rest = others;
            }
            Ok(())
        })
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.storage.discard(span)
    }

    fn flush(&self) -> Io<'_> {
        self.storage.flush()
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        self.storage.extents(span)
    }

    fn prefetch(&self, span: Span) -> Io<'_> {
        self.storage.prefetch(span)
    }

    fn grow(&self) -> Io<'_, u64> {
        self.storage.grow()
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        self.storage.resize(bytes)
    }

    fn reserve(&self, span: Span) -> Io<'_> {
        Box::pin(async move {
            self.check()?;
            self.storage.reserve(span).await
        })
    }

    fn poison(&self) -> Option<Error> {
        self.storage.poison()
    }
}
