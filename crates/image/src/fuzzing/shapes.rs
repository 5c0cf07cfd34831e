//! Damages that have brought down or opened other programs, as first inputs: by the numbers of their reports, or in words.

use super::program::{Program, Record, damage, step};

/// An input with a name.
type Shape = (&'static str, u8, Vec<Record>);

const ZERO: u8 = 0;
const ALL_ONES: u8 = 2;
const BIT: u8 = 11;
const BIT_LESS_ONE: u8 = 12;
const PARAM: u8 = 8;

const fn word(place: u16, value: u8, param: u16) -> Record {
    Record { code: damage::WORD, value, place, param }
}

const fn byte(place: u16, which: u16, value: u16) -> Record {
    Record { code: damage::BYTE, value: 0, place, param: value << 8 | which }
}

const fn half(place: u16, upper: bool, value: u8, param: u16) -> Record {
    Record { code: damage::HALF, value, place, param: param << 1 | !upper as u16 }
}

const fn length(value: u8, param: u16) -> Record {
    Record { code: damage::LENGTH, value, place: 0, param }
}

/// The inputs for a target, with their names.
pub fn shapes(target: &str) -> Vec<(&'static str, Vec<u8>)> {
    let shapes = match target {
        "image_qcow" => qcow(),
        "image_qcow2" => qcow2(),
        "image_vhd" => vhd(),
        _ => Vec::new(),
    };
    shapes.into_iter().map(|(name, options, damages)| (name, input(options, damages))).collect()
}

/// The same operations for all, over the whole disk.
fn input(options: u8, damages: Vec<Record>) -> Vec<u8> {
    let steps = [
        (step::WRITE, 0, 0, 9000),
        (step::READ, 0, 0, 20_000),
        (step::WRITE, 1, 0x4000, 4095),
        (step::ZERO, 0, 0x8000, 30_000),
        (step::FLUSH, 0, 0, 0),
        (step::PAIR, 0, 0xf000, 20_000),
        (step::DIE, 0, 0, 0),
        (step::DISCARD, 0, 0x2000, 60_000),
        (step::EXTENTS, 0, 0x3000, 0),
        (step::RESIZE, 1, 0, 100),
        (step::WRITE, 0, 0xff00, 60_000),
        (step::REOPEN, 0, 0, 0),
        (step::READ, 4, 0xc000, 60_000),
    ];
    let steps = steps.into_iter().map(|(code, value, place, param)| Record { code, value, place, param });
    Program { options, flags: 0, damages, steps: steps.collect() }.encode()
}

/// Words of the header of qcow, by number: 1 the place of the backing file's name, 2 its length, 3 the disk's size, 4 bits
/// and encryption, 5 the place of the L1 table; from 8 on its entries, and those of the tables.
fn qcow() -> Vec<Shape> {
    const OVER: u8 = 4;
    const PACKED: u8 = 8;
    const BLKTAP: u8 = 16;
    const L1: u16 = 8;
    const L2: u16 = 9;
    vec![
        ("sound", 0, vec![]),
        ("sound-of-512-over-another", OVER + 1, vec![]),
        ("sound-of-64k", 3, vec![]),
        ("sound-compressed", PACKED, vec![]),
        ("sound-of-blktap", BLKTAP, vec![]),
        // CVE-2014-0222: L2 tables so large that a size wraps around.
        ("l2-bits-beyond-all", 0, vec![byte(4, 1, 62)]),
        ("l2-bits-14", 0, vec![byte(4, 1, 14)]),
        ("cluster-bits-0", 0, vec![byte(4, 0, 0)]),
        ("cluster-bits-17", 0, vec![byte(4, 0, 17)]),
        ("cluster-bits-255", 0, vec![byte(4, 0, 255)]),
        // CVE-2014-0223: a disk so large that the length of the L1 table wraps around.
        ("size-all-ones", 0, vec![word(3, ALL_ONES, 0)]),
        ("size-of-2-to-the-63", 0, vec![word(3, BIT, 63)]),
        ("size-of-an-l1-table-of-2-gib", 0, vec![word(3, BIT, 49), length(BIT, 29)]),
        ("size-0", 0, vec![word(3, ZERO, 0)]),
        ("size-of-a-terabyte-in-a-small-file", 0, vec![word(3, BIT, 40)]),
        ("l1-in-the-header", 0, vec![word(5, PARAM, 8)]),
        ("l1-misaligned", 0, vec![word(5, PARAM, 51)]),
        ("l1-far-away", 0, vec![word(5, BIT_LESS_ONE, 63)]),
        ("l1-over-its-own-tables", 0, vec![word(5, PARAM, 4096)]),
        ("name-of-the-backing-file-too-long", OVER, vec![half(2, true, PARAM, 1024)]),
        ("name-of-the-backing-file-far-away", OVER, vec![word(1, ALL_ONES, 0)]),
        ("name-of-the-backing-file-over-the-header", OVER, vec![word(1, PARAM, 20)]),
        ("encrypted", 0, vec![half(4, false, PARAM, 1)]),
        ("encrypted-by-nobody-knows-what", 0, vec![half(4, false, ALL_ONES, 0)]),
        ("version-0", 0, vec![half(0, false, ZERO, 0)]),
        ("table-in-the-header", 0, vec![word(L1, PARAM, 8)]),
        ("table-is-the-l1-table", 0, vec![word(L1, PARAM, 48)]),
        ("table-beyond-the-end", 0, vec![word(L1, BIT, 62)]),
        ("data-in-the-header", 0, vec![word(L2, PARAM, 16)]),
        ("data-in-the-header-of-512", OVER + 1, vec![word(L2, PARAM, 512), word(L2 + 1, PARAM, 1)]),
        ("data-in-its-own-table", 0, vec![word(L2, PARAM, 4096)]),
        ("data-twice", 0, vec![Record { code: damage::COPY, value: 0, place: L2, param: L2 + 1 }]),
        ("data-beyond-the-end", 0, vec![word(L2, BIT, 62)]),
        ("data-at-the-very-end", 0, vec![word(L2, 5, 0)]),
        ("data-all-ones", 0, vec![word(L2, ALL_ONES, 0)]),
        ("compressed-to-nothing", 0, vec![word(L2, BIT, 63)]),
        ("compressed-in-data", 0, vec![word(L2, 18, 0)]),
        ("compressed-at-the-end", PACKED, vec![word(L2 + 2, 14, 600), word(L2 + 3, 14, 600)]),
        ("compressed-damaged", PACKED, vec![word(L2 + 2, 14, 3), word(L2 + 3, 14, 40), word(L2 + 4, 15, 9)]),
        ("cut-in-the-header", 0, vec![length(PARAM, 47)]),
        ("cut-in-the-table", 0, vec![length(PARAM, 5000)]),
        ("cut-in-the-data", 0, vec![length(15, 100)]),
        ("sparse-and-long", 0, vec![length(BIT, 29)]),
        ("blktaps-table-in-the-wrong-order", BLKTAP, vec![byte(7, 7, 3)]),
        ("blktaps-table-elsewhere", BLKTAP, vec![word(5, PARAM, 4096)]),
    ]
}

/// Words of the header of qcow2, by number: 1 the place of the backing file's name, 2 its length and the size of clusters, 3
/// the disk's size, 4 encryption and entries of the L1 table, 5 its place, 6 the place of the refcount table, 7 its length and
/// the count of snapshots, 8 their place, 9 features without which nobody may read it, 12 the width of counts and the length of
/// the header, 13 the compression, 14 the first extension. From 20 on four words of the refcount table, eight of its first
/// block, then, if there are snapshots, eight of their table; then the L1 table's, each with those of its L2 table.
fn qcow2() -> Vec<Shape> {
    const OVER: u8 = 4;
    const OLD: u8 = 8;
    const EXTENDED: u8 = 24;
    const SNAPSHOT: u8 = 128;
    const COUNTS: u16 = 20;
    const BLOCK: u16 = 24;
    const SNAPSHOTS: u16 = 32;
    const L1: u16 = 32;
    const L2: u16 = 33;
    vec![
        ("sound", 0, vec![]),
        ("sound-of-512-over-another", OVER + 1, vec![]),
        ("sound-of-version-2", OLD, vec![]),
        ("sound-with-extended-l2", EXTENDED, vec![]),
        ("sound-with-a-snapshot", SNAPSHOT, vec![]),
        ("sound-with-counts-of-one-bit", 32, vec![]),
        ("sound-with-counts-of-64-bits", 64, vec![]),
        // CVE-2014-0144: sizes of tables and clusters that nobody has looked at.
        ("cluster-bits-0", 0, vec![half(2, false, ZERO, 0)]),
        ("cluster-bits-22", 0, vec![half(2, false, PARAM, 22)]),
        ("cluster-bits-64", 0, vec![half(2, false, PARAM, 64)]),
        ("size-all-ones", 0, vec![word(3, ALL_ONES, 0)]),
        ("size-of-2-to-the-62", 0, vec![word(3, BIT, 62)]),
        ("size-0-with-clusters", 0, vec![word(3, ZERO, 0)]),
        // CVE-2014-0143: so many entries of the L1 table that their bytes wrap around.
        ("l1-entries-all-ones", 0, vec![half(4, false, ALL_ONES, 0)]),
        ("l1-entries-wrap-around", 0, vec![half(4, false, BIT, 29)]),
        ("l1-entries-0", 0, vec![half(4, false, ZERO, 0)]),
        ("l1-far-away", 0, vec![word(5, BIT, 62)]),
        ("l1-misaligned", 0, vec![word(5, 14, 8)]),
        ("l1-is-the-refcount-table", 0, vec![Record { code: damage::COPY, value: 0, place: 5, param: 6 }]),
        // CVE-2014-0147: counts in blocks that lie anywhere.
        ("refcount-table-far-away", 0, vec![word(6, BIT, 62)]),
        ("refcount-table-in-the-header", 0, vec![word(6, ZERO, 0)]),
        ("refcount-table-misaligned", 0, vec![word(6, 14, 512)]),
        ("refcount-table-of-2-to-the-31-clusters", 0, vec![half(7, true, BIT, 31)]),
        ("refcount-table-of-no-clusters", 0, vec![half(7, true, ZERO, 0)]),
        ("refcount-block-in-the-header", 0, vec![word(COUNTS, ZERO, 0)]),
        ("refcount-block-far-away", 0, vec![word(COUNTS, BIT, 62)]),
        ("refcount-block-misaligned", 0, vec![word(COUNTS, 14, 512)]),
        (
            "refcount-block-twice",
            0,
            vec![Record { code: damage::COPY, value: 0, place: COUNTS + 1, param: COUNTS }],
        ),
        (
            "refcount-block-is-the-l1-table",
            0,
            vec![Record { code: damage::COPY, value: 0, place: COUNTS, param: 5 }],
        ),
        ("counts-of-zero", 0, vec![word(BLOCK, ZERO, 0), word(BLOCK + 1, ZERO, 0), word(BLOCK + 2, ZERO, 0)]),
        ("counts-of-all-ones", 0, vec![word(BLOCK, ALL_ONES, 0), word(BLOCK + 1, ALL_ONES, 0)]),
        // CVE-2014-0145: snapshots of sizes that nobody has looked at.
        ("snapshots-all-ones", 0, vec![half(7, false, ALL_ONES, 0)]),
        ("snapshots-65537", 0, vec![half(7, false, PARAM, 65535), half(7, false, 14, 2)]),
        ("snapshots-in-the-header", 0, vec![half(7, false, PARAM, 3), word(8, ZERO, 0)]),
        ("snapshots-far-away", SNAPSHOT, vec![word(8, BIT, 62)]),
        ("snapshot-with-a-huge-l1-table", SNAPSHOT, vec![half(SNAPSHOTS + 1, true, ALL_ONES, 0)]),
        ("snapshot-with-an-l1-table-far-away", SNAPSHOT, vec![word(SNAPSHOTS, BIT, 62)]),
        ("snapshot-with-long-names", SNAPSHOT, vec![half(SNAPSHOTS + 1, false, ALL_ONES, 0)]),
        ("snapshot-with-much-more", SNAPSHOT, vec![half(SNAPSHOTS + 4, true, ALL_ONES, 0)]),
        // CVE-2024-4467, CVE-2024-32498: a data file, which must not be opened because an image says so.
        ("data-file", 0, vec![half(9, false, PARAM, 4)]),
        ("data-file-in-version-2", OLD, vec![half(9, false, PARAM, 4)]),
        ("features-nobody-knows", 0, vec![word(9, BIT, 40)]),
        ("dirty", 0, vec![half(9, false, PARAM, 1)]),
        ("corrupt", 0, vec![half(9, false, PARAM, 2)]),
        ("dirty-with-wrong-counts", 0, vec![half(9, false, PARAM, 1), word(BLOCK, ALL_ONES, 0)]),
        ("dirty-and-cut", 0, vec![half(9, false, PARAM, 1), length(15, 5000)]),
        ("extended-l2-that-is-none", 0, vec![half(9, false, PARAM, 16)]),
        ("extended-l2-of-small-clusters", 1, vec![half(9, false, PARAM, 16)]),
        ("encrypted-with-aes", 0, vec![half(4, true, PARAM, 1)]),
        ("encrypted-with-luks", 0, vec![half(4, true, PARAM, 2)]),
        ("encrypted-by-nobody-knows-what", 0, vec![half(4, true, ALL_ONES, 0)]),
        ("width-of-counts-7", 0, vec![half(12, true, PARAM, 7)]),
        ("width-of-counts-all-ones", 0, vec![half(12, true, ALL_ONES, 0)]),
        ("length-of-the-header-0", 0, vec![half(12, false, ZERO, 0)]),
        ("length-of-the-header-beyond-its-cluster", 0, vec![half(12, false, ALL_ONES, 0)]),
        ("compression-nobody-knows", 0, vec![byte(13, 0, 9)]),
        ("extension-of-all-ones", 0, vec![half(14, false, ALL_ONES, 0)]),
        ("extension-of-a-data-file", 0, vec![half(14, true, 0, 0), word(14, 19, 0x4441)]),
        ("name-of-the-backing-file-over-the-header", OVER, vec![word(1, PARAM, 8)]),
        ("name-of-the-backing-file-too-long", OVER, vec![half(2, true, PARAM, 1024)]),
        ("name-of-the-backing-file-far-away", OVER, vec![word(1, BIT, 62)]),
        ("table-beyond-the-end", 0, vec![word(L1, BIT, 50)]),
        ("table-misaligned", 0, vec![word(L1, 14, 512)]),
        ("table-in-the-header", 0, vec![word(L1, BIT, 63)]),
        (
            "table-is-the-refcount-table",
            0,
            vec![Record { code: damage::COPY, value: 0, place: L1, param: 6 }],
        ),
        ("data-in-the-header", 0, vec![word(L2, BIT, 63)]),
        ("data-in-the-refcount-table", 0, vec![Record { code: damage::COPY, value: 0, place: L2, param: 6 }]),
        ("data-in-its-own-table", 0, vec![Record { code: damage::COPY, value: 0, place: L2, param: L1 }]),
        ("data-twice", 0, vec![Record { code: damage::COPY, value: 0, place: L2, param: L2 + 1 }]),
        ("data-misaligned", 0, vec![word(L2, 14, 512)]),
        ("data-beyond-the-end", 0, vec![word(L2, BIT, 50)]),
        ("data-with-reserved-bits", 0, vec![word(L2, 16, 58)]),
        ("data-that-is-zero", 0, vec![word(L2, 16, 0)]),
        ("data-that-is-shared-and-is-not", 0, vec![word(L2, 16, 63)]),
        ("compressed-beyond-the-end", 0, vec![word(L2, 16, 62)]),
        ("compressed-all-ones", 0, vec![word(L2, 13, 62)]),
        ("subclusters-both-zero-and-there", EXTENDED, vec![word(L2 + 1, ALL_ONES, 0)]),
        ("subclusters-without-a-cluster", EXTENDED, vec![word(L2, ZERO, 0)]),
        ("cut-in-the-header", 0, vec![length(PARAM, 71)]),
        ("cut-behind-the-header", 0, vec![length(PARAM, 4096)]),
        ("cut-in-the-data", 0, vec![length(15, 100)]),
        // Of cloud-hypervisor: counts made anew for all that a small file says it has.
        (
            "dirty-and-said-to-be-huge",
            0,
            vec![half(9, false, PARAM, 1), word(3, BIT, 46), half(4, false, BIT, 20)],
        ),
        ("sparse-and-long", 0, vec![length(BIT, 29)]),
    ]
}

/// Words of VHD, by number: 2 and 11 the place of the second header, of the footer and of its copy; 6 and 15 the disk's size,
/// 7 and 16 its geometry and type, 8 and 17 the checksum. From 20 on the second header: 2 the place of the table, 3 the
/// version and how many entries it has, 4 the bytes of a block; from 28 on its first locator; from 35 on the table's.
fn vhd() -> Vec<Shape> {
    const OVER: u8 = 1;
    const FIXED: u8 = 2;
    const SMALL: u8 = 3;
    const COPY: u16 = 9;
    const SECOND: u16 = 20;
    const TABLE: u16 = 35;
    let both =
        |nth: u16, value: u8, param: u16| vec![word(nth, value, param), word(COPY + nth, value, param)];
    vec![
        ("sound", 0, vec![]),
        ("sound-of-small-blocks", SMALL, vec![]),
        ("sound-over-another", OVER, vec![]),
        ("sound-and-fixed", FIXED, vec![]),
        ("footer-gone", 0, vec![word(0, ZERO, 0)]),
        ("footer-of-a-fixed-disk-gone", FIXED, vec![word(0, ZERO, 0)]),
        ("copy-gone", 0, vec![word(COPY, ZERO, 0)]),
        ("footer-and-copy-gone", 0, both(0, ZERO, 0)),
        ("footer-and-copy-differ", 0, vec![word(6, PARAM, 512)]),
        ("footer-killed", 0, vec![length(14, 512)]),
        ("size-0", 0, both(6, ZERO, 0)),
        ("size-0-and-fixed", FIXED, vec![word(6, ZERO, 0)]),
        ("size-all-ones", 0, both(6, ALL_ONES, 0)),
        ("size-all-ones-and-fixed", FIXED, vec![word(6, ALL_ONES, 0)]),
        ("size-beyond-the-file-and-fixed", FIXED, vec![word(6, BIT, 40)]),
        ("size-beyond-the-table", 0, both(6, BIT, 40)),
        ("size-of-no-whole-sectors", 0, both(6, 14, 1)),
        ("geometry-0", 0, vec![half(7, true, ZERO, 0), half(COPY + 7, true, ZERO, 0)]),
        ("geometry-all-ones", 0, vec![half(7, true, ALL_ONES, 0), half(COPY + 7, true, ALL_ONES, 0)]),
        ("type-0", 0, vec![half(7, false, ZERO, 0), half(COPY + 7, false, ZERO, 0)]),
        ("type-all-ones", 0, vec![half(7, false, ALL_ONES, 0), half(COPY + 7, false, ALL_ONES, 0)]),
        // CA-344424 of blktap: a differencing image without one below it.
        ("differencing-without-a-parent", 0, vec![half(7, false, PARAM, 4), half(COPY + 7, false, PARAM, 4)]),
        ("dynamic-with-a-parent", OVER, vec![half(7, false, PARAM, 3), half(COPY + 7, false, PARAM, 3)]),
        ("fixed-with-a-table", 0, vec![half(7, false, PARAM, 2), half(COPY + 7, false, PARAM, 2)]),
        ("second-header-far-away", 0, both(2, BIT, 62)),
        ("second-header-in-the-footer", 0, both(2, ZERO, 0)),
        ("second-header-misaligned", 0, both(2, PARAM, 100)),
        ("second-header-of-all-ones", 0, both(2, ALL_ONES, 0)),
        ("second-header-gone", 0, vec![word(SECOND, ZERO, 0)]),
        // CVE-2014-0142: blocks of no bytes. CVE-2014-0144: of so many that a shift does not end.
        ("blocks-of-no-bytes", 0, vec![half(SECOND + 4, true, ZERO, 0)]),
        ("blocks-of-one-byte", 0, vec![half(SECOND + 4, true, 1, 0)]),
        ("blocks-of-a-sector", 0, vec![half(SECOND + 4, true, PARAM, 512)]),
        ("blocks-of-all-ones", 0, vec![half(SECOND + 4, true, ALL_ONES, 0)]),
        ("blocks-of-no-power-of-two", 0, vec![half(SECOND + 4, true, PARAM, 65000)]),
        ("table-of-no-entries", 0, vec![half(SECOND + 3, false, ZERO, 0)]),
        ("table-of-all-ones", 0, vec![half(SECOND + 3, false, ALL_ONES, 0)]),
        ("table-that-wraps-around", 0, vec![half(SECOND + 3, false, BIT, 30)]),
        ("table-far-away", 0, vec![word(SECOND + 2, BIT, 62)]),
        ("table-in-the-footer", 0, vec![word(SECOND + 2, ZERO, 0)]),
        ("table-in-the-second-header", 0, vec![word(SECOND + 2, PARAM, 512)]),
        ("table-misaligned", 0, vec![word(SECOND + 2, 14, 4)]),
        ("version-of-the-second-header", 0, vec![half(SECOND + 3, true, ALL_ONES, 0)]),
        // CA-347165 of blktap: entries that lead over the headers.
        ("block-in-the-footer", 0, vec![half(TABLE, true, ZERO, 0)]),
        ("block-in-the-second-header", 0, vec![half(TABLE, true, 1, 0)]),
        ("block-in-the-table", 0, vec![half(TABLE, true, PARAM, 3)]),
        ("block-beyond-the-end", 0, vec![half(TABLE, true, BIT, 30)]),
        ("block-at-the-very-end", 0, vec![half(TABLE, true, 3, 0)]),
        ("block-twice", 0, vec![Record { code: damage::COPY, value: 0, place: TABLE, param: TABLE + 1 }]),
        ("blocks-that-overlap", 0, vec![half(TABLE, false, 14, 1)]),
        ("locator-far-away", OVER, vec![word(28 + 2, BIT, 62)]),
        ("locator-of-all-ones", OVER, vec![half(28 + 1, true, ALL_ONES, 0), half(28, false, ALL_ONES, 0)]),
        ("locator-in-the-table", OVER, vec![word(28 + 2, PARAM, 1536)]),
        ("cut-in-the-footer", 0, vec![length(15, 100)]),
        ("cut-of-a-byte", 0, vec![length(15, 1)]),
        ("cut-before-the-footer", 0, vec![length(15, 512)]),
        ("cut-in-a-block", 0, vec![length(15, 40_000)]),
        ("cut-in-the-table-itself", 0, vec![length(PARAM, 1600)]),
        ("cut-of-nearly-all", 0, vec![length(PARAM, 511)]),
        ("sparse-and-long", 0, vec![length(BIT, 29)]),
    ]
}
