//! A guest's memory: what is found in it, what is refused, and what becomes of it when its file is cut short.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use block::Buf;

use super::super::memory::{Memory, Outside, RegionError, RegionSpec};
use super::ram::{Ram, USER};
use crate::fault;
use crate::mapping::Mapping;

const MIB: u64 = 1 << 20;

fn lens(buf: &Buf) -> Vec<usize> {
    buf.segments().iter().map(|piece| piece.len()).collect()
}

#[test]
fn bytes_are_found_where_the_guest_has_them() {
    // Two regions side by side, told in the other order, and one at the end of all addresses.
    let last = u64::MAX - 0xfff;
    let ram = Ram::new(&[(0x3000, 0x1000), (0x1000, 0x2000), (last, 0xfff)]);
    let memory = ram.memory();
    ram.write(0x2ffe, b"abcd");
    for (at, len, pieces) in [
        (0x1000, 0x2000, vec![0x2000]),
        (0x2ffe, 4, vec![2, 2]),
        (0x3000, 0x1000, vec![0x1000]),
        (last, 0xfff, vec![0xfff]),
    ] {
        let buf = memory.buf(at, len).unwrap();
        assert_eq!(lens(&buf), pieces);
        assert_eq!(buf.to_vec(), ram.read(at, len));
    }
    let mut bytes = [0; 4];
    memory.read(0x2ffe, &mut bytes).unwrap();
    assert_eq!(&bytes, b"abcd");
    memory.byte(0x3001).unwrap().put(b'x');
    memory.buf(0x2ffe, 4).unwrap().put(0, b"ABC");
    assert_eq!(ram.read(0x2ffe, 4), b"ABCx");
}

#[test]
fn bytes_of_every_length_and_alignment_are_copied() {
    let ram = Ram::new(&[(0, 0x1000), (0x1000, 0x1000)]);
    let memory = ram.memory();
    let all: Vec<u8> = (0..0x2000).map(|at| (at % 251) as u8).collect();
    ram.write(0, &all);
    // Within a region, and across two.
    for start in (64..80).chain(0xfd0..0x1000) {
        for len in 0..=40 {
            let mut bytes = vec![0xee; len + 2];
            memory.read(start, &mut bytes[1..=len]).unwrap();
            let from = start as usize;
            assert_eq!(bytes[1..=len], all[from..from + len], "{len} bytes from {start}");
            assert_eq!((bytes[0], bytes[len + 1]), (0xee, 0xee), "and no others");
        }
        let from = start as usize;
        let expected = u128::from_le_bytes(all[from..from + 16].try_into().unwrap());
        assert_eq!(memory.u128(start).unwrap(), expected);
    }
}

#[test]
fn bytes_that_are_not_all_there_are_refused() {
    let last = u64::MAX - 0xfff;
    let memory = Ram::new(&[(0x1000, 0x1000), (0x3000, 0x1000), (last, 0xfff)]).memory();
    for (at, len) in [
        (0xfff, 1),
        (0xfff, 2),
        (0x1fff, 2),
        (0x1000, 0x2001),
        (0x2000, 0x1000),
        (0x3fff, 2),
        (0x4000, 1),
        (last, 0x1000),
        (u64::MAX, 1),
        (u64::MAX - 1, usize::MAX),
    ] {
        assert_eq!(
            memory.buf(at, len).err(),
            Some(Outside::Hole { at, len: len as u64 }),
            "{len} bytes at {at:#x}"
        );
    }
    let mut bytes = [0; 2];
    assert!(memory.read(0x1fff, &mut bytes).is_err());
    assert!(memory.byte(0x2000).is_err());
}

#[test]
fn rings_are_found_by_the_front_ends_addresses() {
    let ram = Ram::new(&[(0x1000, 0x1000), (0x2000, 0x1000)]);
    let memory = ram.memory();
    assert!(memory.words(USER + 0x1000, 0x1000).is_ok());
    assert!(memory.words(USER + 0x1800, 0x801).is_err(), "not over two regions");
    assert!(memory.words(USER + 0xfff, 1).is_err());
    assert!(memory.words(0x1000, 16).is_err(), "an address of the guest");
    assert!(memory.words(u64::MAX, usize::MAX).is_err());
}

