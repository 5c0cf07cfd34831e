//! What a guest reads, writes and asks for: every layout, ring and way to its memory, and what its disk is asked then.

use blkfront::{Abi, Answer, Driver, Front, Request, Ticket, UNWRITTEN, Wish, op, status};
use block::{Errno, OpKind};
use guest::xen::{DataPath, Features};

use crate::disk::{Act, Seen, fresh};
use crate::serve::{Host, Plan, SIZE};

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 ^ (at / 512) as u8 ^ seed).collect()
}

/// Serves a plan and asks.
fn with(plan: Plan, wish: &Wish, test: impl FnOnce(&mut Front, &crate::serve::Served)) {
    let host = Host::new();
    let served = host.serve(plan);
    let mut front = host.connect(wish);
    test(&mut front, &served);
    assert_eq!(front.driver.open().unwrap(), 0, "unanswered");
    front.shut_down().unwrap();
    host.assert_let_go();
}

/// Each way to the guest's memory, each layout, with and without grants that stay.
fn everywhere(test: impl Fn(&mut Driver)) {
    for data in [DataPath::Copy, DataPath::Map] {
        for abi in [Abi::Native, Abi::X86_64, Abi::X86_32] {
            for persistent in [false, true] {
                let plan = Plan { data, ..Plan::default() };
                let wish = Wish { abi, persistent, ..Wish::default() };
                with(plan, &wish, |front, _| {
                    // Linux copies each request through pages of its own where grants stay: only who maps gains by it.
                    let stays = persistent && data == DataPath::Map;
                    assert_eq!(front.driver.wish().persistent, stays, "{data:?}, {abi:?}");
                    test(&mut front.driver);
                });
            }
        }
    }
}

fn ask(driver: &mut Driver, request: &Request) -> Answer {
    driver.ask(request).unwrap()
}

fn statuses(driver: &mut Driver, tickets: &[Ticket]) -> Vec<i16> {
    driver.wait_all(tickets).unwrap().iter().map(|answer| answer.status).collect()
}

#[test]
fn what_was_written_is_read_back_and_nothing_else_changes() {
    everywhere(|driver| {
        let last = SIZE as u64 / 512 - 1;
        let places =
            [(0, 512), (1, 512), (8, 4096), (9, 8192), (last, 512), (300, 11 * 4096), (900, 9 * 512)];
        for (seed, (sector, len)) in places.into_iter().enumerate() {
            let bytes = pattern(len, seed as u8);
            let written = ask(driver, &Request::write(sector, &bytes));
            assert_eq!((written.status, written.bytes), (status::OKAY, vec![]), "{len} bytes at {sector}");
            let read = ask(driver, &Request::read(sector, len));
            assert!(read.status == status::OKAY && read.bytes == bytes, "{len} bytes at {sector}");
        }
        let between = ask(driver, &Request::read(100, 4096));
        assert!(between.bytes == fresh(100 * 512, 4096));
    });
}

#[test]
fn pieces_of_pages_are_read_and_written_and_nothing_beside_them() {
    everywhere(|driver| {
        // The driver looks at what is around each piece.
        let cuts: [&[(u8, u8)]; 6] = [
            &[(0, 0)],
            &[(7, 7)],
            &[(3, 4), (0, 7), (7, 7)],
            &[(7, 7), (0, 0), (7, 7), (0, 0)],
            &[(1, 6); 11],
            &[(0, 7), (2, 2), (0, 7)],
        ];
        for (seed, cuts) in cuts.into_iter().enumerate() {
            let sectors: usize = cuts.iter().map(|(first, last)| usize::from(last - first) + 1).sum();
            let bytes = pattern(sectors * 512, seed as u8);
            for request in [Request::write(77, &bytes), Request::write(77, &bytes).indirect()] {
                assert_eq!(ask(driver, &request.cut_in(cuts)).status, status::OKAY, "{cuts:?}");
            }
            for request in [Request::read(77, bytes.len()), Request::read(77, bytes.len()).indirect()] {
                let read = ask(driver, &request.cut_in(cuts));
                assert!(read.status == status::OKAY && read.bytes == bytes, "{cuts:?}");
            }
        }
    });
}

