//! Any bytes as a ring of a Xen guest: as its requests, and as the pages that they name.

use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ::xen::fake::{Guest, World};
use ::xen::grants::{Access, GrantRef};
use ::xen::{Domain, PAGE};
use runtime::Handle;

use super::moody::Moody;
use super::{Bytes, RUNTIME};
use crate::xen::{Abi, Connection, Device, Offered, Parting, RingSpec, Start};
use crate::xen::{DataPath, Features, OnFailedSync, Settings};

const DOMAIN: Domain = Domain(7);
/// The other ring's page, and the pages that requests name: they are granted under the numbers from 8 on, the last two
/// for reading only.
const OTHER: usize = 0;
const DATA: usize = 1;
const DATA_PAGES: usize = 8;
const RING: usize = DATA + DATA_PAGES;
/// Of ring.h and blkif.h.
const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 4;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;
const SLOTS: usize = 64;
/// What the pool's memory holds before it is used, in builds with assertions.
const POISON: u8 = 0xa5;
/// A run takes no longer, unless something hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the first bytes choose.
struct Choice {
    abi: Abi,
    /// Where the fields of the guest's words are: bytes of a slot and of an answer, and of an id in a request.
    slot: usize,
    answer: usize,
    id: usize,
    persistent: bool,
    /// A thread changes the memory meanwhile.
    is_changing: bool,
    read_only: bool,
    large_blocks: bool,
    maps: bool,
    /// Requests can name the ring's own pages.
    is_open: bool,
    /// Somebody takes the ring over on the way.
    has_successor: bool,
    /// Neither flushes nor barriers are offered, nor anything else.
    is_plain: bool,
    pages: usize,
    base: u32,
    /// How many requests there are said to be.
    asked: u32,
    mood: u8,
    /// Places and words that are put there by turns.
    changes: Vec<(usize, u16)>,
}

impl Choice {
    fn new(bytes: &mut Bytes<'_>) -> Option<Choice> {
        let (flags, more, mood, count) =
            (bytes.number(1)?, bytes.number(1)?, bytes.number(1)?, bytes.number(1)?);
        let asked = bytes.number(2)? as u32;
        let changes: Option<Vec<(usize, u16)>> =
            (0..count % 16).map(|_| Some((bytes.number(2)? as usize, bytes.number(2)? as u16))).collect();
        let abi = if flags & 1 != 0 { Abi::X86_32 } else { Abi::X86_64 };
        let (slot, answer, id) = if flags & 1 != 0 { (108, 12, 4) } else { (112, 16, 8) };
        Some(Choice {
            abi,
            slot,
            answer,
            id,
            persistent: flags & 2 != 0,
            is_changing: flags & 4 != 0,
            read_only: flags & 8 != 0,
            large_blocks: flags & 16 != 0,
            maps: flags & 32 != 0,
            is_open: flags & 64 != 0,
            has_successor: flags & 128 != 0,
            is_plain: more & 1 != 0,
            base: if more & 2 != 0 { 0xffff_fff0 } else { 0 },
            pages: 1 << ((more >> 2) % 5),
            asked,
            mood: mood as u8,
            changes: changes?,
        })
    }

    /// Slots of the ring, a power of two.
    fn size(&self) -> u32 {
        1 << ((self.pages * PAGE - SLOTS) / self.slot).ilog2()
    }
}

/// Serves a ring that is made of these bytes, perhaps while they change, and another that makes sense.
///
/// What is wrong with the first is found without a panic, a hang, or a touch of other memory (what is mapped lies between
/// pages that nobody may touch). What is answered is what was asked first, each once, in the guest's own words and with
/// nothing of ours beside them; a ring that is said to hold more than it can is not answered at all. Afterwards nothing of
/// the guest is mapped or bound. The other ring is served whatever the first holds.
///
/// The first six bytes choose what is negotiated, how the disk behaves, how many words change, and how many requests there
/// are said to be; then come the changes, of a place and a value of two bytes each, then the requests, then what is in the
/// pages that they can name.
pub fn xen_rings(bytes: &[u8]) {
    let has_poison = bytes.contains(&POISON);
    let mut bytes = Bytes(bytes);
    let Some(choice) = Choice::new(&mut bytes) else { return };
    let begun = Instant::now();
    let front = Front::new(&choice, &mut bytes);
    RUNTIME.with(|runtime| {
        let (choice, front) = (Rc::new(choice), Rc::new(front));
        // A barrier is one of the ring's requests, whatever steps it takes; the other ring has one.
        let disk =
            Rc::new(Moody::new(runtime.handle(), choice.mood, choice.read_only, choice.size() as usize + 2));
        let serving = serve(runtime.handle().clone(), choice.clone(), front.clone(), disk.clone());
        runtime.block_on(serving);
        assert_eq!(runtime.handle().panics(), 0, "a task panicked");
        assert_eq!(disk.waiting(), 0, "a request is neither answered nor left");
        front.check(&choice, has_poison);
    });
    assert!(begun.elapsed() < PATIENCE, "a ring held up its thread");
}

