//! The header of a qcow image, and what Xen's blktap put behind it.

use std::rc::Rc;

use block::{Buf, Span};
use storage::Storage;

use super::entry::Geometry;
use super::{MAGIC, is};
use crate::{Backing, ImageError};

/// Bytes of the header; QEMU puts the first table or the backing file's name right behind it.
pub(super) const LEN: u64 = 48;
/// The word (8 bytes) that is the disk's size.
pub(super) const SIZE_AT: u64 = 24;
/// The word that is the place of the L1 table.
pub(super) const L1_AT: u64 = 40;
/// What Xen's header behind the header begins with.
const XEN_MAGIC: [u8; 4] = *b"XEN\xfb";
/// Bytes of Xen's header: magic, checksum, clusters allocated at a time, flags.
const XEN_LEN: u64 = 16;
/// The file is to be kept sparse (blktap's `SPARSE_FILE`).
const XEN_SPARSE: u32 = 1;
/// The L1 table is big-endian as with QEMU (blktap's `EXTHDR_L1_BIG_ENDIAN`).
const XEN_BIG_ENDIAN: u32 = 2;
/// Bytes of a backing file's name, at most (QEMU's limit, a `char[1024]` with its end).
pub(super) const NAME_MAX: usize = 1023;
/// QEMU counts in whole sectors.
pub(super) const SECTOR: u64 = 512;

/// What is at the beginning of an image, found to be sound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub(super) geometry: Geometry,
    size: u64,
    backing: Option<String>,
    encrypted: bool,
    xen: Option<Xen>,
}

/// The header that blktap of Xen put behind QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xen {
    /// The first four bytes of the L1 table's MD5, as blktap found it when it last closed the image.
    pub checksum: u32,
    /// Clusters that blktap gave places at a time: with all those of an L2 table it did not look at the table.
    pub clusters_at_a_time: u32,
    /// Whether blktap was to keep the file sparse.
    pub sparse: bool,
    /// Whether the L1 table is big-endian. In blktap's first images it is little-endian, as x86 had it in memory.
    pub big_endian: bool,
}

impl Header {
    /// Reads and judges the header; changes nothing.
    ///
    /// # Errors
    /// It is none, or asks for what cannot be; or reading failed.
    pub async fn read(file: &Rc<dyn Storage>) -> Result<Header, ImageError> {
        let file_len = file.size();
        let mut head = vec![0; file_len.min(LEN + XEN_LEN) as usize];
        read_exactly(file, 0, &mut head).await?;
        let mut header = parse(&head, file_len)?;
        if let Some(name) = name_of(&head, file_len, &header)? {
            header.geometry.header_len = header.geometry.header_len.max(name.end());
            let mut bytes = vec![0; name.len() as usize];
            read_exactly(file, name.at(), &mut bytes).await?;
            // As a C string: blktap and QEMU read it so.
            bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
            let name = String::from_utf8(bytes).map_err(|error| {
                ImageError::Unsupported(format!(
                    "the name of the backing file, {:?}, is not UTF-8: rename that file and the name in the image",
                    String::from_utf8_lossy(error.as_bytes())
                ))
            })?;
            header.backing = Some(name).filter(|name| !name.is_empty());
        }
        Ok(header)
    }

