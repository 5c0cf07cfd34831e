//! Entries of L1 and L2 tables as a check sees them: what they point to, or what is wrong with them and what to make of them.

use super::super::COPIED;
use super::super::header::Header;

/// The cluster is compressed (bit 62 of an L2 entry).
const PACKED: u64 = 1 << 62;
/// The cluster reads as zero (bit 0 of an L2 entry of 8 bytes).
const ZERO: u64 = 1;
/// Bits 9 to 55: a byte of the file.
pub(super) const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits that are reserved in an entry of an L1 table, of an L2 table, and of the refcount table.
const L1_RESERVED: u64 = !(PLACE | COPIED);
const L2_RESERVED: u64 = !(PLACE | COPIED | PACKED | ZERO);
pub(super) const REFCOUNT_RESERVED: u64 = 0x1ff;

/// What an L2 entry points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Nothing.
    None,
    /// A cluster.
    Cluster {
        /// Its first byte.
        at: u64,
    },
    /// Compressed bytes.
    Packed {
        /// Their first byte.
        at: u64,
        /// How many there are at most.
        len: u64,
    },
}

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// In words.
    pub(super) what: &'static str,
    /// What the entry becomes where it is put right: both words, of which entries of 8 bytes have the first.
    pub(super) instead: [u64; 2],
    /// What it points to all the same, so that this is not taken from it while it is as it is.
    pub(super) target: Target,
    /// Whether what it pointed to cannot be told.
    pub(super) lost: bool,
}

/// What to judge entries by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Judge {
    cluster_bits: u32,
    extended: bool,
    has_zero: bool,
    external: bool,
    /// Bytes of the file.
    file: u64,
}

impl Judge {
    pub(super) fn new(header: &Header, file: u64) -> Judge {
        Judge {
            cluster_bits: header.cluster_bits,
            extended: header.has_extended_l2(),
            has_zero: header.version > 2,
            external: header.has_data_file(),
            file,
        }
    }

    fn is_aligned(self, at: u64) -> bool {
        at & ((1 << self.cluster_bits) - 1) == 0
    }

    /// The L2 table that an L1 entry points to.
    pub(super) fn l1(self, word: u64) -> Result<Option<u64>, Fault> {
        let at = word & PLACE;
        let lost = |what| Fault { what, instead: [0, 0], target: Target::None, lost: true };
        if at == 0 && word & !COPIED == 0 {
            return Ok(None);
        }
        if !self.is_aligned(at) {
            return Err(lost("points into the middle of a cluster"));
        }
        if at >= self.file {
            return Err(lost("points beyond the end of the file"));
        }
        if word & L1_RESERVED != 0 {
            let target = if at == 0 { Target::None } else { Target::Cluster { at } };
            return Err(Fault {
                what: "has reserved bits set",
                instead: [word & !L1_RESERVED, 0],
                target,
                lost: false,
            });
        }
        Ok(Some(at))
    }

