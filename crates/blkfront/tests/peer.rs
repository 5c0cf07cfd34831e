//! The driver against a back end that does what each test wants of it, also what no back end may do.

use std::time::Duration;

use blkfront::{Abi, Driver, Request, Result, Ticket, Wish, op, status};
use xen::events::Channel;
use xen::fake::World;
use xen::grants::{Access, GrantRef};
use xen::{Domain, PAGE};

/// Where the driver is to find an answer's parts, by blkif.h: (slot, id, operation, status).
const WIDE: usize = 112;
const NARROW: usize = 108;
/// Of the guest.
const PAGES: usize = 400;

struct Peer {
    world: World,
    driver: Driver,
    channel: Box<dyn Channel>,
    answered: u32,
    slot: usize,
    id: usize,
}

fn peer(wish: &Wish) -> Peer {
    let world = World::new();
    let guest = world.domain(Domain(5), PAGES);
    let driver = Driver::new(guest, wish).unwrap();
    let channel = world.events().bind(Domain(5), driver.specs()[0].port).unwrap();
    let (slot, id) = if wish.abi == Abi::X86_32 { (NARROW, 4) } else { (WIDE, 8) };
    Peer { world, driver, channel, answered: 0, slot, id }
}

fn impatient() -> Wish {
    Wish { patience: Duration::from_millis(200), ..Wish::default() }
}

impl Peer {
    fn at(&self, index: u32) -> usize {
        64 + index as usize % 32 * self.slot
    }

    /// The request in this slot.
    fn request(&mut self, index: u32) -> Vec<u8> {
        let (at, len) = (self.at(index), self.slot);
        self.driver.ring(0).get(at, len)
    }

    /// The number of the page of its nth segment.
    fn gref(&mut self, index: u32, nth: usize) -> GrantRef {
        let request = self.request(index);
        let at = self.id + 16 + 8 * nth;
        GrantRef(u32::from_le_bytes(request[at..at + 4].try_into().unwrap()))
    }

    /// Answers the request in the slot `of`, in the next slot, with these bytes from the operation on.
    fn answer(&mut self, of: u32, bytes: &[u8]) {
        let id = self.request(of)[self.id..self.id + 8].to_vec();
        let at = self.at(self.answered);
        self.driver.ring(0).put(at, &[&id, bytes].concat());
        self.answered += 1;
        let answered = self.answered.to_le_bytes();
        self.driver.ring(0).put(8, &answered);
        self.channel.notify().unwrap();
    }

    fn okay(&mut self, of: u32, operation: u8) {
        let len = if self.slot == WIDE { 8 } else { 4 };
        self.answer(of, &[operation, 0, 0, 0, 0, 0, 0, 0][..len]);
    }

    fn send(&mut self, request: &Request) -> Ticket {
        self.driver.send(0, request).unwrap()
    }
}

fn words<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn answers_may_come_in_any_order_and_each_belongs_to_its_request() {
    for abi in [Abi::Native, Abi::X86_64, Abi::X86_32] {
        let mut peer = peer(&Wish { abi, ..impatient() });
        let first = peer.send(&Request::read(0, 512));
        let second = peer.send(&Request::flush());
        let id = peer.request(0)[peer.id..peer.id + 8].to_vec();
        peer.okay(1, op::FLUSH_DISKCACHE);
        // The first slot holds an answer now, so the peer has to know the name from before.
        let at = peer.at(1) + peer.id;
        peer.driver.ring(0).put(at, &id);
        let rest = [&[op::READ, 0, 0xff, 0xff][..], &[0; 4]].concat();
        peer.answer(1, &rest[..peer.slot - 104]);
        assert_eq!(peer.driver.wait(first).unwrap().status, status::ERROR);
        assert_eq!(peer.driver.wait(second).unwrap().status, status::OKAY);
        assert_eq!(peer.driver.open().unwrap(), 0);
        peer.driver.close().unwrap();
    }
}

#[test]
fn an_answer_that_nobody_asked_or_of_another_operation_is_found() {
    let mut peer = peer(&impatient());
    let ticket = peer.send(&Request::flush());
    peer.okay(0, op::WRITE);
    assert_eq!(words(peer.driver.wait(ticket)), "operation 3 is answered as 1");
    let mut twice = self::peer(&impatient());
    let (first, second) = (twice.send(&Request::flush()), twice.send(&Request::flush()));
    twice.okay(0, op::FLUSH_DISKCACHE);
    twice.driver.wait(first).unwrap();
    let id = twice.request(0)[8..16].to_vec();
    let at = twice.at(1);
    twice.driver.ring(0).put(at + 8, &id);
    twice.okay(1, op::FLUSH_DISKCACHE);
    assert!(words(twice.driver.wait(second)).ends_with("which nobody asked"));
}

