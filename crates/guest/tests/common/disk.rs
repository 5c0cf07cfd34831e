//! A disk in memory that answers rightly, wrongly, late or not at all: as a script says.

#![allow(dead_code)] // each program of tests uses what it needs

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::Duration;

use block::{Errno, Limits, Op, OpKind, Payload, Request, Run};
use guest::{Disk, GiveUp, Session};
use runtime::{BoxFuture, Handle};

/// What the disk is to do with a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    /// Do it at once.
    Do,
    /// Fail.
    Fail(Errno),
    /// Do it after this many microseconds.
    Late(u64),
    /// Have storage work on it until [`Scripted::release`].
    Stick,
    /// Hold it for an error, until [`Scripted::release`] or the end of its session.
    Hold(Errno),
    /// Lose it: its reply is dropped unanswered.
    Lose,
}

/// A request that reached the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) kind: OpKind,
    pub(crate) at: u64,
    pub(crate) len: u64,
    /// FUA, or for a write of zeroes: FUA, unmap, fast.
    pub(crate) flags: Vec<bool>,
}

/// What becomes of the nth request.
pub(crate) type Script = Box<dyn FnMut(usize, &Seen) -> Act + Send>;
pub(crate) type Log = Arc<Mutex<Vec<Seen>>>;

pub(crate) struct Scripted(Rc<Inner>);

struct Inner {
    handle: Handle,
    bytes: RefCell<Vec<u8>>,
    limits: Limits,
    script: RefCell<Script>,
    log: Log,
    kept: RefCell<Vec<Kept>>,
    sessions: Cell<u64>,
    /// Who waits for the disk to grow.
    waiting: RefCell<Vec<Waker>>,
}

/// A request that is not answered yet.
struct Kept {
    session: u64,
    nth: usize,
    /// Why it is held; `None` while storage works on it.
    held: Option<Errno>,
    request: Request,
}

/// One of the clients of the disk.
struct Asking {
    disk: Rc<Inner>,
    number: u64,
}

/// The byte at this place of a fresh disk.
pub(crate) fn byte_at(at: u64) -> u8 {
    (at ^ (at >> 8) ^ (at >> 16)) as u8 | 1
}

/// What a fresh disk holds here.
pub(crate) fn fresh(at: u64, len: usize) -> Vec<u8> {
    (at..at + len as u64).map(byte_at).collect()
}

impl Scripted {
    pub(crate) fn new(handle: Handle, size: usize, read_only: bool, script: Script, log: Log) -> Scripted {
        Scripted::with(handle, fresh(0, size), read_only, script, log)
    }

    /// A disk that holds this.
    pub(crate) fn with(
        handle: Handle,
        bytes: Vec<u8>,
        read_only: bool,
        script: Script,
        log: Log,
    ) -> Scripted {
        Scripted(Rc::new(Inner {
            handle,
            bytes: RefCell::new(bytes),
            limits: Limits { align: 512, preferred: 4096, read_only, fast_zero: true },
            script: RefCell::new(script),
            log,
            kept: RefCell::default(),
            sessions: Cell::new(0),
            waiting: RefCell::default(),
        }))
    }

    /// What it holds.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.bytes.borrow().clone()
    }

    /// Lets it have so many bytes, the new ones zeroes.
    pub(crate) fn grow(&self, size: usize) {
        self.0.bytes.borrow_mut().resize(size, 0);
        self.0.waiting.take().into_iter().for_each(Waker::wake);
    }

    /// Does what storage works on.
    pub(crate) fn release_stuck(&self) {
        let stuck: Vec<Kept> = self.0.kept.borrow_mut().extract_if(.., |kept| kept.held.is_none()).collect();
        for kept in stuck {
            self.0.perform(kept.request);
        }
    }

    /// Does what storage works on and what is held.
    pub(crate) fn release(&self) {
        for kept in self.0.kept.take() {
            self.0.perform(kept.request);
        }
    }
}

impl Disk for Scripted {
    fn session(&self) -> Box<dyn Session> {
        let number = self.0.sessions.replace(self.0.sessions.get() + 1);
        Box::new(Asking { disk: self.0.clone(), number })
    }

    fn size(&self) -> u64 {
        self.0.bytes.borrow().len() as u64
    }

    fn limits(&self) -> Limits {
        self.0.limits
    }

