//! What the fake hypervisor lets happen, and what it does not.

use std::thread;
use std::time::Duration;

use block::Buf;

use super::*;
use crate::PAGE;
use crate::events::{Channel, Port};
use crate::grants::{Direction, Farewell, Piece, Transfer};

const GUEST: Domain = Domain(3);
const PATIENCE: Duration = Duration::from_secs(20);

fn transfer(direction: Direction, buf: &Buf, pieces: &[(GrantRef, u16, u16)]) -> Transfer {
    let pieces = pieces.iter().map(|(gref, offset, len)| Piece { gref: *gref, offset: *offset, len: *len });
    Transfer { direction, buf: buf.clone(), pieces: pieces.collect(), result: Ok(()) }
}

fn word_of(mapping: &crate::grants::Mapping, at: usize) -> &std::sync::atomic::AtomicU32 {
    assert!(at + 4 <= mapping.len());
    // SAFETY: within the mapping, which the reference borrows, and aligned; the guest uses it as an atomic too.
    unsafe { std::sync::atomic::AtomicU32::from_ptr(mapping.start().as_ptr().add(at).cast()) }
}

fn readable(channel: &dyn Channel) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let descriptor = channel.descriptor().unwrap();
    poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&Timespec::default())).unwrap() == 1
}

#[test]
fn mapped_pages_are_the_domains_own_in_the_order_asked_for() {
    let world = World::new();
    let guest = world.domain(GUEST, 8);
    let refs = [5, 2, 7].map(|page| guest.grant(page, Access::Write));
    let mapping = world.grants().map(GUEST, &refs, Access::Write).unwrap();
    assert_eq!(mapping.len(), 3 * PAGE);
    guest.store(2 * PAGE + 8, 0xfeed);
    assert_eq!(word_of(&mapping, PAGE + 8).load(Ordering::Relaxed), 0xfeed);
    word_of(&mapping, 2 * PAGE).store(0xcafe, Ordering::Relaxed);
    assert_eq!((guest.load(7 * PAGE), guest.load(6 * PAGE), guest.load(0)), (0xcafe, 0, 0));
}

#[test]
fn a_grant_ends_only_when_nobody_has_it_mapped_and_its_number_comes_back() {
    let world = World::new();
    let guest = world.domain(GUEST, 2);
    let (one, two) = (guest.grant(0, Access::Read), guest.grant(1, Access::Write));
    assert_ne!(one, two);
    let grants = world.grants();
    let first = grants.map(GUEST, &[one, two], Access::Read).unwrap();
    let second = grants.map(GUEST, &[one], Access::Read).unwrap();
    assert_eq!((guest.mappings(one), guest.mappings(two), world.counts().mapped), (2, 1, 3));
    assert_eq!(guest.end(one), Err(Errno::EBUSY));
    drop(first);
    assert_eq!((guest.end(one), guest.end(two)), (Err(Errno::EBUSY), Ok(())));
    drop(second);
    assert_eq!((guest.end(one), guest.end(one)), (Ok(()), Err(Errno::ENOENT)));
    assert_eq!((guest.mapped(), world.counts().mapped, guest.granted()), (0, 0, 0));
    assert_eq!(grants.map(GUEST, &[one], Access::Read).unwrap_err(), Errno::EINVAL);
    assert_eq!(guest.grant(1, Access::Write), one, "the one that ended last");
}

#[test]
fn a_number_that_somebody_has_chosen_is_not_given_to_another() {
    let world = World::new();
    let guest = world.domain(GUEST, 8);
    guest.grant_as(GrantRef(9), 5, Access::Read);
    let given = [0, 1, 2].map(|page| guest.grant(page, Access::Read));
    assert_eq!(given, [8, 10, 11].map(GrantRef));
    guest.end(GrantRef(9)).unwrap();
    guest.grant_as(GrantRef(9), 5, Access::Read);
    assert_eq!(guest.grant(3, Access::Read), GrantRef(12));
}

#[test]
fn what_is_granted_for_reading_is_not_written() {
    let world = World::new();
    let guest = world.domain(GUEST, 2);
    let (readable, writable) = (guest.grant(0, Access::Read), guest.grant(1, Access::Write));
    let grants = world.grants();
    assert_eq!(grants.map(GUEST, &[writable, readable], Access::Write).unwrap_err(), Errno::EINVAL);
    assert_eq!(world.counts().mapped, 0, "all or none");
    let buf = Buf::from_bytes(&[7; 512]);
    let mut transfers = [
        transfer(Direction::ToGuest, &buf, &[(readable, 0, 512)]),
        transfer(Direction::ToGuest, &buf, &[(writable, 512, 512)]),
        transfer(Direction::FromGuest, &buf, &[(GrantRef(99), 0, 512)]),
    ];
    grants.copy(GUEST, &mut transfers);
    assert_eq!(transfers.map(|transfer| transfer.result), [Err(Errno::EIO), Ok(()), Err(Errno::EINVAL)]);
    assert_eq!((guest.read(0, 512), guest.read(PAGE + 512, 512)), (vec![0; 512], vec![7; 512]));
}

