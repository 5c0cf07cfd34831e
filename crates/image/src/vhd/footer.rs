//! The footer: the last sector of an image, which says what it is; all but fixed ones have a copy of it in the first.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Geometry, SECTOR};

/// What a footer begins with.
pub(super) const COOKIE: [u8; 8] = *b"conectix";
/// What it begins with in an image that blktap's tools have disabled, so that nobody opens it by mistake.
pub(super) const DISABLED: [u8; 8] = *b"v_poison";
/// What blktap fills the last footer with while it has an image open that must not be opened twice. It puts the footer
/// back when it closes the image; one that is still filled with these was not closed.
pub(super) const KILLED: u8 = 0xc7;
/// No offset.
pub(super) const NOWHERE: u64 = u64::MAX;
/// Seconds from 1970 to 2000, when timestamps begin.
const EPOCH: u64 = 946_684_800;

/// What kind of image it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subformat {
    /// The disk's bytes as they are, then the footer.
    Fixed,
    /// Blocks of the disk, in the order in which they were first written.
    Dynamic,
    /// As dynamic, over another image.
    Differencing,
}

impl Subformat {
    /// The type of disk in a footer.
    pub(super) const fn code(self) -> u32 {
        match self {
            Subformat::Fixed => 2,
            Subformat::Dynamic => 3,
            Subformat::Differencing => 4,
        }
    }

    /// Its name, as of QEMU's option `subformat`.
    pub const fn name(self) -> &'static str {
        match self {
            Subformat::Fixed => "fixed",
            Subformat::Dynamic => "dynamic",
            Subformat::Differencing => "differencing",
        }
    }
}

/// A footer as it is stored (specification, "Hard Disk Footer Format").
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Footer {
    pub(super) cookie: [u8; 8],
    /// Bit 1 is always set; bit 0 is for disks that may be deleted at the end.
    pub(super) features: U32,
    pub(super) version: U32,
    /// Of the second header; `NOWHERE` in fixed images.
    pub(super) header_at: U64,
    /// Seconds since 2000.
    pub(super) created: U32,
    pub(super) creator: [u8; 4],
    pub(super) creator_version: U32,
    pub(super) creator_host: [u8; 4],
    pub(super) first_size: U64,
    pub(super) size: U64,
    pub(super) cylinders: U16,
    pub(super) heads: u8,
    pub(super) sectors: u8,
    pub(super) kind: U32,
    pub(super) checksum: U32,
    pub(super) unique_id: [u8; 16],
    pub(super) saved: u8,
    /// Of blktap: an image that only serves as the base of others.
    pub(super) hidden: u8,
    pub(super) reserved: [u8; 426],
}

/// Where the checksum is, in a footer.
const CHECKSUM_AT: usize = 64;

/// The ones' complement of the sum of all bytes but the checksum's, which are at `skip`.
pub(super) fn checksum(bytes: &[u8], skip: usize) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    let own = bytes.get(skip..skip.saturating_add(4)).map_or(0, sum);
    !sum(bytes).wrapping_sub(own)
}

/// Seconds since 2000.
pub(super) fn timestamp(time: std::time::SystemTime) -> u32 {
    let since = time.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    u32::try_from(since.saturating_sub(EPOCH)).unwrap_or(u32::MAX)
}

/// Seconds since 1970 of a timestamp.
pub(super) fn unix_time(timestamp: u32) -> u64 {
    EPOCH + u64::from(timestamp)
}

impl Footer {
    /// What blktap's creator versions are compared with.
    pub(super) const fn tap_version(major: u32, minor: u32) -> u32 {
        major << 16 | minor
    }

    /// A sealed footer of ours, with the geometry of its size.
    pub(super) fn new(kind: Subformat, size: u64, created: u32, unique_id: [u8; 16]) -> Footer {
        let header_at = if kind == Subformat::Fixed { NOWHERE } else { SECTOR };
        let mut footer = Footer {
            cookie: COOKIE,
            features: U32::new(2),
            version: U32::new(0x0001_0000),
            header_at: U64::new(header_at),
            created: U32::new(created),
            // What blktap writes: all who know it, QEMU among them, go by the size and not by the geometry.
            creator: *b"tap\0",
            creator_version: U32::new(Footer::tap_version(1, 3)),
            creator_host: [0; 4],
            first_size: U64::new(size),
            size: U64::ZERO,
            cylinders: U16::ZERO,
            heads: 0,
            sectors: 0,
            kind: U32::new(kind.code()),
            checksum: U32::ZERO,
            unique_id,
            saved: 0,
            hidden: 0,
            reserved: [0; 426],
        };
        footer.set_size(size);
        footer
    }

    /// The footer in these bytes, or what is wrong with them.
    pub(super) fn parse(bytes: &[u8; SECTOR as usize]) -> Result<Footer, Flaw> {
        if bytes.iter().all(|byte| *byte == KILLED) {
            return Err(Flaw::Killed);
        }
        let footer = Footer::read_from_bytes(bytes).map_err(|_never| Flaw::Cookie)?;
        if footer.cookie != COOKIE && footer.cookie != DISABLED {
            return Err(Flaw::Cookie);
        }
        let (found, counted) = (footer.checksum.get(), footer.sum());
        if found == counted || footer.was_hidden_late() {
            return Ok(footer);
        }
        Err(Flaw::Checksum { found, counted })
    }

