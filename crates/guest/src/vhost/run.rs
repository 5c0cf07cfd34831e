//! A ring between its start and its stop: takes requests to the disk and answers to the guest.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use block::{Answer, Errno, Op, Payload, Reply, Request, Ticket};
use runtime::{Completion, Fd, Handle, Source, Watch};

use super::bell;
use super::device::{Change, Common};
use super::memory::{Memory, Outside};
use super::queue::{Queue, Taken};
use super::ring::{Addresses, RingError};
use crate::{GiveUp, Session};

/// Requests that a ring may have taken before others get their turn, and pieces of requests: what a request costs is
/// in its pieces too.
const TURN: usize = 64;
const TURN_PIECES: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Requests are taken.
    Running,
    /// What the driver put into the ring has no meaning: nothing more is taken from it.
    Failed,
    /// It is being stopped: nothing more is taken.
    Stopping,
    /// The guest has forgotten its requests: nothing more is taken, and no answer is given.
    Muted,
}

/// Why a ring takes no more requests.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("its kicks cannot be heard: {0}")]
    Kick(Errno),
    #[error("serving it panicked (a bug in tapdisk)")]
    Panicked,
}

pub(crate) struct Run {
    index: u16,
    handle: Handle,
    common: Rc<Common>,
    session: Box<dyn Session>,
    addresses: Addresses,
    queue: RefCell<Queue>,
    state: Cell<State>,
    enabled: Cell<bool>,
    /// The memory that it lies in was taken away and may come back: nothing is taken until then. Answers go into the
    /// old memory, which is the same to the guest.
    adrift: Cell<bool>,
    /// Somebody has news for the task.
    woken: Cell<bool>,
    task: RefCell<Option<Waker>>,
    kick: RefCell<Rc<Fd>>,
    /// Waits for the next kick.
    kicked: RefCell<Option<Completion>>,
    call: RefCell<Option<Rc<Fd>>>,
    err: RefCell<Option<Rc<Fd>>>,
    watch: RefCell<Option<Watch>>,
}

/// The eventfds of a ring.
#[derive(Clone)]
pub(crate) struct Bells {
    pub(crate) kick: Rc<Fd>,
    pub(crate) call: Option<Rc<Fd>>,
    pub(crate) err: Option<Rc<Fd>>,
}

impl Run {
    /// Starts to serve a ring. It is looked at once without a kick: a predecessor may have had that.
    pub(crate) fn start(
        common: &Rc<Common>,
        index: u16,
        queue: Queue,
        addresses: Addresses,
        bells: Bells,
        enabled: bool,
    ) -> Rc<Run> {
        let run = Rc::new(Run {
            index,
            handle: common.handle.clone(),
            common: common.clone(),
            session: common.disk.session(),
            addresses,
            queue: RefCell::new(queue),
            state: Cell::new(State::Running),
            enabled: Cell::new(enabled),
            adrift: Cell::new(false),
            woken: Cell::new(true),
            task: RefCell::default(),
            kick: RefCell::new(bells.kick),
            kicked: RefCell::default(),
            call: RefCell::default(),
            err: RefCell::new(bells.err),
            watch: RefCell::default(),
        });
        run.set_call(bells.call);
        *run.watch.borrow_mut() = Some(run.handle.watch(run.clone()));
        run.handle.spawn(run.clone().serve());
        run
    }

    async fn serve(self: Rc<Self>) {
        let _end = EndOfServing(&self);
        while poll_fn(|cx| self.poll_news(cx)).await {
            self.take_all().await;
        }
        self.kicked.take();
    }

