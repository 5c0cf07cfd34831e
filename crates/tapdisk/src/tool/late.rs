//! A file in the making, made durable once and in the end: until then it has not its name, and a crash leaves nothing of it
//! anyway. So the order in which formats write their tables need not be paid for with syncs.

use std::rc::Rc;

use block::{Buf, Error, Limits, Run, Span};
use storage::{Io, Storage, Zeroing};

/// All of the storage below but its flushes, which do nothing. Whoever makes this flushes that one when all is written.
pub(super) struct Late(pub(super) Rc<dyn Storage>);

impl Storage for Late {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn limits(&self) -> Limits {
        self.0.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        self.0.read(at, buf)
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        self.0.write(at, buf)
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        self.0.zero(span, how)
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.0.discard(span)
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(std::future::ready(self.0.poison().map_or(Ok(()), Err)))
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        self.0.extents(span)
    }

    fn prefetch(&self, span: Span) -> Io<'_> {
        self.0.prefetch(span)
    }

    fn grow(&self) -> Io<'_, u64> {
        self.0.grow()
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        self.0.resize(bytes)
    }

    fn poison(&self) -> Option<Error> {
        self.0.poison()
    }
}
