//! Files in memory whose operations take their time, in an order drawn from a seed; what they did is written down.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::task::Waker;

use block::{Buf, Errno, Span};
use image::metadata::Change;

use super::bytes::{Bytes, SECTOR};
use crate::dice::Dice;

/// Turns of one life after which it is believed to go round in circles.
const TURNS_MAX: u64 = 200_000;
/// Begins of rounds that a ledger can tell from each other. A real one has a few more, and seldom needs them.
const CUTS_MAX: usize = 1;

/// What an operation does to its file.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Read,
    Write(Rc<[u8]>),
    Zero,
    Discard,
    /// Makes it so many bytes long.
    Resize(u64),
    Sync,
}

/// Kinds of operations, for rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    Read,
    Write,
    Zero,
    Discard,
    Resize,
    Sync,
    /// A note in the ledger.
    Note,
}

impl Act {
    pub(crate) fn class(&self) -> Class {
        match self {
            Act::Read => Class::Read,
            Act::Write(_) => Class::Write,
            Act::Zero => Class::Zero,
            Act::Discard => Class::Discard,
            Act::Resize(_) => Class::Resize,
            Act::Sync => Class::Sync,
        }
    }

    pub(crate) fn changes(&self) -> bool {
        !matches!(self, Act::Read | Act::Sync)
    }
}

/// One operation.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    pub(crate) file: usize,
    pub(crate) act: Act,
    pub(crate) span: Span,
    /// Which of its sectors were changed in the end: all of them, where nothing is said.
    pub(crate) landed: Option<BTreeSet<u64>>,
    result: Result<(), Errno>,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    Begun,
    Done,
    Ended,
}

/// What happened, in order: the place in the list is the time.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// An operation was handed over.
    Begun(usize),
    /// It has had its effect on what is read.
    Done(usize),
    /// It was answered.
    Ended(usize, Result<(), Errno>),
    /// A group was noted in the ledger.
    Noted(Rc<[Change]>),
    /// A group was not.
    NotNoted,
    RoundBegun,
    RoundEnded,
    /// Something of a guest's.
    Guest,
}

/// What goes wrong.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    pub(crate) file: Option<usize>,
    pub(crate) classes: Vec<Class>,
    pub(crate) within: Option<Span>,
    /// So many operations that match are let through first.
    pub(crate) skip: u64,
    /// So many are hit then.
    pub(crate) times: u64,
    pub(crate) fault: Fault,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Fail(Errno),
    /// The first half of it happens, and then this.
    Short(Errno),
    /// A file has no more room than for so many bytes: ENOSPC for whoever would make it longer.
    Full(u64),
    /// Not answered before nothing else can go on.
    Delay,
}

/// How operations go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// Each is over at once.
    Instant,
    /// In any order.
    Random,
}

/// All of it.
pub(crate) struct World {
    inner: RefCell<Inner>,
    /// The time of runtimes, in nanoseconds.
    pub(crate) clock: Cell<u64>,
    turns: Cell<u64>,
}

struct Inner {
    pace: Pace,
    dice: Dice,
    files: Vec<Bytes>,
    poison: Vec<Option<Errno>>,
    operations: Vec<Operation>,
    buffers: Vec<Option<Buf>>,
    wakers: Vec<Option<Waker>>,
    /// Operations that are not ended, and may go on.
    moving: Vec<usize>,
    /// Those that may not yet.
    held: Vec<usize>,
    log: Vec<Event>,
    rules: Vec<Rule>,
    /// Errnos that rules have given.
    given: BTreeSet<i32>,
    ledger: Notes,
    /// So many operations of a hundred are slow.
    slow: u64,
}

/// What a ledger holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notes {
    groups: Vec<Rc<[Change]>>,
    /// Before which of them a round has begun of which that can be told.
    cuts: Vec<usize>,
    /// How many of them are forgotten when the round under way ends, and whether that is all that it writes.
    begun: (usize, bool),
    /// Behind so many of them one is missing.
    gap: Option<usize>,
}

impl Notes {
    pub(crate) fn note(&mut self, group: Rc<[Change]>) {
        self.groups.push(group);
    }

    /// One was to be noted and could not be: told where something was noted before.
    pub(crate) fn miss(&mut self) {
        self.gap = (!self.groups.is_empty()).then_some(self.groups.len());
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.gap.is_none()
    }

