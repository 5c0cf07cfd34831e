//! A storage that watches what passes between a disk and its storage, and storages that misbehave for a test.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use block::{Buf, Errno, Error, Limits, OpKind, Result, Run, Span};
use runtime::{Handle, Sleep};
use storage::{Io, Storage, Zeroing};

use crate::dice::Dice;
use crate::subject::Subject;

/// Tells a subject of each call, and the kernel whose call each operation belongs to.
pub(crate) struct Witness {
    subject: Rc<Subject>,
    inner: Rc<dyn Storage>,
}

impl Witness {
    pub(crate) fn new(subject: &Rc<Subject>, inner: Rc<dyn Storage>) -> Witness {
        Witness { subject: subject.clone(), inner }
    }

    fn watch<'a, T: 'a>(
        &'a self,
        kind: OpKind,
        span: Span,
        memory: usize,
        start: impl FnOnce(&'a dyn Storage) -> Io<'a, T>,
    ) -> Io<'a, T> {
        let poison_before = self.subject.poison();
        let call = self.subject.called(kind, span, memory);
        let begun = self.subject.order();
        let inner = {
            let _current = Current::set(&self.subject, call);
            start(&*self.inner)
        };
        Box::pin(Watched { subject: &self.subject, call, kind, begun, poison_before, inner, returned: false })
    }
}

fn memory_of(buf: &Buf) -> usize {
    buf.segments().first().map_or(0, |segment| segment.ptr().addr())
}

fn span_of(at: u64, buf: &Buf) -> Span {
    Span::new(at, buf.len() as u64).expect("the disk has checked the request")
}

/// Says whose call is being polled, for as long as it lives.
struct Current<'a> {
    subject: &'a Subject,
    outer: Option<u64>,
}

impl<'a> Current<'a> {
    fn set(subject: &'a Subject, call: u64) -> Current<'a> {
        let outer = subject.kernel.borrow_mut().current.replace(call);
        Current { subject, outer }
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        self.subject.kernel.borrow_mut().current = self.outer;
    }
}

struct Watched<'a, T> {
    subject: &'a Subject,
    call: u64,
    kind: OpKind,
    /// When it began, in the order of the subject's events.
    begun: u64,
    poison_before: Option<Errno>,
    inner: Io<'a, T>,
    returned: bool,
}

impl<T> Future for Watched<'_, T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        let this = &mut *self;
        let result = {
            let _current = Current::set(this.subject, this.call);
            this.inner.as_mut().poll(cx)
        };
        if let Poll::Ready(result) = &result {
            this.returned = true;
            let result = result.as_ref().map(|_| ());
            this.subject.returned(this.call, this.kind, this.begun, this.poison_before, result);
        }
        result
    }
}

impl<T> Drop for Watched<'_, T> {
    fn drop(&mut self) {
        if !self.returned {
            self.subject.given_up(self.call, self.kind);
        }
    }
}

impl Storage for Witness {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        self.watch(OpKind::Read, span_of(at, &buf), memory_of(&buf), |inner| inner.read(at, buf))
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        self.watch(OpKind::Write, span_of(at, &buf), memory_of(&buf), |inner| inner.write(at, buf))
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        self.watch(OpKind::WriteZeroes, span, 0, |inner| inner.zero(span, how))
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.watch(OpKind::Discard, span, 0, |inner| inner.discard(span))
    }

    fn flush(&self) -> Io<'_> {
        let nothing = Span::new(0, 0).expect("an empty span");
        self.watch(OpKind::Flush, nothing, 0, |inner| inner.flush())
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        self.watch(OpKind::Status, span, 0, |inner| inner.extents(span))
    }

    fn prefetch(&self, span: Span) -> Io<'_> {
        self.watch(OpKind::Prefetch, span, 0, |inner| inner.prefetch(span))
    }

    fn grow(&self) -> Io<'_, u64> {
        self.inner.grow()
    }

    fn poison(&self) -> Option<Error> {
        self.inner.poison()
    }
}

/// A storage beneath filters: tells what gets past them.
pub(crate) struct Beneath {
    subject: Rc<Subject>,
    inner: Rc<dyn Storage>,
}

impl Beneath {
    pub(crate) fn new(subject: &Rc<Subject>, inner: Rc<dyn Storage>) -> Beneath {
        Beneath { subject: subject.clone(), inner }
    }

    fn reached(&self) -> &dyn Storage {
        self.subject.kernel.borrow_mut().passed();
        &*self.inner
    }
}

