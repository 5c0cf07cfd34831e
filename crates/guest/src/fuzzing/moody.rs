//! A disk for fuzzing rings: it answers at once, later, with an error, or leaves a request to a successor.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use block::{Errno, Limits, Op, Payload, Request};
use runtime::{BoxFuture, Handle};

use crate::{Disk, GiveUp, Session};

/// Bytes of the disk.
pub(super) const SIZE: u64 = 64 << 10;

/// A disk that answers at once, later, with an error, or leaves it to a successor, as its mood is. A session has the
/// requests that wait in it.
pub(super) struct Moody {
    mood: Rc<Mood>,
    waiting: Rc<RefCell<VecDeque<Request>>>,
}

struct Mood {
    handle: Handle,
    mood: u8,
    read_only: bool,
    waiting_max: usize,
    bytes: RefCell<Vec<u8>>,
    nth: Cell<u8>,
    /// Requests that wait, in all sessions.
    waiting: Cell<usize>,
    left: Cell<u64>,
}

impl Moody {
    /// In all sessions no more than `waiting_max` requests may wait: then more is out than was asked.
    pub(super) fn new(handle: &Handle, mood: u8, read_only: bool, waiting_max: usize) -> Moody {
        let mood = Mood {
            handle: handle.clone(),
            mood,
            read_only,
            waiting_max,
            bytes: RefCell::new(vec![0x11; SIZE as usize]),
            nth: Cell::new(0),
            waiting: Cell::new(0),
            left: Cell::new(0),
        };
        Moody { mood: Rc::new(mood), waiting: Rc::default() }
    }

    /// Requests that wait.
    pub(super) fn waiting(&self) -> usize {
        self.mood.waiting.get()
    }

    /// Requests that were left to a successor.
    pub(super) fn left(&self) -> u64 {
        self.mood.left.get()
    }
}

impl Disk for Moody {
    fn session(&self) -> Box<dyn Session> {
        Box::new(Moody { mood: self.mood.clone(), waiting: Rc::default() })
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn limits(&self) -> Limits {
        Limits { align: 512, preferred: 4096, read_only: self.mood.read_only, fast_zero: true }
    }

    fn resized(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

impl Session for Moody {
    fn submit(&self, request: Request) {
        let mood = &self.mood;
        let nth = mood.nth.replace(mood.nth.get().wrapping_add(1));
        match nth.wrapping_mul(mood.mood) % 8 {
            0..=3 => mood.perform(request),
            4 => request.reply.send(Err(Errno::EIO)),
            5 => request.reply.send(Err(Errno::EOPNOTSUPP)),
            _ => {
                self.waiting.borrow_mut().push_back(request);
                mood.waiting.set(mood.waiting.get() + 1);
                assert!(mood.waiting.get() <= mood.waiting_max, "more is out than a ring has heads");
                let (mood, waiting) = (mood.clone(), self.waiting.clone());
                mood.handle.clone().spawn(async move {
                    mood.handle.yield_now().await;
                    // Out of order.
                    let next = waiting.borrow_mut().pop_back();
                    if let Some(request) = next {
                        mood.waiting.set(mood.waiting.get() - 1);
                        mood.perform(request);
                    }
                });
            }
        }
    }

    fn stop(&self, how: GiveUp) -> BoxFuture<'_, ()> {
        // As with requests that wait for space: they are told or left at once.
        for request in std::mem::take(&mut *self.waiting.borrow_mut()) {
            self.mood.waiting.set(self.mood.waiting.get() - 1);
            match how {
                GiveUp::Tell => request.reply.send(Err(Errno::ENOSPC)),
                GiveUp::Leave => {
                    self.mood.left.set(self.mood.left.get() + 1);
                    request.reply.leave();
                }
            }
        }
        Box::pin(std::future::ready(()))
    }
}

impl Mood {
    fn perform(&self, request: Request) {
        let op = &request.op;
        let span = op.span().expect("the ring checks what wraps around");
        assert!(span.is_within(SIZE), "the ring checks what lies beyond the end");
        assert!(!op.kind().changes() || !self.read_only, "the ring checks what is read-only");
        let range = span.at() as usize..span.end() as usize;
        let mut bytes = self.bytes.borrow_mut();
        match op {
            Op::Read { buf, .. } => buf.put(0, &bytes[range]),
            Op::Write { buf, .. } => buf.get(0, &mut bytes[range]),
            Op::WriteZeroes { .. } | Op::Discard { .. } => bytes[range].fill(0),
            Op::Flush => {}
            Op::Status { .. } | Op::Prefetch { .. } => panic!("no ring has such a request"),
        }
        drop(bytes);
        request.reply.send(Ok(Payload::None));
    }
}
