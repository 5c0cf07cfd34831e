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
