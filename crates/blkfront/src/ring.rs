//! A ring that is shared with a back end, from the guest's side: any number of pages, which need not lie together.

use std::sync::atomic::{Ordering, fence};

use xen::PAGE;
use xen::fake::Guest;

use crate::abi::{Abi, HEADER};
use crate::{Error, Result};

/// Places of the words at a ring's start (`struct blkif_sring`).
const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 4;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;

/// The driver's side of a ring.
pub struct Ring {
    guest: Guest,
    /// Its pages, as the back end has them one after the other.
    pages: Vec<usize>,
    abi: Abi,
    len: u32,
    /// Where the next request goes, and how far the back end knows.
    next: u32,
    shown: u32,
    /// Where the next answer is expected.
    consumed: u32,
    /// What was written last into each slot, by us; where an answer has come since, that.
    slots: Vec<Vec<u8>>,
}

impl Ring {
    pub(crate) fn new(guest: Guest, pages: Vec<usize>, abi: Abi) -> Ring {
        let len = abi.slots(pages.len());
        let slots = vec![vec![0; abi.layout().slot]; len as usize];
        let ring = Ring { guest, pages, abi, len, next: 0, shown: 0, consumed: 0, slots };
        // SHARED_RING_INIT of ring.h; the rest of the pages is zero.
        for page in &ring.pages {
            ring.guest.write(page * PAGE, &[0; PAGE]);
        }
        ring.store(REQ_EVENT, 1);
        ring.store(RSP_EVENT, 1);
        ring
    }

    /// Slots.
    pub fn size(&self) -> u32 {
        self.len
    }

    /// The guest's address of this byte of the ring.
    pub fn address(&self, at: usize) -> usize {
        self.pages[at / PAGE] * PAGE + at % PAGE
    }

    /// Where in the ring a slot begins.
    pub fn slot(&self, index: u32) -> usize {
        HEADER + (index % self.len) as usize * self.abi.layout().slot
    }

    /// Copies bytes into the ring.
    pub fn put(&self, at: usize, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let len = (PAGE - (at + done) % PAGE).min(bytes.len() - done);
            self.guest.write(self.address(at + done), &bytes[done..done + len]);
            done += len;
        }
    }

    /// Copies bytes out of the ring.
    pub fn get(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let from = at + bytes.len();
            let count = (PAGE - from % PAGE).min(len - bytes.len());
            bytes.extend(self.guest.read(self.address(from), count));
        }
        bytes
    }

    fn load(&self, at: usize) -> u32 {
        self.guest.load(self.address(at))
    }

    fn store(&self, at: usize, value: u32) {
        self.guest.store(self.address(at), value);
    }

    /// How far the back end has answered, as it says.
    pub fn answered(&self) -> u32 {
        self.load(RSP_PROD)
    }

    /// How far the front end has asked, as the back end can see.
    pub fn asked(&self) -> u32 {
        self.load(REQ_PROD)
    }

    /// Tells the back end of requests that are not there.
    pub fn jump(&mut self, index: u32) {
        self.store(REQ_PROD, index);
    }

    /// Lets the ring's counters begin elsewhere than at 0, before anybody knows of it: they wrap around sooner.
    pub fn begin_at(&mut self, index: u32) {
        assert_eq!(self.next, 0, "nothing was asked yet");
        (self.next, self.shown, self.consumed) = (index, index, index);
        self.store(REQ_PROD, index);
        self.store(RSP_PROD, index);
        self.store(REQ_EVENT, index.wrapping_add(1));
        self.store(RSP_EVENT, index.wrapping_add(1));
    }

    /// Whether there is room for another request.
    pub(crate) fn is_full(&self) -> bool {
        self.next.wrapping_sub(self.consumed) >= self.len
    }

    /// Puts a request into the next slot; the back end does not see it yet.
    pub fn offer(&mut self, bytes: &[u8]) -> u32 {
        let index = self.next;
        self.put(self.slot(index), bytes);
        let slot = &mut self.slots[(index % self.len) as usize];
        slot[..bytes.len()].copy_from_slice(bytes);
        self.next = index.wrapping_add(1);
        index
    }

    /// Shows the back end what was offered; whether it wants to be told (RING_PUSH_REQUESTS_AND_CHECK_NOTIFY).
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.shown, self.next);
        self.store(REQ_PROD, new);
        fence(Ordering::SeqCst);
        self.shown = new;
        new.wrapping_sub(self.load(REQ_EVENT)) < new.wrapping_sub(old)
    }

    /// Asks to be told of the next answer; whether there is one already (RING_FINAL_CHECK_FOR_RESPONSES).
    pub(crate) fn arm(&self) -> bool {
        self.store(RSP_EVENT, self.consumed.wrapping_add(1));
        fence(Ordering::SeqCst);
        self.load(RSP_PROD) != self.consumed
    }

    /// The next answer: id, operation and status.
    pub(crate) fn take(&mut self) -> Result<Option<(u64, u8, i16)>> {
        let answered = self.answered();
        if answered == self.consumed {
            return Ok(None);
        }
        if answered.wrapping_sub(self.consumed) > self.shown.wrapping_sub(self.consumed) {
            return Err(format!("answers up to {answered} to requests up to {}", self.shown).into());
        }
        let (index, layout) = (self.consumed, self.abi.layout());
        let bytes = self.get(self.slot(index), layout.slot);
        let before = &mut self.slots[(index % self.len) as usize];
        let (answer, behind) = bytes.split_at(layout.answer);
        if *behind != before[layout.answer..] {
            return Err(format!("answer {index} has overwritten what is behind it").into());
        }
        before.copy_from_slice(&bytes);
        self.consumed = index.wrapping_add(1);
        let [i0, i1, i2, i3, i4, i5, i6, i7, operation, nothing, s0, s1, ref rest @ ..] = answer[..] else {
            return Err(Error::from("an answer has 12 bytes at least"));
        };
        if nothing != 0 || rest.iter().any(|byte| *byte != 0) {
            return Err(
                format!("answer {index} has bytes that mean nothing and are not zero: {answer:?}").into()
            );
        }
        let id = u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]);
        Ok(Some((id, operation, i16::from_le_bytes([s0, s1]))))
    }
}
