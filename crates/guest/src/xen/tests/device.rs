//! A whole device, with its tasks on a real io_uring: what a front end asks for and gets, however it is left.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use ::xen::PAGE;
use ::xen::fake::{Deed, Fate};
use ::xen::grants::{Access, GrantRef};
use block::{Errno, Op, OpKind};

use super::super::device::{ConnectError, Parting, Start};
use super::super::journal::JournalError;
use super::super::layout::Abi;
use super::super::{DataPath, OnFailedSync};
use super::front::{self, Front};
use super::host::{Host, MIB, run, run_with_panics, segs};

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at / 512) as u8 ^ seed ^ (at % 251) as u8).collect()
}

/// Both ways, and with pages that stay mapped.
fn ways() -> [(DataPath, bool); 4] {
    [(DataPath::Auto, false), (DataPath::Copy, true), (DataPath::Map, false), (DataPath::Map, true)]
}

#[test]
fn what_is_written_is_read_in_each_layout_and_each_way() {
    for (data, persistent) in ways() {
        for abi in [Abi::X86_64, Abi::X86_32, Abi::Native] {
            run(|handle| async move {
                let mut host = Host::new(&handle, data);
                (host.abi, host.persistent) = (abi, persistent);
                let mut front = host.front(1, 1);
                host.connect(&[&front]).await;
                let written = pattern(11 * PAGE, 1);
                let from = host.pages(&written, Access::Write);
                front.ask(&front::request(abi, 1, 77, 16, &segs(&from)));
                assert_eq!(host.responses(&mut front, 1).await, [(77, 1, 0)]);
                assert_eq!(host.disk.bytes.borrow()[8192..8192 + written.len()], written);
                // Some sectors of pages, which are not side by side.
                let to = host.pages(&vec![0xee; 3 * PAGE], Access::Write);
                let parts = [(to[0].1, 3, 7), (to[1].1, 0, 0), (to[2].1, 7, 7)];
                front.ask(&front::request(abi, 0, u64::MAX, 17, &parts));
                assert_eq!(host.responses(&mut front, 1).await, [(u64::MAX, 0, 0)]);
                let read = host.guest.read(to[0].0 * PAGE, 3 * PAGE);
                let mut expected = vec![0xee; 3 * PAGE];
                expected[3 * 512..PAGE + 512].copy_from_slice(&written[512..512 + 6 * 512]);
                expected[2 * PAGE + 7 * 512..].copy_from_slice(&written[512 + 6 * 512..512 + 7 * 512]);
                assert!(read == expected, "{data:?} {abi:?}");
                let kept = if persistent && data == DataPath::Map { 14 } else { 0 };
                assert_eq!(host.world.counts().mapped, 1 + kept, "the ring, and what stays mapped");
                host.leave(Parting::Tell).await;
                assert!(!host.has_journal());
            });
        }
    }
}

#[test]
fn a_request_of_a_megabyte_names_its_segments_in_a_page() {
    for (data, persistent) in ways() {
        run(|handle| async move {
            let mut host = Host::new(&handle, data);
            host.persistent = persistent;
            let mut front = host.front(1, 1);
            host.connect(&[&front]).await;
            let written = pattern(256 * PAGE, 3);
            let from = host.pages(&written, Access::Write);
            let table = host.pages(&front::table(&segs(&from)), Access::Read);
            front.ask(&front::indirect(host.abi, 1, 5, 2048, 256, &[table[0].1]));
            // The operation within is what is answered.
            assert_eq!(host.responses(&mut front, 1).await, [(5, 1, 0)]);
            assert!(host.disk.bytes.borrow()[MIB as usize..2 * MIB as usize] == written);
            let to = host.pages(&vec![0; 256 * PAGE], Access::Write);
            let table = host.pages(&front::table(&segs(&to)), Access::Read);
            front.ask(&front::indirect(host.abi, 0, 6, 2048, 256, &[table[0].1]));
            assert_eq!(host.responses(&mut front, 1).await, [(6, 0, 0)]);
            assert!(host.guest.read(to[0].0 * PAGE, 256 * PAGE) == written);
            host.leave(Parting::Tell).await;
        });
    }
}

