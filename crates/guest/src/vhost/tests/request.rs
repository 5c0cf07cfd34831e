//! What requests come to, by virtio 1.2, section 5.2.6.

use block::{Errno, Op};

use super::super::queue::Taken;
use super::desk::{DATA, Desk, HEADER, Outcome, RING, STATUS, TABLE, WAYS};
use super::driver::header;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const REFUSED: Outcome = Outcome::Answered(1, 1);
const UNSUPPORTED: Outcome = Outcome::Answered(2, 1);

fn asked(what: &str) -> Outcome {
    Outcome::Asked(vec![what.into()])
}

#[test]
fn reads_and_writes_go_to_the_disk() {
    let mut desk = Desk::new();
    assert_eq!(desk.request(IN, 3, 0, 4096), asked("read at 1536 into [4096]"));
    assert_eq!(desk.request(OUT, 3, 4096, 0), asked("write at 1536 from [4096]"));
    desk.terms.durable = true;
    assert_eq!(desk.request(OUT, 3, 512, 0), asked("write at 1536 from [512] durably"));
    assert_eq!(desk.request(IN, 3, 0, 512), asked("read at 1536 into [512]"));
}

#[test]
fn the_length_used_counts_what_was_written_for_the_driver() {
    let mut desk = Desk::new();
    for (kind, to_read, to_write, result, status, len) in [
        (IN, 0, 1024, Ok(()), 0, 1025),
        (IN, 0, 1024, Err(Errno::EIO), 1, 1),
        (OUT, 1024, 0, Ok(()), 0, 1),
        (OUT, 1024, 0, Err(Errno::ENOSPC), 1, 1),
        (IN, 0, 1024, Ok(()), 0, 1025),
        (DISCARD, 16, 0, Ok(()), 0, 1),
        (FLUSH, 0, 0, Ok(()), 0, 1),
        (FLUSH, 0, 0, Err(Errno::EOPNOTSUPP), 1, 1),
    ] {
        assert!(matches!(desk.request(kind, 0, to_read, to_write), Outcome::Asked(_)));
        let head = desk.head;
        desk.answer(head, result);
        assert!(desk.driver.take_used().is_empty(), "nothing is used before it is published");
        assert!(desk.queue.publish());
        assert_eq!(desk.driver.take_used(), [(head, len)]);
        assert_eq!(desk.ram.read(STATUS, 1), [status]);
    }
}

#[test]
fn what_is_not_on_the_disk_is_refused() {
    let mut desk = Desk::new();
    desk.terms.capacity = 1 << 16; // 128 sectors
    for (kind, to_read, to_write) in [(IN, 0, 1024), (OUT, 1024, 0)] {
        assert!(matches!(desk.request(kind, 126, to_read, to_write), Outcome::Asked(_)));
        for sector in [127, 128, 1 << 40, 1 << 55, (1 << 55) - 1, u64::MAX, u64::MAX / 512, 1 << 63] {
            assert_eq!(desk.request(kind, sector, to_read, to_write), REFUSED, "sector {sector}");
        }
    }
}

#[test]
fn the_disk_may_have_grown() {
    let mut desk = Desk::new();
    desk.terms.capacity = 512;
    assert_eq!(desk.request(IN, 1, 0, 512), REFUSED);
    desk.terms.capacity = 1024;
    assert_eq!(desk.request(IN, 1, 0, 512), asked("read at 512 into [512]"));
}

#[test]
fn pieces_of_blocks_are_refused() {
    let mut desk = Desk::new();
    for len in [1, 511, 513, 4095] {
        assert_eq!(desk.request(IN, 0, 0, len), REFUSED);
        assert_eq!(desk.request(OUT, 0, len, 0), REFUSED);
    }
    desk.terms.block = 4096;
    assert_eq!(desk.request(IN, 8, 0, 4096), asked("read at 4096 into [4096]"));
    for (sector, len) in [(8, 512), (1, 4096), (7, 8192), (0, 4096 + 512)] {
        assert_eq!(desk.request(IN, sector, 0, len), REFUSED);
        assert_eq!(desk.request(OUT, sector, len, 0), REFUSED);
    }
}

#[test]
fn a_disk_that_cannot_be_written_refuses_that_whatever_the_guest_took_notice_of() {
    let mut desk = Desk::new();
    desk.terms.read_only = true;
    desk.ram.write(DATA, &range(0, 8, 0));
    assert_eq!(desk.request(OUT, 0, 512, 0), REFUSED);
    assert_eq!(desk.request(DISCARD, 0, 16, 0), REFUSED);
    assert_eq!(desk.request(WRITE_ZEROES, 0, 16, 0), REFUSED);
    assert_eq!(desk.request(FLUSH, 0, 0, 0), asked("flush"));
    assert!(matches!(desk.request(IN, 0, 0, 512), Outcome::Asked(_)));
}