fn memfd(len: u64) -> OwnedFd {
    let file = File::from(rustix::fs::memfd_create("short", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file.into()
}

#[test]
fn regions_that_cannot_be_are_refused() {
    let map = |guest, len, user, offset| {
        let spec = RegionSpec { guest, len, user, offset };
        Memory::default().replaced_by(vec![(spec, memfd(0x3000))], None).err().map(|error| error.to_string())
    };
    assert_eq!(map(0, 0x3000, USER, 0), None);
    assert_eq!(map(0, 0x1000, USER, 0x1234), None, "in the middle of a page");
    for (guest, len, user, offset) in [
        (0, 0, USER, 0),
        (u64::MAX, 0x1000, USER, 0),
        (0, 0x1000, u64::MAX - 0xffe, 0),
        (0, 0x3001, USER, 0),
        (0, 0x1000, USER, 0x2001),
        (0, 0x1000, USER, u64::MAX - 0xfff),
        (0, u64::MAX, 1, 0),
        (0, i64::MAX as u64, 1, 1),
    ] {
        assert!(map(guest, len, user, offset).is_some(), "{guest:#x} {len:#x} {user:#x} {offset:#x}");
    }
    let short = map(0, 0x2000, USER, 0x1001).unwrap();
    assert_eq!(short, "a region of 8192 bytes from byte 4097 of a file of 12288 bytes");
}

#[test]
fn a_region_in_what_is_no_memory_is_refused() {
    let zero = File::options().read(true).write(true).open("/dev/zero").unwrap();
    let spec = RegionSpec { guest: 0, len: 0x1000, user: USER, offset: 0 };
    let refused = Memory::default().with(spec, zero.as_fd(), None).err().unwrap();
    assert!(refused.to_string().contains("a file or a DAX device is expected"), "{refused}");
}

#[test]
fn a_region_starts_where_it_is_said_to_in_its_file() {
    let file = File::from(memfd(0x3000));
    std::os::unix::fs::FileExt::write_all_at(&file, b"here", 0x1234).unwrap();
    let spec = RegionSpec { guest: 0x5000, len: 0x100, user: USER, offset: 0x1234 };
    let memory = Memory::default().replaced_by(vec![(spec, file.into())], None).unwrap();
    assert_eq!(memory.buf(0x5000, 4).unwrap().to_vec(), b"here");
    assert!(memory.buf(0x5000, 0x101).is_err(), "no more than the region, though the page goes on");
}

#[test]
fn regions_do_not_overlap() {
    let spec = |guest, user| RegionSpec { guest, len: 0x1000, user, offset: 0 };
    let two = |a, b| {
        Memory::default()
            .replaced_by(vec![(a, memfd(0x1000)), (b, memfd(0x1000))], None)
            .map(|memory| memory.count())
    };
    assert_eq!(two(spec(0, USER), spec(0x1000, USER + 0x1000)), Ok(2));
    assert_eq!(two(spec(0, USER), spec(0x1000, USER)), Ok(2), "shown twice");
    for other in [spec(0, USER + MIB), spec(0xfff, USER + MIB)] {
        assert!(matches!(two(spec(0, USER), other), Err(RegionError::Overlap { .. })), "{other:?}");
        assert!(matches!(two(other, spec(0, USER)), Err(RegionError::Overlap { .. })), "{other:?}");
    }
}

/// A file that is larger than any guest, and takes no room.
fn huge() -> OwnedFd {
    memfd(1 << 43)
}

#[test]
fn a_front_end_has_so_much_address_space_and_no_more() {
    const TIB: u64 = 1 << 40;
    let spec = |nth: u64, len: u64| RegionSpec { guest: nth << 44, len, user: nth << 44, offset: 0 };
    let fd = huge();
    let one = Memory::default().with(spec(1, 3 * TIB), fd.as_fd(), None).unwrap();
    let more = |memory: &Memory, len: u64| memory.with(spec(2, len), fd.as_fd(), None).map(drop);
    let refused = more(&one, TIB).unwrap_err().to_string();
    assert!(refused.contains("4398046511104 that a front end may have mapped"), "{refused}");
    assert_eq!(more(&one, TIB - (1 << 20)), Ok(()));
    // What is replaced counts for as long as something of it is in use, and no longer.
    let buf = one.buf(1 << 44, 1).unwrap();
    let none = one.replaced_by(Vec::new(), None).unwrap();
    drop(one);
    assert!(more(&none, 2 * TIB).is_err());
    drop(buf);
    assert_eq!(more(&none, 2 * TIB), Ok(()));
    // Another front end has its own.
    let other = Memory::default().with(spec(1, 3 * TIB), fd.as_fd(), None).unwrap();
    assert_eq!((more(&none, 2 * TIB), other.count()), (Ok(()), 1));
}

#[test]
fn a_front_end_has_so_many_mappings_and_no_more() {
    // 509 regions, as many that I/O keeps, and 8.
    let fd = memfd(0x1000);
    let spec = RegionSpec { guest: 0, len: 0x1000, user: USER, offset: 0 };
    let mut memory = Memory::default();
    let mut kept = Vec::new();
    for _ in 0..1026 {
        memory = memory.replaced_by(vec![(spec, fd.try_clone().unwrap())], None).unwrap();
        kept.push(memory.byte(0).unwrap());
    }
    let again = |memory: &Memory| memory.replaced_by(vec![(spec, fd.try_clone().unwrap())], None).map(drop);
    let refused = again(&memory).unwrap_err().to_string();
    assert!(refused.contains("1026 are mapped already"), "{refused}");
    kept.pop();
    assert!(again(&memory).is_err(), "it is still the guest's");
    kept.pop();
    assert_eq!(again(&memory), Ok(()));
}

#[test]
fn regions_come_and_go() {
    let ram = Ram::new(&[(0, 0x1000), (0x1000, 0x1000)]);
    let all = ram.memory();
    let spec = ram.regions()[0].0;
    // "The memory region to be removed is identified by its guest address, user address and size."
    let one = all.without(RegionSpec { offset: 77, ..spec }).unwrap();
    assert_eq!((one.count(), all.count()), (1, 2));
    assert!(one.buf(0, 1).is_err() && one.buf(0x1000, 1).is_ok());
    for other in [
        RegionSpec { guest: 1, ..spec },
        RegionSpec { len: 0xfff, ..spec },
        RegionSpec { user: USER + 1, ..spec },
    ] {
        assert!(all.without(other).is_none());
    }
}

/// How many mappings of files of this name the process has.
fn mapped(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(name)).count()
}

#[test]
fn a_region_is_unmapped_after_its_last_piece() {
    let fd = rustix::fs::memfd_create("unmapped-last", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 0x2000).unwrap();
    let spec = RegionSpec { guest: 0, len: 0x2000, user: USER, offset: 0 };
    let memory = Memory::default().replaced_by(vec![(spec, fd)], None).unwrap();
    let (buf, byte, words) = (memory.buf(0, 16).unwrap(), memory.byte(20), memory.words(USER, 8));
    assert_eq!(mapped("unmapped-last"), 1);
    drop(memory);
    let part = buf.slice(3, 5);
    drop(buf);
    part.put(0, b"still");
    drop(part);
    drop(words);
    assert_eq!(mapped("unmapped-last"), 1);
    drop(byte);
    assert_eq!(mapped("unmapped-last"), 0);
}

#[test]
fn nobody_may_touch_what_lies_around_a_region() {
    let fd = rustix::fs::memfd_create("with-guards", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 0x3000).unwrap();
    let spec = RegionSpec { guest: 0, len: 0x1000, user: USER, offset: 0x1000 };
    let memory = Memory::default().replaced_by(vec![(spec, fd)], None).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let lines: Vec<Vec<&str>> = maps.lines().map(|line| line.split([' ', '-']).collect()).collect();
    let nth = maps.lines().position(|line| line.contains("with-guards")).unwrap();
    let (before, region, behind) = (&lines[nth - 1], &lines[nth], &lines[nth + 1]);
    assert_eq!((before[1], region[1]), (region[0], behind[0]), "side by side");
    assert!(maps.lines().nth(nth - 1).unwrap().contains(" ---p "), "{before:?}");
    assert!(maps.lines().nth(nth + 1).unwrap().contains(" ---p "), "{behind:?}");
    drop(memory);
}

#[test]
fn a_file_that_is_cut_short_does_no_harm() {
    let ram = Ram::new(&[(0, 0x4000), (0x4000, 0x4000)]);
    let memory = ram.memory();
    ram.write(0, &[7; 0x4000]);
    let (first, second) = (memory.buf(0, 0x1000).unwrap(), memory.buf(0x1000, 0x1000).unwrap());
    let words = memory.words(USER + 0x2000, 64).unwrap();
    ram.file(0).set_len(0x1000).unwrap();
    assert!(memory.is_whole(), "nobody has looked yet");
    assert_eq!(second.to_vec(), [0; 0x1000], "zeroes, and no SIGBUS");
    assert!(!memory.is_whole() && words.is_broken() && fault::count() > 0);
    assert_eq!(first.to_vec(), [0; 0x1000], "nor is anything else of it believed");
    assert_eq!(memory.buf(0, 1).err(), Some(Outside::Gone { at: 0 }));
    assert_eq!(memory.byte(0).err(), Some(Outside::Gone { at: 0 }));
    assert_eq!(memory.words(USER, 8).err(), Some(Outside::Gone { at: USER }));
    // Written as well as read.
    words.put_u16(0, 1, std::sync::atomic::Ordering::Relaxed);
    // Others are not touched.
    assert!(memory.buf(0x4000, 0x4000).is_ok());
    assert!(ram.memory_of(1).is_whole());
}

/// How many mappings of the process these bytes are in.
fn mappings_of(buf: &Buf) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let (start, len) = (buf.segments()[0].ptr().addr(), buf.len());
    let is_in = |line: &&str| {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let number = |hex| usize::from_str_radix(hex, 16).unwrap();
        number(from) < start + len && start < number(to)
    };
    maps.lines().filter(is_in).count()
}

