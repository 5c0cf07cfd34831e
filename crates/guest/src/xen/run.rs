//! A ring from when its front end is connected until it is disconnected: its tasks, and how answers get to the guest.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use ::xen::events::Channel;
use ::xen::grants::{Direction, Piece};
use block::{Answer, Errno, Op, OpKind, Payload, Reply, Request, Ticket};
use runtime::{Completion, Fd, Handle, Instant, Source, Watch};

use super::data::{Copies, Data, Place};
use super::device::{Common, Parting};
use super::queue::Queue;
use super::request;
use super::ring::RingError;
use super::stats::Asked;
use super::status::{Status, status};
use super::turn::{Job, Steps, Turn};
use crate::budget::{Account, Taken};
use crate::signal::Signal;
use crate::{GiveUp, Session};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Requests are taken.
    Running,
    /// What the front end put into the ring has no meaning: nothing more is taken from it.
    Failed,
    /// It is being left: nothing more is taken.
    Ending(GiveUp),
    /// The guest has forgotten its requests: nothing more is taken, and no answer is given.
    Muted,
}

/// Why a ring takes no more requests.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("its event channel cannot be listened to: {0}")]
    Listen(Errno),
    #[error("its front end cannot be rung for: {0}")]
    Notify(Errno),
    #[error("the file behind the record of its requests was cut short")]
    Record,
    #[error("serving it panicked (a bug in tapdisk)")]
    Panicked,
}

pub(crate) struct Run {
    pub(super) index: usize,
    pub(super) handle: Handle,
    pub(super) common: Rc<Common>,
    pub(super) session: Box<dyn Session>,
    pub(super) queue: RefCell<Queue>,
    pub(super) data: Data,
    channel: Box<dyn Channel>,
    /// Readable when the front end has rung.
    bell: Rc<Fd>,
    /// Memory for its requests' bytes.
    pub(super) account: Rc<Account>,
    state: Cell<State>,
    /// The task waits for something other than news.
    is_waiting: Cell<bool>,
    /// What a predecessor has taken is not all with the disk again: a barrier on another ring was taken later.
    pub(super) is_behind: Cell<bool>,
    /// Somebody has news for the task.
    woken: Cell<bool>,
    /// The task has seen a barrier and looks once that is down.
    was_kept_out: Cell<bool>,
    task: RefCell<Option<Waker>>,
    /// Waits until the front end rings.
    rung: RefCell<Option<Completion>>,
    watch: RefCell<Option<Watch>>,
    /// What is with the disk, for each slot of the queue.
    pub(super) flights: RefCell<Vec<Flight>>,
    /// What has come back from there.
    back: RefCell<Vec<(u16, End)>>,
    /// Room for a turn's requests, for copies that are done in one go, and for a table of segments.
    pub(super) jobs: RefCell<Vec<Job>>,
    pub(super) copies: RefCell<Copies>,
    pub(super) table: RefCell<Vec<u8>>,
    /// Memory for the request that is taken next, which has waited for it.
    pub(super) ahead: RefCell<Option<Taken>>,
    /// The front end has closed: what it hears of carries no data, since its pages may be something else by now.
    has_closed: Cell<bool>,
    /// It takes nothing more: for what waits meanwhile.
    ending: Signal,
    /// Its task has ended.
    ended: Signal,
}

/// A request that was taken.
#[derive(Default)]
pub(super) struct Flight {
    pub(super) kind: Option<OpKind>,
    /// As it is counted, and when it was taken.
    pub(super) asked: Asked,
    since: Instant,
    /// Sectors that it moves if all is well.
    pub(super) sectors: u64,
    /// The answer, where the disk is not asked.
    pub(super) preset: Option<Status>,
    /// It counts as one that changes the disk.
    pub(super) changes: bool,
    /// It is to be durable before its answer.
    pub(super) fua: bool,
    /// Why its bytes could not be got from the guest, or not to it.
    pub(super) failed: Option<Errno>,
    pub(super) pieces: Vec<Piece>,
    pub(super) place: Place,
    taken: Option<Taken>,
}

impl Flight {
    /// A request that may use this memory.
    pub(super) fn begin(&mut self, taken: Option<Taken>, since: Instant) {
        let pieces = std::mem::take(&mut self.pieces);
        *self = Flight { pieces, taken, since, ..Flight::default() };
    }
}

/// How a request comes back.
#[derive(Clone, Copy, Debug)]
enum End {
    Answer(Result<(), Errno>),
    /// It stays in the journal.
    Leave,
}

