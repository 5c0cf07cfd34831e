//! I/O in flight: each operation has a slot, and the slot owns what the kernel uses until the kernel is done.

pub(crate) mod engine;
mod spin;
#[allow(unsafe_code)] // one of the few rooms: the kernel's ring
pub(crate) mod uring;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use block::{Errno, Segment};
use slab::Slab;

use crate::{Engine, Handle, Idle, Instant, Io, Wait};

/// An open file that a ring may know by number; closed when the last user is gone, I/O in flight included.
pub struct Fd {
    file: File,
    index: Option<u32>,
    retired: Option<Rc<RefCell<Vec<u32>>>>,
    signal: Cell<Signal>,
}

/// What is under way to an eventfd: never more than one signal, whatever its owner does, for a peer that does not take
/// its signals could have us keep any number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Signal {
    #[default]
    None,
    /// The operation with this token.
    Sent(usize),
    /// It may have been done before what is to be told now: another follows it.
    Again(usize),
}

enum File {
    Open(OwnedFd),
    Simulated(i32),
}

impl Fd {
    /// A file that exists only in a simulated kernel, under this number.
    pub fn simulated(number: i32) -> Rc<Fd> {
        let file = File::Simulated(number);
        Rc::new(Fd { file, index: None, retired: None, signal: Cell::default() })
    }

    /// The number of a simulated file.
    pub fn simulated_number(&self) -> Option<i32> {
        match &self.file {
            File::Open(_) => None,
            File::Simulated(number) => Some(*number),
        }
    }

    /// The file descriptor, for calls outside of the ring.
    ///
    /// # Panics
    /// For a simulated file: nothing that runs in a simulation makes calls outside of the engine.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.file {
            File::Open(fd) => fd.as_fd(),
            File::Simulated(number) => panic!("simulated file {number} has no descriptor"),
        }
    }

    pub(crate) fn index(&self) -> Option<u32> {
        self.index
    }
}

impl std::fmt::Debug for Fd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.file {
            File::Open(fd) => write!(f, "{fd:?}"),
            File::Simulated(number) => write!(f, "simulated file {number}"),
        }
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // Not at once: the engine may be at work when the last user goes.
        if let (Some(index), Some(retired)) = (self.index, &self.retired) {
            retired.borrow_mut().push(index);
        }
    }
}

/// Memory that the kernel was told of, so that I/O on it costs less. Dropped when no I/O on it is in flight any more.
#[derive(Debug)]
pub struct RegisteredMemory {
    index: u16,
    retired: Rc<RefCell<Vec<u16>>>,
}

impl RegisteredMemory {
    /// The number that goes into [`block::Buf::from_raw`].
    pub fn index(&self) -> u16 {
        self.index
    }
}

impl Drop for RegisteredMemory {
    fn drop(&mut self) {
        // Not at once, for the same reason as with files. The kernel holds pins of its own meanwhile.
        self.retired.borrow_mut().push(self.index);
    }
}

/// What one operation in flight holds on to.
struct Slot {
    io: Io,
    /// What the request that it belongs to keeps until its last operation is done: its claim to an answer.
    #[allow(dead_code)] // held, never looked at
    scope: Option<Rc<dyn Any>>,
    /// What only this operation keeps, such as a lock on the bytes that it writes.
    #[allow(dead_code)] // held, never looked at
    keep: Option<Rc<dyn Any>>,
    state: State,
}

enum State {
    Waiting(Option<Waker>),
    Done(i64),
    /// Nobody waits any more; the kernel may still be at work.
    Abandoned,
}

/// All operations in flight of one thread, and the engine that does them.
pub(crate) struct Ring {
    engine: RefCell<Box<dyn Engine>>,
    slots: RefCell<Slab<Slot>>,
    retired: Rc<RefCell<Vec<u32>>>,
    retired_memory: Rc<RefCell<Vec<u16>>>,
    done: RefCell<Vec<(usize, i64)>>,
}

impl Ring {
    pub(crate) fn new(engine: Box<dyn Engine>) -> Ring {
        Ring {
            engine: RefCell::new(engine),
            slots: RefCell::default(),
            retired: Rc::default(),
            retired_memory: Rc::default(),
            done: RefCell::default(),
        }
    }