#[test]
fn indirect_requests_have_up_to_256_segments() {
    everywhere(|driver| {
        for pages in [1, 11, 12, 32, 255, 256] {
            let bytes = pattern(pages * 4096, pages as u8);
            assert_eq!(ask(driver, &Request::write(3, &bytes).indirect()).status, status::OKAY);
            let read = ask(driver, &Request::read(3, bytes.len()).indirect());
            assert!(read.status == status::OKAY && read.bytes == bytes, "{pages} pages");
        }
        let more = Request::write(0, &vec![1; 257 * 4096]).indirect();
        assert_eq!(ask(driver, &more).status, status::ERROR, "more than it was told");
    });
}

#[test]
fn a_front_end_is_told_of_256_segments_and_of_all_that_there_is() {
    with(Plan::default(), &Wish::default(), |front, _| {
        let told = &front.told;
        assert_eq!((told.sectors, told.sector_size, told.info), (SIZE as u64 / 512, 512, 0));
        assert!(told.flush_cache && told.barrier && told.discard);
        assert_eq!(told.indirect, 256);
    });
}

#[test]
fn the_disk_is_asked_just_what_the_guest_asked() {
    with(Plan::default(), &Wish::default(), |front, served| {
        let driver = &mut front.driver;
        for request in [
            Request::read(16, 4096),
            Request::write(8, &pattern(6144, 1)),
            Request::write(0, &pattern(20 * 4096, 1)).indirect(),
            Request::discard(64, 3),
            Request::flush(),
        ] {
            assert_eq!(ask(driver, &request).status, status::OKAY);
        }
        let seen: Vec<_> = served.seen().into_iter().map(|seen| (seen.kind, seen.at, seen.len)).collect();
        let expected = [
            (OpKind::Read, 8192, 4096),
            (OpKind::Write, 4096, 6144),
            (OpKind::Write, 0, 81920),
            (OpKind::Discard, 32768, 1536),
            (OpKind::Flush, 0, 0),
        ];
        assert_eq!(seen, expected);
    });
}

#[test]
fn rings_of_any_size_are_used_to_their_last_entry() {
    for data in [DataPath::Copy, DataPath::Map] {
        for (order, abi, entries) in [
            (0, Abi::X86_64, 32_u64),
            (1, Abi::X86_64, 64),
            (2, Abi::X86_32, 128),
            (3, Abi::Native, 256),
            (4, Abi::X86_64, 512),
            (4, Abi::X86_32, 512),
        ] {
            let plan = Plan { data, ..Plan::scripted(|_, _| Act::Stick) };
            // The numbers of requests go round behind 2^32 with the next request or some later.
            with(plan, &Wish { order, abi, ..Wish::default() }, |front, served| {
                let driver = &mut front.driver;
                assert_eq!(u64::from(driver.ring(0).size()), entries, "{order}");
                for round in 0..3_u64 {
                    let tickets: Vec<_> = (0..entries)
                        .map(|number| {
                            driver.send(0, &Request::write(number, &pattern(512, number as u8))).unwrap()
                        })
                        .collect();
                    served.until_seen((entries * (round + 1)) as usize);
                    assert_eq!(driver.open().unwrap(), entries as usize, "nothing is answered early");
                    served.release();
                    assert!(statuses(driver, &tickets).iter().all(|told| *told == status::OKAY));
                }
                let ticket = driver.send(0, &Request::read(0, 11 * 4096)).unwrap();
                served.until_seen(entries as usize * 3 + 1);
                served.release();
                let read = driver.wait(ticket).unwrap();
                let written: Vec<u8> = (0..88).flat_map(|number| pattern(512, number as u8)).collect();
                let known = written.len().min(entries as usize * 512);
                assert!(read.bytes[..known] == written[..known]);
            });
        }
    }
}

#[test]
fn several_rings_are_one_disk() {
    for data in [DataPath::Copy, DataPath::Map] {
        let script = |nth: usize, _: &Seen| if nth.is_multiple_of(3) { Act::Late(500) } else { Act::Do };
        let plan = Plan { data, ..Plan::scripted(script) };
        with(plan, &Wish { queues: 4, order: 1, ..Wish::default() }, |front, _| {
            let driver = &mut front.driver;
            assert_eq!(driver.wish().queues, 4);
            for round in 0..20_u8 {
                let writes: Vec<_> = (0..100)
                    .map(|number| {
                        let bytes = pattern(4096, round.wrapping_add(number as u8));
                        driver.send(number % 4, &Request::write(number as u64 * 8, &bytes)).unwrap()
                    })
                    .collect();
                assert!(statuses(driver, &writes).iter().all(|told| *told == status::OKAY));
                // Each from another ring than it was written by.
                let reads: Vec<_> = (0..100)
                    .map(|number| {
                        driver.send((number + 1) % 4, &Request::read(number as u64 * 8, 4096)).unwrap()
                    })
                    .collect();
                for (number, answer) in driver.wait_all(&reads).unwrap().into_iter().enumerate() {
                    assert!(answer.bytes == pattern(4096, round.wrapping_add(number as u8)), "{number}");
                }
            }
        });
    }
}

