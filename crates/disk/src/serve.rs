//! The life of a request: accepted, done or failed, perhaps tried again or held, and answered once.
//!
//! Here alone answers are sent. A request's answer leaves when the last holder of its claim lets go of it, and each
//! operation that the kernel works on holds the claim: so no answer is early, whatever path led to it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use block::{Errno, Error, Limits, Op, OpKind, Payload, Reply, Request, Result, Span};
use runtime::{Handle, Instant};
use slab::Slab;
use storage::{Io, Storage, Zeroing};

use crate::failures::Failures;
use crate::hold::{Holds, Sign};
use crate::policy::{OnError, Policy, Verdict, judge};
use crate::session::{Asker, GiveUp, Session};
use crate::size::Size;
use crate::stats::Stats;
use crate::waiters::Waiters;

/// How often one held request tries whether the cause is gone.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// How often the ages of requests are looked at.
const WATCH_EVERY: Duration = Duration::from_secs(10);
/// A request that storage has had for longer than this is told of in the log.
const STALLED_AFTER: Duration = Duration::from_secs(30);

/// What a disk is called and how it behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// As the log calls it.
    pub name: String,
    /// Refuse writes.
    pub read_only: bool,
    /// What to do about errors.
    pub policy: Policy,
}

/// A virtual disk; a clone is the same disk.
#[derive(Clone)]
pub struct Disk(Rc<Inner>);

pub(crate) struct Inner {
    pub(crate) handle: Handle,
    storage: Rc<dyn Storage>,
    pub(crate) name: Rc<str>,
    size: Size,
    limits: Limits,
    policy: Cell<Policy>,
    active: RefCell<Slab<Active>>,
    stats: RefCell<Stats>,
    pub(crate) holds: Holds,
    /// How many sessions there have been.
    sessions: Cell<u64>,
    probing: Cell<bool>,
    failures: Rc<Failures>,
    state: Cell<State>,
    /// Who waits for the last active request to end.
    idle: Waiters,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// No request is taken any more.
    Closing,
    /// A driver panicked: its state cannot be trusted, so nothing is done with it any more.
    Fenced,
}

/// A request that was accepted and is not answered.
struct Active {
    kind: OpKind,
    span: Span,
    since: Instant,
    held: bool,
}

/// The claim of one request to its answer, held by its task and by each operation that the kernel does for it.
pub(crate) struct Claim {
    asker: Rc<Asker>,
    key: usize,
    kind: OpKind,
    bytes: u64,
    reply: Cell<Option<Reply>>,
    outcome: RefCell<Option<Outcome>>,
}

/// What a request comes to.
enum Outcome {
    Answer(std::result::Result<Payload, Errno>),
    /// No answer: it is left to whoever serves its guest next.
    Leave,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let disk = &self.asker.disk;
        let outcome = self.outcome.take().unwrap_or_else(|| {
            disk.stats.borrow_mut().lost += 1;
            let (disk, operation) = (&*disk.name, self.kind.name());
            tracing::error!(
                disk,
                operation,
                "a request ended without a result: answered EIO (a bug in tapdisk)"
            );
            Outcome::Answer(Err(Errno::EIO))
        });
        disk.ended(self.key, self.kind, self.bytes, &outcome);
        if let Some(reply) = self.reply.take() {
            match outcome {
                Outcome::Answer(result) => reply.send(result),
                Outcome::Leave => reply.leave(),
            }
        }
        self.asker.ended();
    }
}

/// Fences the disk if its owner is dropped by a panic.
struct Fence(Rc<Inner>);

impl Drop for Fence {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fence();
        }
    }
}

impl Disk {
    /// A disk with the contents of `storage`.
    pub fn new(handle: &Handle, storage: Rc<dyn Storage>, config: Config) -> Disk {
        let mut limits = storage.limits();
        limits.read_only |= config.read_only;
        let inner = Rc::new(Inner {
            handle: handle.clone(),
            size: Size::new(storage.size()),
            limits,
            storage,
            name: config.name.into(),
            policy: Cell::new(config.policy),
            active: RefCell::default(),
            stats: RefCell::default(),
            holds: Holds::default(),
            sessions: Cell::new(0),
            probing: Cell::new(false),
            failures: Rc::default(),
            state: Cell::new(State::Open),
            idle: Waiters::default(),
        });
        Inner::watch(&inner);
        Disk(inner)
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.0.size.get()
    }