#[test]
fn requests_of_a_turn_are_copied_in_one_call() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Copy);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        host.quiet().await;
        for nth in 0..32 {
            let from = host.pages(&pattern(PAGE, nth), Access::Read);
            front.put(&front::request(host.abi, 1, nth.into(), u64::from(nth) * 8, &segs(&from)));
        }
        front.show();
        let mut responses = host.responses(&mut front, 32).await;
        responses.sort_unstable();
        assert_eq!(responses, (0..32).map(|nth| (nth, 1, 0)).collect::<Vec<_>>());
        assert_eq!(host.world.counts().copies, 1);
        for nth in 0..32 {
            let to = host.pages(&[0; PAGE], Access::Write);
            front.put(&front::request(host.abi, 0, nth, nth * 8, &segs(&to)));
        }
        front.guest.rung(front.port);
        front.guest.store(front.at + 12, front.made);
        front.show();
        for _ in 0..200 {
            host.handle.sleep(Duration::from_millis(1)).await;
            if host.guest.rung(front.port) > 0 {
                break;
            }
        }
        assert_eq!(front.responses().len(), 32, "all of them are there when it is rung for");
        assert_eq!(host.world.counts().copies, 2);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn without_persistence_a_page_is_unmapped_before_the_answer() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Map);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        host.disk.waits.set(true);
        let from = host.pages(&[7; 2 * PAGE], Access::Read);
        front.ask(&front::request(host.abi, 1, 1, 0, &segs(&from)));
        host.waiting(1).await;
        assert_eq!(host.world.counts().mapped, 3);
        assert_eq!(host.guest.end(from[0].1), Err(Errno::EBUSY));
        host.disk.step(0);
        assert_eq!(host.responses(&mut front, 1).await, [(1, 1, 0)]);
        from.iter().for_each(|(_, gref)| host.guest.end(*gref).unwrap());
        // The same numbers for other pages.
        let from = host.pages(&[8; 2 * PAGE], Access::Read);
        front.ask(&front::request(host.abi, 1, 2, 0, &segs(&from)));
        host.waiting(1).await;
        host.disk.step(0);
        assert_eq!(host.responses(&mut front, 1).await, [(2, 1, 0)]);
        assert_eq!(host.disk.bytes.borrow()[..2 * PAGE], [8; 2 * PAGE]);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn an_answer_waits_for_whoever_has_the_page_still() {
    for op in [0, 1] {
        run(move |handle| async move {
            let mut host = Host::new(&handle, DataPath::Map);
            let mut front = host.front(1, 1);
            host.connect(&[&front]).await;
            *host.disk.kept.borrow_mut() = Some(Vec::new());
            let pages = host.pages(&[7; PAGE], Access::Write);
            front.ask(&front::request(host.abi, op, 1, 0, &segs(&pages)));
            host.quiet().await;
            assert_eq!((front.responses(), host.world.counts().mapped), (vec![], 2));
            host.disk.kept.take();
            assert_eq!(host.responses(&mut front, 1).await, [(1, op, 0)]);
            assert_eq!(host.world.counts().mapped, 1);
            host.leave(Parting::Tell).await;
        });
    }
}

#[test]
fn persistent_grants_are_mapped_once() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Map);
        host.persistent = true;
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        let pages = host.pages(&[7; 4 * PAGE], Access::Write);
        for nth in 0..100 {
            front.ask(&front::request(host.abi, nth as u8 % 2, nth, 0, &segs(&pages)));
            host.responses(&mut front, 1).await;
        }
        assert_eq!(host.world.counts().maps, 1 + 4);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn what_cannot_be_mapped_is_copied_and_what_cannot_be_copied_fails_alone() {
    for (data, persistent) in [(DataPath::Map, false), (DataPath::Map, true)] {
        run(|handle| async move {
            let mut host = Host::new(&handle, data);
            host.persistent = persistent;
            let mut front = host.front(1, 1);
            host.connect(&[&front]).await;
            host.world.script(|deed, _| match deed {
                Deed::Map => Fate::Fail(Errno::ENOMEM),
                Deed::Copy | Deed::Piece | Deed::Bind => Fate::Do,
            });
            let pages = host.pages(&[7; 4 * PAGE], Access::Write);
            front.ask(&front::request(host.abi, 1, 1, 0, &segs(&pages)));
            assert_eq!(host.responses(&mut front, 1).await, [(1, 1, 0)]);
            assert_eq!(host.disk.bytes.borrow()[..4 * PAGE], [7; 4 * PAGE]);
            assert_eq!(host.world.counts().mapped, 1);
            host.leave(Parting::Tell).await;
        });
    }
}