    /// As in the files of a real ledger, of which there are not many, the begins of few rounds can be told from others.
    pub(crate) fn begin(&mut self) {
        let (last, len) = (self.cuts.last().copied().unwrap_or(0), self.groups.len());
        self.begun = if last == len {
            (len, true)
        } else if self.cuts.len() < CUTS_MAX {
            self.cuts.push(len);
            (len, true)
        } else {
            (last, false)
        };
    }

    pub(crate) fn end(&mut self) -> bool {
        let (begun, is_all) = std::mem::take(&mut self.begun);
        self.groups.drain(..begun);
        self.gap = self.gap.and_then(|gap| gap.checked_sub(begun)).filter(|gap| *gap > 0);
        self.cuts.retain_mut(|cut| {
            *cut = cut.saturating_sub(begun);
            *cut > 0
        });
        is_all
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    pub(crate) fn changes(&self) -> Vec<Change> {
        self.groups.iter().flat_map(|group| group.iter().copied()).collect()
    }
}

impl World {
    /// A world with these files, where operations come in an order of the dice's.
    pub(crate) fn new(files: Vec<Bytes>, notes: Notes, pace: Pace, mut dice: Dice) -> Rc<World> {
        let slow = dice.pick(&[0, 0, 3, 10]);
        let inner = Inner {
            pace,
            dice,
            poison: vec![None; files.len()],
            files,
            operations: Vec::new(),
            buffers: Vec::new(),
            wakers: Vec::new(),
            moving: Vec::new(),
            held: Vec::new(),
            // Nothing of a guest's is at time 0, which is that of what was there before.
            log: vec![Event::Guest],
            rules: Vec::new(),
            given: BTreeSet::new(),
            ledger: notes,
            slow,
        };
        Rc::new(World { inner: RefCell::new(inner), clock: Cell::new(0), turns: Cell::new(0) })
    }

    /// What time it is; it never is the same time again.
    pub(crate) fn tick(&self) -> u64 {
        let log = &mut self.inner.borrow_mut().log;
        log.push(Event::Guest);
        log.len() as u64 - 1
    }

    /// The files as they are read now.
    pub(crate) fn files(&self) -> Vec<Bytes> {
        self.inner.borrow().files.clone()
    }

    pub(crate) fn notes(&self) -> Notes {
        self.inner.borrow().ledger.clone()
    }

    pub(crate) fn log<T>(&self, look: impl FnOnce(&[Event], &[Operation]) -> T) -> T {
        let inner = self.inner.borrow();
        look(&inner.log, &inner.operations)
    }

    pub(crate) fn events(&self) -> u64 {
        self.inner.borrow().log.len() as u64
    }

    pub(crate) fn set_rules(&self, rules: Vec<Rule>) {
        self.inner.borrow_mut().rules = rules;
    }

    /// Whether a rule has given this errno.
    pub(crate) fn has_given(&self, errno: Errno) -> bool {
        self.inner.borrow().given.contains(&errno.code())
    }

    /// Whether anything is under way that is going to fail.
    pub(crate) fn is_failing(&self) -> bool {
        let inner = self.inner.borrow();
        let mut flying = inner.moving.iter().chain(&inner.held);
        flying.any(|number| inner.operations[*number].result.is_err())
    }

    pub(crate) fn size(&self, file: usize) -> u64 {
        self.inner.borrow().files[file].size()
    }

    pub(crate) fn is_there(&self, file: usize, at: u64) -> bool {
        self.inner.borrow().files[file].is_there(at)
    }

    pub(crate) fn poison(&self, file: usize) -> Option<Errno> {
        self.inner.borrow().poison[file]
    }