    /// Takes in what was added at the end of what is behind it, as by an operator who has made the file larger; gives
    /// the size in bytes. It never shrinks.
    ///
    /// # Errors
    /// If it cannot grow, or has become smaller: then nothing changes.
    pub async fn grow(&self) -> Result<u64> {
        let bytes = self.0.guarded(|storage| storage.grow()).await?;
        self.0.size.grow(bytes);
        Ok(self.size())
    }

    /// Ends when the size changes next, counted from this call.
    pub fn resized(&self) -> impl Future<Output = ()> + 'static {
        self.0.size.changed()
    }

    /// What suits it, what it can do, and whether it refuses writes.
    pub fn limits(&self) -> Limits {
        self.0.limits
    }

    /// As the log calls it.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The thread that it lives on.
    pub fn handle(&self) -> &Handle {
        &self.0.handle
    }

    /// What it has done so far.
    pub fn stats(&self) -> Stats {
        self.0.stats.borrow().clone()
    }

    /// The error that every flush and write fails with, since a sync failed.
    pub fn poison(&self) -> Option<Error> {
        self.0.storage.poison()
    }

    /// Begins a session: one for each that asks, such as a ring or a connection.
    pub fn session(&self) -> Session {
        let number = self.0.sessions.get();
        self.0.sessions.set(number + 1);
        Session::new(self.0.clone(), number)
    }

    /// Takes a request of this session.
    pub(crate) fn take(asker: &Rc<Asker>, request: Request) {
        let inner = &asker.disk;
        let Request { op, reply } = request;
        let (kind, span) = (op.kind(), op.span());
        let claim = Claim::new(asker, kind, span, reply);
        let refusal = match (inner.state.get(), span) {
            (State::Fenced, _) => Some(Errno::EIO),
            (State::Closing, _) => Some(Errno::ESHUTDOWN),
            (State::Open, None) => Some(Errno::EINVAL),
            (State::Open, Some(span)) if !span.is_within(inner.size.get()) => Some(Errno::EINVAL),
            (State::Open, Some(_)) if kind.changes() && inner.limits.read_only => Some(Errno::EPERM),
            (State::Open, Some(_)) => None,
        };
        if let Some(errno) = refusal {
            *claim.outcome.borrow_mut() = Some(Outcome::Answer(Err(errno)));
            return;
        }
        let disk = inner.clone();
        inner.handle.spawn_in(claim.clone(), async move {
            let fence = Fence(disk);
            let outcome = fence.0.serve(&op, &claim).await;
            *claim.outcome.borrow_mut() = Some(outcome);
        });
    }

    /// Ends the disk: takes no request any more, answers what is held with its error, waits for the rest, then
    /// flushes.
    ///
    /// # Errors
    /// That of the flush, also an earlier one's: something that was answered is not durable. EIO where a driver
    /// panicked, now or before: then there is no flush that could be trusted.
    pub async fn close(&self) -> Result<()> {
        let inner = &self.0;
        if inner.state.get() == State::Open {
            inner.state.set(State::Closing);
        }
        self.give_up_held();
        self.idle().await;
        inner.failures.finish(&inner.handle, &inner.name);
        inner.guarded(|storage| storage.flush()).await.map_err(|error| error.during("the last flush"))
    }

    /// Answers what is held with its error, and holds nothing from now on.
    pub fn give_up_held(&self) {
        let inner = &self.0;
        inner.policy.set(Policy { on_error: OnError::Report, on_enospc: None });
        if inner.holds.count() > 0 {
            let (disk, count) = (&*inner.name, inner.holds.count());
            tracing::warn!(
                disk,
                count,
                "held requests are answered with their error, since the disk is closed"
            );
        }
        inner.holds.all(Sign::GiveUp(GiveUp::Tell));
    }

    /// Waits until every request that was taken is answered or left.
    pub async fn idle(&self) {
        self.0.idle.until(|| self.0.active.borrow().is_empty()).await;
    }

    /// Logs counts, held requests and poison.
    pub fn log_state(&self) {
        let inner = &self.0;
        let disk = &*inner.name;
        tracing::info!(disk, "{}", self.stats());
        if let Some(cause) = inner.holds.cause() {
            tracing::info!(disk, held = inner.holds.count(), %cause, "requests are held");
        }
        match self.poison() {
            Some(error) => {
                tracing::info!(disk, %error, "poisoned: flushes and writes fail until it is opened anew")
            }
            None => tracing::info!(disk, "not poisoned: no sync has failed"),
        }
        if inner.state.get() == State::Fenced {
            tracing::info!(disk, "fenced after a panic");
        }
    }
}

