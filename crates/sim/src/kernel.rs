//! The simulated kernel: files, operations in flight, their completions out of order, and virtual time.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use block::{Errno, Segment, Span, WeakBuf};
use runtime::{Allocate, Engine, Fd, Idle, Instant, Io, Seek, Wait};

use crate::dice::Dice;
use crate::fault::{Action, Rule};
use crate::file::{SECTOR, SimFile};
use crate::trace::{Event, Trace};

/// Turns of one run after which it is believed to go round in circles.
const TURNS_MAX: u64 = 200_000;
/// Virtual nanoseconds that a run may take: three hours.
const TIME_MAX: u64 = 3 * 3600 * 1_000_000_000;
/// What an I/O operation takes at least: so no two events of one run are simultaneous for ever.
const TURN: u64 = 1_000;

/// What an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Sync,
    Punch,
    Zero,
    SeekData,
    SeekHole,
    SeekEnd,
    WillNeed,
    /// Sockets: there are none here. Other sizes: simulated files keep theirs.
    Other,
}

/// An operation that was submitted and is not completed.
struct Operation {
    token: usize,
    handle: usize,
    kind: Kind,
    at: u64,
    len: u64,
    /// Not kept: whoever submitted has promised that it stays.
    buf: Option<WeakBuf>,
    fd: Weak<Fd>,
    call: Option<u64>,
    request: Option<u64>,
    /// When it was submitted, by the order of events.
    submitted: u64,
    /// A rule has been applied: it is not looked for again.
    ruled: bool,
    result: i64,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Start,
    Move {
        from: u64,
        len: u64,
    },
    Sync,
    Finish,
    /// Of the number's file, not operation.
    Evict,
}

/// How slow some operations are: storage has a long tail, where one in many waits for a disk to seek, a network to
/// recover or a device to collect its garbage, while others pass it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slowness {
    /// So many of them are slow.
    pub(crate) percent: u64,
    /// Up to so many nanoseconds are added to each: far more than the others take.
    pub(crate) nanoseconds: u64,
}

impl Slowness {
    /// Storage that is as quick with one as with another.
    pub(crate) const NONE: Slowness = Slowness { percent: 0, nanoseconds: 0 };
}

/// A file opened in one way.
struct Opened {
    file: usize,
    /// Offsets, lengths and memory are multiples of these under O_DIRECT.
    align: u64,
    memory_align: usize,
}

/// What an operation of a call came to, if not what was wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The kernel gave this errno.
    Errno(Kind, Errno),
    /// It moved nothing of something.
    Nothing,
    /// It moved a part.
    Short,
    /// A storage in between gave this errno.
    Injected(Errno),
    /// The file was found to be shorter than its disk.
    Shrunk,
}

/// A call of the disk into its storage.
#[derive(Default)]
pub(crate) struct Call {
    pub(crate) request: Option<u64>,
    pub(crate) faults: Vec<Fault>,
    /// It got past the filters.
    pub(crate) passed: bool,
}

/// An oracle that was contradicted.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// O1 to O7 of FAILURES D.1.
    pub(crate) oracle: &'static str,
    pub(crate) what: String,
}

/// What a sync of a file came to at the last, for judging the flushes that rest on it.
#[derive(Default)]
pub(crate) struct SyncRecord {
    /// Errors of syncs, and of looking for the size after them.
    pub(crate) errors: BTreeSet<Errno>,
    /// A sync has failed and lost data.
    pub(crate) failed: bool,
    /// A flush was given up before its end.
    pub(crate) given_up: bool,
    /// The file was shorter than its disk at some time.
    pub(crate) shrunk: bool,
}