#[test]
fn no_more_rings_and_pages_than_are_offered() {
    let features = Features { multi_page: false, ..Features::default() };
    let plan = Plan { queues: 2, features, ..Plan::default() };
    with(plan, &Wish { queues: 8, order: 4, ..Wish::default() }, |front, _| {
        assert_eq!((front.driver.wish().queues, front.driver.wish().order), (2, 0));
        for queue in 0..2 {
            let ticket = front.driver.send(queue, &Request::flush()).unwrap();
            assert_eq!(front.driver.wait(ticket).unwrap().status, status::OKAY);
        }
    });
    let features = Features { multi_queue: false, ..Features::default() };
    with(Plan { features, ..Plan::default() }, &Wish { queues: 8, ..Wish::default() }, |front, _| {
        assert_eq!(front.driver.wish().queues, 1);
        assert_eq!(ask(&mut front.driver, &Request::flush()).status, status::OKAY);
    });
}

#[test]
fn blocks_of_4096_bytes_are_counted_in_sectors_of_512() {
    for data in [DataPath::Copy, DataPath::Map] {
        let plan = Plan { block: 4096, data, ..Plan::default() };
        with(plan, &Wish::default(), |front, served| {
            assert_eq!((front.told.sectors, front.told.sector_size), (SIZE as u64 / 512, 4096));
            let driver = &mut front.driver;
            let bytes = pattern(8192, 9);
            assert_eq!(ask(driver, &Request::write(8, &bytes)).status, status::OKAY);
            let read = ask(driver, &Request::read(8, 8192).skewed(3));
            assert!(read.status == status::OKAY && read.bytes == bytes, "from three sectors into a page on");
            let asked = served.seen().len();
            for request in [
                Request::write(1, &bytes),
                Request::write(8, &bytes[..512]),
                Request::read(7, 4096),
                Request::read(8, 4096 + 512),
            ] {
                assert_eq!(ask(driver, &request).status, status::ERROR, "{request:?}");
            }
            assert_eq!(served.seen().len(), asked, "pieces of blocks are not the disk's business");
        });
    }
}

#[test]
fn a_disk_that_is_read_only_says_so_and_refuses_to_be_changed() {
    let host = Host::without_nodes();
    host.nodes.create(&host.store, "r");
    let served = host.serve(Plan { read_only: true, ..Plan::default() });
    let mut front = host.connect(&Wish::default());
    assert_eq!(front.told.info & 4, 4, "VDISK_READONLY");
    let driver = &mut front.driver;
    let read = ask(driver, &Request::read(8, 4096));
    assert!(read.status == status::OKAY && read.bytes == fresh(4096, 4096));
    for request in [
        Request::write(0, &[1; 512]),
        Request::write(0, &[1; 20 * 4096]).indirect(),
        Request::write_barrier(0, &[1; 512]),
    ] {
        assert_eq!(ask(driver, &request).status, status::ERROR, "{request:?}");
    }
    assert_ne!(ask(driver, &Request::discard(0, 8)).status, status::OKAY);
    assert!(served.drain().bytes == fresh(0, SIZE));
}

#[test]
fn beyond_the_end_nothing_is_done_and_the_storage_is_not_asked() {
    with(Plan::default(), &Wish::default(), |front, served| {
        let driver = &mut front.driver;
        let sectors = SIZE as u64 / 512;
        let last = ask(driver, &Request::read(sectors - 1, 512));
        assert!(last.status == status::OKAY && last.bytes == fresh(SIZE as u64 - 512, 512));
        let asked = served.seen().len();
        for sector in [sectors, sectors - 7, u64::MAX, u64::MAX / 512, 1 << 55, (1 << 55) - 8, 1 << 63] {
            for request in [
                Request::read(sector, 4096),
                Request::write(sector, &[1; 4096]),
                Request::write_barrier(sector, &[1; 4096]),
                Request::read(sector, 4096).indirect(),
                Request::discard(sector, 8),
            ] {
                assert_eq!(ask(driver, &request).status, status::ERROR, "{request:?}");
            }
        }
        for sectors in [u64::MAX, 1 << 55, u64::MAX / 512 + 1] {
            assert_eq!(ask(driver, &Request::discard(1, sectors)).status, status::ERROR, "{sectors}");
        }
        assert_eq!(served.seen().len(), asked);
    });
}

