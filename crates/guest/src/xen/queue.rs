//! A ring at work: takes requests out of it and puts responses into it. It waits for nothing and submits nothing.

use std::collections::VecDeque;

use super::journal::{Left, Part};
use super::layout::Raw;
use super::ring::{Ring, RingError};
use super::status::Status;

/// A ring, its requests that are out, and the record of these that outlives us.
pub(crate) struct Queue {
    ring: Ring,
    part: Part,
    /// What a response has to repeat, for each slot.
    echoes: Vec<Echo>,
    /// Slots of no request.
    free: Vec<u16>,
    /// What a predecessor has taken and not answered, in order.
    left: VecDeque<Left>,
    /// A copy of the request that is taken next, so that it is read once.
    next: Option<Next>,
    /// Answered and not published.
    batch: Vec<u16>,
}

/// What a front end knows its request by.
#[derive(Clone, Copy, Default)]
struct Echo {
    id: u64,
    operation: u8,
    is_out: bool,
}

#[derive(Clone, Copy)]
struct Next {
    raw: Raw,
    /// Where a predecessor has put it.
    slot: Option<u16>,
}

impl Queue {
    /// A queue that goes on where its ring is, or where a predecessor stopped.
    pub(crate) fn new(
        mut ring: Ring,
        mut part: Part,
        raw_layout: &'static super::layout::Layout,
    ) -> Result<Queue, RingError> {
        let left: VecDeque<Left> = part.recover(ring.answered(), raw_layout)?.into();
        ring.resume(left.len() as u16)?;
        let mut echoes = vec![Echo::default(); usize::from(ring.size())];
        for Left { slot, .. } in &left {
            echoes[usize::from(*slot)].is_out = true;
        }
        // The lowest is taken first, so that few of them are used.
        let free = (0..ring.size()).rev().filter(|slot| !echoes[usize::from(*slot)].is_out).collect();
        Ok(Queue { ring, part, echoes, free, left, next: None, batch: Vec::new() })
    }

    /// A copy of the request that is taken next, if there is one.
    ///
    /// # Errors
    /// If the ring cannot go on.
    #[inline]
    pub(crate) fn peek(&mut self) -> Result<Option<&Raw>, RingError> {
        if self.next.is_none() {
            self.next = match self.left.pop_front() {
                Some(Left { slot, raw }) => Some(Next { raw, slot: Some(slot) }),
                None => self.ring.peek()?.map(|raw| Next { raw, slot: None }),
            };
        }
        Ok(self.next.as_ref().map(|next| &next.raw))
    }

    /// Takes what was peeked at; its slot.
    ///
    /// # Panics
    /// If there was nothing.
    #[inline]
    pub(crate) fn take(&mut self) -> (u16, Raw) {
        let Next { raw, slot } = self.next.take().expect("it was peeked at");
        let slot = slot.unwrap_or_else(|| {
            let slot = self.free.pop().expect("a ring has no more requests than slots");
            self.part.take(slot, self.ring.advance(), &raw);
            slot
        });
        self.echoes[usize::from(slot)] =
            Echo { id: raw.id(), operation: raw.answered_operation(), is_out: true };
        (slot, raw)
    }

    /// Answers a request, as soon as it is published.
    pub(crate) fn answer(&mut self, slot: u16, status: Status) {
        let Echo { id, operation, is_out } = self.echoes[usize::from(slot)];
        assert!(is_out, "slot {slot} is answered once");
        self.echoes[usize::from(slot)].is_out = false;
        self.part.stage(slot, self.ring.next_response());
        self.ring.stage(id, operation, status as i16);
        self.batch.push(slot);
    }

    /// Shows the front end all that was answered. Whether it is to be rung for.
    pub(crate) fn publish(&mut self) -> bool {
        if self.batch.is_empty() {
            return false;
        }
        let rings = self.ring.publish();
        self.part.published(&self.batch, self.ring.answered());
        self.free.append(&mut self.batch);
        rings
    }

    /// Whether there is something to take.
    #[inline]
    pub(crate) fn has_news(&self) -> bool {
        self.next.is_some() || !self.left.is_empty() || self.ring.has_news()
    }

    /// Whether there is something that a predecessor has taken, and nobody since.
    pub(crate) fn has_left(&self) -> bool {
        !self.left.is_empty() || self.next.is_some_and(|next| next.slot.is_some())
    }

    /// Asks the front end to ring, and looks once more.
    pub(crate) fn arm(&mut self) -> bool {
        self.ring.arm() || self.next.is_some() || !self.left.is_empty()
    }

    /// How many requests it has room for.
    pub(crate) fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Whether the file behind the record was cut short.
    #[inline]
    pub(crate) fn is_broken(&self) -> bool {
        self.part.is_broken()
    }
}
