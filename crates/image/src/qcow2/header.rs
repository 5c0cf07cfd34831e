//! The header: the first cluster of a qcow2 image, which says where everything else is.

use std::rc::Rc;

use storage::Storage;

use crate::{Backing, Format, ImageError};

use super::bytes::{self, be32, be64};
use super::extension::{Extensions, FeatureKind, is_needed, qemu_name, string};
use super::{MAGIC, is};

/// Bits of the field `incompatible`: who does not know one must not open the image.
pub mod incompatible {
    /// Reference counts may be wrong: they are to be repaired before the image is written.
    pub const DIRTY: u64 = 1 << 0;
    /// Tables may be wrong: the image must not be written, but for repair.
    pub const CORRUPT: u64 = 1 << 1;
    /// The disk's bytes are in another file, at the same place there as on the disk.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Compressed clusters are compressed by something else than zlib.
    pub const COMPRESSION: u64 = 1 << 3;
    /// Entries of L2 tables have 16 bytes and tell of 32 subclusters each.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All that are known here.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Bits of the field `compatible`: who does not know one need not care.
pub mod compatible {
    /// Reference counts may be written late, while the image is marked as dirty.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Bits of the field `autoclear`: who does not know one clears it before writing.
pub mod autoclear {
    /// What the bitmaps extension points to is consistent.
    pub const BITMAPS: u64 = 1 << 0;
    /// The data file alone shows the disk too.
    pub const DATA_FILE_RAW: u64 = 1 << 1;
    /// All that are known here.
    pub const KNOWN: u64 = BITMAPS | DATA_FILE_RAW;
}

/// Smallest and largest clusters, as powers of two (QEMU's `MIN_CLUSTER_BITS` and `MAX_CLUSTER_BITS`).
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Smallest clusters that have 32 subclusters, as a power of two.
const EXTENDED_CLUSTER_BITS: u32 = 14;
/// Most bytes of an L1 table and of the refcount table (QEMU's `QCOW_MAX_L1_SIZE`, `QCOW_MAX_REFTABLE_SIZE`), and most
/// snapshots.
pub(super) const L1_MAX: u64 = 32 << 20;
pub(super) const REFCOUNT_TABLE_MAX: u64 = 8 << 20;
pub(super) const SNAPSHOTS_MAX: u32 = 65536;
/// Longest name of a backing file.
pub(super) const NAME_MAX: usize = 1023;
/// Bytes of the header's fields in version 2, and at least in version 3, where the compression type may follow.
const LENGTH_2: usize = 72;
const LENGTH_3: usize = 104;

/// What a disk writes as a whole or not at all.
const SECTOR: usize = 512;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// A raw deflate stream, without zlib's header.
    #[default]
    Zlib,
    /// A frame of Zstandard.
    Zstd,
}

impl Compression {
    /// Its name, as QEMU has it.
    pub const fn name(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// What the header says, in the specification's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// A cluster has 2 to the power of this many bytes; 9 to 21.
    pub cluster_bits: u32,
    /// Bytes of the disk.
    pub size: u64,
    /// Entries of the active L1 table; enough for `size`.
    pub l1_entries: u32,
    /// Byte of the file at which the active L1 table starts.
    pub l1_at: u64,
    /// Byte of the file at which the refcount table starts.
    pub refcount_table_at: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// How many snapshots there are.
    pub snapshots: u32,
    /// Byte of the file at which the snapshot table starts.
    pub snapshots_at: u64,
    /// See [`incompatible`]; no unknown bits.
    pub incompatible: u64,
    /// See [`compatible`].
    pub compatible: u64,
    /// See [`autoclear`].
    pub autoclear: u64,
    /// A reference count has 2 to the power of this many bits; 0 to 6.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// The header's fields from byte 104 on, as they were found; the first is `compression`, nothing is known of the others.
    /// Their count is a multiple of 8, 0 in version 2.
    pub further: Vec<u8>,
    /// What follows the fields.
    pub extensions: Extensions,
    /// The name of the backing file.
    pub backing_file: Option<String>,
}

fn invalid(text: String) -> ImageError {
    ImageError::Invalid(text)
}

/// The first numbers, whose places are the same in all versions. Missing bytes read as zero: a file shorter than a header is
/// refused before they matter.
fn word(cluster: &[u8], at: usize) -> u32 {
    be32(cluster, at).unwrap_or(0)
}

fn long(cluster: &[u8], at: usize) -> u64 {
    be64(cluster, at).unwrap_or(0)
}

impl Header {
    /// Reads the header and finds it sound; changes nothing.
    ///
    /// # Errors
    /// What makes no sense, what is not known here (encryption, unknown incompatible features), or the storage's.
    pub async fn read(file: &Rc<dyn Storage>) -> Result<Header, ImageError> {
        let header = Header::read_for_check(file).await?;
        header.check_tables(file.size())?;
        Ok(header)
    }

