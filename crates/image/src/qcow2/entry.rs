//! The entry of an L2 table: where one cluster of the disk is.
//!
//! There are entries of one word and of two, which know 32 subclusters each (docs/interop/qcow2, "Extended L2 Entries"). Here
//! both have *parts*: 32 of them, or the whole cluster as the only one. So what follows is written once.

use std::ops::Range;

use block::Span;

use super::COPIED;

/// The cluster is compressed (bit 62 of an L2 entry).
const PACKED: u64 = 1 << 62;
/// The cluster reads as zero (bit 0 of an L2 entry of one word, from version 3 on).
const ZERO: u64 = 1;
/// Bits 9 to 55 of entries of L1 and L2: a byte of the file.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
/// Subclusters of a cluster, where it has some.
const SUBCLUSTERS: u32 = 32;

/// What entries of an image look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// A cluster has 2 to the power of this many bytes.
    pub(super) cluster_bits: u32,
    /// Entries have two words.
    pub(super) extended: bool,
    /// There may be clusters that read as zero: not in version 2.
    pub(super) zeroes: bool,
    /// The disk's bytes are in a file of their own.
    pub(super) external: bool,
}

impl Shape {
    /// Bytes of a cluster.
    pub(super) fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// How many parts a cluster has.
    pub(super) fn parts(self) -> u32 {
        if self.extended { SUBCLUSTERS } else { 1 }
    }

    /// A part has 2 to the power of this many bytes.
    pub(super) fn part_bits(self) -> u32 {
        if self.extended { self.cluster_bits - SUBCLUSTERS.ilog2() } else { self.cluster_bits }
    }

    /// Bytes of a part.
    pub(super) fn part(self) -> u64 {
        1 << self.part_bits()
    }

    /// The mask of all parts.
    pub(super) fn all(self) -> u32 {
        if self.extended { u32::MAX } else { 1 }
    }

    /// The mask of the parts with these bytes of a cluster; they are within it, and at least one.
    pub(super) fn touched(self, bytes: Range<u64>) -> u32 {
        let (first, last) = (bytes.start >> self.part_bits(), (bytes.end - 1) >> self.part_bits());
        mask(first as u32..last as u32 + 1)
    }

    /// Words of an entry.
    pub(super) fn words(self) -> u64 {
        if self.extended { 2 } else { 1 }
    }

    /// A table has 2 to the power of this many entries.
    pub(super) fn entries_bits(self) -> u32 {
        self.cluster_bits - if self.extended { 4 } else { 3 }
    }

    /// Entries of a table.
    pub(super) fn entries(self) -> u64 {
        1 << self.entries_bits()
    }

    /// Where an entry of the table at byte `table` is.
    pub(super) fn entry_at(self, table: u64, index: u64) -> u64 {
        table + index * 8 * self.words()
    }

    /// The place that an entry of L1 or L2 points to, if it does to a cluster's begin.
    fn place(self, word: u64) -> Result<u64, Nonsense> {
        let at = word & PLACE;
        if at & (self.cluster() - 1) == 0 { Ok(at) } else { Err(Nonsense::Unaligned(at)) }
    }

    /// Reads an entry of an L1 table.
    pub(super) fn table(self, word: u64) -> Result<Option<Place>, Nonsense> {
        let at = self.place(word)?;
        Ok((at != 0).then_some(Place { at, sole: word & COPIED != 0 }))
    }

    /// Reads an entry, of which the second word counts where there is one.
    pub(super) fn read(self, words: [u64; 2]) -> Result<Entry, Nonsense> {
        let [word, bitmap] = words;
        if word & PACKED != 0 {
            // With a data file of its own nothing is compressed, for then every cluster has its fixed place.
            if self.external || self.extended && bitmap != 0 {
                return Err(Nonsense::Packed(word));
            }
            return Ok(Entry::Packed(self.packed(word)));
        }
        let at = self.place(word)?;
        let sole = word & COPIED != 0;
        // In a data file byte 0 is a place as any other; the mark tells it from none.
        let place = (at != 0 || self.external && sole).then_some(Place { at, sole });
        let (data, zero) = if self.extended {
            (bitmap as u32, (bitmap >> 32) as u32)
        } else {
            let zero = (word & ZERO) as u32;
            (u32::from(place.is_some() && zero == 0), zero)
        };
        if data & zero != 0 || data != 0 && place.is_none() {
            return Err(Nonsense::Subclusters(bitmap));
        }
        if zero != 0 && !self.zeroes {
            return Err(Nonsense::ZeroInOldVersion);
        }
        Ok(Entry::Plain(Cluster { place, data, zero }))
    }

