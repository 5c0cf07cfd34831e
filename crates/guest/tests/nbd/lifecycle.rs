//! How connections begin and end, and how a server does.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::TryRecvError;
use std::time::{Duration, Instant};

use block::Errno;
use guest::nbd::{Patience, Settings};

use crate::client::*;
use crate::disk::{Act, Seen};
use crate::server::Plan;

fn impatient() -> Settings {
    let patience = Patience {
        handshake_pause: Duration::from_millis(200),
        handshake: Duration::from_millis(600),
        leave: Duration::from_millis(300),
        idle: Duration::from_millis(100),
        round: Duration::from_millis(20),
        ..Patience::default()
    };
    Settings { patience, ..Settings::default() }
}

#[test]
fn disc_is_not_answered_and_comes_after_what_is_in_flight() {
    let server = Plan::scripted(|_, _| Act::Late(20_000)).start();
    for style in STYLES {
        let mut client = Client::connect(&server.path(), style);
        client.ask(READ, 0, 1, 0, 512);
        client.write(2, 512, &[1; 512]);
        client.ask(DISC, 0, 3, 0, 0);
        client.ask(READ, 0, 4, 0, 512); // "MUST NOT send anything": not heard
        let mut cookies = [client.answer().cookie, client.answer().cookie];
        cookies.sort_unstable();
        assert_eq!(cookies, [1, 2]);
        client.end();
    }
    assert_eq!(server.seen().len(), 6);
}

#[test]
fn a_client_that_only_listens_on_hears_its_answers() {
    let server = Plan::scripted(|_, _| Act::Late(20_000)).start();
    for style in STYLES {
        let mut client = Client::connect(&server.path(), style);
        client.ask(READ, 0, 1, 0, 512);
        client.stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client.answer().bytes.len(), 512);
        client.end();
    }
}

#[test]
fn a_client_that_leaves_may_take_its_time_to_read() {
    let mut settings = impatient();
    // Long enough for a busy machine between two pieces.
    settings.patience.leave = Duration::from_secs(1);
    let server = Plan { size: 9 << 20, settings, ..Plan::default() }.start();
    for end in [true, false] {
        let mut client = Client::connect(&server.path(), Style::Structured);
        client.ask(READ, 0, 1, 0, 8 << 20);
        if end {
            client.ask(DISC, 0, 2, 0, 0);
        } else {
            client.stream.shutdown(Shutdown::Write).unwrap();
        }
        let start = Instant::now();
        for _ in 0..32 {
            std::thread::sleep(Duration::from_millis(50));
            client.take(256 << 10);
        }
        assert!(start.elapsed() > Duration::from_millis(1500), "longer than it may do nothing");
        client.take(20 + 8);
        client.end();
    }
}

#[test]
fn a_client_that_leaves_and_does_not_read_is_dropped() {
    let server = Plan { size: 9 << 20, settings: impatient(), ..Plan::default() }.start();
    let mut client = Client::connect(&server.path(), Style::Structured);
    client.ask(READ, 0, 1, 0, 8 << 20);
    client.ask(DISC, 0, 2, 0, 0);
    server.until("it is dropped", |stats| stats.connections == 0 && stats.memory == 0);
}

#[test]
fn requests_of_a_client_that_is_gone_finish_in_the_disk() {
    let server = Plan::scripted(|_, _| Act::Stick).start();
    let mut client = Client::connect(&server.path(), Style::Structured);
    for nth in 0..10 {
        client.write(nth, nth * 512, &[9; 512]);
    }
    server.until("the disk has them", |stats| stats.unanswered == 10);
    drop(client);
    std::thread::sleep(Duration::from_millis(50));
    let stats = server.stats();
    assert_eq!((stats.connections, stats.unanswered), (1, 10), "a connection counts while it uses the disk");
    assert!(stats.memory > 0);
    server.release();
    server.until("all is given back", |stats| stats.connections == 0 && stats.memory == 0);
    assert_eq!(server.stats().requests, 10);
}

