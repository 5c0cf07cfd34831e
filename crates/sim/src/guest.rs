//! A guest: asks at random, reuses its memory as soon as it is answered, and believes nothing unchecked.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use block::{Answer, Buf, Errno, Op, OpKind, Payload, Reply, Request, Span, Ticket};
use disk::{Disk, GiveUp, Session};

use crate::dice::Dice;
use crate::model::Content;
use crate::stops::request_of;
use crate::subject::Subject;

/// Bytes of memory for most requests.
const MEMORY: usize = 40 << 10;
/// Bytes of the longest request that goes on where the last one ended, unless its alignment makes it longer.
const APPENDED: u64 = 700;

/// How a guest behaves.
#[derive(Clone, Debug)]
pub(crate) struct Habits {
    /// Requests that it makes.
    pub(crate) requests: u64,
    /// Requests that it has under way at most.
    pub(crate) depth: usize,
    /// The part of the disk that it uses.
    pub(crate) region: Span,
    /// Bytes of its longest usual request.
    pub(crate) longest: u64,
    /// Percent of requests that are aligned to 4096, to 512; the others are to nothing.
    pub(crate) aligned: (u64, u64),
    /// Percent of requests that go to one small place.
    pub(crate) hot: u64,
    /// Percent of requests that are small and go on where the last one ended, as a log is written: neighbours in a
    /// block, with no byte in common.
    pub(crate) appends: u64,
    /// Pauses up to this many nanoseconds between requests.
    pub(crate) pause: u64,
    /// It stops its session this often, in a thousand requests.
    pub(crate) stops: u64,
    /// Percent of requests that no good guest makes.
    pub(crate) hostile: u64,
    /// Percent of reads, of writes, of flushes; the rest is shared by the others.
    pub(crate) mix: (u64, u64, u64),
}

/// One guest.
pub(crate) struct Guest {
    number: u64,
    subject: Rc<Subject>,
    habits: Habits,
    state: RefCell<State>,
}

struct State {
    dice: Dice,
    free: Vec<Buf>,
    /// The memory of the requests under way: whole, and the part in use.
    out: BTreeMap<u64, Option<(Buf, Buf)>>,
    made: u64,
    /// Where its last request ended.
    next: u64,
    waker: Option<Waker>,
}

impl Guest {
    pub(crate) fn new(number: u64, subject: &Rc<Subject>, habits: Habits, dice: Dice) -> Rc<Guest> {
        let (free, out) = (Vec::new(), BTreeMap::new());
        let next = habits.region.at();
        let state = RefCell::new(State { dice, free, out, made: 0, next, waker: None });
        Rc::new(Guest { number, subject: subject.clone(), habits, state })
    }

    /// Makes all its requests; ends when the last is answered, or when the run does.
    pub(crate) async fn run(self: Rc<Self>, disk: Disk) {
        let session = disk.session();
        loop {
            if self.subject.kernel.borrow().is_over() {
                return;
            }
            let pause = {
                let state = &mut *self.state.borrow_mut();
                if state.made == self.habits.requests {
                    break;
                }
                if state.dice.percent(30) { state.dice.below(self.habits.pause) } else { 0 }
            };
            if pause > 0 {
                disk.handle().sleep(Duration::from_nanos(pause)).await;
            }
            self.fewer_than(self.habits.depth).await;
            self.ask(&disk, &session);
            self.stop_at_times(&session).await;
        }
        self.fewer_than(1).await;
    }

    /// Stops its session, as a reset of its ring would, and goes on with it.
    async fn stop_at_times(&self, session: &Session) {
        let how = {
            let dice = &mut self.state.borrow_mut().dice;
            if dice.below(1000) >= self.habits.stops {
                return;
            }
            if dice.percent(50) { GiveUp::Leave } else { GiveUp::Tell }
        };
        self.subject.stops(self.number, how);
        session.stop(how).await;
        self.subject.stopped(self.number);
    }

