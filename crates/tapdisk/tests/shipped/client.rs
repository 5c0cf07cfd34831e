//! Many clients, and clients that take without giving: nobody else goes without.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nbd_client::{Request, Style};
use rustix::process::{Pid, Signal};

use crate::server::{Ask, LONG, Server, pattern, wait_until, zeroes};

const MIB: u64 = 1 << 20;

#[test]
fn one_client_works_beside_five_hundred_idle_ones() {
    let server = Server::of(&["ram:8M"]);
    // Half have not begun the handshake, half have ended it.
    let _silent: Vec<_> = (0..250).map(|_| UnixStream::connect(server.socket()).unwrap()).collect();
    let mut idle: Vec<_> = (0..250).map(|_| server.client(Style::Structured)).collect();
    let mut client = server.client(Style::Simple);
    let before = server.resident_bytes();
    for number in 0..500 {
        let at = number % 64 * 65536;
        assert_eq!(client.write(at, &pattern(at, 4096, number as u8)), Ok(()));
        assert_eq!(client.read(at, 4096), Ok(pattern(at, 4096, number as u8)));
    }
    assert!(server.resident_bytes() < before + 32 * MIB);
    for client in idle.iter_mut().step_by(50) {
        assert_eq!(client.flush(), Ok(()), "they were only idle");
    }
    assert!(server.stop().status.success());
}

#[test]
fn a_client_that_asks_for_gigabytes_and_reads_nothing_takes_bounded_memory() {
    let server = Server::of(&["null:1G", "--memory", "64M"]);
    let mut other = server.client(Style::Simple);
    assert_eq!(other.read(0, MIB), Ok(zeroes(MIB)));
    let before = server.resident_bytes();
    let mut greedy: Vec<_> = (0..8).map(|_| server.client(Style::Structured)).collect();
    for client in &mut greedy {
        client.set_patience(Duration::from_millis(200)).unwrap();
        for number in 0..64 {
            // 2 GiB each; a server that does not take more requests for now lets this fail.
            if client.send(&Request::read(number % 32 * 32 * MIB, 32 * MIB)).is_err() {
                break;
            }
        }
    }
    let mut most = 0;
    for _ in 0..200 {
        assert_eq!(other.read(0, 65536), Ok(zeroes(65536)), "another client goes on");
        most = most.max(server.resident_bytes());
    }
    let allowance = 48 * MIB;
    assert!(most < before + 64 * MIB + allowance, "{} MiB more than before", (most - before) / MIB);
    drop(greedy);
    assert_eq!(other.read(0, 32 * MIB), Ok(zeroes(32 * MIB)), "it is given back");
    assert!(server.stop().status.success());
}

#[test]
fn a_client_that_is_stopped_does_not_keep_the_server_for_ever() {
    let server = Server::of(&["ram:64M"]);
    // A process that asks for more than fits the socket, and is stopped in the middle of it.
    let mut reader = Command::new("nbdcopy")
        .arg(format!("nbd+unix:///?socket={}", server.socket().display()))
        .arg("-")
        .stdout(Stdio::piped())
        .spawn()
        .expect("nbdcopy is installed (libnbd-bin)");
    server.wait_for_log("client connected");
    let pid = Pid::from_child(&reader);
    rustix::process::kill_process(pid, Signal::STOP).unwrap();
    let mut other = server.client(Style::Simple);
    assert_eq!(other.read(0, 4096), Ok(zeroes(4096)));
    let started = Instant::now();
    let ended = server.stop();
    assert!(started.elapsed() < LONG, "{:?}", started.elapsed());
    assert!(ended.status.success(), "{}", ended.stderr);
    reader.kill().unwrap();
    reader.wait().unwrap();
    wait_until("it is gone", || rustix::process::test_kill_process(pid).is_err());
}

#[test]
fn a_client_that_reads_nothing_is_dropped_at_the_end() {
    let server = Server::of(&["null:1G"]);
    let mut client = server.client(Style::Simple);
    for number in 0..4 {
        client.send(&Request::read(number * MIB, 32 * MIB)).unwrap();
    }
    // The head of the first answer: now there are answers that wait to be read.
    client.stream().read_exact(&mut [0; 16]).unwrap();
    let ended = server.stop();
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(ended.stderr.contains("it did not read its last answers"), "{}", ended.stderr);
}

#[test]
fn many_clients_see_what_the_others_wrote() {
    let server = Server::of(&["ram:8M"]);
    let mut clients: Vec<_> = (0..16).map(|_| server.client(Style::Structured)).collect();
    for number in 0..clients.len() {
        let at = number as u64 * 4096;
        assert_eq!(clients[number].write(at, &pattern(at, 4096, 1)), Ok(()));
        let next = (number + 1) % clients.len();
        assert_eq!(clients[next].read(at, 4096), Ok(pattern(at, 4096, 1)));
    }
}
