//! The ring that a front end shares, with requests from it and responses to it (xen/include/public/io/ring.h).
//!
//! Each word is read once; the copy is checked, and only the copy is used. Responses take the places of requests: of
//! those that were taken, since there are never more requests than places.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::fence;

use ::xen::grants::Mapping;

use super::journal::JournalError;
use super::layout::{Layout, REQ_EVENT, REQ_PROD, REQUEST_MAX, RSP_EVENT, RSP_PROD, Raw};
use crate::words::Words;

/// Why a ring cannot go on: what the front end put there has no meaning.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RingError {
    #[error(
        "its front end says that it has made {requests} requests, where {taken} were taken, {answered} answered, and no \
         more than {size} can be unanswered"
    )]
    Requests { requests: u32, taken: u32, answered: u32, size: u32 },
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// The back end's side of a ring. Indices count requests and responses from the beginning, and wrap around.
pub(crate) struct Ring {
    words: Words<Mapping>,
    layout: &'static Layout,
    /// Entries, a power of two.
    size: u32,
    /// Requests that were taken (`req_cons`).
    taken: u32,
    /// Requests that there are, as last read and checked (`req_prod`).
    requests: u32,
    /// Responses that the front end can see (`rsp_prod`).
    answered: u32,
    /// Responses behind those that it cannot see yet.
    staged: u32,
    /// The index from which on it was asked to ring.
    asked: Option<u32>,
}

impl Ring {
    /// A ring in all of these pages. What is answered is as the ring says; so far as many are taken.
    pub(crate) fn new(words: Words<Mapping>, layout: &'static Layout, size: u16) -> Ring {
        let answered = words.u32(RSP_PROD, Relaxed);
        let (taken, requests) = (answered, answered);
        Ring { words, layout, size: size.into(), taken, requests, answered, staged: 0, asked: None }
    }

    /// How many entries it has.
    pub(crate) fn size(&self) -> u16 {
        self.size as u16
    }

    /// The responses that the front end can see.
    pub(crate) fn answered(&self) -> u32 {
        self.answered
    }

    /// Goes on behind requests that were taken and are not answered.
    ///
    /// # Errors
    /// If the front end has not made as many, or too many.
    pub(crate) fn resume(&mut self, unanswered: u16) -> Result<(), RingError> {
        self.taken = self.answered.wrapping_add(unanswered.into());
        self.requests = self.taken;
        self.look()
    }

    /// Whether there is a request that was not taken. Cheap.
    #[inline]
    pub(crate) fn has_news(&self) -> bool {
        self.words.u32(REQ_PROD, Relaxed) != self.taken
    }

    /// Asks the front end to ring for the next request, and looks once more (RING_FINAL_CHECK_FOR_REQUESTS).
    pub(crate) fn arm(&mut self) -> bool {
        let event = self.taken.wrapping_add(1);
        // Once it was asked, it has seen that: or we would have seen its request before.
        if self.asked != Some(event) {
            self.words.put_u32(REQ_EVENT, event, Relaxed);
            self.asked = Some(event);
            // It makes a request and then looks at our wish, we wish and then look for a request.
            fence(std::sync::atomic::Ordering::SeqCst);
        }
        self.has_news()
    }

    /// Reads how many requests there are.
    fn look(&mut self) -> Result<(), RingError> {
        let requests = self.words.u32(REQ_PROD, Acquire);
        let (taken, answered, size) = (self.taken, self.answered, self.size);
        let unanswered = requests.wrapping_sub(answered);
        if unanswered > size || unanswered < taken.wrapping_sub(answered) {
            return Err(RingError::Requests { requests, taken, answered, size });
        }
        self.requests = requests;
        Ok(())
    }

    /// A copy of the next request, if there is one. It counts as taken by [`Ring::advance`].
    #[inline]
    pub(crate) fn peek(&mut self) -> Result<Option<Raw>, RingError> {
        if self.taken == self.requests {
            self.look()?;
            if self.taken == self.requests {
                return Ok(None);
            }
        }
        let at = self.layout.entry_at((self.taken & (self.size - 1)) as usize);
        let mut raw = Raw { bytes: [0; REQUEST_MAX], layout: self.layout };
        for (nth, bytes) in raw.bytes[..self.layout.entry].chunks_exact_mut(4).enumerate() {
            bytes.copy_from_slice(&self.words.u32(at + 4 * nth, Relaxed).to_le_bytes());
        }
        Ok(Some(raw))
    }

    /// What was peeked at is taken; its index.
    #[inline]
    pub(crate) fn advance(&mut self) -> u32 {
        let index = self.taken;
        self.taken = index.wrapping_add(1);
        index
    }

    /// The index of the response that is staged next.
    #[inline]
    pub(crate) fn next_response(&self) -> u32 {
        self.answered.wrapping_add(self.staged)
    }

    /// Puts a response into the ring; the front end sees it when it is published. Of the requests that were taken each
    /// is answered once: so there is always a place, that of a request that was taken.
    #[inline]
    pub(crate) fn stage(&mut self, id: u64, operation: u8, status: i16) {
        let at = self.layout.entry_at((self.next_response() & (self.size - 1)) as usize);
        let words = self.layout.response(id, operation, status);
        for (nth, word) in words.into_iter().take(self.layout.response / 4).enumerate() {
            self.words.put_u32(at + 4 * nth, word, Relaxed);
        }
        self.staged += 1;
    }

    /// Shows the front end what was staged. Whether it is to be rung for (RING_PUSH_RESPONSES_AND_CHECK_NOTIFY).
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
        let (before, staged) = (self.answered, std::mem::take(&mut self.staged));
        self.answered = before.wrapping_add(staged);
        // It sees the responses before it sees that there are any.
        self.words.put_u32(RSP_PROD, self.answered, Release);
        // It says when it is to be rung for and then looks once more; we show, and then look at what it said.
        fence(std::sync::atomic::Ordering::SeqCst);
        let event = self.words.u32(RSP_EVENT, Relaxed);
        self.answered.wrapping_sub(event) < self.answered.wrapping_sub(before)
    }
}
