//! A queue on a desk: no tasks and no io_uring, one step at a time.

use std::rc::Rc;

use block::{Errno, Op};

use super::super::inflight::Marks;
use super::super::memory::Memory;
use super::super::queue::{Queue, Taken};
use super::super::request::Terms;
use super::super::ring::{RingError, Ways};
use super::driver::{Driver, header};
use super::ram::Ram;

/// Where things are in the guest's memory: two regions side by side, a hole, and a third.
pub(super) const PARTS: [(u64, u64); 3] = [(0, 0x40000), (0x40000, 0x40000), (0x100000, 0x10000)];
pub(super) const RING: u64 = 0x1000;
pub(super) const HEADER: u64 = 0x8000;
pub(super) const STATUS: u64 = 0x8fff;
pub(super) const TABLE: u64 = 0xa000;
pub(super) const DATA: u64 = 0x10000;

pub(super) const WAYS: Ways = Ways { indirect: true, event_idx: false };
/// DISCARD and WRITE_ZEROES, FLUSH.
const FEATURES: u64 = 1 << 13 | 1 << 14 | 1 << 9;

pub(super) struct Desk {
    pub(super) ram: Rc<Ram>,
    pub(super) driver: Driver,
    pub(super) memory: Memory,
    pub(super) queue: Queue,
    pub(super) terms: Terms,
    /// What was offered last.
    pub(super) head: u16,
}

pub(super) fn terms() -> Terms {
    Terms {
        capacity: 1 << 20,
        block: 512,
        read_only: false,
        features: FEATURES,
        durable: false,
        id: *b"a serial number 1234",
    }
}

/// What came of a request that was put into a ring.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The disk is asked this.
    Asked(Vec<String>),
    /// It was answered at once: status and length.
    Answered(u8, u32),
}

impl Desk {
    pub(super) fn new() -> Desk {
        Desk::with(WAYS, 16, 0, None)
    }

    pub(super) fn with(ways: Ways, size: u16, index: u16, marks: Option<Marks>) -> Desk {
        let ram = Rc::new(Ram::new(&PARTS));
        let driver = Driver::new(&ram, RING, size, index);
        let memory = ram.memory();
        let queue = Queue::new(driver.ring(&memory, ways), marks, index).unwrap();
        Desk { ram, driver, memory, queue, terms: terms(), head: 0 }
    }

    pub(super) fn take(&mut self) -> Result<Taken, RingError> {
        self.queue.take(&self.memory, &self.terms)
    }

    /// Takes the one request that is there.
    pub(super) fn take_request(&mut self) -> (u16, Op) {
        match self.take().unwrap() {
            Taken::Request(head, op) => (head, op),
            Taken::Parts(..) | Taken::Answered | Taken::Nothing => panic!("a request is expected"),
        }
    }

    pub(super) fn answer(&mut self, head: u16, result: Result<(), Errno>) {
        self.queue.answer(head, result, true);
    }

    /// Offers a chain with these parts and a status, which is preset; what comes of it.
    pub(super) fn ask(&mut self, parts: &[(u64, u32, bool)]) -> Result<Outcome, RingError> {
        self.ram.write(STATUS, &[0xee]);
        let head = self.driver.chain(parts);
        self.offer(head)
    }

    pub(super) fn offer(&mut self, head: u16) -> Result<Outcome, RingError> {
        self.head = head;
        self.driver.offer(head);
        match self.take()? {
            Taken::Request(taken, op) => {
                assert_eq!(taken, head);
                Ok(Outcome::Asked(vec![describe(&op)]))
            }
            Taken::Parts(taken, ops) => {
                assert_eq!(taken, head);
                Ok(Outcome::Asked(ops.iter().map(describe).collect()))
            }
            Taken::Answered => {
                self.queue.publish();
                let used = self.driver.take_used();
                assert_eq!((used.len(), used[0].0), (1, head));
                Ok(Outcome::Answered(self.ram.read(STATUS, 1)[0], used[0].1))
            }
            Taken::Nothing => panic!("something was offered"),
        }
    }

    /// A request with this header, and data of so many bytes to read or to write.
    pub(super) fn request(&mut self, kind: u32, sector: u64, to_read: u32, to_write: u32) -> Outcome {
        self.ram.write(HEADER, &header(kind, sector));
        let mut parts = vec![(HEADER, 16, false)];
        if to_read > 0 {
            parts.push((DATA, to_read, false));
        }
        if to_write > 0 {
            parts.push((DATA, to_write, true));
        }
        parts.push((STATUS, 1, true));
        self.ask(&parts).unwrap()
    }
}

/// An operation in words, its memory as its pieces' lengths.
pub(super) fn describe(op: &Op) -> String {
    let lens = |buf: &block::Buf| -> Vec<usize> { buf.segments().iter().map(|piece| piece.len()).collect() };
    match op {
        Op::Read { at, buf } => format!("read at {at} into {:?}", lens(buf)),
        Op::Write { at, buf, fua } => {
            format!("write at {at} from {:?}{}", lens(buf), if *fua { " durably" } else { "" })
        }
        Op::Flush => "flush".into(),
        Op::Discard { span, fua } => format!("discard {span:?}{}", if *fua { " durably" } else { "" }),
        Op::WriteZeroes { span, unmap, fua, fast } => format!(
            "zero {span:?}{}{}{}",
            if *unmap { " unmap" } else { "" },
            if *fua { " durably" } else { "" },
            if *fast { " fast" } else { "" }
        ),
        Op::Status { .. } | Op::Prefetch { .. } => panic!("not among virtio's requests"),
    }
}
