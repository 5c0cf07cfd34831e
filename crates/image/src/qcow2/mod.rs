//! qcow2, versions 2 and 3: QEMU's copy-on-write format of today (docs/interop/qcow2 in QEMU's sources, "the
//! specification" in this folder).
//!
//! Guest clusters are found by two levels of tables (L1, L2), host clusters are counted by two others (the refcount table
//! and its blocks). All numbers are big-endian, all tables begin at cluster boundaries.

mod bitmap;
mod bytes;
mod check;
mod counts;
mod create;
mod enlarge;
mod entry;
mod extension;
mod free;
mod header;
mod health;
mod image;
mod info;
mod map;
mod offline;
mod pack;
mod packed;
mod place;
mod prepare;
mod refcount;
mod reserved;
mod resize;
mod snapshot;
mod table;
mod width;
mod zero;

pub use bitmap::{Bitmap, bitmaps};
pub use check::check;
pub use create::{Create, DataFile, Preallocation, create};
pub use extension::{Bitmaps, Extensions, Feature, FeatureKind};
pub use header::{Compression, Header, autoclear, compatible, incompatible};
pub use image::Qcow2;
pub use info::info;
pub use pack::{Compressor, Packed, Packer};
pub use prepare::prepare;
pub use resize::{reserve, resize, set_size};
pub use snapshot::{Snapshot, apply_snapshot, delete_snapshot, find, snapshots, take_snapshot};

/// What a file of this format, and of version 1, begins with.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bit of an entry of the active L1 table or an L2 table that it leads to: the count of the cluster is exactly one, so it may be
/// written in place.
const COPIED: u64 = 1 << 63;

/// Whether a file that begins with these bytes is of this format: versions 2 and up, known or not.
pub fn is(head: &[u8]) -> bool {
    head.starts_with(&MAGIC) && bytes::be32(head, 4).is_some_and(|version| version >= 2)
}
