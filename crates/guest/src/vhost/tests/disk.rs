//! A disk in memory that answers at once, or when the test says so.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::Waker;

use block::{Errno, Limits, Op, Payload, Request};
use runtime::BoxFuture;

use crate::{Disk, GiveUp, Session};

pub(super) struct ModelDisk {
    pub(super) bytes: RefCell<Vec<u8>>,
    pub(super) size: Cell<u64>,
    pub(super) read_only: Cell<bool>,
    /// Requests wait for the test.
    pub(super) waits: Cell<bool>,
    /// Requests are met with a panic.
    pub(super) panics: Cell<bool>,
    /// As if storage had failed with it: the next requests wait to try again.
    pub(super) held: RefCell<VecDeque<Request>>,
    pub(super) waiting: RefCell<VecDeque<Request>>,
    /// What was asked.
    pub(super) asked: RefCell<Vec<Op>>,
    pub(super) flushes: Cell<u64>,
    stopping: RefCell<Option<Waker>>,
}

impl ModelDisk {
    pub(super) fn new(size: u64) -> Rc<ModelDisk> {
        Rc::new(ModelDisk {
            bytes: RefCell::new(vec![0; size as usize]),
            size: Cell::new(size),
            read_only: Cell::new(false),
            waits: Cell::new(false),
            panics: Cell::new(false),
            held: RefCell::default(),
            waiting: RefCell::default(),
            asked: RefCell::default(),
            flushes: Cell::new(0),
            stopping: RefCell::default(),
        })
    }

    pub(super) fn perform(&self, op: &Op) {
        let span = op.span().expect("what wraps around is refused before");
        assert!(span.is_within(self.size.get()), "what lies beyond the end is refused before");
        assert!(!op.kind().changes() || !self.read_only.get(), "what is read-only is refused before");
        let range = span.at() as usize..span.end() as usize;
        let mut bytes = self.bytes.borrow_mut();
        match op {
            Op::Read { buf, .. } => buf.put(0, &bytes[range]),
            Op::Write { buf, .. } => buf.get(0, &mut bytes[range]),
            Op::WriteZeroes { .. } | Op::Discard { .. } => bytes[range].fill(0),
            Op::Flush => self.flushes.set(self.flushes.get() + 1),
            Op::Status { .. } | Op::Prefetch { .. } => panic!("not among virtio's requests"),
        }
    }

    /// Does the request that has waited longest.
    pub(super) fn step(&self) -> bool {
        let Some(request) = self.waiting.borrow_mut().pop_front() else { return false };
        self.perform(&request.op);
        request.reply.send(Ok(Payload::None));
        if let Some(stopping) = self.stopping.take() {
            stopping.wake();
        }
        true
    }

    /// Lets the request that has waited longest fail.
    pub(super) fn fail(&self, errno: Errno) {
        let request = self.waiting.borrow_mut().pop_front().unwrap();
        request.reply.send(Err(errno));
    }
}

/// Sessions of it are all one: tests have one ring that is being stopped at a time.
pub(super) struct Handed(pub(super) Rc<ModelDisk>);

impl Disk for Handed {
    fn session(&self) -> Box<dyn Session> {
        Box::new(Handed(self.0.clone()))
    }

    fn size(&self) -> u64 {
        self.0.size.get()
    }

    fn limits(&self) -> Limits {
        Limits { align: 512, preferred: 4096, read_only: self.0.read_only.get(), fast_zero: true }
    }

    fn resized(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

impl Session for Handed {
    fn submit(&self, request: Request) {
        assert!(!self.0.panics.get(), "a test's panic");
        self.0.asked.borrow_mut().push(request.op.clone());
        if self.0.waits.get() {
            self.0.waiting.borrow_mut().push_back(request);
        } else {
            self.0.perform(&request.op);
            request.reply.send(Ok(Payload::None));
        }
    }

    fn stop(&self, how: GiveUp) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            for request in std::mem::take(&mut *self.0.held.borrow_mut()) {
                match how {
                    GiveUp::Tell => request.reply.send(Err(Errno::ENOSPC)),
                    GiveUp::Leave => request.reply.leave(),
                }
            }
            std::future::poll_fn(|cx| {
                *self.0.stopping.borrow_mut() = Some(cx.waker().clone());
                match self.0.waiting.borrow().is_empty() {
                    true => std::task::Poll::Ready(()),
                    false => std::task::Poll::Pending,
                }
            })
            .await;
        })
    }
}
