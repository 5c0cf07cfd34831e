//! The driver's side of a split virtqueue, by virtio 1.2, section 2.7.

use std::rc::Rc;

use super::super::memory::Memory;
use super::super::ring::{Addresses, Ring, Ways};
use super::ram::{Ram, USER};

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// A part of a chain: an address, a length, and whether the device writes there.
pub(super) type Part = (u64, u32, bool);

pub(super) struct Driver {
    pub(super) ram: Rc<Ram>,
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    /// Descriptors that are in no chain.
    free: Vec<u16>,
    /// The descriptors of each chain that is out, by its head.
    chains: Vec<Vec<u16>>,
    next_avail: u16,
    last_used: u16,
}

impl Driver {
    /// A ring of this size from address `at` on, with indices that start at `index`.
    pub(super) fn new(ram: &Rc<Ram>, at: u64, size: u16, index: u16) -> Driver {
        let avail = at + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let driver = Driver {
            ram: ram.clone(),
            size,
            descriptors: at,
            avail,
            used,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); size.into()],
            next_avail: index,
            last_used: index,
        };
        ram.put16(avail + 2, index);
        ram.put16(used + 2, index);
        driver
    }

    pub(super) fn addresses(&self) -> Addresses {
        Addresses { descriptors: USER + self.descriptors, avail: USER + self.avail, used: USER + self.used }
    }

    pub(super) fn ring(&self, memory: &Memory, ways: Ways) -> Ring {
        Ring::new(memory, self.addresses(), self.size, ways).unwrap()
    }

    pub(super) fn put_descriptor(&self, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        self.ram.write(self.descriptors + 16 * u64::from(index), &descriptor(at, len, flags, next));
    }

    /// Puts a chain into descriptors that are free; its head.
    pub(super) fn chain(&mut self, parts: &[Part]) -> u16 {
        let indices: Vec<u16> = parts.iter().map(|_| self.free.pop().expect("a free descriptor")).collect();
        for (nth, (at, len, write)) in parts.iter().enumerate() {
            let next = indices.get(nth + 1).copied();
            let flags = if *write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.put_descriptor(indices[nth], *at, *len, flags, next.unwrap_or(0));
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        head
    }

    /// Puts a chain into a table at address `table`; its head.
    pub(super) fn indirect(&mut self, table: u64, parts: &[Part]) -> u16 {
        for (nth, (at, len, write)) in parts.iter().enumerate() {
            let is_last = nth + 1 == parts.len();
            let flags = if *write { WRITE } else { 0 } | if is_last { 0 } else { NEXT };
            let bytes = descriptor(*at, *len, flags, if is_last { 0 } else { nth as u16 + 1 });
            self.ram.write(table + 16 * nth as u64, &bytes);
        }
        let head = self.free.pop().expect("a free descriptor");
        self.put_descriptor(head, table, 16 * parts.len() as u32, INDIRECT, 0);
        self.chains[usize::from(head)] = vec![head];
        head
    }

    /// Makes a head available; the index that the driver has then.
    pub(super) fn offer(&mut self, head: u16) -> u16 {
        let place = u64::from(self.next_avail % self.size);
        self.ram.put16(self.avail + 4 + 2 * place, head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.ram.put16(self.avail + 2, self.next_avail);
        self.next_avail
    }

    /// The used elements that are new: head and length. Each must be out.
    pub(super) fn take_used(&mut self) -> Vec<(u16, u32)> {
        let index = self.ram.u16(self.used + 2);
        let mut used = Vec::new();
        while self.last_used != index {
            let at = self.used + 4 + 8 * u64::from(self.last_used % self.size);
            let (head, len) = (self.ram.u32(at), self.ram.u32(at + 4));
            let head = u16::try_from(head).expect("a head");
            let chain = std::mem::take(&mut self.chains[usize::from(head)]);
            assert!(!chain.is_empty(), "head {head} was used though it was not out");
            self.free.extend(chain.into_iter().rev());
            used.push((head, len));
            self.last_used = self.last_used.wrapping_add(1);
            assert!(used.len() <= usize::from(self.size), "more were used than there are");
        }
        used
    }

    /// Heads that are out.
    pub(super) fn out(&self) -> usize {
        self.chains.iter().filter(|chain| !chain.is_empty()).count()
    }

    /// The device's flags: 1 means that it wants no kicks.
    pub(super) fn used_flags(&self) -> u16 {
        self.ram.u16(self.used)
    }

    /// The index at which the device wants a kick.
    pub(super) fn avail_event(&self) -> u16 {
        self.ram.u16(self.avail_event_at())
    }

    /// Where that is.
    pub(super) fn avail_event_at(&self) -> u64 {
        self.used + 4 + 8 * u64::from(self.size)
    }

    /// Asks for a signal when this index is passed.
    pub(super) fn put_used_event(&self, index: u16) {
        self.ram.put16(self.avail + 4 + 2 * u64::from(self.size), index);
    }

    /// 1: wants no signals.
    pub(super) fn put_avail_flags(&self, flags: u16) {
        self.ram.put16(self.avail, flags);
    }
}

pub(super) fn descriptor(at: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    let mut bytes = at.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}

/// `struct virtio_blk_req` without data and status.
pub(super) fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}