impl Run {
    /// Starts to serve a ring. It is looked at once without an event: a predecessor may have had that.
    pub(crate) fn start(
        common: &Rc<Common>,
        index: usize,
        queue: Queue,
        data: Data,
        channel: Box<dyn Channel>,
        bell: Rc<Fd>,
    ) -> Rc<Run> {
        let mut flights = Vec::new();
        flights.resize_with(usize::from(queue.size()), Flight::default);
        let is_behind = queue.has_left();
        if is_behind {
            common.barrier.fall_behind();
        }
        let run = Rc::new(Run {
            index,
            handle: common.handle.clone(),
            common: common.clone(),
            session: common.disk.session(),
            queue: RefCell::new(queue),
            data,
            channel,
            bell,
            account: common.budget.account(),
            state: Cell::new(State::Running),
            is_waiting: Cell::new(false),
            is_behind: Cell::new(is_behind),
            woken: Cell::new(true),
            was_kept_out: Cell::new(false),
            task: RefCell::default(),
            rung: RefCell::default(),
            watch: RefCell::default(),
            flights: RefCell::new(flights),
            back: RefCell::default(),
            jobs: RefCell::default(),
            copies: RefCell::default(),
            table: RefCell::default(),
            ahead: RefCell::default(),
            has_closed: Cell::new(false),
            ending: Signal::default(),
            ended: Signal::default(),
        });
        *run.watch.borrow_mut() = Some(run.handle.watch(run.clone()));
        run.handle.spawn(run.clone().serve());
        run
    }

    async fn serve(self: Rc<Self>) {
        let _end = EndOfServing(&self);
        while poll_fn(|cx| self.poll_news(cx)).await {
            self.take_all().await;
        }
    }

    /// Ready with true where there may be something to take, with false at the ring's end.
    fn poll_news(&self, cx: &mut Context<'_>) -> Poll<bool> {
        match self.state.get() {
            State::Running => {}
            State::Failed | State::Ending(_) | State::Muted => return Poll::Ready(false),
        }
        if self.woken.replace(false) {
            return Poll::Ready(true);
        }
        let mut task = self.task.borrow_mut();
        match &mut *task {
            Some(task) => task.clone_from(cx.waker()),
            None => *task = Some(cx.waker().clone()),
        }
        drop(task);
        if self.common.barrier.keeps_out(cx) {
            self.was_kept_out.set(true);
            return Poll::Pending;
        }
        if self.was_kept_out.replace(false) {
            return Poll::Ready(true);
        }
        let mut rung = self.rung.borrow_mut();
        let completion = rung.get_or_insert_with(|| self.handle.readable(&self.bell));
        let Poll::Ready(result) = Pin::new(completion).poll(cx) else { return Poll::Pending };
        *rung = None;
        drop(rung);
        match result.and_then(|_events| self.channel.take()) {
            Ok(()) => Poll::Ready(true),
            Err(errno) => {
                self.fail(&Failure::Listen(errno));
                Poll::Ready(false)
            }
        }
    }

    /// Takes all that there is, a turn at a time.
    async fn take_all(self: &Rc<Self>) {
        loop {
            match self.take_turn() {
                Turn::More => self.handle.yield_now().await,
                Turn::Done => return,
                Turn::Memory(bytes) => {
                    self.common.counts.waits();
                    let _waiting = Waiting::begin(&self.is_waiting);
                    let taken = self.ending.or(self.account.take(bytes)).await;
                    *self.ahead.borrow_mut() = taken;
                }
                Turn::Steps(job, steps) => {
                    let _waiting = Waiting::begin(&self.is_waiting);
                    self.do_in_steps(*job, steps).await;
                    // Other rings have waited for it, and a ring full of barriers is not to keep them waiting.
                    self.handle.yield_now().await;
                }
            }
        }
    }

    /// What a predecessor has taken is with the disk again, but for a barrier at its end; or never will be.
    pub(super) fn catch_up(&self) {
        if self.is_behind.replace(false) {
            self.common.barrier.catch_up();
        }
    }

    /// Whether requests are to be taken.
    #[inline]
    pub(super) fn is_taking(&self) -> bool {
        self.state.get() == State::Running && !self.common.barrier.is_up()
    }

    /// Whether the task is to be told of news.
    #[inline]
    fn wants_news(&self) -> bool {
        !self.is_waiting.get() && self.is_taking()
    }

    /// Flushes, and then does what the job asks for besides.
    async fn do_in_steps(&self, job: Job, steps: Steps) {
        let Job { reply, op, .. } = job;
        let end = if steps.in_order {
            match self.ending.or(self.common.barrier.raise()).await {
                Some(raised) => {
                    let end = self.flush_and_do(op).await;
                    drop(raised);
                    end
                }
                None => None,
            }
        } else {
            // Another ring's barrier waits for all of it.
            let _changing = self.common.barrier.change();
            self.flush_and_do(op).await
        };
        match (end, self.state.get()) {
            (Some(End::Answer(result)), _) => reply.send(result.map(|()| Payload::None)),
            (Some(End::Leave), _) | (None, State::Ending(GiveUp::Leave)) => reply.leave(),
            (None, State::Ending(GiveUp::Tell) | State::Running | State::Failed | State::Muted) => {
                reply.send(Err(Errno::ESHUTDOWN));
            }
        }
    }

