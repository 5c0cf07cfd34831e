//! Front ends come, go, and are shown out.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use block::Errno;
use nbd_client::{Client, Request as NbdRequest, Style};
use vhost_client::{Driver, Request, Status, Wish, feature};

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
fn the_firmware_comes_first_and_the_kernel_sets_up_everything_anew() {
    let served = Plan::scripted(|nth, _| if nth % 3 == 0 { Act::Late(500) } else { Act::Do }).serve();
    // As SeaBIOS does: few features, one ring; yet QEMU enables all of them.
    let of_firmware = feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::VERSION_1
        | feature::PROTOCOL_FEATURES;
    for inflight in [true, false] {
        let wish = Wish { queues: 2, inflight, features: of_firmware, ..Wish::default() };
        let mut driver = Driver::connect(&served.vhost(), &wish).unwrap();
        for boot in 0..4_u8 {
            for _ in 0..10 {
                assert_eq!(driver.ask(&Request::read(0, 512)).unwrap().status, Status::OK);
            }
            assert_eq!((driver.stop_ring(0).unwrap(), driver.stop_ring(1).unwrap()), (10, 0));
            driver.start_over(feature::LINUX).unwrap();
            let tickets: Vec<_> = (0..40)
                .map(|number| {
                    let write = Request::write(number * 512, &[boot; 512]).indirect();
                    driver.send(number as usize % 2, &write).unwrap()
                })
                .collect();
            assert!(driver.wait_all(&tickets).unwrap().iter().all(|answer| answer.status == Status::OK));
            assert_eq!((driver.stop_ring(0).unwrap(), driver.stop_ring(1).unwrap()), (20, 20));
            driver.start_over(of_firmware).unwrap();
        }
    }
}

#[test]
fn a_reset_forgets_what_was_asked_and_a_new_driver_begins_at_the_beginning() {
    let served = Plan::scripted(|nth, _| match nth % 12 {
        0 => Act::Hold(Errno::ENOSPC),
        1..6 => Act::Late(2000),
        _ => Act::Do,
    })
    .serve();
    for inflight in [true, false] {
        let wish = Wish { queues: 2, inflight, ..Wish::default() };
        let mut driver = Driver::connect(&served.vhost(), &wish).unwrap();
        for round in 0..5_u8 {
            let asked = served.seen().len();
            for number in 0..12 {
                driver.send(number % 2, &Request::write(number as u64 * 512, &[round; 512])).unwrap();
            }
            served.until_seen(asked + 12);
            driver.reset().unwrap();
            driver.start_over(feature::LINUX).unwrap();
            assert_eq!((driver.ring(0).used_index(), driver.ring(1).used_index()), (0, 0));
            // What is told now belongs to what is asked now: a stray answer would be an error of the driver's.
            let reads: Vec<_> =
                (0..12).map(|number| driver.send(number % 2, &Request::read(0, 512)).unwrap()).collect();
            served.until_seen(asked + 24);
            served.release();
            for ticket in reads {
                let answer = driver.wait(ticket).unwrap();
                assert_eq!(answer.status, Status::OK, "with a record: {inflight}, round {round}");
            }
        }
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
