//! Any bytes as a guest's memory: as its descriptors, rings and requests, and as the record of what is out.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use runtime::Handle;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};

use super::moody::Moody;
use super::{Bytes, RUNTIME};
use crate::vhost::{Device, RegionSpec, Settings};

/// Bytes of the two regions that the bytes are put into, side by side from address 0 on.
const FIRST: u64 = 24 << 10;
const SECOND: u64 = 8 << 10;
/// A region without bytes of the fuzzer's: the used ring, and all of the other ring.
const PRIVATE: u64 = 16 << 10;
/// Where the front end has these, as seen from the guest's addresses of the first two, and for the third.
const USER: u64 = 0x7000_0000_0000;
const PRIVATE_USER: u64 = 0x7100_0000_0000;
/// In the third region: the other ring's parts, and its request.
const OTHER: u64 = 4 << 10;
const OTHER_SIZE: u64 = 4;
const REQUEST: u64 = 8 << 10;
const STATUS: u64 = REQUEST + 16;
/// A run takes no longer, unless something hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the first bytes choose.
struct Choice {
    event_idx: bool,
    indirect: bool,
    /// There is a record of what is out, and it starts as the fuzzer wants.
    has_record: bool,
    /// A thread changes the memory meanwhile.
    is_changing: bool,
    read_only: bool,
    large_blocks: bool,
    /// Indices are about to wrap around.
    is_late: bool,
    size: u16,
    mood: u8,
    /// Places and words that are put there by turns.
    changes: Vec<(u64, u16)>,
}

impl Choice {
    fn new(bytes: &mut Bytes<'_>) -> Option<Choice> {
        let (flags, size, mood, count) =
            (bytes.number(1)?, bytes.number(1)?, bytes.number(1)?, bytes.number(1)?);
        let changes: Option<Vec<(u64, u16)>> =
            (0..count % 16).map(|_| Some((bytes.number(2)?, bytes.number(2)? as u16))).collect();
        Some(Choice {
            event_idx: flags & 1 != 0,
            indirect: flags & 2 != 0,
            has_record: flags & 4 != 0,
            is_changing: flags & 8 != 0,
            read_only: flags & 16 != 0,
            large_blocks: flags & 32 != 0,
            is_late: flags & 64 != 0,
            size: 1 << (size % 8),
            mood: mood as u8,
            changes: changes?,
        })
    }

    fn features(&self) -> u64 {
        // VERSION_1, FLUSH, and where the disk can be written DISCARD and WRITE_ZEROES.
        let erase = if self.read_only { 0 } else { 1 << 13 | 1 << 14 };
        1 << 32 | 1 << 9 | erase | u64::from(self.indirect) << 28 | u64::from(self.event_idx) << 29
    }
}

/// Serves a ring that is made of these bytes, perhaps while they change, and another that makes sense.
///
/// What is wrong with the first is found without a panic, a hang, or a touch of other memory (each region lies between
/// pages that nobody may touch); each head that is taken is answered once, unless the ring stops at it; the other ring
/// is served whatever the first holds.
///
/// The first four bytes choose what is negotiated, the ring's size, how the disk behaves and how many words change, at
/// places and to values that follow (two bytes each). With a record, the next bytes are its part of that ring. The rest
/// is the guest's memory: descriptors, available ring, then anything.
pub fn rings(bytes: &[u8]) {
    let mut bytes = Bytes(bytes);
    let Some(choice) = Choice::new(&mut bytes) else { return };
    let begun = Instant::now();
    RUNTIME.with(|runtime| {
        let guest = Rc::new(Guest::new(&choice, &mut bytes));
        // A request may have 16 parts; the other ring has 4 heads.
        let waiting_max = 16 * usize::from(choice.size) + 4;
        let disk = Rc::new(Moody::new(runtime.handle(), choice.mood, choice.read_only, waiting_max));
        let serving = serve(runtime.handle().clone(), Rc::new(choice), guest, disk.clone());
        runtime.block_on(serving);
        assert_eq!(runtime.handle().panics(), 0, "a task panicked");
        assert_eq!(disk.waiting(), 0, "a request is neither answered nor left");
    });
    assert!(begun.elapsed() < PATIENCE, "a ring held up its thread");
}