#[test]
fn a_grant_that_fails_fails_its_request_and_no_other() {
    // Each of the pieces of three requests, in turn, is one that the hypervisor does not copy, or says nothing of.
    for (op, data, persistent) in [
        (1, DataPath::Copy, false),
        (0, DataPath::Copy, false),
        (1, DataPath::Map, false),
        (0, DataPath::Map, true),
    ] {
        for bad in 0..6 {
            run(|handle| async move {
                let mut host = Host::new(&handle, data);
                host.persistent = persistent;
                let mut front = host.front(1, 1);
                host.connect(&[&front]).await;
                host.quiet().await;
                let script = move |deed, nth| match deed {
                    Deed::Piece if data == DataPath::Copy && nth == bad && bad % 2 == 0 => Fate::Say(-3),
                    Deed::Piece if data == DataPath::Copy && nth == bad => Fate::SayNothing,
                    Deed::Map | Deed::Copy | Deed::Piece | Deed::Bind => Fate::Do,
                };
                host.world.script(script);
                for nth in 0..3 {
                    let pages = host.pages(&[7; 2 * PAGE], Access::Write);
                    let mut segs = segs(&pages);
                    if data == DataPath::Map && bad / 2 == nth {
                        // One that was never given.
                        segs[(bad % 2) as usize].0 = GrantRef(400_000);
                    }
                    front.put(&front::request(host.abi, op, nth, nth * 16, &segs));
                }
                front.show();
                let mut responses = host.responses(&mut front, 3).await;
                responses.sort_unstable();
                let status = |nth| if nth == bad / 2 { -1 } else { 0 };
                let expected: Vec<_> = (0..3).map(|nth| (nth, op, status(nth))).collect();
                assert_eq!(responses, expected, "{op} {data:?} {bad}");
                if op == 1 {
                    let asked = host.disk.take_asked();
                    assert_eq!(asked.len(), 2, "nothing is written of one whose bytes are not all there");
                }
                host.leave(Parting::Tell).await;
            });
        }
    }
}

