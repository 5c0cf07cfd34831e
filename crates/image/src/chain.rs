//! The images of a disk, one on another: the only mover of data between requests and storages.

use std::any::Any;
use std::rc::Rc;

use block::{Buf, Errno, Error, Limits, Result, Run, Span};
use runtime::{BoxFuture, Handle, join_all};
use storage::{Io, Permits, Storage, Zeroing};

use crate::{Extent, Image, Placement, Zeroed, worst};

/// Runs told at a time; the caller asks again for the rest.
const RUNS_MAX: usize = 256;
/// Parts of one request that are under way at a time.
const PARTS_MAX: usize = 64;
/// Places that are filled up around what is written, at a time. Taken last and held over I/O alone; with the formats'
/// largest unit, 2 MiB, this bounds the memory for it.
const COPIES_MAX: usize = 32;
/// With no more bytes than this between them, the bytes around go out with those that are written, in one piece.
const TOGETHER_MAX: u64 = 256 << 10;

/// A disk: an image that is written, over others that are only read.
pub struct Chain {
    handle: Handle,
    top: Rc<dyn Image>,
    /// From the next one down.
    below: Vec<Rc<dyn Image>>,
    copies: Permits,
}

impl Chain {
    /// A disk of one image.
    pub fn new(handle: &Handle, top: Rc<dyn Image>) -> Chain {
        Chain::over(handle, top, Vec::new())
    }

    /// A disk of an image over others, from the next one down. Where one below ends before the top does, zeroes
    /// follow.
    pub fn over(handle: &Handle, top: Rc<dyn Image>, below: Vec<Rc<dyn Image>>) -> Chain {
        Chain { handle: handle.clone(), top, below, copies: Permits::new(COPIES_MAX) }
    }

    /// The image that is written.
    pub fn top(&self) -> &Rc<dyn Image> {
        &self.top
    }

    /// Those below, from the next one down.
    pub fn below(&self) -> &[Rc<dyn Image>] {
        &self.below
    }

    /// Bytes of memory that the metadata of all of them takes now.
    pub fn memory(&self) -> usize {
        self.top.memory() + self.below.iter().map(|image| image.memory()).sum::<usize>()
    }