#[test]
fn more_answers_than_requests_are_found() {
    let mut peer = peer(&impatient());
    let ticket = peer.send(&Request::flush());
    peer.driver.ring(0).put(8, &2_u32.to_le_bytes());
    assert_eq!(words(peer.driver.wait(ticket)), "answers up to 2 to requests up to 1");
}

#[test]
fn bytes_that_leak_are_found() {
    for (bytes, what) in [
        (&[op::FLUSH_DISKCACHE, 7, 0, 0, 0, 0, 0, 0][..], "mean nothing and are not zero"),
        (&[op::FLUSH_DISKCACHE, 0, 0, 0, 0, 0, 0, 7], "mean nothing and are not zero"),
        (&[op::FLUSH_DISKCACHE, 0, 0, 0, 0, 0, 0, 0, 7], "has overwritten what is behind it"),
    ] {
        let mut peer = peer(&impatient());
        let ticket = peer.send(&Request::flush());
        peer.answer(0, bytes);
        let told = words(peer.driver.wait(ticket));
        assert!(told.contains(what), "{told}");
    }
}

#[test]
fn a_back_end_that_does_not_ring_or_answer_is_found() {
    let mut peer = peer(&impatient());
    let ticket = peer.send(&Request::flush());
    assert_eq!(words(peer.driver.wait(ticket)), "the back end does not answer");
    let waiting = std::thread::scope(|scope| {
        let guest = peer.driver.guest().clone();
        let (id, at) = (peer.request(0)[8..16].to_vec(), peer.driver.ring(0).address(64));
        let produced = peer.driver.ring(0).address(8);
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            guest.write(at, &[&id[..], &[3, 0, 0, 0, 0, 0, 0, 0]].concat());
            guest.store(produced, 1);
        });
        peer.driver.wait(ticket)
    });
    assert_eq!(words(waiting), "the back end has answered and does not ring");
}

#[test]
fn pages_that_are_still_mapped_when_the_answer_comes_are_found() {
    for persistent in [false, true] {
        let mut peer = peer(&Wish { persistent, ..impatient() });
        let ticket = peer.send(&Request::write(0, &[1; 4096]));
        let gref = peer.gref(0, 0);
        let mapping = peer.world.grants().map(Domain(5), &[gref], Access::Read).unwrap();
        peer.okay(0, op::WRITE);
        let told = peer.driver.wait(ticket);
        match persistent {
            false => assert!(words(told).starts_with("the back end still has page")),
            true => {
                told.unwrap();
                let again = peer.send(&Request::write(0, &[1; 4096]));
                assert_eq!(peer.gref(1, 0), gref, "granted as it was");
                peer.okay(1, op::WRITE);
                peer.driver.wait(again).unwrap();
                drop(mapping);
                peer.driver.close().unwrap();
            }
        }
    }
}

#[test]
fn bytes_that_are_written_where_they_should_not_be_are_found() {
    for (request, at, is_found) in [
        (Request::read(0, 512).skewed(2), 1024, false),
        (Request::read(0, 512).skewed(2), 1023, true),
        (Request::read(0, 512).skewed(2), 1536, true),
        (Request::write(0, &[1; 512]), 0, true),
    ] {
        let mut peer = peer(&impatient());
        let ticket = peer.send(&request);
        let page = PAGES - 2; // the last but one: the ring has the last
        let guest = peer.driver.guest().clone();
        guest.write(page * PAGE + at, &[0x77]);
        let operation = peer.request(0)[0];
        peer.okay(0, operation);
        let told = peer.driver.wait(ticket);
        match is_found {
            true => assert!(words(told).contains("has written"), "{at}"),
            false => assert_eq!(told.unwrap().bytes[..2], [0x77, blkfront::UNWRITTEN]),
        }
    }
}

#[test]
fn what_is_not_answered_can_be_ended_when_the_back_end_is_gone() {
    let mut peer = peer(&impatient());
    peer.send(&Request::write(0, &[1; 4096 * 300]).indirect());
    peer.driver.close().unwrap();
    assert_eq!(peer.world.counts().mapped, 0);
}
