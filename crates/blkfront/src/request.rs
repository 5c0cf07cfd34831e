//! A request as a front end means it, and the bytes that say so.

use xen::grants::GrantRef;

use crate::abi::Abi;

/// Bytes of a sector, the unit of rings whatever the disk's block size.
pub const SECTOR: usize = 512;
/// Segments that fit into a request itself (`BLKIF_MAX_SEGMENTS_PER_REQUEST`).
pub const SEGMENTS_MAX: usize = 11;
/// Sectors of a page.
const PAGE_SECTORS: usize = 8;
/// Segments that fit into a page of an indirect request.
pub(crate) const TABLE_LEN: usize = 512;
/// What a driver leaves in bytes that mean nothing: no driver clears a slot.
const STALE: u8 = 0x5a;

/// Operations, named as in blkif.h without `BLKIF_OP_`.
pub mod op {
    #![allow(missing_docs)]
    pub const READ: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const WRITE_BARRIER: u8 = 2;
    pub const FLUSH_DISKCACHE: u8 = 3;
    pub const DISCARD: u8 = 5;
    pub const INDIRECT: u8 = 6;
}

/// What is answered, named as in blkif.h without `BLKIF_RSP_`.
pub mod status {
    #![allow(missing_docs)]
    pub const OKAY: i16 = 0;
    pub const ERROR: i16 = -1;
    pub const EOPNOTSUPP: i16 = -2;
    /// Not blkif.h's: an empty flush failed, in a way that Linux believes (docs/decisions/0013-failed-flush.md).
    pub const FAILED: i16 = -3;
}

/// What is asked for, and how its data lies in pages.
#[derive(Clone, Debug)]
pub struct Request {
    /// The inner one, where the request is indirect.
    pub(crate) operation: u8,
    pub(crate) sector: u64,
    /// What the back end reads.
    pub(crate) out: Vec<u8>,
    /// How many bytes it is to write.
    pub(crate) room: usize,
    /// First and last sector in each page; by default all of each page but the last one's end.
    cuts: Vec<(u8, u8)>,
    /// Sectors of the first page that are skipped.
    skew: usize,
    pub(crate) is_indirect: bool,
    discard: Option<(u8, u64)>,
    pub(crate) id: Option<u64>,
    /// What is said instead.
    lies: Vec<(usize, Vec<u8>)>,
}

impl Request {
    fn new(operation: u8, sector: u64) -> Request {
        Request {
            operation,
            sector,
            out: Vec::new(),
            room: 0,
            cuts: Vec::new(),
            skew: 0,
            is_indirect: false,
            discard: None,
            id: None,
            lies: Vec::new(),
        }
    }

    /// Reads bytes, a multiple of 512, from sector `sector` on.
    pub fn read(sector: u64, len: usize) -> Request {
        Request { room: len, ..Request::new(op::READ, sector) }
    }

    /// Writes bytes.
    pub fn write(sector: u64, bytes: &[u8]) -> Request {
        Request { out: bytes.to_vec(), ..Request::new(op::WRITE, sector) }
    }

    /// Writes bytes, behind everything earlier and before everything later.
    pub fn write_barrier(sector: u64, bytes: &[u8]) -> Request {
        Request { out: bytes.to_vec(), ..Request::new(op::WRITE_BARRIER, sector) }
    }

    /// A barrier without data, as Linux sends it.
    pub fn barrier() -> Request {
        Request::new(op::WRITE_BARRIER, u64::MAX)
    }

    /// A flush, as Linux sends it.
    pub fn flush() -> Request {
        Request::new(op::FLUSH_DISKCACHE, u64::MAX)
    }

    /// Discards sectors.
    pub fn discard(sector: u64, sectors: u64) -> Request {
        Request { discard: Some((0, sectors)), ..Request::new(op::DISCARD, sector) }
    }

    /// Discards sectors so that nobody can read them any more (`BLKIF_DISCARD_SECURE`).
    pub fn secure_discard(sector: u64, sectors: u64) -> Request {
        Request { discard: Some((1, sectors)), ..Request::new(op::DISCARD, sector) }
    }

    /// Any operation, without data.
    pub fn other(operation: u8) -> Request {
        Request::new(operation, 0)
    }

    /// Segments lie in pages of their own.
    pub fn indirect(mut self) -> Request {
        self.is_indirect = true;
        self
    }

    /// The data begins so many sectors into its first page.
    pub fn skewed(mut self, sectors: usize) -> Request {
        assert!(sectors < PAGE_SECTORS);
        self.skew = sectors;
        self
    }

    /// The data lies in these sectors of one page after the other, the last included.
    pub fn cut_in(mut self, cuts: &[(u8, u8)]) -> Request {
        self.cuts = cuts.to_vec();
        self
    }

    /// Its name, instead of one that no other request has.
    pub fn named(mut self, id: u64) -> Request {
        self.id = Some(id);
        self
    }

    /// Says these bytes at this place of the request instead.
    pub fn lying(mut self, at: usize, bytes: &[u8]) -> Request {
        self.lies.push((at, bytes.to_vec()));
        self
    }

    /// Bytes of data.
    pub(crate) fn len(&self) -> usize {
        self.room + self.out.len()
    }

    pub(crate) fn is_read(&self) -> bool {
        self.room > 0
    }

