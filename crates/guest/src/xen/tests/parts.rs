//! The parts by themselves: a ring's indices and events, what a journal refuses, pages that are kept.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};

use ::xen::fake::{Deed, Fate, Guest, World};
use ::xen::grants::{Access, Piece};
use ::xen::{Domain, PAGE};
use block::Errno;

use super::super::device::{Connection, Offered, Start};
use super::super::journal::{Journal, JournalError, Shape};
use super::super::kept::{Kept, PAGES_MAX};
use super::super::layout::{Abi, REQUEST_MAX, Raw};
use super::super::ring::{Ring, RingError};
use super::front::{self, Front};
use crate::words::Words;

fn guest(world: &World) -> Guest {
    world.domain(Domain(3), 64)
}

fn ring(world: &World, front: &Front) -> Ring {
    let words = Words::granted(&*world.grants(), front.guest.domain(), &front.refs).unwrap();
    let pages = front.refs.len();
    Ring::new(words, front.abi.layout(), front.abi.layout().ring_size(pages))
}

fn connection(front: &Front, start: Start) -> Connection {
    let offered = Offered { flush_cache: true, barrier: true, discard: true, indirect: 0, block: 512 };
    let (domain, rings) = (front.guest.domain(), vec![front.spec()]);
    Connection { domain, abi: front.abi, rings, offered, persistent: false, start }
}

#[test]
fn requests_are_taken_and_answered_round_the_ring_in_each_layout_and_size() {
    for (abi, pages, start) in
        [(Abi::X86_64, 1, 0), (Abi::X86_32, 1, u32::MAX - 3), (Abi::Native, 16, 7), (Abi::X86_32, 4, 1 << 31)]
    {
        let world = World::new();
        let mut front = Front::new(&guest(&world), abi, 1, pages, start);
        let mut ring = ring(&world, &front);
        assert_eq!(u32::from(ring.size()), front.size);
        for round in 0..3 {
            for nth in 0..front.size {
                front.put(&front::request(abi, 3, u64::from(round << 16 | nth) << 20, u64::MAX, &[]));
            }
            assert!(!ring.has_news());
            assert!(ring.peek().unwrap().is_none());
            front.show();
            assert!(ring.has_news());
            for nth in 0..front.size {
                let raw = ring.peek().unwrap().expect("as many were made");
                assert_eq!(raw.id(), u64::from(round << 16 | nth) << 20);
                assert_eq!(ring.advance(), start.wrapping_add(round * front.size + nth));
                ring.stage(raw.id(), raw.operation(), -1);
            }
            assert!(ring.peek().unwrap().is_none());
            assert_eq!(front.responses(), [], "nothing is seen before it is published");
            ring.publish();
            let expected: Vec<_> =
                (0..front.size).map(|nth| (u64::from(round << 16 | nth) << 20, 3, -1)).collect();
            assert_eq!(front.responses(), expected);
        }
    }
}

#[test]
fn a_front_end_is_rung_for_when_it_has_asked_for_it() {
    let world = World::new();
    let mut front = Front::new(&guest(&world), Abi::X86_64, 1, 1, u32::MAX - 1);
    let mut ring = ring(&world, &front);
    let answer = |front: &mut Front, ring: &mut Ring, count: u32| {
        for _ in 0..count {
            front.ask(&front::request(Abi::X86_64, 3, 0, 0, &[]));
            ring.peek().unwrap().unwrap();
            ring.advance();
            ring.stage(0, 3, 0);
        }
        ring.publish()
    };
    // ring.h: the front end is rung for by the response that makes the index pass `rsp_event`.
    assert!(answer(&mut front, &mut ring, 1), "as it has asked at its start");
    assert!(!answer(&mut front, &mut ring, 1), "it has not asked again");
    front.responses();
    assert!(answer(&mut front, &mut ring, 3));
    front.guest.store(front.at + 12, front.made.wrapping_add(4));
    assert!(!answer(&mut front, &mut ring, 3), "the fourth is asked for");
    assert!(answer(&mut front, &mut ring, 1));
}

