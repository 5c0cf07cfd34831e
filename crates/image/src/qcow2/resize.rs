//! Another size for the disk of an image that nobody has open.
//!
//! A disk that shrinks first gets its new size in the header, then loses what lies beyond it; one that grows loses that first, so
//! that what is added reads as zero whatever an interruption has left there.

use std::rc::Rc;

use block::{Buf, Span};
use storage::{Storage, Zeroing};

use crate::ImageError;

use super::COPIED;
use super::bitmap::distrust;
use super::bytes;
use super::check::used_end;
use super::entry::{Entry, Shape};
use super::header::{Header, L1_MAX, autoclear};
use super::offline::{Change, read_table};
use super::packed::unpack;

/// Bits 9 to 55 of an entry of L1 or L2: a byte of the file.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster is compressed (bit 62 of an L2 entry).
const PACKED: u64 = 1 << 62;
/// Bytes compared with zero at a time.
const PIECE: u64 = 1 << 20;

/// Gives the disk `size` bytes, a multiple of 512. What is added reads as zero, but where the image below is longer than this
/// disk was: there it is that one's bytes. See [`reserve`] for that.
///
/// # Errors
/// The size cannot be, the image is not sound, or the storage failed: then the disk has the old or the new size, and at most
/// space leaks.
pub async fn resize(
    file: &Rc<dyn Storage>,
    data: Option<&Rc<dyn Storage>>,
    size: u64,
) -> Result<(), ImageError> {
    change(file, data, size, true).await
}

/// Makes the tables long enough for a disk of `size` bytes, and leaves its size as it is. So what the image below would show in
/// what is added can be made zero before anybody sees it: through an image that is opened with a header of that size. Then
/// [`set_size`] shows it.
///
/// # Errors
/// As of [`resize`].
pub async fn reserve(
    file: &Rc<dyn Storage>,
    data: Option<&Rc<dyn Storage>>,
    size: u64,
) -> Result<(), ImageError> {
    change(file, data, size, false).await
}

/// Gives the disk a size, for good, which its tables were made long enough for.
///
/// # Errors
/// They were not, or the storage failed: then the disk has the old or the new size.
pub async fn set_size(file: &Rc<dyn Storage>, size: u64) -> Result<(), ImageError> {
    let mut header = Header::read(file).await?;
    if u64::from(header.l1_entries) < header.l1_needed(size) || size < header.size {
        return Err(ImageError::Refused(format!("there is no room for a disk of {size} bytes")));
    }
    header.size = size;
    header.write_fields(file).await?;
    Ok(file.flush().await?)
}

async fn change(
    file: &Rc<dyn Storage>,
    data: Option<&Rc<dyn Storage>>,
    size: u64,
    is_shown: bool,
) -> Result<(), ImageError> {
    let mut change = Change::begin(file).await?;
    let old = change.header.size;
    check_size(&change.header, size)?;
    if change.header.has_data_file() != data.is_some() {
        return Err(ImageError::Refused(
            "the image and its external data file are resized together".to_owned(),
        ));
    }
    if size == old {
        return Ok(());
    }
    let end = size.min(old);
    let tail = tail(&change, data, end).await?;
    distrust_all(&mut change).await?;
    if let Some(data) = data.filter(|data| data.size() < size) {
        data.resize(size).await?;
    }
    if size < old {
        change.header.size = size;
        change.switch().await?;
    }
    cut(&mut change, end).await?;
    if let Some(span) = tail {
        let storage = data.unwrap_or(file);
        storage.zero(span, Zeroing { unmap: false, fast: false }).await?;
        storage.flush().await?;
    }
    if size > old {
        grow_l1(&mut change, size).await?;
        if is_shown {
            change.header.size = size;
        }
        change.switch().await?;
    }
    let header = change.header.clone();
    change.end().await?;
    if size < old {
        let end = used_end(file, &header).await?;
        if end < file.size() {
            file.resize(end).await?;
        }
        if let Some(data) = data {
            data.resize(size).await?;
            data.flush().await?;
        }
        file.flush().await?;
    }
    Ok(())
}