#[test]
fn what_is_not_known_is_unsupported_and_named_as_it_was_asked() {
    with(Plan::default(), &Wish::default(), |front, served| {
        for operation in [4, 7, 8, 77, 128, 255] {
            let answer = ask(&mut front.driver, &Request::other(operation));
            assert_eq!(answer.status, status::EOPNOTSUPP, "operation {operation}");
        }
        // There is no way to make it sure that nobody finds it again.
        let secure = ask(&mut front.driver, &Request::secure_discard(0, 8));
        assert_ne!(secure.status, status::OKAY);
        assert_eq!(served.seen(), []);
    });
}

#[test]
fn each_failure_is_told_to_who_asked_and_to_nobody_else() {
    for data in [DataPath::Copy, DataPath::Map] {
        let script =
            |nth: usize, _: &Seen| if nth.is_multiple_of(2) { Act::Fail(Errno::EIO) } else { Act::Do };
        let plan = Plan { data, ..Plan::scripted(script) };
        with(plan, &Wish::default(), |front, _| {
            for request in [
                Request::read(0, 4096),
                Request::write(0, &[1; 4096]),
                Request::read(0, 20 * 4096).indirect(),
                Request::write(0, &[1; 20 * 4096]).indirect(),
                Request::discard(0, 8),
            ] {
                assert_eq!(ask(&mut front.driver, &request).status, status::ERROR, "{request:?}");
                assert_eq!(ask(&mut front.driver, &request).status, status::OKAY, "{request:?}");
            }
        });
    }
}

#[test]
fn a_read_that_fails_leaves_the_guests_memory_as_it_was() {
    let plan = Plan::scripted(|_, _| Act::Fail(Errno::EIO));
    with(plan, &Wish::default(), |front, _| {
        let answer = ask(&mut front.driver, &Request::read(0, 8192));
        assert_eq!((answer.status, answer.bytes), (status::ERROR, vec![UNWRITTEN; 8192]));
    });
}

#[test]
fn a_lack_of_space_is_an_error_and_what_the_disk_cannot_do_is_unsupported() {
    let script = |_: usize, seen: &Seen| match seen.kind == OpKind::Discard {
        true => Act::Fail(Errno::EOPNOTSUPP),
        false => Act::Fail(Errno::ENOSPC),
    };
    with(Plan::scripted(script), &Wish::default(), |front, _| {
        assert_eq!(ask(&mut front.driver, &Request::write(0, &[1; 512])).status, status::ERROR);
        assert_eq!(ask(&mut front.driver, &Request::discard(0, 8)).status, status::EOPNOTSUPP);
    });
}

#[test]
fn a_request_that_the_disk_loses_is_an_error_and_does_not_stay_open() {
    let script = |nth: usize, _: &Seen| if nth.is_multiple_of(2) { Act::Lose } else { Act::Do };
    for data in [DataPath::Copy, DataPath::Map] {
        with(Plan { data, ..Plan::scripted(script) }, &Wish::default(), |front, _| {
            let tickets: Vec<_> =
                (0..20).map(|nth| front.driver.send(0, &Request::read(nth, 512)).unwrap()).collect();
            let told = statuses(&mut front.driver, &tickets);
            assert_eq!(told.iter().filter(|told| **told == status::ERROR).count(), 10);
        });
    }
}

#[test]
fn a_flush_reaches_the_disk_and_what_it_says_reaches_the_guest() {
    let script = |nth: usize, _: &Seen| if nth == 1 { Act::Fail(Errno::EIO) } else { Act::Do };
    with(Plan::scripted(script), &Wish::default(), |front, served| {
        let told: Vec<_> = (0..3).map(|_| ask(&mut front.driver, &Request::flush()).status).collect();
        assert_eq!(told[..2], [status::OKAY, status::FAILED]);
        assert!(served.count(OpKind::Flush) >= 3);
    });
}