    pub(crate) fn register(&self, fd: OwnedFd) -> Rc<Fd> {
        let index = self.engine.borrow_mut().register_file(fd.as_fd());
        let retired = Some(self.retired.clone());
        Rc::new(Fd { file: File::Open(fd), index, retired, signal: Cell::default() })
    }

    pub(crate) fn now(&self) -> Instant {
        self.engine.borrow().now()
    }

    /// Makes memory known to the kernel, until the registration is dropped.
    ///
    /// # Safety
    /// The memory stays until then.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn register_memory(&self, memory: Segment) -> Result<RegisteredMemory, Errno> {
        let mut engine = self.engine.borrow_mut();
        self.forget_memory(&mut **engine);
        // SAFETY: as promised by the caller.
        let index = unsafe { engine.register_memory(memory) }?;
        Ok(RegisteredMemory { index, retired: self.retired_memory.clone() })
    }

    /// Adds 1 to an eventfd, or sees to it that 1 is added once what is under way is done.
    pub(crate) fn signal(&self, fd: &Rc<Fd>) {
        let signal = match fd.signal.get() {
            Signal::None => {
                let token = self.submit(Io::Signal { fd: fd.clone() }, None, None);
                self.slots.borrow_mut()[token].state = State::Abandoned;
                Signal::Sent(token)
            }
            Signal::Sent(token) | Signal::Again(token) => Signal::Again(token),
        };
        fd.signal.set(signal);
    }

    /// Ends what is under way to an eventfd.
    pub(crate) fn end_signal(&self, fd: &Fd) {
        if let Signal::Sent(token) | Signal::Again(token) = fd.signal.get() {
            fd.signal.set(Signal::Sent(token));
            self.engine.borrow_mut().cancel(token);
        }
    }

    fn signalled(&self, fd: &Rc<Fd>) {
        if let Signal::Again(_) = fd.signal.replace(Signal::None) {
            self.signal(fd);
        }
    }

    fn submit(&self, io: Io, scope: Option<Rc<dyn Any>>, keep: Option<Rc<dyn Any>>) -> usize {
        let mut slots = self.slots.borrow_mut();
        let token = slots.insert(Slot { io, scope, keep, state: State::Waiting(None) });
        // The slab may move its slots when it grows; what the engine is shown does not: buffers are behind
        // pointers that the slot's `Io` owns, and so are segments (see `block::Buf`).
        self.submit_slot(&slots[token].io, token);
        token
    }

    #[allow(unsafe_code)]
    fn submit_slot(&self, io: &Io, token: usize) {
        // SAFETY: the slot that owns `io` is removed only in `finish` and `Completion::poll`, both after the
        // completion with this token has been reaped; the memory and the segments that `io` points to live on
        // the heap and are kept by it.
        unsafe { self.engine.borrow_mut().submit(io, token) }
    }

    fn forget_memory(&self, engine: &mut dyn Engine) {
        for index in self.retired_memory.borrow_mut().drain(..) {
            engine.forget_memory(index);
        }
    }

    /// Lets the engine take a turn and hands out what has completed.
    pub(crate) fn turn(&self, wait: Wait, idle: &dyn Idle) {
        let mut done = std::mem::take(&mut *self.done.borrow_mut());
        {
            let mut engine = self.engine.borrow_mut();
            for index in self.retired.borrow_mut().drain(..) {
                engine.forget_file(index);
            }
            self.forget_memory(&mut **engine);
            engine.turn(wait, idle, &mut done);
        }
        for (token, result) in done.drain(..) {
            self.finish(token, result);
        }
        *self.done.borrow_mut() = done;
    }

    fn finish(&self, token: usize, result: i64) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[token];
        match std::mem::replace(&mut slot.state, State::Done(result)) {
            State::Waiting(waker) => {
                drop(slots);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            State::Abandoned => {
                let slot = slots.remove(token);
                drop(slots);
                close_unserved(&slot.io, result);
                if let Io::Signal { fd } = &slot.io {
                    self.signalled(fd);
                }
                drop(slot); // may answer its request: nothing of ours is borrowed here
            }
            State::Done(_) => unreachable!("one operation completed twice"),
        }
    }

    /// Operations that the kernel has not completed.
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.borrow().iter().filter(|(_, slot)| !matches!(slot.state, State::Done(_))).count()
    }

    /// Asks for the early end of all that waits for a peer, and waits until the kernel is done with everything.
    pub(crate) fn drain(&self) {
        let waiting: Vec<usize> = self
            .slots
            .borrow()
            .iter()
            .filter(|(_, slot)| slot.io.waits_for_a_peer() && !matches!(slot.state, State::Done(_)))
            .map(|(token, _)| token)
            .collect();
        for token in waiting {
            self.engine.borrow_mut().cancel(token);
        }
        while self.in_flight() > 0 {
            self.turn(Wait::Until(None), &NothingElse);
        }
    }
}

