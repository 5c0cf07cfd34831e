//! Internal snapshots: other L1 tables in the same file, each with a name (specification, "Snapshots").

use std::rc::Rc;
use std::time::Duration;

use storage::Storage;

use crate::ImageError;

use super::COPIED;
use super::bitmap::distrust;
use super::bytes::{self, be32, be64};
use super::header::{Header, L1_MAX, SNAPSHOTS_MAX, autoclear};
use super::offline::{Change, read_table};

/// Bytes of an entry of the snapshot table before its further fields.
const ENTRY: usize = 40;
/// Most bytes of further fields of an entry (QEMU's `QCOW_MAX_SNAPSHOT_EXTRA_DATA`).
const EXTRA_MAX: usize = 1024;
/// Most bytes of the table that are read: a name, an identifier and further fields of each are bounded, but not their sum.
const TABLE_MAX: usize = 64 << 20;
/// Bytes of the table read at a time.
const PIECE: usize = 64 << 10;

/// Longest name (QEMU's `QEMUSnapshotInfo`).
const NAME_MAX: usize = 255;

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// What tells it from all others; QEMU counts from 1.
    pub id: String,
    /// Its name; several may have the same.
    pub name: String,
    /// When it was made, in seconds since 1970.
    pub seconds: u32,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub guest_nanoseconds: u64,
    /// Bytes of a saved guest's memory and devices.
    pub vm_state: u64,
    /// Bytes of the disk, where that is known.
    pub size: Option<u64>,
    /// Byte of the file at which its L1 table starts.
    pub l1_at: u64,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Its entry of the table, as it is in the file.
    pub(super) entry: Vec<u8>,
}

/// The snapshot table and what is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) snapshots: Vec<Snapshot>,
    /// Bytes of the table.
    pub(super) len: u64,
}

/// Reads the snapshot table.
///
/// # Errors
/// It makes no sense, or the storage's.
pub async fn snapshots(file: &Rc<dyn Storage>, header: &Header) -> Result<Vec<Snapshot>, ImageError> {
    Ok(table(file, header).await?.snapshots)
}

/// As [`snapshots`], with the table's length.
pub(super) async fn table(file: &Rc<dyn Storage>, header: &Header) -> Result<Table, ImageError> {
    let mut table = Table::default();
    if header.snapshots > SNAPSHOTS_MAX {
        return Err(odd(
            header,
            0,
            &format!("counts {} snapshots, more than {SNAPSHOTS_MAX}", header.snapshots),
        ));
    }
    let mut window: Vec<u8> = Vec::new();
    for number in 0..header.snapshots {
        // The largest entry is smaller than three pieces.
        let (snapshot, len) = loop {
            match parse(&window) {
                Parsed::Whole(snapshot, len) => break (snapshot, len),
                Parsed::Odd(why) => return Err(odd(header, number, why)),
                Parsed::Short => {}
            }
            let at = header.snapshots_at.checked_add(table.len + window.len() as u64);
            let Some(at) = at.filter(|at| *at < file.size()) else {
                return Err(odd(header, number, "lies beyond the end of the file"));
            };
            let piece = PIECE.min((file.size() - at) as usize);
            window.extend(bytes::read(file, at, piece).await?);
        };
        // The padding of the last one need not be in the file.
        window.drain(..len.min(window.len()));
        table.len += len as u64;
        if table.len > TABLE_MAX as u64 {
            return Err(odd(header, number, "lies further from the begin than any table is read"));
        }
        table.snapshots.push(snapshot);
    }
    Ok(table)
}

/// The one that is meant: by its identifier, or else by its name.
pub fn find<'a>(snapshots: &'a [Snapshot], wanted: &str) -> Option<&'a Snapshot> {
    let by_id = snapshots.iter().find(|snapshot| snapshot.id == wanted);
    by_id.or_else(|| snapshots.iter().find(|snapshot| snapshot.name == wanted))
}

/// The one that is meant to be deleted: by its name, as `qemu-img` has it, or else by its identifier. What is another one's
/// identifier may well be the name of one, and what is gone is gone.
fn find_doomed<'a>(snapshots: &'a [Snapshot], wanted: &str) -> Option<&'a Snapshot> {
    let by_name = snapshots.iter().find(|snapshot| snapshot.name == wanted);
    by_name.or_else(|| find(snapshots, wanted))
}

