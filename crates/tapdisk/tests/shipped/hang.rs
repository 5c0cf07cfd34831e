//! Storage that hangs or is slow: who waits, who does not, and how the server ends meanwhile.

use std::time::{Duration, Instant};

use nbd_client::{Errno, Request, Style};
use rustix::process::Signal;

use crate::server::{Ask, LONG, STYLES, Server, mount, pattern, rule, stored, wait_until};

#[test]
fn a_request_that_hangs_holds_up_no_other_and_is_answered_once_when_it_is_released() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &[]);
    for style in STYLES {
        let (mut client, mut other) = (server.client(style), server.client(style));
        assert_eq!(client.write(0, &pattern(0, 65536, 1)), Ok(()));
        rule(&fs, "read:hang:0..4096:once");
        rule(&fs, "write:hang:4096..8192:once");
        let slow_read = client.send(&Request::read(0, 4096)).unwrap();
        let slow_write = client.send(&Request::write(4096, &[9; 4096])).unwrap();
        assert!(fs.wait_hanging(2, LONG));
        for client in [&mut client, &mut other] {
            assert_eq!(client.read(16384, 4096), Ok(pattern(16384, 4096, 1)));
            assert_eq!(client.write(32768, &[4; 4096]), Ok(()));
        }
        assert_eq!(client.open(), 2, "what hangs is not answered");
        assert_eq!(fs.release(), 2);
        assert_eq!(client.wait(slow_read).unwrap().unwrap().bytes, *pattern(0, 4096, 1));
        assert!(client.wait(slow_write).unwrap().is_ok());
        assert_eq!(stored(&fs, 4096, 4096).0, [9; 4096]);
        // A second answer to either would be an error of this client here.
        assert_eq!(client.flush(), Ok(()));
        fs.clear();
    }
    assert!(server.stop().status.success());
}

#[test]
fn an_error_after_a_long_time_is_still_an_error() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &[]);
    let mut client = server.client(Style::Structured);
    rule(&fs, "read+write:hang:EIO");
    let read = client.send(&Request::read(0, 4096)).unwrap();
    let write = client.send(&Request::write(8192, &[1; 4096])).unwrap();
    assert!(fs.wait_hanging(2, LONG));
    fs.release();
    assert_eq!(client.wait(read).unwrap(), Err(Errno::IO));
    assert_eq!(client.wait(write).unwrap(), Err(Errno::IO));
}

#[test]
fn told_to_stop_it_waits_for_storage_that_hangs_and_then_answers() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &[]);
    let mut client = server.client(Style::Simple);
    rule(&fs, "write:hang:once");
    let write = client.send(&Request::write(0, &pattern(0, 4096, 1))).unwrap();
    assert!(fs.wait_hanging(1, LONG));
    let syncs = crate::server::syncs(&fs);
    server.signal(Signal::TERM);
    server.wait_for_log("told to stop");
    wait_until("it takes no more clients", || {
        nbd_client::Client::connect(&server.socket(), Style::Simple).is_err()
    });
    assert!(server.is_running());
    assert_eq!(fs.release(), 1);
    assert!(client.wait(write).unwrap().is_ok());
    assert!(client.ask(&Request::read(0, 512)).is_err(), "nothing more is taken");
    assert!(server.ended().status.success());
    assert!(crate::server::syncs(&fs) > syncs, "and what was answered is durable");
}

#[test]
fn a_second_signal_ends_it_at_once_although_storage_hangs() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &[]);
    let mut client = server.client(Style::Simple);
    rule(&fs, "read:hang");
    client.send(&Request::read(0, 4096)).unwrap();
    assert!(fs.wait_hanging(1, LONG));
    server.signal(Signal::TERM);
    server.wait_for_log("told to stop");
    server.signal(Signal::INT);
    server.wait_for_log("told to stop a second time");
    // The kernel keeps a process until its requests are done: that is not ours to change.
    fs.clear();
    fs.release();
    assert_eq!(server.ended().status.code(), Some(130));
}

#[test]
fn slow_requests_are_slow_together_and_not_one_after_the_other() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &[]);
    let mut client = server.client(Style::Structured);
    assert_eq!(client.write(0, &pattern(0, 65536, 1)), Ok(()));
    rule(&fs, "read+write:delay=400");
    let requests: Vec<_> = (0..16)
        .map(|number| {
            if number % 2 == 0 {
                Request::read(number * 4096, 4096)
            } else {
                Request::write(number * 4096, &[1; 4096])
            }
        })
        .collect();
    let started = Instant::now();
    for answer in client.all(&requests) {
        assert!(answer.is_ok());
    }
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(400), "{took:?}");
    assert!(took < Duration::from_millis(16 * 400 / 2), "{took:?}");
}