    /// Hands an operation over; its number.
    pub(crate) fn begin(&self, file: usize, act: Act, span: Span, buf: Option<Buf>) -> usize {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let size = inner.files[file].size();
        assert!(
            span.end() <= size,
            "{:?} of {} bytes at {} of file {file}, which has {size}",
            act.class(),
            span.len(),
            span.at()
        );
        let number = inner.operations.len();
        let (mut result, mut is_held) = (Ok(()), false);
        let mut landed = None;
        match inner.strike(file, &act, span) {
            Some(Fault::Fail(errno)) => result = Err(errno),
            Some(Fault::Short(errno)) => {
                result = Err(errno);
                landed = Some(sectors(span).take(sectors(span).count() / 2).collect());
            }
            Some(Fault::Full(_)) => result = Err(Errno::ENOSPC),
            Some(Fault::Delay) => is_held = true,
            None => {}
        }
        if let Some(errno) = inner.poison[file]
            && !matches!(act, Act::Read)
        {
            (result, landed) = (Err(errno), Some(BTreeSet::new()));
        }
        inner.operations.push(Operation { file, act, span, landed, result, state: State::Begun });
        inner.buffers.push(buf);
        inner.wakers.push(None);
        inner.log.push(Event::Begun(number));
        match inner.pace {
            Pace::Instant => {
                inner.perform(number);
                inner.finish(number);
            }
            // Some are so slow that much else happens before their end.
            Pace::Random if is_held || inner.dice.percent(inner.slow) => inner.held.push(number),
            Pace::Random => inner.moving.push(number),
        }
        number
    }

    /// The result, once it is there; before that the waker is told of it.
    pub(crate) fn poll(&self, number: usize, waker: &Waker) -> Option<Result<(), Errno>> {
        let mut inner = self.inner.borrow_mut();
        match inner.operations[number].state {
            State::Ended => Some(inner.operations[number].result),
            State::Begun | State::Done => {
                inner.wakers[number] = Some(waker.clone());
                None
            }
        }
    }

    /// Lets operations go on: whether any did.
    fn step(&self) -> bool {
        let mut woken = None;
        {
            let mut inner = self.inner.borrow_mut();
            let inner = &mut *inner;
            if inner.moving.is_empty() || inner.dice.below(100) == 0 {
                let held = std::mem::take(&mut inner.held);
                inner.moving.extend(held);
            }
            if inner.moving.is_empty() {
                return false;
            }
            let pick = inner.dice.below(inner.moving.len() as u64) as usize;
            let number = inner.moving[pick];
            match inner.operations[number].state {
                State::Begun => inner.perform(number),
                State::Done | State::Ended => {
                    inner.moving.swap_remove(pick);
                    woken = inner.finish(number);
                }
            }
        }
        if let Some(waker) = woken {
            waker.wake();
        }
        true
    }

    /// A turn of the engine: nothing to do until then, or something to do at once.
    ///
    /// # Panics
    /// Where nothing can ever happen again.
    pub(crate) fn turn(&self, is_busy: bool, until: Option<u64>) {
        self.turns.set(self.turns.get() + 1);
        assert!(self.turns.get() < TURNS_MAX, "it goes round in circles");
        self.clock.set(self.clock.get() + 1000);
        let draw = self.inner.borrow_mut().dice.below(16);
        if is_busy && draw < 8 {
            return;
        }
        let steps = 1 + draw % 3;
        let moved = (0..steps).filter(|_| self.step()).count();
        match until {
            Some(time) if moved == 0 || draw == 15 => self.clock.set(self.clock.get().max(time)),
            Some(_) => {}
            None => assert!(moved > 0 || is_busy, "nothing can happen any more, but something is waited for"),
        }
    }

    /// What was handed over comes to its end.
    pub(crate) fn settle(&self) {
        while self.step() {}
        self.turns.set(0);
    }

    /// Notes a group in the ledger.
    pub(crate) fn note(&self, group: &[Change]) -> Result<(), Errno> {
        let mut inner = self.inner.borrow_mut();
        let span = Span::new(0, 0).expect("nothing is within any file");
        if let Some(Fault::Fail(errno)) = inner.strike_class(usize::MAX, Class::Note, None, span) {
            inner.ledger.miss();
            inner.log.push(Event::NotNoted);
            return Err(errno);
        }
        let group: Rc<[Change]> = group.into();
        inner.ledger.note(group.clone());
        inner.log.push(Event::Noted(group));
        Ok(())
    }

    pub(crate) fn begin_round(&self) {
        let mut inner = self.inner.borrow_mut();
        inner.ledger.begin();
        inner.log.push(Event::RoundBegun);
    }

    pub(crate) fn end_round(&self) -> bool {
        let mut inner = self.inner.borrow_mut();
        inner.log.push(Event::RoundEnded);
        inner.ledger.end()
    }
}

impl Inner {
    /// What a rule does to an operation.
    fn strike(&mut self, file: usize, act: &Act, span: Span) -> Option<Fault> {
        let room = match act {
            Act::Resize(bytes) => Some(*bytes),
            Act::Read | Act::Write(_) | Act::Zero | Act::Discard | Act::Sync => None,
        };
        self.strike_class(file, act.class(), room, span)
    }