#[test]
fn a_back_end_asks_to_be_rung_for_the_next_request() {
    let world = World::new();
    let mut front = Front::new(&guest(&world), Abi::X86_64, 1, 1, u32::MAX);
    let mut ring = ring(&world, &front);
    let request = front::request(Abi::X86_64, 3, 0, 0, &[]);
    front.put(&request);
    assert!(front.show(), "as at the start of a ring");
    assert!(ring.arm(), "there is something already");
    ring.peek().unwrap().unwrap();
    ring.advance();
    front.put(&request);
    assert!(!front.show(), "it looks by itself");
    ring.peek().unwrap().unwrap();
    ring.advance();
    assert!(!ring.arm());
    assert_eq!(front.guest.load(front.at + 4), front.made.wrapping_add(1));
    front.put(&request);
    assert!(front.show());
}

#[test]
fn indices_that_cannot_be_stop_a_ring() {
    for (requests, is_good) in
        [(0, true), (1, true), (32, true), (33, false), (u32::MAX, false), (1 << 31, false)]
    {
        let world = World::new();
        let front = Front::new(&guest(&world), Abi::X86_64, 1, 1, 100);
        let mut ring = ring(&world, &front);
        front.guest.store(front.at, 100u32.wrapping_add(requests));
        assert_eq!(ring.peek().is_ok(), is_good, "{requests} requests");
    }
    // Requests cannot be taken back either.
    let world = World::new();
    let mut front = Front::new(&guest(&world), Abi::X86_64, 1, 1, 100);
    let mut ring = ring(&world, &front);
    front.ask(&front::request(Abi::X86_64, 3, 0, 0, &[]));
    ring.peek().unwrap().unwrap();
    ring.advance();
    front.guest.store(front.at, 100);
    let expected = RingError::Requests { requests: 100, taken: 101, answered: 100, size: 32 };
    assert_eq!(ring.peek().err(), Some(expected));
}

/// A journal's directory, and a front end's only ring.
struct Records {
    world: World,
    front: Front,
    directory: tempfile::TempDir,
}

impl Records {
    fn new() -> Records {
        let world = World::new();
        let front = Front::new(&guest(&world), Abi::X86_64, 1, 1, 100);
        Records { world, front, directory: tempfile::tempdir().unwrap() }
    }

    fn create(&self) -> Journal {
        let connection = connection(&self.front, Start::Fresh);
        let shape = Shape { size: 32, answered: 100 };
        Journal::create(self.directory.path(), &connection, 768, &[shape]).unwrap()
    }

    fn open_as(&self, connection: &Connection) -> Result<Journal, JournalError> {
        Journal::open(self.directory.path(), connection, 768, [32].into_iter())
    }

    fn open(&self) -> Result<Journal, JournalError> {
        self.open_as(&connection(&self.front, Start::TakeOver))
    }

    fn path(&self) -> std::path::PathBuf {
        self.directory.path().join("blkif-3-768")
    }
}

fn raw(number: u8) -> Raw {
    Raw { bytes: [number; REQUEST_MAX], layout: Abi::X86_64.layout() }
}

#[test]
fn what_is_taken_and_not_answered_is_found_in_the_order_of_requests() {
    let records = Records::new();
    let mut part = records.create().part(0);
    let layout = Abi::X86_64.layout();
    for (slot, index) in [(5, 104), (9, 101), (0, 103), (1, 102), (2, 100)] {
        part.take(slot, index, &raw(index as u8));
    }
    // One is published, one is being answered.
    part.stage(0, 100);
    part.published(&[0], 101);
    part.stage(1, 101);
    let mut part = records.open().unwrap().part(0);
    let left = part.recover(101, layout).unwrap();
    let left: Vec<(u16, u8)> = left.iter().map(|left| (left.slot, left.raw.bytes[111])).collect();
    assert_eq!(left, [(2, 100), (9, 101), (1, 102), (5, 104)]);
    // The response was seen after all, or it is for another to say.
    part.stage(1, 101);
    part.stage(2, 102);
    let left = records.open().unwrap().part(0).recover(102, layout).unwrap();
    assert_eq!(left.iter().map(|left| left.slot).collect::<Vec<_>>(), [2, 9, 5]);
}

