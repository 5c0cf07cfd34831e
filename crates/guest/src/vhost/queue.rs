//! A ring at work: takes requests out of it and puts answers into it. It waits for nothing and submits nothing.

use std::collections::VecDeque;

use block::{Errno, Op, OpKind};

use super::inflight::Marks;
use super::memory::{Byte, Memory};
use super::request::{Terms, Verdict, judge};
use super::ring::{Addresses, Chain, Ring, RingError};
use super::status::{Status, status};

/// What became of a look at the ring.
pub(crate) enum Taken {
    /// A request for the disk, under this head.
    Request(u16, Op),
    /// A request for the disk in several parts, each of which is answered under this head.
    Parts(u16, Vec<Op>),
    /// A request that is answered already.
    Answered,
    /// Nothing is available.
    Nothing,
}

/// A head that the driver has made available.
#[derive(Default)]
struct Head {
    /// Taken, and not used yet as far as the driver knows.
    is_out: bool,
    /// Answers to wait for.
    parts: u16,
    /// Some part of it is left to a successor: then all of it is.
    is_left: bool,
    /// The first error by severity.
    errno: Option<Errno>,
    kind: Option<OpKind>,
    /// It changes the disk, and was not asked to be durable.
    is_unsynced: bool,
    /// Bytes that were written for the driver if all is well, besides the status.
    written: u32,
    status: Option<Byte>,
}

/// A ring, the heads of it that are out, and the record of these that outlives us.
pub(crate) struct Queue {
    ring: Ring,
    marks: Option<Marks>,
    heads: Vec<Head>,
    /// What a predecessor has taken and not answered, in that order.
    resubmit: VecDeque<u16>,
    chain: Chain,
    /// Answered and not published.
    batch: Vec<u16>,
}

impl Queue {
    /// A queue that goes on where the front end says, or where a predecessor stopped.
    pub(crate) fn new(mut ring: Ring, mut marks: Option<Marks>, base: u16) -> Result<Queue, RingError> {
        let mut heads = Vec::new();
        heads.resize_with(usize::from(ring.size()), Head::default);
        let mut resubmit = VecDeque::new();
        ring.start_at(base);
        if let Some(marks) = &mut marks {
            let left = marks.recover(ring.used())?;
            if left.is_resumed {
                // What was taken is either used or out. What the front end takes for the base may be the used index:
                // it knows no more when a back end has died.
                ring.start_at(ring.used().wrapping_add(left.heads.len() as u16));
            }
            for head in left.heads {
                heads[usize::from(head)].is_out = true;
                resubmit.push_back(head);
            }
        }
        let (chain, batch) = (Chain::default(), Vec::new());
        Ok(Queue { ring, marks, heads, resubmit, chain, batch })
    }

    /// The front end has changed its memory.
    pub(crate) fn move_to(&mut self, memory: &Memory, addresses: Addresses) -> Result<(), RingError> {
        self.ring.move_to(memory, addresses)
    }

    /// Takes the next request, if there is one.
    #[inline]
    pub(crate) fn take(&mut self, memory: &Memory, terms: &Terms) -> Result<Taken, RingError> {
        let head = match self.resubmit.pop_front() {
            Some(head) => head,
            None => match self.take_available()? {
                Some(head) => head,
                None => return Ok(Taken::Nothing),
            },
        };
        self.ring.chain(head, memory, &mut self.chain)?;
        let judged = judge(&self.chain, memory, terms)?;
        if self.is_broken() {
            return Err(RingError::Gone);
        }
        let state = &mut self.heads[usize::from(head)];
        (state.status, state.written) = (Some(judged.status), 0);
        (state.is_left, state.errno) = (false, None);
        match judged.verdict {
            Verdict::Serve(op, written) => {
                (state.kind, state.written, state.parts) = (Some(op.kind()), written, 1);
                state.is_unsynced = op.kind().changes() && !op.fua();
                Ok(Taken::Request(head, op))
            }
            Verdict::ServeAll(ops) => {
                (state.kind, state.parts) = (ops.first().map(Op::kind), ops.len() as u16);
                state.is_unsynced = ops.iter().any(|op| op.kind().changes() && !op.fua());
                Ok(Taken::Parts(head, ops))
            }
            Verdict::Answer(status, written) => {
                state.written = written;
                self.finish(head, status);
                Ok(Taken::Answered)
            }
        }
    }

