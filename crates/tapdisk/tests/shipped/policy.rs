//! What the operator wants done about errors: report, hold, or retry for some time.

use std::time::{Duration, Instant};

use nbd_client::{Client, Errno, Request, Style};
use rustix::process::Signal;

use crate::server::{
    Ask, Bytes, LONG, Server, durable, mount, pattern, rule, stored, syncs, wait_until, zeroes,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Sends writes of 64 KiB to the first megabyte and waits until the last of them is held.
fn fill_up(client: &mut Client, server: &Server<'_>, contents: &[Bytes]) -> Vec<u64> {
    let send = |(number, bytes): (usize, &Bytes)| {
        client.send(&Request::write(number as u64 * 64 * KIB, bytes)).unwrap()
    };
    let cookies = contents.iter().enumerate().map(send).collect();
    server.wait_for_log("requests that fail are held until the cause is gone");
    cookies
}

fn contents() -> Vec<Bytes> {
    (0..16).map(|number| pattern(number * 64 * KIB, 64 * KIB, 5)).collect()
}

#[test]
fn writes_that_find_the_disk_full_wait_for_space_and_all_else_goes_on() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &["--on-enospc", "hold"]);
    let mut client = server.client(Style::Structured);
    assert_eq!(client.write(4 * MIB, &pattern(0, 64 * KIB, 1)), Ok(()));
    fs.set_capacity(Some(64 * KIB + 256 * KIB));
    let contents = contents();
    let cookies = fill_up(&mut client, &server, &contents);
    let is_held = |server: &Server<'_>, count: &str| {
        server.signal(Signal::USR1);
        server.wait_for_log(count);
    };
    wait_until("at least one write is answered", || {
        assert_eq!(client.read(4 * MIB, 4096), Ok(pattern(0, 4096, 1)));
        client.open() < 16
    });
    for _ in 0..3 {
        assert_eq!(client.read(4 * MIB, 64 * KIB), Ok(pattern(0, 64 * KIB, 1)), "reads go on");
        assert_eq!(client.write(4 * MIB, &pattern(0, 64 * KIB, 2)), Ok(()), "what needs no space goes on");
        let before = syncs(&fs);
        assert_eq!(client.flush(), Ok(()), "flushes go on");
        assert!(syncs(&fs) > before);
        assert_eq!(client.write(4 * MIB, &pattern(0, 64 * KIB, 1)), Ok(()));
    }
    let (held, mut other) = (client.open(), server.client(Style::Simple));
    assert!(held >= 11, "{held} are held, all that have no space");
    assert_eq!(other.read(7 * MIB, 4096), Ok(zeroes(4096)), "other clients go on");
    is_held(&server, &format!("{held} held"));
    is_held(&server, "requests are held");
    is_held(&server, "not poisoned");
    assert!(server.stderr().contains("ENOSPC"), "{}", server.stderr());

    fs.set_capacity(None);
    let enlarged = Instant::now();
    for cookie in cookies {
        assert!(client.wait(cookie).unwrap().is_ok());
    }
    assert!(enlarged.elapsed() < Duration::from_secs(10), "{:?}", enlarged.elapsed());
    assert_eq!(client.flush(), Ok(()));
    for (number, bytes) in contents.iter().enumerate() {
        assert_eq!(durable(&fs, number as u64 * 64 * KIB, 64 * KIB), *bytes);
    }
    let ended = server.stop();
    assert!(ended.status.success());
    assert!(!ended.stderr.contains("request failed"), "{}", ended.stderr);
}

#[test]
fn told_to_stop_it_answers_what_is_held_with_its_error_and_says_so() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &["--on-error", "hold"]);
    let mut client = server.client(Style::Simple);
    fs.set_capacity(Some(256 * KIB));
    let contents = contents();
    let cookies = fill_up(&mut client, &server, &contents);
    wait_until("all that have no space are held", || {
        assert_eq!(client.read(4 * MIB, 512), Ok(zeroes(512)));
        client.open() <= 13
    });
    server.signal(Signal::TERM);
    let answers: Vec<_> = cookies.into_iter().map(|cookie| client.wait(cookie).unwrap()).collect();
    for (number, answer) in answers.iter().enumerate() {
        let at = number as u64 * 64 * KIB;
        match answer {
            Ok(_) => assert_eq!(stored(&fs, at, 64 * KIB), contents[number]),
            Err(errno) => assert_eq!(*errno, Errno::NOSPC),
        }
    }
    assert!(answers.iter().filter(|answer| answer.is_err()).count() >= 12);
    let ended = server.ended();
    assert!(ended.status.success(), "the last flush worked: {}", ended.stderr);
    assert!(ended.stderr.contains("held requests are answered with their error"), "{}", ended.stderr);
}

