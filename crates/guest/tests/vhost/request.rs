//! Requests: every kind, in every shape that memory can have, and those that make no sense.

use block::{Errno, OpKind};
use vhost_client::{Driver, HEADER_LEN, Request, Status, UNMAP, UNWRITTEN, Wish, kind};

use crate::disk::{Act, byte_at};
use crate::serve::{Plan, Served};

const SIZE: u64 = 1 << 20;

fn connect(served: &Served) -> Driver {
    Driver::connect(&served.vhost(), &Wish::default()).unwrap()
}

fn fresh(at: u64, len: usize) -> Vec<u8> {
    (at..at + len as u64).map(byte_at).collect()
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 ^ (at / 512) as u8 ^ seed).collect()
}

#[test]
fn pieces_of_any_length_and_alignment_make_one_request() {
    let served = Plan::default().serve();
    for regions in [1, 3] {
        let mut driver = Driver::connect(&served.vhost(), &Wish { regions, ..Wish::default() }).unwrap();
        let cuts: [&[usize]; 7] = [
            &[],
            &[HEADER_LEN],
            &[1, 2, 4, 9, 1, 100, 411],
            &[HEADER_LEN + 512],
            &[HEADER_LEN, 1, 511, 1024],
            &[8, 8, 4096],
            &[HEADER_LEN, 513, 513, 513],
        ];
        for (seed, cuts) in cuts.into_iter().enumerate() {
            for (skew, indirect) in [(0, false), (1, false), (3, true), (0, true), (511, true)] {
                let shape = |request: Request| {
                    let request = request.skewed(skew);
                    if indirect { request.indirect() } else { request }
                };
                let how = format!("{cuts:?}, skewed by {skew}, indirect {indirect}, {regions} regions");
                let bytes = pattern(4096, seed as u8);
                let answer = driver.ask(&shape(Request::write(8192, &bytes).cut_out(cuts))).unwrap();
                assert_eq!((answer.status, answer.used), (Status::OK, 1), "{how}");
                let answer = driver.ask(&shape(Request::read(8192, 4096).cut_in(cuts))).unwrap();
                assert_eq!((answer.status, answer.used), (Status::OK, 4097), "{how}");
                assert!(answer.bytes == bytes, "{how}");
            }
        }
    }
}

#[test]
fn every_length_of_whole_sectors_up_to_the_longest_ring_is_read_and_written() {
    let served = Plan::default().serve();
    let mut driver = connect(&served);
    let segments: Vec<usize> = (0..125).map(|nth| 512 * (nth % 8 + 1)).collect();
    for count in [1, 2, 3, 7, 31, 64, 125] {
        let len: usize = segments[..count].iter().sum();
        let bytes = pattern(len, count as u8);
        let cuts: Vec<usize> = [HEADER_LEN].iter().chain(&segments[..count]).copied().collect();
        assert_eq!(driver.ask(&Request::write(512, &bytes).cut_out(&cuts)).unwrap().status, Status::OK);
        let answer = driver.ask(&Request::read(512, len).cut_in(&segments[..count])).unwrap();
        assert_eq!((answer.status, answer.used as usize), (Status::OK, len + 1));
        assert!(answer.bytes == bytes, "{count} segments");
    }
}

#[test]
fn a_long_request_is_one_request() {
    let served = Plan { size: 8 << 20, ..Plan::default() }.serve();
    let mut driver =
        Driver::connect(&served.vhost(), &Wish { region_len: 32 << 20, ..Wish::default() }).unwrap();
    for len in [1 << 20, 4 << 20, (8 << 20) - 512] {
        let bytes = pattern(len, 5);
        let cuts: Vec<usize> = [HEADER_LEN].into_iter().chain([1 << 20; 8]).collect();
        assert_eq!(driver.ask(&Request::write(512, &bytes).cut_out(&cuts)).unwrap().status, Status::OK);
        let answer = driver.ask(&Request::read(512, len).cut_in(&[1 << 20; 8])).unwrap();
        assert!(answer.status == Status::OK && answer.bytes == bytes, "{len} bytes");
    }
}