#[test]
fn a_table_of_segments_that_cannot_be_had_fails_its_request() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        let pages = host.pages(&[7; PAGE], Access::Write);
        let table = host.pages(&front::table(&segs(&pages)), Access::Read);
        front.put(&front::indirect(host.abi, 1, 1, 0, 1, &[GrantRef(400_000)]));
        front.put(&front::indirect(host.abi, 1, 2, 0, 1, &[table[0].1]));
        front.put(&front::indirect(host.abi, 0, 3, 0, 1, &[GrantRef(400_000)]));
        front.show();
        let mut responses = host.responses(&mut front, 3).await;
        responses.sort_unstable();
        assert_eq!(responses, [(1, 1, -1), (2, 1, 0), (3, 0, -1)]);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn errors_of_the_disk_are_told_once_with_the_number_for_them() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        let pages = host.pages(&[7; PAGE], Access::Write);
        let segs = segs(&pages);
        for errno in [Errno::EIO, Errno::ENOSPC, Errno::EOPNOTSUPP, Errno::EROFS, Errno::EAGAIN] {
            host.disk.fails(move |_| Some(errno));
            for (op, id) in [(0, 1), (1, 2), (2, 3)] {
                front.ask(&front::request(host.abi, op, id, 8, &segs));
                assert_eq!(host.responses(&mut front, 1).await, [(id, op, -1)], "{errno}");
            }
            for op in [2, 3] {
                front.ask(&front::request(host.abi, op, 4, u64::MAX, &[]));
                assert_eq!(host.responses(&mut front, 1).await, [(4, op, -1)], "{errno}");
            }
            front.ask(&front::discard(host.abi, 5, 0, 8, 8));
            let told = if errno == Errno::EOPNOTSUPP { -2 } else { -1 };
            assert_eq!(host.responses(&mut front, 1).await, [(5, 5, told)], "{errno}");
        }
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn where_neither_flushes_nor_barriers_were_offered_all_is_durable_before_its_answer() {
    for (flush_cache, barrier, durably) in
        [(false, false, " durably"), (true, false, ""), (false, true, ""), (true, true, "")]
    {
        run(|handle| async move {
            let mut host = Host::new(&handle, DataPath::Auto);
            (host.offered.flush_cache, host.offered.barrier) = (flush_cache, barrier);
            let mut front = host.front(1, 1);
            host.connect(&[&front]).await;
            let pages = host.pages(&[7; PAGE], Access::Write);
            front.put(&front::request(host.abi, 1, 1, 0, &segs(&pages)));
            front.put(&front::discard(host.abi, 2, 0, 8, 16));
            front.put(&front::request(host.abi, 0, 3, 0, &segs(&pages)));
            front.show();
            host.responses(&mut front, 3).await;
            let expected = [
                format!("write 4096 at 0{durably}"),
                format!("discard 4096+8192{durably}"),
                "read 4096 at 0".into(),
            ];
            assert_eq!(host.disk.take_asked(), expected);
            host.leave(Parting::Tell).await;
        });
    }
}

#[test]
fn a_ring_goes_round_many_times_in_each_size() {
    for pages in [1, 2, 4, 8, 16] {
        run(|handle| async move {
            let mut host = Host::new(&handle, DataPath::Auto);
            let mut front = host.front(1, pages);
            host.connect(&[&front]).await;
            let data = host.pages(&[7; PAGE], Access::Write);
            let count = 3 * front.size as usize;
            let (mut asked, mut answered) = (0, Vec::new());
            while answered.len() < count {
                while front.out() < front.size && asked < count {
                    front.put(&front::request(host.abi, 1, asked as u64, 0, &segs(&data)));
                    asked += 1;
                }
                front.show();
                answered.extend(host.responses(&mut front, 1).await.iter().map(|(id, ..)| *id));
            }
            answered.sort_unstable();
            assert_eq!(answered, (0..count as u64).collect::<Vec<_>>());
            host.leave(Parting::Tell).await;
        });
    }
}