#[test]
fn what_is_held_for_a_client_that_is_gone_ends_and_nobody_elses() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &["--on-error", "hold"]);
    let mut stays = server.client(Style::Structured);
    let mut goes = server.client(Style::Structured);
    let struck = rule(&fs, "write:EIO");
    let kept = stays.send(&Request::write(0, &[1; 4096])).unwrap();
    goes.send(&Request::write(4096, &[2; 4096])).unwrap();
    wait_until("both are held", || fs.struck(struck) >= Some(2));
    drop(goes);
    server.wait_for_log("held requests are answered with their error, since whoever asked goes away");
    wait_until("one is left", || {
        server.signal(Signal::USR1);
        server.stderr().contains("2 accepted, 1 answered, 0 in flight, 1 held")
    });
    fs.clear();
    assert!(stays.wait(kept).unwrap().is_ok());
    assert_eq!((stored(&fs, 0, 4096).0, stored(&fs, 4096, 4096)), (vec![1; 4096], zeroes(4096)));
    assert!(server.stop().status.success());
}

#[test]
fn an_io_error_is_held_until_the_storage_is_well_again() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &["--on-error", "hold"]);
    let mut client = server.client(Style::Structured);
    assert_eq!(client.write(0, &pattern(0, 8192, 1)), Ok(()));
    rule(&fs, "read:EIO:0..4096");
    rule(&fs, "write:EIO:4096..8192");
    let read = client.send(&Request::read(0, 4096)).unwrap();
    let write = client.send(&Request::write(4096, &[8; 4096])).unwrap();
    server.wait_for_log("requests that fail are held until the cause is gone");
    assert_eq!(client.read(4096, 4096), Ok(pattern(4096, 4096, 1)), "what does not fail goes on");
    let before = fs.counters().struck;
    wait_until("it is tried again", || fs.counters().struck > before);
    assert_eq!(client.open(), 2);
    fs.clear();
    assert_eq!(client.wait(read).unwrap().unwrap().bytes, *pattern(0, 4096, 1));
    assert!(client.wait(write).unwrap().is_ok());
    assert_eq!(stored(&fs, 4096, 4096).0, [8; 4096]);
    assert!(server.stop().status.success());
}

#[test]
fn an_error_that_passes_within_the_time_of_a_retry_is_not_told() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &["--on-error", "retry:60"]);
    let mut client = server.client(Style::Simple);
    let struck = rule(&fs, "read+write:EIO:count=3");
    assert_eq!(client.read(0, 4096), Ok(zeroes(4096)));
    assert_eq!(fs.struck(struck), Some(3));
    rule(&fs, "write:EIO:count=3");
    assert_eq!(client.write(0, &[1; 4096]), Ok(()));
    let ended = server.stop();
    assert!(!ended.stderr.contains("request failed"), "{}", ended.stderr);
}

#[test]
fn an_error_that_outlasts_the_time_of_a_retry_is_told() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &["--on-error", "retry:1", "--on-enospc", "report"]);
    let mut client = server.client(Style::Simple);
    rule(&fs, "read:EIO");
    rule(&fs, "write:ENOSPC");
    let started = Instant::now();
    assert_eq!(client.write(0, &[1; 4096]), Err(Errno::NOSPC), "--on-enospc overrides --on-error");
    assert!(started.elapsed() < Duration::from_millis(900), "{:?}", started.elapsed());
    let started = Instant::now();
    assert_eq!(client.read(0, 4096), Err(Errno::IO));
    assert!(started.elapsed() >= Duration::from_secs(1), "{:?}", started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[test]
fn holding_for_lack_of_space_does_not_hold_other_errors() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &["--on-enospc", "hold"]);
    let mut client = server.client(Style::Simple);
    rule(&fs, "write:EIO:0..4096");
    rule(&fs, "write:EDQUOT:8192..12288");
    let held = client.send(&Request::write(8192, &[1; 4096])).unwrap();
    assert_eq!(client.write(0, &[1; 4096]), Err(Errno::IO));
    server.wait_for_log("EDQUOT");
    assert_eq!(client.open(), 1);
    fs.clear();
    assert!(client.wait(held).unwrap().is_ok());
}

#[test]
fn a_client_with_as_many_held_writes_as_it_may_have_starves_no_other() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &["--on-enospc", "hold", "--memory", "64M"]);
    let mut other = server.client(Style::Structured);
    assert_eq!(other.write(7 * MIB, &pattern(0, 64 * KIB, 1)), Ok(()));
    fs.set_capacity(Some(64 * KIB));
    // More than it may have in flight: the rest stays in the socket, which has room for it, until there is room here.
    let mut greedy = server.client(Style::Simple);
    let payload = pattern(0, KIB, 3);
    let cookies: Vec<u64> =
        (0..160).map(|number| greedy.send(&Request::write(number * 16 * KIB, &payload)).unwrap()).collect();
    server.wait_for_log("requests that fail are held until the cause is gone");
    for _ in 0..100 {
        assert_eq!(other.read(7 * MIB, 64 * KIB), Ok(pattern(0, 64 * KIB, 1)));
        assert_eq!(other.write(7 * MIB, &pattern(0, 64 * KIB, 1)), Ok(()));
    }
    assert_eq!(other.flush(), Ok(()));
    let mut third = server.client(Style::Simple);
    third.set_patience(LONG).unwrap();
    assert_eq!(third.read(7 * MIB, 512), Ok(pattern(0, 512, 1)), "a newcomer is served too");
    fs.set_capacity(None);
    for cookie in cookies {
        assert!(greedy.wait(cookie).unwrap().is_ok());
    }
    assert_eq!(stored(&fs, 159 * 16 * KIB, KIB), payload);
    assert!(server.stop().status.success());
}