/// All of the simulated world below the executor.
pub(crate) struct Kernel {
    now: u64,
    events: BTreeMap<(u64, u64), (u64, Step)>,
    order: u64,
    operations: BTreeMap<u64, Operation>,
    /// By number of operation: when it completed, by the order of events.
    completed: Vec<u64>,
    hung: Vec<u64>,
    opened: Vec<Opened>,
    pub(crate) files: Vec<SimFile>,
    /// Bytes that they had at first.
    sizes: Vec<u64>,
    pub(crate) syncs: Vec<SyncRecord>,
    pub(crate) rules: Vec<Rule>,
    /// Faults have ceased, for all that looks for it.
    pub(crate) healed: bool,
    pub(crate) dice: Dice,
    latency: u64,
    slowness: Slowness,
    window: u64,
    evict: bool,
    pub(crate) calls: BTreeMap<u64, Call>,
    next_call: u64,
    /// The call whose future is being polled.
    pub(crate) current: Option<u64>,
    /// Operations in flight of each request.
    busy: BTreeMap<u64, u32>,
    pub(crate) trace: Trace,
    failure: Option<Failure>,
    /// After a power cut: nothing has an effect any more.
    dead: bool,
    turns: u64,
}

/// The kernel, shared by the engine and all that watch.
pub(crate) type Shared = Rc<RefCell<Kernel>>;

impl Kernel {
    /// A kernel with these files, that takes up to `latency` nanoseconds for each part of an operation, but for those
    /// that are slow, and hands out completions up to `window` nanoseconds late, together.
    pub(crate) fn new(
        files: Vec<SimFile>,
        dice: Dice,
        latency: u64,
        slowness: Slowness,
        window: u64,
        evict: bool,
    ) -> Kernel {
        Kernel {
            now: 0,
            events: BTreeMap::new(),
            order: 0,
            operations: BTreeMap::new(),
            completed: Vec::new(),
            hung: Vec::new(),
            opened: Vec::new(),
            syncs: files.iter().map(|_| SyncRecord::default()).collect(),
            sizes: files.iter().map(SimFile::len).collect(),
            files,
            rules: Vec::new(),
            healed: false,
            dice,
            latency,
            slowness,
            window,
            evict,
            calls: BTreeMap::new(),
            next_call: 0,
            current: None,
            busy: BTreeMap::new(),
            trace: Trace::default(),
            failure: None,
            dead: false,
            turns: 0,
        }
    }

    /// Opens a file: with O_DIRECT where an alignment is given.
    pub(crate) fn open(&mut self, file: usize, align: u64, memory_align: usize) -> Rc<Fd> {
        self.opened.push(Opened { file, align, memory_align });
        Fd::simulated(self.opened.len() as i32 - 1)
    }

    /// Nanoseconds since the start.
    pub(crate) fn now(&self) -> u64 {
        self.now
    }

    /// Notes what happened.
    pub(crate) fn note(&mut self, event: Event) {
        self.trace.add(self.now, event);
    }

    /// An oracle was contradicted; only the first time counts, the rest follows from it.
    pub(crate) fn fail(&mut self, oracle: &'static str, what: impl Into<String>) {
        if self.failure.is_none() && !self.dead {
            self.failure = Some(Failure { oracle, what: what.into() });
        }
    }

    /// As `fail`, for what is found when the world is over.
    pub(crate) fn fail_at_last(&mut self, oracle: &'static str, what: impl Into<String>) {
        self.dead = false;
        self.fail(oracle, what);
    }

    /// Somebody cuts a file off behind our back.
    pub(crate) fn truncate(&mut self, file: usize, len: u64) {
        let number = self.completed.len() as u64; // an operation of nobody's, done at once
        self.order += 1;
        self.completed.push(self.order);
        self.files[file].truncate(number, len);
        self.syncs[file].shrunk = true;
    }

    pub(crate) fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    /// Whether the run has ended, one way or the other: nothing is to be checked any more.
    pub(crate) fn is_over(&self) -> bool {
        self.dead || self.failure.is_some()
    }

    /// Operations of this request that the kernel has not completed.
    pub(crate) fn busy_with(&self, request: u64) -> u32 {
        self.busy.get(&request).copied().unwrap_or(0)
    }

    /// Operations that the kernel has not completed.
    pub(crate) fn in_flight(&self) -> usize {
        self.operations.len()
    }

    pub(crate) fn call(&mut self, request: Option<u64>) -> u64 {
        self.next_call += 1;
        self.calls.insert(self.next_call, Call { request, ..Call::default() });
        self.next_call
    }

    /// A storage between the disk and the file fails the call that is being polled.
    pub(crate) fn inject(&mut self, errno: Errno) {
        if let Some(call) = self.current.and_then(|call| self.calls.get_mut(&call)) {
            call.faults.push(Fault::Injected(errno));
        }
    }