    /// As [`Header::read`], but takes what a repair can put right: a missing or misplaced refcount table, an impossible snapshot
    /// table.
    ///
    /// # Errors
    /// As of [`Header::read`].
    pub async fn read_for_check(file: &Rc<dyn Storage>) -> Result<Header, ImageError> {
        let head = bytes::read(file, 0, LENGTH_3).await?;
        if !is(&head) {
            return Err(invalid(format!(
                "there is no qcow2 image: it would begin with `{}` and a version from 2 on, and this begins with `{}`",
                MAGIC.escape_ascii(),
                head[..8].escape_ascii()
            )));
        }
        let cluster_bits = word(&head, 20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(invalid(format!(
                "the clusters of this qcow2 image have 2^{cluster_bits} bytes (header byte 20); there are those of 2^{} to \
                 2^{} bytes",
                CLUSTER_BITS.start(),
                CLUSTER_BITS.end()
            )));
        }
        let cluster = bytes::read(file, 0, 1 << cluster_bits).await?;
        Header::parse(&cluster)
    }

    /// Takes the header out of its cluster.
    ///
    /// # Errors
    /// As of [`Header::read_for_check`].
    fn parse(cluster: &[u8]) -> Result<Header, ImageError> {
        let version = word(cluster, 4);
        let length = match version {
            2 => LENGTH_2,
            3 => word(cluster, 100) as usize,
            _ => {
                return Err(ImageError::Unsupported(format!(
                    "this qcow2 image is of version {version}; tapdisk knows 2 and 3"
                )));
            }
        };
        let fields = cluster.get(..length).filter(|_| version == 2 || length >= LENGTH_3 && length % 8 == 0);
        let Some(fields) = fields else {
            return Err(invalid(format!(
                "the header of this qcow2 image has {length} bytes (header byte 100); it should have a multiple of 8 from \
                 {LENGTH_3} on, and lie within its cluster of {} bytes",
                cluster.len()
            )));
        };
        // Before anything else that the encryption might be about.
        match word(fields, 32) {
            0 => {}
            1 => return Err(encrypted("AES")),
            2 => return Err(encrypted("LUKS")),
            other => return Err(encrypted(&format!("an unknown method ({other})"))),
        }
        let of_version_3 = |at: usize| if version == 2 { 0 } else { long(fields, at) };
        let mut header = Header {
            version,
            cluster_bits: word(fields, 20),
            size: long(fields, 24),
            l1_entries: word(fields, 36),
            l1_at: long(fields, 40),
            refcount_table_at: long(fields, 48),
            refcount_table_clusters: word(fields, 56),
            snapshots: word(fields, 60),
            snapshots_at: long(fields, 64),
            incompatible: of_version_3(72),
            compatible: of_version_3(80),
            autoclear: of_version_3(88),
            refcount_order: if version == 2 { 4 } else { word(fields, 96) },
            compression: Compression::Zlib,
            further: fields.get(LENGTH_3..).unwrap_or_default().to_vec(),
            extensions: Extensions::default(),
            backing_file: None,
        };
        let name = header.backing_span(fields, cluster.len())?;
        // The extensions may name the features that are not known, so these wait until they are read as far as they go.
        let end = name.as_ref().map_or(cluster.len(), |name| name.start);
        let bitmaps = (header.autoclear & autoclear::BITMAPS != 0).then_some(header.cluster_size());
        let extensions = header.extensions.parse(cluster, length, end, bitmaps);
        header.check_features()?;
        header.compression = header.compression_of(fields)?;
        extensions?;
        header.backing_file = name
            .map(|name| string(&cluster[name], "backing file's name"))
            .transpose()?
            .filter(|name| !name.is_empty());
        header.check_shape()?;
        Ok(header)
    }