    /// What an L2 entry points to. Entries of 8 bytes have 0 as the second word.
    pub(super) fn l2(self, words: [u64; 2]) -> Result<Target, Fault> {
        let [word, bitmap] = words;
        if word & PACKED != 0 {
            return self.packed(word, bitmap);
        }
        let at = word & PLACE;
        let (data, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        // In a data file byte 0 is a place as any other; the mark tells it from none.
        let there = at != 0 || self.external && word & COPIED != 0;
        let target = if there { Target::Cluster { at } } else { Target::None };
        if !self.is_aligned(at) {
            return Err(self.lost("points into the middle of a cluster", words));
        }
        if there && !self.external && at >= self.file {
            return Err(self.lost("points beyond the end of the file", words));
        }
        let fault = |what, word, bitmap| Err(Fault { what, instead: [word, bitmap], target, lost: false });
        if word & L2_RESERVED != 0 || self.extended && word & ZERO != 0 {
            let reserved = if self.extended { L2_RESERVED | ZERO } else { L2_RESERVED };
            return fault("has reserved bits set", word & !reserved, bitmap);
        }
        if self.extended && data & zero != 0 {
            // As with QEMU such a subcluster is none that is there.
            return fault(
                "has subclusters that are there and zero",
                word,
                u64::from(zero) << 32 | u64::from(data & !zero),
            );
        }
        if self.extended && data != 0 && !there {
            return fault("has subclusters and no place for them", word, u64::from(zero | data) << 32);
        }
        Ok(target)
    }

    fn packed(self, word: u64, bitmap: u64) -> Result<Target, Fault> {
        // The specification's x: so many bits are the place, the others up to bit 61 count further sectors.
        let bits = 62 - (self.cluster_bits - 8);
        let at = word & ((1 << bits) - 1);
        let sectors = ((word & (PACKED - 1)) >> bits) + 1;
        let len = sectors * 512 - at % 512;
        let target = Target::Packed { at, len };
        if self.external {
            return Err(self.lost("is compressed, which cannot be with a data file", [word, bitmap]));
        }
        // As QEMU has it, up to a cluster of it may lie beyond the end.
        if at >= self.file
            || at.checked_add(len).is_none_or(|end| end >= self.file.saturating_add(1 << self.cluster_bits))
        {
            return Err(self.lost("points beyond the end of the file", [word, bitmap]));
        }
        if word & COPIED != 0 {
            let what = "is compressed and marked as being written in place";
            return Err(Fault { what, instead: [word & !COPIED, bitmap], target, lost: false });
        }
        if self.extended && bitmap != 0 {
            return Err(Fault {
                what: "is compressed and has subclusters",
                instead: [word, 0],
                target,
                lost: false,
            });
        }
        Ok(target)
    }

    /// An entry whose place is none: nobody can read what was there, so that zeroes are no loss.
    fn lost(self, what: &'static str, words: [u64; 2]) -> Fault {
        let bitmap = words[1] | words[1] << 32;
        let instead = if self.extended {
            // A compressed cluster is there as a whole.
            let all = if words[0] & PACKED != 0 { u64::MAX } else { bitmap };
            [0, all & !u64::from(u32::MAX)]
        } else if self.has_zero {
            [ZERO, 0]
        } else {
            [0, 0]
        };
        Fault { what, instead, target: Target::None, lost: true }
    }

    /// The clusters of the file that a target counts for: first and how many.
    pub(super) fn clusters(self, target: Target) -> std::ops::Range<u64> {
        match target {
            Target::None => 0..0,
            Target::Cluster { .. } if self.external => 0..0,
            Target::Cluster { at } => at >> self.cluster_bits..(at >> self.cluster_bits) + 1,
            Target::Packed { at, len } => {
                // Within the file, so that nothing wraps around.
                let last = (at + len - 1) >> self.cluster_bits;
                at >> self.cluster_bits..last + 1
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Judge =
        Judge { cluster_bits: 16, extended: false, has_zero: true, external: false, file: 10 << 16 };
    const EXTENDED: Judge = Judge { extended: true, ..PLAIN };

    #[test]
    fn what_makes_sense_is_taken_as_it_is() {
        assert_eq!(PLAIN.l1(0), Ok(None));
        assert_eq!(PLAIN.l1(COPIED | 0x3_0000), Ok(Some(0x3_0000)));
        assert_eq!(PLAIN.l2([ZERO, 0]), Ok(Target::None));
        assert_eq!(PLAIN.l2([COPIED | 0x3_0000 | ZERO, 0]), Ok(Target::Cluster { at: 0x3_0000 }));
        assert_eq!(PLAIN.l2([PACKED | 1 << 54 | 700, 0]), Ok(Target::Packed { at: 700, len: 1024 - 188 }));
        assert_eq!(EXTENDED.l2([0x3_0000, 0xffff_0000_0000_ffff]), Ok(Target::Cluster { at: 0x3_0000 }));
        let external = Judge { external: true, ..PLAIN };
        assert_eq!(external.l2([COPIED, 0]), Ok(Target::Cluster { at: 0 }));
        assert_eq!(external.l2([COPIED | 0xff_0000, 0]), Ok(Target::Cluster { at: 0xff_0000 }));
        assert_eq!(external.clusters(Target::Cluster { at: 0xff_0000 }), 0..0);
        assert_eq!(PLAIN.clusters(Target::Packed { at: 0xff00, len: 0x100 }), 0..1);
        assert_eq!(PLAIN.clusters(Target::Packed { at: 0xff00, len: 0x101 }), 0..2);
    }

    #[test]
    fn what_makes_none_is_put_right_into_what_does() {
        let old = Judge { has_zero: false, ..PLAIN };
        let external = Judge { external: true, ..PLAIN };
        for (judge, words, instead, lost) in [
            (PLAIN, [0x3_0200, 0], [ZERO, 0], true),
            (old, [0x3_0200, 0], [0, 0], true),
            (EXTENDED, [0x3_0200, 0x1_0000_0002], [0, 0x3_0000_0000], true),
            (PLAIN, [COPIED | 0xa_0000, 0], [ZERO, 0], true),
            (PLAIN, [PACKED | 0xa_0000, 0], [ZERO, 0], true),
            (PLAIN, [PACKED | 1 << 53, 0], [ZERO, 0], true),
            (EXTENDED, [PACKED | 0xa_0000, 0], [0, 0xffff_ffff_0000_0000], true),
            (external, [PACKED | 512, 0], [ZERO, 0], true),
            (PLAIN, [COPIED | 0x3_0002, 0], [COPIED | 0x3_0000, 0], false),
            (PLAIN, [1 << 60 | 0x3_0000, 0], [0x3_0000, 0], false),
            (EXTENDED, [0x3_0001, 1], [0x3_0000, 1], false),
            (EXTENDED, [0x3_0000, 0x1_0000_0003], [0x3_0000, 0x1_0000_0002], false),
            (EXTENDED, [0, 3], [0, 0x3_0000_0000], false),
            (PLAIN, [COPIED | PACKED | 512, 0], [PACKED | 512, 0], false),
            (EXTENDED, [PACKED | 512, 1], [PACKED | 512, 0], false),
        ] {
            let fault = judge.l2(words).unwrap_err();
            assert_eq!((fault.instead, fault.lost), (instead, lost), "{words:x?}: {}", fault.what);
            assert!(judge.l2(instead).is_ok());
        }
        for (word, instead) in [(0x3_0200, 0), (0xa_0000, 0), (1 << 60 | 0x3_0000, 0x3_0000), (1 << 60, 0)] {
            let fault = PLAIN.l1(word).unwrap_err();
            assert_eq!(fault.instead[0], instead, "{word:x}: {}", fault.what);
            assert!(PLAIN.l1(instead).is_ok());
        }
    }
}