    /// The call that is being polled got past the filters.
    pub(crate) fn passed(&mut self) {
        if let Some(call) = self.current.and_then(|call| self.calls.get_mut(&call)) {
            call.passed = true;
        }
    }

    /// Faults cease: what hangs goes on, and nothing goes wrong any more.
    pub(crate) fn heal(&mut self) {
        self.healed = true;
        self.rules.clear();
        for operation in std::mem::take(&mut self.hung) {
            self.at(self.now, operation, Step::Start);
        }
    }

    /// The power is cut: nothing in flight has any further effect. What is left of each file.
    pub(crate) fn cut_power(&mut self) -> Vec<SimFile> {
        let files = std::mem::take(&mut self.files);
        let left = files.into_iter().map(|file| file.crash(&mut self.dice)).collect();
        self.dead = true;
        self.rules.clear();
        self.hung.clear();
        self.events.clear();
        for operation in self.operations.values_mut() {
            operation.result = -i64::from(Errno::EIO.code());
        }
        let operations: Vec<u64> = self.operations.keys().copied().collect();
        for operation in operations {
            self.at(self.now, operation, Step::Finish);
        }
        left
    }

    fn at(&mut self, when: u64, operation: u64, step: Step) {
        self.order += 1;
        self.events.insert((when, self.order), (operation, step));
    }

    /// A moment a little later.
    fn soon(&mut self) -> u64 {
        self.now + TURN + self.dice.below(self.latency)
    }

    fn submit(&mut self, io: &Io, token: usize) {
        let span_of = |span: Span| (span.at(), span.len());
        let (kind, (at, len), buf) = match io {
            Io::Read { at, buf, .. } => (Kind::Read, (*at, buf.len() as u64), Some(buf)),
            Io::Write { at, buf, .. } => (Kind::Write, (*at, buf.len() as u64), Some(buf)),
            Io::Sync { .. } => (Kind::Sync, (0, 0), None),
            Io::Allocate { mode: Allocate::PunchHole, span, .. } => (Kind::Punch, span_of(*span), None),
            Io::Allocate { mode: Allocate::ZeroRange, span, .. } => (Kind::Zero, span_of(*span), None),
            Io::Seek { at, what: Seek::Data, .. } => (Kind::SeekData, (*at, 0), None),
            Io::Seek { at, what: Seek::Hole, .. } => (Kind::SeekHole, (*at, 0), None),
            Io::Seek { at, what: Seek::End, .. } => (Kind::SeekEnd, (*at, 0), None),
            Io::WillNeed { span, .. } => (Kind::WillNeed, span_of(*span), None),
            Io::Allocate { mode: Allocate::Reserve, .. }
            | Io::Truncate { .. }
            | Io::Receive { .. }
            | Io::Send { .. }
            | Io::Accept { .. }
            | Io::Poll { .. }
            | Io::Signal { .. } => (Kind::Other, (0, 0), None),
        };
        let handle = io.fd().simulated_number().expect("a simulated file") as usize;
        let Opened { file, align, memory_align } = self.opened[handle];
        if let Some(buf) = buf
            && align > 1
            && (!(at | len).is_multiple_of(align) || !buf.is_aligned(memory_align))
        {
            self.fail(
                "O3",
                format!("misaligned direct I/O: {kind:?} {at}+{len} of {buf:?}, alignment {align}"),
            );
        }
        let call = self.current;
        let request = call.and_then(|call| self.calls.get(&call)).and_then(|call| call.request);
        if let Some(request) = request {
            *self.busy.entry(request).or_default() += 1;
        }
        let number = self.completed.len() as u64;
        self.completed.push(u64::MAX);
        self.order += 1;
        let operation = Operation {
            token,
            handle,
            kind,
            at,
            len,
            buf: buf.map(block::Buf::downgrade),
            fd: Rc::downgrade(io.fd()),
            call,
            request,
            submitted: self.order,
            ruled: false,
            result: 0,
        };
        self.operations.insert(number, operation);
        self.note(Event::Submitted { operation: number, call, file, kind, at, len });
        if self.dead {
            let operation = self.operations.get_mut(&number).expect("just inserted");
            operation.result = -i64::from(Errno::EIO.code());
            self.at(self.now, number, Step::Finish);
        } else {
            let when = self.soon() + self.slower(file, kind);
            self.at(when, number, Step::Start);
        }
    }

