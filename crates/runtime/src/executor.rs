//! Runs tasks on one thread: what is ready, then what timers wake, what the ring completes and what sources tell.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_task::{Runnable, Task};
use block::{Buf, Errno, Pool, Span};
use slab::Slab;

use crate::clock::{Instant, Sleep, Timers};
use crate::inbox::Inbox;
use crate::ring::{NothingElse, Ring};
use crate::source::{Source, Sources, Watch};
use crate::{Allocate, Completion, Engine, Fd, Idle, Io, Seek, Wait};

/// How many rounds of ready tasks run before the ring gets its turn, so that tasks which wake each other cannot
/// keep completions out.
const ROUNDS_MAX: usize = 32;

/// The executor's owner. Dropping it drops all tasks, then waits until the kernel is done with their I/O.
pub struct Runtime {
    handle: Handle,
}

/// A thread's executor, for everything that runs on it. Cloning it is cheap; it cannot leave the thread.
#[derive(Clone)]
pub struct Handle(Rc<Inner>);

struct Inner {
    ready: Arc<Inbox<Runnable>>,
    tasks: RefCell<Slab<Option<Task<()>>>>,
    timers: Timers,
    timer_ids: Cell<u64>,
    ring: Ring,
    sources: Rc<Sources>,
    /// The time when the ring last had its turn.
    now: Cell<Instant>,
    scope: RefCell<Option<Rc<dyn Any>>>,
    pool: Pool,
    panics: Cell<u64>,
}

impl Runtime {
    /// An executor whose I/O `engine` does, with memory from `pool`.
    pub fn new(engine: Box<dyn Engine>, pool: Pool) -> Runtime {
        let unpark = engine.unpark();
        let ring = Ring::new(engine);
        let inner = Inner {
            ready: Arc::new(Inbox::new(move || unpark())),
            tasks: RefCell::default(),
            timers: Timers::default(),
            timer_ids: Cell::new(0),
            now: Cell::new(ring.now()),
            ring,
            sources: Rc::default(),
            scope: RefCell::default(),
            pool,
            panics: Cell::new(0),
        };
        Runtime { handle: Handle(Rc::new(inner)) }
    }

    /// What tasks use.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Runs everything on this thread until `future` is done.
    pub fn block_on<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let inner = &self.handle.0;
        let result: Rc<RefCell<Option<T>>> = Rc::default();
        let slot = result.clone();
        self.handle.spawn(async move {
            let value = future.await;
            *slot.borrow_mut() = Some(value);
        });
        let mut batch = VecDeque::new();
        loop {
            inner.run_ready(&mut batch);
            if let Some(value) = result.borrow_mut().take() {
                return value;
            }
            assert!(Rc::strong_count(&result) > 1, "the future given to block_on panicked");
            inner.sources.settle();
            let busy = inner.sources.look() || !inner.ready.is_empty();
            let wait = if busy { Wait::No } else { Wait::Until(inner.timers.next()) };
            inner.ring.turn(wait, &**inner);
            inner.now.set(inner.ring.now());
            inner.timers.fire(inner.now.get());
        }
    }
}

impl Inner {
    fn run_ready(&self, batch: &mut VecDeque<Runnable>) {
        for _ in 0..ROUNDS_MAX {
            self.ready.take_all(batch);
            if batch.is_empty() {
                return;
            }
            while let Some(runnable) = batch.pop_front() {
                // A panicking task is dropped, with its answers; the others go on.
                if std::panic::catch_unwind(AssertUnwindSafe(|| runnable.run())).is_err() {
                    self.panics.set(self.panics.get() + 1);
                }
            }
        }
    }
}

impl Idle for Inner {
    fn has_news(&self) -> bool {
        self.sources.look()
    }

    fn may_sleep(&self) -> bool {
        // Tasks last: news that arming has found has made one ready.
        !self.sources.arm() && self.ready.may_sleep()
    }

    fn woken(&self) {
        // Else each task that a completion makes ready would ring for a thread that is awake.
        self.ready.wake_up();
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let inner = &self.handle.0;
        let mut batch = VecDeque::new();
        // Dropping a task makes it ready once more, to be dropped on this thread; its end may start others.
        loop {
            let tasks: Vec<_> = inner.tasks.borrow_mut().drain().collect();
            if tasks.is_empty() {
                break;
            }
            drop(tasks);
            inner.run_ready(&mut batch);
        }
        inner.ring.drain();
        // Lets go of the files too: the kernel takes its time to end a ring, and a lock would last as long.
        inner.ring.turn(Wait::No, &NothingElse);
    }
}

