//! Rings: many requests on several of them, stops and restarts, and the record of what is in flight.

use std::time::{Duration, Instant};

use block::Errno;
use vhost_client::{Driver, Request, Status, Ticket, Wish, feature};

use crate::disk::Act;
use crate::serve::{Plan, Served};

fn connect(served: &Served, wish: Wish) -> Driver {
    Driver::connect(&served.vhost(), &wish).unwrap()
}

fn ok(driver: &mut Driver, tickets: &[Ticket]) {
    for answer in driver.wait_all(tickets).unwrap() {
        assert_eq!(answer.status, Status::OK);
    }
}

#[test]
fn several_queues_of_every_length_answer_out_of_order_whatever_was_agreed_on() {
    let without = |features: u64| feature::LINUX & !features;
    for features in [
        feature::LINUX,
        without(feature::EVENT_IDX),
        without(feature::INDIRECT),
        without(feature::EVENT_IDX | feature::INDIRECT | feature::MQ),
    ] {
        for queue_len in [4, 256] {
            let served = Plan::scripted(|nth, _| match nth % 5 {
                0 => Act::Late(700),
                3 => Act::Late(20),
                _ => Act::Do,
            })
            .serve();
            let mut driver = connect(&served, Wish { features, queues: 4, queue_len, ..Wish::default() });
            for round in 0..15_u64 {
                let mut tickets = Vec::new();
                for number in 0..u64::from(queue_len / 4).min(12) {
                    for queue in 0..4 {
                        let at = (number * 4 + queue) * 8192 % (1 << 20);
                        let bytes = [(round * 48 + number * 4 + queue) as u8; 512];
                        let mut request = Request::write(at, &bytes);
                        if features & feature::INDIRECT != 0 && (round + number) % 2 == 0 {
                            request = request.indirect();
                        }
                        tickets.push((driver.prepare(queue as usize, &request).unwrap(), at, bytes));
                    }
                }
                (0..4).for_each(|queue| driver.publish(queue).unwrap());
                ok(&mut driver, &tickets.iter().rev().map(|(ticket, ..)| *ticket).collect::<Vec<_>>());
                let (_, at, bytes) = tickets[round as usize % tickets.len()];
                assert_eq!(driver.ask(&Request::read(at, 512)).unwrap().bytes, bytes);
            }
        }
    }
}

#[test]
fn indices_wrap_around_and_nothing_is_lost() {
    let served = Plan::default().serve();
    let mut driver = connect(&served, Wish { queue_len: 64, ..Wish::default() });
    for _ in 0..66_000 / 20 {
        let tickets: Vec<_> = (0..20).map(|_| driver.prepare(0, &Request::read(0, 512)).unwrap()).collect();
        driver.publish(0).unwrap();
        ok(&mut driver, &tickets);
    }
    assert_eq!(served.seen().len(), 66_000);
    assert_eq!(driver.stop_ring(0).unwrap(), (66_000_u32 % 65_536) as u16);
}

#[test]
fn a_ring_that_stops_says_where_and_goes_on_there() {
    let served = Plan::scripted(|nth, _| if nth % 3 == 0 { Act::Late(2000) } else { Act::Do }).serve();
    let mut driver = connect(&served, Wish { queues: 2, ..Wish::default() });
    let mut asked = 0;
    for round in 0..20_u64 {
        let send = |number: u64| Request::write(number * 4096, &[round as u8; 512]);
        let tickets: Vec<_> = (0..10).map(|number| driver.send(0, &send(number)).unwrap()).collect();
        asked += 10;
        let base = driver.stop_ring(0).unwrap();
        // What was taken is answered by now; the rest was not taken.
        let answered = asked - driver.open().unwrap();
        assert_eq!(usize::from(base), answered, "in round {round}");
        assert_eq!(served.seen().iter().filter(|seen| seen.len == 512).count(), answered);
        assert_eq!(driver.stop_ring(1).unwrap(), 0);
        driver.start_ring(0, base).unwrap();
        driver.start_ring(1, 0).unwrap();
        ok(&mut driver, &tickets);
    }
    assert_eq!(served.seen().len(), 200, "nothing is done twice");
}

#[test]
fn a_ring_that_is_disabled_takes_nothing_until_it_is_enabled() {
    let served = Plan::default().serve();
    let mut driver = connect(&served, Wish { queues: 2, ..Wish::default() });
    driver.enable(0, false).unwrap();
    let waiting = driver.send(0, &Request::read(0, 512)).unwrap();
    driver.kick(0).unwrap();
    for _ in 0..50 {
        let other = driver.send(1, &Request::read(0, 512)).unwrap();
        ok(&mut driver, &[other]);
    }
    assert_eq!((driver.open().unwrap(), served.seen().len()), (1, 50));
    driver.enable(0, true).unwrap();
    ok(&mut driver, &[waiting]);
}