    /// Where the backing file's name is in the header cluster, if there is one.
    fn backing_span(
        &self,
        fields: &[u8],
        cluster: usize,
    ) -> Result<Option<std::ops::Range<usize>>, ImageError> {
        let (at, len) = (long(fields, 8), word(fields, 16) as usize);
        if at == 0 {
            return Ok(None);
        }
        let span = usize::try_from(at).ok().filter(|at| *at >= fields.len()).and_then(|at| {
            let end = at.checked_add(len)?;
            (len <= NAME_MAX && end <= cluster).then_some(at..end)
        });
        span.map(Some).ok_or_else(|| {
            invalid(format!(
                "the backing file's name is at {at}+{len} of this qcow2 image; it should have at most {NAME_MAX} bytes and \
                 lie in the header cluster, from byte {} to {cluster}",
                fields.len()
            ))
        })
    }

    fn check_features(&self) -> Result<(), ImageError> {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let names: Vec<String> = (0..64)
            .filter(|bit| unknown >> bit & 1 == 1)
            .map(|bit| match self.extensions.feature(FeatureKind::Incompatible, bit) {
                Some(name) => format!("`{}` (bit {bit})", name.escape_debug()),
                None => format!("bit {bit}"),
            })
            .collect();
        Err(ImageError::Unsupported(format!(
            "this qcow2 image needs features that tapdisk does not know: {}",
            names.join(", ")
        )))
    }

    fn compression_of(&self, fields: &[u8]) -> Result<Compression, ImageError> {
        let number = if self.version == 2 { 0 } else { fields.get(LENGTH_3).copied().unwrap_or(0) };
        let marked = self.incompatible & incompatible::COMPRESSION != 0;
        match (number, marked) {
            (0, false) => Ok(Compression::Zlib),
            (1, true) => Ok(Compression::Zstd),
            (0, true) | (1, false) => Err(invalid(format!(
                "the compression type of this qcow2 image is {number} (header byte {LENGTH_3}), which its incompatible \
                 feature bit 3 denies"
            ))),
            _ => Err(ImageError::Unsupported(format!(
                "the compression type of this qcow2 image is {number} (header byte {LENGTH_3}); tapdisk knows 0 (zlib) \
                 and 1 (zstd)"
            ))),
        }
    }

    /// What must be so for the image to be read at all.
    fn check_shape(&self) -> Result<(), ImageError> {
        if self.has_extended_l2() && self.cluster_bits < EXTENDED_CLUSTER_BITS {
            return Err(invalid(format!(
                "this qcow2 image has extended L2 entries and clusters of {} bytes; those need at least 2^{EXTENDED_CLUSTER_BITS}",
                self.cluster_size()
            )));
        }
        if self.refcount_order > 6 {
            return Err(invalid(format!(
                "the reference counts of this qcow2 image have 2^{} bits (header byte 96); they have at most 64",
                self.refcount_order
            )));
        }
        if self.is_data_raw() && !self.has_data_file() {
            return Err(invalid(
                "this qcow2 image is marked as having raw external data, but has no external data file"
                    .to_owned(),
            ));
        }
        if self.size > i64::MAX as u64 {
            return Err(invalid(format!(
                "the disk of this qcow2 image has {} bytes; 2^63 - 1 are possible",
                self.size
            )));
        }
        let len = u64::from(self.l1_entries) * 8;
        if len > L1_MAX {
            return Err(invalid(format!(
                "the L1 table of this qcow2 image has {} entries (header byte 36); at most {} are read",
                self.l1_entries,
                L1_MAX / 8
            )));
        }
        if u64::from(self.l1_entries) < self.l1_needed(self.size) {
            return Err(invalid(format!(
                "the L1 table of this qcow2 image has {} entries (header byte 36); its disk of {} bytes needs {}",
                self.l1_entries,
                self.size,
                self.l1_needed(self.size)
            )));
        }
        self.check_place("L1 table", self.l1_at, len)
    }

