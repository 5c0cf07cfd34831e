//! What becomes of requests, from their bytes alone: limits, ends, stale fields, for both word lengths.

use ::xen::grants::{GrantRef, Piece};
use block::Span;

use super::super::device::Offered;
use super::super::layout::{Abi, Raw};
use super::super::request::{Terms, Verdict, indirect as table_pieces, judge, memory};
use super::super::status::Status;
use super::front::{self, Seg};

const ABIS: [Abi; 3] = [Abi::Native, Abi::X86_64, Abi::X86_32];
const MIB: u64 = 1 << 20;
const ERROR: Verdict = Verdict::Answer(Status::Error);
const UNSUPPORTED: Verdict = Verdict::Answer(Status::Unsupported);

fn terms() -> Terms {
    let offered = Offered { flush_cache: true, barrier: true, discard: true, indirect: 256, block: 512 };
    Terms { capacity: MIB, read_only: false, offered }
}

fn raw(abi: Abi, bytes: &[u8]) -> Raw {
    let mut raw = Raw { bytes: [0; 112], layout: abi.layout() };
    raw.bytes[..bytes.len()].copy_from_slice(bytes);
    raw
}

fn verdict(abi: Abi, bytes: &[u8], terms: &Terms) -> (Verdict, Vec<Piece>) {
    let mut pieces = vec![Piece { gref: GrantRef(99), offset: 9, len: 9 }];
    let verdict = judge(&raw(abi, bytes), &[], terms, &mut pieces);
    (verdict, pieces)
}

fn span(at: u64, len: u64) -> Span {
    Span::new(at, len).unwrap()
}

fn seg(gref: u32, first: u8, last: u8) -> Seg {
    (GrantRef(gref), first, last)
}

#[test]
fn what_a_request_names_is_found_in_both_word_lengths() {
    for abi in ABIS {
        let bytes = front::request(abi, 0, 0x1234_5678_9abc_def0, 5, &[seg(7, 1, 7), seg(0x8765_4321, 0, 2)]);
        let raw = raw(abi, &bytes);
        assert_eq!((raw.id(), raw.operation(), raw.answered_operation()), (0x1234_5678_9abc_def0, 0, 0));
        let (found, pieces) = verdict(abi, &bytes, &terms());
        assert_eq!(found, Verdict::Read(span(5 * 512, 10 * 512)));
        let expected = [
            Piece { gref: GrantRef(7), offset: 512, len: 7 * 512 },
            Piece { gref: GrantRef(0x8765_4321), offset: 0, len: 3 * 512 },
        ];
        assert_eq!(pieces, expected);
        assert_eq!(memory(&raw, &terms()), 2 * 4096);
        let bytes = front::discard(abi, 8, 0, 16, 32);
        assert_eq!(verdict(abi, &bytes, &terms()).0, Verdict::Discard(span(16 * 512, 32 * 512)));
    }
}

#[test]
fn a_request_has_from_one_to_eleven_segments() {
    for abi in ABIS {
        let segs: Vec<Seg> = (0..11).map(|nth| seg(nth, 0, 7)).collect();
        for op in [0, 1, 2] {
            let mut bytes = front::request(abi, op, 1, 0, &segs);
            let (found, pieces) = verdict(abi, &bytes, &terms());
            let whole = span(0, 11 * 4096);
            let expected = match op {
                0 => Verdict::Read(whole),
                1 => Verdict::Write(whole),
                _ => Verdict::Barrier { write: Some(whole), in_order: true },
            };
            assert_eq!((found, pieces.len()), (expected, 11));
            for count in [12, 13, 32, 255] {
                bytes[1] = count;
                assert_eq!(verdict(abi, &bytes, &terms()), (ERROR, vec![]), "{count} segments of {op}");
                assert_eq!(memory(&raw(abi, &bytes), &terms()), 0);
            }
        }
        for op in [0, 1] {
            let bytes = front::request(abi, op, 1, 0, &[]);
            assert_eq!(verdict(abi, &bytes, &terms()).0, ERROR);
        }
    }
}

#[test]
fn sectors_of_a_segment_are_in_order_and_in_its_page() {
    for (first, last, is_good) in [
        (0, 0, true),
        (7, 7, true),
        (0, 7, true),
        (1, 0, false),
        (0, 8, false),
        (8, 8, false),
        (0, 255, false),
        (255, 255, false),
    ] {
        let bytes = front::request(Abi::X86_64, 1, 1, 0, &[seg(1, 0, 7), seg(2, first, last)]);
        let (found, pieces) = verdict(Abi::X86_64, &bytes, &terms());
        assert_eq!(found != ERROR, is_good, "{first}..={last}");
        assert_eq!(pieces.is_empty(), !is_good);
    }
}

