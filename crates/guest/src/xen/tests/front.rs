//! A front end's driver of one ring, which lays requests out by hand.

use ::xen::PAGE;
use ::xen::events::Port;
use ::xen::fake::Guest;
use ::xen::grants::{Access, GrantRef};

use super::super::device::RingSpec;
use super::super::layout::Abi;

/// A segment as a driver names it: grant, first and last sector.
pub(super) type Seg = (GrantRef, u8, u8);

/// A response: id, operation, status.
pub(super) type Response = (u64, u8, i16);

/// Fields of requests at the offsets of the two compilers (blkif.h; XEN.md 6).
#[derive(Clone, Copy)]
struct Offsets {
    entry: usize,
    response: usize,
    id: usize,
    sector: usize,
    seg: usize,
    indirect: usize,
}

const X64: Offsets = Offsets { entry: 112, response: 16, id: 8, sector: 16, seg: 24, indirect: 28 };
const X32: Offsets = Offsets { entry: 108, response: 12, id: 4, sector: 12, seg: 20, indirect: 24 };

fn offsets(abi: Abi) -> Offsets {
    match abi {
        Abi::Native | Abi::X86_64 => X64,
        Abi::X86_32 => X32,
    }
}

/// A request's bytes.
pub(super) fn request(abi: Abi, op: u8, id: u64, sector: u64, segs: &[Seg]) -> Vec<u8> {
    let at = offsets(abi);
    // What is not said is whatever was there before.
    let mut bytes = vec![0xcd; at.entry];
    (bytes[0], bytes[1]) = (op, segs.len() as u8);
    bytes[at.id..at.id + 8].copy_from_slice(&id.to_le_bytes());
    bytes[at.sector..at.sector + 8].copy_from_slice(&sector.to_le_bytes());
    for (nth, (gref, first, last)) in segs.iter().enumerate() {
        if at.seg + 8 * nth + 6 <= at.entry {
            segment(&mut bytes[at.seg + 8 * nth..], *gref, *first, *last);
        }
    }
    bytes
}

fn segment(bytes: &mut [u8], gref: GrantRef, first: u8, last: u8) {
    bytes[..4].copy_from_slice(&gref.0.to_le_bytes());
    (bytes[4], bytes[5]) = (first, last);
}

pub(super) fn discard(abi: Abi, id: u64, flag: u8, sector: u64, sectors: u64) -> Vec<u8> {
    let mut bytes = request(abi, 5, id, sector, &[]);
    let at = offsets(abi).seg;
    bytes[1] = flag;
    bytes[at..at + 8].copy_from_slice(&sectors.to_le_bytes());
    bytes
}

/// One whose segments are in the pages of these grants.
pub(super) fn indirect(abi: Abi, op: u8, id: u64, sector: u64, count: u16, pages: &[GrantRef]) -> Vec<u8> {
    let mut bytes = request(abi, 6, id, sector, &[]);
    bytes[1] = op;
    bytes[2..4].copy_from_slice(&count.to_le_bytes());
    for (nth, gref) in pages.iter().enumerate() {
        let at = offsets(abi).indirect + 4 * nth;
        bytes[at..at + 4].copy_from_slice(&gref.0.to_le_bytes());
    }
    bytes
}

/// A page of segments of an indirect request.
pub(super) fn table(segs: &[Seg]) -> Vec<u8> {
    let mut bytes = vec![0; 8 * segs.len()];
    for (bytes, (gref, first, last)) in bytes.chunks_exact_mut(8).zip(segs) {
        segment(bytes, *gref, *first, *last);
    }
    bytes
}

/// The driver of one ring.
pub(super) struct Front {
    pub(super) guest: Guest,
    pub(super) abi: Abi,
    /// Where its ring is, in bytes.
    pub(super) at: usize,
    pub(super) size: u32,
    pub(super) refs: Vec<GrantRef>,
    pub(super) port: Port,
    /// Requests made, and responses taken.
    pub(super) made: u32,
    pub(super) seen: u32,
    shown: u32,
}

impl Front {
    /// A ring in so many pages from this one on, with indices that begin at `start` (SHARED_RING_INIT, FRONT_RING_ATTACH).
    pub(super) fn new(guest: &Guest, abi: Abi, page: usize, pages: usize, start: u32) -> Front {
        let refs = (page..page + pages).map(|page| guest.grant(page, Access::Write)).collect();
        let at = page * PAGE;
        // Whatever was in these pages.
        guest.write(at, &vec![0xab; pages * PAGE]);
        for (field, value) in
            [(0, start), (4, start.wrapping_add(1)), (8, start), (12, start.wrapping_add(1))]
        {
            guest.store(at + field, value);
        }
        let size = 32 * pages as u32;
        let (guest, port) = (guest.clone(), guest.offer());
        Front { guest, abi, at, size, refs, port, made: start, seen: start, shown: start }
    }

    pub(super) fn spec(&self) -> RingSpec {
        RingSpec { refs: self.refs.clone(), port: self.port }
    }

    fn entry(&self, index: u32) -> usize {
        self.at + 64 + (index % self.size) as usize * offsets(self.abi).entry
    }

    /// Requests that have no response yet.
    pub(super) fn out(&self) -> u32 {
        self.made.wrapping_sub(self.seen)
    }

    /// Puts a request into the ring, not to be seen yet.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        assert!(self.out() < self.size, "a driver keeps to its ring");
        self.guest.write(self.entry(self.made), bytes);
        self.made = self.made.wrapping_add(1);
    }

    /// Shows what was put, and rings if the back end has asked for it (RING_PUSH_REQUESTS_AND_CHECK_NOTIFY).
    pub(super) fn show(&mut self) -> bool {
        let before = std::mem::replace(&mut self.shown, self.made);
        self.guest.store(self.at, self.made);
        let event = self.guest.load(self.at + 4);
        let rings = self.made.wrapping_sub(event) < self.made.wrapping_sub(before);
        if rings {
            self.guest.ring(self.port);
        }
        rings
    }

    /// Puts and shows one.
    pub(super) fn ask(&mut self, bytes: &[u8]) {
        self.put(bytes);
        self.show();
    }

    /// Responses that are new, and asks to be rung for the next one.
    pub(super) fn responses(&mut self) -> Vec<Response> {
        let mut responses = Vec::new();
        let made = self.guest.load(self.at + 8);
        assert!(made.wrapping_sub(self.seen) <= self.out(), "more responses than requests");
        while self.seen != made {
            let bytes = self.guest.read(self.entry(self.seen), offsets(self.abi).response);
            let id = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let status = i16::from_le_bytes(bytes[10..12].try_into().unwrap());
            assert_eq!(bytes[9], 0, "padding tells nothing");
            assert!(bytes[12..].iter().all(|byte| *byte == 0), "padding tells nothing");
            responses.push((id, bytes[8], status));
            self.seen = self.seen.wrapping_add(1);
        }
        self.guest.store(self.at + 12, self.seen.wrapping_add(1));
        responses
    }
}