#[test]
fn no_event_is_lost_between_two_that_sleep() {
    run(|handle| async move {
        let host = Host::new(&handle, DataPath::Auto);
        let (mut front, mut other) = (host.front(1, 1), host.front(2, 1));
        host.connect(&[&front, &other]).await;
        let abi = host.abi;
        // A guest on a processor of its own, which rings only where it is asked to and sleeps until it is rung for.
        let drive = move |front: &mut Front, burst: u64| {
            let mut answered = 0;
            while answered < 4000 {
                for nth in 0..=answered % burst {
                    front.put(&front::request(abi, 3, answered + nth, u64::MAX, &[]));
                }
                front.show();
                while front.out() > 0 {
                    let responses = front.responses();
                    answered += responses.len() as u64;
                    // It has asked to be rung for the next one, and looks once more.
                    let has_more = front.guest.load(front.at + 8) != front.seen;
                    if front.out() > 0 && !has_more {
                        let rung = front.guest.wait(front.port, Duration::from_secs(20));
                        assert!(
                            rung > 0,
                            "nobody has rung for an answer that is there, or the other way round"
                        );
                    }
                }
            }
        };
        let threads = [
            std::thread::spawn(move || drive(&mut front, 3)),
            std::thread::spawn(move || drive(&mut other, 7)),
        ];
        while threads.iter().any(|thread| !thread.is_finished()) {
            host.handle.sleep(Duration::from_millis(5)).await;
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn a_disk_that_grows_is_measured_anew() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        let pages = host.pages(&[7; PAGE], Access::Write);
        let last = front::request(host.abi, 1, 1, 4 * MIB / 512, &segs(&pages));
        front.ask(&last);
        assert_eq!(host.responses(&mut front, 1).await, [(1, 1, -1)]);
        host.disk.bytes.borrow_mut().resize(5 * MIB as usize, 0);
        host.disk.size.set(5 * MIB);
        front.ask(&last);
        assert_eq!(host.responses(&mut front, 1).await, [(1, 1, 0)]);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn a_read_only_disk_is_not_asked_to_change() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        host.disk.read_only.set(true);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        let pages = host.pages(&[7; PAGE], Access::Write);
        for (op, expected) in [(0, 0), (1, -1), (2, -1), (3, -1)] {
            front.ask(&front::request(host.abi, op, 9, 0, &segs(&pages)));
            assert_eq!(host.responses(&mut front, 1).await, [(9, op, expected)]);
        }
        assert_eq!(host.disk.take_asked(), ["read 4096 at 0"]);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn memory_is_bounded_and_a_ring_waits_for_it() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Copy);
        let mut front = host.front(1, 16);
        let mut other = host.front(20, 1);
        host.connect(&[&front, &other]).await;
        host.disk.waits.set(true);
        let pages = host.pages(&vec![1; 256 * PAGE], Access::Write);
        let table = host.pages(&front::table(&segs(&pages)), Access::Read);
        // Each of a megabyte: half of the 64 that there are at least, without the part for those who need little.
        for nth in 0..60 {
            front.put(&front::indirect(host.abi, 0, nth, 0, 256, &[table[0].1]));
        }
        front.show();
        host.waiting(28).await;
        host.quiet().await;
        assert_eq!(host.disk.waiting(), 28);
        // The other ring has its share.
        other.ask(&front::indirect(host.abi, 0, 9, 0, 256, &[table[0].1]));
        host.waiting(29).await;
        let mut done = 0;
        while done < 60 {
            host.disk.step_all();
            done += host.responses(&mut front, 1).await.len();
        }
        assert_eq!(host.responses(&mut other, 1).await, [(9, 0, 0)]);
        // One that waits for memory holds up nobody who leaves.
        for nth in 0..60 {
            front.put(&front::indirect(host.abi, 0, nth, 0, 256, &[table[0].1]));
        }
        front.show();
        host.waiting(28).await;
        let (disk, handle) = (host.disk.clone(), host.handle.clone());
        host.handle.spawn(async move {
            handle.sleep(Duration::from_millis(5)).await;
            disk.step_all();
        });
        host.leave(Parting::Leave).await;
        assert_eq!(front.responses().len(), 28);
    });
}

#[test]
fn told_to_leave_it_answers_what_is_under_way_and_leaves_what_is_held() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        let pages = host.pages(&[7; PAGE], Access::Write);
        host.disk.holds.set(true);
        front.ask(&front::request(host.abi, 1, 1, 8, &segs(&pages)));
        host.quiet().await;
        host.disk.holds.set(false);
        host.disk.waits.set(true);
        front.ask(&front::request(host.abi, 0, 2, 0, &segs(&pages)));
        host.waiting(1).await;
        let (disk, sleeper) = (host.disk.clone(), host.handle.clone());
        host.handle.spawn(async move {
            sleeper.sleep(Duration::from_millis(5)).await;
            disk.step(0);
        });
        host.leave(Parting::Leave).await;
        assert_eq!(front.responses(), [(2, 0, 0)]);
        assert!(host.has_journal());
        // Made while nobody serves.
        front.ask(&front::request(host.abi, 1, 3, 16, &segs(&pages)));
        host.disk.waits.set(false);
        host.kill().await;
        host.disk.take_asked();
        front.guest.rung(front.port);
        host.try_connect(&[&front], Start::TakeOver).await.unwrap();
        let mut responses = host.responses(&mut front, 2).await;
        responses.sort_unstable();
        assert_eq!(responses, [(1, 1, 0), (3, 1, 0)]);
        assert_eq!(host.disk.take_asked(), ["write 4096 at 4096", "write 4096 at 8192"]);
        assert!(front.guest.rung(front.port) > 0);
        host.leave(Parting::Tell).await;
        assert!(!host.has_journal());
    });
}

