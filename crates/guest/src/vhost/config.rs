//! The configuration space of a virtio block device (5.2.4): what a guest reads there, and the one byte that it may
//! write.

use block::Limits;

/// VIRTIO_BLK_F_* (5.2.3) and what virtio and vhost-user add: bits of a set of features.
pub(crate) mod feature {
    pub(crate) const SIZE_MAX: u64 = 1 << 1;
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const CONFIG_WCE: u64 = 1 << 11;
    pub(crate) const MQ: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    /// VHOST_USER_F_PROTOCOL_FEATURES.
    pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub(crate) const VERSION_1: u64 = 1 << 32;

    /// VIRTIO_F_NOTIFY_ON_EMPTY and VIRTIO_F_ANY_LAYOUT (6.3, "Legacy Interface"): not offered, but no harm where a front
    /// end sets them by itself, as some do. The first is about signals to those that asked for none; the second says
    /// that a device makes no assumptions about the layout of requests, as we do not.
    pub(crate) const IGNORED: u64 = 1 << 24 | 1 << 27;
}

/// Bytes: the unit of sectors, whatever the size of a block is (5.2.4).
pub(crate) const SECTOR: u64 = 512;
/// Bytes of the longest segment, and segments of the longest request, header and status not counted.
pub(crate) const SIZE_MAX: u32 = 1 << 20;
pub(crate) const SEG_MAX: u32 = 126;
/// Bytes of the longest request.
pub(crate) const DATA_MAX: u64 = SIZE_MAX as u64 * SEG_MAX as u64;
/// Segments of one discard or write of zeroes.
pub(crate) const RANGES_MAX: u32 = 16;
/// Sectors of one such segment: 2 GiB of a discard; of zeroes, which may have to be written, 256 MiB.
pub(crate) const DISCARD_SECTORS_MAX: u32 = 1 << 22;
pub(crate) const ZERO_SECTORS_MAX: u32 = 1 << 19;
/// Bytes of the longest configuration that vhost-user has (VHOST_USER_MAX_CONFIG_SIZE).
const SPACE_LEN: usize = 256;
/// Where the byte is that says whether there is a write cache.
const WCE_AT: usize = 32;

/// What a disk's configuration is made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Bytes of a block: 512 or 4096.
    pub(crate) block: u32,
    pub(crate) limits: Limits,
    /// How many rings.
    pub(crate) queues: u16,
    /// Whether the write cache is on.
    pub(crate) wce: bool,
}

impl Shape {
    /// Bytes that a guest may use: whole blocks.
    pub(crate) fn capacity(&self) -> u64 {
        self.size & !(u64::from(self.block) - 1)
    }

    /// The features to offer.
    pub(crate) fn features(&self) -> u64 {
        use feature::*;
        let all = SIZE_MAX
            | SEG_MAX
            | BLK_SIZE
            | FLUSH
            | TOPOLOGY
            | CONFIG_WCE
            | MQ
            | INDIRECT_DESC
            | EVENT_IDX
            | PROTOCOL_FEATURES
            | VERSION_1;
        all | if self.limits.read_only { RO } else { DISCARD | WRITE_ZEROES }
    }

    /// The whole configuration space: `struct virtio_blk_config`, then zeroes.
    fn space(&self) -> [u8; SPACE_LEN] {
        let mut space = [0; SPACE_LEN];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        let physical = self.limits.align.max(self.block);
        let least = self.limits.preferred.max(self.block) / self.block;
        put(0, &(self.capacity() / SECTOR).to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &self.block.to_le_bytes());
        // How many blocks are one of the medium's, as a power of two; the first starts at one.
        put(24, &[(physical / self.block).ilog2() as u8]);
        put(25, &[0]);
        put(26, &u16::try_from(least).unwrap_or(u16::MAX).to_le_bytes());
        put(28, &0u32.to_le_bytes());
        put(WCE_AT, &[u8::from(self.wce)]);
        put(34, &self.queues.to_le_bytes());
        if !self.limits.read_only {
            let unit = (self.limits.preferred.max(self.block) / SECTOR as u32).to_le_bytes();
            put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
            put(40, &RANGES_MAX.to_le_bytes());
            put(44, &unit);
            put(48, &ZERO_SECTORS_MAX.to_le_bytes());
            put(52, &RANGES_MAX.to_le_bytes());
            put(56, &[1]);
        }
        space
    }

