//! Front ends come, go, and are shown out.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use block::Errno;
use nbd_client::{Client, Request as NbdRequest, Style};
use vhost_client::{Driver, Request, Status, Wish};

use crate::disk::Act;
use crate::serve::Plan;

#[test]
fn one_front_end_is_served_after_the_other() {
    let served = Plan::default().serve();
    let mut first = Driver::connect(&served.vhost(), &Wish::default()).unwrap();
    assert_eq!(first.ask(&Request::write(0, &[1; 512])).unwrap().status, Status::OK);
    let (path, wish) = (served.vhost(), Wish::default());
    let second = std::thread::spawn(move || {
        let mut second = Driver::connect(&path, &wish).unwrap();
        second.ask(&Request::read(0, 512)).unwrap().bytes
    });
    for number in 0..100 {
        let answer = first.ask(&Request::write(0, &[number; 512])).unwrap();
        assert_eq!(answer.status, Status::OK);
    }
    assert!(!second.is_finished(), "it waits for the first one's end");
    drop(first);
    assert_eq!(second.join().unwrap(), [99; 512]);
}

#[test]
fn a_front_end_that_leaves_with_requests_in_flight_changes_nothing_for_the_next() {
    let served = Plan::scripted(|nth, _| if nth % 2 == 0 { Act::Late(2000) } else { Act::Do }).serve();
    for round in 0..20 {
        let mut driver = Driver::connect(&served.vhost(), &Wish { queues: 2, ..Wish::default() }).unwrap();
        for number in 0..20 {
            driver.send(number % 2, &Request::write(number as u64 * 512, &[round; 512])).unwrap();
        }
    }
    let mut driver = Driver::connect(&served.vhost(), &Wish::default()).unwrap();
    assert_eq!(driver.ask(&Request::write(0, &[77; 512])).unwrap().status, Status::OK);
    assert_eq!(driver.ask(&Request::read(0, 512)).unwrap().bytes, [77; 512]);
}

#[test]
fn what_was_taken_is_answered_when_the_server_ends() {
    let served = Plan::scripted(|_, _| Act::Late(100_000)).serve();
    let mut driver = Driver::connect(&served.vhost(), &Wish { queues: 2, ..Wish::default() }).unwrap();
    let tickets: Vec<_> = (0..20)
        .map(|number| driver.send(number % 2, &Request::write(number as u64 * 512, &[1; 512])).unwrap())
        .collect();
    served.until_seen(20);
    served.start_to_drain();
    assert!(driver.wait_all(&tickets).unwrap().iter().all(|answer| answer.status == Status::OK));
    let late = driver.send(0, &Request::read(0, 512)).unwrap();
    assert_eq!(driver.wait(late).unwrap_err().to_string(), "the back end has hung up");
    // Dropping it waits for its end.
    let socket = served.vhost();
    drop(served);
    assert!(!socket.exists(), "the socket is removed");
}

#[test]
fn what_is_held_gets_its_error_when_the_server_ends_and_there_is_no_record() {
    let hold = |nth, _: &_| if nth % 2 == 0 { Act::Hold(Errno::ENOSPC) } else { Act::Do };
    for inflight in [false, true] {
        let served = Plan::scripted(hold).serve();
        let mut driver = Driver::connect(&served.vhost(), &Wish { inflight, ..Wish::default() }).unwrap();
        let tickets: Vec<_> =
            (0..6).map(|number| driver.send(0, &Request::write(number * 512, &[1; 512])).unwrap()).collect();
        served.until_seen(6);
        served.start_to_drain();
        let told: Vec<_> = tickets.iter().map(|ticket| driver.wait(*ticket).ok()).collect();
        let told: Vec<_> = told.into_iter().map(|answer| answer.map(|answer| answer.status)).collect();
        let held = if inflight { None } else { Some(Status::IOERR) };
        let done = Some(Status::OK);
        assert_eq!(told, [held, done, held, done, held, done], "with a record: {inflight}");
    }
}

#[test]
fn what_a_guest_writes_a_client_of_nbd_reads_and_the_other_way_round() {
    let served = Plan::default().serve();
    let mut driver = Driver::connect(&served.vhost(), &Wish::default()).unwrap();
    let mut client = Client::connect(&served.nbd(), Style::Structured).unwrap();
    for number in 0..50_u8 {
        let at = u64::from(number) * 512;
        assert_eq!(driver.ask(&Request::write(at, &[number; 512])).unwrap().status, Status::OK);
        let read = client.ask(&NbdRequest::read(at, 512)).unwrap().unwrap();
        assert_eq!(read.bytes, [number; 512]);
        client.ask(&NbdRequest::write(at, &[!number; 512])).unwrap().unwrap();
        assert_eq!(driver.ask(&Request::read(at, 512)).unwrap().bytes, [!number; 512]);
    }
}

#[test]
fn garbage_ends_a_connection_and_nobody_else_notices() {
    let served = Plan::default().serve();
    for garbage in
        [&[0; 12][..], &[0xff; 4096], b"GET / HTTP/1.1\r\n\r\n", &[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]]
    {
        let mut stream = UnixStream::connect(served.vhost()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(40))).unwrap();
        stream.write_all(garbage).unwrap();
        let mut heard = Vec::new();
        match stream.read_to_end(&mut heard) {
            Ok(_) => assert_eq!(heard, b"", "{garbage:?}"),
            // It says the same as an end.
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{garbage:?}"),
        }
    }
    let mut driver = Driver::connect(&served.vhost(), &Wish::default()).unwrap();
    assert_eq!(driver.ask(&Request::read(0, 512)).unwrap().status, Status::OK);
}