    /// Bytes of the disk: a multiple of 512, as QEMU has it.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What it says of the image below it: a name, and no format.
    pub fn backing(&self) -> Option<Backing> {
        let name = self.backing.clone()?;
        Some(Backing { name, format: None, others: Vec::new(), unique_id: None })
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u32 {
        1 << self.geometry.cluster_bits
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u32 {
        1 << self.geometry.l2_bits
    }

    /// Whether the disk's bytes are encrypted (AES). Such an image can be looked at, and no more.
    pub fn is_encrypted(&self) -> bool {
        self.encrypted
    }

    /// What blktap of Xen put behind the header, if it did.
    pub fn xen(&self) -> Option<&Xen> {
        self.xen.as_ref()
    }

    /// Refuses what cannot be read.
    pub(super) fn readable(&self) -> Result<(), ImageError> {
        if !self.encrypted {
            return Ok(());
        }
        Err(ImageError::Unsupported(
            "this qcow image is encrypted (crypt_method 1, AES-CBC), which tapdisk does not do: copy its content into an \
             unencrypted image with a QEMU that has the password"
                .into(),
        ))
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |word| u32::from_be_bytes(*word))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |word| u64::from_be_bytes(*word))
}

fn invalid<T>(what: String) -> Result<T, ImageError> {
    Err(ImageError::Invalid(what))
}

/// Judges the first bytes of a file of this length: the header, and Xen's, if they are all there. All but the backing
/// file's name.
fn parse(head: &[u8], file_len: u64) -> Result<Header, ImageError> {
    if head.len() < LEN as usize {
        return invalid(format!("a file of {file_len} bytes is no qcow image: its header alone has {LEN}"));
    }
    if !is(head) {
        let (magic, version) = (&head[..4], be32(head, 4));
        return invalid(if magic == MAGIC {
            format!("this is qcow of version {version}, where version 1 was expected: 2 and 3 are qcow2")
        } else {
            format!("no qcow image: it begins with {magic:02x?}, not with {MAGIC:02x?}")
        });
    }
    let (cluster_bits, l2_bits) = (u32::from(head[32]), u32::from(head[33]));
    if !(9..=16).contains(&cluster_bits) {
        return invalid(format!(
            "clusters of 2^{cluster_bits} bytes, where 2^9 to 2^16 were expected: the header is damaged"
        ));
    }
    if !(6..=13).contains(&l2_bits) {
        return invalid(format!(
            "L2 tables of 2^{l2_bits} entries, where 2^6 to 2^13 were expected: the header is damaged"
        ));
    }
    let crypt = be32(head, 36);
    if crypt > 1 {
        return invalid(format!("encryption method {crypt}, where only 0 (none) and 1 (AES) are known"));
    }
    let stored = be64(head, SIZE_AT as usize);
    if stored < SECTOR {
        return invalid(format!("a disk of {stored} bytes: the least is a sector of {SECTOR}"));
    }
    let l1_at = be64(head, L1_AT as usize);
    let Some(geometry) = Geometry::new(cluster_bits, l2_bits, stored, l1_at) else {
        return invalid(format!(
            "a disk of {stored} bytes in clusters of {} needs an L1 table larger than 2 GiB: the header is damaged",
            1 << cluster_bits
        ));
    };
    if l1_at < LEN || !l1_at.is_multiple_of(8) || geometry.l1_end().is_none_or(|end| end > file_len) {
        return invalid(format!(
            "the L1 table of {} entries at byte {l1_at} is not within the file's {file_len} bytes, at a multiple of 8 \
             behind the header: the file was cut short, or its header is damaged",
            geometry.l1_entries
        ));
    }
    let xen = xen(head, l1_at);
    let header_len = if xen.is_some() { LEN + XEN_LEN } else { LEN };
    let geometry = Geometry { swapped: xen.is_some_and(|xen| !xen.big_endian), header_len, ..geometry };
    let size = stored - stored % SECTOR;
    Ok(Header { geometry, size, backing: None, encrypted: crypt == 1, xen })
}

/// Xen's header. Like blktap we look for it only where the L1 table lies as blktap put it: else something else may be
/// there, such as the table itself.
fn xen(head: &[u8], l1_at: u64) -> Option<Xen> {
    let bytes = head.get(LEN as usize..(LEN + XEN_LEN) as usize)?;
    if !bytes.starts_with(&XEN_MAGIC) || !l1_at.is_multiple_of(4096) {
        return None;
    }
    let flags = be32(bytes, 12);
    Some(Xen {
        checksum: be32(bytes, 4),
        clusters_at_a_time: be32(bytes, 8),
        sparse: flags & XEN_SPARSE != 0,
        big_endian: flags & XEN_BIG_ENDIAN != 0,
    })
}

/// Where the backing file's name is, if there is one.
fn name_of(head: &[u8], file_len: u64, header: &Header) -> Result<Option<Span>, ImageError> {
    let (at, len) = (be64(head, 8), u64::from(be32(head, 16)));
    if at == 0 || len == 0 {
        return Ok(None);
    }
    if len > NAME_MAX as u64 {
        return invalid(format!(
            "the name of the backing file has {len} bytes, where at most {NAME_MAX} were expected"
        ));
    }
    let l1 = header.geometry.l1_span();
    match Span::new(at, len) {
        Some(name) if at >= header.geometry.header_len && name.is_within(file_len) && !name.overlaps(l1) => {
            Ok(Some(name))
        }
        Some(_) | None => invalid(format!(
            "the name of the backing file, {len} bytes at byte {at}, lies over the header or the L1 table, or beyond the \
             file's {file_len} bytes: the header is damaged"
        )),
    }
}

/// Reads bytes that the file has.
pub(super) async fn read_exactly(file: &Rc<dyn Storage>, at: u64, bytes: &mut [u8]) -> block::Result<()> {
    let buf = Buf::zeroed(bytes.len());
    if !bytes.is_empty() {
        file.read(at, buf.clone()).await?;
    }
    buf.get(0, bytes);
    Ok(())
}
