//! A new image: what is asked for, where its tables lie, and how they are written.
//!
//! The header comes first, then the refcount table and its blocks, the L1 table, and where space is reserved the L2 tables and
//! all clusters of the disk in their order. The header is written last, after a sync: a half-made image is none.

use std::rc::Rc;

use block::{Buf, Errno, Error, Span};
use storage::{Storage, Zeroing};

use crate::{Backing, Format, ImageError};

use super::bytes;
use super::extension::{Extensions, qemu_features, qemu_name};
use super::header::{
    Compression, Header, L1_MAX, NAME_MAX, REFCOUNT_TABLE_MAX, autoclear, compatible, incompatible,
};
use super::{COPIED, counts};

/// Bytes written at a time.
const PIECE: u64 = 1 << 20;
/// Room in the refcount table of a new image, in bytes, for blocks that it will need when it is full: as QEMU's, at clusters
/// of the usual size.
const ROOM: u64 = 64 << 10;

/// What is reserved when an image is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: clusters are taken when they are first written.
    #[default]
    Off,
    /// All clusters have their place in a sparse file.
    Metadata,
    /// They have, and the file system has set space aside.
    Falloc,
    /// They have, and zeroes were written there.
    Full,
}

/// The file that is to hold the disk's bytes.
#[derive(Clone)]
pub struct DataFile {
    /// Its name, as the image is to have it.
    pub name: String,
    /// The file.
    pub storage: Rc<dyn Storage>,
    /// Whether it alone is to show the disk too.
    pub raw: bool,
}

/// What a new image is to be.
#[derive(Clone)]
pub struct Create {
    /// Bytes of the disk; what is no multiple of 512 is rounded up, as with QEMU.
    pub size: u64,
    /// Bytes of a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bits of a reference count: a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// Whether L2 entries have 16 bytes and tell of 32 subclusters each.
    pub extended_l2: bool,
    /// Whether reference counts may be written late.
    pub lazy_refcounts: bool,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// The image below.
    pub backing: Option<Backing>,
    /// The file for the disk's bytes, if it is another one.
    pub data_file: Option<DataFile>,
    /// What is reserved.
    pub preallocation: Preallocation,
}

impl Default for Create {
    /// An empty disk, otherwise what `qemu-img create` makes without options.
    fn default() -> Create {
        Create {
            size: 0,
            cluster_size: 64 << 10,
            version: 3,
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            preallocation: Preallocation::Off,
        }
    }
}

/// How many clusters each part has; they lie in this order, after the header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Layout {
    refcount_table: u64,
    refcount_blocks: u64,
    l1: u64,
    l2: u64,
    /// Clusters of the disk that are in this file.
    data: u64,
}

impl Layout {
    fn total(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks + self.l1 + self.l2 + self.data
    }
}

fn refused(text: String) -> ImageError {
    ImageError::Refused(text)
}