#[test]
fn a_front_end_that_closes_is_told_of_what_is_held_and_one_that_is_gone_is_told_nothing() {
    for (how, expected) in [(Parting::Tell, vec![(1, 1, -1)]), (Parting::Forget, vec![])] {
        run(move |handle| async move {
            for data in [DataPath::Copy, DataPath::Map] {
                let mut host = Host::new(&handle, data);
                let mut front = host.front(1, 1);
                host.connect(&[&front]).await;
                let pages = host.pages(&[7; PAGE], Access::Write);
                host.disk.holds.set(true);
                front.ask(&front::request(host.abi, 1, 1, 8, &segs(&pages)));
                host.quiet().await;
                host.leave(how).await;
                assert_eq!(front.responses(), expected);
                assert!(!host.has_journal() && !host.device.is_connected());
                // It may come back.
                host.disk.holds.set(false);
                let mut front = host.front(2, 1);
                host.connect(&[&front]).await;
                front.ask(&front::request(host.abi, 1, 2, 8, &segs(&pages)));
                assert_eq!(host.responses(&mut front, 1).await, [(2, 1, 0)]);
                host.leave(Parting::Tell).await;
            }
        });
    }
}

#[test]
fn of_a_guest_that_dies_under_load_nothing_stays_mapped() {
    for (data, persistent) in ways() {
        run(|handle| async move {
            let mut host = Host::new(&handle, data);
            host.persistent = persistent;
            let mut front = host.front(1, 1);
            host.connect(&[&front]).await;
            host.disk.waits.set(true);
            for nth in 0..8 {
                let pages = host.pages(&[7; 3 * PAGE], Access::Write);
                front.put(&front::request(host.abi, nth as u8 % 2, nth, 8, &segs(&pages)));
            }
            front.show();
            host.waiting(8).await;
            host.world.destroy(host.guest.domain());
            let (disk, sleeper) = (host.disk.clone(), host.handle.clone());
            host.handle.spawn(async move {
                sleeper.sleep(Duration::from_millis(5)).await;
                disk.step_all();
            });
            host.leave(Parting::Forget).await;
            assert_eq!(host.guest.mapped(), 0);
        });
    }
}

#[test]
fn a_process_that_is_killed_leaves_all_to_its_successor() {
    for (data, persistent) in ways() {
        run(|handle| async move {
            let mut host = Host::new(&handle, data);
            host.persistent = persistent;
            let (mut front, mut other) = (host.front(1, 1), host.front(2, 2));
            host.connect(&[&front, &other]).await;
            host.disk.waits.set(true);
            let pages = host.pages(&pattern(8 * PAGE, 9), Access::Write);
            let table = host.pages(&front::table(&segs(&pages)), Access::Read);
            front.put(&front::request(host.abi, 1, 1, 0, &segs(&pages)));
            front.put(&front::indirect(host.abi, 1, 2, 64, 8, &[table[0].1]));
            front.show();
            other.ask(&front::request(host.abi, 0, 3, 0, &segs(&pages[..1])));
            host.waiting(3).await;
            // Out of order: the second one is answered.
            host.disk.step(1);
            assert_eq!(host.responses(&mut front, 1).await, [(2, 1, 0)]);
            host.kill().await;
            host.disk.waits.set(false);
            host.try_connect(&[&front, &other], Start::TakeOver).await.unwrap();
            assert_eq!(host.responses(&mut front, 1).await, [(1, 1, 0)]);
            assert_eq!(host.responses(&mut other, 1).await, [(3, 0, 0)]);
            assert!(host.disk.bytes.borrow()[..8 * PAGE] == pattern(8 * PAGE, 9));
            host.quiet().await;
            assert_eq!((front.responses(), other.responses()), (vec![], vec![]));
            host.leave(Parting::Tell).await;
        });
    }
}