    fn check_place(&self, what: &str, at: u64, len: u64) -> Result<(), ImageError> {
        if len == 0 {
            return Ok(());
        }
        if !at.is_multiple_of(self.cluster_size()) || at == 0 || block::Span::new(at, len).is_none() {
            return Err(invalid(format!(
                "the {what} of this qcow2 image is at {at}+{len}; it should begin with a cluster ({} bytes) behind the \
                 header; tapdisk check may repair that",
                self.cluster_size()
            )));
        }
        Ok(())
    }

    /// What a repair can put right.
    fn check_tables(&self, file_size: u64) -> Result<(), ImageError> {
        let len = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if len == 0 || len > REFCOUNT_TABLE_MAX {
            return Err(invalid(format!(
                "the refcount table of this qcow2 image has {} clusters, {len} bytes (header byte 56); there should be at \
                 least one, and at most {REFCOUNT_TABLE_MAX} bytes; tapdisk check --repair all makes a new one",
                self.refcount_table_clusters
            )));
        }
        self.check_place("refcount table", self.refcount_table_at, len)?;
        if self.snapshots > SNAPSHOTS_MAX {
            return Err(invalid(format!(
                "this qcow2 image has {} snapshots (header byte 60); there are at most {SNAPSHOTS_MAX}",
                self.snapshots
            )));
        }
        // The table's length is known only when it is read; so much it has at least.
        let snapshots_len = u64::from(self.snapshots) * 40;
        self.check_place("snapshot table", self.snapshots_at, snapshots_len)?;
        let l1_len = u64::from(self.l1_entries) * 8;
        for (what, at, len) in [
            ("L1 table", self.l1_at, l1_len),
            ("refcount table", self.refcount_table_at, len),
            ("snapshot table", self.snapshots_at, snapshots_len),
        ] {
            // The last cluster may be there in part.
            let end = file_size.checked_next_multiple_of(self.cluster_size()).unwrap_or(u64::MAX);
            if len > 0 && at + len > end {
                return Err(invalid(format!(
                    "the {what} of this qcow2 image is at {at}+{len}, but the file ends at {file_size}: it was cut off"
                )));
            }
        }
        Ok(())
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry.
    pub fn l2_entry_size(&self) -> u64 {
        if self.has_extended_l2() { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Entries of the L1 table that a disk of `size` bytes needs.
    pub fn l1_needed(&self, size: u64) -> u64 {
        size.div_ceil(self.cluster_size() * self.l2_entries())
    }

    /// Bits of a reference count.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest reference count.
    pub fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Reference counts in a refcount block.
    pub fn refcounts_per_block(&self) -> u64 {
        self.cluster_size() * 8 / u64::from(self.refcount_bits())
    }

    /// Whether reference counts may be wrong.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & incompatible::DIRTY != 0
    }

    /// Whether the image must not be written.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & incompatible::CORRUPT != 0
    }

    /// Whether the disk's bytes are in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// The other file's name, where the image says one.
    pub fn data_file(&self) -> Option<&str> {
        self.extensions.data_file.as_deref().filter(|_| self.has_data_file())
    }

    /// Whether that file alone shows the disk too.
    pub fn is_data_raw(&self) -> bool {
        self.autoclear & autoclear::DATA_FILE_RAW != 0
    }

    /// Whether L2 entries have 16 bytes.
    pub fn has_extended_l2(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    /// Whether reference counts may be written late.
    pub fn is_lazy(&self) -> bool {
        self.compatible & compatible::LAZY_REFCOUNTS != 0
    }

    /// What it says of the image below. A format that is none of ours is left to whoever opens it: see
    /// [`Extensions::backing_format`].
    pub fn backing(&self) -> Option<Backing> {
        let name = self.backing_file.clone()?;
        let format = self.extensions.backing_format.as_deref().map(str::parse::<Format>);
        let format = format.transpose().unwrap_or_default();
        Some(Backing { name, format, others: Vec::new(), unique_id: None })
    }

    /// Has it name another image below, or none.
    pub fn set_backing(&mut self, name: Option<&str>, format: Option<Format>) {
        self.backing_file = name.map(str::to_owned);
        self.extensions.backing_format = format.map(|format| qemu_name(format).to_owned());
    }

    /// Bytes of the header's fields.
    pub fn length(&self) -> usize {
        if self.version == 2 {
            return LENGTH_2;
        }
        let compression = usize::from(self.compression != Compression::Zlib);
        LENGTH_3 + self.further.len().max(compression).next_multiple_of(8)
    }

    /// The fields' bytes; the backing file's name is at `name` of the header cluster.
    fn fields(&self, name: usize) -> Vec<u8> {
        let mut all = MAGIC.to_vec();
        let (name_at, name_len) = match &self.backing_file {
            Some(backing) => (name as u64, backing.len() as u32),
            None => (0, 0),
        };
        all.extend_from_slice(&self.version.to_be_bytes());
        all.extend_from_slice(&name_at.to_be_bytes());
        all.extend_from_slice(&name_len.to_be_bytes());
        all.extend_from_slice(&self.cluster_bits.to_be_bytes());
        all.extend_from_slice(&self.size.to_be_bytes());
        all.extend_from_slice(&[0; 4]); // no encryption
        all.extend_from_slice(&self.l1_entries.to_be_bytes());
        all.extend_from_slice(&self.l1_at.to_be_bytes());
        all.extend_from_slice(&self.refcount_table_at.to_be_bytes());
        all.extend_from_slice(&self.refcount_table_clusters.to_be_bytes());
        all.extend_from_slice(&self.snapshots.to_be_bytes());
        all.extend_from_slice(&self.snapshots_at.to_be_bytes());
        if self.version > 2 {
            all.extend_from_slice(&self.incompatible.to_be_bytes());
            all.extend_from_slice(&self.compatible.to_be_bytes());
            all.extend_from_slice(&self.autoclear.to_be_bytes());
            all.extend_from_slice(&self.refcount_order.to_be_bytes());
            all.extend_from_slice(&(self.length() as u32).to_be_bytes());
            all.extend_from_slice(&self.further);
        }
        all.resize(self.length(), 0);
        if let Some(compression) = all.get_mut(LENGTH_3) {
            *compression = match self.compression {
                Compression::Zlib => 0,
                Compression::Zstd => 1,
            };
        }
        all
    }

    /// The bytes of the header cluster up to the end of what is in use.
    ///
    /// # Errors
    /// They do not fit the cluster.
    pub fn bytes(&self) -> Result<Vec<u8>, ImageError> {
        let extensions = self.extensions.bytes();
        let name = self.length() + extensions.len();
        let mut all = self.fields(name);
        all.extend_from_slice(&extensions);
        all.extend_from_slice(self.backing_file.as_deref().unwrap_or_default().as_bytes());
        if all.len() as u64 > self.cluster_size() {
            return Err(ImageError::Refused(format!(
                "the header of this qcow2 image would have {} bytes with the names of its files; a cluster has {}",
                all.len(),
                self.cluster_size()
            )));
        }
        Ok(all)
    }

    /// Writes the fields, not what follows them: they lie in the first 512 bytes, which a disk writes as a whole or not at all.
    /// The caller syncs. The backing file's name and the extensions stay as they are in the file; the fields' length does too.
    ///
    /// # Errors
    /// The storage's.
    pub async fn write_fields(&self, file: &Rc<dyn Storage>) -> Result<(), ImageError> {
        let old = bytes::read(file, 0, 20).await?;
        let mut fields = self.fields(0);
        fields[8..20].copy_from_slice(&old[8..20]);
        // Fields that nobody knows may reach further than a sector; they never change.
        fields.truncate(LENGTH_3 + 8);
        bytes::write(file, 0, &fields).await?;
        Ok(())
    }

    /// Writes all of the header cluster that is in use, durably. Names and extensions reach beyond the first sector, which alone a
    /// disk writes as a whole; so what lies behind it is written first, where the old header does not look, and then the sector
    /// switches to it. An interruption leaves the old header, perhaps without names of features, or the new one.
    ///
    /// # Errors
    /// As of [`Header::bytes`], and the storage's.
    pub async fn write(&self, file: &Rc<dyn Storage>) -> Result<(), ImageError> {
        self.bytes()?;
        let mut old = bytes::read(file, 0, self.cluster_size() as usize).await?;
        let new = self.bytes_beside(&old);
        if old.get(SECTOR..new.len()).is_some_and(|rest| rest != &new[SECTOR..]) {
            if shorten(&mut old) {
                bytes::write(file, 0, &old[..SECTOR]).await?;
                file.flush().await?;
            }
            bytes::write(file, SECTOR as u64, &new[SECTOR..]).await?;
            file.flush().await?;
        }
        bytes::write(file, 0, &new[..SECTOR.min(new.len())]).await?;
        file.flush().await?;
        Ok(())
    }

    /// As [`Header::bytes`], with the name not where that of an old header cluster is, which is left, if there is room.
    fn bytes_beside(&self, old: &[u8]) -> Vec<u8> {
        let other = old_name(old);
        let extensions = self.extensions.bytes();
        let name = self.backing_file.as_deref().unwrap_or_default().as_bytes();
        let next = self.length() + extensions.len();
        let behind = next.max(other.end);
        let apart = next + name.len() <= other.start || behind + name.len() > self.cluster_size() as usize;
        let at = if apart || other.is_empty() || name.is_empty() { next } else { behind };
        let mut all = self.fields(at);
        all.extend_from_slice(&extensions);
        if !name.is_empty() {
            all.extend_from_slice(old.get(next..at).unwrap_or_default());
            all.extend_from_slice(name);
        }
        all
    }
}

/// Where the backing file's name is in a header cluster.
fn old_name(cluster: &[u8]) -> std::ops::Range<usize> {
    let (at, len) = (long(cluster, 8), word(cluster, 16) as usize);
    match usize::try_from(at) {
        Ok(at) if at > 0 && at < cluster.len() => at..at.saturating_add(len).min(cluster.len()),
        Ok(_) | Err(_) => 0..0,
    }
}

/// Lets the extensions of a header cluster end within its first sector, if what follows there is nothing that the image needs.
fn shorten(cluster: &mut [u8]) -> bool {
    let mut at = if word(cluster, 4) == 2 { LENGTH_2 } else { word(cluster, 100) as usize };
    while let Some((kind, len)) = be32(cluster, at).zip(be32(cluster, at + 4)).filter(|_| at + 8 <= SECTOR) {
        let next = (at + 8).saturating_add(len as usize).next_multiple_of(8);
        if kind == 0 {
            return false; // they end there already
        }
        if next + 8 > SECTOR {
            if !is_needed(kind)
                && let Some(mark) = cluster.get_mut(at..at + 8)
            {
                mark.fill(0);
                return true;
            }
            return false;
        }
        at = next;
    }
    false
}

fn encrypted(how: &str) -> ImageError {
    ImageError::Unsupported(format!(
        "this qcow2 image is encrypted with {how}, which tapdisk does not know; decrypt it with qemu-img convert"
    ))
}
