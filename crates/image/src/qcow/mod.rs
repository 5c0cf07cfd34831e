//! qcow, version 1: the copy-on-write format of QEMU and of blktap in 2006.
//!
//! A guest's cluster is found by two levels of tables (L1, L2) of big-endian byte offsets, where zero means that the image
//! says nothing of it. There are no reference counts: what is used is what is pointed to, and new clusters go to the end
//! of the file. No specification was ever written; the format is what QEMU's block/qcow.c and blktap's
//! drivers/block-qcow.c read and write.
//!
//! Places are never taken back from what points to them: zeroes and discards go to the data where it is, since without a
//! count of references a cluster that is free in one session would be lost to all later ones.

mod check;
mod create;
mod entry;
mod header;
mod image;
mod info;
mod resize;
mod space;
mod whole;

pub use check::check;
pub use create::{Create, create};
pub use header::{Header, Xen};
pub use image::Qcow;
pub use info::info;

/// What a file of this format, and of its later versions, begins with.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Whether a file that begins with these bytes is of this format.
pub fn is(head: &[u8]) -> bool {
    head.starts_with(&MAGIC) && head.get(4..8) == Some(&[0, 0, 0, 1])
}

/// When a round writes these tables: after the data that they point to. There are no counts to be written before them.
const POINTERS: crate::metadata::Stage = 2;
/// Stages of a round; those before the pointers' are empty.
const STAGES: crate::metadata::Stage = 3;