#[test]
fn no_sector_lies_beyond_the_end() {
    let sectors = MIB / 512;
    for (sector, is_good) in [
        (0, true),
        (sectors - 8, true),
        (sectors - 7, false),
        (sectors, false),
        (u64::MAX, false),
        (u64::MAX / 512, false),
        (1 << 55, false),
    ] {
        for op in [0, 1, 2, 3] {
            let bytes = front::request(Abi::X86_32, op, 1, sector, &[seg(1, 0, 7)]);
            assert_eq!(verdict(Abi::X86_32, &bytes, &terms()).0 != ERROR, is_good, "{op} at {sector}");
        }
        let bytes = front::discard(Abi::X86_64, 1, 0, sector, 8);
        assert_eq!(verdict(Abi::X86_64, &bytes, &terms()).0 != ERROR, is_good, "a discard at {sector}");
    }
    for count in [sectors + 1, u64::MAX, 1 << 55, u64::MAX / 512] {
        let bytes = front::discard(Abi::X86_64, 1, 0, 0, count);
        assert_eq!(verdict(Abi::X86_64, &bytes, &terms()).0, ERROR, "{count} sectors");
    }
    // The disk's size at the moment is what counts.
    let bytes = front::request(Abi::X86_64, 1, 1, sectors, &[seg(1, 0, 7)]);
    let grown = Terms { capacity: 2 * MIB, ..terms() };
    assert_eq!(verdict(Abi::X86_64, &bytes, &grown).0, Verdict::Write(span(MIB, 4096)));
}

#[test]
fn parts_of_blocks_are_refused() {
    let mut terms = terms();
    terms.offered.block = 4096;
    for (sector, first, last, is_good) in
        [(0, 0, 7, true), (8, 0, 7, true), (1, 0, 7, false), (0, 0, 3, false), (4, 4, 7, false)]
    {
        let bytes = front::request(Abi::X86_64, 0, 1, sector, &[seg(1, first, last)]);
        assert_eq!(verdict(Abi::X86_64, &bytes, &terms).0 != ERROR, is_good, "{sector} {first} {last}");
    }
    // What is a block may lie in the guest's memory as it likes.
    let bytes = front::request(Abi::X86_64, 0, 1, 8, &[seg(1, 1, 7), seg(2, 0, 0)]);
    assert_eq!(verdict(Abi::X86_64, &bytes, &terms).0, Verdict::Read(span(4096, 4096)));
}

#[test]
fn an_empty_flush_or_barrier_has_a_sector_and_segments_that_mean_nothing() {
    for abi in ABIS {
        for (op, expected) in [(3, Verdict::Flush), (2, Verdict::Barrier { write: None, in_order: true })] {
            // As Linux sends it: the sector of no request, and the segments of an earlier one (XEN.md 6).
            let mut bytes = front::request(abi, op, 1, u64::MAX, &[seg(1, 9, 3)]);
            bytes[1] = 0;
            assert_eq!(verdict(abi, &bytes, &terms()), (expected, vec![]));
            let read_only = Terms { read_only: true, ..terms() };
            assert_eq!(verdict(abi, &bytes, &read_only).0, expected);
            // What was not offered is done all the same.
            let mut bare = terms();
            (bare.offered.flush_cache, bare.offered.barrier) = (false, false);
            assert_eq!(verdict(abi, &bytes, &bare).0, expected);
        }
    }
    let bytes = front::request(Abi::X86_64, 3, 1, 8, &[seg(1, 0, 7)]);
    let with_data = Verdict::Barrier { write: Some(span(4096, 4096)), in_order: false };
    assert_eq!(verdict(Abi::X86_64, &bytes, &terms()).0, with_data);
}

#[test]
fn a_read_only_disk_refuses_what_would_change_it() {
    let read_only = Terms { read_only: true, ..terms() };
    for op in [1, 2, 3] {
        let bytes = front::request(Abi::X86_64, op, 1, 0, &[seg(1, 0, 7)]);
        assert_eq!(verdict(Abi::X86_64, &bytes, &read_only).0, ERROR, "{op}");
    }
    let bytes = front::discard(Abi::X86_64, 1, 0, 0, 8);
    assert_eq!(verdict(Abi::X86_64, &bytes, &read_only).0, ERROR);
    let bytes = front::request(Abi::X86_64, 0, 1, 0, &[seg(1, 0, 7)]);
    assert_eq!(verdict(Abi::X86_64, &bytes, &read_only).0, Verdict::Read(span(0, 4096)));
}