    /// First and last sector in each page.
    pub(crate) fn segments(&self) -> Vec<(u8, u8)> {
        if !self.cuts.is_empty() {
            return self.cuts.clone();
        }
        assert_eq!(self.len() % SECTOR, 0, "whole sectors");
        let (mut first, mut left) = (self.skew, self.len() / SECTOR);
        let mut segments = Vec::new();
        while left > 0 {
            let count = left.min(PAGE_SECTORS - first);
            segments.push((first as u8, (first + count - 1) as u8));
            (first, left) = (0, left - count);
        }
        segments
    }

    /// What its answer must name as the operation.
    pub(crate) fn echo(&self) -> u8 {
        let lie = self.lies.iter().find(|(at, _)| *at == if self.is_indirect { 1 } else { 0 });
        lie.map_or(self.operation, |(_, bytes)| bytes[0])
    }

    /// The slot of the ring. `tables` are the pages that the segments lie in, where it is indirect.
    pub(crate) fn bytes(&self, abi: Abi, id: u64, segments: &[Segment], tables: &[GrantRef]) -> Vec<u8> {
        let layout = abi.layout();
        let mut bytes = vec![STALE; layout.slot];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(layout.id, &id.to_le_bytes());
        put(layout.sector, &self.sector.to_le_bytes());
        if let Some((flag, sectors)) = self.discard {
            put(0, &[self.operation, flag]);
            put(layout.segments, &sectors.to_le_bytes());
        } else if self.is_indirect {
            put(0, &[op::INDIRECT, self.operation]);
            put(2, &(segments.len() as u16).to_le_bytes());
            for (nth, table) in tables.iter().enumerate() {
                put(layout.tables + 4 * nth, &table.0.to_le_bytes());
            }
        } else {
            put(0, &[self.operation, segments.len() as u8]);
            for (nth, segment) in segments.iter().take(SEGMENTS_MAX).enumerate() {
                put(layout.segments + 8 * nth, &segment.bytes());
            }
        }
        for (at, lie) in &self.lies {
            put(*at, lie);
        }
        bytes
    }
}

/// `struct blkif_request_segment`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) gref: GrantRef,
    pub(crate) first: u8,
    pub(crate) last: u8,
}

impl Segment {
    /// Two bytes at its end mean nothing.
    pub(crate) fn bytes(self) -> [u8; 8] {
        let [a, b, c, d] = self.gref.0.to_le_bytes();
        [a, b, c, d, self.first, self.last, STALE, STALE]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(gref: u32, first: u8, last: u8) -> Segment {
        Segment { gref: GrantRef(gref), first, last }
    }

    // The offsets are what offsetof says of xen/io/blkif.h (4.17), compiled with and without "#pragma pack(4)".
    #[test]
    fn a_write_is_laid_out_as_the_header_says() {
        let request = Request::write(0x1122, &[0; 1024]).named(0x8877_6655_4433_2211);
        let segments = [segment(9, 7, 7), segment(0x1_0203, 0, 0)];
        for (abi, id, sector, table) in [(Abi::X86_64, 8, 16, 24), (Abi::X86_32, 4, 12, 20)] {
            let bytes = request.bytes(abi, 0x8877_6655_4433_2211, &segments, &[]);
            assert_eq!(bytes[..2], [1, 2]);
            assert_eq!(bytes[id..id + 8], [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]);
            assert_eq!(bytes[sector..sector + 8], [0x22, 0x11, 0, 0, 0, 0, 0, 0]);
            assert_eq!(bytes[table..table + 6], [9, 0, 0, 0, 7, 7]);
            assert_eq!(bytes[table + 8..table + 14], [3, 2, 1, 0, 0, 0]);
            assert_eq!(bytes.len(), table + 88);
        }
    }

    #[test]
    fn discards_and_indirect_requests_are_laid_out_as_the_header_says() {
        for (abi, id, nr_sectors, grefs) in [(Abi::X86_64, 8, 24, 28), (Abi::X86_32, 4, 20, 24)] {
            let bytes = Request::secure_discard(1, 0x0102).bytes(abi, 5, &[], &[]);
            assert_eq!((&bytes[..2], bytes[id]), (&[5, 1][..], 5));
            assert_eq!(bytes[nr_sectors..nr_sectors + 8], [2, 1, 0, 0, 0, 0, 0, 0]);
            let segments = vec![segment(1, 0, 7); 300];
            let read = Request::read(1, 4096 * 300).indirect();
            let bytes = read.bytes(abi, 5, &segments, &[GrantRef(0xaabb)]);
            assert_eq!(bytes[..4], [6, 0, 300_u16.to_le_bytes()[0], 1]);
            assert_eq!(bytes[grefs..grefs + 4], [0xbb, 0xaa, 0, 0]);
            assert_eq!(read.echo(), op::READ);
        }
    }

    #[test]
    fn data_is_cut_at_pages() {
        assert_eq!(Request::read(0, 512 * 18).segments(), [(0, 7), (0, 7), (0, 1)]);
        assert_eq!(Request::read(0, 512 * 4).skewed(6).segments(), [(6, 7), (0, 1)]);
        assert_eq!(Request::flush().segments(), []);
        assert_eq!(Request::read(0, 1024).cut_in(&[(3, 3), (5, 5)]).segments(), [(3, 3), (5, 5)]);
    }
}
