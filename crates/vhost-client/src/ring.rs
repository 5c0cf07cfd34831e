//! The driver's side of a split virtqueue, written against VIRTIO 1.2, section 2.7.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::Memory;

/// `VIRTQ_DESC_F_NEXT`
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes here.
pub const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`
pub const INDIRECT: u16 = 4;
/// Bytes of a descriptor.
pub(crate) const DESCRIPTOR_LEN: u64 = 16;

/// A run of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// As the guest says it.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub is_written: bool,
}

/// One entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head of the chain.
    pub id: u32,
    /// Bytes that the device says that it has written.
    pub len: u32,
}

/// A queue in memory that is shared with the device.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<Memory>,
    /// Where the descriptors begin; the avail ring follows, then the used ring.
    at: u64,
    len: u16,
    has_event_idx: bool,
    /// Descriptors that belong to no chain.
    free: Vec<u16>,
    /// What the avail index is, or will be when it is published.
    avail: u16,
    /// Where the avail index stood when it was last asked whether to kick.
    told: u16,
    /// Entries of the used ring that were taken.
    taken: u16,
}

impl Ring {
    /// Bytes that a queue of this length needs.
    pub fn bytes(len: u16) -> u64 {
        let len = u64::from(len);
        (len * DESCRIPTOR_LEN + (6 + 2 * len)).next_multiple_of(4) + 6 + 8 * len
    }

    /// An empty queue from `at` on, a multiple of 16.
    pub fn new(memory: Arc<Memory>, at: u64, len: u16, has_event_idx: bool) -> Ring {
        memory.put(at, &vec![0; Ring::bytes(len) as usize]);
        let free = (0..len).rev().collect();
        Ring { memory, at, len, has_event_idx, free, avail: 0, told: 0, taken: 0 }
    }

    /// Makes it empty, as a driver does that starts anew.
    pub fn reset(&mut self, has_event_idx: bool) {
        *self = Ring::new(self.memory.clone(), self.at, self.len, has_event_idx);
    }

    /// Descriptors.
    pub fn len(&self) -> u16 {
        self.len
    }

    /// Whether it has no descriptor, which no ring has.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Descriptors that belong to no chain.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    fn avail_at(&self) -> u64 {
        self.at + u64::from(self.len) * DESCRIPTOR_LEN
    }

    fn used_at(&self) -> u64 {
        (self.avail_at() + 6 + 2 * u64::from(self.len)).next_multiple_of(4)
    }

    /// Addresses in this process of descriptors, avail ring and used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.at, self.avail_at(), self.used_at()].map(|at| self.memory.address() + at)
    }

    /// Writes one descriptor, whatever it says.
    pub fn describe(&self, index: u16, piece: Piece, flags: u16, next: u16) {
        let at = self.at + u64::from(index) * DESCRIPTOR_LEN;
        self.memory.put(at, &descriptor(piece, flags, next));
    }

    /// Says another address in a descriptor.
    pub fn move_to(&self, index: u16, address: u64) {
        self.memory.put(self.at + u64::from(index) * DESCRIPTOR_LEN, &address.to_le_bytes());
    }

    /// Takes so many free descriptors.
    pub fn take(&mut self, count: usize) -> Option<Vec<u16>> {
        let rest = self.free.len().checked_sub(count)?;
        Some(self.free.split_off(rest))
    }

    /// Gives descriptors back.
    pub fn give_back(&mut self, descriptors: &[u16]) {
        self.free.extend(descriptors);
    }

    /// Puts a head into the avail ring; the device sees it when it is published.
    pub fn offer(&mut self, head: u16) {
        let entry = self.avail_at() + 4 + 2 * u64::from(self.avail % self.len);
        self.memory.store_u16(entry, head);
        self.avail = self.avail.wrapping_add(1);
    }

    /// Shows the device what was offered.
    pub fn publish(&self) {
        self.memory.store_u16(self.avail_at() + 2, self.avail);
    }

    /// Sets the avail index to anything.
    pub fn jump(&mut self, index: u16) {
        self.avail = index;
        self.publish();
    }

    /// What the avail index is, or will be when it is published.
    pub fn avail(&self) -> u16 {
        self.avail
    }

    /// Whether the device wants to be told of what was published since this was last asked.
    pub fn must_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let (old, new) = (self.told, self.avail);
        self.told = new;
        if self.has_event_idx {
            let event = self.memory.load_u16(self.used_at() + 4 + 8 * u64::from(self.len));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            old != new && self.memory.load_u16(self.used_at()) & 1 == 0
        }
    }

    /// Where the device's used index stands.
    pub fn used_index(&self) -> u16 {
        self.memory.load_u16(self.used_at() + 2)
    }

    /// The next entry of the used ring, if there is one.
    pub fn used(&mut self) -> Option<Used> {
        if self.used_index() == self.taken {
            return None;
        }
        let entry = self.used_at() + 4 + 8 * u64::from(self.taken % self.len);
        self.taken = self.taken.wrapping_add(1);
        let bytes = self.memory.get(entry, 8);
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Some(Used { id: number(0), len: number(4) })
    }

    /// Asks to be called for the next entry of the used ring.
    pub fn ask_for_a_call(&self) {
        if self.has_event_idx {
            self.memory.store_u16(self.avail_at() + 4 + 2 * u64::from(self.len), self.taken);
        }
        fence(Ordering::SeqCst);
    }

    /// Asks not to be called (`VIRTQ_AVAIL_F_NO_INTERRUPT`), or again to be; for rings without event indices.
    pub fn forbid_calls(&self, are_forbidden: bool) {
        self.memory.store_u16(self.avail_at(), u16::from(are_forbidden));
    }
}

/// The bytes of a descriptor.
pub(crate) fn descriptor(piece: Piece, flags: u16, next: u16) -> [u8; DESCRIPTOR_LEN as usize] {
    let mut bytes = [0; DESCRIPTOR_LEN as usize];
    bytes[..8].copy_from_slice(&piece.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&piece.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