#[test]
fn a_number_that_a_response_was_to_have_is_forgotten_with_who_was_to_give_it() {
    let records = Records::new();
    let mut part = records.create().part(0);
    part.take(0, 100, &raw(1));
    part.take(1, 101, &raw(2));
    part.stage(0, 100);
    // It dies before the response is seen. The next one gives that number to the other request, and dies too.
    let mut part = records.open().unwrap().part(0);
    assert_eq!(part.recover(100, Abi::X86_64.layout()).unwrap().len(), 2);
    part.stage(1, 100);
    part.published(&[1], 101);
    let left = records.open().unwrap().part(0).recover(101, Abi::X86_64.layout()).unwrap();
    assert_eq!(left.iter().map(|left| left.slot).collect::<Vec<_>>(), [0]);
}

#[test]
fn more_responses_than_were_given_are_not_believed() {
    let records = Records::new();
    let mut part = records.create().part(0);
    for slot in 0..3 {
        part.take(slot, 100 + u32::from(slot), &raw(1));
    }
    part.stage(0, 100);
    for (answered, is_good) in [(100, true), (101, true), (102, false), (99, false), (100 + (1 << 31), false)]
    {
        // What it finds it repairs: each time a copy.
        let bytes = fs::read(records.path()).unwrap();
        let found = records.open().unwrap().part(0).recover(answered, Abi::X86_64.layout());
        assert_eq!(found.is_ok(), is_good, "{answered}");
        let file = fs::File::options().write(true).open(records.path()).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
    }
}

