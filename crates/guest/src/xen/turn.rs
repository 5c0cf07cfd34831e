//! A ring's turn: takes requests, fetches what they are to write, and asks the disk.

use std::rc::Rc;

use ::xen::PAGE;
use ::xen::grants::Direction;
use block::{Op, OpKind, Pool, Reply, Request, Span, Ticket};

use super::data::Place;
use super::layout::{Raw, SECTOR};
use super::request::{self, Terms, Verdict, judge};
use super::run::{Failure, Flight, Run};
use super::stats::Asked;

/// Requests that a ring may have taken before others get their turn, and bytes of their data: what a request costs is
/// in these too.
const REQUESTS: usize = 64;
const BYTES: usize = 4 << 20;

/// A request on its way to the disk. Dropping it answers it.
pub(super) struct Job {
    pub(super) slot: u16,
    raw: Raw,
    pub(super) reply: Reply,
    /// What the disk is to be asked.
    pub(super) op: Option<Op>,
    /// It is done in steps.
    steps: Option<Steps>,
}

/// How a request is done that begins with a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Steps {
    /// It is a barrier between what comes before and after it.
    pub(super) in_order: bool,
}

/// Why a turn is over.
pub(super) enum Turn {
    /// There may be more.
    More,
    /// There is nothing more for now.
    Done,
    /// The next request waits for so many bytes of memory.
    Memory(usize),
    /// This request is done before any other of this ring is taken.
    Steps(Box<Job>, Steps),
}

impl Run {
    /// Takes what there is, up to a limit, and asks the disk for it.
    pub(super) fn take_turn(self: &Rc<Self>) -> Turn {
        let terms = self.common.terms();
        let mut jobs = self.jobs.take();
        let turn = self.take(&terms, &mut jobs);
        self.prepare(&terms, &mut jobs);
        let in_steps = jobs.pop_if(|job| job.steps.is_some());
        jobs.drain(..).for_each(|job| self.ask_disk(job));
        *self.jobs.borrow_mut() = jobs;
        if self.is_behind.get() && (in_steps.is_some() || !self.queue.borrow().has_left()) {
            self.catch_up();
        }
        match in_steps {
            Some(job) => job.steps.map_or(turn, |steps| Turn::Steps(Box::new(job), steps)),
            None => turn,
        }
    }

    /// Takes requests, up to one that must be the last of this turn.
    fn take(self: &Rc<Self>, terms: &Terms, jobs: &mut Vec<Job>) -> Turn {
        let mut bytes = 0;
        while jobs.len() < REQUESTS && bytes < BYTES {
            if !self.is_taking() {
                return Turn::Done;
            }
            let mut queue = self.queue.borrow_mut();
            if self.is_behind.get() && !queue.has_left() {
                // Others may have come to a barrier before this ring's next requests were made.
                return Turn::More;
            }
            let needed = match queue.peek() {
                Ok(Some(raw)) => request::memory(raw, terms),
                Ok(None) => return Turn::Done,
                Err(error) => {
                    drop(queue);
                    self.fail(&error.into());
                    return Turn::Done;
                }
            };
            let mut taken = self.ahead.take();
            if needed > 0 && taken.is_none() {
                let footprint = Pool::footprint(needed);
                taken = self.account.try_take(footprint);
                if taken.is_none() {
                    return Turn::Memory(footprint);
                }
            }
            bytes += needed.max(PAGE);
            let (slot, raw) = queue.take();
            let is_broken = queue.is_broken();
            drop(queue);
            self.flights.borrow_mut()[usize::from(slot)].begin(taken, self.handle.now());
            let reply = Reply::new(self.clone(), Ticket(slot.into()));
            jobs.push(Job { slot, raw, reply, op: None, steps: None });
            if is_broken {
                self.fail(&Failure::Record);
                return Turn::Done;
            }
            if request::is_in_steps(&raw) {
                return Turn::More;
            }
        }
        Turn::More
    }