#[test]
fn pieces_are_copied_to_where_they_belong_and_nowhere_else() {
    let world = World::new();
    let guest = world.domain(GUEST, 3);
    let refs = [2, 0].map(|page| guest.grant(page, Access::Write));
    let bytes: Vec<u8> = (0..1536).map(|at| (at % 251) as u8).collect();
    let buf = Buf::concat(vec![Buf::from_bytes(&bytes[..100]), Buf::from_bytes(&bytes[100..])]);
    let pieces = [(refs[0], 512, 512), (refs[1], 3072, 1024)];
    let grants = world.grants();
    let mut transfers = [transfer(Direction::ToGuest, &buf, &pieces)];
    grants.copy(GUEST, &mut transfers);
    assert_eq!(transfers[0].result, Ok(()));
    let mut expected = vec![0; 3 * PAGE];
    expected[2 * PAGE + 512..2 * PAGE + 1024].copy_from_slice(&bytes[..512]);
    expected[3072..4096].copy_from_slice(&bytes[512..]);
    assert!(guest.read(0, 3 * PAGE) == expected);
    let back = Buf::zeroed(1536);
    let mut transfers = [transfer(Direction::FromGuest, &back, &pieces)];
    grants.copy(GUEST, &mut transfers);
    assert_eq!(transfers[0].result, Ok(()));
    assert!(back.to_vec() == bytes);
}

#[test]
fn what_the_script_fails_is_not_done() {
    let world = World::new();
    let guest = world.domain(GUEST, 4);
    let refs: Vec<GrantRef> = (0..4).map(|page| guest.grant(page, Access::Write)).collect();
    world.script(|deed, nth| match (deed, nth) {
        (Deed::Map, 1) => Fate::Fail(Errno::ENOMEM),
        (Deed::Piece, 0) => Fate::Say(-1),
        (Deed::Piece, 2) => Fate::SayNothing,
        (Deed::Piece, 3) => Fate::Say(-12),
        (Deed::Bind, 0) => Fate::Fail(Errno::ENOSPC),
        _ => Fate::Do,
    });
    let grants = world.grants();
    let told: Vec<_> = (0..3).map(|_| grants.map(GUEST, &refs, Access::Read).err()).collect();
    assert_eq!(told, [None, Some(Errno::ENOMEM), None]);
    assert_eq!((world.counts().maps, world.counts().mapped), (3, 0));
    let buf = Buf::from_bytes(&[9; 512]);
    let mut transfers: Vec<_> =
        refs.iter().map(|gref| transfer(Direction::ToGuest, &buf, &[(*gref, 0, 512)])).collect();
    grants.copy(GUEST, &mut transfers);
    let results: Vec<_> = transfers.iter().map(|transfer| transfer.result).collect();
    assert_eq!(results, [Err(Errno::EIO), Ok(()), Err(Errno::EIO), Ok(())], "the last one was tried again");
    let first: Vec<u8> = (0..4).map(|page| guest.read(page * PAGE, 1)[0]).collect();
    assert_eq!(first, [0, 9, 0, 9]);
    assert_eq!(world.events().bind(GUEST, guest.offer()).err(), Some(Errno::ENOSPC));
    world.unscript();
    world.script(|deed, _| if deed == Deed::Copy { Fate::Fail(Errno::ENOMEM) } else { Fate::Do });
    grants.copy(GUEST, &mut transfers);
    assert!(transfers.iter().all(|transfer| transfer.result == Err(Errno::ENOMEM)));
}

#[test]
fn of_a_domain_that_dies_the_mapped_pages_stay_and_nothing_else() {
    let world = World::new();
    let guest = world.domain(GUEST, 2);
    let (gref, port) = (guest.grant(1, Access::Write), guest.offer());
    let (grants, events) = (world.grants(), world.events());
    let mapping = grants.map(GUEST, &[gref], Access::Write).unwrap();
    let channel = events.bind(GUEST, port).unwrap();
    world.destroy(GUEST);
    assert!(!guest.is_alive());
    assert_eq!((guest.mapped(), world.counts().bound), (1, 0));
    word_of(&mapping, 0).store(5, Ordering::Relaxed);
    channel.notify().unwrap();
    assert_eq!(grants.map(GUEST, &[gref], Access::Write).unwrap_err(), Errno::EINVAL);
    let mut transfers = [transfer(Direction::FromGuest, &Buf::zeroed(512), &[(gref, 0, 512)])];
    grants.copy(GUEST, &mut transfers);
    assert_eq!(transfers[0].result, Err(Errno::ENODEV));
    // Another domain of the same number has nothing to do with it.
    let next = world.domain(GUEST, 2);
    let (next_gref, next_port) = (next.grant(1, Access::Write), next.offer());
    assert_eq!((next_gref, next_port), (gref, port), "the same numbers");
    let next_channel = events.bind(GUEST, port).unwrap();
    drop((mapping, channel));
    assert_eq!((guest.mapped(), next.mappings(next_gref), next.is_bound(next_port)), (0, 0, true));
    drop(next_channel);
    assert!(!next.is_bound(next_port));
}