#[test]
fn a_successor_rings_for_answers_that_its_predecessor_may_not_have_rung_for() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        let pages = host.pages(&[7; PAGE], Access::Write);
        front.ask(&front::request(host.abi, 1, 1, 0, &segs(&pages)));
        host.quiet().await;
        // It was published, and the event for it is lost with the process.
        host.kill().await;
        assert_eq!(front.guest.rung(front.port), 1);
        host.try_connect(&[&front], Start::TakeOver).await.unwrap();
        host.quiet().await;
        assert_eq!(front.guest.rung(front.port), 1);
        assert_eq!(front.responses(), [(1, 1, 0)]);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn without_the_record_of_a_predecessor_nothing_is_served() {
    run(|handle| async move {
        let host = Host::new(&handle, DataPath::Auto);
        let front = host.front(1, 1);
        let refused = host.try_connect(&[&front], Start::TakeOver).await;
        assert!(matches!(refused, Err(ConnectError::Journal(JournalError::Missing { .. }))));
        let said = refused.unwrap_err().to_string();
        assert!(said.contains("blkif-5-51728") && said.contains("attach it anew"), "{said}");
        host.is_clean();
        assert!(!host.device.is_connected());
    });
}

#[test]
fn what_cannot_be_mapped_or_bound_is_refused_and_leaves_nothing_behind() {
    run(|handle| async move {
        let host = Host::new(&handle, DataPath::Auto);
        let (front, mut other) = (host.front(1, 2), host.front(4, 2));
        other.refs[1] = GrantRef(400_000);
        let refused = host.try_connect(&[&front, &other], Start::Fresh).await;
        assert!(matches!(refused, Err(ConnectError::Map { ring: 1, .. })), "{refused:?}");
        host.is_clean();
        let mut other = host.front(6, 2);
        let good = std::mem::replace(&mut other.port.0, 4000);
        let refused = host.try_connect(&[&front, &other], Start::Fresh).await;
        assert!(matches!(refused, Err(ConnectError::Bind { ring: 1, .. })), "{refused:?}");
        host.is_clean();
        other.port.0 = good;
        for (count, refs) in [
            (0, vec![]),
            (3, vec![other.refs[0]; 3]),
            (17, vec![other.refs[0]; 17]),
            (32, vec![other.refs[0]; 32]),
        ] {
            let mut odd = host.front(10, 1);
            odd.refs = refs;
            let refused = host.try_connect(&[&odd], Start::Fresh).await;
            assert!(matches!(refused, Err(ConnectError::Pages { ring: 0, pages }) if pages == count));
        }
        let refused = host.try_connect(&[], Start::Fresh).await;
        assert!(matches!(refused, Err(ConnectError::Rings { found: 0, .. })));
        let fronts = [&front, &front, &front, &front, &front];
        let refused = host.try_connect(&fronts, Start::Fresh).await;
        assert!(matches!(refused, Err(ConnectError::Rings { found: 5, max: 4 })));
        host.is_clean();
        assert!(!host.has_journal());
        // All of it is as before.
        host.connect(&[&front, &other]).await;
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn a_panic_fails_its_ring_and_no_other() {
    let panics = run_with_panics(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let (mut front, mut other) = (host.front(1, 1), host.front(2, 1));
        host.connect(&[&front, &other]).await;
        let pages = host.pages(&[7; PAGE], Access::Write);
        host.quiet().await;
        host.disk.panics.set(true);
        for id in 1..4 {
            front.put(&front::request(host.abi, 1, id, 8, &segs(&pages)));
        }
        front.show();
        // What was taken is answered, in whatever way.
        let mut responses = host.responses(&mut front, 3).await;
        responses.sort_unstable();
        assert_eq!(responses, [(1, 1, -1), (2, 1, -1), (3, 1, -1)]);
        host.disk.panics.set(false);
        front.ask(&front::request(host.abi, 1, 4, 8, &segs(&pages)));
        other.ask(&front::request(host.abi, 1, 5, 8, &segs(&pages)));
        assert_eq!(host.responses(&mut other, 1).await, [(5, 1, 0)]);
        host.quiet().await;
        assert_eq!(front.responses(), []);
        host.leave(Parting::Tell).await;
    });
    assert_eq!(panics, 1);
}

#[test]
fn a_failed_sync_is_told_to_who_waits_for_it() {
    // An explicit flush, the flush of a barrier, and a write that was to be durable.
    for (op, offered) in [(3, true), (2, true), (1, false)] {
        run(move |handle| async move {
            let mut host = Host::new(&handle, DataPath::Auto);
            (host.offered.flush_cache, host.offered.barrier) = (offered, offered);
            host.settings.on_failed_sync = OnFailedSync::Disconnect;
            host.kill().await;
            let mut front = host.front(1, 1);
            host.connect(&[&front]).await;
            let pages = host.pages(&[7; PAGE], Access::Write);
            let told = Rc::new(RefCell::new(false));
            let (device, heard) = (host.device.clone(), told.clone());
            host.handle.spawn(async move {
                device.sync_failed().await;
                *heard.borrow_mut() = true;
            });
            // A write fails, and syncs do not.
            host.disk.fails(|op| (op.kind() == OpKind::Write).then_some(Errno::ENOSPC));
            front.ask(&front::request(host.abi, 1, 1, 8, &segs(&pages)));
            assert_eq!(host.responses(&mut front, 1).await, [(1, 1, -1)]);
            host.quiet().await;
            assert!(!*told.borrow());
            // As a disk that is poisoned.
            host.disk.fails(|op: &Op| (op.kind() != OpKind::Read).then_some(Errno::EIO));
            front.ask(&front::request(host.abi, op, 2, 8, &segs(&pages)));
            assert_eq!(host.responses(&mut front, 1).await, [(2, op, -1)]);
            host.quiet().await;
            assert!(*told.borrow());
            // What counts on Linux, which takes the answer to an empty flush for success: writes fail from now on.
            front.ask(&front::request(host.abi, 1, 3, 8, &segs(&pages)));
            assert_eq!(host.responses(&mut front, 1).await, [(3, 1, -1)]);
            host.leave(Parting::Tell).await;
        });
    }
}

#[test]
fn a_disk_that_fails_a_flush_is_asked_for_no_other_where_nobody_would_hear_of_it() {
    run(|handle| async move {
        let host = Host::new(&handle, DataPath::Auto);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        host.disk.fails(|op| (op.kind() == OpKind::Flush).then_some(Errno::EIO));
        front.ask(&front::request(host.abi, 3, 1, u64::MAX, &[]));
        assert_eq!(host.responses(&mut front, 1).await, [(1, 3, -1)]);
        host.quiet().await;
        assert_eq!(host.disk.take_asked().len(), 1);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn what_is_asked_for_is_counted() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        let pages = host.pages(&[7; PAGE], Access::Write);
        let segs = segs(&pages);
        front.put(&front::request(host.abi, 0, 1, 0, &[(segs[0].0, 1, 3)]));
        front.put(&front::request(host.abi, 1, 2, 8, &segs));
        front.put(&front::request(host.abi, 1, 3, u64::MAX, &segs));
        front.put(&front::request(host.abi, 3, 4, 0, &[]));
        front.put(&front::request(host.abi, 2, 5, 16, &segs));
        front.put(&front::request(host.abi, 77, 6, 0, &[]));
        front.show();
        host.responses(&mut front, 6).await;
        // `struct vbd3_stats`: version, oo_reqs, and of reads and writes each submitted, completed, sectors, ticks; then
        // io_errors.
        let bytes = host.device.counts().bytes();
        let word = |at: usize| u64::from_ne_bytes(bytes[8 * at..][..8].try_into().unwrap());
        assert_eq!([1, 2, 3, 4].map(word), [0, 1, 1, 3]);
        assert_eq!([6, 7, 8].map(word), [2, 2, 16]);
        assert_eq!(word(10), 2, "a write beyond the end, and what is not known");
        host.leave(Parting::Tell).await;
    });
}