    /// How much later than others an operation starts that is one of the slow ones: any of the first file's reads and
    /// writes may be.
    fn slower(&mut self, file: usize, kind: Kind) -> u64 {
        let Slowness { percent, nanoseconds } = self.slowness;
        let may_be = file == 0 && matches!(kind, Kind::Read | Kind::Write) && !self.healed;
        if may_be && self.dice.percent(percent) { self.dice.below(nanoseconds) } else { 0 }
    }

    /// Decides what will come of an operation, and when its parts happen.
    fn start(&mut self, number: u64) {
        let Operation { handle, kind, at, len, ruled, .. } = self.operations[&number];
        let file = self.opened[handle].file;
        let action = if ruled {
            None
        } else {
            self.rules.iter_mut().find_map(|rule| rule.hits(file, kind, at, len).then_some(rule.action))
        };
        self.operations.get_mut(&number).expect("in flight").ruled = true;
        let mut most = len;
        match action {
            Some(Action::Hang) => {
                self.hung.push(number);
                return;
            }
            Some(Action::Delay(nanoseconds)) => {
                self.at(self.now + nanoseconds, number, Step::Start);
                return;
            }
            Some(Action::Fail(errno)) => return self.fail_operation(number, errno),
            Some(Action::AtMost(bytes)) => most = bytes.min(len),
            Some(Action::Without(bytes)) => most = len.saturating_sub(bytes).max(1).min(len),
            None => {}
        }
        let code = |errno: Errno| -i64::from(errno.code());
        let found = |found: Result<u64, Errno>| found.map_or_else(code, |at| at as i64);
        let file = &mut self.files[file];
        let span = Span::new(at, len).expect("what is submitted lies within a file");
        let (result, moved) = match kind {
            Kind::Read => {
                let moved = file.readable(at, most);
                (moved as i64, moved)
            }
            Kind::Write => match file.allocate(at, most, true) {
                0 if most > 0 => (code(Errno::ENOSPC), 0),
                moved => (moved as i64, moved),
            },
            Kind::Sync => {
                let when = self.soon();
                self.at(when, number, Step::Sync);
                let after = when + self.dice.below(self.latency);
                self.at(after, number, Step::Finish);
                return;
            }
            Kind::Punch if !file.can_punch => (code(Errno::EOPNOTSUPP), 0),
            Kind::Zero if !file.can_zero => (code(Errno::EOPNOTSUPP), 0),
            Kind::Punch => (0, len),
            Kind::Zero => match file.allocate(at, len, false) {
                got if got == len => (0, len),
                got => (code(Errno::ENOSPC), got),
            },
            Kind::SeekData => (found(file.next_data(at)), 0),
            Kind::SeekHole => (found(file.next_hole(at)), 0),
            Kind::SeekEnd => (file.len() as i64, 0),
            Kind::WillNeed => (0, 0),
            Kind::Other => (code(Errno::EOPNOTSUPP), 0),
        };
        debug_assert!(span.len() >= moved);
        self.operations.get_mut(&number).expect("in flight").result = result;
        self.move_in_pieces(number, moved, 100);
    }

    /// It will fail with this errno; of its bytes some may have been moved all the same.
    fn fail_operation(&mut self, number: u64, errno: Errno) {
        let operation = self.operations.get_mut(&number).expect("in flight");
        operation.result = -i64::from(errno.code());
        let (kind, at, len, handle) = (operation.kind, operation.at, operation.len, operation.handle);
        let begun = !matches!(errno, Errno::EINTR | Errno::EAGAIN);
        let file = self.opened[handle].file;
        match kind {
            Kind::Sync if begun => {
                let when = self.soon();
                self.at(when, number, Step::Sync);
                self.at(when, number, Step::Finish);
            }
            Kind::Read if begun => {
                let moved = self.files[file].readable(at, len);
                self.move_in_pieces(number, moved, 50);
            }
            Kind::Write if begun && self.files[file].has_space(at, len) => {
                self.move_in_pieces(number, len, 50);
            }
            Kind::Read
            | Kind::Write
            | Kind::Sync
            | Kind::Punch
            | Kind::Zero
            | Kind::SeekData
            | Kind::SeekHole
            | Kind::SeekEnd
            | Kind::WillNeed
            | Kind::Other => {
                let when = self.soon();
                self.at(when, number, Step::Finish);
            }
        }
    }