fn check_size(header: &Header, size: u64) -> Result<(), ImageError> {
    if !size.is_multiple_of(512) {
        return Err(ImageError::Refused(format!("a disk of {size} bytes cannot be: multiples of 512 can")));
    }
    if size > i64::MAX as u64 || header.l1_needed(size) * 8 > L1_MAX {
        return Err(ImageError::Refused(format!(
            "with clusters of {} bytes a disk has at most {} bytes, and {size} are asked for",
            header.cluster_size(),
            u128::from(L1_MAX / 8) * u128::from(header.cluster_size() * header.l2_entries())
        )));
    }
    if header.version == 2 && header.snapshots > 0 {
        return Err(ImageError::Refused(
            "this qcow2 image has snapshots, and in version 2 they do not say how large the disk was; delete them, or convert \
             the image to version 3"
                .to_owned(),
        ));
    }
    Ok(())
}

/// Bitmaps have the size that the disk had.
async fn distrust_all(change: &mut Change<'_>) -> Result<(), ImageError> {
    match distrust(change.file, &change.header, true).await {
        Ok(_) => {}
        Err(ImageError::Io(error)) => return Err(error.into()),
        Err(ImageError::Invalid(_) | ImageError::Unsupported(_) | ImageError::Refused(_)) => {
            change.header.autoclear &= !autoclear::BITMAPS;
        }
    }
    change.file.flush().await?;
    Ok(())
}

/// Takes out all that the tables have beyond byte `end` of the disk.
async fn cut(change: &mut Change<'_>, end: u64) -> Result<(), ImageError> {
    let cluster = change.header.cluster_size();
    let clusters = end.div_ceil(cluster);
    let (kept, within) = (clusters / change.header.l2_entries(), clusters % change.header.l2_entries());
    let l1 = read_table(change.file, change.header.l1_at, change.header.l1_entries.into()).await?;
    // The table that has entries on both sides.
    let word = l1.get(kept as usize).copied().unwrap_or(0);
    if within > 0 && word & PLACE != 0 {
        cut_table(change, kept, word, within * change.header.l2_entry_size()).await?;
    }
    let beyond = kept + u64::from(within > 0);
    let rest = l1.get(beyond as usize..).unwrap_or_default();
    if rest.iter().any(|word| *word != 0) {
        bytes::write(change.file, change.header.l1_at + beyond * 8, &vec![0; rest.len() * 8]).await?;
    }
    change.file.flush().await?;
    Ok(())
}

/// Makes the entries of an L2 table zero from byte `from` of it on; in a copy, where snapshots have the same table.
async fn cut_table(change: &mut Change<'_>, index: u64, word: u64, from: u64) -> Result<(), ImageError> {
    let cluster = change.header.cluster_size();
    let mut table = bytes::read(change.file, word & PLACE, cluster as usize).await?;
    let Some(rest) = table.get_mut(from as usize..).filter(|rest| rest.iter().any(|byte| *byte != 0)) else {
        return Ok(());
    };
    rest.fill(0);
    if word & COPIED != 0 {
        bytes::write(change.file, (word & PLACE) + from, &vec![0; (cluster - from) as usize]).await?;
        return Ok(());
    }
    // What the copy leads to is referred to by the other one too; compressed clusters have no mark.
    for entry in table.chunks_exact_mut(change.header.l2_entry_size() as usize) {
        if let Some(first) = entry.first_mut() {
            *first &= 0x7f;
        }
    }
    let copy = change.l2_table(&table).await?;
    change.count().await?;
    bytes::write(change.file, change.header.l1_at + index * 8, &(copy | COPIED).to_be_bytes()).await?;
    change.publish().await
}