    /// The same; `room` is how long the file would be made.
    fn strike_class(&mut self, file: usize, class: Class, room: Option<u64>, span: Span) -> Option<Fault> {
        let has_room = |fault| match fault {
            Fault::Full(most) => room.is_none_or(|room| room <= most),
            Fault::Fail(_) | Fault::Short(_) | Fault::Delay => false,
        };
        let matching = |rule: &&mut Rule| {
            rule.file.is_none_or(|wanted| wanted == file)
                && rule.classes.contains(&class)
                && !has_room(rule.fault)
                && rule.within.is_none_or(|within| span.at() < within.end() && within.at() < span.end())
        };
        let mut found = None;
        for rule in self.rules.iter_mut().filter(|rule| rule.times > 0).filter(matching) {
            if rule.skip > 0 {
                rule.skip -= 1;
            } else if found.is_none() {
                rule.times -= 1;
                found = Some(rule.fault);
            }
        }
        match found {
            Some(Fault::Fail(errno) | Fault::Short(errno)) => drop(self.given.insert(errno.code())),
            Some(Fault::Full(_)) => drop(self.given.insert(Errno::ENOSPC.code())),
            Some(Fault::Delay) | None => {}
        }
        found
    }

    /// Changes the file, or reads it.
    fn perform(&mut self, number: usize) {
        let operation = &mut self.operations[number];
        operation.state = State::Done;
        if matches!(operation.act, Act::Resize(_)) && operation.result.is_err() {
            operation.landed = Some(BTreeSet::new());
        } else if operation.act.changes() && operation.landed.is_none() {
            let whole = match (&operation.act, operation.result) {
                // What is discarded may stay.
                (Act::Discard, Ok(())) => self.dice.percent(60),
                (_, Ok(())) => true,
                // It may have come to any part of it.
                (_, Err(_)) => false,
            };
            if !whole {
                let percent = self.dice.pick(&[0, 0, 50, 100]);
                let sectors = sectors(operation.span);
                operation.landed = Some(sectors.filter(|_| self.dice.percent(percent)).collect());
            }
        }
        let file = &mut self.files[operation.file];
        match (&operation.act, &self.buffers[number]) {
            (Act::Read, Some(buf)) if operation.result.is_ok() => {
                let mut bytes = vec![0; buf.len()];
                file.read(operation.span.at(), &mut bytes);
                buf.put(0, &bytes);
            }
            (Act::Read, _) => {}
            (Act::Sync, _) => {
                if let Err(errno) = operation.result {
                    let poison = &mut self.poison[operation.file];
                    *poison = poison.or(Some(errno));
                }
            }
            (act, _) => apply(file, act, operation.span, operation.landed.as_ref()),
        }
        self.buffers[number] = None;
        self.log.push(Event::Done(number));
    }

    /// Answers it.
    fn finish(&mut self, number: usize) -> Option<Waker> {
        let operation = &mut self.operations[number];
        operation.state = State::Ended;
        self.log.push(Event::Ended(number, operation.result));
        self.wakers[number].take()
    }
}

/// The first bytes of the sectors of a span; the first and the last may lie in it only in part.
pub(crate) fn sectors(span: Span) -> impl Iterator<Item = u64> {
    let first = span.at() & !(SECTOR - 1);
    (first..span.end()).step_by(SECTOR as usize)
}

/// Does to a file what an operation does: to some sectors of it, or to all.
pub(crate) fn apply(file: &mut Bytes, act: &Act, span: Span, only: Option<&BTreeSet<u64>>) {
    let mut change = |part: Span| match act {
        Act::Write(bytes) => {
            let from = (part.at() - span.at()) as usize;
            file.write(part.at(), &bytes[from..from + part.len() as usize]);
        }
        Act::Zero | Act::Discard => file.clear(part),
        Act::Read | Act::Sync | Act::Resize(_) => {}
    };
    match only {
        Some(only) => {
            for sector in only {
                let at = span.at().max(*sector);
                let end = span.end().min(sector + SECTOR);
                change(Span::new(at, end - at).expect("within the file"));
            }
        }
        None => change(span),
    }
    if let Act::Resize(size) = act
        && only.is_none()
    {
        file.resize(*size);
    }
}