    /// The words of an entry; see [`Shape::read`].
    pub(super) fn write(self, cluster: Cluster) -> [u64; 2] {
        let place = cluster.place.map_or(0, |place| place.at | if place.sole { COPIED } else { 0 });
        if self.extended {
            [place, u64::from(cluster.zero) << 32 | u64::from(cluster.data)]
        } else {
            [place | u64::from(cluster.zero), 0]
        }
    }

    fn packed(self, word: u64) -> Packed {
        // As the specification has it: so many bits for the place, the others up to bit 61 for the sectors.
        let bits = 62 - (self.cluster_bits - 8);
        let at = word & ((1 << bits) - 1) & ((1 << 56) - 1);
        let more = (word & (PACKED - 1)) >> bits;
        Packed { at, len: (more + 1) * 512 - at % 512 }
    }
}

/// The mask of these parts.
pub(super) fn mask(parts: Range<u32>) -> u32 {
    let upto = |part: u32| 1_u64.checked_shl(part).map_or(u64::MAX, |bit| bit - 1);
    (upto(parts.end) & !upto(parts.start)) as u32
}

/// The parts from the first to the last in a mask.
pub(super) fn hull(mask: u32) -> Range<u32> {
    if mask == 0 { 0..0 } else { mask.trailing_zeros()..u32::BITS - mask.leading_zeros() }
}

/// A place in the file with a cluster in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Its first byte.
    pub(super) at: u64,
    /// Nothing else refers to it, so that it may be written.
    pub(super) sole: bool,
}

/// Where compressed bytes are: no multiple of anything, and in two clusters of the file or more, it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Packed {
    /// Their first byte.
    pub(super) at: u64,
    /// How many there are at most: the last sector may hold others.
    pub(super) len: u64,
}

impl Packed {
    /// The clusters of the file that hold some of them, in bytes. Each counts one reference for them.
    pub(super) fn clusters(self, shape: Shape) -> Option<Span> {
        Span::new(self.at, self.len).map(|span| span.align_out(shape.cluster()))
    }
}

/// What the parts of a cluster are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cluster {
    /// Its place, if it has one.
    pub(super) place: Option<Place>,
    /// The mask of the parts that are there.
    pub(super) data: u32,
    /// Of those that are zero. What is in neither is what the image below says.
    pub(super) zero: u32,
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// The cluster's parts are there, zero, or what is below.
    Plain(Cluster),
    /// It is compressed.
    Packed(Packed),
}

/// Why an entry makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Nonsense {
    /// It points into the middle of a cluster.
    #[error("it points to byte {0}, which no cluster begins with")]
    Unaligned(u64),
    /// Compressed, where nothing can be.
    #[error("its cluster is compressed, which it cannot be here ({0:#x})")]
    Packed(u64),
    /// Its subclusters are more than one thing at a time, or nowhere.
    #[error("its subclusters cannot be so ({0:#x})")]
    Subclusters(u64),
    /// Version 2 knows no clusters that are zero.
    #[error("its cluster is marked as zero, which there is only from version 3 on")]
    ZeroInOldVersion,
}

/// What one part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// In its cluster's place.
    Data,
    /// Zero.
    Zero,
    /// What the image below says.
    Below,
}

impl Cluster {
    /// What a part is.
    pub(super) fn part(self, part: u32) -> Part {
        if self.data >> part & 1 == 1 {
            Part::Data
        } else if self.zero >> part & 1 == 1 {
            Part::Zero
        } else {
            Part::Below
        }
    }

    /// The first part from `part` on that is something else than that one, or `parts`.
    pub(super) fn run_end(self, part: u32, parts: u32) -> u32 {
        let same = match self.part(part) {
            Part::Data => self.data,
            Part::Zero => self.zero,
            Part::Below => !(self.data | self.zero),
        };
        let others = !same & !mask(0..part);
        others.trailing_zeros().min(parts)
    }

    /// The place, where it may be written.
    pub(super) fn own_place(self) -> Option<u64> {
        self.place.filter(|place| place.sole).map(|place| place.at)
    }