impl Storage for Beneath {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        self.reached().read(at, buf)
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        self.reached().write(at, buf)
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        self.reached().zero(span, how)
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.reached().discard(span)
    }

    fn flush(&self) -> Io<'_> {
        self.reached().flush()
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        self.reached().extents(span)
    }

    fn prefetch(&self, span: Span) -> Io<'_> {
        self.reached().prefetch(span)
    }

    fn grow(&self) -> Io<'_, u64> {
        self.inner.grow()
    }

    fn poison(&self) -> Option<Error> {
        self.inner.poison()
    }
}

/// What the panics of tests say.
pub(crate) const ON_PURPOSE: &str = "in a driver, on purpose";

/// How a storage misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mischief {
    /// It panics once, after so many calls, at the latest when that call waits for the so-and-so-many-th time: so with
    /// any of its operations in flight.
    Panic { after: u32, waits: u32 },
    /// It gives up calls after a while, leaving their operations in flight.
    Impatience { percent: u64, nanoseconds: u64 },
}

/// A driver that panics, or that loses patience, between a disk and a good storage.
pub(crate) struct Mischievous {
    subject: Rc<Subject>,
    handle: Handle,
    inner: Rc<dyn Storage>,
    mischief: Mischief,
    calls: Cell<u32>,
    dice: RefCell<Dice>,
}

impl Mischievous {
    pub(crate) fn new(
        subject: &Rc<Subject>,
        handle: &Handle,
        inner: Rc<dyn Storage>,
        mischief: Mischief,
        dice: Dice,
    ) -> Mischievous {
        let (subject, handle) = (subject.clone(), handle.clone());
        Mischievous { subject, handle, inner, mischief, calls: Cell::new(0), dice: RefCell::new(dice) }
    }

    fn spoil<'a, T: 'a>(&'a self, is_flush: bool, inner: Io<'a, T>) -> Io<'a, T> {
        self.calls.set(self.calls.get() + 1);
        let healed = self.subject.kernel.borrow().healed;
        match self.mischief {
            Mischief::Panic { after, waits } if self.calls.get() == after => {
                Box::pin(Panicking { subject: &self.subject, inner, waits })
            }
            // Giving up a flush poisons a file, which is right, but would leave nothing else to test.
            Mischief::Impatience { percent, nanoseconds }
                if !is_flush && !healed && self.dice.borrow_mut().percent(percent) =>
            {
                let patience = Duration::from_nanos(self.dice.borrow_mut().below(nanoseconds));
                Box::pin(Impatient {
                    subject: &self.subject,
                    inner: Some(inner),
                    sleep: self.handle.sleep(patience),
                })
            }
            Mischief::Panic { .. } | Mischief::Impatience { .. } => inner,
        }
    }
}

struct Panicking<'a, T> {
    subject: &'a Subject,
    inner: Io<'a, T>,
    /// How often it waits at most before it panics.
    waits: u32,
}

impl<T> Future for Panicking<'_, T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        self.waits = self.waits.saturating_sub(1);
        if self.inner.as_mut().poll(cx).is_pending() && self.waits > 0 {
            return Poll::Pending;
        }
        self.subject.panics();
        panic!("{ON_PURPOSE}");
    }
}

struct Impatient<'a, T> {
    subject: &'a Subject,
    inner: Option<Io<'a, T>>,
    sleep: Sleep,
}

impl<T> Future for Impatient<'_, T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        if let Some(inner) = &mut self.inner
            && let Poll::Ready(result) = inner.as_mut().poll(cx)
        {
            return Poll::Ready(result);
        }
        if Pin::new(&mut self.sleep).poll(cx).is_pending() {
            return Poll::Pending;
        }
        self.inner = None;
        self.subject.kernel.borrow_mut().inject(Errno::ETIME);
        Poll::Ready(Err(Error::new(Errno::ETIME, "lose patience")))
    }
}

impl Storage for Mischievous {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        self.spoil(false, self.inner.read(at, buf))
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        self.spoil(false, self.inner.write(at, buf))
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        self.spoil(false, self.inner.zero(span, how))
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.spoil(false, self.inner.discard(span))
    }

    fn flush(&self) -> Io<'_> {
        self.spoil(true, self.inner.flush())
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        self.spoil(false, self.inner.extents(span))
    }

    fn prefetch(&self, span: Span) -> Io<'_> {
        self.spoil(false, self.inner.prefetch(span))
    }

    fn grow(&self) -> Io<'_, u64> {
        self.inner.grow()
    }

    fn poison(&self) -> Option<Error> {
        self.inner.poison()
    }
}