#[test]
fn no_request_is_longer_than_the_longest() {
    // 126 segments of 1 MiB. There is less memory than that, so the same bytes are named again and again.
    let mut desk = Desk::new();
    desk.terms.capacity = 1 << 40;
    desk.ram.write(HEADER, &header(IN, 0));
    let segments = |last: u32| {
        let mut parts = vec![(HEADER, 16, false)];
        parts.extend([(0, 0x80000, true); 251]);
        parts.extend([(0, 0x80000 - 512, true), (0, last, true), (STATUS, 1, true)]);
        parts
    };
    let head = desk.driver.indirect(TABLE, &segments(512));
    assert!(matches!(desk.offer(head), Ok(Outcome::Asked(_))));
    let head = desk.driver.indirect(TABLE, &segments(1024));
    assert_eq!(desk.offer(head), Ok(REFUSED));
    let head =
        desk.driver.indirect(TABLE, &[(HEADER, 16, false), (0, u32::MAX - 511, true), (STATUS, 1, true)]);
    assert_eq!(desk.offer(head), Ok(REFUSED));
}

#[test]
fn a_disk_is_flushed_whatever_was_negotiated() {
    let mut desk = Desk::new();
    desk.terms.features = 0;
    assert_eq!(desk.request(FLUSH, 0, 0, 0), asked("flush"));
    // "sector ... unused", and some drivers leave something there.
    assert_eq!(desk.request(FLUSH, u64::MAX, 0, 0), asked("flush"));
}

#[test]
fn the_serial_number_is_told() {
    let mut desk = Desk::new();
    assert_eq!(desk.request(GET_ID, 0, 0, 20), Outcome::Answered(0, 21));
    assert_eq!(desk.ram.read(DATA, 20), b"a serial number 1234");
    desk.ram.write(DATA, &[0; 32]);
    assert_eq!(desk.request(GET_ID, 0, 0, 5), Outcome::Answered(0, 6));
    assert_eq!(desk.ram.read(DATA, 6), b"a ser\0");
    desk.ram.write(DATA, &[0; 32]);
    assert_eq!(desk.request(GET_ID, 0, 0, 32), Outcome::Answered(0, 21));
    assert_eq!(desk.ram.read(DATA, 21), b"a serial number 1234\0");
    assert_eq!(desk.request(GET_ID, 0, 0, 0), Outcome::Answered(0, 1));
}

#[test]
fn unknown_types_are_unsupported() {
    let mut desk = Desk::new();
    // SCSI, lifetime, secure erase, zones, and the obsolete flag of barriers.
    for kind in [2, 3, 5, 9, 10, 12, 14, 15, 16, 26, 1 << 31, u32::MAX] {
        assert_eq!(desk.request(kind, 0, 512, 512), UNSUPPORTED, "type {kind}");
    }
    desk.terms.features = 0;
    desk.ram.write(DATA, &range(0, 8, 0));
    assert_eq!(desk.request(DISCARD, 0, 16, 0), UNSUPPORTED, "not negotiated");
    assert_eq!(desk.request(WRITE_ZEROES, 0, 16, 0), UNSUPPORTED, "not negotiated");
}

/// `struct virtio_blk_discard_write_zeroes`.
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let mut desk = Desk::new();
    desk.ram.write(DATA, &range(8, 16, 0));
    assert_eq!(desk.request(DISCARD, 0, 16, 0), asked("discard 4096+8192"));
    assert_eq!(desk.request(WRITE_ZEROES, 0, 16, 0), asked("zero 4096+8192"));
    desk.ram.write(DATA, &range(8, 16, 1));
    assert_eq!(desk.request(WRITE_ZEROES, 0, 16, 0), asked("zero 4096+8192 unmap"));
    desk.terms.durable = true;
    assert_eq!(desk.request(WRITE_ZEROES, 0, 16, 0), asked("zero 4096+8192 unmap durably"));
    desk.ram.write(DATA, &[range(1, 2, 0), range(3, 4, 0)].concat());
    let both = Outcome::Asked(vec!["discard 512+1024 durably".into(), "discard 1536+2048 durably".into()]);
    assert_eq!(desk.request(DISCARD, 0, 32, 0), both);
}

