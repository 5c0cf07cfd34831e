//! A storage that takes no change any more, for an image that has to be opened all the same.
//!
//! A sync of its file has failed, in a process before this one, and guests have been told so: no write or flush succeeds until
//! all of them know. But they may read what they were answered for, and for that the image takes over what the process
//! before it has noted. What a format writes while it is opened stays in memory here, and what it asks for afterwards fails.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use block::{Buf, Error, Limits, Result, Run, Span};
use storage::{Io, Storage, Zeroing};

use crate::metadata::{Change, Ledger};

/// Bytes that are kept together.
const BLOCK: u64 = 512;

/// A storage over one that is poisoned, or whose companion is.
pub(crate) struct Frozen {
    below: Rc<dyn Storage>,
    error: Error,
    size: Cell<u64>,
    /// What was written here, by the number of the block.
    written: RefCell<BTreeMap<u64, [u8; BLOCK as usize]>>,
    is_opening: Cell<bool>,
}

impl Frozen {
    /// Over `below`; changes fail with this error once the image is opened.
    pub(crate) fn new(below: Rc<dyn Storage>, error: Error) -> Frozen {
        let size = Cell::new(below.size());
        Frozen { below, error, size, written: RefCell::default(), is_opening: Cell::new(true) }
    }

    /// The image is opened.
    pub(crate) fn is_opened(&self) {
        self.is_opening.set(false);
    }

    fn may_change(&self) -> Result<()> {
        if self.is_opening.get() { Ok(()) } else { Err(self.error.clone()) }
    }

    async fn read_bytes(&self, at: u64, buf: &Buf) -> Result<()> {
        let span = Span::of(at, buf);
        let (there, beyond) = span.split_at(self.below.size());
        if !there.is_empty() {
            self.below.read(at, buf.part(at, there)).await?;
        }
        buf.part(at, beyond).fill(0);
        let written = self.written.borrow();
        for (number, block) in written.range(span.at() / BLOCK..span.end().div_ceil(BLOCK)) {
            let from = (number * BLOCK).max(span.at());
            let to = ((number + 1) * BLOCK).min(span.end());
            let part = &block[(from - number * BLOCK) as usize..(to - number * BLOCK) as usize];
            buf.put((from - at) as usize, part);
        }
        Ok(())
    }

    async fn write_bytes(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let blocks = Span::new(at, bytes.len() as u64).expect("within the file").align_out(BLOCK);
        let whole = Buf::zeroed(blocks.len() as usize);
        self.read_bytes(blocks.at(), &whole).await?;
        whole.put((at - blocks.at()) as usize, bytes);
        let first = blocks.at() / BLOCK;
        for (number, block) in (first..).zip(whole.to_vec().chunks_exact(BLOCK as usize)) {
            self.written.borrow_mut().insert(number, block.try_into().expect("a whole block"));
        }
        self.size.set(self.size.get().max(at + bytes.len() as u64));
        Ok(())
    }
}

impl Storage for Frozen {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn limits(&self) -> Limits {
        self.below.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move { self.read_bytes(at, &buf).await })
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move {
            self.may_change()?;
            self.write_bytes(at, &buf.to_vec()).await
        })
    }

    fn zero(&self, span: Span, _how: Zeroing) -> Io<'_> {
        Box::pin(async move {
            self.may_change()?;
            let mut rest = span;
            while !rest.is_empty() {
                let (piece, others) = rest.split_at(rest.at().saturating_add(1 << 20));
                self.write_bytes(piece.at(), &vec![0; piece.len() as usize]).await?;
                rest = others;
            }
            Ok(())
        })
    }

    fn discard(&self, _span: Span) -> Io<'_> {
        Box::pin(std::future::ready(self.may_change()))
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(std::future::ready(self.may_change()))
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        Box::pin(std::future::ready(Ok(vec![Run { len: span.len(), allocated: true, zero: false }])))
    }

    fn prefetch(&self, _span: Span) -> Io<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn grow(&self) -> Io<'_, u64> {
        Box::pin(std::future::ready(self.may_change().map(|()| self.size())))
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        Box::pin(std::future::ready(self.may_change().map(|()| {
            self.written.borrow_mut().retain(|number, _| number * BLOCK < bytes);
            self.size.set(bytes);
        })))
    }

    fn poison(&self) -> Option<Error> {
        Some(self.error.clone())
    }
}

/// A ledger that stays as it is: what it has is not in the image, whatever looks so.
pub(crate) struct FrozenLedger<L>(pub(crate) L);

impl<L: Ledger> Ledger for FrozenLedger<L> {
    fn changes(&self) -> io::Result<Vec<Change>> {
        self.0.changes()
    }

    fn is_whole(&self) -> io::Result<bool> {
        self.0.is_whole()
    }

    fn note(&self, _group: &[Change]) -> io::Result<()> {
        Err(io::Error::other("a sync of the image has failed: nothing is changed any more"))
    }

    fn begin(&self) {}

    fn end(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use block::Errno;
    use storage::{Ram, conformance};

    use super::*;

    fn now<T>(io: impl Future<Output = T>) -> T {
        match std::pin::pin!(io).as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => result,
            Poll::Pending => panic!("memory never waits"),
        }
    }

    #[test]
    fn until_it_is_opened_it_is_like_any_storage_and_the_one_below_stays_as_it_is() {
        let ram = Rc::new(Ram::new(150_001));
        let poison = Error::new(Errno::EIO, "a sync failed").lasting();
        let frozen = Frozen::new(ram.clone(), poison.clone());
        now(conformance::check(&frozen, 7, 600));
        let below = Buf::zeroed(150_001);
        now(ram.read(0, below.clone())).unwrap();
        assert!(below.to_vec().iter().all(|byte| *byte == 0));

        now(frozen.resize(200_000)).unwrap();
        now(frozen.write(199_990, Buf::from_bytes(b"0123456789"))).unwrap();
        frozen.is_opened();
        let end = Buf::zeroed(12);
        now(frozen.read(199_988, end.clone())).unwrap();
        assert_eq!(end.to_vec(), b"\0\x000123456789");
        let span = Span::new(0, 512).unwrap();
        for result in [
            now(frozen.write(0, Buf::zeroed(512))),
            now(frozen.zero(span, Zeroing { unmap: true, fast: false })),
            now(frozen.discard(span)),
            now(frozen.flush()),
            now(frozen.resize(1)),
            now(frozen.grow()).map(|_| ()),
        ] {
            assert_eq!(result, Err(poison.clone()));
        }
        assert_eq!((frozen.poison(), frozen.size()), (Some(poison), 200_000));
    }
}