impl Create {
    /// What of it cannot be.
    fn check(&self) -> Result<(), ImageError> {
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return Err(refused(format!(
                "clusters of {} bytes cannot be: a power of two from 512 to 2097152 is possible",
                self.cluster_size
            )));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(refused(format!(
                "reference counts of {} bits cannot be: a power of two up to 64 is possible",
                self.refcount_bits
            )));
        }
        match self.version {
            2 => {
                for (asked, what) in [
                    (self.refcount_bits != 16, "reference counts of other than 16 bits"),
                    (self.extended_l2, "extended L2 entries"),
                    (self.lazy_refcounts, "lazy reference counts"),
                    (self.compression != Compression::Zlib, "compression by other than zlib"),
                    (self.data_file.is_some(), "an external data file"),
                ] {
                    if asked {
                        return Err(refused(format!(
                            "{what} need version 3 of qcow2 (compat=1.1), and 2 is asked for"
                        )));
                    }
                }
            }
            3 => {}
            other => return Err(refused(format!("there is no version {other} of qcow2; there are 2 and 3"))),
        }
        if self.extended_l2 && self.cluster_size < 16 << 10 {
            return Err(refused(format!(
                "extended L2 entries need clusters of at least 16384 bytes, and {} are asked for",
                self.cluster_size
            )));
        }
        if let Some(backing) = &self.backing {
            if backing.name.is_empty() || backing.name.len() > NAME_MAX {
                return Err(refused(format!(
                    "the backing file's name has {} bytes; 1 to {NAME_MAX} are possible",
                    backing.name.len()
                )));
            }
            if self.preallocation != Preallocation::Off && !self.extended_l2 {
                return Err(refused(
                    "space cannot be reserved over a backing file, which it would hide; it can with extended L2 entries"
                        .to_owned(),
                ));
            }
            if self.data_file.as_ref().is_some_and(|data| data.raw) {
                return Err(refused("a raw data file cannot show what is in a backing file".to_owned()));
            }
        }
        Ok(())
    }

    fn reserves(&self) -> bool {
        // A raw data file shows the disk without tables, so each byte of the disk has its place there.
        self.preallocation != Preallocation::Off || self.data_file.as_ref().is_some_and(|data| data.raw)
    }

    /// The header, with all but the places.
    fn header(&self, size: u64) -> Header {
        let bit = |asked: bool, bit: u64| if asked { bit } else { 0 };
        let raw = self.data_file.as_ref().is_some_and(|data| data.raw);
        let backing_format = self.backing.as_ref().and_then(|backing| backing.format);
        Header {
            version: self.version,
            cluster_bits: self.cluster_size.trailing_zeros(),
            size,
            l1_entries: 0,
            l1_at: 0,
            refcount_table_at: self.cluster_size,
            refcount_table_clusters: 0,
            snapshots: 0,
            snapshots_at: 0,
            incompatible: bit(self.data_file.is_some(), incompatible::DATA_FILE)
                | bit(self.compression != Compression::Zlib, incompatible::COMPRESSION)
                | bit(self.extended_l2, incompatible::EXTENDED_L2),
            compatible: bit(self.lazy_refcounts, compatible::LAZY_REFCOUNTS),
            autoclear: bit(raw, autoclear::DATA_FILE_RAW),
            refcount_order: self.refcount_bits.trailing_zeros(),
            compression: self.compression,
            further: if self.version == 2 { Vec::new() } else { vec![0; 8] },
            extensions: Extensions {
                backing_format: backing_format.map(|format: Format| qemu_name(format).to_owned()),
                data_file: self.data_file.as_ref().map(|data| data.name.clone()),
                bitmaps: None,
                features: (self.version > 2).then(qemu_features),
                unknown: Vec::new(),
            },
            backing_file: self.backing.as_ref().map(|backing| backing.name.clone()),
        }
    }

    fn layout(&self, header: &Header) -> Result<Layout, ImageError> {
        let cluster = header.cluster_size();
        let l1_entries = header.l1_needed(header.size);
        if l1_entries * 8 > L1_MAX {
            return Err(refused(format!(
                "with clusters of {cluster} bytes a disk has at most {} bytes, and {} are asked for; larger clusters help",
                u128::from(L1_MAX / 8) * u128::from(cluster * header.l2_entries()),
                header.size
            )));
        }
        let disk = header.size.div_ceil(cluster);
        let mut layout = Layout { l1: (l1_entries * 8).div_ceil(cluster), ..Layout::default() };
        if self.reserves() {
            layout.l2 = l1_entries;
            layout.data = if self.data_file.is_some() { 0 } else { disk };
        }
        // What it will have when it is full, so that the table need not move for long.
        let all = if self.data_file.is_some() { 0 } else { disk } + l1_entries;
        let room = (all.div_ceil(header.refcounts_per_block()) * 8).min(ROOM).div_ceil(cluster);
        // Both count themselves. Each turn adds clusters, fewer each time.
        loop {
            let blocks = layout.total().div_ceil(header.refcounts_per_block());
            let table = (blocks * 8).div_ceil(cluster).max(room);
            if (blocks, table) == (layout.refcount_blocks, layout.refcount_table) {
                break;
            }
            (layout.refcount_blocks, layout.refcount_table) = (blocks, table);
        }
        if layout.refcount_table * cluster > REFCOUNT_TABLE_MAX {
            return Err(refused(format!(
                "with clusters of {cluster} bytes and reference counts of {} bits so much space cannot be reserved; larger \
                 clusters help",
                self.refcount_bits
            )));
        }
        Ok(layout)
    }
}

/// Makes an image of what is in the file, whatever that was.
///
/// # Errors
/// What is asked for cannot be, or the storage fails; then there is no image.
pub async fn create(file: &Rc<dyn Storage>, options: &Create) -> Result<(), ImageError> {
    options.check()?;
    let size = options.size.checked_next_multiple_of(512).filter(|size| *size <= i64::MAX as u64);
    let size = size.ok_or_else(|| refused(format!("a disk of {} bytes cannot be", options.size)))?;
    let mut header = options.header(size);
    let layout = options.layout(&header)?;
    let cluster = header.cluster_size();
    header.refcount_table_clusters = layout.refcount_table as u32;
    header.l1_entries = header.l1_needed(size) as u32;
    let blocks_at = header.refcount_table_at + layout.refcount_table * cluster;
    let l1_at = blocks_at + layout.refcount_blocks * cluster;
    let l2_at = l1_at + layout.l1 * cluster;
    let data_at = l2_at + layout.l2 * cluster;
    header.l1_at = if layout.l1 == 0 { 0 } else { l1_at };
    // The names may not fit; then nothing is touched.
    let head = match header.bytes() {
        Ok(head) => head,
        Err(_too_long) => {
            header.extensions.features = None;
            header.bytes()?
        }
    };

    let end = bytes::end(data_at, layout.data.checked_mul(cluster).ok_or_else(too_large)?)?;
    clear(file, end).await?;
    if let Some(data) = &options.data_file {
        clear(&data.storage, size).await?;
    }
    let filled = match &options.data_file {
        Some(data) => (&data.storage, Span::new(0, size).ok_or_else(too_large)?),
        None => (file, Span::new(data_at, end - data_at).ok_or_else(too_large)?),
    };
    match options.preallocation {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc if filled.1.is_empty() => {}
        Preallocation::Falloc => filled.0.zero(filled.1, Zeroing { unmap: false, fast: false }).await?,
        Preallocation::Full => write_zeroes(filled.0, filled.1).await?,
    }

    // Space for the tables themselves: in a hole a store that is full would fail a flush, long after the write that needed it.
    for (at, end) in [(header.refcount_table_at, blocks_at), (l1_at, l2_at)] {
        if let Some(table) = Span::new(at, end - at).filter(|table| !table.is_empty()) {
            file.zero(table, Zeroing { unmap: false, fast: false }).await?;
        }
    }
    let table: Vec<u64> = (0..layout.refcount_blocks).map(|number| blocks_at + number * cluster).collect();
    put(file, header.refcount_table_at, &words(&table)).await?;
    write_counts(file, &header, blocks_at, layout.total()).await?;
    if layout.l2 > 0 {
        let l1: Vec<u64> = (0..layout.l2).map(|number| COPIED | (l2_at + number * cluster)).collect();
        put(file, header.l1_at, &words(&l1)).await?;
        let base = if options.data_file.is_some() { 0 } else { data_at };
        write_l2(file, &header, l2_at, base, options.backing.is_none()).await?;
    }
    file.flush().await?;
    if let Some(data) = &options.data_file {
        data.storage.flush().await?;
    }
    put(file, 0, &head).await?;
    file.flush().await?;
    Ok(())
}