    /// Nothing if the ring was left before it was done.
    async fn flush_and_do(&self, op: Option<Op>) -> Option<End> {
        if self.ending.has_happened() {
            return None;
        }
        match (self.ask(Op::Flush).await, op) {
            (End::Answer(Ok(())), Some(_)) if self.ending.has_happened() => None,
            (End::Answer(Ok(())), Some(op)) => Some(self.ask(op).await),
            (end, _) => Some(end),
        }
    }

    /// Asks the disk and waits for the answer.
    async fn ask(&self, op: Op) -> End {
        let step = Rc::new(Step::default());
        self.session.submit(Request { op, reply: Reply::new(step.clone(), Ticket(0)) });
        step.over.wait().await;
        step.end.get().unwrap_or(End::Answer(Err(Errno::EIO)))
    }

    fn wake(&self) {
        self.woken.set(true);
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }

    /// Takes nothing more, says so, and lets the requests that were taken go on.
    pub(super) fn fail(&self, failure: &Failure) {
        if self.state.get() != State::Running {
            return;
        }
        self.state.set(State::Failed);
        self.common.complain(self.index, failure);
        self.wake();
    }

    /// Rings for the front end, whether or not it has asked for that.
    pub(crate) fn notify(&self) {
        if let Err(errno) = self.channel.notify() {
            self.fail(&Failure::Notify(errno));
        }
    }

    /// Takes nothing more.
    pub(crate) fn begin_end(&self, how: Parting) {
        self.state.set(match (how, self.state.get()) {
            (Parting::Forget, _) | (_, State::Muted) => State::Muted,
            (Parting::Leave, _) => State::Ending(GiveUp::Leave),
            (Parting::Tell | Parting::Closed, _) => State::Ending(GiveUp::Tell),
        });
        self.has_closed.set(how == Parting::Closed);
        self.ending.happen();
        self.wake();
    }

    /// Waits until all that was taken is over, after [`Run::begin_end`]: each request is answered when it is done, and
    /// what waits for the cause of an error to go away ends as was said. Nothing touches the guest's memory then but
    /// what is dropped with this.
    pub(crate) async fn end(&self) {
        let how = match self.state.get() {
            State::Ending(how) => how,
            State::Running | State::Failed | State::Muted => GiveUp::Tell,
        };
        self.session.stop(how).await;
        // Nothing is submitted once it ends, but a request in steps may have to hear of the last.
        self.ended.wait().await;
        self.settle();
        self.rung.take();
        self.watch.take();
        self.handle.turn().await;
        while !self.back.borrow().is_empty() {
            self.settle();
            self.handle.yield_now().await;
        }
        if self.state.get() == State::Ending(GiveUp::Tell) {
            self.refuse_the_rest();
        }
    }

    /// Answers what was never given to the disk: what is in the ring, and what a predecessor has left there. Nobody comes
    /// after us, and Linux waits for each answer before it lets go of a disk.
    fn refuse_the_rest(&self) {
        let mut queue = self.queue.borrow_mut();
        // No more than the ring holds, since nothing is shown meanwhile. One that makes no sense has no rest.
        while let Ok(Some(raw)) = queue.peek() {
            let told = if request::is_empty_flush(raw) { Status::Failed } else { Status::Error };
            let (slot, _raw) = queue.take();
            queue.answer(slot, told);
        }
        let rings = queue.publish();
        drop(queue);
        if rings {
            self.notify();
        }
    }

    /// Does nothing any more with the guest's memory, as far as that is in our hands: after a panic.
    pub(crate) fn abandon(&self) {
        self.state.set(State::Muted);
        self.ending.happen();
        self.wake();
        self.watch.take();
    }

    /// A request is over as far as the disk is concerned. The rest waits until all that are over now are known.
    fn come_back(&self, ticket: Ticket, end: End) {
        let slot = ticket.0 as u16;
        self.back.borrow_mut().push((slot, end));
        let (changed, doubt) = {
            let flight = &mut self.flights.borrow_mut()[usize::from(slot)];
            let failed = matches!(end, End::Answer(Err(errno)) if errno != Errno::ESHUTDOWN)
                && flight.failed.is_none()
                && flight.preset.is_none();
            let doubt = failed && (flight.fua || flight.kind == Some(OpKind::Flush));
            (std::mem::take(&mut flight.changes), doubt)
        };
        if changed {
            self.common.barrier.ended();
        }
        if doubt && self.state.get() != State::Muted {
            self.common.doubt();
        }
    }

