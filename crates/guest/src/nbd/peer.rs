//! The other end of a connection: who it is, whether it gets on, and how it is shown out.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use block::{Buf, Errno};
use runtime::{Fd, Handle, Instant};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::{negotiation, request};
use crate::budget::{Account, Budget};

/// How much patience a server has with its clients.
#[derive(Clone, Debug)]
pub struct Patience {
    /// A client that sends nothing for so long during the handshake is dropped.
    pub handshake_pause: Duration,
    /// A client has so long for the whole handshake, however busy it looks.
    pub handshake: Duration,
    /// While others wait for memory, a client that holds some, and is waited for, moves 64 KiB in this time or is
    /// dropped.
    pub pace: Duration,
    /// A client whose last answers are on their way has so long to read them: all of them where the server ends,
    /// 64 KiB at a time where the client does.
    pub leave: Duration,
    /// A connection that has moved nothing for so long gives the memory back that it keeps for speed.
    pub idle: Duration,
    /// Connections are looked after so often: times above are met with this precision.
    pub round: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            handshake_pause: Duration::from_secs(30),
            handshake: Duration::from_secs(60),
            pace: Duration::from_secs(30),
            leave: Duration::from_secs(5),
            idle: Duration::from_secs(5),
            round: Duration::from_secs(1),
        }
    }
}

/// Bytes that a client moves in [`Patience::pace`].
const PACE_LEN: u64 = 64 << 10;

/// How a connection came to its end.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum End {
    #[error("the client closed the connection")]
    Closed,
    #[error("the client closed the connection in the middle of a message")]
    Truncated,
    #[error("the client took its leave")]
    Disconnected,
    #[error("{0}")]
    Handshake(#[from] negotiation::Violation),
    #[error("{0}")]
    Request(#[from] request::Violation),
    #[error("the connection failed: {0}")]
    Failed(Errno),
    #[error("the server is shutting down")]
    Drained,
    #[error("{0}")]
    Dropped(Reason),
}

/// Why the server drops a client that has broken no rule of the protocol.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Reason {
    #[error("it sent nothing for too long in the handshake")]
    HandshakePaused,
    #[error("it took too long for the handshake")]
    HandshakeTooLong,
    #[error(
        "it moved less than {PACE_LEN} bytes for too long while others waited for the memory that it holds"
    )]
    TooSlow,
    #[error("it did not read its last answers")]
    NotReading,
    #[error("its task failed (a bug in tapdisk)")]
    Panicked,
}

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Handshake,
    Transmission,
    /// No further request is taken.
    Leaving,
}

/// What its task is told from outside.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Take no more requests, answer those that were taken.
    Leave,
    /// End at once.
    Drop(Reason),
    /// End at once: sending failed.
    Fail(Errno),
}

/// A client's end of a connection. All counts are of bytes.
pub(crate) struct Peer {
    pub(crate) id: u64,
    /// Its address, or the process behind a unix socket.
    pub(crate) name: String,
    pub(crate) is_tcp: bool,
    pub(crate) account: Rc<Account>,
    handle: Handle,
    socket: Rc<Fd>,
    phase: Cell<Phase>,
    since: Instant,
    moved: Cell<u64>,
    /// A message is half received.
    pub(crate) is_receiving: Cell<bool>,
    /// Answers are on their way.
    pub(crate) is_sending: Cell<bool>,
    /// Requests taken so far.
    pub(crate) taken: Cell<u64>,
    /// Requests that are with the disk.
    pub(crate) unanswered: Cell<usize>,
    /// The stream buffer is a large one.
    pub(crate) is_large: Cell<bool>,
    /// The stream buffer is to be exchanged for a small one.
    pub(crate) is_recalled: Cell<bool>,
    /// The client was found to send nothing more, and has requests with the disk.
    has_hung_up: Cell<bool>,
    /// What `moved` was when it was last seen to change, and when that was.
    active: Cell<(u64, Instant)>,
    /// What `moved` was when the client was last seen to keep pace, and when that was.
    pace: Cell<(u64, Instant)>,
    order: Cell<Option<Order>>,
    waker: RefCell<Option<Waker>>,
}

