//! Death between any two stores into shared memory: a successor goes on, nothing is lost, nothing is answered twice.
//!
//! A guest writes and reads the same few blocks again and again, each time with other contents, as soon as it has the
//! answer to what it asked before. So a request that is lost leaves it waiting, one that is done again after its answer
//! overwrites what is newer, and an answer without a request is seen by the driver.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsFd;
use std::rc::Rc;

use block::Op;

use super::super::inflight::Inflight;
use super::super::memory::Memory;
use super::super::queue::{Queue, Taken};
use super::super::ring::Ways;
use super::desk::{DATA, HEADER, PARTS, RING, STATUS, TABLE, WAYS, terms};
use super::driver::{Driver, header};
use super::ram::Ram;
use crate::tripwire;

const SIZE: u16 = 8;
const BLOCKS: u64 = 5;
/// How often each block is written.
const VERSIONS: u8 = 6;

/// A guest that knows what it has written.
struct Guest {
    ram: Rc<Ram>,
    driver: Driver,
    blocks: Vec<Block>,
    /// Which block a head was for.
    heads: [Option<u64>; SIZE as usize],
}

#[derive(Clone, Default)]
struct Block {
    /// What was written last, and answered.
    version: u8,
    asked: Asked,
}

#[derive(Clone, Copy, Default, PartialEq, Debug)]
enum Asked {
    #[default]
    Nothing,
    Write,
    Read,
}

impl Guest {
    fn new(ram: &Rc<Ram>, index: u16) -> Guest {
        let driver = Driver::new(ram, RING, SIZE, index);
        Guest {
            ram: ram.clone(),
            driver,
            blocks: vec![Block::default(); BLOCKS as usize],
            heads: [None; SIZE as usize],
        }
    }

    fn is_done(&self) -> bool {
        self.blocks.iter().all(|block| block.version == VERSIONS && block.asked == Asked::Nothing)
    }

    /// Takes answers, checks each against what is on the disk, and asks for more.
    fn act(&mut self, disk: &[u8]) {
        let used: Vec<(u16, u32)> = self.driver.take_used();
        // All of them first: a head that is asked with again may be one of these.
        let used: Vec<(u64, u32)> = used
            .into_iter()
            .map(|(head, len)| (self.heads[usize::from(head)].take().expect("the head is out"), len))
            .collect();
        for (nth, len) in used {
            let block = &mut self.blocks[nth as usize];
            assert_eq!(self.ram.read(STATUS - nth, 1), [0], "block {nth}");
            let contents = disk[512 * nth as usize];
            match block.asked {
                Asked::Nothing => panic!("block {nth} was answered and not asked for"),
                Asked::Write => {
                    block.version += 1;
                    assert_eq!((contents, len), (block.version, 1), "block {nth} after its write");
                }
                Asked::Read => {
                    assert_eq!((contents, len), (block.version, 513), "block {nth} after its read");
                    let read = self.ram.read(DATA + 512 * nth, 512);
                    assert_eq!(read, vec![block.version; 512], "block {nth} as it was read");
                }
            }
            // After each write a read.
            block.asked = match block.asked {
                Asked::Write => Asked::Read,
                Asked::Nothing | Asked::Read => Asked::Nothing,
            };
            if block.asked == Asked::Read {
                self.ask(nth, Asked::Read);
            }
        }
        for nth in 0..BLOCKS {
            let block = &self.blocks[nth as usize];
            if block.asked == Asked::Nothing && block.version < VERSIONS {
                self.ask(nth, Asked::Write);
            }
        }
    }

    fn ask(&mut self, nth: u64, what: Asked) {
        let is_read = what == Asked::Read;
        let block = &mut self.blocks[nth as usize];
        block.asked = what;
        let fill = if is_read { 0xee } else { block.version + 1 };
        self.ram.write(DATA + 512 * nth, &[fill; 512]);
        self.ram.write(HEADER + 16 * nth, &header(if is_read { 0 } else { 1 }, nth));
        self.ram.write(STATUS - nth, &[0xee]);
        let parts =
            [(HEADER + 16 * nth, 16, false), (DATA + 512 * nth, 512, is_read), (STATUS - nth, 1, true)];
        let head = self.driver.indirect(TABLE + 64 * nth, &parts);
        self.heads[usize::from(head)] = Some(nth);
        self.driver.offer(head);
    }
}

/// One life of the process that serves.
struct Life {
    memory: Memory,
    queue: Queue,
    /// Taken and not done, with a number for its age.
    waiting: VecDeque<(u16, Op)>,
}

