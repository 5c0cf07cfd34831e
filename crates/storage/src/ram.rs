//! Disks without a file: bytes in memory, and nothing at all.

use std::cell::RefCell;
use std::collections::BTreeMap;

use block::{Buf, Errno, Error, Limits, Run, Span};

use crate::{Io, Storage, Zeroing};

/// Bytes of memory are taken in pieces of this size, when they are first written.
const CHUNK: u64 = 64 << 10;

fn ready<'a, T: 'a>(value: T) -> Io<'a, T> {
    Box::pin(std::future::ready(Ok(value)))
}

/// Bytes in memory, lost at the end of the process; all zero at first.
pub struct Ram {
    size: u64,
    chunks: RefCell<BTreeMap<u64, Box<[u8]>>>,
}

impl Ram {
    /// A disk of `size` bytes.
    pub fn new(size: u64) -> Ram {
        Ram { size, chunks: RefCell::default() }
    }

    fn clear(&self, span: Span) {
        let mut chunks = self.chunks.borrow_mut();
        for (number, from, len) in pieces(span) {
            if len as u64 == CHUNK {
                chunks.remove(&number);
            } else if let Some(chunk) = chunks.get_mut(&number) {
                chunk[from..from + len].fill(0);
            }
        }
    }
}

/// A span by chunks: the chunk's number, the first byte in it, how many.
fn pieces(span: Span) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut at = span.at();
    std::iter::from_fn(move || {
        let from = at % CHUNK;
        let len = (CHUNK - from).min(span.end() - at);
        let piece = (at / CHUNK, from as usize, len as usize);
        at += len;
        (len > 0).then_some(piece)
    })
}

/// Nobody can add anything to what has nothing behind it.
fn no_growth() -> Error {
    Error::new(Errno::EOPNOTSUPP, "only a file or a block device can grow")
}

const LIMITS: Limits = Limits { align: 1, preferred: 4096, read_only: false, fast_zero: true };

impl Storage for Ram {
    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        LIMITS
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        let chunks = self.chunks.borrow();
        let mut done = 0;
        for (number, from, len) in pieces(Span::of(at, &buf)) {
            match chunks.get(&number) {
                Some(chunk) => buf.put(done, &chunk[from..from + len]),
                None => buf.slice(done, len).fill(0),
            }
            done += len;
        }
        ready(())
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        let mut chunks = self.chunks.borrow_mut();
        let mut done = 0;
        for (number, from, len) in pieces(Span::of(at, &buf)) {
            let chunk = chunks.entry(number).or_insert_with(|| vec![0; CHUNK as usize].into());
            buf.get(done, &mut chunk[from..from + len]);
            done += len;
        }
        ready(())
    }

    fn zero(&self, span: Span, _how: Zeroing) -> Io<'_> {
        self.clear(span);
        ready(())
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.clear(span);
        ready(())
    }

    fn flush(&self) -> Io<'_> {
        ready(())
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        let chunks = self.chunks.borrow();
        let mut runs: Vec<Run> = Vec::new();
        for (number, _, len) in pieces(span) {
            let allocated = chunks.contains_key(&number);
            match runs.last_mut() {
                Some(run) if run.allocated == allocated => run.len += len as u64,
                Some(_) | None => runs.push(Run { len: len as u64, allocated, zero: !allocated }),
            }
        }
        ready(runs)
    }

    fn prefetch(&self, _span: Span) -> Io<'_> {
        ready(())
    }

    fn grow(&self) -> Io<'_, u64> {
        Box::pin(std::future::ready(Err(no_growth())))
    }

    fn poison(&self) -> Option<Error> {
        None
    }
}

/// Nothing: reads give zeroes, writes go nowhere. For measuring all that is not storage.
pub struct Null {
    size: u64,
}

impl Null {
    /// A disk of `size` bytes.
    pub fn new(size: u64) -> Null {
        Null { size }
    }
}

impl Storage for Null {
    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        LIMITS
    }

    fn read(&self, _at: u64, buf: Buf) -> Io<'_> {
        buf.fill(0);
        ready(())
    }

    fn write(&self, _at: u64, _buf: Buf) -> Io<'_> {
        ready(())
    }

    fn zero(&self, _span: Span, _how: Zeroing) -> Io<'_> {
        ready(())
    }

    fn discard(&self, _span: Span) -> Io<'_> {
        ready(())
    }

    fn flush(&self) -> Io<'_> {
        ready(())
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        ready(vec![Run { len: span.len(), allocated: false, zero: true }])
    }

    fn prefetch(&self, _span: Span) -> Io<'_> {
        ready(())
    }

    fn grow(&self) -> Io<'_, u64> {
        Box::pin(std::future::ready(Err(no_growth())))
    }

    fn poison(&self) -> Option<Error> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance;

    #[test]
    fn ram_keeps_what_is_written() {
        // Larger than two chunks and no multiple of one.
        pollster(conformance::check(&Ram::new(3 * CHUNK / 2 + 12345), 1, 2000));
    }

    fn pollster(future: impl Future<Output = ()>) {
        let mut future = std::pin::pin!(future);
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(future.as_mut().poll(&mut cx).is_ready(), "memory never waits");
    }
}
