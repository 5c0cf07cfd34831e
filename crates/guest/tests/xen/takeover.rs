//! A back end ends while its guest lives on, and another goes on with the same rings: each request has one answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blkfront::{Abi, Driver, Front, Request, Wish, state, status};
use block::{Errno, OpKind};
use guest::xen::{DataPath, Features};

use crate::disk::{Act, Seen, fresh};
use crate::serve::{Host, Outcome, Plan, SIZE, Served};

/// The ways in which a back end ends.
const WAYS: [fn(Served) -> Outcome; 2] = [Served::drain, Served::kill];

#[test]
fn what_is_held_at_the_end_is_done_by_the_successor() {
    for data in [DataPath::Copy, DataPath::Map] {
        for (persistent, queues, order) in [(false, 1, 0), (true, 2, 1)] {
            let host = Host::new();
            let hold =
                |nth: usize, _: &Seen| if nth.is_multiple_of(2) { Act::Hold(Errno::ENOSPC) } else { Act::Do };
            let served = host.serve(Plan { data, ..Plan::scripted(hold) });
            let mut front = host.connect(&Wish { persistent, queues, order, ..Wish::default() });
            let tickets: Vec<_> = (0..20_u8)
                .map(|nth| {
                    let request = Request::write(u64::from(nth), &[nth; 512]);
                    front.driver.send(usize::from(nth) % queues, &request).unwrap()
                })
                .collect();
            served.until_seen(20);
            let outcome = served.drain();
            assert!(outcome.left, "a guest lives on");
            assert_eq!(host.back("state").as_deref(), Some(state::CONNECTED), "it notices nothing");
            assert_eq!(front.driver.open().unwrap(), 10, "what was not held is answered");
            assert_eq!(host.world.counts().bound, 0, "the event channels are free for the successor");
            assert_eq!(host.journals().len(), 1);

            let served = host.serve(Plan { bytes: outcome.bytes, data, ..Plan::default() });
            for answer in front.driver.wait_all(&tickets).unwrap() {
                assert_eq!(answer.status, status::OKAY);
            }
            assert_eq!(served.count(OpKind::Write), 10, "each is done once more, and no other is");
            let expected: Vec<u8> = (0..20).flat_map(|nth| [nth; 512]).collect();
            let read = front.driver.ask(&Request::read(0, 20 * 512)).unwrap();
            assert!(read.bytes == expected);
            front.shut_down().unwrap();
            host.assert_let_go();
        }
    }
}

#[test]
fn sigterm_answers_what_storage_works_on() {
    let host = Host::new();
    let served = host.serve(Plan::scripted(|_, _| Act::Late(50_000)));
    let mut front = host.connect(&Wish { queues: 2, ..Wish::default() });
    let tickets: Vec<_> =
        (0..10).map(|nth| front.driver.send(nth as usize % 2, &Request::read(nth, 512)).unwrap()).collect();
    served.until_seen(10);
    let outcome = served.drain();
    assert!(outcome.left && outcome.end.is_none());
    for (nth, ticket) in tickets.into_iter().enumerate() {
        let answer = front.driver.wait(ticket).unwrap();
        assert!(answer.status == status::OKAY && answer.bytes == fresh(nth as u64 * 512, 512));
    }
    // What comes now waits for the successor.
    let late = front.driver.send(0, &Request::read(9, 512)).unwrap();
    let _served = host.serve(Plan::default());
    assert_eq!(front.driver.wait(late).unwrap().status, status::OKAY);
}

#[test]
fn what_is_on_its_way_when_a_back_end_vanishes_is_answered_by_its_successor() {
    for (persistent, data) in [(false, DataPath::Copy), (false, DataPath::Map), (true, DataPath::Map)] {
        let host = Host::new();
        let script = |nth: usize, _: &Seen| if nth.is_multiple_of(3) { Act::Stick } else { Act::Do };
        let served = host.serve(Plan { data, ..Plan::scripted(script) });
        let mut front = host.connect(&Wish { persistent, order: 1, ..Wish::default() });
        let tickets: Vec<_> = (0..30_u8)
            .map(|nth| {
                let request = match nth % 2 {
                    0 => Request::write(u64::from(nth), &[nth; 512]),
                    _ => Request::read(100 + u64::from(nth), 20 * 4096).indirect(),
                };
                front.driver.send(0, &request).unwrap()
            })
            .collect();
        served.until_seen(30);
        let outcome = served.kill();
        assert_eq!(host.back("state").as_deref(), Some(state::CONNECTED));
        let open = front.driver.open().unwrap();
        assert!(open >= 10, "{open} of those that storage worked on");

        let served = host.serve(Plan { bytes: outcome.bytes, data, ..Plan::default() });
        for (nth, answer) in front.driver.wait_all(&tickets).unwrap().into_iter().enumerate() {
            assert_eq!(answer.status, status::OKAY, "request {nth}");
            let expected = match nth % 2 {
                0 => Vec::new(),
                _ => fresh((100 + nth as u64) * 512, 20 * 4096),
            };
            assert!(answer.bytes == expected, "request {nth}");
        }
        assert_eq!(served.seen().len(), open, "just those that were not answered");
        front.shut_down().unwrap();
        host.assert_let_go();
    }
}