    /// Moves the first `len` bytes in up to four pieces, each at a moment of its own, the last of them perhaps when
    /// the operation completes; each piece with a chance of so many percent.
    fn move_in_pieces(&mut self, number: u64, len: u64, percent: u64) {
        let mut last = self.soon();
        let pieces = if len > SECTOR { self.dice.between(1, 4) } else { 1 };
        let step = (len / pieces).next_multiple_of(SECTOR).max(1);
        let mut from = 0;
        while from < len {
            let piece = step.min(len - from);
            if percent == 100 || self.dice.percent(percent) {
                let when = self.soon();
                last = last.max(when);
                self.at(when, number, Step::Move { from, len: piece });
            }
            from += piece;
        }
        let after = if self.dice.percent(50) { last } else { last + self.dice.below(self.latency) };
        self.at(after, number, Step::Finish);
    }

    fn step(&mut self, number: u64, step: Step, done: &mut Vec<(usize, i64)>) {
        match step {
            Step::Start => self.start(number),
            Step::Move { from, len } => self.move_bytes(number, from, len),
            Step::Sync => self.sync(number),
            Step::Finish => self.finish(number, done),
            Step::Evict => self.files[number as usize].evict(),
        }
    }

    fn move_bytes(&mut self, number: u64, from: u64, len: u64) {
        self.note(Event::Moved { operation: number, from, len });
        let operation = &self.operations[&number];
        let file = &mut self.files[self.opened[operation.handle].file];
        let at = operation.at + from;
        let span = Span::new(at, len).expect("within the operation");
        match operation.kind {
            Kind::Read | Kind::Write => {
                let Some(buf) = operation.buf.as_ref().and_then(WeakBuf::upgrade) else {
                    return self
                        .fail("O1", format!("operation {number}: its memory was freed while in flight"));
                };
                if operation.kind == Kind::Read {
                    buf.put(from as usize, &file.read(at, len));
                } else {
                    file.write(number, at, &buf.slice(from as usize, len as usize).to_vec());
                }
            }
            Kind::Punch => {
                file.clear(number, at, len);
                file.release(span);
            }
            Kind::Zero => {
                file.clear(number, at, len);
                file.unwrite(span);
            }
            Kind::Sync | Kind::SeekData | Kind::SeekHole | Kind::SeekEnd | Kind::WillNeed | Kind::Other => {}
        }
    }

    fn sync(&mut self, number: u64) {
        let operation = &self.operations[&number];
        let file = self.opened[operation.handle].file;
        let (completed, submitted) = (&self.completed, operation.submitted);
        // What completed before the sync was submitted is covered by it, and nothing else surely is.
        let covered = |writer: u64| completed[writer as usize] < submitted;
        if operation.result >= 0 {
            self.files[file].sync(covered);
        } else {
            self.files[file].lose(covered, &mut self.dice);
            self.syncs[file].failed = true;
            // Not before whoever waits for the sync has been told: until then nobody can know better.
            if self.evict && self.opened[operation.handle].align == 1 {
                let when = self.soon() + self.latency + self.window;
                self.at(when, file as u64, Step::Evict);
            }
        }
    }