fn too_large() -> ImageError {
    ImageError::Io(Error::new(Errno::EFBIG, "make a qcow2 image"))
}

fn words(table: &[u64]) -> Vec<u8> {
    table.iter().flat_map(|word| word.to_be_bytes()).collect()
}

async fn put(file: &Rc<dyn Storage>, at: u64, bytes: &[u8]) -> Result<(), ImageError> {
    if !bytes.is_empty() {
        bytes::write(file, at, bytes).await?;
    }
    Ok(())
}

/// Empties a file and makes it `size` bytes of zero.
async fn clear(file: &Rc<dyn Storage>, size: u64) -> Result<(), ImageError> {
    file.resize(0).await?;
    // A block device keeps its size and its bytes.
    let old = file.size().min(size);
    if old > 0 {
        // An image that is half overwritten should not look like one.
        put(file, 0, &vec![0; old.min(4096) as usize]).await?;
        file.flush().await?;
    }
    file.resize(size).await?;
    if let Some(old) = Span::new(0, old).filter(|old| !old.is_empty()) {
        file.zero(old, Zeroing { unmap: true, fast: false }).await?;
    }
    Ok(())
}

async fn write_zeroes(file: &Rc<dyn Storage>, span: Span) -> Result<(), ImageError> {
    let zeroes = Buf::zeroed(PIECE as usize);
    let mut at = span.at();
    while at < span.end() {
        let len = PIECE.min(span.end() - at);
        file.write(at, zeroes.slice(0, len as usize)).await?;
        at += len;
    }
    Ok(())
}

/// Writes refcount blocks in which the first `used` clusters of the file have the count 1.
async fn write_counts(file: &Rc<dyn Storage>, header: &Header, at: u64, used: u64) -> Result<(), ImageError> {
    let per_block = header.refcounts_per_block();
    let mut full = vec![0; header.cluster_size() as usize];
    for index in 0..per_block.min(used) {
        counts::set(&mut full, header.refcount_order, index as usize, 1);
    }
    let blocks_in_piece = (PIECE >> header.cluster_bits).max(1) as usize;
    let mut full_blocks = used / per_block;
    let mut at = at;
    while full_blocks > 0 {
        let blocks = full_blocks.min(blocks_in_piece as u64);
        let piece = full.repeat(blocks as usize);
        put(file, at, &piece).await?;
        at += piece.len() as u64;
        full_blocks -= blocks;
    }
    let rest = used % per_block;
    if rest > 0 {
        for index in rest..per_block.min(used) {
            counts::set(&mut full, header.refcount_order, index as usize, 0);
        }
        put(file, at, &full).await?;
    }
    Ok(())
}

/// Writes L2 tables, one behind the other, by which the disk's clusters lie in their order from byte `base` on.
async fn write_l2(
    file: &Rc<dyn Storage>,
    header: &Header,
    at: u64,
    base: u64,
    allocated: bool,
) -> Result<(), ImageError> {
    let clusters = header.size.div_ceil(header.cluster_size());
    let in_piece = PIECE / header.l2_entry_size();
    let mut next = 0;
    while next < clusters {
        let until = clusters.min(next + in_piece);
        let mut piece = Vec::with_capacity(PIECE as usize);
        for number in next..until {
            piece.extend_from_slice(&(COPIED | (base + (number << header.cluster_bits))).to_be_bytes());
            if header.has_extended_l2() {
                // Over a backing file a place says nothing of what the disk shows.
                let subclusters: u64 = if allocated { u32::MAX.into() } else { 0 };
                piece.extend_from_slice(&subclusters.to_be_bytes());
            }
        }
        put(file, at + next * header.l2_entry_size(), &piece).await?;
        next = until;
    }
    Ok(())
}