#[test]
fn a_channel_has_one_back_end_at_a_time_and_starts_pending() {
    let world = World::new();
    let guest = world.domain(GUEST, 1);
    let port = guest.offer();
    let events = world.events();
    assert_eq!(events.bind(GUEST, Port(port.0 + 1)).err(), Some(Errno::EINVAL));
    assert_eq!(events.bind(Domain(4), port).err(), Some(Errno::ESRCH));
    guest.ring(port); // nobody hears it
    let first = events.bind(GUEST, port).unwrap();
    assert_eq!(events.bind(GUEST, port).err(), Some(Errno::EINVAL));
    assert!(readable(&*first));
    first.take().unwrap();
    assert!(!readable(&*first));
    guest.ring(port);
    assert!(readable(&*first));
    drop(first);
    assert!(!guest.is_bound(port));
    let second = events.bind(GUEST, port).unwrap();
    assert!(readable(&*second), "what was rung meanwhile is not lost");
    second.take().unwrap();
    second.take().unwrap();
    second.notify().unwrap();
    second.notify().unwrap();
    assert_eq!((guest.rung(port), guest.rung(port)), (2, 0));
    guest.close(port);
    assert_eq!((world.counts().bound, second.notify()), (0, Ok(())));
}

#[test]
fn a_guest_waits_on_another_thread() {
    let world = World::new();
    let guest = world.domain(GUEST, 1);
    let port = guest.offer();
    let channel = world.events().bind(GUEST, port).unwrap();
    let waiting = thread::spawn(move || guest.wait(port, PATIENCE));
    channel.notify().unwrap();
    assert_eq!(waiting.join().unwrap(), 1);
}

#[test]
fn a_farewell_is_said_when_pages_are_unmapped() {
    let world = World::new();
    let guest = world.domain(GUEST, 2);
    let refs = [1, 0].map(|page| guest.grant(page, Access::Write));
    let port = guest.offer();
    let channel = world.events().bind(GUEST, port).unwrap();
    guest.write(0, &[0xff; 2 * PAGE]);
    let grants = world.grants();
    let map = |farewell| grants.map_telling(GUEST, &refs, Access::Write, farewell);
    let farewell = Farewell { clear: Some(PAGE + 5), ring: Some(channel.port()) };
    let mapping = map(farewell).unwrap();
    assert_eq!((guest.rung(port), guest.read(4, 3)), (0, vec![0xff; 3]));
    drop(mapping);
    assert_eq!((guest.rung(port), guest.read(4, 3)), (1, vec![0xff, 0, 0xff]));
    assert_eq!(map(Farewell { clear: Some(2 * PAGE), ring: None }).unwrap_err(), Errno::EINVAL);
    let of_nobody = Some(Port(channel.port().0 + 1));
    assert_eq!(map(Farewell { clear: None, ring: of_nobody }).unwrap_err(), Errno::EINVAL);
    assert_eq!(world.counts().mapped, 0);
}

#[test]
fn a_back_end_that_is_killed_lets_go_of_everything_and_its_remains_do_nothing() {
    let world = World::new();
    let guest = world.domain(GUEST, 2);
    let refs = [0, 1].map(|page| guest.grant(page, Access::Write));
    let port = guest.offer();
    let channel = world.events().bind(GUEST, port).unwrap();
    let farewell = Farewell { clear: Some(5), ring: Some(channel.port()) };
    let mapping = world.grants().map_telling(GUEST, &refs, Access::Write, farewell).unwrap();
    world.kill_back_ends();
    assert_eq!((world.counts().mapped, world.counts().bound, guest.mapped()), (0, 0, 0));
    assert_eq!((guest.mappings(refs[0]), guest.is_bound(port)), (0, false));
    guest.end(refs[0]).unwrap();
    let successor = world.events().bind(GUEST, port).unwrap();
    let second = world.grants().map(GUEST, &refs[1..], Access::Write).unwrap();
    guest.write(5, &[9]);
    drop((mapping, channel));
    assert_eq!((guest.read(5, 1), guest.rung(port)), (vec![9], 0), "no late farewell");
    assert_eq!((world.counts().mapped, world.counts().bound), (1, 1), "the successor's");
    assert!(guest.is_bound(port));
    drop((second, successor));
    assert_eq!((world.counts().mapped, world.counts().bound), (0, 0));
}