    /// The same with these parts in this place, and nothing in another.
    pub(super) fn with_data(self, at: u64, parts: u32) -> Cluster {
        Cluster { place: Some(Place { at, sole: true }), data: self.data | parts, zero: self.zero & !parts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Shape = Shape { cluster_bits: 16, extended: false, zeroes: true, external: false };
    const EXTENDED: Shape = Shape { extended: true, ..PLAIN };

    fn plain(place: Option<(u64, bool)>, data: u32, zero: u32) -> Result<Entry, Nonsense> {
        Ok(Entry::Plain(Cluster { place: place.map(|(at, sole)| Place { at, sole }), data, zero }))
    }

    #[test]
    fn entries_of_one_word_say_where_a_cluster_is() {
        // Words as the specification describes them, bit by bit.
        for (word, expected) in [
            (0, plain(None, 0, 0)),
            (1, plain(None, 0, 1)),
            (0x50000, plain(Some((0x50000, false)), 1, 0)),
            (0x8000_0000_0005_0000, plain(Some((0x50000, true)), 1, 0)),
            (0x8000_0000_0005_0001, plain(Some((0x50000, true)), 0, 1)),
            (0x0000_0000_0005_0200, Err(Nonsense::Unaligned(0x50200))),
        ] {
            assert_eq!(PLAIN.read([word, 0]), expected, "{word:#x}");
            if let Ok(Entry::Plain(cluster)) = expected {
                assert_eq!(PLAIN.write(cluster), [word, 0]);
            }
        }
        let old = Shape { zeroes: false, ..PLAIN };
        assert_eq!(old.read([1, 0]), Err(Nonsense::ZeroInOldVersion));
        let external = Shape { external: true, ..PLAIN };
        assert_eq!(external.read([COPIED, 0]), plain(Some((0, true)), 1, 0));
        assert_eq!(external.read([0, 0]), plain(None, 0, 0));
        assert_eq!(external.read([PACKED, 0]), Err(Nonsense::Packed(PACKED)));
    }

    #[test]
    fn entries_of_two_words_say_where_each_subcluster_is() {
        let at = 0x8000_0000_0005_0000;
        for (words, expected) in [
            ([0, 0], plain(None, 0, 0)),
            ([0, 0xffff_ffff_0000_0000], plain(None, 0, u32::MAX)),
            ([at, 0x0000_0001_8000_0000], plain(Some((0x50000, true)), 1 << 31, 1)),
            ([at, 0x0000_0001_0000_0001], Err(Nonsense::Subclusters(0x1_0000_0001))),
            ([0, 1], Err(Nonsense::Subclusters(1))),
        ] {
            assert_eq!(EXTENDED.read(words), expected, "{words:x?}");
            if let Ok(Entry::Plain(cluster)) = expected {
                assert_eq!(EXTENDED.write(cluster), words);
            }
        }
        assert_eq!(EXTENDED.read([PACKED | 512, 1]), Err(Nonsense::Packed(PACKED | 512)));
    }

    #[test]
    fn compressed_clusters_end_with_a_sector() {
        // With clusters of 64 KiB the place has 54 bits and the count of further sectors 8.
        let word = PACKED | 3 << 54 | 0x12_3456;
        assert_eq!(PLAIN.read([word, 0]), Ok(Entry::Packed(Packed { at: 0x12_3456, len: 4 * 512 - 0x56 })));
        // With 512 bytes it has 61 bits, of which those beyond 55 must be zero; with 2 MiB it has 49, and 13 are left.
        let small = Shape { cluster_bits: 9, ..PLAIN };
        assert_eq!(
            small.read([PACKED | 1 << 61 | 700, 0]),
            Ok(Entry::Packed(Packed { at: 700, len: 1024 - 188 }))
        );
        let large = Shape { cluster_bits: 21, ..PLAIN };
        let packed = Packed { at: 512, len: 8192 * 512 };
        assert_eq!(large.read([PACKED | 8191 << 49 | 512, 0]), Ok(Entry::Packed(packed)));
        // It goes on into the cluster of the file behind, and into the one behind that.
        assert_eq!(packed.clusters(large), Span::new(0, 3 << 21));
    }

    #[test]
    fn parts_are_numbered_from_the_first_byte_on() {
        assert_eq!(EXTENDED.touched(0..1), 1);
        assert_eq!(EXTENDED.touched(2047..2049), 3);
        assert_eq!(EXTENDED.touched(2048..65536), u32::MAX << 1);
        assert_eq!(PLAIN.touched(100..200), 1);
        assert_eq!((mask(0..32), mask(4..6), mask(3..3)), (u32::MAX, 0b11_0000, 0));
        assert_eq!((hull(0b10_1000), hull(u32::MAX), hull(0)), (3..6, 0..32, 0..0));
        let cluster = Cluster { place: None, data: 0b0110, zero: 0b1000 };
        let ends = [0, 1, 2, 3, 4].map(|part| cluster.run_end(part, 32));
        assert_eq!(ends, [1, 3, 3, 4, 32]);
        assert_eq!(Cluster { place: None, data: 1, zero: 0 }.run_end(0, 1), 1);
    }
}