#[test]
fn what_is_held_for_a_client_ends_with_it_and_nobody_elses() {
    for is_heard in [true, false] {
        let server = Plan::scripted(|nth, _| match nth % 3 {
            0 => Act::Stick,
            1 | 2 => Act::Hold(Errno::ENOSPC),
            3.. => unreachable!(),
        })
        .start();
        let mut other = Client::connect(&server.path(), Style::Structured);
        let mut client = Client::connect(&server.path(), Style::Structured);
        for nth in 0..3 {
            other.write(nth, nth * 512, &[1; 512]);
        }
        server.until("the disk has them", |stats| stats.unanswered == 3);
        for nth in 0..9 {
            client.write(nth, nth * 512, &[9; 512]);
        }
        server.until("the disk has them all", |stats| stats.unanswered == 12);
        client.stream.shutdown(if is_heard { Shutdown::Write } else { Shutdown::Both }).unwrap();
        server.until("what is held ends", |stats| stats.unanswered == 6);
        assert_eq!(server.stats().connections, 2, "and the rest is waited for");
        server.release();
        server.until("the client is gone", |stats| stats.connections == 1);
        if is_heard {
            let mut errors: Vec<_> = (0..9).map(|_| client.answer()).map(|a| (a.cookie, a.error)).collect();
            errors.sort_unstable();
            let expected: Vec<_> = (0..9).map(|nth| (nth, if nth % 3 == 0 { 0 } else { 28 })).collect();
            assert_eq!(errors, expected);
            client.end();
        }
        for _ in 0..3 {
            assert_eq!(other.answer().error, 0);
        }
    }
}

#[test]
fn what_is_held_ends_with_a_client_that_has_sent_more_than_is_taken() {
    for is_heard in [true, false] {
        let hold = Box::new(|_, _: &Seen| Act::Hold(Errno::ENOSPC));
        let server = Plan { script: hold, settings: impatient(), ..Plan::default() }.start();
        let mut client = Client::connect(&server.path(), Style::Structured);
        // In one piece: a socket's buffer has room for few small ones, and nobody takes the last of them.
        let writes: Vec<_> =
            (0..300).flat_map(|nth| write(client.style, nth, nth * 512, &[9; 512])).collect();
        client.send(&writes);
        // As many as one client may have out; the others wait in the socket, and the end behind them.
        server.until("it is full", |stats| stats.unanswered == 128);
        if is_heard {
            client.stream.shutdown(Shutdown::Write).unwrap();
            let mut cookies: Vec<_> = (0..300)
                .map(|_| client.answer())
                .map(|answer| {
                    assert_eq!(answer.error, 28);
                    answer.cookie
                })
                .collect();
            cookies.sort_unstable();
            assert_eq!(cookies, Vec::from_iter(0..300));
            client.end();
        } else {
            drop(client);
        }
        server.until("it is gone", |stats| stats.connections == 0 && stats.memory == 0);
    }
}