    fn resized(&self) -> BoxFuture<'static, ()> {
        let (disk, size) = (self.0.clone(), self.size());
        Box::pin(poll_fn(move |cx| {
            disk.waiting.borrow_mut().push(cx.waker().clone());
            if disk.bytes.borrow().len() as u64 == size { Poll::Pending } else { Poll::Ready(()) }
        }))
    }
}

impl Session for Asking {
    fn submit(&self, request: Request) {
        let (disk, session) = (&self.disk, self.number);
        let seen = describe(&request.op);
        let nth = {
            let mut log = disk.log.lock().unwrap();
            log.push(seen.clone());
            log.len() - 1
        };
        let act = (disk.script.borrow_mut())(nth, &seen);
        let keep = |held, request| disk.kept.borrow_mut().push(Kept { session, nth, held, request });
        match act {
            Act::Do => disk.perform(request),
            Act::Fail(errno) => request.reply.send(Err(errno)),
            Act::Late(us) => {
                keep(None, request);
                let disk = disk.clone();
                disk.handle.clone().spawn(async move {
                    disk.handle.sleep(Duration::from_micros(us)).await;
                    for kept in disk.kept.borrow_mut().extract_if(.., |kept| kept.nth == nth) {
                        disk.perform(kept.request);
                    }
                });
            }
            Act::Stick => keep(None, request),
            Act::Hold(errno) => keep(Some(errno), request),
            Act::Lose => drop(request),
        }
    }

    fn stop(&self, how: GiveUp) -> BoxFuture<'_, ()> {
        let ours = |kept: &Kept| kept.session == self.number;
        Box::pin(async move {
            // What is held while this waits is given up as well.
            while self.disk.kept.borrow().iter().any(ours) {
                let held: Vec<Kept> = {
                    let mut kept = self.disk.kept.borrow_mut();
                    kept.extract_if(.., |kept| ours(kept) && kept.held.is_some()).collect()
                };
                for Kept { held, request, .. } in held {
                    match how {
                        GiveUp::Tell => request.reply.send(Err(held.unwrap())),
                        GiveUp::Leave => request.reply.leave(),
                    }
                }
                self.disk.handle.sleep(Duration::from_millis(1)).await;
            }
        })
    }
}

fn describe(op: &Op) -> Seen {
    let span = op.span().expect("the server checks what wraps around");
    let flags = match op {
        Op::WriteZeroes { fua, unmap, fast, .. } => vec![*fua, *unmap, *fast],
        Op::Write { fua, .. } | Op::Discard { fua, .. } => vec![*fua],
        Op::Read { .. } | Op::Flush | Op::Status { .. } | Op::Prefetch { .. } => vec![],
    };
    Seen { kind: op.kind(), at: span.at(), len: span.len(), flags }
}

impl Inner {
    fn perform(&self, request: Request) {
        let mut bytes = self.bytes.borrow_mut();
        let span = request.op.span().unwrap();
        assert!(span.is_within(bytes.len() as u64), "the server checks what lies beyond the end");
        let range = span.at() as usize..span.end() as usize;
        let refuses = self.limits.read_only;
        let result = match &request.op {
            Op::Write { .. } | Op::WriteZeroes { .. } | Op::Discard { .. } if refuses => Err(Errno::EROFS),
            Op::Read { buf, .. } => {
                buf.put(0, &bytes[range]);
                Ok(Payload::None)
            }
            Op::Write { buf, .. } => {
                buf.get(0, &mut bytes[range]);
                Ok(Payload::None)
            }
            Op::WriteZeroes { .. } | Op::Discard { .. } => {
                bytes[range].fill(0);
                Ok(Payload::None)
            }
            Op::Status { .. } => Ok(Payload::Runs(runs(&bytes[range]))),
            Op::Flush | Op::Prefetch { .. } => Ok(Payload::None),
        };
        drop(bytes);
        request.reply.send(result);
    }
}

/// Zeroes are holes, piece by piece of 512 bytes.
fn runs(bytes: &[u8]) -> Vec<Run> {
    bytes
        .chunks(512)
        .map(|piece| {
            let zero = piece.iter().all(|byte| *byte == 0);
            Run { len: piece.len() as u64, allocated: !zero, zero }
        })
        .collect()
}