/// What a guest has written is what it reads, whoever serves it; it sees no error and nothing twice.
fn verify(mut driver: Driver, is_over: &AtomicBool) -> (Driver, u64) {
    let queues = driver.wish().queues;
    let mut versions = [0_u8; 64];
    let mut rounds = 0;
    while !is_over.load(Ordering::Relaxed) {
        let blocks: Vec<usize> = (0..16).map(|nth| (nth * 7 + rounds as usize * 5) % 64).collect();
        let writes: Vec<_> = blocks
            .iter()
            .map(|block| {
                versions[*block] = versions[*block].wrapping_add(1);
                let bytes = vec![versions[*block]; 4096 * (1 + block % 20)];
                // Blocks of up to 20 pages, 24 apart.
                let request = Request::write(*block as u64 * 192, &bytes);
                let request = if block % 20 > 10 { request.indirect() } else { request };
                driver.send(block % queues, &request).unwrap()
            })
            .collect();
        for answer in driver.wait_all(&writes).unwrap() {
            assert_eq!(answer.status, status::OKAY);
        }
        let reads: Vec<_> = blocks
            .iter()
            .map(|block| {
                driver.send((block + 1) % queues, &Request::read(*block as u64 * 192, 4096)).unwrap()
            })
            .collect();
        for (block, answer) in blocks.iter().zip(driver.wait_all(&reads).unwrap()) {
            assert_eq!(answer.status, status::OKAY);
            assert!(answer.bytes == vec![versions[*block]; 4096], "block {block}");
        }
        rounds += 1;
    }
    (driver, rounds)
}

#[test]
fn a_guest_under_load_does_not_notice_that_back_ends_come_and_go() {
    for (persistent, data, abi) in [
        (false, DataPath::Copy, Abi::X86_64),
        (false, DataPath::Map, Abi::X86_32),
        (true, DataPath::Map, Abi::Native),
    ] {
        let host = Host::new();
        let script = || {
            |nth: usize, _: &Seen| match nth % 5 {
                0 => Act::Late(700),
                1 => Act::Late(100),
                _ => Act::Do,
            }
        };
        let bytes = fresh(0, 2 * SIZE);
        let mut served = host.serve(Plan { bytes, data, ..Plan::scripted(script()) });
        let front = host.connect(&Wish { persistent, queues: 3, order: 1, abi, ..Wish::default() });
        let is_over = Arc::new(AtomicBool::new(false));
        let (driver, told, over) = (front.driver, front.told, is_over.clone());
        assert_eq!(told.sectors, 2 * SIZE as u64 / 512);
        let guest = std::thread::spawn(move || verify(driver, &over));
        for turn in 0..12 {
            std::thread::sleep(Duration::from_millis(30));
            let outcome = WAYS[turn % 2](served);
            assert_eq!(outcome.end, None, "turn {turn}");
            served = host.serve(Plan { bytes: outcome.bytes, data, ..Plan::scripted(script()) });
        }
        std::thread::sleep(Duration::from_millis(30));
        is_over.store(true, Ordering::Relaxed);
        let (mut driver, rounds) = guest.join().unwrap();
        assert!(rounds > 0);
        assert_eq!(driver.open().unwrap(), 0);
        assert_eq!(host.world.counts().bound, 3, "one channel for each ring");
    }
}

#[test]
fn a_successor_keeps_to_what_the_guest_was_told() {
    for way in WAYS {
        let host = Host::new();
        let served = host.serve(Plan::default());
        let mut front = host.connect(&Wish { queues: 4, order: 2, ..Wish::default() });
        assert!(front.told.flush_cache && front.told.barrier && front.told.discard);
        let bytes = way(served).bytes;
        let features = Features {
            flush_cache: false,
            barrier: false,
            discard: false,
            persistent: false,
            indirect: false,
            multi_page: false,
            multi_queue: false,
        };
        let served = host.serve(Plan { bytes, features, queues: 1, ..Plan::default() });
        for (nth, request) in [
            Request::flush(),
            Request::write_barrier(0, &[1; 512]),
            Request::discard(0, 8),
            Request::read(0, 50 * 4096).indirect(),
        ]
        .into_iter()
        .enumerate()
        {
            let ticket = front.driver.send(nth, &request).unwrap();
            assert_eq!(front.driver.wait(ticket).unwrap().status, status::OKAY, "{request:?}");
        }
        assert!(served.count(OpKind::Flush) > 0);
    }
}