    /// Judges what was taken, finds memory for it, and copies what is to be written from the guest.
    fn prepare(&self, terms: &Terms, jobs: &mut [Job]) {
        let mut copies = self.copies.borrow_mut();
        // The segments of those that are indirect.
        for job in &*jobs {
            let mut pieces = Vec::new();
            request::indirect(&job.raw, terms, &mut pieces);
            if !pieces.is_empty() {
                let len = pieces.iter().map(|piece| usize::from(piece.len)).sum();
                copies.add(job.slot, Direction::FromGuest, self.data.memory(len), pieces);
            }
        }
        self.data.copy(&mut copies);
        let tables: Vec<_> = copies.drain().collect();
        let mut tables = tables.into_iter().peekable();
        let (mut flights, mut bytes) = (self.flights.borrow_mut(), self.table.borrow_mut());
        for job in &mut *jobs {
            let flight = &mut flights[usize::from(job.slot)];
            bytes.clear();
            if let Some(table) = tables.next_if(|table| table.slot == job.slot) {
                match table.result {
                    Ok(()) => {
                        bytes.resize(table.buf.len(), 0);
                        table.buf.get(0, &mut bytes);
                    }
                    Err(errno) => flight.failed = Some(errno),
                }
            }
            let verdict = judge(&job.raw, &bytes, terms, &mut flight.pieces);
            let (asked, span) = match verdict {
                Verdict::Read(span) => (Asked::Read, Some(span)),
                Verdict::Write(span) | Verdict::Barrier { write: Some(span), .. } => {
                    (Asked::Write, Some(span))
                }
                Verdict::Barrier { write: None, .. }
                | Verdict::Flush
                | Verdict::Discard(_)
                | Verdict::Answer(_) => (Asked::Other, None),
            };
            (flight.asked, flight.sectors) = (asked, span.map_or(0, |span| span.len() / SECTOR));
            self.common.counts.taken(asked);
            self.provide(verdict, job, flight);
            if let (Some(Op::Write { .. }), Place::Ours(buf)) = (&job.op, &flight.place) {
                let pieces = std::mem::take(&mut flight.pieces);
                copies.add(job.slot, Direction::FromGuest, buf.clone(), pieces);
            }
        }
        self.data.copy(&mut copies);
        for copied in copies.drain() {
            let flight = &mut flights[usize::from(copied.slot)];
            flight.pieces = copied.pieces;
            flight.failed = copied.result.err();
        }
        for job in jobs {
            if let Some(errno) = flights[usize::from(job.slot)].failed {
                self.common.miss(self.index, errno);
                (job.op, job.steps) = (None, None);
            }
        }
    }

    /// What the disk is to be asked, with memory for it.
    fn provide(&self, verdict: Verdict, job: &mut Job, flight: &mut Flight) {
        let durable = self.common.is_durable();
        let write = |span: Span, fua: bool, flight: &mut Flight| {
            let len = span.len() as usize;
            let (buf, place) = self.data.place(&flight.pieces, len, Direction::FromGuest);
            flight.place = place;
            Op::Write { at: span.at(), buf, fua }
        };
        job.op = match verdict {
            Verdict::Read(span) => {
                let (buf, place) = self.data.place(&flight.pieces, span.len() as usize, Direction::ToGuest);
                flight.place = place;
                Some(Op::Read { at: span.at(), buf })
            }
            Verdict::Write(span) => Some(write(span, durable, flight)),
            Verdict::Flush => Some(Op::Flush),
            Verdict::Barrier { write: data, in_order } => {
                job.steps = Some(Steps { in_order });
                data.map(|span| write(span, true, flight))
            }
            Verdict::Discard(span) => Some(Op::Discard { span, fua: durable }),
            Verdict::Answer(status) => {
                flight.preset = Some(status);
                None
            }
        };
        let kind = job.op.as_ref().map(Op::kind);
        flight.kind = if job.steps.is_some() { Some(OpKind::Flush) } else { kind };
        flight.fua = job.op.as_ref().is_some_and(Op::fua);
    }

    fn ask_disk(&self, job: Job) {
        let Job { slot, reply, op, .. } = job;
        let Some(op) = op else {
            // What is told is known already.
            return reply.send(Err(block::Errno::EINVAL));
        };
        if op.kind().changes() {
            self.flights.borrow_mut()[usize::from(slot)].changes = true;
            self.common.barrier.began();
        }
        self.session.submit(Request { op, reply });
    }
}