impl Handle {
    /// Starts a task.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let id = self.0.tasks.borrow_mut().insert(None);
        let inner = Rc::downgrade(&self.0);
        let ready = self.0.ready.clone();
        let task = async move {
            // Forgets the task when it ends, however it ends.
            let _guard = Defer(move || {
                let task =
                    inner.upgrade().and_then(|inner| inner.tasks.borrow_mut().try_remove(id).flatten());
                if let Some(task) = task {
                    task.detach();
                }
            });
            future.await;
        };
        let (runnable, task) = async_task::spawn_local(task, move |runnable| ready.put(runnable));
        self.0.tasks.borrow_mut()[id] = Some(task);
        runnable.schedule();
    }

    /// Starts a task with something that stays until the last I/O started by it is done: also if the task is
    /// dropped before, or panics.
    pub fn spawn_in(&self, scope: Rc<dyn Any>, future: impl Future<Output = ()> + 'static) {
        self.spawn(Scoped { handle: self.clone(), scope: Some(scope), future: Box::pin(future) });
    }

    /// When the ring last had its turn: good enough for ages and time-outs, and free.
    pub fn now(&self) -> Instant {
        self.0.now.get()
    }

    /// Waits.
    pub fn sleep(&self, delay: Duration) -> Sleep {
        let id = self.0.timer_ids.get();
        self.0.timer_ids.set(id + 1);
        Sleep::new(self.clone(), self.0.ring.now().after(delay), id)
    }

    /// Lets the other ready tasks run first.
    pub async fn yield_now(&self) {
        let mut yielded = false;
        std::future::poll_fn(|cx| {
            if std::mem::replace(&mut yielded, true) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    /// Memory for requests.
    pub fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// How many tasks have panicked.
    pub fn panics(&self) -> u64 {
        self.0.panics.get()
    }

    /// Operations that the kernel has not completed.
    pub fn in_flight(&self) -> usize {
        self.0.ring.in_flight()
    }

    /// Takes an open file in.
    pub fn register(&self, fd: OwnedFd) -> Rc<Fd> {
        self.0.ring.register(fd)
    }

    /// Starts an operation; `keep` stays until the kernel is done with it.
    pub fn start(&self, io: Io, keep: Option<Rc<dyn Any>>) -> Completion {
        let scope = self.0.scope.borrow().clone();
        Completion::start(self.clone(), io, scope, keep)
    }

    /// pread(2) at byte `at`; may be short.
    pub fn read(&self, fd: &Rc<Fd>, at: u64, buf: &Buf) -> Completion {
        self.start(Io::Read { fd: fd.clone(), at, buf: buf.clone() }, None)
    }

    /// fdatasync(2).
    pub fn sync(&self, fd: &Rc<Fd>) -> Completion {
        self.start(Io::Sync { fd: fd.clone() }, None)
    }

    /// fallocate(2) without a change of size.
    pub fn allocate(&self, fd: &Rc<Fd>, mode: Allocate, span: Span) -> Completion {
        self.start(Io::Allocate { fd: fd.clone(), mode, span }, None)
    }

    /// lseek(2) for the next data or hole from byte `at` on.
    pub fn seek(&self, fd: &Rc<Fd>, at: u64, what: Seek) -> Completion {
        self.start(Io::Seek { fd: fd.clone(), at, what }, None)
    }

    /// posix_fadvise(2): these bytes will be read soon.
    pub fn will_need(&self, fd: &Rc<Fd>, span: Span) -> Completion {
        self.start(Io::WillNeed { fd: fd.clone(), span }, None)
    }

    /// Receives the first bytes that arrive at a socket; 0 is the end of the stream.
    pub fn receive(&self, fd: &Rc<Fd>, buf: &Buf) -> Completion {
        self.start(Io::Receive { fd: fd.clone(), buf: buf.clone() }, None)
    }

    /// Sends all bytes through a socket, unless an error cuts that short.
    pub fn send(&self, fd: &Rc<Fd>, buf: &Buf) -> Completion {
        self.start(Io::Send { fd: fd.clone(), buf: buf.clone() }, None)
    }

    /// Waits until there is something to read.
    pub fn readable(&self, fd: &Rc<Fd>) -> Completion {
        self.start(Io::Poll { fd: fd.clone() }, None)
    }

    /// Signals an eventfd: adds 1, or less often than it is called while a signal is under way, for one tells of all
    /// that came before it. Nobody hears how that went; it never holds up the thread, whatever the descriptor is.
    pub fn signal(&self, fd: &Rc<Fd>) {
        self.0.ring.signal(fd);
    }

    /// Gives up a signal that is still under way: the eventfd is full, and its owner wants to be rid of it.
    pub fn end_signal(&self, fd: &Fd) {
        self.0.ring.end_signal(fd);
    }

    /// Lets the ring take a turn: what was started before is under way then.
    pub async fn turn(&self) {
        self.sleep(Duration::ZERO).await;
    }

    /// Looks after a source until the result is dropped.
    pub fn watch(&self, source: Rc<dyn Source>) -> Watch {
        self.0.sources.watch(source)
    }

    /// Accepts a connection on a listening socket.
    pub async fn accept(&self, fd: &Rc<Fd>) -> Result<OwnedFd, Errno> {
        let raw = self.start(Io::Accept { fd: fd.clone() }, None).await?;
        Ok(crate::ring::uring::adopt(raw as i32))
    }

    pub(crate) fn ring(&self) -> &Ring {
        &self.0.ring
    }

    pub(crate) fn timers(&self) -> &Timers {
        &self.0.timers
    }
}

/// A future that runs with a scope; see [`Handle::spawn_in`].
struct Scoped<F> {
    handle: Handle,
    scope: Option<Rc<dyn Any>>,
    future: Pin<Box<F>>,
}

impl<F: Future<Output = ()>> Future for Scoped<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let outer = this.handle.0.scope.replace(this.scope.clone());
        let restore = Defer(|| drop(this.handle.0.scope.replace(outer.clone())));
        let result = this.future.as_mut().poll(cx);
        drop(restore);
        if result.is_ready() {
            this.scope = None;
        }
        result
    }
}

/// Runs a function when dropped, also by a panic.
struct Defer<F: FnMut()>(F);

impl<F: FnMut()> Drop for Defer<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