#[test]
fn a_file_that_is_cut_short_stays_one_mapping() {
    // The process may have 65530 of them (vm.max_map_count).
    let ram = Ram::new(&[(0, 0x20000)]);
    let memory = ram.memory();
    let whole = memory.buf(0, 0x20000).unwrap();
    assert_eq!(mappings_of(&whole), 1);
    let pages: Vec<Buf> = (0..16).map(|nth| memory.buf(0x2000 * nth, 0x1000).unwrap()).collect();
    ram.file(0).set_len(0).unwrap();
    for page in &pages {
        page.put(0, &[1]);
    }
    assert_eq!(mappings_of(&whole), 1);
    drop((memory, whole));
    assert_eq!(pages[7].to_vec()[..2], [1, 0], "still there");
}

#[test]
fn a_broken_mapping_is_forgotten_when_it_goes() {
    // Elsewhere, since other tests break mappings too.
    if is_child() {
        let rams = [Ram::new(&[(0, 0x2000)]), Ram::new(&[(0, 0x2000)])];
        let memories = rams.each_ref().map(Ram::memory);
        assert_eq!(fault::count(), 0);
        for (ram, memory) in rams.iter().zip(&memories) {
            ram.file(0).set_len(0).unwrap();
            for at in [0, 0x1000] {
                assert_eq!(memory.read(at, &mut [0]), Err(Outside::Gone { at }));
            }
        }
        assert_eq!(fault::count(), 2);
        let [first, second] = memories;
        drop(first);
        assert!(fault::count() == 1 && !second.is_whole());
        drop(second);
        assert_eq!(fault::count(), 0);
        assert!(Ram::new(&[(0, 0x2000)]).memory().is_whole(), "in the place of a broken one");
        return;
    }
    let status = in_child("a_broken_mapping_is_forgotten_when_it_goes");
    assert!(status.success(), "{status}");
}