#[test]
fn a_journal_of_something_else_is_refused() {
    let records = Records::new();
    assert!(matches!(records.open().err(), Some(JournalError::Missing { .. })));
    records.create();
    assert_eq!(fs::metadata(records.path()).unwrap().permissions().mode() & 0o777, 0o600);
    records.open().unwrap();
    let same = connection(&records.front, Start::TakeOver);
    let mut others = vec![same.clone(); 4];
    others[0].abi = Abi::X86_32;
    others[1].rings[0].port.0 += 1;
    others[2].rings[0].refs[0].0 += 1;
    others[3].rings[0].refs.push(::xen::grants::GrantRef(1));
    for other in &others {
        assert!(matches!(records.open_as(other).err(), Some(JournalError::Other { .. })), "{other:?}");
    }
    // Another boot, whose number is in the head.
    let bytes = fs::read(records.path()).unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let at = bytes.windows(36).position(|part| part == boot.trim().as_bytes()).expect("it names the boot");
    let file = fs::File::options().write(true).open(records.path()).unwrap();
    file.write_all_at(b"x", at as u64).unwrap();
    assert!(matches!(records.open().err(), Some(JournalError::Other { .. })));
    file.write_all_at(&bytes, 0).unwrap();
    records.open().unwrap();
    // A state that is none.
    file.write_all_at(&[9; 8], 4096 + 64).unwrap();
    let found = records.open().unwrap().part(0).recover(100, Abi::X86_64.layout());
    assert!(matches!(found.err(), Some(JournalError::Damaged(_))));
    file.set_len(4096).unwrap();
    assert!(matches!(records.open().err(), Some(JournalError::Other { .. })));
    // A link is not followed, whoever put it there.
    fs::rename(records.path(), records.directory.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", records.path()).unwrap();
    assert!(matches!(records.open().err(), Some(JournalError::File { .. })));
    drop(records.world);
}

#[test]
fn a_new_journal_takes_the_place_of_an_old_one_and_goes_when_nobody_needs_it() {
    let records = Records::new();
    records.create().part(0).take(3, 100, &raw(1));
    let journal = records.create();
    assert!(records.open().unwrap().part(0).recover(100, Abi::X86_64.layout()).unwrap().is_empty());
    journal.remove();
    assert_eq!(fs::read_dir(records.directory.path()).unwrap().count(), 0);
}

#[test]
fn a_journal_that_is_cut_short_is_noticed_and_survived() {
    let records = Records::new();
    let mut part = records.create().part(0);
    fs::File::options().write(true).open(records.path()).unwrap().set_len(0).unwrap();
    part.take(0, 100, &raw(1));
    assert!(part.is_broken());
}

#[test]
fn pages_that_stay_mapped_are_bounded_and_the_least_lately_used_go() {
    let world = World::new();
    let guest = world.domain(Domain(3), PAGES_MAX + 300);
    let grants = world.grants();
    let piece = |page| Piece { gref: guest.grant(page, Access::Write), offset: 0, len: 512 };
    let pieces: Vec<Piece> = (0..PAGES_MAX + 300).map(piece).collect();
    let mut kept = Kept::default();
    let map = |kept: &mut Kept, pieces: &[Piece]| kept.map(&*grants, Domain(3), pieces);
    // In use for all of the time.
    let first = map(&mut kept, &pieces[..2]).unwrap().unwrap();
    for piece in pieces[2..PAGES_MAX].chunks(11) {
        assert!(map(&mut kept, piece).unwrap().is_some());
    }
    assert_eq!((world.counts().mapped, world.counts().maps), (PAGES_MAX, PAGES_MAX as u64));
    // Used again, mapped before.
    assert!(map(&mut kept, &pieces[2..12]).unwrap().is_some());
    assert_eq!(world.counts().maps, PAGES_MAX as u64);
    assert!(map(&mut kept, &pieces[PAGES_MAX..PAGES_MAX + 20]).unwrap().is_some());
    assert!(world.counts().mapped <= PAGES_MAX && world.counts().mapped == kept.count());
    for (nth, is_kept) in [(0, 1), (1, 1), (2, 1), (11, 1), (12, 0), (13, 0), (PAGES_MAX - 1, 1)] {
        assert_eq!(guest.mappings(pieces[nth].gref), is_kept, "{nth}");
    }
    // As many as there may be are in use.
    drop(first);
    let all: Vec<_> =
        pieces[..PAGES_MAX].chunks(8).map(|pieces| map(&mut kept, pieces).unwrap().unwrap()).collect();
    assert!(map(&mut kept, &pieces[PAGES_MAX..=PAGES_MAX]).unwrap().is_none());
    assert_eq!(world.counts().mapped, PAGES_MAX);
    drop((all, kept));
    assert_eq!(world.counts().mapped, 0);
}

#[test]
fn a_page_that_cannot_be_mapped_leaves_the_others_and_nothing_behind() {
    for fails in 0..5 {
        let world = World::new();
        let guest = guest(&world);
        let piece = |page| Piece { gref: guest.grant(page, Access::Write), offset: 0, len: PAGE as u16 };
        let pieces: Vec<Piece> = (0..5).map(piece).collect();
        let mut kept = Kept::default();
        world.script(move |deed, nth| match deed {
            Deed::Map if nth == fails => Fate::Fail(Errno::ENOMEM),
            Deed::Map | Deed::Copy | Deed::Piece | Deed::Bind => Fate::Do,
        });
        assert_eq!(kept.map(&*world.grants(), Domain(3), &pieces).err(), Some(Errno::ENOMEM));
        assert_eq!(world.counts().mapped, fails as usize);
        assert!(kept.map(&*world.grants(), Domain(3), &pieces).unwrap().is_some());
        drop(kept);
        assert_eq!(world.counts().mapped, 0);
    }
}