/// Makes a snapshot of the disk as it is, at a time since 1970. Nobody has the image open.
///
/// # Errors
/// The image is not sound, cannot have snapshots, or the storage failed: then there is the snapshot or there is none, and at most
/// space leaks.
pub async fn take_snapshot(file: &Rc<dyn Storage>, name: &str, when: Duration) -> Result<(), ImageError> {
    if name.len() > NAME_MAX {
        return Err(ImageError::Refused(format!("a snapshot's name has at most {NAME_MAX} bytes")));
    }
    let mut change = Change::begin(file).await?;
    if change.header.has_data_file() {
        return Err(ImageError::Refused(
            "a disk with an external data file has no snapshots within its image".to_owned(),
        ));
    }
    if change.header.snapshots >= SNAPSHOTS_MAX {
        return Err(ImageError::Refused(format!("an image has at most {SNAPSHOTS_MAX} snapshots")));
    }
    let old = table(file, &change.header).await?;
    // As QEMU counts: one more than the largest that is a number.
    let last = old.snapshots.iter().filter_map(|snapshot| leading_number(&snapshot.id)).max().unwrap_or(0);
    let l1: Vec<u64> = active(&change).await?.iter().map(|word| word & !COPIED).collect();
    let l1_at = change.l1_table(&l1).await?;
    let mut bytes = joined(&old.snapshots);
    let new =
        entry(l1_at, l1.len() as u32, &last.saturating_add(1).to_string(), name, when, change.header.size);
    bytes.extend_from_slice(&new);
    if bytes.len() > TABLE_MAX {
        return Err(ImageError::Refused(
            "the names of this image's snapshots are too long for another one".to_owned(),
        ));
    }
    let table_at = change.plain_table(&bytes).await?;
    change.count().await?;
    change.header.snapshots_at = table_at;
    change.header.snapshots += 1;
    change.switch().await?;
    change.end().await
}

/// Deletes a snapshot, by its name or else by its identifier. Nobody has the image open.
///
/// # Errors
/// There is none such, the image is not sound, or the storage failed: then it is there or it is not, and at most space leaks.
pub async fn delete_snapshot(file: &Rc<dyn Storage>, wanted: &str) -> Result<(), ImageError> {
    let mut change = Change::begin(file).await?;
    let old = table(file, &change.header).await?;
    let gone = find_doomed(&old.snapshots, wanted).ok_or_else(|| missing(wanted))?.clone();
    let mut left = old.snapshots;
    let place = left.iter().position(|snapshot| *snapshot == gone).unwrap_or(left.len());
    left.remove(place);
    let table_at = change.plain_table(&joined(&left)).await?;
    change.count().await?;
    change.header.snapshots_at = table_at;
    change.header.snapshots = left.len() as u32;
    change.switch().await?;
    change.end().await
}

/// Makes the disk what it was when the snapshot was taken, its size included. Nobody has the image open.
///
/// # Errors
/// There is none such, the image is not sound, or the storage failed: then the disk is as it was or as the snapshot is, and at
/// most space leaks.
pub async fn apply_snapshot(file: &Rc<dyn Storage>, wanted: &str) -> Result<(), ImageError> {
    let mut change = Change::begin(file).await?;
    let all = snapshots(file, &change.header).await?;
    let snapshot = find(&all, wanted).ok_or_else(|| missing(wanted))?;
    let size = snapshot.size.unwrap_or(change.header.size);
    let needed = change.header.l1_needed(size);
    if needed * 8 > L1_MAX || size > i64::MAX as u64 {
        return Err(ImageError::Invalid(format!(
            "the disk of snapshot `{wanted}` has {size} bytes, more than there can be"
        )));
    }
    let mut l1 = read_table(file, snapshot.l1_at, snapshot.l1_entries.into()).await?;
    l1.iter_mut().for_each(|word| *word &= !COPIED);
    l1.resize(l1.len().max(needed as usize), 0);
    let l1_at = change.l1_table(&l1).await?;
    change.count().await?;
    match distrust(file, &change.header, size != change.header.size).await {
        Ok(_) => {}
        Err(ImageError::Io(error)) => return Err(error.into()),
        Err(ImageError::Invalid(_) | ImageError::Unsupported(_) | ImageError::Refused(_)) => {
            change.header.autoclear &= !autoclear::BITMAPS;
        }
    }
    change.header.l1_at = l1_at;
    change.header.l1_entries = l1.len() as u32;
    change.header.size = size;
    change.switch().await?;
    change.end().await
}

