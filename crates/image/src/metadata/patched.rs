//! A file as it would be with some of its words changed, to be read.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use block::{Buf, Errno, Error, Limits, Result, Run, Span};
use storage::{Io, Storage, Zeroing};

/// A storage that nobody writes, over one that stays as it is.
pub(super) struct Patched {
    below: Rc<dyn Storage>,
    /// By byte of the file, in the machine's byte order.
    words: BTreeMap<u64, u64>,
    size: u64,
    /// The first read that failed.
    failed: RefCell<Option<Error>>,
}

impl Patched {
    /// Over `below`, with these words in it. It ends with a whole block of so many bytes: what lies behind the last byte of
    /// `below` there is zero.
    pub(super) fn new(below: Rc<dyn Storage>, words: BTreeMap<u64, u64>, block: u64) -> Patched {
        let size = below.size().checked_next_multiple_of(block).unwrap_or(below.size());
        Patched { below, words, size, failed: RefCell::new(None) }
    }

    /// The error of the first read that failed: whoever reads may have gone on without.
    pub(super) fn failed(&self) -> Option<Error> {
        self.failed.borrow().clone()
    }

    async fn read_bytes(&self, at: u64, buf: &Buf) -> Result<()> {
        let span = Span::of(at, buf);
        let (there, beyond) = span.split_at(self.below.size());
        if !there.is_empty() {
            self.below.read(at, buf.part(at, there)).await?;
        }
        buf.part(at, beyond).fill(0);
        for (word, value) in self.words.range(at.saturating_sub(7)..span.end()) {
            let from = at.max(*word);
            let to = span.end().min(word + 8);
            buf.put((from - at) as usize, &value.to_be_bytes()[(from - word) as usize..(to - word) as usize]);
        }
        Ok(())
    }
}

fn refuse<T>() -> Io<'static, T>
where
    Result<T>: 'static,
{
    Box::pin(std::future::ready(Err(Error::new(Errno::EROFS, "change what is only looked at"))))
}

impl Storage for Patched {
    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits { read_only: true, ..self.below.limits() }
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move {
            let result = self.read_bytes(at, &buf).await;
            if let Err(error) = &result {
                self.failed.borrow_mut().get_or_insert_with(|| error.clone());
            }
            result
        })
    }

    fn write(&self, _at: u64, _buf: Buf) -> Io<'_> {
        refuse()
    }

    fn zero(&self, _span: Span, _how: Zeroing) -> Io<'_> {
        refuse()
    }

    fn discard(&self, _span: Span) -> Io<'_> {
        refuse()
    }

    fn flush(&self) -> Io<'_> {
        refuse()
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        Box::pin(std::future::ready(Ok(vec![Run { len: span.len(), allocated: true, zero: false }])))
    }

    fn prefetch(&self, _span: Span) -> Io<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn grow(&self) -> Io<'_, u64> {
        Box::pin(std::future::ready(Ok(self.size)))
    }

    fn resize(&self, _bytes: u64) -> Io<'_> {
        refuse()
    }

    fn poison(&self) -> Option<Error> {
        self.below.poison()
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use storage::Ram;

    use super::*;

    fn now<T>(io: impl Future<Output = T>) -> T {
        match std::pin::pin!(io).as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => result,
            Poll::Pending => panic!("memory never waits"),
        }
    }

    #[test]
    fn any_part_of_it_shows_the_words_and_around_them_what_is_below() {
        let ram = Rc::new(Ram::new(100));
        let mut plain: Vec<u8> = (0..100).collect();
        now(ram.write(0, Buf::from_bytes(&plain))).unwrap();
        plain.resize(128, 0);
        let words = BTreeMap::from([(8, 0x1122_3344_5566_7788), (40, u64::MAX), (96, 5), (104, 6)]);
        for (at, word) in &words {
            plain[*at as usize..*at as usize + 8].copy_from_slice(&word.to_be_bytes());
        }
        let patched = Patched::new(ram.clone(), words, 64);
        assert_eq!(patched.size(), 128);
        for at in 0..128 {
            for len in 1..=(128 - at).min(20) {
                let buf = Buf::zeroed(len);
                buf.fill(0xa5);
                now(patched.read(at as u64, buf.clone())).unwrap();
                assert_eq!(buf.to_vec(), plain[at..at + len], "{len} bytes at {at}");
            }
        }
        assert!(now(patched.write(0, Buf::zeroed(8))).is_err());
        let below = Buf::zeroed(16);
        now(ram.read(0, below.clone())).unwrap();
        assert_eq!(below.to_vec(), (0..16).collect::<Vec<u8>>(), "what is below stays as it is");
    }
}
