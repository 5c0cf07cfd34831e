//! Guests that put what has no meaning into a ring: that ring stops, and nothing else does.

use std::time::{Duration, Instant};

use block::Errno;
use vhost_client::{Driver, INDIRECT, NEXT, Piece, Request, Status, WRITE, Wish};

use crate::disk::Act;
use crate::serve::{Plan, Served};

/// The guest's address of its first region, where the rings are and whatever is at its start.
const REGION: u64 = 0x1_0000_0000;

fn piece(address: u64, len: u32) -> Piece {
    Piece { address, len, is_written: false }
}

/// What a guest does to its ring, which has 64 descriptors.
type Mischief = (&'static str, fn(&mut Driver));

const MISCHIEF: [Mischief; 11] = [
    ("a head that is no descriptor", |driver| offer(driver, &[64])),
    ("a head far out of range", |driver| offer(driver, &[0xffff])),
    ("a chain that bites its tail", |driver| {
        driver.ring(0).describe(0, piece(REGION, 16), NEXT, 1);
        driver.ring(0).describe(1, piece(REGION, 16), NEXT, 0);
        offer(driver, &[0]);
    }),
    ("a successor that is no descriptor", |driver| {
        driver.ring(0).describe(0, piece(REGION, 16), NEXT, 64);
        offer(driver, &[0]);
    }),
    ("an index that jumps", |driver| {
        let far = driver.ring(0).avail().wrapping_add(65);
        driver.ring(0).jump(far);
    }),
    ("an index that goes back", |driver| {
        let back = driver.ring(0).avail().wrapping_sub(1);
        driver.ring(0).jump(back);
    }),
    ("a header outside of memory", |driver| {
        driver.ring(0).describe(0, piece(0x10, 16), NEXT, 1);
        driver.ring(0).describe(1, piece(REGION, 1), WRITE, 0);
        offer(driver, &[0]);
    }),
    ("a status outside of memory", |driver| {
        driver.ring(0).describe(0, piece(REGION, 16), NEXT, 1);
        driver.ring(0).describe(1, piece(u64::MAX, 1), WRITE, 0);
        offer(driver, &[0]);
    }),
    ("no status", |driver| {
        driver.ring(0).describe(0, piece(REGION, 16), 0, 0);
        offer(driver, &[0]);
    }),
    ("a table of half a descriptor", |driver| {
        driver.ring(0).describe(0, piece(REGION, 24), INDIRECT, 0);
        offer(driver, &[0]);
    }),
    ("a table outside of memory", |driver| {
        driver.ring(0).describe(0, piece(REGION + (16 << 20) - 16, 64), INDIRECT, 0);
        offer(driver, &[0]);
    }),
];

fn offer(driver: &mut Driver, heads: &[u16]) {
    heads.iter().for_each(|head| driver.ring(0).offer(*head));
    driver.ring(0).publish();
}

fn connect(served: &Served) -> Driver {
    Driver::connect(&served.vhost(), &Wish { queues: 2, queue_len: 64, ..Wish::default() }).unwrap()
}

#[test]
fn a_ring_that_makes_no_sense_stops_alone_and_says_so() {
    let served = Plan::default().serve();
    for (what, mischief) in MISCHIEF {
        let mut driver = connect(&served);
        driver.listen_for_failures(0).unwrap();
        assert_eq!(driver.ask(&Request::read(0, 512)).unwrap().status, Status::OK);
        mischief(&mut driver);
        driver.kick(0).unwrap();
        let started = Instant::now();
        while driver.failures().unwrap() == 0 {
            assert!(started.elapsed() < Duration::from_secs(40), "nobody complains of {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
        for _ in 0..10 {
            let other = driver.send(1, &Request::read(512, 512)).unwrap();
            assert_eq!(driver.wait(other).unwrap().status, Status::OK, "{what}");
        }
        assert_eq!(driver.ring(0).used_index(), 1, "{what}: no answer to what was never asked");
    }
    let mut driver = connect(&served);
    assert_eq!(driver.ask(&Request::read(0, 512)).unwrap().status, Status::OK);
}

#[test]
fn a_head_that_is_offered_twice_is_served_once() {
    let served = Plan::scripted(|nth, _| if nth == 0 { Act::Stick } else { Act::Do }).serve();
    let mut driver = connect(&served);
    driver.listen_for_failures(0).unwrap();
    // The first request of a fresh ring has the first descriptors as its chain.
    let stuck = driver.send(0, &Request::write(0, &[1; 512])).unwrap();
    served.until_seen(1);
    let head = driver.head_of(stuck).unwrap();
    offer(&mut driver, &[head]);
    driver.kick(0).unwrap();
    let started = Instant::now();
    while driver.failures().unwrap() == 0 {
        assert!(started.elapsed() < Duration::from_secs(40), "nobody complains");
        std::thread::sleep(Duration::from_millis(1));
    }
    served.release();
    assert_eq!(driver.wait(stuck).unwrap().status, Status::OK, "what was asked before is answered");
    assert_eq!(served.seen().len(), 1);
}

#[test]
fn data_outside_of_memory_is_an_error_of_that_request() {
    let served = Plan::scripted(|_, _| Act::Fail(Errno::EIO)).serve();
    let mut driver = connect(&served);
    for (address, len) in [(0x10, 512), (u64::MAX - 100, 512), (REGION + (16 << 20) - 512, 1024), (0, 4096)] {
        let request = Request::read(0, len).cut_in(&[len]);
        let ticket = driver.prepare(0, &request).unwrap();
        let head = driver.head_of(ticket).unwrap();
        driver.move_piece(ticket, 1, address).unwrap();
        driver.publish(0).unwrap();
        let answer = driver.wait(ticket).unwrap();
        assert_eq!(
            (answer.status, answer.used),
            (Status::IOERR, 1),
            "{len} bytes at {address:#x}, head {head}"
        );
    }
    assert_eq!(served.seen(), [], "the disk is not asked");
    let ticket = driver.send(0, &Request::flush()).unwrap();
    assert_eq!(driver.wait(ticket).unwrap().status, Status::IOERR, "the ring goes on, to a disk that fails");
    assert_eq!(served.seen().len(), 1);
}