impl Life {
    fn begin(ram: &Ram, driver: &Driver, region: &Region, ways: Ways, base: u16) -> Life {
        let memory = ram.memory();
        let ring = driver.ring(&memory, ways);
        let inflight = Inflight::open(region.file.as_fd(), region.len, 0, 1, SIZE).unwrap();
        let queue = Queue::new(ring, Some(inflight.marks(0, SIZE).unwrap()), base).unwrap();
        Life { memory, queue, waiting: VecDeque::new() }
    }

    /// Takes what there is, has some of it done, in an order of its own, and shows the answers. Death comes at any
    /// store: from then on nothing that it does has an effect.
    fn act(&mut self, disk: &mut [u8], turn: usize) {
        while !tripwire::is_dead() {
            match self.queue.take(&self.memory, &terms()).unwrap() {
                Taken::Request(head, op) => self.waiting.push_back((head, op)),
                Taken::Nothing => break,
                Taken::Answered | Taken::Parts(..) => panic!("reads and writes are asked for"),
            }
        }
        // Two or three of them, from the front or from the back.
        for nth in 0..2 + turn % 2 {
            let next = if (nth + turn).is_multiple_of(3) {
                self.waiting.pop_front()
            } else {
                self.waiting.pop_back()
            };
            let (Some((head, op)), false) = (next, tripwire::is_dead()) else { break };
            let span = op.span().unwrap();
            let range = span.at() as usize..span.end() as usize;
            match &op {
                Op::Read { buf, .. } => buf.put(0, &disk[range]),
                Op::Write { buf, .. } => buf.get(0, &mut disk[range]),
                Op::Flush
                | Op::Discard { .. }
                | Op::WriteZeroes { .. }
                | Op::Status { .. }
                | Op::Prefetch { .. } => panic!("{op:?} was not asked for"),
            }
            self.queue.answer(head, Ok(()), true);
        }
        if !tripwire::is_dead() {
            self.queue.publish();
            self.queue.arm();
        }
    }
}

struct Region {
    file: File,
    len: u64,
}

/// Serves a guest to its end with processes that die after so many stores each; the last one lives. How often one died.
fn serve(lives: &[u64], index: u16, ways: Ways) -> usize {
    let ram = Rc::new(Ram::new(&PARTS));
    let mut guest = Guest::new(&ram, index);
    let (fd, len) = Inflight::make(1, SIZE).unwrap();
    let region = Region { file: fd.into(), len };
    let mut disk = vec![0; 512 * BLOCKS as usize];
    let mut deaths = 0;
    for (nth, stores) in lives.iter().copied().chain([u64::MAX]).enumerate() {
        // What a front end takes for the base when a back end has died: the used index.
        let base = if nth == 0 { index } else { ram.u16(guest.driver.used + 2) };
        tripwire::set(stores);
        let mut life = Life::begin(&ram, &guest.driver, &region, ways, base);
        for turn in 0..400 {
            if guest.is_done() || tripwire::is_dead() {
                break;
            }
            guest.act(&disk);
            life.act(&mut disk, turn);
        }
        deaths += usize::from(tripwire::is_dead());
        drop(life);
        tripwire::set(u64::MAX);
        // The guest lives on; what it does now the successor finds. Or the successor is faster.
        if stores % 2 == 0 {
            guest.act(&disk);
        }
    }
    assert!(
        guest.is_done(),
        "a request was lost: {:?}",
        guest.blocks.iter().map(|b| b.asked).collect::<Vec<_>>()
    );
    assert_eq!(guest.driver.out(), 0);
    assert_eq!(disk, (0..BLOCKS).flat_map(|_| [VERSIONS; 512]).collect::<Vec<u8>>());
    deaths
}

#[test]
fn nothing_is_lost_and_nothing_answered_twice_wherever_a_process_dies() {
    for ways in [WAYS, Ways { event_idx: true, ..WAYS }] {
        let mut stores = 0;
        // Until a process lives to the end.
        while serve(&[stores], 65500, ways) == 1 {
            stores += 1;
        }
        assert!(stores > 500, "only {stores} stores");
    }
}

#[test]
fn a_successor_may_die_too_while_it_takes_over() {
    for first in (1..400).step_by(23) {
        // A take-over is a few stores; the next dies soon after it, or within it.
        for second in 0..40 {
            serve(&[first, second, second / 2 + first % 5], 3, WAYS);
        }
    }
}