/// Memory, and where in it the rings are.
struct Guest {
    parts: [(RegionSpec, File); 3],
    /// The guest's address of the third region: nobody can aim at it.
    private: u64,
    record: Option<(File, u64)>,
    avail: u64,
}

impl Guest {
    fn new(choice: &Choice, bytes: &mut Bytes<'_>) -> Guest {
        // A hasher's keys are random, and new in each process.
        let private = (RandomState::new().hash_one(0) | 1 << 62) & !0xfff & !(1 << 63);
        let part = |guest: u64, len: u64, user: u64| {
            let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd"));
            file.set_len(len).expect("it may grow");
            (RegionSpec { guest, len, user, offset: 0 }, file)
        };
        let parts =
            [part(0, FIRST, USER), part(FIRST, SECOND, USER + FIRST), part(private, PRIVATE, PRIVATE_USER)];
        let size = u64::from(choice.size);
        let mut guest = Guest { parts, private, record: None, avail: 16 * size };
        if choice.has_record {
            let record = File::from(memfd_create("record", MemfdFlags::CLOEXEC).expect("a memfd"));
            let len = (16 + 16 * size).next_multiple_of(64) * 2;
            record.set_len(len).expect("it may grow");
            let taken = bytes.take(bytes.0.len().min(16 + 16 * usize::from(choice.size)));
            put(&record, 0, taken.unwrap_or_default());
            guest.record = Some((record, len));
        }
        let first = bytes.take(bytes.0.len().min(FIRST as usize)).unwrap_or_default();
        put(&guest.parts[0].1, 0, first);
        let second = bytes.take(bytes.0.len().min(SECOND as usize)).unwrap_or_default();
        put(&guest.parts[1].1, 0, second);
        if choice.is_late {
            // As far as the record goes, it has to agree with the ring; without one, it begins anew.
            put(&guest.parts[2].1, 2, &0xfffe_u16.to_le_bytes());
        }
        guest.prepare_other();
        guest
    }

    /// Offers a flush in the other ring.
    fn prepare_other(&self) {
        let private = &self.parts[2].1;
        let descriptor = |at: u64, len: u32, flags: u16, next: u16| {
            let mut bytes = at.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            bytes
        };
        put(private, REQUEST, &[4, 0, 0, 0]);
        put(private, STATUS, &[0xee]);
        put(private, OTHER, &descriptor(self.private + REQUEST, 16, 1, 1));
        put(private, OTHER + 16, &descriptor(self.private + STATUS, 1, 2, 0));
        put(private, OTHER + 16 * OTHER_SIZE + 2, &1u16.to_le_bytes());
    }

    fn regions(&self) -> Vec<(RegionSpec, OwnedFd)> {
        self.parts.iter().map(|(spec, file)| (*spec, copy(file))).collect()
    }

    fn private16(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.parts[2].1.read_exact_at(&mut bytes, at).expect("it is as long as that");
        u16::from_le_bytes(bytes)
    }
}

fn put(file: &File, at: u64, bytes: &[u8]) {
    file.write_all_at(bytes, at).expect("a memfd takes what fits it");
}

fn copy(file: &File) -> OwnedFd {
    file.try_clone().expect("a copy of a descriptor").into()
}