#[test]
fn flags_of_ranges_that_are_not_known_are_unsupported() {
    let mut desk = Desk::new();
    for flags in [1, 2, 3, 1 << 31, u32::MAX] {
        desk.ram.write(DATA, &range(8, 16, flags));
        assert_eq!(desk.request(DISCARD, 0, 16, 0), UNSUPPORTED, "discard with {flags:#x}");
        if flags != 1 {
            assert_eq!(desk.request(WRITE_ZEROES, 0, 16, 0), UNSUPPORTED, "zeroes with {flags:#x}");
        }
    }
    // Nothing of a request is done if some of it is not supported.
    desk.ram.write(DATA, &[range(1, 2, 0), range(3, 4, 2)].concat());
    assert_eq!(desk.request(WRITE_ZEROES, 0, 32, 0), UNSUPPORTED);
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    let mut desk = Desk::new();
    desk.terms.capacity = 1 << 40;
    for kind in [DISCARD, WRITE_ZEROES] {
        for bad in
            [range(u64::MAX, 8, 0), range(1 << 31, 1, 0), range((1 << 31) - 1, 2, 0), range(1 << 55, 8, 0)]
        {
            desk.ram.write(DATA, &[range(0, 8, 0), bad].concat());
            assert_eq!(desk.request(kind, 0, 32, 0), REFUSED);
        }
        for len in [1, 15, 17, 24, 16 * 17] {
            desk.ram.write(DATA, &range(0, 8, 0).repeat(17));
            assert_eq!(desk.request(kind, 0, len, 0), REFUSED, "{len} bytes");
        }
        assert_eq!(desk.request(kind, 0, 0, 0), REFUSED, "no range");
        assert!(matches!(desk.request(kind, 0, 16 * 16, 0), Outcome::Asked(ops) if ops.len() == 16));
    }
    // What the configuration space tells as the longest.
    desk.ram.write(DATA, &range(0, 1 << 22, 0));
    assert!(matches!(desk.request(DISCARD, 0, 16, 0), Outcome::Asked(_)));
    assert_eq!(desk.request(WRITE_ZEROES, 0, 16, 0), REFUSED);
    desk.ram.write(DATA, &range(0, (1 << 22) + 1, 0));
    assert_eq!(desk.request(DISCARD, 0, 16, 0), REFUSED);
    desk.ram.write(DATA, &range(0, 1 << 19, 0));
    assert!(matches!(desk.request(WRITE_ZEROES, 0, 16, 0), Outcome::Asked(_)));
    desk.terms.block = 4096;
    desk.ram.write(DATA, &range(8, 9, 0));
    assert_eq!(desk.request(DISCARD, 0, 16, 0), REFUSED, "no whole blocks");
}

#[test]
fn several_ranges_have_one_answer_which_is_the_worst() {
    for (results, status) in [
        ([Ok(()), Ok(()), Ok(())], 0),
        ([Err(Errno::EOPNOTSUPP), Ok(()), Ok(())], 2),
        ([Err(Errno::EOPNOTSUPP), Err(Errno::EIO), Ok(())], 1),
        ([Err(Errno::EIO), Ok(()), Err(Errno::EOPNOTSUPP)], 1),
    ] {
        let mut desk = Desk::new();
        desk.ram.write(DATA, &range(8, 8, 0).repeat(3));
        desk.request(DISCARD, 0, 48, 0);
        for result in results {
            desk.queue.publish();
            assert!(desk.driver.take_used().is_empty(), "answered before its last part");
            desk.answer(desk.head, result);
        }
        desk.queue.publish();
        assert_eq!(desk.driver.take_used(), [(desk.head, 1)]);
        assert_eq!(desk.ram.read(STATUS, 1), [status]);
    }
}

#[test]
fn a_request_may_be_cut_into_pieces_anywhere() {
    let mut desk = Desk::with(WAYS, 32, 0, None);
    desk.ram.write(HEADER, &header(OUT, 5));
    desk.ram.write(DATA, &(0..=255).cycle().take(1024).collect::<Vec<u8>>());
    // Header and data in one; a header byte by byte; an end of the header with the data.
    let whole = [(HEADER, 16, false), (DATA, 1024, false), (STATUS, 1, true)];
    assert_eq!(desk.ask(&whole), Ok(asked("write at 2560 from [1024]")));
    let split = [
        (HEADER, 1, false),
        (HEADER + 1, 0, false),
        (HEADER + 1, 14, false),
        (HEADER + 15, 1, false),
        (DATA, 512, false),
        (DATA + 512, 512, false),
        (STATUS, 1, true),
    ];
    assert_eq!(desk.ask(&split), Ok(asked("write at 2560 from [1024]")));
    desk.ram.write(DATA - 4, &header(OUT, 5)[12..]);
    let joined = [(HEADER, 12, false), (DATA - 4, 4 + 1024, false), (STATUS, 1, true)];
    assert_eq!(desk.ask(&joined), Ok(asked("write at 2560 from [1024]")));
    // A status at the end of the data that is read.
    desk.ram.write(HEADER, &header(IN, 5));
    let last = [(HEADER, 16, false), (STATUS - 1024, 1025, true)];
    assert_eq!(desk.ask(&last), Ok(asked("read at 2560 into [1024]")));
    assert_eq!(desk.ask(&[last[0], last[1], (DATA, 0, true)]), Ok(asked("read at 2560 into [1024]")));
}

