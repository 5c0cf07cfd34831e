//! One disk under test: what was asked of it, what its storage told it, and what it may therefore answer.
//!
//! The oracles O1 to O4 of FAILURES D.1 are here. They know the promises, not the code that keeps them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use block::{Errno, Error, Op, OpKind, Payload, Span};
use disk::{Disk, GiveUp, OnError, Policy};

use crate::dice::Dice;
use crate::fate::{Fate, fate, hard};
use crate::kernel::{Call, Fault, Shared};
use crate::model::{Content, Model, WriteId};
use crate::scattered::Layout;
use crate::stops::Stops;
use crate::trace::Event;

/// What the executor may take from one event to what follows from it, in virtual time.
const PROMPT: u64 = 5_000_000;
/// A short count without a step forward is repeated, but not for ever.
const SHORTS_MAX: usize = 16;

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

    /// The disk answers a request; `bytes` are those of its read.
    pub(crate) fn answered(
        &self,
        request: u64,
        result: &Result<Payload, Errno>,
        bytes: impl FnOnce() -> Vec<u8>,
    ) {
        let code = result.as_ref().map_or_else(|errno| errno.code(), |_| 0);
        if self.is_over() {
            return;
        }
        self.kernel.borrow_mut().note(Event::Answered { request, code });
        let state = &mut *self.state.borrow_mut();
        let Some(asked) = state.asked.remove(&request) else {
            return self.fail("O1", format!("request {request} was answered twice, or never made"));
        };
        state.answered += 1;
        let busy = self.kernel.borrow().busy_with(request);
        if busy > 0 {
            self.fail(
                "O1",
                format!("request {request} was answered while {busy} of its operations are in flight"),
            );
        }
        if let Err((oracle, what)) = self.judge(state, request, &asked, result) {
            let kind = asked.kind.name();
            self.fail(
                oracle,
                format!(
                    "request {request} ({kind} {:?}) was answered {result:?}: {what} (its storage told {:?})",
                    asked.span, asked.told
                ),
            );
        }
        let ok = result.is_ok();
        let truth = match asked.kind {
            OpKind::Read => state.model.read_answered(request, ok.then(bytes).as_deref()),
            OpKind::Status => self.check_runs(state, request, asked.span, result),
            OpKind::Flush => {
                state.model.flush_answered(request, ok);
                if ok { self.check_durable(state) } else { Ok(()) }
            }
            OpKind::Write | OpKind::Discard | OpKind::WriteZeroes => {
                if let Some(write) = asked.write {
                    let settles = ok && asked.kind != OpKind::Discard;
                    state.model.write_answered(write, settles, asked.fua);
                }
                if ok && asked.fua && asked.refusal.is_none() { self.check_durable(state) } else { Ok(()) }
            }
            OpKind::Prefetch => Ok(()),
        };
        if let Err(what) = truth {
            self.fail("O2", format!("request {request} ({} {:?}): {what}", asked.kind.name(), asked.span));
        }
        self.check_counts(state);
    }

    /// The disk leaves a request to a successor.
    pub(crate) fn left(&self, request: u64) {
        if self.is_over() {
            return;
        }
        self.kernel.borrow_mut().note(Event::Left { request });
        let state = &mut *self.state.borrow_mut();
        let Some(asked) = state.asked.remove(&request) else {
            return self.fail("O1", format!("request {request} was left after its end, or never made"));
        };
        state.left += 1;
        let busy = self.kernel.borrow().busy_with(request);
        if busy > 0 {
            self.fail(
                "O1",
                format!("request {request} was left while {busy} of its operations are in flight"),
            );
        }
        let may_wait = match asked.told {
            Some((Told::Err { errno, lasting }, at)) => {
                fate(errno, lasting, asked.kind, at - asked.at, &self.setup.policy) != Fate::Answered
            }
            Some((Told::Ok, _)) | None => false,
        };
        if !may_wait || !matches!(state.stops.of(request), Some((GiveUp::Leave, _))) {
            let kind = asked.kind.name();
            self.fail(
                "O4",
                format!("request {request} ({kind}) was left, its storage told {:?}", asked.told),
            );
        }
        if let Some((_, at)) = asked.told
            && let Err((oracle, what)) = self.check_prompt_end(state, request, at)
        {
            self.fail(oracle, format!("request {request} was left {what}"));
        }
        if let Some(write) = asked.write {
            state.model.write_answered(write, false, false);
        }
        if asked.kind == OpKind::Read
            && let Err(what) = state.model.read_answered(request, None)
        {
            self.fail("sim", what);
        }
        self.check_counts(state);
    }

    /// Whether a request that waited, after it failed at this time, ends as soon as its session is being stopped.
    fn check_prompt_end(
        &self,
        state: &State,
        request: u64,
        failed: u64,
    ) -> Result<(), (&'static str, String)> {
        match state.stops.of(request) {
            Some((_, since)) if !self.setup.impatient && self.now() > since.max(failed) + PROMPT => {
                let late = (self.now() - since.max(failed)) / 1_000_000;
                Err(("O4", format!("{late} ms after its session was to stop")))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// A guest stops its session.
    pub(crate) fn stops(&self, guest: u64, how: GiveUp) {
        let now = self.now();
        let what = match how {
            GiveUp::Tell => "stops its session, guest",
            GiveUp::Leave => "stops its session and leaves, guest",
        };
        self.kernel.borrow_mut().note(Event::Script { what, number: guest });
        self.state.borrow_mut().stops.begin(guest, how, now);
    }

    /// A guest's session has stopped.
    pub(crate) fn stopped(&self, guest: u64) {
        if self.is_over() {
            return;
        }
        self.kernel
            .borrow_mut()
            .note(Event::Script { what: "its session has stopped, guest", number: guest });
        let mut state = self.state.borrow_mut();
        state.stops.end(guest);
        let open = state.asked.keys().filter(|request| Stops::is_of(**request, guest)).count();
        if open > 0 {
            self.fail("O1", format!("the session of guest {guest} has stopped with {open} requests open"));
        }
    }

    fn judge(
        &self,
        state: &State,
        request: u64,
        asked: &Asked,
        result: &Result<Payload, Errno>,
    ) -> Result<(), (&'static str, String)> {
        let now = self.now();
        let wrong = |oracle, what: &str| Err((oracle, what.to_owned()));
        if let Some(refusal) = asked.refusal {
            return match result {
                Err(errno) if *errno == refusal && asked.calls == 0 => Ok(()),
                Err(_) | Ok(_) => wrong("O3", &format!("it should have been refused with {refusal}")),
            };
        }
        let late = now - asked.at;
        if self.setup.bound > 0 && late > self.setup.bound {
            return wrong(
                "O4",
                &format!("after {} ms, on a disk that nothing is wrong with", late / 1_000_000),
            );
        }
        match result {
            Ok(_) if asked.is_empty() => Ok(()),
            Ok(_) if asked.kind == OpKind::Flush => {
                if state.flushed > asked.order {
                    Ok(())
                } else {
                    wrong("O2", "no flush of its storage has begun and succeeded since it was asked")
                }
            }
            Ok(_) => match asked.told {
                None => wrong("O2", "its storage was never called"),
                Some((Told::Err { errno, .. }, _)) => wrong("O3", &format!("the error {errno} was lost")),
                Some((Told::Ok, _)) if asked.fua => {
                    if state.flushed > asked.told_order {
                        Ok(())
                    } else {
                        wrong("O2", "it should be durable, but no flush followed")
                    }
                }
                Some((Told::Ok, at)) if now - at > PROMPT && !self.setup.impatient => {
                    wrong("O4", &format!("{} ms after it was done", (now - at) / 1_000_000))
                }
                Some((Told::Ok, _)) => Ok(()),
            },
            Err(Errno::EIO) if state.panics > 0 || state.exiting => Ok(()),
            Err(errno) => {
                let flushed =
                    asked.kind == OpKind::Flush || (asked.fua && matches!(asked.told, Some((Told::Ok, _))));
                if flushed {
                    return if state.flush_errors.contains(errno) {
                        Ok(())
                    } else {
                        wrong("O3", &format!("no flush failed so, only with {:?}", state.flush_errors))
                    };
                }
                match asked.told {
                    None => wrong("O3", "its storage was never called"),
                    Some((Told::Ok, _)) => wrong("O3", "its storage had done it"),
                    Some((Told::Err { errno: told, .. }, _)) if told != *errno => {
                        wrong("O3", &format!("the error was {told}"))
                    }
                    Some((Told::Err { errno, lasting }, at)) => {
                        let policy = self.policy(state);
                        match fate(errno, lasting, asked.kind, at - asked.at, &policy) {
                            Fate::Answered
                                if now - at > PROMPT && !self.setup.impatient && !state.closing =>
                            {
                                wrong("O4", &format!("{} ms after it failed", (now - at) / 1_000_000))
                            }
                            Fate::Answered => Ok(()),
                            // What is held is let go of when the disk is closed or fenced.
                            Fate::TriedAgain | Fate::Held if state.closing || state.panics > 0 => Ok(()),
                            Fate::TriedAgain | Fate::Held
                                if matches!(state.stops.of(request), Some((GiveUp::Tell, _))) =>
                            {
                                self.check_prompt_end(state, request, at)
                            }
                            fate @ (Fate::TriedAgain | Fate::Held) => {
                                wrong("O4", &format!("policy {policy:?} wants it {fate:?}"))
                            }
                        }
                    }
                }
            }
        }
    }

    /// A disk that is being closed reports.
    fn policy(&self, state: &State) -> Policy {
        if state.closing { Policy { on_error: OnError::Report, on_enospc: None } } else { self.setup.policy }
    }

    fn check_runs(
        &self,
        state: &mut State,
        request: u64,
        span: Option<Span>,
        result: &Result<Payload, Errno>,
    ) -> Result<(), String> {
        let (Ok(Payload::Runs(runs)), Some(span)) = (result, span) else {
            return match result {
                Ok(_) if !span.is_some_and(Span::is_empty) => Err("it tells no runs".into()),
                Ok(_) | Err(_) => state.model.zeroes_told(request, &[]),
            };
        };
        let mut zeroes = Vec::new();
        let mut at = span.at();
        for run in runs {
            let told = Span::new(at, run.len).filter(|run| run.end() <= span.end() && !run.is_empty());
            let Some(told) = told else { return Err(format!("runs {runs:?} do not fit")) };
            if run.zero {
                zeroes.push(told);
            }
            at = told.end();
        }
        if at == span.at() {
            return Err("it tells no runs".into());
        }
        state.model.zeroes_told(request, &zeroes)
    }

    /// A guest was told that something is durable: look at once whether the guests' truth is.
    fn check_durable(&self, state: &State) -> Result<(), String> {
        let kernel = self.kernel.borrow();
        let file = &kernel.files[self.setup.file];
        // Looking at all of a large disk each time would take most of the time.
        let often = if file.len() <= 256 << 10 { 1 } else { 3 };
        if self.dice.borrow_mut().below(often) > 0 {
            return Ok(());
        }
        let disk = self.setup.layout.disk_of(file.durable());
        state
            .model
            .check_durable(&disk)
            .map_err(|what| format!("told durable, but a power cut now would leave: {what}"))
    }

    fn check_counts(&self, state: &State) {
        let Some(disk) = &state.disk else { return };
        let stats = disk.stats();
        let in_flight = stats.in_flight + stats.held;
        let State { made, answered, left, .. } = state;
        if (stats.accepted, stats.answered, stats.left) != (*made, *answered, *left)
            || in_flight != made - answered - left
        {
            self.fail(
                "O1",
                format!("{made} made, {answered} answered, {left} left, but the disk counts {stats}"),
            );
        }
        let failing = state
            .asked
            .values()
            .filter(|asked| !asked.calling && matches!(asked.told, Some((Told::Err { .. }, _))))
            .count() as u64;
        if stats.held > failing {
            self.fail("O4", format!("{} requests are held, only {failing} of them fail", stats.held));
        }
        if stats.lost > state.panics && !state.exiting {
            self.fail("O1", format!("{} requests were lost", stats.lost));
        }
    }

    /// The disk calls its storage; names the call.
    pub(crate) fn called(&self, kind: OpKind, span: Span, memory: usize) -> u64 {
        let now = self.now();
        let state = &mut *self.state.borrow_mut();
        state.order += 1;
        if kind == OpKind::Flush {
            state.flush_calls += 1;
            return self.begin(None, kind);
        }
        // Nobody asks the same twice at once (`is_asked`), so that this names one request.
        let found = state.asked.iter_mut().find(|(_, asked)| {
            asked.kind == kind && asked.span == Some(span) && asked.memory == memory && !asked.calling
        });
        let Some((&request, asked)) = found else {
            if !self.is_over() && !state.exiting {
                self.fail("O2", format!("a {} of {span:?} that no guest asked for", kind.name()));
            }
            return self.begin(None, kind);
        };
        asked.calling = true;
        asked.calls += 1;
        if asked.calls == 1 && now - asked.at > PROMPT {
            let late = (now - asked.at) / 1_000_000;
            self.fail("O4", format!("request {request} was looked at only after {late} ms"));
        }
        if let (Some((Told::Err { errno, lasting }, at)), Some(closed)) = (asked.told, state.closing_since)
            && at + PROMPT < closed
            && closed + PROMPT < now
            && fate(errno, lasting, kind, at - asked.at, &self.setup.policy) == Fate::Held
        {
            self.fail(
                "O4",
                format!("request {request} was held when the disk was closed, and is tried again"),
            );
        }
        if let (Some((Told::Err { errno, .. }, _)), Some((_, since))) = (asked.told, state.stops.of(request))
            && since + PROMPT < now
        {
            let what =
                format!("request {request} failed with {errno} and is tried again for a session that stops");
            self.fail("O4", what);
        }
        if let Some((told, at)) = asked.told {
            let policy = if state.closing {
                None // it may have been told to try again before
            } else {
                Some(self.setup.policy)
            };
            let age = at - asked.at;
            match (told, policy) {
                (Told::Ok, _) => self.fail("O2", format!("request {request} was done, and is done again")),
                (Told::Err { errno, lasting }, Some(policy)) => {
                    if fate(errno, lasting, kind, age, &policy) == Fate::Answered {
                        let what = format!("request {request} failed with {errno} and was tried again");
                        self.fail("O4", what);
                    }
                }
                (Told::Err { errno, lasting }, None) => {
                    if lasting {
                        self.fail("O4", format!("request {request}: {errno} lasts, but was tried again"));
                    }
                }
            }
        }
        self.begin(Some(request), kind)
    }

    fn begin(&self, request: Option<u64>, kind: OpKind) -> u64 {
        let mut kernel = self.kernel.borrow_mut();
        let call = kernel.call(request);
        kernel.note(Event::Called { call, request, kind });
        call
    }

    /// Where in the order of things a call begins.
    pub(crate) fn order(&self) -> u64 {
        self.state.borrow().order
    }

    /// A call has returned.
    pub(crate) fn returned(
        &self,
        call: u64,
        kind: OpKind,
        begun: u64,
        poison_before: Option<Errno>,
        result: Result<(), &Error>,
    ) {
        let now = self.now();
        let code = result.map_or_else(|error| error.errno().code(), |()| 0);
        let call_state = {
            let mut kernel = self.kernel.borrow_mut();
            kernel.note(Event::Returned { call, code });
            kernel.calls.remove(&call).unwrap_or_default()
        };
        if self.is_over() {
            return;
        }
        let state = &mut *self.state.borrow_mut();
        state.order += 1;
        let judged = self.judge_call(state, &call_state, kind, poison_before, result);
        if let Err((oracle, what)) = judged {
            let request =
                call_state.request.map_or_else(|| "a flush".into(), |request| format!("request {request}"));
            self.fail(
                oracle,
                format!(
                    "{request} ({}): its storage gave {result:?}: {what} (its operations: {:?})",
                    kind.name(),
                    call_state.faults
                ),
            );
        }
        let told = match result {
            Ok(()) => Told::Ok,
            Err(error) => Told::Err { errno: error.errno(), lasting: error.is_lasting() },
        };
        if kind == OpKind::Flush {
            match told {
                Told::Ok => state.flushed = state.flushed.max(begun),
                Told::Err { errno, .. } => {
                    state.poison = state.poison.or(Some(errno));
                    state.flush_errors.insert(errno);
                }
            }
        }
        if let Told::Err { errno, lasting: true } = told {
            state.poison = state.poison.or(Some(errno));
        }
        let order = state.order;
        if let Some(asked) = call_state.request.and_then(|request| state.asked.get_mut(&request)) {
            asked.calling = false;
            asked.told = Some((told, now));
            asked.told_order = order;
            state.flushes_due += u64::from(asked.fua && told == Told::Ok);
        }
    }

    /// The error that the next change must fail with.
    pub(crate) fn poison(&self) -> Option<Errno> {
        self.state.borrow().poison
    }

    fn judge_call(
        &self,
        state: &State,
        call: &Call,
        kind: OpKind,
        poison_before: Option<Errno>,
        result: Result<(), &Error>,
    ) -> Result<(), (&'static str, String)> {
        let kernel = self.kernel.borrow();
        let sync = &kernel.syncs[self.setup.file];
        let Call { request, faults, passed } = call;
        let hard: Vec<Errno> = faults.iter().filter_map(hard).collect();
        let poisons = kind == OpKind::Flush || kind.changes() || (kind == OpKind::Read && !self.setup.direct);
        match result {
            Ok(()) if !passed => Err(("O2", "success without its image being called".into())),
            Ok(()) if poisons && poison_before.is_some() && !self.setup.read_only => {
                Err(("O3", format!("success after a sync had failed with {poison_before:?}")))
            }
            Ok(()) if kind == OpKind::Read && !self.setup.direct && state.poison.is_some() => {
                Err(("O3", format!("success although a sync has failed meanwhile with {:?}", state.poison)))
            }
            Ok(()) if kind == OpKind::Flush => {
                if faults.contains(&Fault::Shrunk) && !self.setup.read_only {
                    Err(("O2", "success although the file has shrunk".into()))
                } else if sync.failed && !self.setup.read_only {
                    Err(("O2", format!("success after a sync failed: {:?}", sync.errors)))
                } else {
                    Ok(())
                }
            }
            Ok(()) if hard.is_empty() => Ok(()),
            Ok(()) => Err(("O3", "success although an operation of its own failed".into())),
            Err(error) if error.is_lasting() => {
                let errno = error.errno();
                let justified = match poison_before {
                    Some(poison) => poison == errno,
                    None => {
                        (!passed && self.setup.filters.contains(&errno))
                            || sync.errors.contains(&errno)
                            || (errno == Errno::EIO && (sync.shrunk || sync.given_up))
                    }
                };
                if poisons && justified {
                    Ok(())
                } else {
                    let known = &sync.errors;
                    Err(("O3", format!("poison is {poison_before:?}, syncs failed with {known:?}")))
                }
            }
            Err(_) if kind == OpKind::Flush => Err(("O3", "a failed sync must last".into())),
            Err(error) => {
                let errno = error.errno();
                let shorts = faults.iter().filter(|fault| **fault == Fault::Short).count();
                let fast =
                    request.and_then(|request| state.asked.get(&request)).is_some_and(|asked| asked.fast);
                let derived = (!passed && self.setup.filters.contains(&errno))
                    || (errno == Errno::EIO && shorts >= SHORTS_MAX)
                    || (errno == Errno::EOPNOTSUPP && fast)
                    || (errno == Errno::EROFS && self.setup.read_only);
                // Of several the gravest, and of equals the first.
                let gravest = hard.iter().map(|errno| errno.severity()).max();
                let right = hard.contains(&errno) && Some(errno.severity()) == gravest;
                if right || derived {
                    Ok(())
                } else {
                    Err(("O3", "no operation of its own failed so".into()))
                }
            }
        }
    }

    /// The future of a call was dropped before its end.
    pub(crate) fn given_up(&self, call: u64, kind: OpKind) {
        let request = {
            let mut kernel = self.kernel.borrow_mut();
            if kind == OpKind::Flush {
                let file = self.setup.file;
                kernel.syncs[file].given_up = true;
            }
            kernel.calls.get(&call).and_then(|call| call.request)
        };
        let mut state = self.state.borrow_mut();
        if let Some(asked) = request.and_then(|request| state.asked.get_mut(&request)) {
            asked.calling = false;
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

    /// The disk is about to be closed.
    pub(crate) fn closes(&self) {
        let now = self.now();
        let mut state = self.state.borrow_mut();
        state.closing = true;
        state.closing_since = Some(now);
        state.flushes_due += 1;
    }

    /// The process is about to end without closing its disks.
    pub(crate) fn exits(&self) {
        self.state.borrow_mut().exiting = true;
    }

    /// The file lost its end.
    pub(crate) fn lost(&self, gone: Span) {
        let whole = Span::new(0, self.setup.size).expect("a small disk");
        for (part, at) in self.setup.layout.parts(whole) {
            if Span::new(at, part.len()).is_some_and(|place| place.overlaps(gone)) {
                self.state.borrow_mut().model.lost(part);
            }
        }
    }

    /// The oldest requests that are not answered, for the report.
    pub(crate) fn unanswered(&self) -> String {
        let now = self.now();
        let state = self.state.borrow();
        let mut texts: Vec<String> = state
            .asked
            .iter()
            .take(5)
            .map(|(request, asked)| {
                let age = (now - asked.at) / 1_000_000;
                format!(
                    "request {request} ({} {:?}), {age} ms old, told {:?}",
                    asked.kind.name(),
                    asked.span,
                    asked.told
                )
            })
            .collect();
        if let Some(disk) = &state.disk {
            texts.push(disk.stats().to_string());
        }
        texts.join("; ")
    }

    /// `Disk::close` has returned.
    pub(crate) fn closed(&self, result: Result<(), &Error>) {
        if self.is_over() {
            return;
        }
        let state = &mut *self.state.borrow_mut();
        if !state.asked.is_empty() {
            self.fail("O1", format!("closed with {} requests unanswered", state.asked.len()));
        }
        match (result, state.poison) {
            (Err(error), _) if state.panics > 0 && error.errno() == Errno::EIO => {}
            (result, _) if state.panics > 0 => {
                self.fail("O3", format!("closed with {result:?} after a driver panicked"));
            }
            (Ok(()), Some(poison)) if !self.setup.read_only => {
                self.fail("O2", format!("closed well although a flush had failed with {poison}"));
            }
            (Err(error), poison) if poison != Some(error.errno()) => {
                self.fail("O3", format!("closed with {error}, poison is {poison:?}"));
            }
            (Ok(()), _) => {
                if let Err(what) = self.check_closed(state) {
                    self.fail("O2", format!("closed well, but {what}"));
                }
            }
            (Err(_), _) => {}
        }
        if state.flush_calls != state.flushes_due && state.panics == 0 {
            self.fail(
                "O2",
                format!(
                    "{} flushes of the storage for {} requests that need one",
                    state.flush_calls, state.flushes_due
                ),
            );
        }
    }

    /// All that was answered must be durable after a good close.
    fn check_closed(&self, state: &State) -> Result<(), String> {
        let kernel = self.kernel.borrow();
        if self.setup.read_only {
            return Ok(());
        }
        state.model.check_live(&self.setup.layout.disk_of(kernel.files[self.setup.file].durable()))
    }

    /// What holds when everything is over: no request is left, counts agree.
    pub(crate) fn finish(&self) {
        if self.is_over() {
            return;
        }
        let state = self.state.borrow();
        if !state.asked.is_empty() {
            self.fail("O1", format!("{} requests were never answered", state.asked.len()));
        }
        self.check_counts(&state);
    }

    /// Whether the disk may read so after the process has ended, by power cut or not.
    pub(crate) fn check_content(&self, bytes: &[u8], after_power_cut: bool) -> Result<(), String> {
        let lost = self.kernel.borrow().syncs[self.setup.file].failed;
        let state = self.state.borrow();
        if after_power_cut || lost { state.model.check_durable(bytes) } else { state.model.check_live(bytes) }
    }

    /// Forgets the disk, which keeps the executor alive.
    pub(crate) fn forget_disk(&self) {
        self.state.borrow_mut().disk = None;
    }
}