async fn serve(handle: Handle, choice: Rc<Choice>, guest: Rc<Guest>, disk: Rc<Moody>) {
    let settings = Settings {
        name: "fuzzed".into(),
        queues: 2,
        block: if choice.large_blocks { 4096 } else { 512 },
        id: "fuzzed".into(),
        pin_memory: false,
    };
    let device = Device::new(&handle, disk.clone(), settings, Rc::default());
    device.set_features(choice.features()).expect("offered");
    device.set_memory(guest.regions()).expect("regions that do not overlap");
    if let Some((record, len)) = &guest.record {
        device.set_inflight(copy(record), *len, 0, 2, choice.size).expect("a record of that size");
    }
    let changing = choice.is_changing.then(|| Changing::start(&choice, &guest));
    let bells: Vec<OwnedFd> = (0..4).map(|_| bell()).collect();
    let bell = |nth: usize| Some(bells[nth].try_clone().expect("a copy of a descriptor"));
    let base = guest.private16(2);
    start(&device, 0, choice.size, base, [USER, USER + guest.avail, PRIVATE_USER], (bell(0), bell(1)));
    // The record has no room for a longer ring: then the other one has none.
    if guest.record.is_none() || u64::from(choice.size) >= OTHER_SIZE {
        let avail = PRIVATE_USER + OTHER + 16 * OTHER_SIZE;
        let parts = [PRIVATE_USER + OTHER, avail, avail + 64];
        start(&device, 1, OTHER_SIZE as u16, 0, parts, (bell(2), bell(3)));
    }
    for _ in 0..32 {
        handle.yield_now().await;
    }
    // Kicked, and looked at once more when the thread would sleep.
    rustix::io::write(&bells[0], &1u64.to_ne_bytes()).expect("an eventfd that is empty");
    handle.sleep(Duration::from_micros(50)).await;
    for _ in 0..32 {
        handle.yield_now().await;
    }
    let next = device.ring_base(0).await.expect("there is such a ring") as u16;
    device.ring_base(1).await.expect("there is such a ring");
    drop(changing);
    // What was signalled goes out.
    handle.sleep(Duration::from_micros(10)).await;
    check(&choice, &guest, &disk, &bells, base, next);
    device.stop().await;
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

/// Whether it was rung.
fn is_rung(bell: &OwnedFd) -> bool {
    rustix::io::read(bell, &mut [0; 8]).is_ok()
}

type Bells = (Option<OwnedFd>, Option<OwnedFd>);

fn start(device: &Rc<Device>, index: u32, size: u16, base: u16, parts: [u64; 3], (kick, err): Bells) {
    let [descriptors, avail, used] = parts;
    device.set_ring_size(index, size.into()).expect("a power of two");
    device.set_ring_base(index, base.into()).expect("16 bits");
    device.set_ring_addresses(index, descriptors, avail, used).expect("it does not run yet");
    device.set_err(index, err).expect("an eventfd");
    device.set_kick(index, kick).expect("an eventfd");
}

/// Each head that was taken was answered, unless the ring stopped; each answer is one of a head.
fn check(choice: &Choice, guest: &Guest, disk: &Moody, bells: &[OwnedFd], base: u16, next: u16) {
    let used = guest.private16(2);
    let answered = used.wrapping_sub(base);
    let has_failed = is_rung(&bells[1]);
    let unanswered = next.wrapping_sub(used);
    if guest.record.is_none() {
        assert!(unanswered <= u16::from(has_failed), "{unanswered} heads were taken and not answered");
    } else {
        // What is left to a successor stays in the record; a record that makes no sense keeps a ring from starting.
        assert!(unanswered <= choice.size || has_failed, "{unanswered} heads are out");
        assert!(unanswered == 0 || has_failed || disk.left() > 0, "{unanswered} heads were lost");
    }
    for nth in 0..answered.min(choice.size) {
        let place = u64::from(used.wrapping_sub(nth + 1) % choice.size);
        let head = guest.private16(4 + 8 * place);
        assert!(head < choice.size, "head {head} was answered");
    }
    let other = guest.private16(OTHER + 16 * OTHER_SIZE + 64 + 2);
    let mut status = [0];
    guest.parts[2].1.read_exact_at(&mut status, STATUS).expect("it is as long as that");
    let is_served = guest.record.is_none() || u64::from(choice.size) >= OTHER_SIZE;
    if is_served && !is_rung(&bells[3]) {
        assert_eq!(other, 1, "the other ring was not served");
        // The disk's mood may be an error: but there is an answer.
        assert!(status[0] <= 2, "status {}", status[0]);
    }
}

/// Puts words into the memory by turns, and back, on a thread of its own.
struct Changing {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Changing {
    fn start(choice: &Choice, guest: &Guest) -> Changing {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let (memory, changes) = (File::from(copy(&guest.parts[0].1)), choice.changes.clone());
        let record = guest.record.as_ref().map(|(record, _)| File::from(copy(record)));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for (at, word) in &changes {
                    // Every eighth place is in the record.
                    let file = if at % 8 == 7 { record.as_ref().unwrap_or(&memory) } else { &memory };
                    let len = file.metadata().expect("a file").len() - 2;
                    let mut before = [0; 2];
                    file.read_exact_at(&mut before, at % len).expect("within it");
                    put(file, at % len, &word.to_le_bytes());
                    std::hint::spin_loop();
                    put(file, at % len, &before);
                }
                if changes.is_empty() {
                    return;
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