    fn finish(&mut self, number: u64, done: &mut Vec<(usize, i64)>) {
        let Some(operation) = self.operations.remove(&number) else { return };
        self.order += 1;
        self.completed[number as usize] = self.order;
        let Operation { token, kind, len, result, call, request, handle, .. } = operation;
        self.note(Event::Completed { operation: number, result });
        if operation.fd.upgrade().is_none() || operation.buf.is_some_and(|buf| buf.upgrade().is_none()) {
            self.fail("O1", format!("operation {number}: its file or memory was freed while in flight"));
        }
        if let Some(request) = request {
            match self.busy.get_mut(&request) {
                Some(count) if *count > 1 => *count -= 1,
                Some(_) | None => drop(self.busy.remove(&request)),
            }
        }
        let moves = matches!(kind, Kind::Read | Kind::Write);
        let fault = match Errno::from_name_of(result) {
            Some(errno) => Some(Fault::Errno(kind, errno)),
            None if moves && result == 0 && len > 0 => Some(Fault::Nothing),
            None if moves && (result as u64) < len => Some(Fault::Short),
            None if kind == Kind::SeekEnd && (result as u64) < self.sizes[self.opened[handle].file] => {
                Some(Fault::Shrunk)
            }
            None => None,
        };
        if let (Some(fault), Some(call)) = (fault, call.and_then(|call| self.calls.get_mut(&call))) {
            call.faults.push(fault);
        }
        if let (Some(Fault::Errno(Kind::Sync | Kind::SeekEnd, errno)), false) = (fault, self.dead) {
            // To be interrupted is no reason for anything but to try again.
            if errno != Errno::EINTR {
                self.syncs[self.opened[handle].file].errors.insert(errno);
            }
        }
        done.push((token, result));
    }

    /// Lets the next thing happen, if it is due by then.
    fn happen(&mut self, until: u64, done: &mut Vec<(usize, i64)>) -> bool {
        let Some((&key @ (when, _), &(number, step))) = self.events.first_key_value() else { return false };
        if when > until {
            return false;
        }
        self.events.remove(&key);
        self.now = self.now.max(when);
        self.step(number, step, done);
        true
    }

    fn turn(&mut self, wait: Wait, done: &mut Vec<(usize, i64)>) {
        self.turns += 1;
        if self.turns == TURNS_MAX || (self.now > TIME_MAX && !self.dead) {
            self.fail("O4", "the run goes round in circles");
            drop(self.cut_power());
        }
        assert!(self.turns < 2 * TURNS_MAX, "the run goes round in circles, even without power");
        let until = match wait {
            Wait::No => self.now + TURN,
            Wait::Until(Some(Instant(deadline))) => deadline.max(self.now),
            Wait::Until(None) => u64::MAX,
        };
        while done.is_empty() && self.happen(until, done) {}
        if done.is_empty() {
            if until == u64::MAX {
                // Only what hangs is left; at the very end even that comes to an end.
                assert!(!self.hung.is_empty(), "everybody waits and nothing will ever happen");
                self.heal();
                return;
            }
            self.now = until;
        } else {
            // Several completions may be found at once, in any order.
            let late = self.now.saturating_add(self.window).min(until);
            while self.happen(late, done) {}
            self.dice.shuffle(done);
        }
    }
}

/// How a kernel's result is told apart from a count, on purpose not the way that the code under test does it.
trait FromResult: Sized {
    fn from_name_of(result: i64) -> Option<Self>;
}

impl FromResult for Errno {
    fn from_name_of(result: i64) -> Option<Errno> {
        if result >= 0 { None } else { Errno::new((0 - result) as i32) }
    }
}

/// The simulated kernel as the executor's engine.
pub(crate) struct SimEngine(pub(crate) Shared);

impl Engine for SimEngine {
    fn register_file(&mut self, _fd: BorrowedFd<'_>) -> Option<u32> {
        None
    }

    fn forget_file(&mut self, _index: u32) {}

    #[allow(unsafe_code)] // nothing is registered
    unsafe fn register_memory(&mut self, _memory: Segment) -> Result<u16, Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    fn forget_memory(&mut self, _index: u16) {}

    #[allow(unsafe_code)] // the promise is kept by the caller; here it is checked, not relied on
    unsafe fn submit(&mut self, io: &Io, token: usize) {
        self.0.borrow_mut().submit(io, token);
    }

    fn cancel(&mut self, _token: usize) {}

    fn turn(&mut self, wait: Wait, _idle: &dyn Idle, done: &mut Vec<(usize, i64)>) {
        self.0.borrow_mut().turn(wait, done);
    }

    fn now(&self) -> Instant {
        Instant(self.0.borrow().now)
    }

    fn unpark(&self) -> Arc<dyn Fn() + Send + Sync> {
        Arc::new(|| {}) // one thread: nobody is asleep while anybody unparks
    }
}