    /// Waits until fewer than this many requests are under way.
    async fn fewer_than(&self, most: usize) {
        poll_fn(|cx| {
            let mut state = self.state.borrow_mut();
            if state.out.len() < most {
                return Poll::Ready(());
            }
            state.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn ask(self: &Rc<Self>, disk: &Disk, session: &Session) {
        let number = {
            let mut state = self.state.borrow_mut();
            state.made += 1;
            request_of(self.number, state.made)
        };
        let (op, memory) = self.draw(number, disk.size());
        self.subject.asked(number, &op, disk.size());
        self.state.borrow_mut().out.insert(number, memory);
        let answer: Rc<dyn Answer> = self.clone();
        session.submit(Request { op, reply: Reply::new(answer, Ticket(number)) });
    }

    fn draw(&self, number: u64, size: u64) -> (Op, Option<(Buf, Buf)>) {
        let state = &mut *self.state.borrow_mut();
        if state.dice.percent(self.habits.hostile) {
            return self.draw_hostile(state, number, size);
        }
        let (reads, writes, flushes) = self.habits.mix;
        let span = self.draw_span(&mut state.dice, state.next);
        state.next = span.end();
        let dice = &mut state.dice;
        let fua = dice.percent(10);
        let drawn = dice.below(100);
        if drawn < reads {
            let (whole, buf) = memory(state, span.len());
            garbage(&whole);
            return (Op::Read { at: span.at(), buf: buf.clone() }, Some((whole, buf)));
        }
        if drawn < reads + writes {
            let (whole, buf) = memory(state, span.len());
            fill(&buf, number, span.at());
            return (Op::Write { at: span.at(), buf: buf.clone(), fua }, Some((whole, buf)));
        }
        if drawn < reads + writes + flushes {
            return (Op::Flush, None);
        }
        let other = dice.below(10);
        let (unmap, fast) = (dice.percent(50), dice.percent(15));
        let kind = match other {
            0..=2 => OpKind::Discard,
            3..=6 => OpKind::WriteZeroes,
            7 | 8 => OpKind::Status,
            9.. => OpKind::Prefetch,
        };
        // Two of one kind and span at once could not be told apart by who watches.
        if self.subject.is_asked(kind, span) {
            return (Op::Flush, None);
        }
        let op = match other {
            0..=2 => Op::Discard { span, fua },
            3..=6 => Op::WriteZeroes { span, unmap, fua, fast },
            7 | 8 => Op::Status { span },
            9.. => Op::Prefetch { span },
        };
        (op, None)
    }

    /// A span to ask for; `next` is where the last one ended.
    fn draw_span(&self, dice: &mut Dice, next: u64) -> Span {
        let region = self.habits.region;
        let drawn = dice.below(100);
        let align = if drawn < self.habits.aligned.0 {
            4096
        } else if drawn < self.habits.aligned.0 + self.habits.aligned.1 {
            512
        } else {
            1
        };
        if dice.percent(self.habits.appends) {
            let at = if next < region.end() { next } else { region.at() };
            let at = (at & !(align - 1)).max(region.at());
            let len = (1 + dice.below(APPENDED)).next_multiple_of(align).min(region.end() - at);
            return Span::new(at, len).expect("within the disk");
        }
        let place = if dice.percent(self.habits.hot) { region.len().min(8192) } else { region.len() };
        let at = match dice.below(10) {
            // Near the end of the region, where the last block may be incomplete.
            0 => region.end() - 1 - dice.below(place.min(5000)),
            1.. => region.at() + dice.below(place),
        };
        let at = (at & !(align - 1)).max(region.at());
        let longest = match dice.below(20) {
            0 => self.habits.longest * 10,
            1..=12 => self.habits.longest.min(4096),
            13.. => self.habits.longest,
        };
        let len = (1 + dice.below(longest)).next_multiple_of(align).min(region.end() - at);
        Span::new(at, len).expect("within the disk")
    }

    /// What a bug or malice may send: beyond the end, around it, nothing.
    fn draw_hostile(&self, state: &mut State, number: u64, size: u64) -> (Op, Option<(Buf, Buf)>) {
        let len = 1 + state.dice.below(4096);
        let at = match state.dice.below(7) {
            0 => size,
            1 => size - 1 - state.dice.below(len.min(size) - 1).min(size - 1),
            2 => u64::MAX - state.dice.below(len),
            3 => i64::MAX as u64 - state.dice.below(len),
            4 => size + 1,
            5.. => 1 << 40,
        };
        let at = if at < size { at.max((size + 1).saturating_sub(len)) } else { at };
        let len = if state.dice.percent(20) { 0 } else { len };
        match state.dice.below(5) {
            0 | 1 => {
                let (whole, buf) = memory(state, len);
                garbage(&whole);
                (Op::Read { at, buf: buf.clone() }, Some((whole, buf)))
            }
            2 | 3 => {
                let (whole, buf) = memory(state, len);
                fill(&buf, number, 0);
                (Op::Write { at, buf: buf.clone(), fua: state.dice.percent(20) }, Some((whole, buf)))
            }
            4.. => match Span::new(at, len) {
                Some(span) if !self.subject.is_asked(OpKind::Discard, span) => {
                    (Op::Discard { span, fua: false }, None)
                }
                Some(_) | None => (Op::Flush, None),
            },
        }
    }
}

impl Answer for Guest {
    fn answer(&self, ticket: Ticket, result: Result<Payload, Errno>) {
        let memory = self.take_back(ticket);
        let part = memory.as_ref().map(|(_, part)| part.clone());
        self.subject.answered(ticket.0, &result, || part.map_or_else(Vec::new, |part| part.to_vec()));
        self.reuse(memory);
    }

    fn leave(&self, ticket: Ticket) {
        let memory = self.take_back(ticket);
        self.subject.left(ticket.0);
        self.reuse(memory);
    }
}

impl Guest {
    /// The memory of a request that has ended: whole, and the part in use.
    fn take_back(&self, ticket: Ticket) -> Option<(Buf, Buf)> {
        self.state.borrow_mut().out.remove(&ticket.0).flatten()
    }

    fn reuse(&self, memory: Option<(Buf, Buf)>) {
        let state = &mut *self.state.borrow_mut();
        if let Some((whole, _)) = memory {
            // It is the guest's again: what the kernel still reads or writes there is seen sooner or later.
            garbage(&whole);
            if whole.len() == MEMORY {
                state.free.push(whole);
            }
        }
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }
}

/// Memory for a request: the whole of it, and the part to use, aligned or not, in one piece or several.
fn memory(state: &mut State, len: u64) -> (Buf, Buf) {
    let len = len as usize;
    let dice = &mut state.dice;
    let skip = match dice.below(10) {
        0..=5 => 0,
        6 => 512,
        7.. => 1 + dice.below(3000) as usize,
    };
    let pieces = if len >= 2048 && dice.percent(20) { 2 + dice.below(2) as usize } else { 1 };
    let gap = if pieces > 1 { dice.pick(&[0, 512, 4096, 7]) } else { 0 };
    let need = skip + len + gap * (pieces - 1);
    let whole = match state.free.pop() {
        Some(free) if need <= MEMORY => free,
        Some(_) | None => Buf::zeroed(need.max(MEMORY)),
    };
    if pieces == 1 {
        let part = whole.slice(skip, len);
        return (whole, part);
    }
    let align = state.dice.pick(&[1, 512, 512]);
    let step = len.div_ceil(pieces).next_multiple_of(align);
    let mut parts = Vec::new();
    let (mut from, mut left) = (skip, len);
    while left > 0 {
        let piece = step.min(left);
        parts.push(whole.slice(from, piece));
        (from, left) = (from + piece + gap, left - piece);
    }
    (whole, Buf::concat(parts))
}

/// Bytes that are of no write.
fn garbage(buf: &Buf) {
    buf.fill(0xdb);
}

fn fill(buf: &Buf, number: u64, at: u64) {
    let mut bytes = vec![0; buf.len()];
    Content::Pattern(number).fill(at, &mut bytes);
    buf.put(0, &bytes);
}