    /// Ready with true where there may be something to take, with false at the ring's end.
    fn poll_news(&self, cx: &mut Context<'_>) -> Poll<bool> {
        match self.state.get() {
            State::Running => {}
            State::Failed | State::Stopping | State::Muted => return Poll::Ready(false),
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
        let mut kicked = self.kicked.borrow_mut();
        let kick = kicked.get_or_insert_with(|| self.handle.readable(&self.kick.borrow()));
        let Poll::Ready(result) = Pin::new(kick).poll(cx) else { return Poll::Pending };
        *kicked = None;
        drop(kicked);
        match result.and_then(|_| bell::silence(&self.kick.borrow())) {
            Ok(()) => Poll::Ready(true),
            Err(errno) => {
                self.fail(&Failure::Kick(errno));
                Poll::Ready(false)
            }
        }
    }

    /// Takes all that is available, a turn at a time.
    async fn take_all(self: &Rc<Self>) {
        while self.take_turn() {
            self.handle.yield_now().await;
        }
    }

    /// Whether requests are to be taken.
    fn is_taking(&self) -> bool {
        self.state.get() == State::Running && self.enabled.get() && !self.adrift.get()
    }

    /// Takes what is available, up to a limit; true if there may be more.
    fn take_turn(self: &Rc<Self>) -> bool {
        let (memory, terms) = (self.common.memory(), self.common.terms());
        let mut pieces = 0;
        for _ in 0..TURN {
            if pieces >= TURN_PIECES {
                break;
            }
            if !self.is_taking() {
                return false;
            }
            let taken = self.queue.borrow_mut().take(&memory, &terms);
            match taken {
                Ok(Taken::Request(head, op)) => self.submit(head, op),
                Ok(Taken::Parts(head, ops)) => ops.into_iter().for_each(|op| self.submit(head, op)),
                Ok(Taken::Answered) => {}
                Ok(Taken::Nothing) => return false,
                Err(error) => {
                    self.fail(&error.into());
                    return false;
                }
            }
            pieces += self.queue.borrow().pieces();
        }
        true
    }

    fn submit(self: &Rc<Self>, head: u16, op: Op) {
        self.session.submit(Request { op, reply: Reply::new(self.clone(), Ticket(head.into())) });
    }

    fn wake(&self) {
        self.woken.set(true);
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }

    /// Takes nothing more, says so, and lets the requests that were taken go on.
    pub(crate) fn fail(&self, failure: &Failure) {
        if self.state.get() != State::Running {
            return;
        }
        self.state.set(State::Failed);
        self.common.complain(self.index, failure);
        if let Some(err) = &*self.err.borrow() {
            self.handle.signal(err);
        }
        self.wake();
    }

    /// The front end has changed its memory.
    pub(crate) fn move_to(&self, memory: &Memory, change: Change) {
        let moved = self.queue.borrow_mut().move_to(memory, self.addresses);
        match (moved, change) {
            (Ok(()), _) => {
                if self.adrift.replace(false) {
                    self.wake();
                }
            }
            (Err(error @ RingError::Outside { outside: Outside::Hole { .. }, .. }), Change::Region) => {
                if !self.adrift.replace(true) {
                    self.common.miss(self.index, &error);
                }
            }
            (Err(error), _) => self.fail(&error.into()),
        }
    }

    pub(crate) fn enable(&self, on: bool) {
        self.enabled.set(on);
        self.wake();
    }

    pub(crate) fn set_kick(&self, kick: Rc<Fd>) {
        *self.kick.borrow_mut() = kick;
        self.kicked.take();
        // There may have been a kick on the one that is gone.
        self.wake();
    }

    /// Replaces the eventfd that tells the guest of answers. It is told at once: there may be answers whose signal
    /// went to the one before, or died with a predecessor.
    pub(crate) fn set_call(&self, call: Option<Rc<Fd>>) {
        *self.call.borrow_mut() = call;
        self.call();
    }

    pub(crate) fn set_err(&self, err: Option<Rc<Fd>>) {
        *self.err.borrow_mut() = err;
    }

    fn call(&self) {
        if let Some(call) = &*self.call.borrow() {
            self.handle.signal(call);
        }
    }

    /// Takes nothing more and ends what was taken: each request is answered when it is done, and what waits for the
    /// cause of an error to go away is left to a successor if there is a record of it, and else told its error.
    /// The base to go on from. Nothing touches the guest's memory then.
    pub(crate) async fn stop(&self) -> u16 {
        if self.state.get() != State::Muted {
            self.state.set(State::Stopping);
        }
        let how = if self.queue.borrow().has_record() { GiveUp::Leave } else { GiveUp::Tell };
        self.end(how).await
    }

    /// Ends what was taken without a word to the guest: it has forgotten all of it.
    pub(crate) async fn forget(&self) {
        self.state.set(State::Muted);
        self.end(GiveUp::Tell).await;
    }

    async fn end(&self, how: GiveUp) -> u16 {
        self.wake();
        self.session.stop(how).await;
        self.settle();
        self.watch.take();
        self.kicked.take();
        self.queue.borrow().base()
    }
}

/// Fails a ring whose task ends by a panic: nobody would take what is found in it, again and again.
struct EndOfServing<'a>(&'a Run);

impl Drop for EndOfServing<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(&Failure::Panicked);
        }
    }
}

impl Answer for Run {
    fn answer(&self, ticket: Ticket, result: Result<Payload, Errno>) {
        if self.state.get() == State::Muted {
            return;
        }
        let is_whole = self.common.memory_is_whole();
        self.queue.borrow_mut().answer(ticket.0 as u16, result.map(|_payload| ()), is_whole);
    }

    fn leave(&self, ticket: Ticket) {
        if self.state.get() != State::Muted {
            self.queue.borrow_mut().leave(ticket.0 as u16);
        }
    }
}

impl Source for Run {
    fn settle(&self) {
        if self.state.get() == State::Muted || self.queue.borrow().is_settled() {
            return;
        }
        if self.queue.borrow_mut().publish() {
            self.call();
        }
    }

    fn look(&self) -> bool {
        let has_news = self.is_taking() && self.queue.borrow().has_news();
        if has_news {
            self.wake();
        }
        has_news
    }

    fn arm(&self) -> bool {
        let has_news = self.is_taking() && self.queue.borrow_mut().arm();
        if has_news {
            self.wake();
        }
        has_news
    }
}
