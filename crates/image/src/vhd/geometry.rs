//! The geometry of a disk: cylinders, heads and sectors, which old machines address it by and some programs take its size
//! from.

use super::SECTOR;

/// Cylinders, heads and sectors per track ("CHS"), as a footer has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// At most 65535.
    pub cylinders: u16,
    /// At most 16 (ATA), though the field holds 255.
    pub heads: u8,
    /// Per track.
    pub sectors: u8,
}

impl Geometry {
    /// The largest: 127 GiB. A larger disk has this one too, and its size elsewhere.
    pub const MAX: Geometry = Geometry { cylinders: 65535, heads: 16, sectors: 255 };

    /// The geometry of so many sectors, which it covers or nearly covers (specification, appendix "CHS Calculation").
    pub fn of(sectors: u64) -> Geometry {
        let total = sectors.min(Geometry::MAX.capacity());
        let (mut per_track, mut heads, mut tracks);
        if total >= 65535 * 16 * 63 {
            (per_track, heads) = (255, 16);
            tracks = total / per_track;
        } else {
            per_track = 17;
            tracks = total / per_track;
            heads = tracks.div_ceil(1024).max(4);
            if tracks >= heads * 1024 || heads > 16 {
                (per_track, heads) = (31, 16);
                tracks = total / per_track;
            }
            if tracks >= heads * 1024 {
                (per_track, heads) = (63, 16);
                tracks = total / per_track;
            }
        }
        // Each fits, since the total is at most the largest geometry's.
        Geometry { cylinders: (tracks / heads) as u16, heads: heads as u8, sectors: per_track as u8 }
    }

    /// How many sectors it addresses.
    pub const fn capacity(self) -> u64 {
        self.cylinders as u64 * self.heads as u64 * self.sectors as u64
    }

    /// The smallest size in bytes, no smaller than `bytes`, that a geometry covers exactly: those who go by the geometry
    /// and those who go by the size see the same disk then. Beyond the largest geometry a size stays what it is.
    pub fn round_up(bytes: u64) -> u64 {
        let wanted = bytes.div_ceil(SECTOR);
        // At most a cylinder's sectors more; the steps are one sector each, as QEMU's.
        let covered = (wanted..).map(|sectors| Geometry::of(sectors).capacity());
        match covered.take(1 << 16).find(|covered| *covered >= wanted) {
            Some(covered) if covered < Geometry::MAX.capacity() => covered * SECTOR,
            Some(_) | None => bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_geometry_is_that_of_the_specification() {
        assert_eq!(Geometry::MAX.capacity(), 267_382_800);
        assert_eq!(Geometry::of(u64::MAX), Geometry::MAX);
    }

    #[test]
    fn geometries_are_those_of_the_specification() {
        // Worked by hand from the appendix: 10 MiB = 20480 sectors, 17 to a track, 1204 tracks, 4 heads.
        assert_eq!(Geometry::of(20480), Geometry { cylinders: 301, heads: 4, sectors: 17 });
        assert_eq!(Geometry::of(0).capacity(), 0);
        // 65535 * 16 * 63 sectors are the first with 255 to a track.
        assert_eq!(Geometry::of(65535 * 16 * 63).sectors, 255);
        assert_eq!(Geometry::of(65535 * 16 * 63 - 1).sectors, 63);
    }

    #[test]
    fn rounded_sizes_are_covered_exactly() {
        for bytes in [0, 1, 512, 10 << 20, (10 << 20) + 1, 1 << 30, 100_000_000_000] {
            let rounded = Geometry::round_up(bytes);
            assert!(rounded >= bytes, "{bytes}");
            if bytes > 0 {
                assert_eq!(Geometry::of(rounded / 512).capacity() * 512, rounded, "{bytes}");
            }
        }
        assert_eq!(Geometry::round_up(1 << 40), 1 << 40, "beyond the largest geometry");
    }
}
