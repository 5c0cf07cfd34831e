//! A disk in memory that answers at once, or when the test says so.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Poll, Waker};

use block::{Buf, Errno, Limits, Op, Payload, Request};
use runtime::BoxFuture;

use crate::{Disk, GiveUp, Session};

/// What becomes of an operation.
type Fate = Box<dyn Fn(&Op) -> Option<Errno>>;

pub(super) struct ModelDisk {
    pub(super) bytes: RefCell<Vec<u8>>,
    pub(super) size: Cell<u64>,
    pub(super) read_only: Cell<bool>,
    /// Requests wait for the test.
    pub(super) waits: Cell<bool>,
    /// Requests are met with a panic.
    pub(super) panics: Cell<bool>,
    /// Those for which it says an errno fail.
    fate: RefCell<Option<Fate>>,
    /// Requests wait as if for space.
    pub(super) holds: Cell<bool>,
    held: RefCell<VecDeque<(u64, Request)>>,
    waiting: RefCell<VecDeque<(u64, Request)>>,
    /// Somebody has these still when the answer comes.
    pub(super) kept: RefCell<Option<Vec<Buf>>>,
    /// What was asked, in words: nobody keeps a request's memory.
    pub(super) asked: RefCell<Vec<String>>,
    sessions: Cell<u64>,
    stopping: RefCell<Vec<Waker>>,
}

impl ModelDisk {
    pub(super) fn new(size: u64) -> Rc<ModelDisk> {
        Rc::new(ModelDisk {
            bytes: RefCell::new(vec![0; size as usize]),
            size: Cell::new(size),
            read_only: Cell::new(false),
            waits: Cell::new(false),
            panics: Cell::new(false),
            fate: RefCell::default(),
            holds: Cell::new(false),
            held: RefCell::default(),
            waiting: RefCell::default(),
            kept: RefCell::default(),
            asked: RefCell::default(),
            sessions: Cell::new(0),
            stopping: RefCell::default(),
        })
    }

    /// From now on what this says an errno for fails.
    pub(super) fn fails(&self, fate: impl Fn(&Op) -> Option<Errno> + 'static) {
        *self.fate.borrow_mut() = Some(Box::new(fate));
    }

    fn perform(&self, op: &Op) -> Result<Payload, Errno> {
        if let Some(errno) = self.fate.borrow().as_ref().and_then(|fate| fate(op)) {
            return Err(errno);
        }
        let span = op.span().expect("what wraps around is refused before");
        assert!(span.is_within(self.size.get()), "what lies beyond the end is refused before");
        assert!(!op.kind().changes() || !self.read_only.get(), "what is read-only is refused before");
        let range = span.at() as usize..span.end() as usize;
        let mut bytes = self.bytes.borrow_mut();
        match op {
            Op::Read { buf, .. } => buf.put(0, &bytes[range]),
            Op::Write { buf, .. } => buf.get(0, &mut bytes[range]),
            Op::Discard { .. } => bytes[range].fill(0),
            Op::Flush => {}
            Op::WriteZeroes { .. } | Op::Status { .. } | Op::Prefetch { .. } => {
                panic!("not among blkif's requests")
            }
        }
        Ok(Payload::None)
    }

    fn finish(&self, request: Request) {
        let Request { op, reply } = request;
        let result = self.perform(&op);
        if let (Some(kept), Op::Read { buf, .. } | Op::Write { buf, .. }) =
            (&mut *self.kept.borrow_mut(), &op)
        {
            kept.push(buf.clone());
        }
        // As a disk does: nobody has the memory any more when the answer comes.
        drop(op);
        reply.send(result);
        self.stopping.take().into_iter().for_each(Waker::wake);
    }

    /// How many wait for the test.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.borrow().len()
    }

    /// Does the one that has waited so long that there are `nth` before it.
    pub(super) fn step(&self, nth: usize) {
        let (_, request) = self.waiting.borrow_mut().remove(nth).expect("as many wait");
        self.finish(request);
    }

    /// Does all that wait, in turn.
    pub(super) fn step_all(&self) {
        while self.waiting() > 0 {
            self.step(0);
        }
    }

    /// Forgets all that was asked of it, as a kernel whose process is gone.
    pub(super) fn lose(&self) {
        drop((self.waiting.take(), self.held.take()));
    }

    /// What was asked since this was called last.
    pub(super) fn take_asked(&self) -> Vec<String> {
        self.asked.take()
    }
}

/// An operation in words.
fn describe(op: &Op) -> String {
    let durably = if op.fua() { " durably" } else { "" };
    match op {
        Op::Read { at, buf } => format!("read {} at {at}", buf.len()),
        Op::Write { at, buf, .. } => format!("write {} at {at}{durably}", buf.len()),
        Op::Flush => "flush".into(),
        Op::Discard { span, .. } => format!("discard {span:?}{durably}"),
        Op::WriteZeroes { .. } | Op::Status { .. } | Op::Prefetch { .. } => {
            panic!("not among blkif's requests")
        }
    }
}

/// The disk as its guests see it.
pub(super) struct Handed(pub(super) Rc<ModelDisk>);

struct Asker {
    disk: Rc<ModelDisk>,
    number: u64,
}

impl Disk for Handed {
    fn session(&self) -> Box<dyn Session> {
        let number = self.0.sessions.get();
        self.0.sessions.set(number + 1);
        Box::new(Asker { disk: self.0.clone(), number })
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

impl Session for Asker {
    fn submit(&self, request: Request) {
        let disk = &self.disk;
        disk.asked.borrow_mut().push(describe(&request.op));
        assert!(!disk.panics.get(), "a test's panic");
        if disk.holds.get() {
            disk.held.borrow_mut().push_back((self.number, request));
        } else if disk.waits.get() {
            disk.waiting.borrow_mut().push_back((self.number, request));
        } else {
            disk.finish(request);
        }
    }

    fn stop(&self, how: GiveUp) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let disk = &self.disk;
            std::future::poll_fn(|cx| {
                let held = disk.held.take();
                for (number, request) in held {
                    if number != self.number {
                        disk.held.borrow_mut().push_back((number, request));
                        continue;
                    }
                    let Request { op, reply } = request;
                    drop(op);
                    match how {
                        GiveUp::Tell => reply.send(Err(Errno::ENOSPC)),
                        GiveUp::Leave => reply.leave(),
                    }
                }
                if disk.waiting.borrow().iter().any(|(number, _)| *number == self.number) {
                    disk.stopping.borrow_mut().push(cx.waker().clone());
                    return Poll::Pending;
                }
                Poll::Ready(())
            })
            .await;
        })
    }
}