#[test]
fn a_length_that_is_not_of_whole_sectors_is_an_error() {
    let served = Plan::default().serve();
    let mut driver = connect(&served);
    for len in [0, 1, 511, 513, 4095] {
        let answer = driver.ask(&Request::write(0, &vec![1; len])).unwrap();
        let expected = if len == 0 { None } else { Some(Status::IOERR) };
        assert!(expected.is_none_or(|expected| answer.status == expected), "a write of {len}");
        let answer = driver.ask(&Request::read(0, len)).unwrap();
        assert!(expected.is_none_or(|expected| answer.status == expected), "a read of {len}");
        assert_eq!(answer.used, 1, "a read of {len}");
        assert_eq!(answer.bytes, vec![UNWRITTEN; len], "nothing else is written");
    }
    assert_eq!(driver.ask(&Request::read(0, 4096)).unwrap().bytes, fresh(0, 4096));
}

#[test]
fn at_the_end_of_the_disk_requests_end_with_it() {
    let served = Plan::default().serve();
    let mut driver = connect(&served);
    let last = SIZE - 512;
    assert_eq!(driver.ask(&Request::write(last, &[1; 512])).unwrap().status, Status::OK);
    assert_eq!(driver.ask(&Request::read(0, SIZE as usize)).unwrap().status, Status::OK);
    let asked = served.seen().len();
    let sectors = SIZE / 512;
    for (first, count) in
        [(sectors, 1), (sectors - 1, 2), (0, sectors + 1), (u64::MAX, 1), (u64::MAX / 512, 2), (1 << 55, 1)]
    {
        let len = count as usize * 512;
        for request in [
            Request::new(kind::IN, first, &[], len),
            Request::new(kind::OUT, first, &vec![1; len], 0),
            Request::segments(kind::DISCARD, &[(first, count as u32, 0)]),
            Request::segments(kind::WRITE_ZEROES, &[(first, count as u32, UNMAP)]),
        ] {
            let answer = driver.ask(&request).unwrap();
            assert_eq!((answer.status, answer.used), (Status::IOERR, 1), "{count} sectors from {first} on");
        }
    }
    assert_eq!(served.seen().len(), asked, "the disk is not asked");
}

#[test]
fn a_flush_needs_no_data_and_bears_some() {
    let served = Plan::default().serve();
    let mut driver = connect(&served);
    for request in [
        Request::flush(),
        Request::flush().indirect(),
        // The sector of a flush is zero, they say; what else it is harms nobody.
        Request::new(kind::FLUSH, 77, &[], 0),
    ] {
        let answer = driver.ask(&request).unwrap();
        assert_eq!((answer.status, answer.used), (Status::OK, 1));
    }
    assert_eq!(served.count(OpKind::Flush), 3);
}

#[test]
fn a_flush_that_fails_is_told() {
    let served = Plan::scripted(|nth, _| if nth == 1 { Act::Fail(Errno::EIO) } else { Act::Do }).serve();
    let mut driver = connect(&served);
    let told: Vec<_> = (0..3).map(|_| driver.ask(&Request::flush()).unwrap().status).collect();
    assert_eq!(told, [Status::OK, Status::IOERR, Status::OK]);
}

#[test]
fn what_is_not_known_is_unsupported() {
    let served = Plan::default().serve();
    let mut driver = connect(&served);
    for number in
        [2, 3, 5, 6, 7, 9, kind::GET_LIFETIME, 12, kind::SECURE_ERASE, 15, 100, 0x8000_0000, u32::MAX]
    {
        for (payload, room) in [(&[][..], 0), (&[0; 512][..], 0), (&[][..], 512)] {
            let answer = driver.ask(&Request::new(number, 0, payload, room)).unwrap();
            assert_eq!((answer.status, answer.used), (Status::UNSUPP, 1), "type {number}");
            assert_eq!(answer.bytes, vec![UNWRITTEN; room]);
        }
    }
    assert_eq!(served.seen(), []);
}

#[test]
fn what_was_not_agreed_on_is_unsupported() {
    use vhost_client::feature;
    let served = Plan::default().serve();
    let features = feature::LINUX & !feature::DISCARD & !feature::WRITE_ZEROES;
    let mut driver = Driver::connect(&served.vhost(), &Wish { features, ..Wish::default() }).unwrap();
    assert_eq!(driver.ask(&Request::discard(0, 512)).unwrap().status, Status::UNSUPP);
    assert_eq!(driver.ask(&Request::zeroes(0, 512, true)).unwrap().status, Status::UNSUPP);
    assert_eq!(served.seen(), []);
}