/// Requests before, within and behind a barrier, on two rings. io/blkif.h: "All writes issued prior to a request with
/// the BLKIF_OP_WRITE_BARRIER operation code must be completed prior to the execution of the barrier request. All writes
/// issued after the barrier request must not execute until after the completion of the barrier request."
#[test]
fn a_barrier_waits_for_what_was_written_and_what_comes_behind_waits_for_it() {
    for with_data in [true, false] {
        let plan = Plan::scripted(|_, _| Act::Stick);
        with(plan, &Wish { queues: 2, ..Wish::default() }, |front, served| {
            let driver = &mut front.driver;
            let kinds = || -> Vec<(OpKind, u64)> {
                served.seen().into_iter().map(|seen| (seen.kind, seen.at / 512)).collect()
            };
            let mut tickets = vec![
                driver.send(0, &Request::write(10, &[1; 512])).unwrap(),
                driver.send(1, &Request::write(11, &[1; 512])).unwrap(),
            ];
            served.until_seen(2);
            let barrier = if with_data { Request::write_barrier(12, &[2; 512]) } else { Request::barrier() };
            tickets.push(driver.send(0, &barrier).unwrap());
            tickets.push(driver.send(0, &Request::write(13, &[3; 512])).unwrap());
            // Time enough for the back end to do it wrong; it can be right for any length of it.
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert_eq!(kinds().len(), 2, "it waits for both: {:?}", kinds());
            let mut done = 2;
            // What the barrier is made of comes one after the other, and before what is behind it.
            loop {
                served.release();
                done += 1;
                served.until_seen(done);
                if kinds()[done - 1] == (OpKind::Write, 13) {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
                assert_eq!(kinds().len(), done, "one at a time: {:?}", kinds());
            }
            served.release();
            assert!(statuses(driver, &tickets).iter().all(|told| *told == status::OKAY));
            let seen = served.seen();
            assert_eq!(seen[2].kind, OpKind::Flush, "what was answered before is durable first");
            let written = seen[3..].iter().find(|seen| seen.at == 12 * 512);
            assert_eq!(written.is_some(), with_data);
            let is_durable = written.is_none_or(|seen| seen.flags[0])
                || seen[4..].iter().any(|seen| seen.kind == OpKind::Flush);
            assert!(is_durable, "and so is its own data: {seen:?}");
        });
    }
}

#[test]
fn a_barrier_tells_its_own_error_and_the_guest_goes_on() {
    for (fails, kind) in [(OpKind::Flush, "the flush"), (OpKind::Write, "its data")] {
        let mut failed = false;
        let script = move |_: usize, seen: &Seen| match seen.kind == fails && !failed {
            true => {
                failed = true;
                Act::Fail(Errno::EIO)
            }
            false => Act::Do,
        };
        with(Plan::scripted(script), &Wish::default(), |front, _| {
            let driver = &mut front.driver;
            let barrier = Request::write_barrier(0, &[1; 4096]);
            assert_eq!(ask(driver, &barrier).status, status::ERROR, "{kind}");
            assert_eq!(ask(driver, &Request::read(0, 512)).status, status::OKAY, "{kind}");
            assert_eq!(ask(driver, &barrier).status, status::OKAY, "{kind}");
        });
    }
}

#[test]
fn what_is_not_offered_is_not_told_and_not_done() {
    let none = Features {
        flush_cache: false,
        barrier: false,
        discard: false,
        persistent: false,
        indirect: false,
        multi_page: false,
        multi_queue: false,
    };
    with(Plan { features: none, ..Plan::default() }, &Wish::default(), |front, served| {
        let told = front.told.clone();
        assert!(
            !told.flush_cache && !told.barrier && !told.discard && !told.persistent && told.indirect == 0
        );
        let driver = &mut front.driver;
        assert_eq!(ask(driver, &Request::discard(0, 8)).status, status::EOPNOTSUPP);
        assert_ne!(ask(driver, &Request::read(0, 512).indirect()).status, status::OKAY);
        assert_eq!(served.seen(), []);
        // To refuse these would have Linux believe that they succeeded (FLUSH) or fail what they carry (BARRIER).
        for request in [Request::flush(), Request::barrier(), Request::write_barrier(0, &[1; 512])] {
            assert_eq!(ask(driver, &request).status, status::OKAY, "{request:?}");
        }
        assert!(served.count(OpKind::Flush) >= 3);
        assert_eq!(ask(driver, &Request::write(0, &[1; 512])).status, status::OKAY);
        let durable = served.seen().last().unwrap().flags.clone();
        assert_eq!(durable, [true], "a guest that cannot flush believes what is answered to be durable");
    });
}

#[test]
fn writes_are_not_durable_one_by_one_where_a_guest_can_flush() {
    for (flush_cache, barrier) in [(true, true), (true, false), (false, true)] {
        let features = Features { flush_cache, barrier, ..Features::default() };
        with(Plan { features, ..Plan::default() }, &Wish::default(), |front, served| {
            assert_eq!((front.told.flush_cache, front.told.barrier), (flush_cache, barrier));
            assert_eq!(ask(&mut front.driver, &Request::write(0, &[1; 512])).status, status::OKAY);
            assert_eq!(served.seen()[0].flags, [false]);
        });
    }
}

#[test]
fn discards_end_where_they_end() {
    with(Plan::default(), &Wish::default(), |front, _| {
        let driver = &mut front.driver;
        assert_eq!(ask(driver, &Request::discard(17, 3)).status, status::OKAY);
        let read = ask(driver, &Request::read(16, 5 * 512));
        let expected = [fresh(16 * 512, 512), vec![0; 3 * 512], fresh(20 * 512, 512)].concat();
        assert!(read.bytes == expected);
        assert_eq!(ask(driver, &Request::discard(0, SIZE as u64 / 512)).status, status::OKAY);
        assert_eq!(ask(driver, &Request::read(0, 512)).bytes, [0; 512]);
        assert_eq!(driver.open().unwrap(), 0);
        let empty = ask(driver, &Request::discard(0, 0)).status;
        assert!([status::OKAY, status::ERROR].contains(&empty), "it is answered: {empty}");
    });
}

#[test]
fn answers_come_in_any_order() {
    let script = |nth: usize, _: &Seen| Act::Late(((nth * 7) % 20) as u64 * 300);
    for persistent in [false, true] {
        let plan = Plan { data: DataPath::Map, ..Plan::scripted(script) };
        with(plan, &Wish { persistent, order: 2, ..Wish::default() }, |front, _| {
            let driver = &mut front.driver;
            let tickets: Vec<_> = (0..100)
                .map(|nth| {
                    let request = match nth % 3 {
                        0 => Request::write(2000 + nth, &pattern(512, nth as u8)),
                        1 => Request::read(nth * 8, 4096),
                        _ => Request::read(nth, 15 * 4096).indirect(),
                    };
                    driver.send(0, &request).unwrap()
                })
                .collect();
            for (nth, answer) in driver.wait_all(&tickets).unwrap().into_iter().enumerate() {
                let expected = match nth % 3 {
                    0 => Vec::new(),
                    1 => fresh(nth as u64 * 4096, 4096),
                    _ => fresh(nth as u64 * 512, 15 * 4096),
                };
                assert!(answer.status == status::OKAY && answer.bytes == expected, "request {nth}");
            }
        });
    }
}

#[test]
fn little_memory_for_data_makes_requests_wait_and_not_fail() {
    let plan = Plan { memory: 2 << 20, ..Plan::scripted(|_, _| Act::Late(200)) };
    with(plan, &Wish { order: 2, queues: 2, ..Wish::default() }, |front, _| {
        let driver = &mut front.driver;
        let bytes = pattern(256 * 4096, 3);
        for _ in 0..3 {
            // Each is 1 MiB, half of what there is.
            let tickets: Vec<_> = (0..6)
                .map(|nth| driver.send(nth % 2, &Request::write(0, &bytes).indirect()).unwrap())
                .collect();
            assert!(statuses(driver, &tickets).iter().all(|told| *told == status::OKAY));
        }
        let read = ask(driver, &Request::read(0, bytes.len()).indirect());
        assert!(read.status == status::OKAY && read.bytes == bytes);
    });
}

#[test]
fn requests_of_two_kinds_with_one_number_are_each_answered() {
    // Linux uses small numbers again and again; other front ends use addresses.
    with(Plan::default(), &Wish::default(), |front, _| {
        for id in [0, 1, u64::MAX, 1 << 63] {
            let answer = ask(&mut front.driver, &Request::read(0, 512).named(id));
            assert_eq!(answer.status, status::OKAY);
        }
        let inner = Request::read(0, 512).indirect().lying(1, &[op::DISCARD]);
        assert_ne!(ask(&mut front.driver, &inner).status, status::OKAY, "only reads and writes are indirect");
    });
}
