//! Persistent bitmaps: which parts of the disk changed since somebody began to look (specification, "Bitmaps").
//!
//! tapdisk does not keep them up, but says so: a bitmap that should have followed is marked as in use, which is what QEMU finds
//! after a crash of its own. Those that are not followed stay what they are.

use std::rc::Rc;

use storage::Storage;

use crate::ImageError;

use super::bytes::{self, be32, be64};
use super::extension::Bitmaps;
use super::header::Header;

/// Bytes of an entry of the directory before its name.
const ENTRY: u64 = 24;
/// Longest name (QEMU's `BME_MAX_NAME_SIZE`).
const NAME_MAX: usize = 1023;
/// Most entries of a bitmap's table (QEMU's `BME_MAX_TABLE_SIZE`).
const TABLE_MAX: u32 = 0x800_0000;
/// It is not what it should be.
const IN_USE: u32 = 1 << 0;
/// It should follow what is written to the disk.
const AUTO: u32 = 1 << 1;

/// A bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Bytes of the disk that a bit stands for.
    pub granularity: u64,
    /// Whether it was left behind while in use, so that nothing can be said of what it says.
    pub in_use: bool,
    /// Whether it should follow what is written to the disk.
    pub auto: bool,
    /// Byte of the file at which its table starts, and the table's entries.
    pub(super) table: (u64, u32),
    /// Byte of the file at which its flags are.
    flags_at: u64,
    flags: u32,
}

/// Reads the directory of the bitmaps.
///
/// # Errors
/// It makes no sense, or the storage's.
pub async fn bitmaps(file: &Rc<dyn Storage>, header: &Header) -> Result<Vec<Bitmap>, ImageError> {
    let Some(Bitmaps { count, len, at }) = header.extensions.bitmaps else { return Ok(Vec::new()) };
    if at.checked_add(len).is_none_or(|end| end > file.size()) {
        return Err(ImageError::Invalid(format!(
            "the directory of the bitmaps is at {at}+{len}, but the file ends at {}",
            file.size()
        )));
    }
    let directory = bytes::read(file, at, len as usize).await?;
    let mut found = Vec::new();
    let mut next = 0;
    while next < directory.len() && found.len() < count as usize {
        let (bitmap, size) = entry(&directory[next..], at + next as u64, header).ok_or_else(|| {
            ImageError::Invalid(format!(
                "the bitmap number {} in the directory at {at} makes no sense",
                found.len()
            ))
        })?;
        found.push(bitmap);
        next += size;
    }
    if found.len() != count as usize || next != directory.len() {
        return Err(ImageError::Invalid(format!(
            "the directory of the bitmaps at {at} has {} of them in {next} bytes; it should have {count} in {len}",
            found.len()
        )));
    }
    Ok(found)
}

/// The first bitmap in these bytes of the directory, and how many bytes it takes.
fn entry(bytes: &[u8], at: u64, header: &Header) -> Option<(Bitmap, usize)> {
    let (table_at, entries, flags) = (be64(bytes, 0)?, be32(bytes, 8)?, be32(bytes, 12)?);
    let [kind, bits, high, low] = *bytes.get(16..20)? else { return None };
    let (name_len, extra) = (usize::from(u16::from_be_bytes([high, low])), be32(bytes, 20)? as usize);
    let name_at = (ENTRY as usize).checked_add(extra)?;
    let name = bytes.get(name_at..name_at.checked_add(name_len)?)?;
    let size = name_at.checked_add(name_len)?.checked_next_multiple_of(8)?;
    let sound = kind == 1
        && bits < 64
        && (1..=NAME_MAX).contains(&name_len)
        && table_at.is_multiple_of(header.cluster_size())
        && table_at != 0
        && (1..=TABLE_MAX).contains(&entries)
        && size <= bytes.len();
    let bitmap = Bitmap {
        name: String::from_utf8_lossy(name).into_owned(),
        granularity: 1 << (bits & 63),
        in_use: flags & IN_USE != 0,
        auto: flags & AUTO != 0,
        table: (table_at, entries),
        flags_at: at + 12,
        flags,
    };
    sound.then_some((bitmap, size))
}

/// Marks bitmaps as not to be trusted any more, since the disk is about to change: those that should follow it, or `all` where
/// it gets another size. The caller syncs.
///
/// # Errors
/// As of [`bitmaps`]; then those before may be marked.
pub(super) async fn distrust(file: &Rc<dyn Storage>, header: &Header, all: bool) -> Result<bool, ImageError> {
    let mut changed = false;
    for bitmap in bitmaps(file, header).await? {
        if (bitmap.auto || all) && !bitmap.in_use {
            bytes::write(file, bitmap.flags_at, &(bitmap.flags | IN_USE).to_be_bytes()).await?;
            changed = true;
        }
    }
    Ok(changed)
}
