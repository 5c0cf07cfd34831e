//! Microsoft's Virtual Hard Disk (VHD), which QEMU calls vpc: fixed, dynamic and differencing images, as Virtual PC, Hyper-V,
//! QEMU and blktap (Xen) write them.
//!
//! A *fixed* image is the disk's bytes and a footer. A *dynamic* one has blocks, of 2 MiB as a rule: the block allocation
//! table says in which sector of the file each begins, first with a bitmap of a bit for each sector of the block, then
//! with its data. What has no block, or a clear bit, is zero; in a *differencing* image it is what the image below says.
//! All numbers are big-endian. The footer is the last sector of the file, so each new block takes its place and a new one is
//! written behind it; a copy of it in the file's first sector is what survives a power cut between the two.
//!
//! Sources: Microsoft's "Virtual Hard Disk Image Format Specification" (1.0, 2006), and what the programs do where it says
//! nothing.

mod batmap;
mod blocks;
mod check;
mod create;
mod cut;
mod footer;
mod geometry;
mod header;
mod image;
mod info;
mod locators;
mod place;
mod resize;

pub use check::{check, check_device};
pub use create::{Create, Parent, Preallocation, create};
pub use footer::Subformat;
pub use geometry::Geometry;
pub use header::Header;
pub use image::Vhd;
pub use info::info;
pub use resize::resize;

/// Bytes of a sector, whatever the storage's are.
const SECTOR: u64 = 512;
/// Sectors of the largest disk: 2040 GiB, as of Microsoft's and QEMU's limit. With blocks of 2 MiB, and their bitmaps, so
/// much can be addressed by a table whose entries are 32-bit numbers of sectors.
const SECTORS_MAX: u64 = 0xff00_0000;

/// Whether a file with these first bytes is a dynamic or differencing image.
pub fn is(head: &[u8]) -> bool {
    head.starts_with(&footer::COOKIE) || head.starts_with(&footer::DISABLED)
}

/// Whether a file with these last bytes, 512 of them or, in old ones, 511, is an image; a fixed one if it is not one by its
/// first bytes.
pub fn is_fixed(tail: &[u8]) -> bool {
    let from = |len: usize| tail.len().checked_sub(len).and_then(|at| tail.get(at..));
    [SECTOR as usize, SECTOR as usize - 1].into_iter().filter_map(from).any(is)
}

/// Whether a file with these last 512 bytes may be a fixed image, whatever it begins with, which is its guest's: they are the
/// footer of one, whole or damaged, or what blktap leaves of one while it has the image open.
pub fn ends_fixed(tail: &[u8]) -> bool {
    let kind = |from: &[u8]| from.get(60..64) == Some(&Subformat::Fixed.code().to_be_bytes());
    let from = |len: usize| tail.len().checked_sub(len).and_then(|at| tail.get(at..));
    let is_killed = tail.len() == SECTOR as usize && tail.iter().all(|byte| *byte == footer::KILLED);
    is_killed
        || [SECTOR as usize, SECTOR as usize - 1]
            .into_iter()
            .filter_map(from)
            .any(|from| is(from) && kind(from))
}