#[test]
fn what_is_held_ends_with_a_client_whose_payloads_take_all_memory() {
    let hold = Box::new(|_, _: &Seen| Act::Hold(Errno::ENOSPC));
    let settings = Settings { memory: 64 << 20, ..impatient() };
    let server = Plan { size: 33 << 20, script: hold, settings, ..Plan::default() }.start();
    let mut client = Client::connect(&server.path(), Style::Simple);
    client.write(0, 0, &vec![9; 32 << 20]);
    server.until("one is held", |stats| stats.unanswered == 1);
    // What it has no memory for is not received: sending comes to a halt.
    client.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let error = client.stream.write_all(&write(Style::Simple, 1, 0, &vec![9; 32 << 20])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    drop(client);
    server.until("it is gone", |stats| stats.connections == 0 && stats.memory == 0);
}

#[test]
fn a_silent_client_is_dropped_from_the_handshake() {
    let server = Plan { settings: impatient(), ..Plan::default() }.start();
    let start = Instant::now();
    let mut stream = UnixStream::connect(server.path()).unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
    assert!((Duration::from_millis(200)..Duration::from_secs(5)).contains(&start.elapsed()));
}

#[test]
fn a_client_that_takes_its_time_is_dropped_from_the_handshake() {
    let server = Plan { settings: impatient(), ..Plan::default() }.start();
    let start = Instant::now();
    let mut stream = UnixStream::connect(server.path()).unwrap();
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(option(7, &[0; 10_000]));
    let mut bytes = bytes.into_iter();
    while stream.write_all(&[bytes.next().unwrap()]).is_ok() {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!((Duration::from_millis(600)..Duration::from_secs(5)).contains(&start.elapsed()));
}

#[test]
fn an_idle_client_in_transmission_is_left_alone() {
    let server = Plan { settings: impatient(), ..Plan::default() }.start();
    let mut client = Client::connect(&server.path(), Style::Simple);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(client.get(READ, 0, 0, 512).error, 0);
    client.send(&header(Style::Simple, READ, 0, 1, 0, 512)[..13]);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(server.stats().connections, 1);
}

#[test]
fn a_busy_clients_buffer_is_taken_back_when_it_is_idle() {
    let server = Plan { settings: impatient(), ..Plan::default() }.start();
    let mut client = Client::connect(&server.path(), Style::Structured);
    for round in 0..5_u8 {
        let mut bytes = Vec::new();
        for nth in 0..50 {
            bytes.extend(write(Style::Structured, nth, nth * 4096, &[round; 4096]));
        }
        client.send(&bytes);
        for _ in 0..50 {
            assert_eq!(client.answer().error, 0);
        }
        assert!(server.stats().buffers > 0, "it has a large buffer while it is busy");
        server.until("it is taken back", |stats| stats.buffers == 0);
        assert_eq!(client.get(READ, 0, 49 * 4096, 4096).bytes, [round; 4096], "and nothing is lost");
    }
}

#[test]
fn whoever_is_one_too_many_is_sent_away() {
    let settings = Settings { connections_max: 3, ..Settings::default() };
    let server = Plan { settings, ..Plan::default() }.start();
    let mut clients: Vec<_> = (0..3).map(|_| Client::connect(&server.path(), Style::Simple)).collect();
    for _ in 0..10 {
        let mut stream = UnixStream::connect(server.path()).unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, b"");
    }
    clients.pop();
    server.until("there is room again", |stats| stats.connections == 2);
    assert_eq!(Client::connect(&server.path(), Style::Simple).get(READ, 0, 0, 512).error, 0);
}

#[test]
fn draining_answers_what_was_taken_and_closes_everything() {
    let server = Plan::scripted(|_, _| Act::Late(200_000)).start();
    let path = server.path();
    let mut clients: Vec<_> = STYLES.into_iter().map(|style| Client::connect(&path, style)).collect();
    let idle = Client::connect(&path, Style::Simple);
    let mut shy = UnixStream::connect(&path).unwrap();
    for client in &mut clients {
        for cookie in 0..5 {
            client.ask(READ, 0, cookie, 0, 4096);
        }
        client.send(&write(client.style, 9, 0, &[1; 4096])[..1000]); // a write that has not come whole
    }
    server.until("the disk has them", |stats| stats.unanswered == 15);
    server.start_to_drain();
    idle.end();
    shy.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(UnixStream::connect(&path).unwrap_err().kind(), ErrorKind::NotFound, "the socket is removed");
    for mut client in clients {
        for _ in 0..5 {
            let answer = client.answer();
            assert_eq!((answer.error, answer.bytes.len()), (0, 4096));
        }
        client.end();
    }
    server.drain();
}

#[test]
fn draining_does_not_wait_long_for_who_does_not_read() {
    let settings = impatient();
    let server = Plan { size: 33 << 20, settings, ..Plan::default() }.start();
    let mut client = Client::connect(&server.path(), Style::Structured);
    // Its time is counted from when it last took something, which may be long before we see that.
    let start = Instant::now();
    client.ask(READ, 0, 1, 0, 32 << 20);
    server.until("the answer is on its way", |stats| stats.memory > 0 && stats.unanswered == 0);
    server.drain();
    assert!((Duration::from_millis(250)..Duration::from_secs(5)).contains(&start.elapsed()));
}

#[test]
fn whatever_reached_the_disk_is_answered_over_tcp_too() {
    const LEN: usize = 64 << 10;
    let patience = Patience { leave: Duration::from_secs(2), ..impatient().patience };
    let settings = Settings { patience, ..Settings::default() };
    let server = Plan { settings, ..Plan::default() }.start();
    let mut client = server.tcp();
    client.write_all(&handshake(Style::Simple, false)).unwrap();
    client.read_exact(&mut [0; 18 + 20 + 12 + 20]).unwrap();
    let mut sending = client.try_clone().unwrap();
    // It goes on asking while the server closes: there is always something that the server has not read.
    let (heard, has_heard) = std::sync::mpsc::channel::<()>();
    let sender = std::thread::spawn(move || {
        let mut cookie = 0;
        while has_heard.try_recv() == Err(TryRecvError::Empty) {
            sending.write_all(&header(Style::Simple, READ, 0, cookie, 0, LEN as u64)).unwrap();
            cookie += 1;
        }
    });
    server.until("it is busy", |stats| stats.requests >= 100);
    server.start_to_drain();
    std::thread::sleep(Duration::from_millis(100));
    let mut answers = 0;
    let mut answer = vec![0; 16 + LEN];
    while client.read_exact(&mut answer).is_ok() {
        assert_eq!(answer[..8], *b"\x67\x44\x66\x98\0\0\0\0");
        answers += 1;
    }
    drop(heard);
    assert_eq!(server.seen().len(), answers);
    sender.join().unwrap();
}