    /// Copies to the guest what was read for it.
    fn deliver(&self, back: &[(u16, End)], flights: &mut [Flight]) {
        let mut copies = self.copies.borrow_mut();
        for (slot, end) in back {
            let flight = &mut flights[usize::from(*slot)];
            let is_read = matches!(end, End::Answer(Ok(()))) && flight.kind == Some(OpKind::Read);
            if is_read && self.has_closed.get() {
                flight.failed = Some(Errno::ESHUTDOWN);
                continue;
            }
            if let (true, Place::Ours(buf)) = (is_read, &flight.place) {
                let pieces = std::mem::take(&mut flight.pieces);
                copies.add(*slot, Direction::ToGuest, buf.clone(), pieces);
            }
        }
        self.data.copy(&mut copies);
        for copied in copies.drain() {
            let flight = &mut flights[usize::from(copied.slot)];
            flight.pieces = copied.pieces;
            if let Err(errno) = copied.result {
                flight.failed = Some(errno);
                self.common.miss(self.index, errno);
            }
        }
    }
}

/// What is told of a request that has come back.
fn told(flight: &Flight, result: Result<(), Errno>) -> Status {
    match (flight.failed, flight.preset, result, flight.kind) {
        (Some(_), ..) => Status::Error,
        (None, Some(preset), ..) => preset,
        (None, None, Ok(()), _) => Status::Okay,
        (None, None, Err(errno), Some(kind)) => status(errno, kind, flight.sectors > 0),
        (None, None, Err(_), None) => Status::Error,
    }
}

impl Answer for Run {
    fn answer(&self, ticket: Ticket, result: Result<Payload, Errno>) {
        self.come_back(ticket, End::Answer(result.map(|_payload| ())));
    }

    fn leave(&self, ticket: Ticket) {
        self.come_back(ticket, End::Leave);
    }
}

impl Source for Run {
    fn settle(&self) {
        if self.back.borrow().is_empty() {
            return;
        }
        let mut back = self.back.take();
        let mut flights = self.flights.borrow_mut();
        let is_muted = self.state.get() == State::Muted;
        if !is_muted {
            self.deliver(&back, &mut flights);
        }
        let (mut queue, now) = (self.queue.borrow_mut(), self.handle.now());
        back.retain(|(slot, end)| {
            let flight = &mut flights[usize::from(*slot)];
            if flight.place.is_in_use() {
                // It is unmapped before it is answered: blkfront gives up a disk whose back end has not.
                return true;
            }
            flight.place = Place::Nowhere;
            flight.taken = None;
            match end {
                End::Answer(result) if !is_muted => {
                    let told = told(flight, *result);
                    let moved = (told == Status::Okay).then_some(flight.sectors);
                    self.common.counts.answered(flight.asked, moved, now.since(flight.since));
                    queue.answer(*slot, told);
                }
                End::Answer(_) | End::Leave => {}
            }
            false
        });
        let rings = queue.publish();
        drop((queue, flights));
        if !back.is_empty() {
            self.back.borrow_mut().append(&mut back);
            // Nothing else may make for another look.
            self.handle.spawn(async {});
        }
        if rings {
            self.notify();
        }
    }

    fn look(&self) -> bool {
        let has_news = self.wants_news() && self.queue.borrow().has_news();
        if has_news {
            self.wake();
        }
        has_news
    }

    fn arm(&self) -> bool {
        let has_news = self.wants_news() && self.queue.borrow_mut().arm();
        if has_news {
            self.wake();
        }
        has_news
    }
}

/// Fails a ring whose task ends by a panic: nobody would take what is found in it.
struct EndOfServing<'a>(&'a Run);

impl Drop for EndOfServing<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(&Failure::Panicked);
        }
        self.0.catch_up();
        self.0.ended.happen();
    }
}

/// Holds while the task waits for something other than news.
struct Waiting<'a>(&'a Cell<bool>);

impl<'a> Waiting<'a> {
    fn begin(is_waiting: &'a Cell<bool>) -> Waiting<'a> {
        is_waiting.set(true);
        Waiting(is_waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

/// A part of a request, which is waited for.
#[derive(Default)]
struct Step {
    over: Signal,
    end: Cell<Option<End>>,
}

impl Answer for Step {
    fn answer(&self, _: Ticket, result: Result<Payload, Errno>) {
        self.end.set(Some(End::Answer(result.map(|_payload| ()))));
        self.over.happen();
    }

    fn leave(&self, _: Ticket) {
        self.end.set(Some(End::Leave));
        self.over.happen();
    }
}