#[test]
fn what_is_not_known_or_not_offered_is_unsupported() {
    for abi in ABIS {
        for op in (7..=255).chain([4]) {
            let bytes = front::request(abi, op, 1, 0, &[seg(1, 0, 7)]);
            assert_eq!(verdict(abi, &bytes, &terms()), (UNSUPPORTED, vec![]), "{op}");
            assert_eq!(raw(abi, &bytes).answered_operation(), op);
        }
        let bytes = front::discard(abi, 1, 1, 0, 8);
        assert_eq!(verdict(abi, &bytes, &terms()).0, UNSUPPORTED, "a secure discard");
        let mut bare = terms();
        (bare.offered.discard, bare.offered.indirect) = (false, 0);
        let bytes = front::discard(abi, 1, 0, 0, 8);
        assert_eq!(verdict(abi, &bytes, &bare).0, UNSUPPORTED);
        let bytes = front::indirect(abi, 1, 1, 0, 1, &[GrantRef(5)]);
        assert_eq!(verdict(abi, &bytes, &bare).0, UNSUPPORTED);
    }
}

#[test]
fn an_indirect_request_names_up_to_as_many_segments_as_were_offered() {
    let judged = |abi, op, count: u16, table: &[u8]| {
        let mut pieces = Vec::new();
        let raw = raw(abi, &front::indirect(abi, op, 1, 16, count, &[GrantRef(5), GrantRef(6)]));
        assert_eq!(raw.answered_operation(), op);
        let verdict = judge(&raw, table, &terms(), &mut pieces);
        (verdict, pieces.len(), memory(&raw, &terms()))
    };
    for abi in ABIS {
        let segs: Vec<Seg> = (0..256).map(|nth| seg(nth, 0, 7)).collect();
        let table = front::table(&segs);
        let whole = span(16 * 512, MIB - 16 * 512);
        let (count, bytes) = (254, 254 * 4096);
        assert_eq!(judged(abi, 0, count, &table[..254 * 8]), (Verdict::Read(whole), 254, bytes));
        assert_eq!(judged(abi, 1, count, &table[..254 * 8]), (Verdict::Write(whole), 254, bytes));
        assert_eq!(judged(abi, 1, 1, &table[..8]), (Verdict::Write(span(16 * 512, 4096)), 1, 4096));
        // The disk ends before.
        assert_eq!(judged(abi, 0, 256, &table).0, ERROR);
        assert_eq!(judged(abi, 0, 0, &[]), (ERROR, 0, 0));
        assert_eq!(judged(abi, 0, 257, &table), (ERROR, 0, 0));
        assert_eq!(judged(abi, 0, u16::MAX, &table), (ERROR, 0, 0));
        for op in [2, 3, 5, 6, 255] {
            assert_eq!(judged(abi, op, 1, &table[..8]).0, ERROR, "{op} within");
        }
        let bad = front::table(&[seg(1, 0, 7), seg(2, 3, 1)]);
        assert_eq!(judged(abi, 0, 2, &bad).0, ERROR);
        // A table that could not be had.
        assert_eq!(judged(abi, 0, 2, &[]).0, ERROR);
    }
}

#[test]
fn the_segments_of_an_indirect_request_are_where_it_says() {
    let pages: Vec<GrantRef> = (30..38).map(GrantRef).collect();
    let pieces = |count, offered| {
        let mut terms = terms();
        terms.offered.indirect = offered;
        let mut pieces = Vec::new();
        let bytes = front::indirect(Abi::X86_32, 0, 1, 0, count, &pages);
        table_pieces(&raw(Abi::X86_32, &bytes), &terms, &mut pieces);
        pieces.into_iter().map(|piece| (piece.gref.0, piece.offset, piece.len)).collect::<Vec<_>>()
    };
    assert_eq!(pieces(1, 256), [(30, 0, 8)]);
    assert_eq!(pieces(256, 256), [(30, 0, 2048)]);
    assert_eq!(pieces(257, 256), []);
    assert_eq!(pieces(513, 1024), [(30, 0, 4096), (31, 0, 8)]);
    assert_eq!(pieces(4096, 5000).len(), 8);
    assert_eq!(pieces(4097, 5000), [], "there are eight pages and no more");
    let mut none = vec![Piece { gref: GrantRef(1), offset: 0, len: 8 }];
    table_pieces(&raw(Abi::X86_64, &front::request(Abi::X86_64, 1, 1, 0, &[])), &terms(), &mut none);
    assert_eq!(none, []);
}
