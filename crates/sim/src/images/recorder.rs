//! A file of the world's as a storage, a ledger of the world's, and what runs on both.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use block::{Buf, Errno, Error, Limits, Pool, Result, Run, Segment, Span};
use image::metadata::{Change, Ledger};
use runtime::{Engine, Idle, Instant, Runtime, Wait};
use storage::{Io, Storage, Zeroing};

use super::bytes::Bytes;
use super::world::{Act, World};

/// Bytes of memory that a runtime takes at first.
const ARENA: usize = 4096;

/// One of the files, with the promises of `storage::File`.
pub(crate) struct Recorder {
    world: Rc<World>,
    file: usize,
    /// Bytes, of which more are told when the growth has been answered, so that a sync that begins then covers it.
    size: Cell<u64>,
}

impl Recorder {
    pub(crate) fn new(world: &Rc<World>, file: usize) -> Recorder {
        Recorder { world: world.clone(), file, size: Cell::new(world.size(file)) }
    }

    /// It begins when it is first looked after, as with a ring; whoever then drops it does not end it.
    async fn act(&self, act: Act, span: Span, buf: Option<Buf>) -> Result<()> {
        let class = act.class();
        let number = self.world.begin(self.file, act, span, buf);
        let result = poll_fn(|cx| match self.world.poll(number, cx.waker()) {
            Some(result) => Poll::Ready(result),
            None => Poll::Pending,
        });
        result.await.map_err(|errno| {
            let error = Error::new(errno, format!("{class:?} {span:?} of file {}", self.file));
            if self.world.poison(self.file).is_some() { error.lasting() } else { error }
        })
    }

    fn whole(&self) -> Span {
        Span::new(0, 0).expect("nothing is within any file")
    }
}

impl Storage for Recorder {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn limits(&self) -> Limits {
        Limits { align: 1, preferred: 4096, read_only: false, fast_zero: true }
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        buf.fill(0xa5);
        Box::pin(self.act(Act::Read, Span::of(at, &buf), Some(buf)))
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move { self.act(Act::Write(buf.to_vec().into()), Span::of(at, &buf), None).await })
    }

    fn zero(&self, span: Span, _how: Zeroing) -> Io<'_> {
        Box::pin(self.act(Act::Zero, span, None))
    }

    fn discard(&self, span: Span) -> Io<'_> {
        Box::pin(self.act(Act::Discard, span, None))
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(self.act(Act::Sync, self.whole(), None))
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        let mut at = span.at();
        while at < span.end() {
            let allocated = self.world.is_there(self.file, at);
            let end = Bytes::page_end(at).min(span.end());
            match runs.last_mut() {
                Some(run) if run.allocated == allocated => run.len += end - at,
                Some(_) | None => runs.push(Run { len: end - at, allocated, zero: !allocated }),
            }
            at = end;
        }
        Box::pin(std::future::ready(Ok(runs)))
    }

    fn prefetch(&self, _span: Span) -> Io<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn grow(&self) -> Io<'_, u64> {
        Box::pin(std::future::ready(Ok(self.size())))
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        Box::pin(async move {
            let size = self.size.get();
            self.size.set(size.min(bytes));
            let result = self.act(Act::Resize(bytes), self.whole(), None).await;
            self.size.set(if result.is_ok() { bytes } else { size });
            result
        })
    }

    fn poison(&self) -> Option<Error> {
        let errno = self.world.poison(self.file)?;
        Some(Error::new(errno, format!("sync file {}", self.file)).lasting())
    }
}

/// The world's ledger.
pub(crate) struct Book(pub(crate) Rc<World>);

impl Ledger for Book {
    fn changes(&self) -> io::Result<Vec<Change>> {
        Ok(self.0.notes().changes())
    }

    fn is_whole(&self) -> io::Result<bool> {
        Ok(self.0.notes().is_whole())
    }

    fn note(&self, group: &[Change]) -> io::Result<()> {
        self.0.note(group).map_err(|errno| io::Error::from_raw_os_error(errno.code()))
    }

    fn begin(&self) {
        self.0.begin_round();
    }

    fn end(&self) -> bool {
        self.0.end_round()
    }
}

/// What lets time pass: the operations of a world go on when all tasks wait.
struct Mover(Rc<World>);

/// An executor in this world.
pub(crate) fn runtime(world: &Rc<World>) -> Runtime {
    Runtime::new(Box::new(Mover(world.clone())), Pool::new(ARENA))
}

impl Engine for Mover {
    fn register_file(&mut self, _fd: BorrowedFd<'_>) -> Option<u32> {
        None
    }

    fn forget_file(&mut self, _index: u32) {}

    #[allow(unsafe_code)] // nothing is registered
    unsafe fn register_memory(&mut self, _memory: Segment) -> std::result::Result<u16, Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    fn forget_memory(&mut self, _index: u16) {}

    #[allow(unsafe_code)] // the promise is not needed
    unsafe fn submit(&mut self, io: &runtime::Io, _token: usize) {
        panic!("there are no files of the kernel here: {io:?}");
    }

    fn cancel(&mut self, _token: usize) {}

    fn turn(&mut self, wait: Wait, _idle: &dyn Idle, _done: &mut Vec<(usize, i64)>) {
        match wait {
            Wait::No => self.0.turn(true, None),
            Wait::Until(until) => self.0.turn(false, until.map(|instant| instant.0)),
        }
    }

    fn now(&self) -> Instant {
        Instant(self.0.clock.get())
    }

    fn unpark(&self) -> Arc<dyn Fn() + Send + Sync> {
        Arc::new(|| {}) // one thread: nobody is asleep while anybody unparks
    }
}
