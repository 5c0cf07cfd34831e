//! A client in the transmission phase: the requests that it has out, and the way that their answers take to it.

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Poll, Waker};

use block::{Answer, Buf, Errno, Op, Payload, Reply, Request, Span, Ticket};
use slab::Slab;

use super::outbox::Outbox;
use super::peer::{Peer, Reason};
use super::reply::{self, Head, To};
use super::request::Asked;
use super::wire::Style;
use crate::budget::Taken;
use crate::{Disk, GiveUp, Session};

/// Requests that one client may have out: taken, and their answers not yet handed to the kernel. Beyond it nothing
/// more is received from this client. Clients in use have 16 to 64 in flight.
pub(crate) const REQUESTS_MAX: usize = 128;

/// The way of answers to a client.
pub(crate) struct Connection {
    peer: Rc<Peer>,
    style: Style,
    disk: Rc<dyn Disk>,
    session: Box<dyn Session>,
    state: RefCell<State>,
}

struct State {
    /// The requests that are out; a request's ticket is its place here.
    out: Slab<Out>,
    outbox: Outbox,
    /// Nothing is sent any more: answers are forgotten.
    is_mute: bool,
    /// The sender's work is done.
    is_over: bool,
    /// The connection's task waits for a change of `out`.
    is_awaited: bool,
    /// The sender waits for something to send.
    is_sender_idle: bool,
    sender: Waker,
}

/// A request that is out.
struct Out {
    cookie: u64,
    at: u64,
    kind: Kind,
    /// Where the bytes of a read are.
    buf: Option<Buf>,
    /// Memory that it uses until its answer has been sent.
    #[allow(dead_code)] // held, never looked at
    memory: Option<Taken>,
}

/// What an answer must know of its request.
#[derive(Clone, Copy)]
enum Kind {
    Read { span: Span },
    WriteZeroes { fast: bool },
    Status { len: u64, one: bool },
    Other,
}

impl Connection {
    pub(crate) fn new(peer: Rc<Peer>, style: Style, disk: Rc<dyn Disk>) -> Connection {
        let state = State {
            out: Slab::new(),
            outbox: Outbox::new(peer.handle().pool().clone()),
            is_mute: false,
            is_over: false,
            is_awaited: false,
            is_sender_idle: false,
            sender: Waker::noop().clone(),
        };
        let session = disk.session();
        Connection { peer, style, disk, session, state: RefCell::new(state) }
    }

    pub(crate) fn peer(&self) -> &Rc<Peer> {
        &self.peer
    }

    pub(crate) fn disk(&self) -> &Rc<dyn Disk> {
        &self.disk
    }

    /// Waits until one more request may be taken.
    pub(crate) async fn room(&self) {
        self.until(|state| state.out.len() < REQUESTS_MAX).await;
    }

    /// Whether no request is out.
    pub(crate) fn is_settled(&self) -> bool {
        self.state.borrow().out.is_empty()
    }

    /// Waits until the disk has no request of this client. Nothing waits for the cause of an error to go away: the
    /// client, if it still listens, hears the error.
    pub(crate) async fn give_up(&self) {
        self.session.stop(GiveUp::Tell).await;
    }

    /// Waits until no request is out.
    pub(crate) async fn settled(&self) {
        self.until(|state| state.out.is_empty()).await;
    }

    /// Waits in the connection's task until this is so.
    async fn until(&self, is_so: impl Fn(&State) -> bool) {
        std::future::poll_fn(|cx| {
            let mut state = self.state.borrow_mut();
            // Who ended the connection counts on its answers being forgotten.
            if self.peer.is_over() && !state.is_mute {
                state.mute();
            }
            state.is_awaited = !is_so(&state);
            if !state.is_awaited {
                return Poll::Ready(());
            }
            self.peer.woken_by(cx.waker());
            Poll::Pending
        })
        .await;
    }

    /// Hands a request to the disk. `buf` is where the bytes of a read or a write are.
    pub(crate) fn submit(
        self: &Rc<Self>,
        cookie: u64,
        asked: Asked,
        buf: Option<Buf>,
        memory: Option<Taken>,
    ) {
        let (op, kind, at) = match (asked, buf.clone()) {
            (Asked::Read { span }, Some(buf)) => {
                (Op::Read { at: span.at(), buf }, Kind::Read { span }, span.at())
            }
            (Asked::Write { span, fua }, Some(buf)) => {
                (Op::Write { at: span.at(), buf, fua }, Kind::Other, span.at())
            }
            (Asked::Read { .. } | Asked::Write { .. }, None) => unreachable!("these come with a buffer"),
            (Asked::Flush, _) => (Op::Flush, Kind::Other, 0),
            (Asked::Trim { span, fua }, _) => (Op::Discard { span, fua }, Kind::Other, span.at()),
            (Asked::WriteZeroes { span, unmap, fua, fast }, _) => {
                (Op::WriteZeroes { span, unmap, fua, fast }, Kind::WriteZeroes { fast }, span.at())
            }
            (Asked::Cache { span }, _) => (Op::Prefetch { span }, Kind::Other, span.at()),
            (Asked::Status { span, one }, _) => {
                (Op::Status { span }, Kind::Status { len: span.len(), one }, span.at())
            }
        };
        let buf = match kind {
            Kind::Read { .. } => buf,
            Kind::WriteZeroes { .. } | Kind::Status { .. } | Kind::Other => None,
        };
        let ticket = self.take(Out { cookie, at, kind, buf, memory });
        self.peer.unanswered.set(self.peer.unanswered.get() + 1);
        self.session.submit(Request { op, reply: Reply::new(self.clone(), ticket) });
    }

