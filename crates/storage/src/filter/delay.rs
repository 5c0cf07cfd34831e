//! Makes operations slow as a rule says.

use std::rc::Rc;
use std::time::Duration;

use block::{Buf, Error, Limits, OpKind, Run, Span};
use runtime::Handle;

use super::Rule;
use super::rule::Counted;
use crate::{Io, Storage, Zeroing};

/// A storage whose operations begin late where a rule says so.
pub struct Delay {
    handle: Handle,
    below: Rc<dyn Storage>,
    rule: Counted,
    delay: Duration,
}

impl Delay {
    pub(super) fn new(handle: &Handle, below: Rc<dyn Storage>, rule: Rule, delay: Duration) -> Delay {
        Delay { handle: handle.clone(), below, rule: Counted::new(rule), delay }
    }

    fn late<'a, T: 'a>(
        &'a self,
        kind: OpKind,
        span: Span,
        go_on: impl FnOnce() -> Io<'a, T> + 'a,
    ) -> Io<'a, T> {
        if !self.rule.hits(kind, span) {
            return go_on();
        }
        Box::pin(async move {
            self.handle.sleep(self.delay).await;
            go_on().await
        })
    }
}

impl Storage for Delay {
    fn size(&self) -> u64 {
        self.below.size()
    }

    fn limits(&self) -> Limits {
        self.below.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        self.late(OpKind::Read, Span::of(at, &buf), move || self.below.read(at, buf))
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        self.late(OpKind::Write, Span::of(at, &buf), move || self.below.write(at, buf))
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        self.late(OpKind::WriteZeroes, span, move || self.below.zero(span, how))
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.late(OpKind::Discard, span, move || self.below.discard(span))
    }

    fn flush(&self) -> Io<'_> {
        self.late(OpKind::Flush, Span::new(0, 0).expect("an empty span"), || self.below.flush())
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        self.late(OpKind::Status, span, move || self.below.extents(span))
    }

    fn prefetch(&self, span: Span) -> Io<'_> {
        self.below.prefetch(span)
    }

    fn grow(&self) -> Io<'_, u64> {
        self.below.grow()
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        self.below.resize(bytes)
    }

    fn reserve(&self, span: Span) -> Io<'_> {
        self.below.reserve(span)
    }

    fn poison(&self) -> Option<Error> {
        self.below.poison()
    }
}
