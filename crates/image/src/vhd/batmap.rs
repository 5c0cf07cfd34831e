//! The batmap: a map with a bit for each block, set where every sector of the block has been written. blktap has it behind
//! the block allocation table, to spare itself the blocks' own bitmaps.
//!
//! It says less than the bitmaps do and is never needed: a bit that is not set says nothing. So what allocates blocks
//! here does not touch it, and nothing that it says ever becomes untrue, since no sector of a block is unwritten again. To
//! keep it up to date would cost its checksum, in another sector than the map: a power cut between the two would leave an
//! image that blktap refuses to write.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{SECTOR, footer};

/// What its header begins with.
pub(super) const COOKIE: [u8; 8] = *b"tdbatmap";
/// The bytes of its blocks, whatever those of the image are: blktap has no others.
pub(super) const BLOCK: u64 = 2 << 20;

/// The header of a batmap, in the first sector after the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Batmap {
    cookie: [u8; 8],
    pub(super) at: U64,
    /// Of the map.
    pub(super) sectors: U32,
    version: U32,
    /// Of the map's bytes.
    checksum: U32,
    marker: u8,
    /// Whether the disk is encrypted, with what key is in the next two.
    pub(super) is_encrypted: u8,
    nonce: [u8; 32],
    key_hash: [u8; 32],
    reserved: [u8; 418],
}

impl Batmap {
    /// One for a table of so many blocks that ends at this byte. Its map is behind it.
    pub(super) fn new(table_end: u64, blocks: u32) -> Batmap {
        let mut batmap = Batmap {
            cookie: COOKIE,
            at: U64::new(table_end + SECTOR),
            sectors: U32::new(blocks.div_ceil(8).div_ceil(SECTOR as u32).max(1)),
            version: U32::new(footer::Footer::tap_version(1, 2)),
            checksum: U32::ZERO,
            marker: 0,
            is_encrypted: 0,
            nonce: [0; 32],
            key_hash: [0; 32],
            reserved: [0; 418],
        };
        batmap.seal(&[], 0);
        batmap
    }

    /// The same for another place and number of blocks.
    pub(super) fn moved(&self, table_end: u64, blocks: u32) -> Batmap {
        let other = Batmap::new(table_end, blocks);
        Batmap { at: other.at, sectors: other.sectors, ..*self }
    }

    pub(super) fn parse(bytes: &[u8]) -> Option<Batmap> {
        let (batmap, _) = Batmap::read_from_prefix(bytes).ok()?;
        let known = batmap.version.get() <= footer::Footer::tap_version(1, 2);
        (batmap.cookie == COOKIE && known).then_some(batmap)
    }

    pub(super) fn bytes(&self) -> [u8; SECTOR as usize] {
        let mut bytes = [0; SECTOR as usize];
        bytes.copy_from_slice(self.as_bytes());
        bytes
    }

    /// Bytes of the map.
    pub(super) fn len(&self) -> u64 {
        u64::from(self.sectors.get()) * SECTOR
    }

    /// How many of its first bytes count for the checksum, for a disk of this size.
    fn counted(&self, size: u64) -> u64 {
        (size / (BLOCK * 8)).div_ceil(SECTOR).max(1) * SECTOR
    }

    fn sum(&self, map: &[u8]) -> u32 {
        if self.version.get() == footer::Footer::tap_version(1, 1) {
            // Bytes had signs then.
            !map.iter().fold(0u32, |sum, byte| sum.wrapping_add_signed(i32::from(byte.cast_signed())))
        } else {
            footer::checksum(map, usize::MAX - 4)
        }
    }

    /// Whether the checksum is that of this map, for a disk of so many bytes.
    pub(super) fn fits(&self, map: &[u8], size: u64) -> bool {
        let counted = self.counted(size).min(self.len()) as usize;
        map.get(..counted).is_some_and(|map| self.sum(map) == self.checksum.get())
    }

    /// Sets the checksum to that of these bytes of the map, for a disk of so many bytes; zeroes after them count nothing.
    pub(super) fn seal(&mut self, map: &[u8], size: u64) {
        let counted = self.counted(size).min(map.len() as u64) as usize;
        self.checksum = U32::new(self.sum(&map[..counted]));
    }

    /// Makes the map say nothing of the blocks from this one on; whether it did.
    pub(super) fn forget(map: &mut [u8], block: u32) -> bool {
        let first = block as usize / 8;
        let rest = map.get_mut(first..).unwrap_or_default();
        let mut changed = false;
        for (nth, byte) in rest.iter_mut().enumerate() {
            let kept = if nth == 0 { !(0xff >> (block % 8)) } else { 0 };
            changed |= *byte & !kept != 0;
            *byte &= kept;
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_header_is_a_sector_with_the_fields_where_blktap_has_them() {
        let batmap = Batmap::new(1536 + 512, 5);
        let bytes = batmap.bytes();
        assert_eq!(&bytes[..8], b"tdbatmap");
        assert_eq!(bytes[8..16], 2560u64.to_be_bytes());
        assert_eq!(bytes[16..20], 1u32.to_be_bytes());
        assert_eq!(bytes[20..24], [0, 1, 0, 2]);
        assert_eq!(bytes[24..28], [0xff; 4], "the complement of nothing");
        assert_eq!(Batmap::parse(&bytes), Some(batmap));
        assert_eq!(Batmap::parse(&[0; 512]), None);
        assert_eq!(Batmap::parse(&bytes[..100]), None);
    }

    #[test]
    fn its_map_has_a_bit_for_each_block() {
        assert_eq!(Batmap::new(0, 1).len(), 512);
        assert_eq!(Batmap::new(0, 4096).len(), 512);
        assert_eq!(Batmap::new(0, 4097).len(), 1024);
    }

    #[test]
    fn blocks_that_a_disk_has_not_are_forgotten() {
        for (block, expected) in
            [(0, [0, 0, 0]), (3, [0xe0, 0, 0]), (8, [0xff, 0, 0]), (23, [0xff, 0xff, 0xfe])]
        {
            let mut map = [0xff; 3];
            assert!(Batmap::forget(&mut map, block));
            assert_eq!(map, expected, "{block}");
            assert!(!Batmap::forget(&mut map, block));
        }
        assert!(!Batmap::forget(&mut [0xff; 3], 24));
    }

    #[test]
    fn a_changed_map_is_seen() {
        let mut batmap = Batmap::new(0, 4096);
        let mut map = vec![0; 512];
        map[3] = 0x80;
        batmap.seal(&map, 1 << 30);
        assert!(batmap.fits(&map, 1 << 30));
        map[3] = 0xc0;
        assert!(!batmap.fits(&map, 1 << 30));
        // In the version before, a byte of 0x80 counts as -128: 0xffffffff - (-128).
        batmap.version = U32::new(0x0001_0001);
        map[3] = 0x80;
        batmap.checksum = U32::new(127);
        assert!(batmap.fits(&map, 1 << 30));
    }
}
