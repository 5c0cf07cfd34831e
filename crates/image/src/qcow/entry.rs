//! Entries of the tables: what 8 bytes say of a cluster, and where the table of it is.

use block::Span;

/// An entry with this bit is of a compressed cluster.
const COMPRESSED: u64 = 1 << 63;
/// Bytes of an L1 table, at most (QEMU's limit).
const L1_MAX: u64 = i32::MAX as u64;

/// Where the tables are and what they are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Bytes of a cluster, as a power of two.
    pub(super) cluster_bits: u32,
    /// Entries of an L2 table, as a power of two.
    pub(super) l2_bits: u32,
    /// Byte of the L1 table.
    pub(super) l1_at: u64,
    pub(super) l1_entries: u64,
    /// The L1 table, and it alone, is little-endian.
    pub(super) swapped: bool,
    /// Bytes of the header with all that belongs to it.
    pub(super) header_len: u64,
}

/// What an L2 table says of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing.
    Empty,
    /// It is at this byte.
    Data(u64),
    /// It is compressed to the bytes of this span.
    Packed(Span),
}

impl Geometry {
    /// Of a disk of so many bytes; `None` if the L1 table would be too large.
    pub(super) fn new(cluster_bits: u32, l2_bits: u32, size: u64, l1_at: u64) -> Option<Geometry> {
        let l1_entries = size.div_ceil(1 << (cluster_bits + l2_bits));
        let fits = l1_entries.checked_mul(8).is_some_and(|bytes| bytes <= L1_MAX);
        fits.then_some(Geometry {
            cluster_bits,
            l2_bits,
            l1_at,
            l1_entries,
            swapped: false,
            header_len: super::header::LEN,
        })
    }

    /// Bytes of a cluster.
    pub(super) fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 table.
    pub(super) fn l2_len(self) -> u64 {
        8 << self.l2_bits
    }

    /// Byte behind the L1 table, if any file reaches so far.
    pub(super) fn l1_end(self) -> Option<u64> {
        Some(Span::new(self.l1_at, self.l1_entries * 8)?.end())
    }

    /// The L1 table.
    pub(super) fn l1_span(self) -> Span {
        Span::new(self.l1_at, self.l1_entries * 8).expect("it lies within the file")
    }

    /// The word of the L1 table for this cluster of the disk, and which cluster is the first one of its L2 table.
    pub(super) fn l1_word(self, cluster: u64) -> (u64, u64) {
        let index = cluster >> self.l2_bits;
        (self.l1_at + index * 8, index << self.l2_bits)
    }

    /// An entry of the L1 table from its word, or back.
    pub(super) fn l1_entry(self, word: u64) -> u64 {
        if self.swapped { word.swap_bytes() } else { word }
    }

    /// The L2 table that an entry of the L1 table leads to, in a file of this length; `None` if it leads nowhere.
    ///
    /// # Errors
    /// It makes no sense.
    pub(super) fn table(self, entry: u64, file_len: u64) -> Result<Option<u64>, Nonsense> {
        if entry == 0 {
            return Ok(None);
        }
        let table = Span::new(entry, self.l2_len()).ok_or(Nonsense::Beyond)?;
        self.judge(table, file_len)?;
        // Unlike a cluster of the disk, all programs write a table as a whole: its end is not zero, it is lost.
        if table.end() > file_len { Err(Nonsense::Beyond) } else { Ok(Some(entry)) }
    }

    /// What an entry of an L2 table says, in a file of this length.
    ///
    /// # Errors
    /// It makes no sense.
    pub(super) fn entry(self, entry: u64, file_len: u64) -> Result<Entry, Nonsense> {
        if entry == 0 {
            return Ok(Entry::Empty);
        }
        if entry & COMPRESSED == 0 {
            let place = Span::new(entry, self.cluster()).ok_or(Nonsense::Beyond)?;
            self.judge(place, file_len)?;
            return Ok(Entry::Data(entry));
        }
        // QEMU: the size in the upper bits, as many as it takes to count the bytes of a cluster; below it the place.
        let shift = 63 - self.cluster_bits;
        let at = entry & ((1 << shift) - 1);
        let len = (entry >> shift) & (self.cluster() - 1);
        let packed = Span::new(at, len).ok_or(Nonsense::Beyond)?;
        match () {
            () if len == 0 => Err(Nonsense::NoBytes),
            () if at < self.header_len => Err(Nonsense::Header),
            // As with a table.
            () if packed.end() > file_len => Err(Nonsense::Beyond),
            () => Ok(Entry::Packed(packed)),
        }
    }

    /// Whether a cluster or a table can be there. All programs that write the format put them at multiples of a
    /// cluster. The file's last cluster need not be there as a whole: its end is zero then. But nothing has clusters
    /// that are not there at all, for that is where new ones go.
    fn judge(self, place: Span, file_len: u64) -> Result<(), Nonsense> {
        let cluster = self.cluster();
        let l1 = self.l1_span();
        match () {
            () if !place.at().is_multiple_of(cluster) => Err(Nonsense::Misaligned),
            () if place.at() < self.header_len => Err(Nonsense::Header),
            () if place.overlaps(l1) => Err(Nonsense::L1),
            () if place.end() > file_len.next_multiple_of(cluster) => Err(Nonsense::Beyond),
            () => Ok(()),
        }
    }
}

/// Why an entry makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Nonsense {
    #[error("leads beyond the end of the file")]
    Beyond,
    #[error("leads to no multiple of a cluster")]
    Misaligned,
    #[error("leads into the header")]
    Header,
    #[error("leads into the L1 table")]
    L1,
    #[error("is of a cluster compressed to no bytes")]
    NoBytes,
}
