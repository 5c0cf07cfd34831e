//! One disk under test: what was asked of it, what its storage told it, and what it may therefore answer.
//!
//! The oracles O1 to O4 of FAILURES D.1 are here. They know the promises, not the code that keeps them.

mod answers;
mod calls;
mod ends;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use block::{Errno, Op, OpKind, Span};
use disk::{Disk, Policy};

use crate::dice::Dice;
use crate::kernel::Shared;
use crate::model::{Content, Model, WriteId};
use crate::scattered::Layout;
use crate::stops::Stops;
use crate::trace::Event;

/// What the executor may take from one event to what follows from it, in virtual time.
const PROMPT: u64 = 5_000_000;

/// What a storage told the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Ok,
    Err { errno: Errno, lasting: bool },
}

/// A request that was made and is not answered.
struct Asked {
    kind: OpKind,
    span: Option<Span>,
    /// Where its memory is, to tell its calls from others'.
    memory: usize,
    fua: bool,
    fast: bool,
    at: u64,
    order: u64,
    refusal: Option<Errno>,
    write: Option<WriteId>,
    calling: bool,
    calls: u32,
    /// What its last call came to, and when.
    told: Option<(Told, u64)>,
    told_order: u64,
}

impl Asked {
    fn is_empty(&self) -> bool {
        self.kind != OpKind::Flush && self.span.is_some_and(Span::is_empty)
    }
}

/// What may go wrong with a disk by the run's own doing.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) number: usize,
    pub(crate) file: usize,
    pub(crate) size: u64,
    pub(crate) policy: Policy,
    pub(crate) read_only: bool,
    pub(crate) direct: bool,
    /// Its storage drops operations before they are done.
    pub(crate) impatient: bool,
    /// It must answer everything within this many nanoseconds; 0 for no bound.
    pub(crate) bound: u64,
    /// Where in the file the bytes of the disk are.
    pub(crate) layout: Layout,
    /// Errnos that filters above the image give.
    pub(crate) filters: Vec<Errno>,
}

struct State {
    model: Model,
    asked: BTreeMap<u64, Asked>,
    disk: Option<Disk>,
    made: u64,
    answered: u64,
    left: u64,
    stops: Stops,
    closing: bool,
    closing_since: Option<u64>,
    /// Drivers that panicked.
    panics: u64,
    /// The process ends without closing: what is unanswered is answered EIO.
    exiting: bool,
    /// The error that flushes and changes fail with, once a flush did.
    poison: Option<Errno>,
    /// What calls for a flush have failed with: the poison, and what those under way before it met.
    flush_errors: BTreeSet<Errno>,
    flush_calls: u64,
    /// Requests that must have called for a flush.
    flushes_due: u64,
    flushes_refused: u64,
    /// The order of the last flush call that succeeded, by its start.
    flushed: u64,
    order: u64,
}

/// One disk under test.
pub(crate) struct Subject {
    pub(crate) kernel: Shared,
    pub(crate) setup: Setup,
    state: RefCell<State>,
    dice: RefCell<Dice>,
}

impl Subject {
    pub(crate) fn new(kernel: &Shared, setup: Setup, content: Vec<u8>, dice: Dice) -> Subject {
        let state = State {
            model: Model::new(content),
            asked: BTreeMap::new(),
            disk: None,
            made: 0,
            answered: 0,
            left: 0,
            stops: Stops::default(),
            closing: false,
            closing_since: None,
            panics: 0,
            exiting: false,
            poison: None,
            flush_errors: BTreeSet::new(),
            flush_calls: 0,
            flushes_due: 0,
            flushes_refused: 0,
            flushed: 0,
            order: 0,
        };
        Subject { kernel: kernel.clone(), setup, state: RefCell::new(state), dice: RefCell::new(dice) }
    }

    /// Tells it the disk, once that exists.
    pub(crate) fn serves(&self, disk: &Disk) {
        self.state.borrow_mut().disk = Some(disk.clone());
    }

    /// Bytes of the disk.
    pub(crate) fn size(&self) -> u64 {
        self.setup.size
    }

    fn fail(&self, oracle: &'static str, what: impl Into<String>) {
        let what = format!("disk {}: {}", self.setup.number, what.into());
        self.kernel.borrow_mut().fail(oracle, what);
    }

    fn now(&self) -> u64 {
        self.kernel.borrow().now()
    }

    fn is_over(&self) -> bool {
        self.kernel.borrow().is_over()
    }

    /// Whether a request of this kind and span is under way: calls could not be told apart.
    pub(crate) fn is_asked(&self, kind: OpKind, wanted: Span) -> bool {
        self.state.borrow().asked.values().any(|asked| asked.kind == kind && asked.span == Some(wanted))
    }

    /// A guest is about to submit this.
    pub(crate) fn asked(&self, request: u64, op: &Op, size: u64) {
        let (kind, span) = (op.kind(), op.span());
        let now = self.now();
        let state = &mut *self.state.borrow_mut();
        let refusal = if state.panics > 0 {
            Some(Errno::EIO)
        } else if state.closing {
            Some(Errno::ESHUTDOWN)
        } else if !span.is_some_and(|span| span.is_within(size)) {
            Some(Errno::EINVAL)
        } else if kind.changes() && self.setup.read_only {
            Some(Errno::EPERM)
        } else {
            None
        };
        let (at, len, memory) = match op {
            Op::Read { at, buf } | Op::Write { at, buf, .. } => {
                (*at, buf.len() as u64, buf.segments().first().map_or(0, |segment| segment.ptr().addr()))
            }
            Op::Flush => (0, 0, 0),
            Op::Discard { span, .. }
            | Op::WriteZeroes { span, .. }
            | Op::Status { span }
            | Op::Prefetch { span } => (span.at(), span.len(), 0),
        };
        let disk = self.setup.number;
        self.kernel.borrow_mut().note(Event::Asked { disk, request, kind, at, len });
        let mut write = None;
        if let (None, Some(span)) = (refusal, span) {
            match op {
                Op::Write { .. } => write = Some(state.model.write_asked(span, Content::Pattern(request))),
                Op::Discard { .. } | Op::WriteZeroes { .. } => {
                    write = Some(state.model.write_asked(span, Content::Zero));
                }
                Op::Read { .. } | Op::Status { .. } => state.model.read_asked(request, span),
                Op::Flush => state.model.flush_asked(request),
                Op::Prefetch { .. } => {}
            }
        }
        state.order += 1;
        state.made += 1;
        let fast = matches!(op, Op::WriteZeroes { fast: true, .. });
        let asked = Asked {
            kind,
            span,
            memory,
            fua: op.fua(),
            fast,
            at: now,
            order: state.order,
            refusal,
            write,
            calling: false,
            calls: 0,
            told: None,
            told_order: 0,
        };
        state.flushes_refused += u64::from(kind == OpKind::Flush && refusal.is_some());
        state.flushes_due += u64::from(kind == OpKind::Flush && refusal.is_none());
        if state.asked.insert(request, asked).is_some() {
            self.fail("sim", "two requests have the same number");
        }
    }

    /// A driver is about to panic.
    pub(crate) fn panics(&self) {
        self.state.borrow_mut().panics += 1;
        self.kernel
            .borrow_mut()
            .note(Event::Script { what: "a driver panics, disk", number: self.setup.number as u64 });
    }

    pub(crate) fn panic_count(&self) -> u64 {
        self.state.borrow().panics
    }
}
