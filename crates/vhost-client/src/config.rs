//! The configuration space of a virtio-blk device, as its bytes were read.

/// Its length in bytes, up to and with the limits of WRITE_ZEROES.
pub(crate) const CONFIG_LEN: u32 = 60;
/// Where its byte `writeback` is.
pub(crate) const WRITEBACK_AT: u32 = 32;

/// What the device says of itself (VIRTIO 1.2, section 5.2.4).
#[derive(Clone, PartialEq, Eq)]
pub struct Config(pub(crate) Vec<u8>);

#[allow(missing_docs)] // named as in the specification
impl Config {
    fn number<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().expect("so many bytes")
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.number(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.number(at))
    }

    /// Sectors of 512 bytes.
    pub fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.number(0))
    }

    pub fn size_max(&self) -> u32 {
        self.u32(8)
    }

    pub fn seg_max(&self) -> u32 {
        self.u32(12)
    }

    pub fn blk_size(&self) -> u32 {
        self.u32(20)
    }

    pub fn physical_block_exp(&self) -> u8 {
        self.0[24]
    }

    pub fn alignment_offset(&self) -> u8 {
        self.0[25]
    }

    pub fn min_io_size(&self) -> u16 {
        self.u16(26)
    }

    pub fn opt_io_size(&self) -> u32 {
        self.u32(28)
    }

    pub fn writeback(&self) -> u8 {
        self.0[WRITEBACK_AT as usize]
    }

    pub fn num_queues(&self) -> u16 {
        self.u16(34)
    }

    pub fn max_discard_sectors(&self) -> u32 {
        self.u32(36)
    }

    pub fn max_discard_seg(&self) -> u32 {
        self.u32(40)
    }

    pub fn discard_sector_alignment(&self) -> u32 {
        self.u32(44)
    }

    pub fn max_write_zeroes_sectors(&self) -> u32 {
        self.u32(48)
    }

    pub fn max_write_zeroes_seg(&self) -> u32 {
        self.u32(52)
    }

    pub fn write_zeroes_may_unmap(&self) -> u8 {
        self.0[56]
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("capacity", &self.capacity())
            .field("size_max", &self.size_max())
            .field("seg_max", &self.seg_max())
            .field("blk_size", &self.blk_size())
            .field("physical_block_exp", &self.physical_block_exp())
            .field("opt_io_size", &self.opt_io_size())
            .field("writeback", &self.writeback())
            .field("num_queues", &self.num_queues())
            .field("max_discard_sectors", &self.max_discard_sectors())
            .field("max_discard_seg", &self.max_discard_seg())
            .field("max_write_zeroes_sectors", &self.max_write_zeroes_sectors())
            .field("max_write_zeroes_seg", &self.max_write_zeroes_seg())
            .field("write_zeroes_may_unmap", &self.write_zeroes_may_unmap())
            .finish_non_exhaustive()
    }
}