/// A guest with two rings.
struct Front {
    world: World,
    guest: Guest,
    rings: [RingSpec; 2],
    /// Names and operations of the requests in the ring, in order.
    asked: Vec<([u8; 8], u8)>,
}

impl Front {
    fn new(choice: &Choice, bytes: &mut Bytes<'_>) -> Front {
        let world = World::new();
        let guest = world.domain(DOMAIN, RING + choice.pages);
        for page in 0..DATA_PAGES {
            let access = if page < DATA_PAGES - 2 { Access::Write } else { Access::Read };
            guest.grant(DATA + page, access);
        }
        // Numbers that nobody can aim at: a hasher's keys are random, and new in each process. A request that named the
        // other ring's page would have the disk's bytes put there.
        let secret = (RandomState::new().hash_one(0) as u32 | 1 << 30) & !(1 << 31 | 0x1f);
        let hidden = |number: usize, page: usize| {
            let gref = GrantRef(secret + number as u32);
            guest.grant_as(gref, page, Access::Write);
            gref
        };
        let refs = (0..choice.pages).map(|nth| match choice.is_open {
            true => guest.grant(RING + nth, Access::Write),
            false => hidden(nth + 1, RING + nth),
        });
        let refs: Vec<GrantRef> = refs.collect();
        let other = hidden(0, OTHER);
        let rings =
            [RingSpec { refs, port: guest.offer() }, RingSpec { refs: vec![other], port: guest.offer() }];
        let mut front = Front { world, guest, rings, asked: Vec::new() };
        front.fill(choice, bytes);
        front
    }

    /// Puts the bytes to where they belong.
    fn fill(&mut self, choice: &Choice, bytes: &mut Bytes<'_>) {
        let ring = RING * PAGE;
        for (at, value) in [
            (REQ_PROD, choice.base.wrapping_add(choice.asked)),
            (REQ_EVENT, choice.base.wrapping_add(1)),
            (RSP_PROD, choice.base),
            (RSP_EVENT, choice.base.wrapping_add(1)),
        ] {
            self.guest.store(ring + at, value);
        }
        for nth in 0..choice.asked.min(choice.size()) {
            let request = bytes.take(bytes.0.len().min(choice.slot)).unwrap_or_default();
            let at = ring + choice.slot_at(nth);
            self.guest.write(at, request);
            let head = self.guest.read(at, choice.id + 8);
            // An indirect one is answered by the operation within it.
            let operation = if head[0] == 6 { head[1] } else { head[0] };
            let id = head[choice.id..].try_into().expect("8 bytes");
            self.asked.push((id, operation));
        }
        let data = bytes.take(bytes.0.len().min(DATA_PAGES * PAGE)).unwrap_or_default();
        self.guest.write(DATA * PAGE, data);
        // A flush, in the other ring.
        let other = OTHER * PAGE;
        self.guest.write(other + SLOTS, &[3, 0]);
        self.guest.write(other + SLOTS + choice.id, &[0x77; 8]);
        self.guest.store(other + REQ_PROD, 1);
        self.guest.store(other + RSP_EVENT, 1);
    }

    /// Whether the other ring's request is answered.
    fn is_other_answered(&self) -> bool {
        self.guest.load(OTHER * PAGE + RSP_PROD) == 1
    }

    fn check(&self, choice: &Choice, has_poison: bool) {
        let counts = self.world.counts();
        assert_eq!((counts.mapped, counts.bound), (0, 0), "mapped pages, and bound channels");
        let other = OTHER * PAGE + SLOTS;
        let answer = self.guest.read(other, choice.answer);
        assert_eq!((&answer[..8], answer[8], answer[9]), (&[0x77; 8][..], 3, 0), "the other ring's answer");
        // Who changes words, or has a disk's contents put into its ring, has only itself to ask what it finds there.
        if choice.is_changing || choice.is_open {
            return;
        }
        let ring = RING * PAGE;
        let answered = self.guest.load(ring + RSP_PROD).wrapping_sub(choice.base);
        if choice.asked > choice.size() {
            assert_eq!(answered, 0, "answers from a ring that makes no sense");
        }
        assert!(answered as usize <= self.asked.len(), "{answered} answers to {} requests", self.asked.len());
        let mut expected = self.asked[..answered as usize].to_vec();
        let mut told = Vec::new();
        for nth in 0..answered {
            let bytes = self.guest.read(ring + choice.slot_at(nth), choice.answer);
            let (id, rest) = bytes.split_first_chunk::<8>().expect("8 bytes");
            let status = i16::from_le_bytes([rest[2], rest[3]]);
            let is_flush = matches!(rest[0], 2 | 3);
            assert!((-2..=0).contains(&status) || (status == -3 && is_flush), "status {status}");
            assert!(
                rest[1] == 0 && rest[4..].iter().all(|byte| *byte == 0),
                "{rest:?} has something of ours"
            );
            told.push((*id, rest[0]));
        }
        expected.sort_unstable();
        told.sort_unstable();
        assert_eq!(told, expected, "what is answered is what was asked first");
        if !has_poison {
            let data = self.guest.read(DATA * PAGE, DATA_PAGES * PAGE);
            assert!(!data.contains(&POISON), "the guest has seen memory of ours");
        }
    }
}

