//! A file in memory that counts what is done to it, and has little patience.

use std::cell::Cell;
use std::rc::Rc;

use block::{Buf, Errno, Error, Limits, Run, Span};
use storage::{Io, Ram, Storage, Zeroing};

/// Bytes that the file may have: more than any image of a trial needs, and less than a broken one asks for.
pub(super) const LEN_MAX: u64 = 1 << 30;
/// Operations in a trial.
const OPERATIONS_MAX: u64 = 400_000;
/// Bytes read and written in a trial.
const BYTES_MAX: u64 = 2 << 30;

/// A file for a trial.
pub(super) struct Fence {
    ram: Ram,
    operations: Cell<u64>,
    bytes: Cell<u64>,
    changes: Cell<u64>,
}

impl Fence {
    /// A file of these bytes.
    pub(super) fn new(bytes: &[u8], len: u64) -> Rc<Fence> {
        let ram = Ram::new(len.max(bytes.len() as u64));
        let write = ram.write(0, Buf::from_bytes(bytes));
        now(write);
        now(ram.resize(len));
        Rc::new(Fence { ram, operations: Cell::new(0), bytes: Cell::new(0), changes: Cell::new(0) })
    }

    /// How often it was changed.
    pub(super) fn changes(&self) -> u64 {
        self.changes.get()
    }

    /// The first bytes, as many as there are.
    pub(super) fn head(&self, len: u64) -> Vec<u8> {
        self.peek(0, len.min(self.ram.size()))
    }

    /// The last bytes, as many as there are.
    pub(super) fn tail(&self, len: u64) -> Vec<u8> {
        let len = len.min(self.ram.size());
        self.peek(self.ram.size() - len, len)
    }

    fn peek(&self, at: u64, len: u64) -> Vec<u8> {
        let buf = Buf::zeroed(len as usize);
        now(self.ram.read(at, buf.clone()));
        buf.to_vec()
    }

    fn count(&self, bytes: u64, changes: bool) {
        self.operations.set(self.operations.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
        self.changes.set(self.changes.get() + u64::from(changes));
        assert!(self.operations.get() < OPERATIONS_MAX, "so much is done that it may never end");
        assert!(self.bytes.get() < BYTES_MAX, "so much is read or written that it may never end");
    }

    /// Whoever asks for bytes that the file does not have has not looked.
    fn check(&self, span: Span) {
        assert!(span.is_within(self.ram.size()), "{span:?} of a file of {} bytes", self.ram.size());
    }
}

fn now(io: Io<'_>) {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(io).as_mut().poll(&mut cx) {
        std::task::Poll::Ready(result) => result.expect("memory never fails"),
        std::task::Poll::Pending => panic!("memory never waits"),
    }
}

impl Storage for Fence {
    fn size(&self) -> u64 {
        self.ram.size()
    }

    fn limits(&self) -> Limits {
        self.ram.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        self.count(buf.len() as u64, false);
        self.check(Span::of(at, &buf));
        self.ram.read(at, buf)
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        self.count(buf.len() as u64, true);
        self.check(Span::of(at, &buf));
        self.ram.write(at, buf)
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        self.count(0, true);
        self.check(span);
        self.ram.zero(span, how)
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.count(0, true);
        self.check(span);
        self.ram.discard(span)
    }

    fn flush(&self) -> Io<'_> {
        self.count(0, false);
        self.ram.flush()
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        self.count(0, false);
        self.check(span);
        self.ram.extents(span)
    }

    fn prefetch(&self, span: Span) -> Io<'_> {
        self.count(0, false);
        self.ram.prefetch(span)
    }

    fn grow(&self) -> Io<'_, u64> {
        self.ram.grow()
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        self.count(0, true);
        if bytes > LEN_MAX {
            let error = Error::new(Errno::ENOSPC, format!("make a file {bytes} bytes long"));
            return Box::pin(std::future::ready(Err(error)));
        }
        self.ram.resize(bytes)
    }

    fn poison(&self) -> Option<Error> {
        None
    }
}