    fn sum(&self) -> u32 {
        checksum(self.as_bytes(), CHECKSUM_AT)
    }

    /// Early blktap tools set `hidden` and left the checksum as it was.
    fn was_hidden_late(&self) -> bool {
        let old = [Footer::tap_version(0, 1), Footer::tap_version(1, 1)];
        let before = Footer { hidden: 0, ..*self };
        self.hidden != 0
            && self.is_of_blktap()
            && old.contains(&self.creator_version.get())
            && before.sum() == self.checksum.get()
    }

    /// Sets size and geometry, and seals it.
    pub(super) fn set_size(&mut self, bytes: u64) {
        let geometry = Geometry::of(bytes.div_ceil(SECTOR));
        self.size = U64::new(bytes);
        self.cylinders = U16::new(geometry.cylinders);
        self.heads = geometry.heads;
        self.sectors = geometry.sectors;
        self.seal();
    }

    /// Sets the checksum.
    pub(super) fn seal(&mut self) {
        self.checksum = U32::new(self.sum());
    }

    pub(super) fn bytes(&self) -> [u8; SECTOR as usize] {
        let mut bytes = [0; SECTOR as usize];
        bytes.copy_from_slice(self.as_bytes());
        bytes
    }

    pub(super) fn subformat(&self) -> Option<Subformat> {
        match self.kind.get() {
            2 => Some(Subformat::Fixed),
            3 => Some(Subformat::Dynamic),
            4 => Some(Subformat::Differencing),
            _ => None,
        }
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry { cylinders: self.cylinders.get(), heads: self.heads, sectors: self.sectors }
    }

    pub(super) fn is_of_blktap(&self) -> bool {
        self.creator.starts_with(b"tap")
    }

    /// Whether blktap looks for a batmap; in images of its version 1.1 there may be none.
    pub(super) fn has_batmap(&self) -> bool {
        self.is_of_blktap() && self.creator_version.get() >= Footer::tap_version(1, 1)
    }

    /// Whether the disk is as large as its geometry says, not its size: in images of Virtual PC, which knows nothing
    /// else, and in those of QEMU that are to be the same there. Not if the geometry is the largest: it stands for more.
    pub(super) fn goes_by_geometry(&self) -> bool {
        matches!(&self.creator, b"vpc " | b"qemu") && self.geometry().capacity() != Geometry::MAX.capacity()
    }

    /// Sectors of the disk; what is less than one at its end does not count.
    pub(super) fn disk_sectors(&self) -> u64 {
        if self.goes_by_geometry() { self.geometry().capacity() } else { self.size.get() / SECTOR }
    }
}

/// Why bytes are no sound footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// They begin with something else.
    Cookie,
    /// They add up to something else.
    Checksum { found: u32, counted: u32 },
    /// blktap had the image open and has not closed it.
    Killed,
}

impl std::fmt::Display for Flaw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Flaw::Cookie => f.write_str("it does not begin with `conectix`"),
            Flaw::Checksum { found, counted } => {
                write!(f, "its checksum is {found:#010x}, its bytes add up to {counted:#010x}")
            }
            Flaw::Killed => f.write_str(
                "it is filled with 0xc7, as blktap does while it has an image open: that was not closed, or is open still",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_footer_is_a_sector_with_its_fields_where_the_specification_has_them() {
        let mut footer = Footer::new(Subformat::Dynamic, 10 << 20, 0x0102_0304, [7; 16]);
        footer.saved = 1;
        footer.hidden = 9;
        let bytes = footer.bytes();
        assert_eq!(&bytes[..8], b"conectix");
        assert_eq!(bytes[8..12], [0, 0, 0, 2]);
        assert_eq!(bytes[12..16], [0, 1, 0, 0]);
        assert_eq!(bytes[16..24], [0, 0, 0, 0, 0, 0, 2, 0]);
        assert_eq!(bytes[24..28], [1, 2, 3, 4]);
        assert_eq!(bytes[48..56], (10u64 << 20).to_be_bytes());
        assert_eq!(bytes[56..60], [301u16.to_be_bytes()[0], 301u16.to_be_bytes()[1], 4, 17]);
        assert_eq!(bytes[60..64], [0, 0, 0, 3]);
        assert_eq!(bytes[68..84], [7; 16]);
        assert_eq!(bytes[84], 1);
        assert_eq!(bytes[85], 9);
    }

    #[test]
    fn any_changed_bit_is_seen() {
        let bytes = Footer::new(Subformat::Fixed, 1 << 20, 1, [1; 16]).bytes();
        assert!(Footer::parse(&bytes).is_ok());
        for bit in 0..512 * 8 {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Footer::parse(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_killed_footer_is_told_from_a_damaged_one() {
        assert_eq!(Footer::parse(&[0xc7; 512]), Err(Flaw::Killed));
        assert_eq!(Footer::parse(&[0; 512]), Err(Flaw::Cookie));
    }

    #[test]
    fn early_tools_of_blktap_hid_images_without_a_new_checksum() {
        let mut footer = Footer::new(Subformat::Dynamic, 1 << 20, 1, [1; 16]);
        footer.creator_version = U32::new(0x0001_0001);
        footer.seal();
        footer.hidden = 1;
        assert!(Footer::parse(&footer.bytes()).is_ok());
        footer.creator_version = U32::new(0x0001_0003);
        assert!(Footer::parse(&footer.bytes()).is_err());
    }
}
