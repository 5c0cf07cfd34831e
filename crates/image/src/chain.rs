//! The images of a disk, one on another: the only mover of data between requests and storages.

use std::rc::Rc;

use block::{Buf, Error, Limits, Result, Run, Span};
use runtime::{BoxFuture, join_all};
use storage::{Io, Storage, Zeroing};

use crate::{Extent, Image, Placement};

/// Runs told at a time; the caller asks again for the rest.
const RUNS_MAX: usize = 256;

/// A disk: an image that is written, over others that are only read.
pub struct Chain {
    top: Rc<dyn Image>,
    /// From the next one down.
    below: Vec<Rc<dyn Image>>,
}

impl Chain {
    /// A disk of one image.
    pub fn new(top: Rc<dyn Image>) -> Chain {
        Chain::over(top, Vec::new())
    }

    /// A disk of an image over others, from the next one down. Where one below ends before the top does, zeroes
    /// follow.
    pub fn over(top: Rc<dyn Image>, below: Vec<Rc<dyn Image>>) -> Chain {
        Chain { top, below }
    }

    fn layer(&self, depth: usize) -> Option<&Rc<dyn Image>> {
        if depth == 0 { Some(&self.top) } else { self.below.get(depth - 1) }
    }

    /// Where the first bytes of the span are: in the storage of which image, or nowhere (zeroes).
    async fn find(&self, mut span: Span) -> Result<Found<'_>> {
        let mut depth = 0;
        while let Some(image) = self.layer(depth) {
            let (within, beyond) = span.split_at(image.size());
            if within.is_empty() {
                return Ok(Found::Zero { len: beyond.len() });
            }
            match image.map(within).await? {
                Extent::Data { at, len, pin } => return Ok(Found::Data { image, at, len, pin }),
                Extent::Zero { len } => return Ok(Found::Zero { len }),
                Extent::Below { len } => span = within.split_at(within.at() + len).0,
            }
            depth += 1;
        }
        Ok(Found::Zero { len: span.len() })
    }

    async fn read_bytes(&self, span: Span, buf: &Buf) -> Result<()> {
        let mut parts: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let mut rest = span;
        while !rest.is_empty() {
            // Where this fails no part has begun yet, and none will.
            let found = self.find(rest).await?;
            let (run, others) = rest.split_at(rest.at() + found.len());
            let into = buf.part(span.at(), run);
            rest = others;
            match found {
                Found::Zero { .. } => into.fill(0),
                Found::Data { image, at, pin, .. } if rest.is_empty() && parts.is_empty() => {
                    let result = image.storage().read(at, into).await;
                    drop(pin);
                    return result;
                }
                Found::Data { image, at, pin, .. } => parts.push(Box::pin(async move {
                    let _pin = pin;
                    image.storage().read(at, into).await
                })),
            }
        }
        worst(join_all(parts).await)
    }

    async fn write_bytes(&self, span: Span, buf: &Buf) -> Result<()> {
        let mut parts: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let mut rest = span;
        while !rest.is_empty() {
            // Where this fails no part has begun yet, and none will: their places are undone.
            let placement = self.top.place(rest).await?;
            let (run, others) = rest.split_at(rest.at() + placement.len);
            let from = buf.part(span.at(), run);
            rest = others;
            if rest.is_empty() && parts.is_empty() {
                return self.fill(placement, from).await;
            }
            parts.push(Box::pin(self.fill(placement, from)));
        }
        worst(join_all(parts).await)
    }

    /// Data first, then what shows it.
    async fn fill(&self, placement: Placement, from: Buf) -> Result<()> {
        self.top.storage().write(placement.at, from).await?;
        self.top.commit(placement).await
    }

    async fn find_runs(&self, span: Span) -> Result<Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        let mut rest = span;
        while !rest.is_empty() && runs.len() < RUNS_MAX {
            let found = self.find(rest).await?;
            let more = match found {
                Found::Zero { len } => vec![Run { len, allocated: false, zero: true }],
                Found::Data { image, at, len, pin } => {
                    let stored = Span::new(at, len).expect("an image maps to places that its storage has");
                    let runs = image.storage().extents(stored).await;
                    drop(pin);
                    runs?
                }
            };
            for run in more {
                rest = rest.split_at(rest.at() + run.len).1;
                match runs.last_mut() {
                    Some(last) if (last.allocated, last.zero) == (run.allocated, run.zero) => {
                        last.len += run.len
                    }
                    Some(_) | None => runs.push(run),
                }
            }
        }
        Ok(runs)
    }
}

