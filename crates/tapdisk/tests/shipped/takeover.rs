//! A guest whose server dies or is stopped, and the next one that goes on where that one was.

use vhost_client::{Driver, Request, Status, Ticket, Wish};

use crate::guest::AskDevice;
use crate::server::{Bytes, CACHES, LONG, Server, durable, mount, pattern, rule, stored, wait_until};
use rustix::process::Signal;

const KIB: u64 = 1 << 10;
const BLOCK: u64 = 4096;

/// A guest whose requests are on record.
fn recorded(queues: u16) -> Wish {
    Wish { queues, queue_len: 64, inflight: true, ..Wish::default() }
}

#[track_caller]
fn all_ok(driver: &mut Driver, tickets: &[Ticket], how: &str) {
    for answer in driver.wait_all(tickets).unwrap() {
        assert_eq!(answer.status, Status::OK, "{how}");
    }
}

/// The nth number of a row that looks like chance (Vigna's SplitMix64).
fn chance(n: u64) -> u64 {
    let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn a_server_that_is_killed_again_and_again_loses_nothing_and_answers_each_request_once() {
    for (cache, queues) in CACHES.into_iter().zip([3, 2]) {
        let Some(fs) = mount() else { return };
        // Storage that is slow in three ways, so that requests overtake each other.
        rule(&fs, "write:delay=9:every=5");
        rule(&fs, "write:delay=2:every=2");
        rule(&fs, "read:delay=5:every=3");
        let mut server = Server::for_guest(&fs, &["--cache", cache]);
        let mut driver = server.guest(&recorded(queues));
        let blocks = 20 * u64::from(queues);
        let contents = |block: u64, death: u64| pattern(block * BLOCK, BLOCK, death as u8 + 1);
        for death in 0..12_u64 {
            let how = format!("{cache}, death {death}");
            let queue = |block: u64| (block % u64::from(queues)) as usize;
            let mut writes = Vec::new();
            for block in 0..blocks {
                let write = Request::write(block * BLOCK, &contents(block, death));
                let write = if block % 3 == 0 { write.indirect() } else { write };
                writes.push(driver.send(queue(block), &write).unwrap());
            }
            // It dies after some answers, or at once.
            let answered = (chance(death) % (blocks / 2)) as usize;
            all_ok(&mut driver, &writes[..answered], &how);
            server.kill();
            server = Server::for_guest(&fs, &["--cache", cache]);
            driver.reconnect(&server.guest_socket()).unwrap();
            all_ok(&mut driver, &writes[answered..], &how);
            // What the dead one may still have had under way must not land on what is written now.
            let again: Vec<u64> =
                (0..blocks).filter(|block| chance(death * 100 + block).is_multiple_of(2)).collect();
            let newer = |block: u64| contents(block, death + 100);
            let rewrites: Vec<_> = again
                .iter()
                .map(|block| {
                    let write = Request::write(block * BLOCK, &newer(*block));
                    driver.send(queue(*block), &write).unwrap()
                })
                .collect();
            all_ok(&mut driver, &rewrites, &how);
            for block in 0..blocks {
                let expected = if again.contains(&block) { newer(block) } else { contents(block, death) };
                assert_eq!(driver.read(block * BLOCK, BLOCK), Ok(expected), "{how}, block {block}");
            }
            assert_eq!(driver.open().unwrap(), 0, "{how}");
        }
        drop(driver);
        assert!(server.stop().status.success());
    }
}

#[test]
fn reads_that_were_under_way_at_a_death_give_what_is_on_the_disk() {
    let Some(fs) = mount() else { return };
    let mut server = Server::for_guest(&fs, &[]);
    let mut driver = server.guest(&recorded(2));
    for block in 0..32 {
        assert_eq!(driver.write(block * BLOCK, &pattern(block * BLOCK, BLOCK, 1)), Status::OK);
    }
    rule(&fs, "read:delay=30:every=2");
    for death in 0..5 {
        let reads: Vec<_> = (0..32)
            .map(|block| {
                let read = Request::read(block * BLOCK, BLOCK as usize);
                let read = if block % 2 == 0 { read.indirect() } else { read };
                driver.send(block as usize % 2, &read).unwrap()
            })
            .collect();
        server.kill();
        server = Server::for_guest(&fs, &[]);
        driver.reconnect(&server.guest_socket()).unwrap();
        for (block, answer) in driver.wait_all(&reads).unwrap().into_iter().enumerate() {
            assert_eq!((answer.status, answer.used), (Status::OK, 4097), "death {death}");
            assert_eq!(Bytes(answer.bytes), pattern(block as u64 * BLOCK, BLOCK, 1), "death {death}");
        }
    }
}

#[test]
fn a_successor_begins_when_the_last_write_of_the_dead_is_over_and_not_before() {
    let Some(fs) = mount() else { return };
    let server = Server::for_guest(&fs, &[]);
    let mut driver = server.guest(&recorded(1));
    rule(&fs, "write:hang:once");
    let stuck = driver.send(0, &Request::write(0, &pattern(0, BLOCK, 1))).unwrap();
    assert!(fs.wait_hanging(1, LONG));
    let written = fs.counters().writes;
    server.signal(Signal::KILL);
    let successor = Server::start_for_guest(&fs, &[]);
    successor.wait_for_log("the image is in use: waiting up to 30 s");
    assert!(!successor.guest_socket().exists(), "nobody can connect");
    assert_eq!((fs.counters().writes, driver.open().unwrap()), (written, 1));
    assert_eq!(fs.release(), 1);
    successor.wait_ready();
    driver.reconnect(&successor.guest_socket()).unwrap();
    all_ok(&mut driver, &[stuck], "done once more");
    assert_eq!(driver.write(0, &pattern(0, BLOCK, 2)), Status::OK);
    assert_eq!(driver.flush(), Status::OK);
    assert_eq!(durable(&fs, 0, BLOCK), pattern(0, BLOCK, 2), "nothing late lands on newer data");
    drop(driver);
    assert!(successor.stop().status.success());
    drop(server);
}

#[test]
fn poison_outlives_a_crash_and_the_guest_goes_on_hearing_of_it() {
    for cache in CACHES {
        let Some(fs) = mount() else { return };
        let state = tempfile::tempdir().unwrap();
        let words = ["--cache", cache, "--state-dir", state.path().to_str().unwrap()];
        let mut server = Server::for_guest(&fs, &words);
        let mut driver = server.guest(&recorded(1));
        assert_eq!(driver.write(0, &pattern(0, BLOCK, 1)), Status::OK);
        rule(&fs, "fsync:EIO:once,lose");
        assert_eq!(driver.flush(), Status::IOERR);
        for _ in 0..2 {
            server.kill();
            server = Server::for_guest(&fs, &words);
            driver.reconnect(&server.guest_socket()).unwrap();
            assert_eq!(driver.flush(), Status::IOERR, "{cache}");
            assert_eq!(driver.write(8192, &[1; 512]), Status::IOERR, "{cache}");
            assert_eq!(driver.status(&Request::zeroes(0, BLOCK, true)), Status::IOERR, "{cache}");
            assert_eq!(driver.status(&Request::discard(0, BLOCK)), Status::IOERR, "{cache}");
        }
        // Whoever stops it learns of it, but the guest lives on and may still believe what it was told.
        assert_eq!(server.stop().status.code(), Some(1), "{cache}");
        server = Server::for_guest(&fs, &words);
        driver.reconnect(&server.guest_socket()).unwrap();
        assert_eq!(driver.flush(), Status::IOERR, "{cache}: not by a restart under it");
        drop(driver);
        server.wait_for_log("front end disconnected");
        assert_eq!(server.stop().status.code(), Some(1), "{cache}");
        server = Server::for_guest(&fs, &words);
        let mut driver = server.guest(&recorded(1));
        assert_eq!(driver.write(0, &pattern(0, BLOCK, 2)), Status::OK, "{cache}: a new beginning");
        assert_eq!(driver.flush(), Status::OK, "{cache}");
        drop(driver);
        assert!(server.stop().status.success());
    }
}

#[test]
fn a_guest_without_a_write_cache_has_none_at_the_successor_either() {
    let Some(fs) = mount() else { return };
    let mut server = Server::for_guest(&fs, &[]);
    let mut driver = server.guest(&recorded(1));
    driver.set_writeback(false).unwrap();
    for number in 0..3 {
        server.kill();
        server = Server::for_guest(&fs, &[]);
        driver.reconnect(&server.guest_socket()).unwrap();
        // The guest was told once, and sends no flush.
        assert_eq!(driver.write(0, &pattern(0, BLOCK, number)), Status::OK);
        assert_eq!(durable(&fs, 0, BLOCK), pattern(0, BLOCK, number));
        assert_eq!(driver.config().unwrap().writeback(), 0);
    }
}

/// Fills a disk that holds what finds no space: 16 writes of 64 KiB, of which four have room.
fn fill_up(fs: &faultfs::FaultFs, server: &Server<'_>, driver: &mut Driver) -> (Vec<Bytes>, Vec<Ticket>) {
    fs.set_capacity(Some(256 * KIB));
    let contents: Vec<_> = (0..16).map(|number| pattern(number * 64 * KIB, 64 * KIB, 5)).collect();
    let send = |(number, bytes): (usize, &Bytes)| {
        driver.send(number % 2, &Request::write(number as u64 * 64 * KIB, bytes)).unwrap()
    };
    let tickets = contents.iter().enumerate().map(send).collect();
    server.wait_for_log("requests that fail are held until the cause is gone");
    wait_until("all that have no space are held", || {
        server.signal(Signal::USR1);
        (12..=16).any(|held| server.stderr().contains(&format!("0 in flight, {held} held")))
    });
    (contents, tickets)
}

#[test]
fn what_is_held_when_a_server_is_stopped_is_done_by_the_next_one_that_finds_space() {
    let Some(fs) = mount() else { return };
    let words = ["--on-enospc", "hold"];
    let server = Server::for_guest(&fs, &words);
    let mut driver = server.guest(&recorded(2));
    let (contents, tickets) = fill_up(&fs, &server, &mut driver);
    let ended = server.stop();
    assert!(ended.status.success(), "{}", ended.stderr);
    let left = driver.open().unwrap();
    assert!(left >= 12, "{left} are left to the successor");
    let server = Server::for_guest(&fs, &words);
    driver.reconnect(&server.guest_socket()).unwrap();
    server.wait_for_log("requests that fail are held until the cause is gone");
    assert_eq!(driver.open().unwrap(), left, "there is no more space than before");
    fs.set_capacity(None);
    all_ok(&mut driver, &tickets, "the guest never hears of it");
    for (number, bytes) in contents.iter().enumerate() {
        assert_eq!(stored(&fs, number as u64 * 64 * KIB, 64 * KIB), *bytes);
    }
    drop(driver);
    assert!(server.stop().status.success());
}

#[test]
fn what_is_held_for_a_guest_without_a_record_gets_its_error_when_the_server_is_stopped() {
    let Some(fs) = mount() else { return };
    let server = Server::for_guest(&fs, &["--on-enospc", "hold"]);
    let mut driver = server.guest(&Wish { queues: 2, ..Wish::default() });
    let (contents, tickets) = fill_up(&fs, &server, &mut driver);
    server.signal(Signal::TERM);
    let answers = driver.wait_all(&tickets).unwrap();
    for (number, answer) in answers.iter().enumerate() {
        let is_there = stored(&fs, number as u64 * 64 * KIB, 64 * KIB) == contents[number];
        assert_eq!(answer.status, if is_there { Status::OK } else { Status::IOERR });
    }
    assert!(answers.iter().filter(|answer| answer.status == Status::IOERR).count() >= 12);
    assert!(server.ended().status.success());
}

#[test]
fn told_to_stop_it_answers_what_storage_works_on_and_then_hangs_up() {
    let Some(fs) = mount() else { return };
    for wish in [recorded(2), Wish { queues: 2, ..Wish::default() }] {
        let server = Server::for_guest(&fs, &[]);
        let mut driver = server.guest(&wish);
        rule(&fs, "write:hang");
        let tickets: Vec<_> = (0..8)
            .map(|block| {
                let write = Request::write(block * BLOCK, &pattern(block * BLOCK, BLOCK, 6));
                driver.send(block as usize % 2, &write).unwrap()
            })
            .collect();
        assert!(fs.wait_hanging(8, LONG));
        server.signal(Signal::TERM);
        server.wait_for_log("told to stop");
        assert_eq!(driver.open().unwrap(), 8);
        fs.clear();
        fs.release();
        all_ok(&mut driver, &tickets, "answered by the one that took them");
        assert!(server.ended().status.success());
        assert_eq!(
            stored(&fs, 0, 8 * BLOCK),
            Bytes((0..8).flat_map(|block| pattern(block * BLOCK, BLOCK, 6).0).collect())
        );
    }
}