    /// `len` bytes of it from byte `offset` on; `None` where there are no such.
    pub(crate) fn read(&self, offset: u32, len: u32) -> Option<Vec<u8>> {
        let (offset, len) = (offset as usize, len as usize);
        Some(self.space().get(offset..offset.checked_add(len)?)?.to_vec())
    }

    /// What the write cache is to be after the guest has written this; `None` where that would change anything else.
    pub(crate) fn write(&self, offset: u32, bytes: &[u8]) -> Option<bool> {
        let offset = offset as usize;
        let mut space = self.space();
        space.get_mut(offset..offset.checked_add(bytes.len())?)?.copy_from_slice(bytes);
        let wce = match space[WCE_AT] {
            0 => false,
            1 => true,
            _ => return None,
        };
        (Shape { wce, ..*self }.space() == space).then_some(wce)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        let limits = Limits { align: 4096, preferred: 65536, read_only: false, fast_zero: true };
        Shape { size: (1 << 30) + 700, block: 512, limits, queues: 3, wce: true }
    }

    fn number(shape: &Shape, offset: u32, len: u32) -> u64 {
        shape.read(offset, len).unwrap().iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        // Offsets and lengths of `struct virtio_blk_config`, virtio 1.2, section 5.2.4.
        let shape = shape();
        assert_eq!(number(&shape, 0, 8), 2097153, "sectors: what is less than a block is not told");
        assert_eq!(number(&shape, 8, 4), 1 << 20, "bytes of a segment");
        assert_eq!(number(&shape, 12, 4), 126, "segments");
        assert_eq!(number(&shape, 20, 4), 512, "bytes of a block");
        assert_eq!(number(&shape, 24, 1), 3, "8 blocks are one of the medium");
        assert_eq!(number(&shape, 25, 1), 0, "the first of which starts at 0");
        assert_eq!(number(&shape, 26, 2), 128, "blocks that suit it");
        assert_eq!(number(&shape, 32, 1), 1, "a write cache");
        assert_eq!(number(&shape, 34, 2), 3, "rings");
        assert_eq!(number(&shape, 36, 4), 1 << 22, "sectors of a discard");
        assert_eq!(number(&shape, 40, 4), 16, "segments of a discard");
        assert_eq!(number(&shape, 44, 4), 128, "sectors to which discards are best aligned");
        assert_eq!(number(&shape, 48, 4), 1 << 19, "sectors of zeroes");
        assert_eq!(number(&shape, 52, 4), 16, "segments of zeroes");
        assert_eq!(number(&shape, 56, 1), 1, "zeroes may free space");
    }

    #[test]
    fn blocks_of_4096_bytes_count_as_8_sectors() {
        let shape = Shape { block: 4096, size: (1 << 20) + 4095, ..shape() };
        assert_eq!(number(&shape, 0, 8), 2048);
        assert_eq!((number(&shape, 20, 4), number(&shape, 24, 1), number(&shape, 26, 2)), (4096, 0, 16));
    }

    #[test]
    fn reading_ends_with_the_space() {
        let shape = shape();
        assert_eq!(shape.read(0, 256).unwrap().len(), 256);
        assert_eq!(shape.read(60, 100), Some(vec![0; 100]));
        assert_eq!(shape.read(255, 2), None);
        assert_eq!(shape.read(u32::MAX, u32::MAX), None);
    }

    #[test]
    fn nothing_but_the_write_cache_can_be_written() {
        let shape = shape();
        assert_eq!(shape.write(32, &[0]), Some(false));
        assert_eq!(shape.write(32, &[1]), Some(true));
        assert_eq!(shape.write(32, &[2]), None);
        let mut whole = shape.read(0, 60).unwrap();
        assert_eq!(shape.write(0, &whole), Some(true));
        whole[32] = 0;
        assert_eq!(shape.write(0, &whole), Some(false));
        for at in (0..60).filter(|at| *at != 32) {
            let mut changed = whole.clone();
            changed[at] ^= 0x40;
            assert_eq!(shape.write(0, &changed), None, "byte {at}");
        }
        assert_eq!(shape.write(u32::MAX, &[0]), None);
        assert_eq!(shape.write(32, &[0; 300]), None);
    }

    #[test]
    fn a_disk_that_cannot_be_written_offers_no_change() {
        let mut shape = shape();
        assert_eq!(shape.features() & 1 << 5, 0);
        assert_eq!(shape.features() & (1 << 13 | 1 << 14), 1 << 13 | 1 << 14);
        shape.limits.read_only = true;
        assert_eq!(shape.features() & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
        assert_eq!(number(&shape, 36, 21 % 8), 0);
    }
}
