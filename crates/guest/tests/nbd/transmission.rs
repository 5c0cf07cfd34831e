//! Every command, in each style of reply.

use block::{Errno, OpKind};

use crate::client::*;
use crate::disk::{Act, Seen, byte_at};
use crate::server::Plan;

fn pattern(at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(byte_at).collect()
}

#[test]
fn what_is_written_is_read_in_every_style() {
    let server = Plan::default().start();
    for (turn, style) in STYLES.into_iter().enumerate() {
        let mut client = Client::connect(&server.path(), style);
        assert_eq!(client.get(READ, 0, 100, 1000).bytes, pattern(100, 1000));
        // Aligned, in pieces of a block, across blocks, and the last byte.
        for (at, len) in [(8192, 4096), (513, 7), (4000, 9000), ((1 << 20) - 1, 1), (0, 1 << 18)] {
            let bytes: Vec<u8> = (0..len).map(|byte| (byte * 7 + turn) as u8).collect();
            assert_eq!(client.put(at, &bytes), 0);
            assert_eq!(client.get(READ, 0, at, len as u64).bytes, bytes, "{style:?} {at} {len}");
        }
        client.put(0, &pattern(0, 1 << 18));
        assert_eq!(client.put((1 << 20) - 1, &pattern((1 << 20) - 1, 1)), 0);
    }
}

#[test]
fn every_command_and_flag_reaches_the_disk() {
    let server = Plan::default().start();
    for style in STYLES {
        let before = server.seen().len();
        let mut client = Client::connect(&server.path(), style);
        assert_eq!(client.get(FLUSH, FUA, 0, 0).error, 0);
        assert_eq!(client.get(TRIM, FUA, 512, 1024).error, 0);
        assert_eq!(client.get(CACHE, FUA, 0, 1 << 20).error, 0);
        assert_eq!(client.get(WRITE_ZEROES, 0, 4096, 512).error, 0);
        assert_eq!(client.get(WRITE_ZEROES, FUA | NO_HOLE | FAST_ZERO, 4096, 1).error, 0);
        let seen = |kind, at, len, flags: &[bool]| Seen { kind, at, len, flags: flags.to_vec() };
        let expected = [
            seen(OpKind::Flush, 0, 0, &[]),
            seen(OpKind::Discard, 512, 1024, &[true]),
            seen(OpKind::Prefetch, 0, 1 << 20, &[]),
            seen(OpKind::WriteZeroes, 4096, 512, &[false, true, false]),
            seen(OpKind::WriteZeroes, 4096, 1, &[true, false, true]),
        ];
        assert_eq!(server.seen()[before..], expected);
    }
}

#[test]
fn block_status_tells_holes() {
    let server = Plan::default().start();
    for style in [Style::Structured, Style::Extended] {
        let mut client = Client::connect(&server.path(), style);
        client.get(WRITE_ZEROES, 0, 1024, 2048);
        let extents = client.get(BLOCK_STATUS, 0, 512, 4096).extents;
        assert_eq!(extents, [(512, 0), (2048, 3), (1536, 0)]);
        assert_eq!(client.get(BLOCK_STATUS, REQ_ONE, 512, 4096).extents, [(512, 0)]);
        assert_eq!(client.get(BLOCK_STATUS, REQ_ONE, 1025, 100).extents, [(100, 3)]);
        assert_eq!(client.get(BLOCK_STATUS, 0, 1 << 20, 1).error, 22);
    }
    let mut client = Client::connect(&server.path(), Style::Simple);
    assert_eq!(client.get(BLOCK_STATUS, 0, 0, 4096).error, 22, "no context was selected");
}

#[test]
fn many_extents_are_told_up_to_a_limit() {
    let server = Plan { size: 8 << 20, ..Plan::default() }.start();
    for style in [Style::Structured, Style::Extended] {
        let mut client = Client::connect(&server.path(), style);
        for piece in (0..16384).step_by(2) {
            client.ask(WRITE_ZEROES, 0, piece, piece * 512, 512);
            assert_eq!(client.answer().error, 0);
        }
        let extents = client.get(BLOCK_STATUS, 0, 0, 8 << 20).extents;
        assert_eq!(extents.len(), 4000);
        assert!(
            extents
                .iter()
                .enumerate()
                .all(|(nth, extent)| *extent == (512, if nth % 2 == 0 { 3 } else { 0 }))
        );
    }
}

#[test]
fn a_failed_request_is_told_by_its_number_and_leaves_the_stream_in_step() {
    let errors = [
        (Errno::EIO, 5),
        (Errno::ENOSPC, 28),
        (Errno::EDQUOT, 28),
        (Errno::EFBIG, 28),
        (Errno::EROFS, 1),
        (Errno::ENOMEM, 5),
        (Errno::EBADMSG, 5),
        (Errno::EOPNOTSUPP, 22),
        (Errno::ESHUTDOWN, 108),
    ];
    for style in STYLES {
        let server =
            Plan::scripted(
                move |nth, _| {
                    if nth % 2 == 0 { Act::Fail(errors[nth / 2 % errors.len()].0) } else { Act::Do }
                },
            )
            .start();
        let mut client = Client::connect(&server.path(), style);
        for (errno, told) in errors {
            let answer = client.get(READ, 0, 0, 8192);
            assert_eq!((answer.error, answer.bytes.len()), (told, 0), "{errno}");
            assert_eq!(client.get(READ, 0, 77, 100).bytes, pattern(77, 100), "the next one is understood");
        }
        for (errno, told) in errors {
            assert_eq!(client.put(0, &[0; 512]), told, "{errno}");
            assert_eq!(client.get(FLUSH, 0, 0, 0).error, 0);
        }
    }
}