#[test]
fn a_file_that_is_cut_short_while_it_is_read_is_noticed() {
    let ram = Ram::new(&[(0, 0x2000)]);
    let memory = ram.memory();
    ram.file(0).set_len(0x1000).unwrap();
    let mut bytes = [1; 0x800];
    assert_eq!(memory.read(0xffc, &mut bytes), Err(Outside::Gone { at: 0xffc }));
}

/// Runs a test of this file in a process of its own, where it finds `TAPDISK_TEST_CHILD` set; how that ended.
fn in_child(test: &str) -> std::process::ExitStatus {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &format!("vhost::tests::memory::{test}"), "--test-threads=1"]);
    child.env("TAPDISK_TEST_CHILD", "1").output().unwrap().status
}

fn is_child() -> bool {
    std::env::var_os("TAPDISK_TEST_CHILD").is_some()
}

#[test]
fn other_memory_that_is_gone_ends_the_process_as_ever() {
    if is_child() {
        // Not a guest's: a mapping without a watch.
        let ram = Ram::new(&[(0, 0x1000)]);
        let memory = ram.memory();
        ram.file(0).set_len(0).unwrap();
        assert_eq!(memory.read(0, &mut [0]), Err(Outside::Gone { at: 0 }), "the handler is in place");
        let fd = memfd(0x1000);
        let mapping = Mapping::new_unwatched(&fd, 0x1000);
        File::from(fd).set_len(0).unwrap();
        let byte = mapping.words(0, 8).unwrap().u8(0, std::sync::atomic::Ordering::Relaxed);
        unreachable!("read {byte}");
    }
    let status = in_child("other_memory_that_is_gone_ends_the_process_as_ever");
    assert_eq!(status.signal(), Some(7), "SIGBUS: {status}");
}