impl Peer {
    pub(crate) fn new(
        id: u64,
        name: String,
        is_tcp: bool,
        socket: Rc<Fd>,
        handle: Handle,
        budget: &Budget,
    ) -> Peer {
        let now = handle.now();
        Peer {
            id,
            name,
            is_tcp,
            account: budget.account(),
            handle,
            socket,
            phase: Cell::new(Phase::Handshake),
            since: now,
            moved: Cell::new(0),
            is_receiving: Cell::new(false),
            is_sending: Cell::new(false),
            taken: Cell::new(0),
            unanswered: Cell::new(0),
            is_large: Cell::new(false),
            is_recalled: Cell::new(false),
            has_hung_up: Cell::new(false),
            active: Cell::new((0, now)),
            pace: Cell::new((0, now)),
            order: Cell::new(None),
            waker: RefCell::default(),
        }
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.set(phase);
        self.pace.set((self.moved.get(), self.handle.now()));
    }

    /// The first bytes that arrive, at least one; `None` where the buffer was recalled before.
    pub(crate) async fn receive(&self, buf: &Buf) -> Result<Option<usize>, End> {
        let mut receiving = self.handle.receive(&self.socket, buf);
        let mut is_cancelled = false;
        let received = std::future::poll_fn(|cx| {
            if self.is_recalled.take() && !std::mem::replace(&mut is_cancelled, true) {
                // Not dropped: what has been received meanwhile would be lost with it.
                receiving.cancel();
            }
            Pin::new(&mut receiving).poll(cx)
        })
        .await;
        match received {
            Ok(0) if self.is_receiving.get() => Err(End::Truncated),
            Ok(0) => Err(End::Closed),
            Ok(count) => {
                self.moved.set(self.moved.get() + count);
                Ok(Some(count as usize))
            }
            Err(Errno::ECANCELED) if is_cancelled => Ok(None),
            Err(errno) => Err(End::Failed(errno)),
        }
    }

    /// Sends all bytes.
    pub(crate) async fn send(&self, buf: &Buf) -> Result<(), Errno> {
        /// So many bytes are given to the kernel at once, so that a slow reader is told from one that does not read.
        const PART_LEN: usize = 1 << 20;
        let mut sent = 0;
        while sent < buf.len() {
            let part = match buf.len() {
                len if sent == 0 && len <= PART_LEN => buf.clone(),
                len => buf.slice(sent, PART_LEN.min(len - sent)),
            };
            let count = self.handle.send(&self.socket, &part).await?;
            if count == 0 {
                return Err(Errno::EPIPE);
            }
            self.moved.set(self.moved.get() + count);
            sent += count as usize;
        }
        Ok(())
    }

    /// Tells the client that nothing more will come.
    pub(crate) fn hang_up(&self) {
        self.shut(rustix::net::Shutdown::Write);
    }

    /// Ends what is being received and sent.
    pub(crate) fn cut(&self) {
        self.shut(rustix::net::Shutdown::Both);
    }

    /// Takes no more requests, and answers those that were taken.
    pub(crate) fn leave(&self) {
        if self.order.get().is_none() {
            self.order.set(Some(Order::Leave));
            self.wake();
        }
    }

    /// Ends the connection at once: sends and receives that are under way fail.
    pub(crate) fn drop_for(&self, reason: Reason) {
        self.finish(Order::Drop(reason));
    }

    /// The same because sending failed.
    pub(crate) fn fail(&self, errno: Errno) {
        self.finish(Order::Fail(errno));
    }

    fn finish(&self, order: Order) {
        if !self.is_over() {
            self.order.set(Some(order));
            self.cut();
            self.wake();
        }
    }

    fn shut(&self, how: rustix::net::Shutdown) {
        if let Err(error) = rustix::net::shutdown(self.socket.as_fd(), how) {
            // It was closed by the other side before.
            tracing::trace!(client = self.id, %error, "shutdown");
        }
    }