enum Found<'a> {
    Data { image: &'a Rc<dyn Image>, at: u64, len: u64, pin: Option<Rc<dyn std::any::Any>> },
    Zero { len: u64 },
}

impl Found<'_> {
    fn len(&self) -> u64 {
        match self {
            Found::Data { len, .. } | Found::Zero { len } => *len,
        }
    }
}

/// One result of many: success only if all succeeded, else the first error by severity, never the last part's word.
fn worst(results: Vec<Result<()>>) -> Result<()> {
    let worst = results.into_iter().reduce(|worst, result| match (worst, result) {
        (Ok(()), result) => result,
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(other)) => Err(error.worse(other)),
    });
    worst.unwrap_or(Ok(()))
}

impl Storage for Chain {
    fn size(&self) -> u64 {
        self.top.size()
    }

    fn limits(&self) -> Limits {
        self.top.storage().limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move { self.read_bytes(Span::of(at, &buf), &buf).await })
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move { self.write_bytes(Span::of(at, &buf), &buf).await })
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        self.top.zero(span, how)
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.top.discard(span)
    }

    fn flush(&self) -> Io<'_> {
        self.top.flush()
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        Box::pin(self.find_runs(span))
    }

    fn prefetch(&self, span: Span) -> Io<'_> {
        Box::pin(async move {
            match self.find(span).await? {
                Found::Data { image, at, len, .. } => {
                    let stored = Span::new(at, len).expect("an image maps to places that its storage has");
                    image.storage().prefetch(stored).await
                }
                Found::Zero { .. } => Ok(()),
            }
        })
    }

    fn grow(&self) -> Io<'_, u64> {
        self.top.grow()
    }

    fn poison(&self) -> Option<Error> {
        self.top.storage().poison()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    use block::Errno;
    use storage::{Ram, conformance};

    use super::*;
    use crate::Raw;

    const CLUSTER: u64 = 512;

    /// A toy format: whole clusters, wherever they were first put; its map is kept in memory.
    struct Toy {
        size: u64,
        storage: Rc<dyn Storage>,
        map: Rc<RefCell<Map>>,
        /// The part of the map that cannot be read.
        broken: Option<u64>,
    }

    #[derive(Default)]
    struct Map {
        placed: BTreeMap<u64, Option<u64>>, // None: zero
        next: u64,
        /// Places that were given up.
        undone: u64,
    }

    impl Toy {
        fn new(size: u64, storage: Rc<dyn Storage>) -> Toy {
            Toy { size, storage, map: Rc::default(), broken: None }
        }
    }

    struct Pending {
        map: Rc<RefCell<Map>>,
        cluster: u64,
        place: u64,
    }

    impl Drop for Pending {
        fn drop(&mut self) {
            let map = &mut *self.map.borrow_mut();
            if map.placed.get(&self.cluster) != Some(&Some(self.place)) {
                map.undone += 1;
            }
        }
    }

    impl Image for Toy {
        fn size(&self) -> u64 {
            self.size
        }

        fn storage(&self) -> &Rc<dyn Storage> {
            &self.storage
        }

        fn map(&self, span: Span) -> Io<'_, Extent> {
            if self.broken == Some(span.at() / CLUSTER) {
                return Box::pin(std::future::ready(Err(Error::new(Errno::EIO, "read the map"))));
            }
            let skip = span.at() % CLUSTER;
            let len = span.len().min(CLUSTER - skip);
            let extent = match self.map.borrow().placed.get(&(span.at() / CLUSTER)) {
                Some(Some(place)) => Extent::Data { at: place + skip, len, pin: None },
                Some(None) => Extent::Zero { len },
                None => Extent::Below { len },
            };
            Box::pin(std::future::ready(Ok(extent)))
        }

        fn place(&self, span: Span) -> Io<'_, Placement> {
            let (cluster, skip) = (span.at() / CLUSTER, span.at() % CLUSTER);
            assert!(skip == 0 && span.len() >= CLUSTER, "this toy takes whole clusters");
            if self.broken == Some(cluster) {
                return Box::pin(std::future::ready(Err(Error::new(Errno::EIO, "read the map"))));
            }
            let mut map = self.map.borrow_mut();
            let place = map.next;
            map.next += CLUSTER;
            let undo =
                Some(Box::new(Pending { map: self.map.clone(), cluster, place }) as Box<dyn std::any::Any>);
            Box::pin(std::future::ready(Ok(Placement { at: place, len: CLUSTER, undo })))
        }

        fn commit(&self, placement: Placement) -> Io<'_> {
            let pending = placement.undo.unwrap().downcast::<Pending>().unwrap();
            pending.map.borrow_mut().placed.insert(pending.cluster, Some(pending.place));
            Box::pin(std::future::ready(Ok(())))
        }

        fn zero(&self, span: Span, _how: Zeroing) -> Io<'_> {
            for cluster in span.at() / CLUSTER..span.end() / CLUSTER {
                self.map.borrow_mut().placed.insert(cluster, None);
            }
            Box::pin(std::future::ready(Ok(())))
        }

        fn discard(&self, span: Span) -> Io<'_> {
            self.zero(span, Zeroing { unmap: true, fast: true })
        }

        fn flush(&self) -> Io<'_> {
            self.storage.flush()
        }

        fn grow(&self) -> Io<'_, u64> {
            Box::pin(std::future::ready(Err(Error::new(Errno::EOPNOTSUPP, "grow a toy"))))
        }
    }

    fn now<T>(io: Io<'_, T>) -> Result<T> {
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::pin!(io).as_mut().poll(&mut cx) {
            std::task::Poll::Ready(result) => result,
            std::task::Poll::Pending => panic!("memory never waits"),
        }
    }

    fn read(chain: &Chain, at: u64, len: usize) -> Result<Vec<u8>> {
        let buf = Buf::zeroed(len);
        buf.fill(0xa5);
        now(chain.read(at, buf.clone())).map(|()| buf.to_vec())
    }

    fn base(size: u64, byte: u8) -> Rc<dyn Image> {
        let ram = Ram::new(size);
        now(ram.write(0, Buf::from_bytes(&vec![byte; size as usize]))).unwrap();
        Rc::new(Raw::new(Rc::new(ram)))
    }

    #[test]
    fn a_raw_disk_is_its_storage() {
        let chain = Chain::new(Rc::new(Raw::new(Rc::new(Ram::new(150_000)))));
        let mut check = std::pin::pin!(conformance::check(&chain, 3, 1000));
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(check.as_mut().poll(&mut cx).is_ready());
    }

    #[test]
    fn what_the_top_does_not_say_is_below_and_zero_beyond_its_end() {
        // The base ends within a cluster, at no multiple of anything.
        let top = Rc::new(Toy::new(8192, Rc::new(Ram::new(1 << 20))));
        let chain = Chain::over(top, vec![base(3001, 7)]);
        now(chain.write(1024, Buf::from_bytes(&[9; 512]))).unwrap();
        now(chain.zero(Span::new(2048, 512).unwrap(), Zeroing { unmap: true, fast: false })).unwrap();
        let mut expected = vec![0; 8192];
        expected[..3001].fill(7);
        expected[1024..1536].fill(9);
        expected[2048..2560].fill(0);
        assert!(read(&chain, 0, 8192).unwrap() == expected);
        assert_eq!(read(&chain, 2999, 5).unwrap(), [7, 7, 0, 0, 0]);
        let runs = now(chain.extents(Span::new(0, 8192).unwrap())).unwrap();
        assert_eq!(runs.iter().map(|run| run.len).sum::<u64>(), 8192);
    }

    #[test]
    fn where_the_map_fails_nothing_is_read_or_written() {
        /// Memory that counts what is asked of it.
        struct Counting(Ram, std::cell::Cell<u64>);

        impl Counting {
            fn counted(&self) -> &Ram {
                self.1.set(self.1.get() + 1);
                &self.0
            }
        }

        impl Storage for Counting {
            fn size(&self) -> u64 {
                self.0.size()
            }

            fn limits(&self) -> Limits {
                self.0.limits()
            }

            fn read(&self, at: u64, buf: Buf) -> Io<'_> {
                self.counted().read(at, buf)
            }

            fn write(&self, at: u64, buf: Buf) -> Io<'_> {
                self.counted().write(at, buf)
            }

            fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
                self.counted().zero(span, how)
            }

            fn discard(&self, span: Span) -> Io<'_> {
                self.counted().discard(span)
            }

            fn flush(&self) -> Io<'_> {
                self.counted().flush()
            }

            fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
                self.counted().extents(span)
            }

            fn prefetch(&self, span: Span) -> Io<'_> {
                self.counted().prefetch(span)
            }

            fn grow(&self) -> Io<'_, u64> {
                self.0.grow()
            }

            fn poison(&self) -> Option<Error> {
                self.0.poison()
            }
        }

        let storage = Rc::new(Counting(Ram::new(1 << 20), std::cell::Cell::new(0)));
        let toy = Toy { broken: Some(2), ..Toy::new(8192, storage.clone()) };
        let map = toy.map.clone();
        let chain = Chain::new(Rc::new(toy));
        now(chain.write(0, Buf::from_bytes(&[9; 1024]))).unwrap();
        assert_eq!(storage.1.replace(0), 2);
        assert_eq!(now(chain.write(0, Buf::from_bytes(&[8; 2048]))).unwrap_err().errno(), Errno::EIO);
        assert_eq!(read(&chain, 0, 2048).unwrap_err().errno(), Errno::EIO);
        assert_eq!(storage.1.get(), 0, "no part of them has begun");
        assert_eq!(map.borrow().undone, 2, "and what had its place has it no longer");
        assert_eq!(read(&chain, 0, 1024).unwrap(), [9; 1024]);
    }

    #[test]
    fn an_error_of_any_part_is_the_requests_error() {
        for failing in ["0..512", "512..1024", "1024..1536"] {
            for operation in ["read", "write"] {
                let rule = format!("{operation}:EIO:{failing}").parse().unwrap();
                let pool = block::Pool::new(4096);
                let uring = runtime::Uring::open(runtime::RingFlags::Auto, &pool).unwrap();
                let runtime = runtime::Runtime::new(Box::new(uring), pool);
                let ram = storage::filter::inject(runtime.handle(), Rc::new(Ram::new(1 << 20)), vec![rule]);
                let chain = Chain::over(Rc::new(Toy::new(8192, ram)), vec![base(8192, 7)]);
                let written = now(chain.write(0, Buf::from_bytes(&[9; 1536])));
                if operation == "write" {
                    assert_eq!(written.unwrap_err().errno(), Errno::EIO);
                    // The failed part shows its old bytes, the others may show either.
                    let from = failing.split("..").next().unwrap().parse().unwrap();
                    assert_eq!(read(&chain, from, 512).unwrap(), [7; 512]);
                } else {
                    written.unwrap();
                    assert_eq!(read(&chain, 0, 1536).unwrap_err().errno(), Errno::EIO);
                }
            }
        }
    }
}