#[test]
fn fast_zero_that_is_not_fast_is_told_as_not_supported() {
    let server = Plan::scripted(|_, _| Act::Fail(Errno::EOPNOTSUPP)).start();
    for style in STYLES {
        let mut client = Client::connect(&server.path(), style);
        assert_eq!(client.get(WRITE_ZEROES, FAST_ZERO, 0, 512).error, 95);
        assert_eq!(client.get(WRITE_ZEROES, 0, 0, 512).error, 22);
    }
}

#[test]
fn a_request_that_the_disk_loses_is_answered_eio() {
    let server = Plan::scripted(|nth, _| if nth == 0 { Act::Lose } else { Act::Do }).start();
    let mut client = Client::connect(&server.path(), Style::Structured);
    assert_eq!(client.get(READ, DF, 0, 512).error, 5);
    assert_eq!(client.get(READ, DF, 0, 512).bytes, pattern(0, 512));
}

#[test]
fn answers_may_overtake_each_other_and_keep_their_cookies() {
    // The first of each eight is the slowest.
    let server = Plan::scripted(|nth, _| Act::Late(8_000 - 1_000 * (nth as u64 % 8))).start();
    for style in STYLES {
        let mut client = Client::connect(&server.path(), style);
        for nth in 0..64 {
            client.ask(READ, 0, nth, nth * 512, 512);
        }
        let mut cookies: Vec<u64> = (0..64)
            .map(|_| {
                let answer = client.answer();
                assert_eq!(answer.bytes, pattern(answer.cookie * 512, 512));
                answer.cookie
            })
            .collect();
        assert_ne!(cookies, (0..64).collect::<Vec<_>>());
        cookies.sort_unstable();
        assert_eq!(cookies, (0..64).collect::<Vec<_>>());
    }
}

#[test]
fn duplicate_cookies_are_echoed() {
    let server = Plan::scripted(|_, _| Act::Late(500)).start();
    for style in STYLES {
        let mut client = Client::connect(&server.path(), style);
        for _ in 0..50 {
            client.ask(READ, 0, 7, 4096, 512);
        }
        for _ in 0..50 {
            let answer = client.answer();
            assert_eq!((answer.cookie, answer.bytes), (7, pattern(4096, 512)));
        }
    }
}

#[test]
fn many_requests_in_one_piece_are_all_answered() {
    let server = Plan::default().start();
    for style in STYLES {
        let mut client = Client::connect(&server.path(), style);
        let mut bytes = Vec::new();
        for nth in 0..300_u64 {
            bytes.extend(write(style, nth, nth * 1000, &[nth as u8; 1000]));
        }
        let mut sending = client.stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || std::io::Write::write_all(&mut sending, &bytes).unwrap());
        let mut cookies: Vec<_> = (0..300).map(|_| client.answer().cookie).collect();
        sender.join().unwrap();
        cookies.sort_unstable();
        assert_eq!(cookies, (0..300).collect::<Vec<_>>());
        for nth in [0, 1, 150, 299] {
            assert_eq!(client.get(READ, 0, nth * 1000, 1000).bytes, [nth as u8; 1000]);
        }
    }
}

#[test]
fn payloads_of_every_size_arrive_whole() {
    let server = Plan { size: 40 << 20, ..Plan::default() }.start();
    for style in STYLES {
        let mut client = Client::connect(&server.path(), style);
        let sizes = [1, 511, 4095, 4096, 4097, 8164, 8192, 65536, 131_071, 131_072, 1 << 20, 32 << 20];
        let sizes = if style == Style::Structured { &sizes[..] } else { &sizes[..11] };
        for (nth, &len) in sizes.iter().enumerate() {
            let bytes: Vec<u8> = (0..len).map(|at| (at ^ (at >> 8) ^ nth) as u8).collect();
            // Something small behind it, which may come along with its end.
            let mut sending = client.stream.try_clone().unwrap();
            let mut message = write(style, 1, 3, &bytes);
            message.extend(write(style, 2, 36 << 20, &[nth as u8; 600]));
            let sender =
                std::thread::spawn(move || std::io::Write::write_all(&mut sending, &message).unwrap());
            assert_eq!((client.answer().error, client.answer().error), (0, 0));
            sender.join().unwrap();
            assert!(client.get(READ, 0, 3, len as u64).bytes == bytes, "{style:?} {len}");
            assert_eq!(client.get(READ, 0, 36 << 20, 600).bytes, [nth as u8; 600]);
        }
    }
}

#[test]
fn reads_of_the_greatest_length_are_one_piece() {
    let server = Plan { size: 33 << 20, ..Plan::default() }.start();
    let expected = pattern(17, 32 << 20);
    for style in STYLES {
        let mut client = Client::connect(&server.path(), style);
        let flags = if style == Style::Simple { 0 } else { DF };
        assert!(client.get(READ, flags, 17, 32 << 20).bytes == expected);
        let too_long = client.get(READ, flags, 0, (32 << 20) + 1);
        assert_eq!(too_long.error, if style == Style::Simple { 22 } else { 75 });
    }
}

#[test]
fn requests_for_no_byte_are_answered() {
    let server = Plan::default().start();
    for style in STYLES {
        let mut client = Client::connect(&server.path(), style);
        for command in [READ, TRIM, CACHE, WRITE_ZEROES] {
            let answer = client.get(command, 0, 512, 0);
            assert_eq!((answer.error, answer.bytes.len()), (0, 0), "{command}");
        }
        assert_eq!(client.put(512, b""), 0);
        assert_eq!(client.get(READ, 0, 0, 512).bytes, pattern(0, 512));
        assert_eq!(server.seen().last().unwrap().kind, OpKind::Read);
    }
}