#[test]
fn without_its_record_a_ring_is_not_taken_over() {
    let host = Host::new();
    let served = host.serve(Plan::default());
    let mut front = host.connect(&Wish::default());
    assert_eq!(front.driver.ask(&Request::flush()).unwrap().status, status::OKAY);
    served.drain();
    for path in host.journals() {
        std::fs::remove_file(path).unwrap();
    }
    let ticket = front.driver.send(0, &Request::flush()).unwrap();
    let outcome = host.serve(Plan::default()).wait_for_end();
    let words = outcome.end.unwrap();
    assert!(words.to_lowercase().contains("journal") || words.contains("record"), "{words}");
    assert_eq!(front.driver.open().unwrap(), 1, "{ticket:?} is not answered by who cannot know of it");
    assert_eq!(host.world.counts().mapped, 0);
}

#[test]
fn a_disk_that_grew_while_nobody_served_it_is_told() {
    let host = Host::new();
    let served = host.serve(Plan::default());
    let mut front = host.connect(&Wish::default());
    let mut bytes = served.drain().bytes;
    bytes.resize(2 * SIZE, 0);
    let _served = host.serve(Plan { bytes, ..Plan::default() });
    host.wait_for_back("sectors", &(2 * SIZE / 512).to_string());
    let last = Request::read(2 * SIZE as u64 / 512 - 1, 512);
    assert_eq!(front.driver.ask(&last).unwrap().status, status::OKAY);
}

#[test]
fn a_guest_that_has_closed_while_nobody_served_it_is_let_go() {
    let host = Host::new();
    let served = host.serve(Plan::default());
    let front = host.connect(&Wish::default());
    served.drain();
    std::thread::scope(|scope| {
        let closing = scope.spawn(move || front.shut_down());
        std::thread::sleep(Duration::from_millis(30));
        let _served = host.serve(Plan::default());
        closing.join().unwrap().unwrap();
        host.nodes.start_over(&host.store).unwrap();
        let mut front = host.connect(&Wish::default());
        assert_eq!(front.driver.ask(&Request::flush()).unwrap().status, status::OKAY);
    });
}

#[test]
fn a_guest_that_has_died_while_nobody_served_it_is_let_go() {
    for are_nodes_left in [true, false] {
        let host = Host::new();
        let served = host.serve(Plan::default());
        let front = host.connect(&Wish::default());
        served.drain();
        drop(front);
        host.world.destroy(crate::serve::GUEST);
        host.store.release(crate::serve::GUEST);
        if !are_nodes_left {
            host.store.remove(&format!("/local/domain/{}", crate::serve::GUEST));
        }
        let outcome = host.serve(Plan::default()).wait_for_end();
        assert!(outcome.end.is_some());
        let counts = host.world.counts();
        assert_eq!((counts.mapped, counts.bound), (0, 0));
    }
}

#[test]
fn a_back_end_that_ends_in_the_middle_of_the_handshake_is_followed_by_one_that_goes_on() {
    for round in 0..24_u64 {
        let host = Host::new();
        let served = host.serve(Plan::default());
        // It ends before the guest comes, while the rings are being connected, or soon after.
        let mut front = Front::prepare(&host.store, &host.guest, &host.nodes, &Wish::default()).unwrap();
        if round % 4 > 0 {
            front.set_state(state::INITIALISED).unwrap();
            std::thread::sleep(Duration::from_micros(round * 150));
        }
        WAYS[round as usize % 2](served);
        if round % 4 == 0 {
            front.set_state(state::INITIALISED).unwrap();
        }
        let _served = host.serve(Plan::default());
        if let Err(error) = front.finish() {
            panic!("round {round}: {error}");
        }
        let read = front.driver.ask(&Request::read(0, 4096)).unwrap();
        assert!(read.status == status::OKAY && read.bytes == fresh(0, 4096), "round {round}");
        front.shut_down().unwrap();
        host.assert_let_go();
    }
}

#[test]
fn a_guest_that_is_not_taken_over_yet_lives_on_too() {
    let host = Host::new();
    let served = host.serve(Plan::default());
    let _front = host.connect(&Wish::default());
    served.kill();
    for _ in 0..5 {
        // Told to stop at once: whether or not it came as far as the guest's rings, these are there.
        let outcome = host.serve(Plan::default()).drain();
        assert!(outcome.left, "{:?}", outcome.end);
        assert_eq!(host.back("state").as_deref(), Some(state::CONNECTED));
    }
}