fn missing(wanted: &str) -> ImageError {
    ImageError::Refused(format!("there is no snapshot `{wanted}` in this image"))
}

async fn active(change: &Change<'_>) -> block::Result<Vec<u64>> {
    read_table(change.file, change.header.l1_at, change.header.l1_entries.into()).await
}

/// The number that a text begins with.
fn leading_number(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    text[..digits].parse().ok()
}

fn joined(snapshots: &[Snapshot]) -> Vec<u8> {
    snapshots.iter().flat_map(|snapshot| snapshot.entry.iter().copied()).collect()
}

/// The bytes of an entry of the snapshot table.
fn entry(l1_at: u64, l1_entries: u32, id: &str, name: &str, when: Duration, size: u64) -> Vec<u8> {
    let mut all = l1_at.to_be_bytes().to_vec();
    all.extend_from_slice(&l1_entries.to_be_bytes());
    all.extend_from_slice(&(id.len() as u16).to_be_bytes());
    all.extend_from_slice(&(name.len() as u16).to_be_bytes());
    all.extend_from_slice(&(when.as_secs() as u32).to_be_bytes());
    all.extend_from_slice(&when.subsec_nanos().to_be_bytes());
    all.extend_from_slice(&[0; 12]); // no guest has run, and none is saved
    // Further fields: the saved guest's size again, the disk's, and no count of instructions.
    all.extend_from_slice(&24_u32.to_be_bytes());
    all.extend_from_slice(&[0; 8]);
    all.extend_from_slice(&size.to_be_bytes());
    all.extend_from_slice(&u64::MAX.to_be_bytes());
    all.extend_from_slice(id.as_bytes());
    all.extend_from_slice(name.as_bytes());
    all.resize(all.len().next_multiple_of(8), 0);
    all
}

fn odd(header: &Header, number: u32, why: &str) -> ImageError {
    ImageError::Invalid(format!(
        "the snapshot number {number} in the snapshot table at {} of this qcow2 image {why}",
        header.snapshots_at
    ))
}

enum Parsed {
    Whole(Snapshot, usize),
    /// There must be more bytes to tell.
    Short,
    Odd(&'static str),
}

/// The first snapshot in these bytes, and how many bytes it takes.
fn parse(bytes: &[u8]) -> Parsed {
    let read = || {
        let lengths = be32(bytes, 12)?;
        let (id, name) = ((lengths >> 16) as usize, (lengths & 0xffff) as usize);
        let extra = be32(bytes, 36)? as usize;
        if extra > EXTRA_MAX {
            return Some(Parsed::Odd("has more further fields than any program writes"));
        }
        let id_at = ENTRY + extra;
        let len = (id_at + id + name).next_multiple_of(8);
        let text = |from: usize, len: usize| {
            Some(String::from_utf8_lossy(bytes.get(from..from + len)?).into_owned())
        };
        let snapshot = Snapshot {
            id: text(id_at, id)?,
            name: text(id_at + id, name)?,
            seconds: be32(bytes, 16)?,
            nanoseconds: be32(bytes, 20)?,
            guest_nanoseconds: be64(bytes, 24)?,
            vm_state: if extra >= 8 { be64(bytes, ENTRY)? } else { be32(bytes, 32)?.into() },
            size: if extra >= 16 { Some(be64(bytes, ENTRY + 8)?) } else { None },
            l1_at: be64(bytes, 0)?,
            l1_entries: be32(bytes, 8)?,
            entry: Vec::new(),
        };
        let mut entry = bytes.get(..len.min(bytes.len()))?.to_vec();
        entry.resize(len, 0);
        let snapshot = Snapshot { entry, ..snapshot };
        Some(Parsed::Whole(snapshot, len))
    };
    read().unwrap_or(Parsed::Short)
}
