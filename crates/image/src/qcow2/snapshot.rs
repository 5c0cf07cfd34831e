//! Internal snapshots: other L1 tables in the same file, each with a name (specification, "Snapshots").

use std::rc::Rc;

use storage::Storage;

use crate::ImageError;

use super::bytes::{self, be32, be64};
use super::header::{Header, SNAPSHOTS_MAX};

/// Bytes of an entry of the snapshot table before its further fields.
const ENTRY: usize = 40;
/// Most bytes of further fields of an entry (QEMU's `QCOW_MAX_SNAPSHOT_EXTRA_DATA`).
const EXTRA_MAX: usize = 1024;
/// Most bytes of the table that are read: a name, an identifier and further fields of each are bounded, but not their sum.
const TABLE_MAX: usize = 64 << 20;
/// Bytes of the table read at a time.
const PIECE: usize = 64 << 10;

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
