//! Death between any two stores into the ring or the journal: a successor goes on, nothing is lost, nothing is answered
//! twice.
//!
//! A guest writes and reads the same few blocks again and again, each time with other contents, as soon as it has the
//! answer to what it asked before. So a request that is lost leaves it waiting, one that is done again after its answer
//! overwrites what is newer, and an answer without a request is seen by the driver. It offers each page with a grant that
//! ends with the answer, so that one that is still mapped then is seen too.

use std::collections::VecDeque;
use std::path::Path;
use std::rc::Rc;

use ::xen::fake::{Guest, World};
use ::xen::grants::{Access, Direction, GrantRef, Grants, Piece};
use ::xen::{Domain, PAGE};
use block::{Buf, Pool, Span};

use super::super::DataPath;
use super::super::data::{Copies, Data, Place};
use super::super::device::{Connection, Offered, Start};
use super::super::journal::{Journal, Shape};
use super::super::layout::Abi;
use super::super::queue::Queue;
use super::super::request::{Terms, Verdict, judge};
use super::super::ring::Ring;
use super::super::status::Status;
use super::front::{self, Front};
use crate::tripwire;
use crate::words::Words;

const BLOCKS: u64 = 5;
/// How often each block is written.
const VERSIONS: u8 = 4;
const RING_PAGE: usize = 1;
const DATA_PAGE: usize = 8;
const DEVICE: u32 = 51728;
const OFFERED: Offered = Offered { flush_cache: true, barrier: true, discard: true, indirect: 0, block: 512 };

/// A guest that knows what it has written.
struct Client {
    guest: Guest,
    front: Front,
    blocks: Vec<Block>,
}

#[derive(Clone, Default)]
struct Block {
    /// What was written last, and answered.
    version: u8,
    asked: Asked,
    grant: Option<GrantRef>,
}

#[derive(Clone, Copy, Default, PartialEq, Debug)]
enum Asked {
    #[default]
    Nothing,
    Write,
    Read,
}

impl Client {
    fn is_done(&self) -> bool {
        self.blocks.iter().all(|block| block.version == VERSIONS && block.asked == Asked::Nothing)
    }

    fn page(nth: u64) -> usize {
        DATA_PAGE + nth as usize
    }

    /// Takes answers, checks each against what is on the disk, and asks for more.
    fn act(&mut self, disk: &[u8]) {
        for (id, operation, status) in self.front.responses() {
            let block = &mut self.blocks[id as usize];
            let contents = disk[512 * id as usize];
            let expected = match block.asked {
                Asked::Nothing => panic!("block {id} was answered and not asked for"),
                Asked::Write => {
                    block.version += 1;
                    1
                }
                Asked::Read => {
                    let read = self.guest.read(Client::page(id) * PAGE, 512);
                    assert_eq!(read, vec![block.version; 512], "block {id} as it was read");
                    0
                }
            };
            assert_eq!((operation, status), (expected, 0), "block {id}");
            assert_eq!(contents, block.version, "block {id} on the disk");
            let grant = block.grant.take().expect("it was granted");
            self.guest.end(grant).expect("nobody has it mapped after the answer");
            // After each write a read.
            block.asked = match block.asked {
                Asked::Write => Asked::Read,
                Asked::Nothing | Asked::Read => Asked::Nothing,
            };
            if block.asked == Asked::Read {
                self.ask(id, Asked::Read);
            }
        }
        for nth in 0..BLOCKS {
            let block = &self.blocks[nth as usize];
            if block.asked == Asked::Nothing && block.version < VERSIONS {
                self.ask(nth, Asked::Write);
            }
        }
        self.front.show();
    }

    fn ask(&mut self, nth: u64, what: Asked) {
        let is_read = what == Asked::Read;
        let page = Client::page(nth);
        let access = if is_read { Access::Write } else { Access::Read };
        let grant = self.guest.grant(page, access);
        let block = &mut self.blocks[nth as usize];
        (block.asked, block.grant) = (what, Some(grant));
        let fill = if is_read { 0xee } else { block.version + 1 };
        self.guest.write(page * PAGE, &[fill; 512]);
        let request = front::request(self.front.abi, u8::from(!is_read), nth, nth, &[(grant, 0, 0)]);
        self.front.put(&request);
    }
}

/// One life of the process that serves.
struct Life {
    queue: Queue,
    data: Data,
    /// Taken and not done.
    waiting: VecDeque<Work>,
}

struct Work {
    slot: u16,
    is_read: bool,
    span: Span,
    pieces: Vec<Piece>,
    buf: Buf,
    place: Place,
}

impl Life {
    fn begin(bench: &Bench, client: &Client, start: Start) -> Life {
        let connection = Connection {
            domain: client.guest.domain(),
            abi: client.front.abi,
            rings: vec![client.front.spec()],
            offered: OFFERED,
            persistent: false,
            start,
        };
        let layout = client.front.abi.layout();
        let words = Words::granted(&*bench.grants, connection.domain, &client.front.refs).unwrap();
        let ring = Ring::new(words, layout, 32);
        let directory = bench.directory;
        let journal = match start {
            Start::Fresh => {
                let shape = Shape { size: 32, answered: ring.answered() };
                Journal::create(directory, &connection, DEVICE, &[shape])
            }
            Start::TakeOver => Journal::open(directory, &connection, DEVICE, [32].into_iter()),
        };
        let queue = Queue::new(ring, journal.unwrap().part(0), layout).unwrap();
        let data = Data::new(&bench.grants, connection.domain, &Pool::new(0), bench.path, false);
        Life { queue, data, waiting: VecDeque::new() }
    }