    /// Whether the connection was ended at once.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.order.get(), Some(Order::Drop(_) | Order::Fail(_)))
    }

    /// Why the server dropped it, if it did.
    pub(crate) fn dropped_for(&self) -> Option<Reason> {
        match self.order.get() {
            Some(Order::Drop(reason)) => Some(reason),
            Some(Order::Leave | Order::Fail(_)) | None => None,
        }
    }

    /// Wakes the connection's task.
    pub(crate) fn wake(&self) {
        if let Some(waker) = self.waker.borrow().as_ref() {
            waker.wake_by_ref();
        }
    }

    /// Notes whom [`Peer::wake`] wakes.
    pub(crate) fn woken_by(&self, waker: &Waker) {
        match &mut *self.waker.borrow_mut() {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }

    /// Runs `future` until it is done or this connection is told to end; then it is dropped.
    pub(crate) async fn until_told(&self, future: impl Future<Output = End>) -> End {
        let mut future = pin!(future);
        std::future::poll_fn(|cx| {
            match self.order.get() {
                None => {}
                Some(Order::Leave) => return Poll::Ready(End::Drained),
                Some(Order::Drop(reason)) => return Poll::Ready(End::Dropped(reason)),
                Some(Order::Fail(errno)) => return Poll::Ready(End::Failed(errno)),
            }
            self.woken_by(cx.waker());
            future.as_mut().poll(cx)
        })
        .await
    }

    /// Waits, in a future that [`Peer::until_told`] runs, until the client is found to send nothing more while it has
    /// requests with the disk.
    pub(crate) async fn hung_up(&self) {
        std::future::poll_fn(|_| if self.has_hung_up.take() { Poll::Ready(()) } else { Poll::Pending }).await;
    }

    /// Whether the other side has closed its end, or at least sends nothing more.
    fn sends_nothing_more(&self) -> bool {
        let mut sockets = [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::RDHUP)];
        let found = rustix::event::poll(&mut sockets, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        found.is_ok_and(|count| count > 0)
    }

    /// Looks after the connection from time to time: drops a client that is in the way, takes back what is idle.
    pub(crate) fn look_after(&self, budget: &Budget, patience: &Patience) {
        let now = self.handle.now();
        let is_serving = self.phase.get() == Phase::Transmission;
        if is_serving && self.unanswered.get() > 0 && self.sends_nothing_more() {
            self.has_hung_up.set(true);
            self.wake();
        }
        let moved = self.moved.get();
        if moved != self.active.get().0 {
            self.active.set((moved, now));
        }
        let pause = now.since(self.active.get().1);
        match self.phase.get() {
            Phase::Handshake if now.since(self.since) > patience.handshake => {
                self.drop_for(Reason::HandshakeTooLong);
            }
            Phase::Handshake if pause > patience.handshake_pause => self.drop_for(Reason::HandshakePaused),
            Phase::Handshake => {}
            Phase::Transmission if self.is_receiving.get() || self.is_sending.get() => {
                if moved - self.pace.get().0 >= PACE_LEN {
                    self.pace.set((moved, now));
                }
                let slow = now.since(self.pace.get().1) > patience.pace;
                if slow && self.account.used() > 0 && budget.is_contended() {
                    self.drop_for(Reason::TooSlow);
                }
            }
            Phase::Transmission => {
                self.pace.set((moved, now));
                if self.is_large.get() && pause > patience.idle {
                    self.is_recalled.set(true);
                    self.wake();
                }
            }
            // How long the disk takes is not the client's fault.
            Phase::Leaving if self.unanswered.get() > 0 => self.pace.set((moved, now)),
            Phase::Leaving => {
                // Who leaves by itself may take its time as long as it reads. A server that ends does not wait.
                let is_drained = self.order.get() == Some(Order::Leave);
                if !is_drained && moved - self.pace.get().0 >= PACE_LEN {
                    self.pace.set((moved, now));
                }
                if now.since(self.pace.get().1) > patience.leave {
                    self.drop_for(Reason::NotReading);
                }
            }
        }
    }
}