impl Claim {
    fn new(asker: &Rc<Asker>, kind: OpKind, span: Option<Span>, reply: Reply) -> Rc<Claim> {
        let disk = &asker.disk;
        let span = span.unwrap_or_else(|| Span::new(0, 0).expect("an empty span"));
        let active = Active { kind, span, since: disk.handle.now(), held: false };
        let key = disk.active.borrow_mut().insert(active);
        let mut stats = disk.stats.borrow_mut();
        stats.accepted += 1;
        stats.in_flight += 1;
        asker.began();
        let (reply, outcome) = (Cell::new(Some(reply)), RefCell::new(None));
        Rc::new(Claim { asker: asker.clone(), key, kind, bytes: span.len(), reply, outcome })
    }
}

impl Inner {
    /// Does nothing with the storage any more: a driver has panicked.
    fn fence(&self) {
        self.state.set(State::Fenced);
        let disk = &*self.name;
        tracing::error!(
            disk,
            "a driver panicked: this disk answers EIO until it is opened anew (a bug in tapdisk)"
        );
        self.holds.all(Sign::GiveUp(GiveUp::Tell));
    }

    fn ended(&self, key: usize, kind: OpKind, bytes: u64, outcome: &Outcome) {
        let mut active = self.active.borrow_mut();
        let gone = active.remove(key);
        let mut stats = self.stats.borrow_mut();
        if gone.held {
            stats.held -= 1
        } else {
            stats.in_flight -= 1
        }
        match outcome {
            Outcome::Answer(result) => {
                stats.answered += 1;
                stats.count(kind, result.is_ok(), bytes);
            }
            Outcome::Leave => stats.left += 1,
        }
        let over = stats.answered + stats.left;
        assert_eq!(stats.accepted, over + stats.in_flight + stats.held, "a request was miscounted");
        assert_eq!(active.len() as u64, stats.in_flight + stats.held, "a request was lost");
        if active.is_empty() {
            self.idle.look();
        }
    }

    /// Has the storage do this, which is no request. Whoever asks is not to fall with a driver that panics: there may be
    /// other disks to look after.
    async fn guarded<'a, T>(&'a self, start: impl FnOnce(&'a dyn Storage) -> Io<'a, T>) -> Result<T> {
        let panicked = || Err(Error::new(Errno::EIO, "a driver panicked"));
        if self.state.get() == State::Fenced {
            return panicked();
        }
        let (mut start, mut io) = (Some(start), None);
        poll_fn(|cx| {
            let poll = AssertUnwindSafe(|| {
                let io = io.get_or_insert_with(|| {
                    let start = start.take().expect("it is started once");
                    start(&*self.storage)
                });
                io.as_mut().poll(cx)
            });
            catch_unwind(poll).unwrap_or_else(|_panic| {
                self.fence();
                Poll::Ready(panicked())
            })
        })
        .await
    }

    /// Does a request until it has succeeded, or its error is to be told, or it is left.
    async fn serve(self: &Rc<Self>, op: &Op, claim: &Rc<Claim>) -> Outcome {
        let mut tries = 0;
        let mut was_held = false;
        loop {
            let error = match self.perform(op).await {
                Ok(payload) => {
                    if was_held {
                        self.space_is_back();
                    }
                    return Outcome::Answer(Ok(payload));
                }
                Err(error) => error,
            };
            tries += 1;
            let age = self.handle.now().since(self.active.borrow()[claim.key].since);
            let given_up = match judge(&error, claim.kind, tries, age, &self.policy.get()) {
                Verdict::Answer => return self.tell(claim, &error),
                Verdict::Retry { after: Duration::ZERO } => {
                    self.handle.yield_now().await;
                    None
                }
                Verdict::Retry { after } => claim.asker.pause(after).await,
                Verdict::Hold => {
                    was_held = true;
                    self.hold(claim, &error).await
                }
            };
            match given_up {
                Some(GiveUp::Leave) => return Outcome::Leave,
                Some(GiveUp::Tell) => return self.tell(claim, &error),
                None => {}
            }
            if self.state.get() == State::Fenced {
                return Outcome::Answer(Err(Errno::EIO));
            }
            self.stats.borrow_mut().retries += 1;
        }
    }