    #[inline]
    fn take_available(&mut self) -> Result<Option<u16>, RingError> {
        let Some(head) = self.ring.peek()? else { return Ok(None) };
        if self.heads[usize::from(head)].is_out {
            return Err(RingError::Duplicate(head));
        }
        if let Some(marks) = &mut self.marks {
            marks.take(head);
        }
        self.heads[usize::from(head)].is_out = true;
        self.ring.advance();
        Ok(Some(head))
    }

    /// Whether a request that is out changes the disk and was taken with a write cache in mind.
    #[inline]
    pub(crate) fn is_unsynced(&self, head: u16) -> bool {
        self.heads[usize::from(head)].is_unsynced
    }

    /// A part of a request is over. `memory_is_whole` says whether no memory was cut short meanwhile: what was read
    /// into such, or written from it, is not what the guest has.
    pub(crate) fn answer(&mut self, head: u16, result: Result<(), Errno>, memory_is_whole: bool) {
        let state = &mut self.heads[usize::from(head)];
        let is_whole = memory_is_whole && state.status.as_ref().is_some_and(|status| !status.is_broken());
        if let Err(errno) = result.and(if is_whole { Ok(()) } else { Err(Errno::EFAULT) }) {
            let is_worse = state.errno.is_none_or(|known| errno.severity() > known.severity());
            if is_worse {
                state.errno = Some(errno);
            }
        }
        self.end_part(head);
    }

    /// A part of a request is left to a successor.
    pub(crate) fn leave(&mut self, head: u16) {
        self.heads[usize::from(head)].is_left = true;
        self.end_part(head);
    }

    fn end_part(&mut self, head: u16) {
        let state = &mut self.heads[usize::from(head)];
        state.parts = state.parts.checked_sub(1).expect("each part is answered once");
        if state.parts > 0 {
            return;
        }
        if state.is_left {
            // It stays marked as out, here and in the record.
            return;
        }
        let told = match (state.errno, state.kind) {
            (None, _) => Status::Ok,
            (Some(errno), Some(kind)) => status(errno, kind),
            (Some(_), None) => Status::IoErr,
        };
        self.finish(head, told);
    }

    /// Tells the driver, as soon as it is published.
    fn finish(&mut self, head: u16, told: Status) {
        let state = &mut self.heads[usize::from(head)];
        if let Some(byte) = state.status.take() {
            byte.put(told as u8);
        }
        // 2.7.8: the length is that of what was written. Where a request failed, no more is promised than its status.
        let written = match told {
            Status::Ok => state.written + 1,
            Status::IoErr | Status::Unsupp => 1,
        };
        self.ring.stage(head, written);
        if let Some(marks) = &mut self.marks {
            marks.stage(head);
        }
        self.batch.push(head);
    }

    /// Shows the driver all that was answered. True if it wants a signal for that.
    pub(crate) fn publish(&mut self) -> bool {
        let Some(used) = self.ring.publish() else { return false };
        if let Some(marks) = &mut self.marks {
            marks.published(&self.batch, used);
        }
        for head in self.batch.drain(..) {
            self.heads[usize::from(head)].is_out = false;
        }
        self.ring.wants_signal()
    }

    /// Whether there is something to take.
    #[inline]
    pub(crate) fn has_news(&self) -> bool {
        self.ring.has_news() || !self.resubmit.is_empty()
    }

    /// Asks the driver for kicks, and looks once more.
    pub(crate) fn arm(&mut self) -> bool {
        self.ring.arm() || !self.resubmit.is_empty()
    }

    /// Whether there is something to publish.
    #[inline]
    pub(crate) fn is_settled(&self) -> bool {
        self.batch.is_empty()
    }

    /// The index in the available ring of what is taken next: the base that the front end asks for.
    pub(crate) fn base(&self) -> u16 {
        self.ring.next()
    }

    /// Whether there is a record of what is out, so that a request may be left to a successor.
    pub(crate) fn has_record(&self) -> bool {
        self.marks.is_some()
    }

    /// Whether the file behind its memory, or behind its record, was cut short.
    pub(crate) fn is_broken(&self) -> bool {
        self.ring.is_broken() || self.marks.as_ref().is_some_and(Marks::is_broken)
    }
}