    /// Takes what there is, has some of it done, in an order of its own, and shows the answers. Death comes at any
    /// store: from then on nothing that it does has an effect.
    fn act(&mut self, disk: &mut [u8], turn: usize, in_order: bool) {
        let terms = Terms { capacity: 512 * BLOCKS, read_only: false, offered: OFFERED };
        while !tripwire::is_dead() {
            if self.queue.peek().unwrap().is_none() {
                break;
            }
            let (slot, raw) = self.queue.take();
            let mut pieces = Vec::new();
            let (span, direction) = match judge(&raw, &[], &terms, &mut pieces) {
                Verdict::Read(span) => (span, Direction::ToGuest),
                Verdict::Write(span) => (span, Direction::FromGuest),
                Verdict::Flush | Verdict::Barrier { .. } | Verdict::Discard(_) | Verdict::Answer(_) => {
                    panic!("reads and writes are asked for")
                }
            };
            let (buf, place) = self.data.place(&pieces, span.len() as usize, direction);
            let is_read = direction == Direction::ToGuest;
            self.waiting.push_back(Work { slot, is_read, span, pieces, buf, place });
        }
        // Two or three of them, from the front or from the back.
        for nth in 0..2 + turn % 2 {
            let next = if in_order || (nth + turn).is_multiple_of(3) {
                self.waiting.pop_front()
            } else {
                self.waiting.pop_back()
            };
            let (Some(work), false) = (next, tripwire::is_dead()) else { break };
            self.perform(work, disk);
        }
        if !tripwire::is_dead() {
            self.queue.publish();
            self.queue.arm();
        }
    }

    fn perform(&mut self, work: Work, disk: &mut [u8]) {
        let Work { slot, is_read, span, pieces, buf, place } = work;
        let range = span.at() as usize..span.end() as usize;
        let mut copies = Copies::default();
        if is_read {
            buf.put(0, &disk[range.clone()]);
        }
        if let Place::Ours(buf) = &place {
            let direction = if is_read { Direction::ToGuest } else { Direction::FromGuest };
            copies.add(slot, direction, buf.clone(), pieces);
        }
        self.data.copy(&mut copies);
        assert!(copies.drain().all(|copied| copied.result.is_ok()));
        if !is_read {
            buf.get(0, &mut disk[range]);
        }
        drop((buf, place));
        self.queue.answer(slot, Status::Okay);
    }
}

struct Bench<'a> {
    grants: Rc<dyn Grants>,
    directory: &'a Path,
    path: DataPath,
    abi: Abi,
    in_order: bool,
}

/// Serves a guest to its end with processes that die after so many stores each; the last one lives. How often one died.
fn serve(lives: &[u64], index: u32, path: DataPath, abi: Abi, in_order: bool) -> usize {
    let world = World::new();
    // In memory, as /run is.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let bench = Bench { grants: world.grants(), directory: directory.path(), path, abi, in_order };
    let deaths = serve_on(&bench, &world, lives, index);
    assert_eq!(world.counts().mapped, 0);
    deaths
}

fn serve_on(bench: &Bench, world: &World, lives: &[u64], index: u32) -> usize {
    let guest = world.domain(Domain(7), 16);
    let front = Front::new(&guest, bench.abi, RING_PAGE, 1, index);
    let mut client = Client { guest, front, blocks: vec![Block::default(); BLOCKS as usize] };
    let mut disk = vec![0; 512 * BLOCKS as usize];
    let mut deaths = 0;
    // The first has not said that it is connected before its journal is whole: so it dies later, if at all.
    let mut life = Some(Life::begin(bench, &client, Start::Fresh));
    for stores in lives.iter().copied().chain([u64::MAX]) {
        tripwire::set(stores);
        let mut life = life.take().unwrap_or_else(|| Life::begin(bench, &client, Start::TakeOver));
        for turn in 0..400 {
            if client.is_done() || tripwire::is_dead() {
                break;
            }
            client.act(&disk);
            life.act(&mut disk, turn, bench.in_order);
        }
        deaths += usize::from(tripwire::is_dead());
        drop(life);
        tripwire::set(u64::MAX);
        // The guest lives on; what it does now the successor finds. Or the successor is faster.
        if stores % 2 == 0 {
            client.act(&disk);
        }
    }
    let asked: Vec<Asked> = client.blocks.iter().map(|block| block.asked).collect();
    assert!(client.is_done(), "a request was lost: {asked:?}");
    assert_eq!(
        (client.front.out(), client.guest.granted()),
        (0, 1),
        "its ring's page is all that is granted"
    );
    assert_eq!(disk, (0..BLOCKS).flat_map(|_| [VERSIONS; 512]).collect::<Vec<u8>>());
    deaths
}

#[test]
fn nothing_is_lost_and_nothing_answered_twice_wherever_a_process_dies() {
    // Indices that wrap around on the way, on one page or two.
    let ways = [
        (u32::MAX - 20, DataPath::Copy, Abi::X86_64, false),
        (0, DataPath::Map, Abi::X86_32, false),
        (u32::MAX - 10, DataPath::Copy, Abi::X86_32, true),
    ];
    for (index, path, abi, in_order) in ways {
        let mut stores = 0;
        // Until a process lives to the end.
        while serve(&[stores], index, path, abi, in_order) == 1 {
            stores += 1;
        }
        assert!(stores > 800, "only {stores} stores");
    }
}

#[test]
fn a_successor_may_die_too_while_it_takes_over() {
    for first in (1..800).step_by(41) {
        // A take-over is a few stores; the next dies within it, soon after it, or later.
        for second in (0..30).chain((30..400).step_by(37)) {
            serve(
                &[first, second, second / 2 + first % 5],
                u32::MAX - 15,
                DataPath::Copy,
                Abi::X86_64,
                false,
            );
        }
    }
}