    /// Answers a request that asks for nothing.
    pub(crate) fn done(&self, cookie: u64, at: u64) {
        self.answer_here(cookie, at, &reply::done(To { style: self.style, cookie, at }));
    }

    /// Answers a request that cannot be done.
    pub(crate) fn refuse(&self, cookie: u64, at: u64, errno: Errno, why: &str) {
        let to = To { style: self.style, cookie, at };
        self.answer_here(cookie, at, &reply::error(to, errno, false, Some(why)));
    }

    fn answer_here(&self, cookie: u64, at: u64, head: &Head) {
        let ticket = self.take(Out { cookie, at, kind: Kind::Other, buf: None, memory: None });
        let mut state = self.state.borrow_mut();
        state.push(head.bytes(), None, ticket.0 as usize);
    }

    fn take(&self, out: Out) -> Ticket {
        self.peer.taken.set(self.peer.taken.get() + 1);
        let mut state = self.state.borrow_mut();
        debug_assert!(state.out.len() < REQUESTS_MAX, "`room` was waited for");
        Ticket(state.out.insert(out) as u64)
    }

    /// Sends answers until the connection is over; a task of its own.
    pub(crate) async fn send_answers(self: Rc<Self>) {
        let _guard = DropOnPanic(&self.peer);
        while let Some(batch) = self.next_batch().await {
            let (buf, entries) = batch.into_parts();
            self.peer.is_sending.set(true);
            let sent = self.peer.send(&buf).await;
            self.peer.is_sending.set(false);
            drop(buf);
            if let Err(errno) = sent {
                self.peer.fail(errno);
            }
            self.state.borrow_mut().release(entries, &self.peer);
        }
    }

    async fn next_batch(&self) -> Option<super::outbox::Batch> {
        std::future::poll_fn(|cx| {
            let mut state = self.state.borrow_mut();
            if let Some(batch) = state.outbox.take() {
                return Poll::Ready(Some(batch));
            }
            if state.is_over {
                return Poll::Ready(None);
            }
            state.sender.clone_from(cx.waker());
            state.is_sender_idle = true;
            Poll::Pending
        })
        .await
    }

    /// Forgets the answers that are not sent, and those to come.
    pub(crate) fn mute(&self) {
        self.state.borrow_mut().mute();
    }
}

impl State {
    fn push(&mut self, head: &[u8], payload: Option<Buf>, entry: usize) {
        if self.is_mute {
            drop(self.out.remove(entry));
            return;
        }
        self.outbox.push(head, payload, entry);
        self.wake_sender();
    }

    fn wake_sender(&mut self) {
        if std::mem::take(&mut self.is_sender_idle) {
            self.sender.wake_by_ref();
        }
    }

    fn release(&mut self, entries: Vec<usize>, peer: &Peer) {
        for &entry in &entries {
            drop(self.out.remove(entry));
        }
        self.outbox.reuse(entries);
        self.notify(peer);
    }

    /// Wakes the connection's task if it waits for a change of `out`.
    fn notify(&mut self, peer: &Peer) {
        if std::mem::take(&mut self.is_awaited) {
            peer.wake();
        }
    }

    fn mute(&mut self) {
        self.is_mute = true;
        for entry in self.outbox.clear() {
            drop(self.out.remove(entry));
        }
    }
}

impl Answer for Connection {
    fn answer(&self, ticket: Ticket, result: Result<Payload, Errno>) {
        let entry = ticket.0 as usize;
        self.peer.unanswered.set(self.peer.unanswered.get() - 1);
        let mut state = self.state.borrow_mut();
        let Some(out) = state.out.get_mut(entry) else {
            tracing::error!(client = self.peer.id, entry, "an answer to no request (a bug in tapdisk)");
            return;
        };
        let to = To { style: self.style, cookie: out.cookie, at: out.at };
        let buf = out.buf.take();
        match (out.kind, result) {
            (Kind::Read { span }, Ok(_)) => state.push(reply::read(to, span).bytes(), buf, entry),
            (Kind::Status { len, one }, Ok(Payload::Runs(runs))) if runs.iter().any(|run| run.len > 0) => {
                let bytes = reply::extents(to, &runs, len, one);
                let payload = self.peer.handle().pool().take(bytes.len());
                payload.put(0, &bytes);
                state.push(&[], Some(payload), entry);
            }
            (Kind::Status { .. }, Ok(_)) => {
                tracing::error!(client = self.peer.id, "a block status without runs (a bug in tapdisk)");
                state.push(reply::error(to, Errno::EIO, false, None).bytes(), None, entry);
            }
            (Kind::WriteZeroes { .. } | Kind::Other, Ok(_)) => {
                state.push(reply::done(to).bytes(), None, entry);
            }
            // The bytes of a failed read are dropped with `buf`: an error is never followed by any.
            (kind, Err(errno)) => {
                let fast = matches!(kind, Kind::WriteZeroes { fast: true });
                state.push(reply::error(to, errno, fast, None).bytes(), None, entry);
            }
        }
        if state.is_mute {
            state.notify(&self.peer);
        }
    }
}

/// Ends the task that sends when the connection's own task has ended, however that came.
pub(crate) struct FinishWhenDropped<'a>(pub(crate) &'a Connection);

impl Drop for FinishWhenDropped<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.borrow_mut();
        state.mute();
        state.is_over = true;
        state.wake_sender();
    }
}

/// Drops the client when the task that holds it ends by a panic: half a connection would look like a slow disk.
pub(crate) struct DropOnPanic<'a>(pub(crate) &'a Peer);

impl Drop for DropOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.drop_for(Reason::Panicked);
        }
    }
}