    /// See [`Image::close`].
    ///
    /// # Errors
    /// What was answered may not be durable, or the image is left as after a crash: whole, but marked as in use.
    pub async fn close(&self) -> Result<()> {
        self.top.close().await
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
            let extent = match image.mapped(within) {
                Some(extent) => extent,
                None => image.map(within).await?,
            };
            match extent {
                Extent::Data { at, len, pin } => return Ok(Found::Data { image, at, len, pin }),
                Extent::Packed { len, pin } => return Ok(Found::Packed { image, len, pin }),
                Extent::Zero { len } => return Ok(Found::Zero { len }),
                Extent::Below { len } => span = within.split_at(within.at() + len).0,
            }
            depth += 1;
        }
        Ok(Found::Zero { len: span.len() })
    }

    async fn read_bytes(&self, span: Span, buf: &Buf) -> Result<()> {
        // Most requests are one run whose place is at hand: they do not pay for what the others need.
        if !span.is_empty()
            && let Some(Extent::Data { at, len, pin: _pin }) = self.top.mapped(span)
            && len == span.len()
        {
            return self.top.storage().read(at, buf.clone()).await;
        }
        let mut rest = span;
        while !rest.is_empty() {
            rest = self.read_parts(span, rest, buf).await?;
        }
        Ok(())
    }

    /// Reads the first bytes of `rest`, as many as are worth doing side by side; gives what is left.
    async fn read_parts(&self, span: Span, mut rest: Span, buf: &Buf) -> Result<Span> {
        let mut parts: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        while !rest.is_empty() && parts.len() < PARTS_MAX {
            // Where this fails no part has begun yet, and none will.
            let found = self.find(rest).await?;
            let (run, others) = rest.split_at(rest.at() + found.len());
            let into = buf.part(span.at(), run);
            rest = others;
            let (is_alone, at) = (rest.is_empty() && parts.is_empty(), run.at());
            match found {
                Found::Zero { .. } => into.fill(0),
                found @ (Found::Data { .. } | Found::Packed { .. }) if is_alone => {
                    found.fetch(at, into).await?
                }
                found @ (Found::Data { .. } | Found::Packed { .. }) => {
                    parts.push(Box::pin(found.fetch(at, into)))
                }
            }
        }
        worst(join_all(parts).await)?;
        Ok(rest)
    }

    async fn write_bytes(&self, span: Span, buf: &Buf) -> Result<()> {
        // As for reads.
        if !span.is_empty()
            && let Some(placement) = self.top.placed(span)
            && placement.len == span.len()
        {
            return self.fill(span, placement, buf.clone()).await;
        }
        let mut rest = span;
        while !rest.is_empty() {
            rest = self.write_parts(span, rest, buf).await?;
        }
        Ok(())
    }

    async fn place(&self, span: Span) -> Result<Placement> {
        match self.top.placed(span) {
            Some(placement) => Ok(placement),
            None => self.top.place(span).await,
        }
    }

    async fn write_parts(&self, span: Span, mut rest: Span, buf: &Buf) -> Result<Span> {
        let mut placed: Vec<(Span, Placement)> = Vec::new();
        while !rest.is_empty() && placed.len() < PARTS_MAX {
            match self.place(rest).await {
                Ok(placement) => {
                    let (run, others) = rest.split_at(rest.at() + placement.len);
                    placed.push((run, placement));
                    rest = others;
                }
                // No part has begun yet, and none will.
                Err(error) => {
                    placed.into_iter().for_each(|(_, placement)| self.top.give_up(placement));
                    return Err(error);
                }
            }
        }
        if placed.len() == 1 {
            for (run, placement) in placed {
                self.fill(run, placement, buf.part(span.at(), run)).await?;
            }
            return Ok(rest);
        }
        let parts = placed.into_iter().map(|(run, placement)| -> BoxFuture<'_, Result<()>> {
            Box::pin(self.fill(run, placement, buf.part(span.at(), run)))
        });
        worst(join_all(parts.collect()).await)?;
        Ok(rest)
    }

    /// Data first, then what shows it.
    async fn fill(&self, run: Span, placement: Placement, from: Buf) -> Result<()> {
        match self.bring(run, &placement, from).await {
            Ok(()) if self.top.committed(&placement) => Ok(()),
            Ok(()) => self.top.commit(placement).await,
            Err(error) => {
                self.top.give_up(placement);
                Err(error)
            }
        }
    }

    /// Writes the bytes of `run` to their place, and those around them.
    async fn bring(&self, run: Span, placement: &Placement, from: Buf) -> Result<()> {
        let &Placement { at, before, after, blank, .. } = placement;
        let storage = self.top.storage();
        if before == 0 && after == 0 {
            return storage.write(at, from).await;
        }
        let span_of = |at, len| Span::new(at, len).expect("a place is within its image");
        let head = span_of(run.at() - before, before);
        let tail = span_of(run.end(), after);
        if blank && self.is_zero(head).await? && self.is_zero(tail).await? {
            return storage.write(at, from).await;
        }
        let _permit = self.copies.take().await;
        let take = |len: u64| self.handle.pool().take(len as usize);
        if before + run.len() + after <= TOGETHER_MAX {
            let whole = take(before + run.len() + after);
            let base = head.at();
            self.copy(head, &whole.part(base, head)).await?;
            self.copy(tail, &whole.part(base, tail)).await?;
            whole.part(base, run).copy_from(0, &from);
            return storage.write(at - before, whole).await;
        }
        let mut parts: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        for (around, at) in [(head, at - before), (tail, at + run.len())] {
            if !around.is_empty() {
                let bytes = take(around.len());
                self.copy(around, &bytes).await?;
                parts.push(storage.write(at, bytes));
            }
        }
        parts.push(storage.write(at, from));
        worst(join_all(parts).await)
    }

    /// Whether these bytes, some of which may lie beyond the disk's end, are known to be zero.
    async fn is_zero(&self, span: Span) -> Result<bool> {
        let mut rest = span.split_at(self.top.size()).0;
        while !rest.is_empty() {
            match self.find(rest).await? {
                Found::Zero { len } => rest = rest.split_at(rest.at() + len).1,
                Found::Data { .. } | Found::Packed { .. } => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Fills a buffer with what the disk shows; zeroes beyond its end.
    async fn copy(&self, span: Span, into: &Buf) -> Result<()> {
        let (within, beyond) = span.split_at(self.top.size());
        into.part(span.at(), beyond).fill(0);
        self.read_bytes(within, &into.part(span.at(), within))
            .await
            .map_err(|error| error.during("copy what is around a first write"))
    }

    async fn zero_bytes(&self, span: Span, how: Zeroing) -> Result<()> {
        let mut rest = span;
        while !rest.is_empty() {
            let done = match self.top.zero(rest, how).await? {
                Zeroed::Done { len } => len,
                Zeroed::Write { len } => self.write_zeroes(rest.split_at(rest.at() + len).0, how).await?,
            };
            rest = rest.split_at(rest.at() + done).1;
        }
        Ok(())
    }

    /// Zeroes the first of these bytes where they are, or in a new place; how many.
    async fn write_zeroes(&self, span: Span, how: Zeroing) -> Result<u64> {
        let placement = self.place(span).await?;
        let run = span.split_at(span.at() + placement.len).0;
        let result = if placement.before > 0 || placement.after > 0 {
            if how.fast {
                Err(Error::new(Errno::EOPNOTSUPP, "zero a part of what is stored as one, fast"))
            } else {
                self.bring(run, &placement, Buf::zeroed(run.len() as usize)).await
            }
        } else {
            let place = Span::new(placement.at, run.len()).expect("a place is within its image");
            self.top.storage().zero(place, how).await
        };
        match result {
            Ok(()) => self.top.commit(placement).await.map(|()| run.len()),
            Err(error) => {
                self.top.give_up(placement);
                Err(error)
            }
        }
    }

    /// What a map alone can do, or a file beside the one that is poisoned, is not to succeed either.
    fn check_poison(&self) -> Result<()> {
        self.top.poison().map_or(Ok(()), Err)
    }

    async fn find_runs(&self, span: Span) -> Result<Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        let mut rest = span;
        while !rest.is_empty() && runs.len() < RUNS_MAX {
            let found = self.find(rest).await?;
            let more = match found {
                Found::Zero { len } => vec![Run { len, allocated: false, zero: true }],
                Found::Packed { len, .. } => vec![Run { len, allocated: true, zero: false }],
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
    Data { image: &'a Rc<dyn Image>, at: u64, len: u64, pin: Option<Rc<dyn Any>> },
    Packed { image: &'a Rc<dyn Image>, len: u64, pin: Option<Rc<dyn Any>> },
    Zero { len: u64 },
}

impl Found<'_> {
    fn len(&self) -> u64 {
        match self {
            Found::Data { len, .. } | Found::Packed { len, .. } | Found::Zero { len } => *len,
        }
    }

    /// Fills `into` with these bytes, of which the first is the disk's byte `at`.
    async fn fetch(self, disk_at: u64, into: Buf) -> Result<()> {
        match self {
            Found::Zero { .. } => {
                into.fill(0);
                Ok(())
            }
            Found::Data { image, at, pin: _pin, .. } => image.storage().read(at, into).await,
            Found::Packed { image, pin: _pin, .. } => image.unpack(disk_at, into).await,
        }
    }
}

impl Storage for Chain {
    fn size(&self) -> u64 {
        self.top.size()
    }

    fn limits(&self) -> Limits {
        self.top.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move { self.read_bytes(Span::of(at, &buf), &buf).await })
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move {
            self.check_poison()?;
            self.write_bytes(Span::of(at, &buf), &buf).await
        })
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        Box::pin(async move {
            self.check_poison()?;
            self.zero_bytes(span, how).await
        })
    }

    fn discard(&self, span: Span) -> Io<'_> {
        Box::pin(async move {
            self.check_poison()?;
            self.top.discard(span).await
        })
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
                Found::Data { image, at, len, pin: _pin } => {
                    let stored = Span::new(at, len).expect("an image maps to places that its storage has");
                    image.storage().prefetch(stored).await
                }
                Found::Zero { .. } | Found::Packed { .. } => Ok(()),
            }
        })
    }

    fn grow(&self) -> Io<'_, u64> {
        self.top.grow()
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        let (old, below) = (self.top.size(), self.below.first().map_or(0, |image| image.size()));
        // What was added would be what that one has, until zeroes were written over it one by one.
        if bytes > old && below > old {
            let doing = format!(
                "make a disk of {old} bytes larger over an image of {below}, which would show there: convert it to an image of \
                 its own, and resize that"
            );
            return Box::pin(std::future::ready(Err(Error::new(Errno::EOPNOTSUPP, doing))));
        }
        self.top.resize(bytes)
    }

    fn poison(&self) -> Option<Error> {
        self.top.poison()
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
        /// Whether its new places are blank.
        blank: bool,
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
            Toy { size, storage, map: Rc::default(), broken: None, blank: true }
        }
    }

    struct Pending {
        cluster: u64,
        place: u64,
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
            if self.broken == Some(cluster) {
                return Box::pin(std::future::ready(Err(Error::new(Errno::EIO, "read the map"))));
            }
            let mut map = self.map.borrow_mut();
            let place = map.next;
            map.next += CLUSTER;
            let keep = Some(Box::new(Pending { cluster, place }) as Box<dyn std::any::Any>);
            let len = span.len().min(CLUSTER - skip);
            let after = CLUSTER - skip - len;
            let (at, blank) = (place + skip, self.blank);
            let placement = Placement { at, len, before: skip, after, blank, pin: None, keep };
            Box::pin(std::future::ready(Ok(placement)))
        }

        fn commit(&self, placement: Placement) -> Io<'_> {
            let pending = placement.keep.unwrap().downcast::<Pending>().unwrap();
            self.map.borrow_mut().placed.insert(pending.cluster, Some(pending.place));
            Box::pin(std::future::ready(Ok(())))
        }

        fn give_up(&self, _placement: Placement) {
            self.map.borrow_mut().undone += 1;
        }

        fn zero(&self, span: Span, _how: Zeroing) -> Io<'_, Zeroed> {
            let (cluster, skip) = (span.at() / CLUSTER, span.at() % CLUSTER);
            let len = span.len().min(CLUSTER - skip);
            if len < CLUSTER {
                return Box::pin(std::future::ready(Ok(Zeroed::Write { len })));
            }
            self.map.borrow_mut().placed.insert(cluster, None);
            Box::pin(std::future::ready(Ok(Zeroed::Done { len })))
        }

        fn discard(&self, _span: Span) -> Io<'_> {
            Box::pin(std::future::ready(Ok(())))
        }

        fn resize(&self, _bytes: u64) -> Io<'_> {
            Box::pin(std::future::ready(Err(Error::new(Errno::EOPNOTSUPP, "resize a toy"))))
        }

        fn close(&self) -> Io<'_> {
            self.flush()
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

    fn runtime() -> runtime::Runtime {
        let pool = block::Pool::new(4096);
        let uring = runtime::Uring::open(runtime::RingFlags::Auto, &pool).unwrap();
        runtime::Runtime::new(Box::new(uring), pool)
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
        let chain = Chain::new(runtime().handle(), Rc::new(Raw::new(Rc::new(Ram::new(150_000)))));
        let mut check = std::pin::pin!(conformance::check(&chain, 3, 1000));
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(check.as_mut().poll(&mut cx).is_ready());
    }

    #[test]
    fn what_the_top_does_not_say_is_below_and_zero_beyond_its_end() {
        // The base ends within a cluster, at no multiple of anything.
        let top = Rc::new(Toy::new(8192, Rc::new(Ram::new(1 << 20))));
        let chain = Chain::over(runtime().handle(), top, vec![base(3001, 7)]);
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

    /// What a chain of a toy over a raw image shows after random operations, against plain bytes.
    #[test]
    fn a_first_write_brings_what_is_around_it() {
        for (blank, base_size) in [(true, 3001), (true, 0), (false, 3001), (false, 8000)] {
            let ram: Rc<dyn Storage> = Rc::new(Ram::new(1 << 20));
            // Where places are not blank, old bytes are there.
            let dirt = if blank { 0 } else { 0xdd };
            now(ram.write(0, Buf::from_bytes(&vec![dirt; 1 << 20]))).unwrap();
            // Its end is within a cluster.
            let top = Rc::new(Toy { blank, ..Toy::new(7900, ram.clone()) });
            let map = top.map.clone();
            let runtime = runtime();
            let chain = Chain::over(runtime.handle(), top, vec![base(base_size, 7)]);
            let mut model = vec![0; 7900];
            model[..(base_size as usize).min(7900)].fill(7);
            let mut random = conformance::Random(9);
            for step in 0..200_u64 {
                let span = random.span(7900, 1500);
                let range = span.at() as usize..span.end() as usize;
                if step % 3 == 0 {
                    let how = Zeroing { unmap: true, fast: false };
                    now(chain.zero(span, how)).unwrap();
                    model[range].fill(0);
                } else {
                    now(chain.write(span.at(), Buf::from_bytes(&vec![step as u8; range.len()]))).unwrap();
                    model[range].fill(step as u8);
                }
                assert!(read(&chain, 0, 7900).unwrap() == model, "after step {step}: {span:?}");
            }
            // What lies beyond the disk's end within its last cluster is zero for whoever makes the disk larger.
            let place = map.borrow().placed[&(7900 / CLUSTER)].unwrap();
            let rest = Buf::zeroed((CLUSTER - 7900 % CLUSTER) as usize);
            now(ram.read(place + 7900 % CLUSTER, rest.clone())).unwrap();
            assert!(rest.to_vec().iter().all(|byte| *byte == 0));
        }
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

            fn resize(&self, bytes: u64) -> Io<'_> {
                self.0.resize(bytes)
            }

            fn poison(&self) -> Option<Error> {
                self.0.poison()
            }
        }

        let storage = Rc::new(Counting(Ram::new(1 << 20), std::cell::Cell::new(0)));
        let toy = Toy { broken: Some(2), ..Toy::new(8192, storage.clone()) };
        let map = toy.map.clone();
        let chain = Chain::new(runtime().handle(), Rc::new(toy));
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
                let runtime = runtime();
                let ram = storage::filter::inject(runtime.handle(), Rc::new(Ram::new(1 << 20)), vec![rule]);
                let chain = Chain::over(runtime.handle(), Rc::new(Toy::new(8192, ram)), vec![base(8192, 7)]);
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
