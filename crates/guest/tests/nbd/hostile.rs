//! Clients that break the rules or that want too much: they get what the protocol demands or are dropped, and
//! nobody else notices.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use block::OpKind;
use guest::nbd::{Patience, Settings};

use crate::client::*;
use crate::disk::{Act, byte_at};
use crate::server::{Plan, Running};

fn pattern(at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(byte_at).collect()
}

/// Whether a client that keeps the rules is served.
fn somebody_else_is_served(server: &Running) {
    let mut client = Client::connect(&server.path(), Style::Structured);
    assert_eq!(client.get(READ, 0, 512, 512).bytes, pattern(512, 512));
}

/// Sends as much as the server takes, and hears what it says until it closes.
fn say(server: &Running, bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(server.path()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    match stream.write_all(bytes) {
        Ok(()) => {}
        Err(error) => assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)),
    }
    let mut heard = Vec::new();
    match stream.read_to_end(&mut heard) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "the server closes, not we"),
    }
    heard
}

#[test]
fn garbage_in_the_handshake_ends_the_connection() {
    let server = Plan::default().start();
    let greeting = b"NBDMAGICIHAVEOPT\0\x03";
    assert_eq!(say(&server, b"GET / HTTP/1.1\r\n\r\n"), greeting);
    assert_eq!(say(&server, b"\xff\xff\xff\xff"), greeting);
    assert_eq!(say(&server, b"\0\0\0\x03IHAVEOPX\0\0\0\x03\0\0\0\0"), greeting);
    assert_eq!(say(&server, b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"), greeting, "an option of 4 GiB");
    assert_eq!(say(&server, b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disc"), greeting, "an unknown export");
    somebody_else_is_served(&server);
}

#[test]
fn a_long_option_is_refused_and_the_next_one_understood() {
    let server = Plan::default().start();
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(option(7, &vec![0; 1 << 20]));
    bytes.extend(option(2, b""));
    let heard = say(&server, &bytes);
    assert_eq!(heard[18 + 12..18 + 16], 0x8000_0009_u32.to_be_bytes(), "TOO_BIG");
    assert_eq!(heard[heard.len() - 12..], *b"\0\0\0\x02\0\0\0\x01\0\0\0\0"[..12].as_ref(), "ABORT, ACK");
}

#[test]
fn a_flood_of_options_ends_the_connection() {
    let server = Plan::default().start();
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    for _ in 0..2000 {
        bytes.extend(option(3, b""));
    }
    let heard = say(&server, &bytes);
    assert!(heard.len() < 1100 * 100, "{} bytes", heard.len());
    somebody_else_is_served(&server);
}

#[test]
fn a_bad_magic_in_transmission_ends_the_connection() {
    let server = Plan::default().start();
    for style in STYLES {
        for magic in [0_u32, 0x25609514, if style == Style::Extended { 0x25609513 } else { 0x21e41c71 }] {
            let mut client = Client::connect(&server.path(), style);
            let mut bytes = header(style, READ, 0, 1, 0, 512);
            bytes[..4].copy_from_slice(&magic.to_be_bytes());
            client.send(&bytes);
            client.end();
        }
    }
    assert_eq!(server.seen(), []);
    somebody_else_is_served(&server);
}

#[test]
fn requests_outside_of_the_disk_are_refused_and_the_stream_stays_in_step() {
    let server = Plan::default().start();
    let size = 1 << 20;
    for style in STYLES {
        let mut client = Client::connect(&server.path(), style);
        for (at, len) in [(size, 1), (size - 1, 2), (u64::MAX, 1), (u64::MAX - 4095, 4096), (1 << 63, 512)] {
            for (command, error) in
                [(READ, 22), (TRIM, 22), (CACHE, 22), (BLOCK_STATUS, 22), (WRITE_ZEROES, 28)]
            {
                let answer = client.get(command, 0, at, len);
                assert_eq!((answer.error, answer.bytes.len()), (error, 0), "{command} {at} {len}");
            }
            assert_eq!(client.put(at, &vec![9; len as usize]), 28, "write {at} {len}");
        }
        assert_eq!(server.seen(), [], "the disk has not heard of it");
        assert_eq!(client.get(READ, 0, size - 512, 512).bytes, pattern(size - 512, 512));
        server.forget();
    }
}

#[test]
fn unknown_commands_and_flags_are_refused_and_the_stream_stays_in_step() {
    let server = Plan::default().start();
    for style in STYLES {
        let mut client = Client::connect(&server.path(), style);
        for command in [8, 9, 100, 0xffff] {
            assert_eq!(client.get(command, 0, 0, 512).error, 22);
        }
        for bit in 6..16 {
            assert_eq!(client.get(READ, 1 << bit, 0, 512).error, 22);
        }
        let mut bytes = write(style, 5, 0, &[1; 700]);
        bytes[4] = 0x80; // an unknown flag on a write, with its payload
        client.send(&bytes);
        assert_eq!(client.answer().error, 22);
        assert_eq!(client.get(READ, 0, 0, 512).bytes, pattern(0, 512));
    }
    assert!(server.seen().iter().all(|seen| seen.kind == OpKind::Read));
}

#[test]
fn payloads_where_there_should_be_none_are_skipped() {
    let server = Plan::default().start();
    let mut client = Client::connect(&server.path(), Style::Extended);
    for command in [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 77] {
        client.send(&header(Style::Extended, command, PAYLOAD_LEN, 1, 0, 300_000));
        client.send(&vec![0xee; 300_000]);
        assert_eq!(client.answer().error, 22, "{command}");
    }
    assert_eq!(server.seen(), []);
    assert_eq!(client.get(READ, 0, 0, 512).bytes, pattern(0, 512));
    client.send(&header(Style::Extended, TRIM, PAYLOAD_LEN, 1, 0, u64::MAX));
    client.end();
}

#[test]
fn writes_that_are_too_long_are_refused_or_end_the_connection() {
    let server = Plan { size: 80 << 20, ..Plan::default() }.start();
    let mut client = Client::connect(&server.path(), Style::Structured);
    assert_eq!(client.put(0, &vec![3; (32 << 20) + 1]), 22);
    assert_eq!(client.get(READ, 0, 0, 512).bytes, pattern(0, 512));
    client.send(&header(Style::Structured, WRITE, 0, 1, 0, 65 << 20));
    client.end();
    assert!(server.seen().iter().all(|seen| seen.kind == OpKind::Read));
}

#[test]
fn a_read_only_disk_is_not_written_to() {
    let server = Plan { read_only: true, ..Plan::default() }.start();
    for style in STYLES {
        let mut client = Client::connect(&server.path(), style);
        assert_eq!(client.put(0, &[1; 5000]), 1);
        assert_eq!(client.get(TRIM, 0, 0, 512).error, 1);
        assert_eq!(client.get(WRITE_ZEROES, FUA, 0, 512).error, 1);
        assert_eq!(client.get(READ, 0, 0, 512).bytes, pattern(0, 512));
        assert_eq!(client.get(FLUSH, 0, 0, 0).error, 0);
    }
    assert!(server.seen().iter().all(|seen| matches!(seen.kind, OpKind::Read | OpKind::Flush)));
}

#[test]
fn a_connection_may_end_at_every_byte_and_half_a_write_is_never_written() {
    let server = Plan::default().start();
    let payload = [0x77; 600];
    for style in STYLES {
        let before = handshake(style, style != Style::Simple);
        let message = [before.clone(), write(style, 1, 4096, &payload)].concat();
        for half in [true, false] {
            for cut in 0..=message.len() {
                let mut stream =
                    if cut % 2 == 0 { server.pair() } else { UnixStream::connect(server.path()).unwrap() };
                stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                stream.write_all(&message[..cut]).unwrap();
                if !half {
                    drop(stream);
                    continue;
                }
                stream.shutdown(Shutdown::Write).unwrap();
                let mut heard = Vec::new();
                stream.read_to_end(&mut heard).unwrap();
                let seen = server.seen();
                if cut < message.len() {
                    assert_eq!(seen, [], "cut at {cut}");
                } else {
                    assert_eq!(seen.len(), 1);
                    assert_eq!(
                        heard[heard.len() - if style == Style::Simple { 8 } else { 12 }..][..8].len(),
                        8
                    );
                    assert!(heard.windows(8).any(|window| window == 1_u64.to_be_bytes()), "it is answered");
                    server.forget();
                }
            }
        }
        server.until("all connections end", |stats| stats.connections == 0);
        // Of those that were closed at once only the whole message may have been written.
        assert!(server.seen().len() <= 1);
        server.forget();
    }
    somebody_else_is_served(&server);
}

#[test]
fn one_byte_at_a_time_is_served_like_any_other() {
    let server = Plan::default().start();
    for style in STYLES {
        let mut stream = server.pair();
        let mut message = handshake(style, style != Style::Simple);
        message.extend(write(style, 1, 4096, &[0x55; 300]));
        message.extend(header(style, DISC, 0, 2, 0, 0));
        for byte in message {
            stream.write_all(&[byte]).unwrap();
        }
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).unwrap();
        assert!(heard.windows(8).any(|window| window == 1_u64.to_be_bytes()));
        assert_eq!(Client::connect(&server.path(), style).get(READ, 0, 4096, 300).bytes, [0x55; 300]);
    }
}

#[test]
fn hundreds_of_idle_connections_keep_nobody_from_working() {
    let server = Plan::default().start();
    let silent: Vec<_> = (0..250).map(|_| UnixStream::connect(server.path()).unwrap()).collect();
    let idle: Vec<_> = (0..250).map(|nth| Client::connect(&server.path(), STYLES[nth % 3])).collect();
    let mut client = Client::connect(&server.path(), Style::Simple);
    for nth in 0..1000 {
        let at = nth * 512;
        assert_eq!(client.put(at, &[nth as u8; 512]), 0);
        assert_eq!(client.get(READ, 0, at, 512).bytes, [nth as u8; 512]);
    }
    assert_eq!(server.stats().connections, 501);
    drop(silent);
    for mut client in idle {
        assert_eq!(client.get(READ, 0, 512 * 1023, 512).bytes, pattern(512 * 1023, 512));
    }
}

/// Asks for as many gigabytes as fit the socket, and reads none of them.
fn greedy(server: &Running, style: Style) -> Client {
    let mut client = Client::connect(&server.path(), style);
    client.stream.set_nonblocking(true).unwrap();
    let mut bytes = Vec::new();
    for cookie in 0..200 {
        bytes.extend(header(style, READ, 0, cookie, 0, 32 << 20));
    }
    match client.stream.write(&bytes) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
    }
    client.stream.set_nonblocking(false).unwrap();
    client
}

/// Bytes of memory that this process uses.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn readers_that_never_read_are_bounded_and_others_go_on() {
    let memory = 96 << 20;
    let settings = Settings { memory, ..Settings::default() };
    let server = Plan { size: 33 << 20, settings, ..Plan::default() }.start();
    somebody_else_is_served(&server);
    let before = resident();
    let greedy: Vec<_> = (0..40).map(|nth| greedy(&server, STYLES[nth % 3])).collect();
    server.until("they have taken what they get", |stats| stats.memory >= 64 << 20);
    let mut client = Client::connect(&server.path(), Style::Structured);
    for nth in 0..500 {
        let at = nth * 4096;
        assert_eq!(client.put(at, &[nth as u8; 4096]), 0);
        assert_eq!(client.get(READ, 0, at, 4096).bytes, [nth as u8; 4096]);
        assert!(server.stats().memory <= memory);
    }
    assert_eq!(client.get(READ, 0, 0, 128 << 10).bytes.len(), 128 << 10);
    let grown = resident().saturating_sub(before);
    assert!(grown < memory + (64 << 20), "{} MiB", grown >> 20);
    drop(greedy);
    server.until("all is given back", |stats| stats.memory == 0);
}

#[test]
fn a_client_that_holds_memory_and_does_not_move_is_dropped_when_others_wait() {
    let patience = Patience {
        pace: Duration::from_millis(300),
        round: Duration::from_millis(50),
        ..Patience::default()
    };
    let settings = Settings { memory: 64 << 20, patience, ..Settings::default() };
    let server = Plan { size: 33 << 20, settings, ..Plan::default() }.start();
    let _reader = greedy(&server, Style::Structured);
    server.until("it holds memory", |stats| stats.memory > 0);
    // Another announces a long write, and never sends it.
    let mut writer = Client::connect(&server.path(), Style::Simple);
    writer.send(&header(Style::Simple, WRITE, 0, 1, 0, 12 << 20));
    server.until("both hold memory", |stats| stats.memory >= 40 << 20);
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(server.stats().connections, 2, "nobody waits, nobody is dropped");
    let start = Instant::now();
    let mut client = Client::connect(&server.path(), Style::Structured);
    assert!(client.get(READ, 0, 0, 32 << 20).bytes == pattern(0, 32 << 20));
    assert!(start.elapsed() < Duration::from_secs(10));
    server.until("one at least is gone", |stats| stats.connections < 3);
}

#[test]
fn no_more_requests_are_taken_than_the_limit_says() {
    let server = Plan::scripted(|_, _| Act::Stick).start();
    let mut client = Client::connect(&server.path(), Style::Structured);
    let bytes: Vec<u8> =
        (0..1000).flat_map(|cookie| header(Style::Structured, READ, 0, cookie, 0, 512)).collect();
    client.send(&bytes);
    for batch in 1..=7 {
        server.until("as many as may be", |stats| stats.unanswered == 128);
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(server.seen().len(), batch * 128);
        server.release();
        for _ in 0..128 {
            assert_eq!(client.answer().bytes.len(), 512);
        }
    }
    server.until("the rest", |stats| stats.unanswered == 1000 - 7 * 128);
    server.release();
}

#[test]
fn ten_thousand_disconnects_with_requests_in_flight_leave_nothing_behind() {
    let server = Plan::scripted(|nth, _| match nth % 4 {
        0 => Act::Do,
        turn => Act::Late(turn as u64 * 300),
    })
    .start();
    let mut open = VecDeque::new();
    for nth in 0..10_000_u64 {
        let style = STYLES[nth as usize % 3];
        let mut message = handshake(style, false);
        message.extend(header(style, READ, 0, 1, 0, 4096));
        message.extend(write(style, 2, 8192, &[nth as u8; 512]));
        message.extend(header(style, FLUSH, 0, 3, 0, 0));
        message.extend(header(style, READ, 0, 4, 512, 100_000));
        let cut = message.len() - (nth % 50) as usize;
        let mut stream = server.pair();
        stream.write_all(&message[..cut]).unwrap();
        open.push_back(stream);
        if nth % 16 == 0 {
            // Some leave in the handshake, some in the middle of a request, some with answers on their way.
            open.drain(..open.len().saturating_sub((nth / 16 % 64) as usize));
            server.until("it is not left behind", |stats| stats.connections < 100);
        }
    }
    drop(open);
    server.until("all connections end", |stats| stats.connections == 0);
    assert_eq!(server.stats().memory, 0);
    assert!(server.seen().len() > 1000, "some got that far: {}", server.seen().len());
    somebody_else_is_served(&server);
}