#[test]
fn zeroes_and_discards_may_have_several_ranges_and_all_are_done() {
    let served = Plan::default().serve();
    let mut driver = connect(&served);
    for number in [kind::WRITE_ZEROES, kind::DISCARD] {
        let ranges: Vec<_> = (0..16).map(|nth| (nth * 4 + u64::from(number) * 100, 2, 0)).collect();
        let answer = driver.ask(&Request::segments(number, &ranges)).unwrap();
        assert_eq!((answer.status, answer.used), (Status::OK, 1));
        for (sector, _, _) in ranges {
            let expected = [vec![0; 1024], fresh(sector * 512 + 1024, 1024)].concat();
            assert_eq!(driver.ask(&Request::read(sector * 512, 2048)).unwrap().bytes, expected);
        }
    }
}

#[test]
fn unmap_is_a_flag_of_zeroes_alone_and_all_other_flags_are_unsupported() {
    let served = Plan::default().serve();
    let mut driver = connect(&served);
    let mut ask = |number, flags| driver.ask(&Request::segments(number, &[(0, 1, flags)])).unwrap().status;
    for unmap in [0, UNMAP] {
        assert_eq!(ask(kind::WRITE_ZEROES, unmap), Status::OK);
    }
    let seen: Vec<bool> = served.seen().into_iter().map(|seen| seen.flags[1]).collect();
    assert_eq!(seen, [false, true], "whether space may be freed reaches the disk");
    for flags in [2, 3, 0x100, 0x8000_0000, u32::MAX] {
        assert_eq!(ask(kind::WRITE_ZEROES, flags), Status::UNSUPP, "{flags:#x}");
    }
    for flags in [UNMAP, 2, u32::MAX] {
        assert_eq!(ask(kind::DISCARD, flags), Status::UNSUPP, "{flags:#x}");
    }
    assert_eq!(served.seen().len(), 2);
}

#[test]
fn ranges_that_make_no_sense_do_nothing_at_all() {
    let served = Plan::default().serve();
    let mut driver = connect(&served);
    for number in [kind::WRITE_ZEROES, kind::DISCARD] {
        let config = driver.config().unwrap();
        let (segments, sectors) = match number {
            kind::DISCARD => (config.max_discard_seg(), config.max_discard_sectors()),
            _ => (config.max_write_zeroes_seg(), config.max_write_zeroes_sectors()),
        };
        let too_many = vec![(0, 1, 0); segments as usize + 1];
        let mut ask = |payload: &[u8]| driver.ask(&Request::new(number, 0, payload, 0)).unwrap().status;
        for payload in [&[][..], &[0; 1], &[0; 15], &[0; 17], &[0; 31]] {
            assert_eq!(ask(payload), Status::IOERR, "{} bytes of ranges", payload.len());
        }
        for ranges in [
            &too_many[..],
            &[(0, 1, 0), (SIZE / 512, 1, 0)], // the first is fine
            &[(0, sectors + 1, 0)],
            &[(0, u32::MAX, 0)],
            &[(u64::MAX, 1, 0)],
        ] {
            let answer = driver.ask(&Request::segments(number, ranges)).unwrap();
            assert_eq!(answer.status, Status::IOERR, "{} ranges, {:?}", ranges.len(), ranges[0]);
        }
    }
    assert_eq!(served.seen(), []);
}

#[test]
fn of_several_ranges_the_one_that_fails_fails_the_request() {
    let plan = Plan::scripted(|nth, _| match nth {
        0 => Act::Late(3000),
        1 => Act::Fail(Errno::ENOSPC),
        _ => Act::Do,
    });
    let served = plan.serve();
    let mut driver = connect(&served);
    let ranges: Vec<_> = (0..4).map(|nth| (nth * 8, 8, 0)).collect();
    let answer = driver.ask(&Request::segments(kind::WRITE_ZEROES, &ranges)).unwrap();
    assert_eq!((answer.status, answer.used), (Status::IOERR, 1));
    assert_eq!(served.seen().len(), 4);
    assert_eq!(
        driver.ask(&Request::read(0, 4096)).unwrap().bytes,
        vec![0; 4096],
        "and is over before it is told"
    );
}

#[test]
fn a_read_that_fails_writes_nothing_but_its_status() {
    let served = Plan::scripted(|_, _| Act::Fail(Errno::EIO)).serve();
    let mut driver = connect(&served);
    let answer = driver.ask(&Request::read(0, 4096)).unwrap();
    assert_eq!((answer.status, answer.used), (Status::IOERR, 1));
    assert_eq!(answer.bytes, vec![UNWRITTEN; 4096]);
}