impl Handle {
    /// Makes memory known to the kernel, so that I/O on it costs less: it is pinned until the result is dropped.
    ///
    /// # Errors
    /// ENOMEM where the limit on locked memory forbids it, EOPNOTSUPP or EINVAL where the kernel cannot do it or not
    /// for as much (1 GiB at a time), ENOSPC where too much is registered already.
    ///
    /// # Safety
    /// The memory stays until the result is dropped.
    #[allow(unsafe_code)] // passes the promise on
    pub unsafe fn register_memory(&self, memory: Segment) -> Result<RegisteredMemory, Errno> {
        // SAFETY: as promised by the caller.
        unsafe { self.ring().register_memory(memory) }
    }
}

/// For who waits for completions and nothing else.
pub(crate) struct NothingElse;

impl Idle for NothingElse {
    fn has_news(&self) -> bool {
        false
    }

    fn may_sleep(&self) -> bool {
        true
    }

    fn woken(&self) {}
}

/// Closes a connection that was accepted when nobody waited for it any more.
fn close_unserved(io: &Io, result: i64) {
    if let (Io::Accept { .. }, Ok(fd)) = (io, Errno::from_kernel(result)) {
        drop(uring::adopt(fd as i32));
    }
}

/// A future for one operation in flight. Dropping it leaves file, memory and scope with the ring until the kernel
/// is done with them.
#[must_use = "the operation is under way already; its result must be looked at"]
pub struct Completion {
    handle: Handle,
    token: Option<usize>,
}

impl Completion {
    pub(crate) fn start(
        handle: Handle,
        io: Io,
        scope: Option<Rc<dyn Any>>,
        keep: Option<Rc<dyn Any>>,
    ) -> Completion {
        let token = handle.ring().submit(io, scope, keep);
        Completion { handle, token: Some(token) }
    }

    /// Asks for an early end. Its result is still to be waited for: ECANCELED, or what was done before.
    pub fn cancel(&self) {
        if let Some(token) = self.token {
            self.handle.ring().engine.borrow_mut().cancel(token);
        }
    }
}

impl Future for Completion {
    /// The kernel's result: a count of bytes, an offset or a descriptor.
    type Output = Result<u64, Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let token = self.token.expect("not polled after its end");
        let slot = {
            let mut slots = self.handle.ring().slots.borrow_mut();
            match &mut slots[token].state {
                State::Done(_) => slots.remove(token),
                State::Waiting(waker) => {
                    match waker {
                        Some(waker) => waker.clone_from(cx.waker()),
                        None => *waker = Some(cx.waker().clone()),
                    }
                    return Poll::Pending;
                }
                State::Abandoned => unreachable!("abandoned by a future that is polled"),
            }
        };
        self.token = None;
        match slot.state {
            State::Done(result) => Poll::Ready(Errno::from_kernel(result)),
            State::Waiting(_) | State::Abandoned => unreachable!("taken out only when done"),
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        let Some(token) = self.token else { return };
        let ring = self.handle.ring();
        let mut slots = ring.slots.borrow_mut();
        let slot = &mut slots[token];
        match slot.state {
            State::Done(result) => {
                let slot = slots.remove(token);
                drop(slots);
                close_unserved(&slot.io, result);
            }
            State::Waiting(_) => {
                slot.state = State::Abandoned;
                if slot.io.waits_for_a_peer() {
                    drop(slots);
                    ring.engine.borrow_mut().cancel(token);
                }
            }
            State::Abandoned => unreachable!("abandoned twice"),
        }
    }
}