#[test]
fn a_ring_that_stops_waits_for_storage() {
    let served = Plan::scripted(|nth, _| if nth == 0 { Act::Late(300_000) } else { Act::Do }).serve();
    let mut driver = connect(&served, Wish::default());
    let ticket = driver.send(0, &Request::write(0, &[1; 512])).unwrap();
    served.until_seen(1);
    assert_eq!(driver.stop_ring(0).unwrap(), 1);
    let answer = driver.answer(ticket).unwrap().expect("it is answered before the ring has stopped");
    assert_eq!(answer.status, Status::OK);
}

#[test]
fn what_is_held_without_a_record_gets_its_error_when_the_ring_stops() {
    let served = Plan::scripted(|nth, _| if nth < 3 { Act::Hold(Errno::ENOSPC) } else { Act::Do }).serve();
    let mut driver = connect(&served, Wish { queues: 2, ..Wish::default() });
    let held: Vec<_> =
        [0, 0, 1].map(|queue| driver.send(queue, &Request::write(0, &[1; 512])).unwrap()).to_vec();
    served.until_seen(3);
    let done = driver.send(0, &Request::read(0, 512)).unwrap();
    ok(&mut driver, &[done]);
    assert_eq!(driver.stop_ring(0).unwrap(), 3);
    for ticket in &held[..2] {
        assert_eq!(driver.answer(*ticket).unwrap().unwrap().status, Status::IOERR);
    }
    assert_eq!(driver.open().unwrap(), 1, "what another ring has held is not touched");
    driver.start_ring(0, 3).unwrap();
    served.release();
    ok(&mut driver, &held[2..]);
}

#[test]
fn what_is_held_stays_in_the_record_when_the_ring_stops_and_is_done_by_the_next() {
    let served = Plan::scripted(|nth, _| if nth < 3 { Act::Hold(Errno::ENOSPC) } else { Act::Do }).serve();
    let mut driver = connect(&served, Wish { inflight: true, ..Wish::default() });
    let writes = [1, 2, 3].map(|number| Request::write(number * 512, &[number as u8; 512]));
    let held: Vec<_> = writes.iter().map(|write| driver.send(0, write).unwrap()).collect();
    served.until_seen(3);
    let done = driver.send(0, &Request::read(0, 512)).unwrap();
    ok(&mut driver, &[done]);
    driver.stop_ring(0).unwrap();
    assert_eq!(driver.open().unwrap(), 3, "not answered");
    // As QEMU does: from where the device has answered.
    driver.reconnect(&served.vhost()).unwrap();
    ok(&mut driver, &held);
    assert_eq!(served.seen().len(), 7, "three, a read, and the three again");
    for number in 1..4 {
        assert_eq!(driver.ask(&Request::read(number * 512, 512)).unwrap().bytes, [number as u8; 512]);
    }
}

#[test]
fn a_front_end_that_comes_back_with_its_record_gets_each_answer_once() {
    // The disk finishes what it had from the connection before; its answers belong to nobody then.
    let served = Plan::scripted(|nth, _| if nth % 2 == 0 { Act::Late(3000) } else { Act::Do }).serve();
    for queues in [1, 3] {
        let wish = Wish { queues, inflight: true, ..Wish::default() };
        let mut driver = connect(&served, wish);
        for round in 0..10_u8 {
            let mut tickets = Vec::new();
            for number in 0..30_u64 {
                let write = Request::write(number * 4096, &[round ^ number as u8; 512]);
                tickets.push(driver.send((number % u64::from(queues)) as usize, &write).unwrap());
            }
            driver.reconnect(&served.vhost()).unwrap();
            ok(&mut driver, &tickets);
            assert_eq!(driver.open().unwrap(), 0);
            for number in (0..30_u64).step_by(7) {
                let answer = driver.ask(&Request::read(number * 4096, 512)).unwrap();
                assert_eq!(answer.bytes, [round ^ number as u8; 512], "{queues} queues, round {round}");
            }
        }
    }
}

#[test]
fn a_guest_that_asks_for_no_call_gets_none() {
    for features in [feature::LINUX, feature::LINUX & !feature::EVENT_IDX] {
        let served = Plan::default().serve();
        let mut driver = connect(&served, Wish { features, ..Wish::default() });
        let ticket = driver.send(0, &Request::read(0, 512)).unwrap();
        let mut calls = 0;
        // One for the ring's start, in case that a predecessor's was lost, and one for the answer.
        until("it is called twice", || {
            calls += driver.calls(0).unwrap();
            calls == 2
        });
        ok(&mut driver, &[ticket]);
        driver.ring(0).forbid_calls(true);
        let tickets: Vec<_> = (0..30).map(|_| driver.send(0, &Request::read(0, 512)).unwrap()).collect();
        until("all are answered", || driver.ring(0).used_index() == 31);
        assert_eq!(driver.calls(0).unwrap(), 0, "{features:#x}");
        driver.ring(0).forbid_calls(false);
        ok(&mut driver, &tickets);
    }
}

#[track_caller]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(40), "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