impl Choice {
    /// Where a slot is, counted from where the ring began.
    fn slot_at(&self, nth: u32) -> usize {
        SLOTS + (self.base.wrapping_add(nth) % self.size()) as usize * self.slot
    }

    fn connection(&self, front: &Front, start: Start) -> Connection {
        let offered = Offered {
            flush_cache: !self.is_plain,
            barrier: !self.is_plain,
            discard: !self.is_plain,
            indirect: if self.is_plain { 0 } else { 256 },
            block: if self.large_blocks { 4096 } else { 512 },
        };
        let (abi, rings, persistent) = (self.abi, front.rings.to_vec(), self.persistent);
        Connection { domain: DOMAIN, abi, rings, offered, persistent, start }
    }

    fn settings(&self) -> Settings {
        Settings {
            name: "fuzzed".into(),
            domain: DOMAIN,
            device: 51728,
            kind: "vbd3".into(),
            create_nodes: false,
            features: Features::default(),
            queues: 2,
            block: if self.large_blocks { 4096 } else { 512 },
            data: if self.maps { DataPath::Map } else { DataPath::Copy },
            on_failed_sync: OnFailedSync::FailWrites,
            memory: 64 << 20,
            journals: journals(),
            image: None,
        }
    }
}

/// A directory of this thread's; each run leaves it as it was.
fn journals() -> PathBuf {
    let name = format!("tapdisk-fuzz-{}-{:?}", std::process::id(), std::thread::current().id());
    let path = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&path).expect("a directory for journals");
    path
}

async fn serve(handle: Handle, choice: Rc<Choice>, front: Rc<Front>, disk: Rc<Moody>) {
    let settings = Rc::new(choice.settings());
    let device = || {
        let (grants, events) = (front.world.grants(), front.world.events());
        Device::new(&handle, disk.clone(), grants, events, settings.clone())
    };
    let first = device();
    first.connect(choice.connection(&front, Start::Fresh)).await.expect("rings that are there");
    let changing = choice.is_changing.then(|| Changing::start(&choice, &front.guest));
    for _ in 0..32 {
        handle.yield_now().await;
    }
    // Rung for, and looked at once more when the thread would sleep.
    front.guest.ring(front.rings[0].port);
    handle.sleep(Duration::from_micros(50)).await;
    let last = if choice.has_successor {
        first.disconnect(Parting::Leave).await;
        drop(first);
        let second = device();
        second.connect(choice.connection(&front, Start::TakeOver)).await.expect("a journal that was left");
        second
    } else {
        first
    };
    let due = Instant::now() + PATIENCE;
    while !front.is_other_answered() && Instant::now() < due {
        handle.yield_now().await;
    }
    for _ in 0..32 {
        handle.yield_now().await;
    }
    drop(changing);
    last.disconnect(Parting::Tell).await;
}

/// Puts words into the ring and the data by turns, and back, on a thread of its own.
struct Changing {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Changing {
    fn start(choice: &Choice, guest: &Guest) -> Changing {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, guest, changes) = (stop.clone(), guest.clone(), choice.changes.clone());
        let len = (DATA_PAGES + choice.pages) * PAGE;
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) && !changes.is_empty() {
                for (at, word) in &changes {
                    // The ring is where most of it matters.
                    let at = match at % 4 {
                        3 => DATA * PAGE + at % (len - 2),
                        _ => RING * PAGE + at % (PAGE - 2),
                    };
                    let before = guest.read(at, 2);
                    guest.write(at, &word.to_le_bytes());
                    std::hint::spin_loop();
                    guest.write(at, &before);
                }
            }
        });
        Changing { stop, thread: Some(thread) }
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("changing words does not panic");
        }
    }
}