    /// Does a request once. One that must be durable is done and then synced: so a failure to write, which may be
    /// tried again, can be told from a failure to make durable, which may not.
    async fn perform(&self, op: &Op) -> Result<Payload> {
        match op {
            Op::Read { buf, .. } | Op::Write { buf, .. } if buf.is_empty() => return Ok(Payload::None),
            Op::Discard { span, .. }
            | Op::WriteZeroes { span, .. }
            | Op::Status { span }
            | Op::Prefetch { span }
                if span.is_empty() =>
            {
                return Ok(Payload::None);
            }
            Op::Read { at, buf } => self.storage.read(*at, buf.clone()).await?,
            Op::Write { at, buf, .. } => self.storage.write(*at, buf.clone()).await?,
            Op::Flush => self.storage.flush().await?,
            Op::Discard { span, .. } => self.storage.discard(*span).await?,
            Op::WriteZeroes { span, unmap, fast, .. } => {
                self.storage.zero(*span, Zeroing { unmap: *unmap, fast: *fast }).await?;
            }
            Op::Status { span } => return Ok(Payload::Runs(self.storage.extents(*span).await?)),
            Op::Prefetch { span } => self.storage.prefetch(*span).await?,
        }
        if op.fua() {
            self.storage.flush().await.map_err(|error| error.during("make the request durable"))?;
        }
        Ok(Payload::None)
    }

    /// Logs an error that is about to be answered.
    fn tell(&self, claim: &Claim, error: &Error) -> Outcome {
        let span = self.active.borrow()[claim.key].span;
        // That fast zeroing is not to be had is an answer, no failure.
        let asked = claim.kind == OpKind::WriteZeroes && error.errno() == Errno::EOPNOTSUPP;
        if !asked {
            self.failures.log(&self.handle, &self.name, claim.kind, span, error);
        }
        Outcome::Answer(Err(error.errno()))
    }

    /// Keeps a request until it may try again, or is to end.
    async fn hold(self: &Rc<Self>, claim: &Claim, error: &Error) -> Option<GiveUp> {
        if let Some(how) = claim.asker.gives_up() {
            return Some(how);
        }
        if self.holds.count() == 0 && !self.probing.get() {
            let (disk, operation, errno, doing) =
                (&*self.name, claim.kind.name(), error.errno(), error.doing());
            tracing::warn!(disk, operation, %errno, doing, "requests that fail are held until the cause is gone");
        }
        self.mark_held(claim.key, true);
        self.probe();
        let sign = self.holds.wait(claim.asker.number(), error.clone()).await;
        self.mark_held(claim.key, false);
        match sign {
            Sign::GiveUp(how) => Some(how),
            Sign::TryAgain => claim.asker.gives_up(),
        }
    }

    fn mark_held(&self, key: usize, held: bool) {
        let mut stats = self.stats.borrow_mut();
        self.active.borrow_mut()[key].held = held;
        if held {
            (stats.in_flight, stats.held) = (stats.in_flight - 1, stats.held + 1);
        } else {
            (stats.in_flight, stats.held) = (stats.in_flight + 1, stats.held - 1);
        }
    }

    /// Starts the task that lets one held request after the other try, if it is not running.
    fn probe(self: &Rc<Self>) {
        if self.probing.replace(true) {
            return;
        }
        let disk = Rc::downgrade(self);
        let handle = self.handle.clone();
        self.handle.spawn(async move {
            loop {
                handle.sleep(PROBE_EVERY).await;
                let Some(disk) = disk.upgrade() else { return };
                if disk.stats.borrow().held == 0 {
                    disk.probing.set(false);
                    return;
                }
                disk.holds.probe();
            }
        });
    }

    /// A request that was held has succeeded: the others may too.
    fn space_is_back(&self) {
        let count = self.holds.count();
        if count > 0 {
            let disk = &*self.name;
            tracing::info!(disk, count, "a held request succeeded: the others try again");
            self.holds.all(Sign::TryAgain);
        }
    }

    /// Starts the task that tells of requests that storage does not answer.
    fn watch(self: &Rc<Self>) {
        let disk = Rc::downgrade(self);
        let handle = self.handle.clone();
        self.handle.spawn(async move {
            let mut stalled = false;
            loop {
                handle.sleep(WATCH_EVERY).await;
                let Some(disk) = disk.upgrade() else { return };
                stalled = disk.look_for_stalls(stalled);
            }
        });
    }

    fn look_for_stalls(&self, was_stalled: bool) -> bool {
        let now = self.handle.now();
        let active = self.active.borrow();
        let late = || active.iter().filter(|(_, one)| !one.held && now.since(one.since) >= STALLED_AFTER);
        let disk = &*self.name;
        let Some((_, oldest)) = late().min_by_key(|(_, one)| one.since) else {
            if was_stalled {
                tracing::info!(disk, "storage answers again");
            }
            return false;
        };
        if !was_stalled {
            let (count, operation, offset) = (late().count(), oldest.kind.name(), oldest.span.at());
            let seconds = now.since(oldest.since).as_secs();
            tracing::warn!(disk, count, operation, offset, "storage has not answered for {seconds} s");
        }
        true
    }
}
