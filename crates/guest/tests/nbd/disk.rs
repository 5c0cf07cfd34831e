//! A disk in memory that answers rightly, wrongly, late or not at all: as a script says.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::{Errno, Limits, Op, OpKind, Payload, Request, Run};
use guest::Disk;
use runtime::Handle;

/// What the disk is to do with a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    /// Do it at once.
    Do,
    /// Fail.
    Fail(Errno),
    /// Do it after this many microseconds.
    Late(u64),
    /// Keep it until [`Scripted::release`].
    Hold,
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

pub(crate) struct Scripted {
    handle: Handle,
    bytes: Rc<RefCell<Vec<u8>>>,
    limits: Limits,
    script: RefCell<Script>,
    log: Log,
    held: RefCell<Vec<Request>>,
}

/// The byte at this place of a fresh disk.
pub(crate) fn byte_at(at: u64) -> u8 {
    (at ^ (at >> 8) ^ (at >> 16)) as u8 | 1
}

impl Scripted {
    pub(crate) fn new(handle: Handle, size: usize, read_only: bool, script: Script, log: Log) -> Scripted {
        Scripted {
            handle,
            bytes: Rc::new(RefCell::new((0..size as u64).map(byte_at).collect())),
            limits: Limits { align: 512, preferred: 4096, read_only, fast_zero: true },
            script: RefCell::new(script),
            log,
            held: RefCell::default(),
        }
    }

    /// Does what was held.
    pub(crate) fn release(&self) {
        for request in self.held.take() {
            perform(&self.bytes, request);
        }
    }
}

impl Disk for Scripted {
    fn submit(&self, request: Request) {
        let seen = describe(&request.op);
        let nth = {
            let mut log = self.log.lock().unwrap();
            log.push(seen.clone());
            log.len() - 1
        };
        let act = (self.script.borrow_mut())(nth, &seen);
        match act {
            Act::Do => perform(&self.bytes, request),
            Act::Fail(errno) => request.reply.send(Err(errno)),
            Act::Late(us) => {
                let (handle, bytes) = (self.handle.clone(), self.bytes.clone());
                self.handle.spawn(async move {
                    handle.sleep(Duration::from_micros(us)).await;
                    perform(&bytes, request);
                });
            }
            Act::Hold => self.held.borrow_mut().push(request),
            Act::Lose => drop(request),
        }
    }

    fn size(&self) -> u64 {
        self.bytes.borrow().len() as u64
    }

    fn limits(&self) -> Limits {
        self.limits
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

fn perform(bytes: &RefCell<Vec<u8>>, request: Request) {
    let mut bytes = bytes.borrow_mut();
    let span = request.op.span().unwrap();
    assert!(span.is_within(bytes.len() as u64), "the server checks what lies beyond the end");
    let range = span.at() as usize..span.end() as usize;
    let mut payload = Payload::None;
    match &request.op {
        Op::Read { buf, .. } => buf.put(0, &bytes[range]),
        Op::Write { buf, .. } => buf.get(0, &mut bytes[range]),
        Op::WriteZeroes { .. } | Op::Discard { .. } => bytes[range].fill(0),
        Op::Status { .. } => payload = Payload::Runs(runs(&bytes[range])),
        Op::Flush | Op::Prefetch { .. } => {}
    }
    drop(bytes);
    request.reply.send(Ok(payload));
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