/// Where the disk's last cluster has bytes beyond its end `end` that are not zero, if it has: they would show when the disk grows.
///
/// # Errors
/// They cannot be made zero, for a snapshot has them too.
async fn tail(
    change: &Change<'_>,
    data: Option<&Rc<dyn Storage>>,
    end: u64,
) -> Result<Option<Span>, ImageError> {
    let header = &change.header;
    let (cluster, entry_size) = (header.cluster_size(), header.l2_entry_size());
    let number = end / cluster;
    if end.is_multiple_of(cluster) {
        return Ok(None);
    }
    let table = word(change.file, header.l1_at + number / header.l2_entries() * 8).await?;
    if table & PLACE == 0 {
        return Ok(None);
    }
    let entry = word(change.file, (table & PLACE) + number % header.l2_entries() * entry_size).await?;
    let place = entry & PLACE;
    let shared = || {
        ImageError::Refused(format!(
            "the last cluster of the disk is compressed or shared with a snapshot, so that the disk cannot end within it at \
             {end}; choose a multiple of {cluster} bytes"
        ))
    };
    if entry & PACKED != 0 {
        return if is_packed_zero(change, entry, end % cluster).await? { Ok(None) } else { Err(shared()) };
    }
    if place == 0 && (data.is_none() || entry & COPIED == 0) {
        return Ok(None);
    }
    let storage = data.unwrap_or(change.file);
    let (at, stop) = (place + end % cluster, (place + cluster).min(storage.size()));
    let Some(span) = Span::new(at, stop.saturating_sub(at)).filter(|span| !span.is_empty()) else {
        return Ok(None);
    };
    if is_zero(storage, span).await? {
        return Ok(None);
    }
    let sole = data.is_some() || table & entry & COPIED != 0;
    if sole { Ok(Some(span)) } else { Err(shared()) }
}

/// Whether a compressed cluster is zero from this byte of it on, as one that was compressed as the disk's end is.
async fn is_packed_zero(change: &Change<'_>, entry: u64, from: u64) -> Result<bool, ImageError> {
    let header = &change.header;
    let shape = Shape {
        cluster_bits: header.cluster_bits,
        extended: header.has_extended_l2(),
        zeroes: header.version > 2,
        external: header.has_data_file(),
    };
    let Ok(Entry::Packed(packed)) = shape.read([entry, 0]) else { return Ok(false) };
    let small = bytes::read(change.file, packed.at, packed.len as usize).await?;
    Ok(match unpack(header.compression, &small, header.cluster_size() as usize) {
        Ok(all) => all.get(from as usize..).is_some_and(|rest| rest.iter().all(|byte| *byte == 0)),
        // Nobody can read it, and nobody knows what would show.
        Err(_broken) => false,
    })
}

async fn is_zero(storage: &Rc<dyn Storage>, span: Span) -> Result<bool, ImageError> {
    let mut at = span.at();
    while at < span.end() {
        let buf = Buf::zeroed(PIECE.min(span.end() - at) as usize);
        storage.read(at, buf.clone()).await?;
        if buf.to_vec().iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at += buf.len() as u64;
    }
    Ok(true)
}

async fn word(file: &Rc<dyn Storage>, at: u64) -> Result<u64, ImageError> {
    Ok(bytes::be64(&bytes::read(file, at, 8).await?, 0).unwrap_or(0))
}

/// Makes the L1 table large enough: in its place, as far as its last cluster reaches, or in another.
async fn grow_l1(change: &mut Change<'_>, size: u64) -> Result<(), ImageError> {
    let header = &change.header;
    let (entries, needed) = (u64::from(header.l1_entries), header.l1_needed(size));
    if needed <= entries {
        return Ok(());
    }
    if needed * 8 <= (entries * 8).next_multiple_of(header.cluster_size()) {
        // Nobody has said that the rest of its cluster is zero.
        let added = vec![0; ((needed - entries) * 8) as usize];
        bytes::write(change.file, header.l1_at + entries * 8, &added).await?;
    } else {
        let mut l1 = bytes::read(change.file, header.l1_at, entries as usize * 8).await?;
        l1.resize(needed as usize * 8, 0);
        // It takes over what the old one refers to, so that nothing is counted twice.
        let at = change.plain_table(&l1).await?;
        change.count().await?;
        change.header.l1_at = at;
    }
    change.header.l1_entries = needed as u32;
    Ok(())
}