#[test]
fn data_moves_between_the_disk_and_the_guests_own_memory() {
    let mut desk = Desk::new();
    desk.ram.write(HEADER, &header(OUT, 0));
    desk.ram.write(DATA, &[1; 512]);
    desk.ram.write(DATA + 4096, &[2; 512]);
    // Across two regions: two pieces.
    desk.ram.write(0x3fe00, &[[3; 512], [4; 512]].concat());
    let parts = [
        (HEADER, 16, false),
        (DATA + 4096, 512, false),
        (DATA, 512, false),
        (0x3fe00, 1024, false),
        (STATUS, 1, true),
    ];
    let head = desk.driver.chain(&parts);
    desk.driver.offer(head);
    let (_, op) = desk.take_request();
    let Op::Write { buf, .. } = &op else { panic!("{op:?}") };
    assert_eq!(buf.segments().len(), 4);
    assert_eq!(buf.to_vec(), [[2; 512], [1; 512], [3; 512], [4; 512]].concat());
    desk.ram.write(DATA, &[9; 512]);
    assert_eq!(buf.to_vec()[512..1024], [9; 512], "it is no copy");
}

#[test]
fn data_outside_of_the_memory_is_refused_and_the_ring_goes_on() {
    let mut desk = Desk::new();
    let places = [
        (0x80000, 512, "a hole"),
        (0x7fe00 + 1, 512, "the end of a region"),
        (0xfff00, 512, "before a region"),
        (u64::MAX - 511, 512, "the end of all addresses"),
        (u64::MAX - 10, 512, "around the end of all addresses"),
        (0x10fe00, 1024, "behind the last region"),
    ];
    for (at, len, where_) in places {
        desk.ram.write(HEADER, &header(IN, 0));
        let parts = [(HEADER, 16, false), (at, len, true), (STATUS, 1, true)];
        assert_eq!(desk.ask(&parts), Ok(REFUSED), "{where_}");
        desk.ram.write(HEADER, &header(OUT, 0));
        let parts = [(HEADER, 16, false), (at, len, false), (STATUS, 1, true)];
        assert_eq!(desk.ask(&parts), Ok(REFUSED), "{where_}");
    }
    assert!(matches!(desk.request(IN, 0, 0, 512), Outcome::Asked(_)));
}

#[test]
fn who_cannot_be_told_stops_the_ring() {
    let hole = 0x90000;
    for (parts, expected) in [
        (vec![(HEADER, 16, false)], "a request without a byte for its status"),
        (vec![(HEADER, 16, false), (STATUS, 0, true)], "a request without a byte for its status"),
        (vec![(STATUS, 1, true)], "a request whose header has 0 bytes: 16 are expected"),
        (
            vec![(HEADER, 15, false), (STATUS, 1, true)],
            "a request whose header has 15 bytes: 16 are expected",
        ),
        (
            vec![(hole, 16, false), (STATUS, 1, true)],
            "a header: 16 bytes at 0x90000 are not all in the memory",
        ),
        (
            vec![(HEADER, 16, false), (hole, 1, true)],
            "a status: 1 bytes at 0x90000 are not all in the memory",
        ),
        (vec![(HEADER, 16, false), (u64::MAX, 2, true)], "a status: 2 bytes at 0xffffffffffffffff"),
        (
            vec![(HEADER, 16, false), (STATUS, 1, true), (DATA, 512, false)],
            "a descriptor to read from behind",
        ),
    ] {
        let mut desk = Desk::new();
        let error = desk.ask(&parts).unwrap_err();
        assert!(error.to_string().starts_with(expected), "{error}");
    }
}

#[test]
fn what_is_read_changes_no_more_than_the_copy_that_was_judged() {
    // The header is in the memory of the ring: taking it apart twice would see two requests.
    let mut desk = Desk::new();
    desk.ram.write(HEADER, &header(OUT, 0));
    let head = desk.driver.chain(&[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)]);
    desk.driver.offer(head);
    let (_, op) = desk.take_request();
    desk.ram.write(HEADER, &header(IN, 1 << 40));
    desk.driver.put_descriptor(head, RING, 1 << 20, 7, 99);
    assert!(matches!(op, Op::Write { at: 0, ref buf, .. } if buf.len() == 512));
    desk.answer(head, Ok(()));
    desk.queue.publish();
    assert_eq!(desk.driver.take_used(), [(head, 1)]);
    assert!(matches!(desk.take(), Ok(Taken::Nothing)));
}
