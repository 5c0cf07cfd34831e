//! Front ends come, go and come back; disks grow, are taken away, and lose their guest.

use std::time::Duration;

use blkfront::{Abi, Front, Nodes, Request, Watch, Wish, state, status};
use block::{Errno, OpKind};
use guest::xen::{DataPath, OnFailedSync, detach};

use crate::disk::{Act, Seen, fresh};
use crate::serve::{DEVICE, GUEST, Host, KIND, Plan, SIZE};

const PATIENCE: Duration = Duration::from_secs(40);

/// It works.
fn assert_serves(front: &mut Front) {
    for queue in 0..front.driver.wish().queues {
        let ticket = front.driver.send(queue, &Request::read(8, 4096)).unwrap();
        let answer = front.driver.wait(ticket).unwrap();
        assert!(answer.status == status::OKAY && answer.bytes == fresh(4096, 4096), "queue {queue}");
    }
}

#[test]
fn a_disk_that_a_toolstack_has_described_is_served() {
    let host = Host::new();
    let _served = host.serve(Plan::default());
    host.wait_for_back("state", state::INIT_WAIT);
    assert_eq!(host.front("state").as_deref(), Some(state::INITIALISING), "which is the guest's to change");
    let mut front = host.connect(&Wish::default());
    assert_serves(&mut front);
    assert_eq!(host.back("hotplug-status").as_deref(), Some("connected"));
    assert_eq!(host.back("online").as_deref(), Some("1"), "that is the toolstack's");
    assert_eq!(host.back("mode").as_deref(), Some("w"));
    assert_eq!(host.back("sectors"), Some((SIZE / 512).to_string()));
    // Both of them are in the store of this host.
    let path = |key: &str| format!("/local/domain/{}/device/vbd/{DEVICE}/{key}", GUEST);
    assert_eq!(host.store.read(&path("backend")).as_deref(), Some(&*host.nodes.back));
}

#[test]
fn a_back_end_that_comes_late_finds_a_front_end_that_waits() {
    let host = Host::new();
    std::thread::scope(|scope| {
        let connecting = scope.spawn(|| host.connect(&Wish::default()));
        std::thread::sleep(Duration::from_millis(50));
        let _served = host.serve(Plan::default());
        assert_serves(&mut connecting.join().unwrap());
    });
}

#[test]
fn nodes_that_it_makes_itself_are_made_for_the_guest_and_removed_at_the_end() {
    let host = Host::without_nodes();
    let served = host.serve(Plan { create_nodes: true, ..Plan::default() });
    host.wait_for_back("state", state::INIT_WAIT);
    assert_eq!(host.front("backend").as_deref(), Some(&*host.nodes.back));
    assert_eq!(host.front("backend-id").as_deref(), Some("0"));
    assert_eq!(host.front("virtual-device"), Some(DEVICE.to_string()));
    assert_eq!(host.front("state").as_deref(), Some(state::INITIALISING));
    assert_eq!(host.back("frontend").as_deref(), Some(&*host.nodes.front));
    assert_eq!(host.back("frontend-id"), Some(GUEST.to_string()));
    assert_eq!(host.back("online").as_deref(), Some("1"));
    // Each end owns its nodes, and the other may read them.
    assert_eq!(host.store.permissions(&host.nodes.back), format!("n0 r{GUEST}"));
    assert_eq!(host.store.permissions(&host.nodes.front), format!("n{GUEST} r0"));
    assert_eq!(host.store.permissions(&format!("{}/state", host.nodes.front)), format!("n{GUEST} r0"));
    let mut front = host.connect(&Wish { queues: 3, order: 2, ..Wish::default() });
    assert_serves(&mut front);
    host.nodes.detach(&host.store);
    front.follow().unwrap();
    let outcome = served.wait_for_end();
    assert!(outcome.end.is_some());
    assert_eq!((host.back("state"), host.front("state")), (None, None), "they are gone");
    host.assert_let_go();
}

#[test]
fn a_guest_hears_of_growth_and_can_use_what_is_new() {
    let host = Host::new();
    let served = host.serve(Plan::default());
    let mut front = host.connect(&Wish::default());
    let mut watch = Watch::new(&host.store, GUEST, &format!("{}/state", host.nodes.back)).unwrap();
    for (size, sectors) in [(2 * SIZE, 16384_u64), (3 * SIZE, 24576)] {
        let last = Request::read(sectors - 1, 512);
        assert_eq!(front.driver.ask(&last).unwrap().status, status::ERROR);
        served.grow(size);
        // Linux looks at the size when it hears of the state, so the size must be there by then.
        assert!(watch.hears(PATIENCE).unwrap(), "the state is said once more");
        front.look().unwrap();
        assert_eq!(front.told.sectors, sectors);
        assert_eq!(host.back("state").as_deref(), Some(state::CONNECTED));
        let read = front.driver.ask(&last).unwrap();
        assert_eq!((read.status, read.bytes), (status::OKAY, vec![0; 512]));
    }
}

#[test]
fn a_disk_that_grows_before_there_is_a_guest_is_told_as_large_as_it_is() {
    let host = Host::new();
    let served = host.serve(Plan::default());
    host.wait_for_back("state", state::INIT_WAIT);
    served.grow(2 * SIZE);
    // The growth is taken in on the disk's thread before what comes next.
    let front = host.connect(&Wish::default());
    assert_eq!(front.told.sectors, 2 * SIZE as u64 / 512);
}

#[test]
fn a_disk_is_taken_away_from_a_guest_that_lets_it_go() {
    for queues in [1, 4] {
        let host = Host::new();
        let served = host.serve(Plan::default());
        let mut front = host.connect(&Wish { queues, ..Wish::default() });
        assert_serves(&mut front);
        host.nodes.detach(&host.store);
        front.follow().unwrap();
        host.wait_for_back("state", state::CLOSED);
        let outcome = served.wait_for_end();
        assert!(outcome.end.is_some(), "it ends by itself");
        assert!(outcome.bytes == fresh(0, SIZE));
        host.assert_let_go();
    }
}

#[test]
fn disks_are_attached_and_detached_again_and_again() {
    let host = Host::without_nodes();
    for round in 0..20 {
        let served = host.serve(Plan { create_nodes: true, ..Plan::default() });
        host.wait_for_back("state", state::INIT_WAIT);
        let mut front = host.connect(&Wish { queues: 1 + round % 4, ..Wish::default() });
        assert_serves(&mut front);
        std::thread::scope(|scope| {
            let detaching = scope.spawn(|| detach(&host.store, GUEST, DEVICE, KIND, PATIENCE));
            front.follow().unwrap();
            detaching.join().unwrap().unwrap();
        });
        assert!(served.wait_for_end().end.is_some());
        assert_eq!((host.back("state"), host.front("state")), (None, None), "round {round}");
        host.assert_let_go();
    }
}

#[test]
fn nodes_that_vanish_take_the_disk_with_them() {
    for is_whole in [true, false] {
        let host = Host::new();
        let served = host.serve(Plan::scripted(|_, _| Act::Late(3000)));
        let mut front = host.connect(&Wish { queues: 2, ..Wish::default() });
        for nth in 0..8 {
            front.driver.send(nth % 2, &Request::write(nth as u64, &[1; 512])).unwrap();
        }
        served.until_seen(8);
        host.store.remove(&host.nodes.back);
        if is_whole {
            host.store.remove(&host.nodes.front);
        }
        assert!(served.wait_for_end().end.is_some());
        host.assert_let_go();
        assert_eq!(host.back("state"), None, "what was removed is not brought back");
        front.driver.close().unwrap();
    }
}

#[test]
fn a_guest_that_still_works_on_a_disk_that_is_to_go_gets_all_its_answers() {
    let host = Host::new();
    let served = host.serve(Plan::scripted(|_, _| Act::Stick));
    let mut front = host.connect(&Wish::default());
    let tickets: Vec<_> =
        (0..5).map(|nth| front.driver.send(0, &Request::write(nth, &[7; 512])).unwrap()).collect();
    served.until_seen(5);
    host.nodes.detach(&host.store);
    // It does not close before it has them: a mounted disk stays in use until it is unmounted.
    host.wait_for_back("state", state::CLOSING);
    let late = front.driver.send(0, &Request::write(5, &[7; 512])).unwrap();
    served.until_seen(6);
    served.release();
    for ticket in tickets.into_iter().chain([late]) {
        assert_eq!(front.driver.wait(ticket).unwrap().status, status::OKAY);
    }
    front.follow().unwrap();
    let outcome = served.wait_for_end();
    assert_eq!(outcome.bytes[..6 * 512], [7; 6 * 512]);
    host.assert_let_go();
}

#[test]
fn a_disk_that_no_guest_has_connected_to_is_taken_away() {
    for step in 0..2 {
        let host = Host::new();
        let served = host.serve(Plan::default());
        host.wait_for_back("state", state::INIT_WAIT);
        if step == 1 {
            // A guest that has given up, or is just being created.
            host.store.remove(&host.nodes.front);
        }
        host.nodes.detach(&host.store);
        if step == 0 {
            host.store.write(&format!("{}/state", host.nodes.front), state::CLOSED);
        }
        let outcome = served.wait_for_end();
        assert!(outcome.end.is_some(), "step {step}");
        assert_eq!(host.back("state").as_deref(), Some(state::CLOSED), "step {step}: xl waits for that");
        host.assert_let_go();
    }
}

#[test]
fn a_guest_that_loads_its_driver_anew_finds_its_disk_again_and_again() {
    type Way = fn(Front) -> blkfront::Result<()>;
    let ways: [Way; 3] = [Front::shut_down, Front::unload, Front::close];
    let wishes = [
        // As a boot loader, then a kernel, then others.
        Wish { abi: Abi::X86_32, ..Wish::default() },
        Wish { queues: 4, order: 2, persistent: true, ..Wish::default() },
        Wish { queues: 4, order: 0, abi: Abi::Native, ..Wish::default() },
        Wish { queues: 2, order: 4, ..Wish::default() },
    ];
    for data in [DataPath::Copy, DataPath::Map] {
        let host = Host::new();
        let _served = host.serve(Plan { data, ..Plan::default() });
        for round in 0..12 {
            // What another driver has said stays in the store; each says all that it means.
            for key in ["multi-queue-num-queues", "ring-page-order", "protocol"] {
                host.store.remove(&format!("{}/{key}", host.nodes.front));
            }
            let mut front = host.connect(&wishes[round % wishes.len()]);
            assert_serves(&mut front);
            ways[round % ways.len()](front).unwrap();
            host.assert_let_go();
            host.nodes.start_over(&host.store).unwrap();
        }
    }
}

#[test]
fn a_driver_that_is_unloaded_with_requests_on_their_way_gets_no_stray_answers_later() {
    let host = Host::new();
    let script = |nth: usize, _: &Seen| match nth % 8 {
        0 => Act::Hold(Errno::ENOSPC),
        1..4 => Act::Late(3000),
        _ => Act::Do,
    };
    let served = host.serve(Plan { data: DataPath::Map, ..Plan::scripted(script) });
    for round in 0..6_u8 {
        let mut front = host.connect(&Wish { queues: 2, ..Wish::default() });
        let asked = served.seen().len();
        for nth in 0..16 {
            front.driver.send(nth % 2, &Request::write(nth as u64, &[round; 512])).unwrap();
        }
        served.until_seen(asked + 16);
        if round % 2 == 0 {
            front.unload().unwrap()
        } else {
            front.shut_down().unwrap()
        }
        host.assert_let_go();
        host.nodes.start_over(&host.store).unwrap();
    }
    // A stray answer would be an error of the driver's.
    let mut front = host.connect(&Wish { queues: 2, ..Wish::default() });
    for nth in 0..7 {
        front.driver.send(nth % 2, &Request::read(0, 512)).unwrap();
    }
    served.until_seen(6 * 16 + 7);
    served.release();
    let read = front.driver.ask(&Request::read(0, 512)).unwrap();
    assert_eq!(read.status, status::OKAY);
}

#[test]
fn a_guest_that_dies_leaves_nothing_behind() {
    for (persistent, data) in [(false, DataPath::Copy), (false, DataPath::Map), (true, DataPath::Map)] {
        for load in [0, 8] {
            let host = Host::new();
            let script = |nth: usize, _: &Seen| match nth % 4 {
                0 => Act::Stick,
                1 => Act::Hold(Errno::ENOSPC),
                2 => Act::Late(2000),
                _ => Act::Do,
            };
            let served = host.serve(Plan { data, ..Plan::scripted(script) });
            let mut front = host.connect(&Wish { persistent, queues: 2, ..Wish::default() });
            for nth in 0..load {
                front.driver.send(nth % 2, &Request::write(nth as u64 * 8, &[1; 4096])).unwrap();
            }
            served.until_seen(load);
            host.kill_guest();
            // What storage works on is waited for, and nothing else is.
            let release = std::time::Instant::now();
            while !served.has_ended() {
                served.release_stuck();
                assert!(release.elapsed() < PATIENCE, "it ends");
                std::thread::sleep(Duration::from_millis(5));
            }
            let outcome = served.wait_for_end();
            assert!(outcome.end.is_some());
            // A domain that somebody has a page of cannot go.
            assert_eq!(host.guest.mapped(), 0);
            host.assert_let_go();
        }
    }
}

#[test]
fn another_guest_of_the_same_number_is_another_guest() {
    let host = Host::new();
    let served = host.serve(Plan::default());
    let mut front = host.connect(&Wish::default());
    assert_serves(&mut front);
    host.kill_guest();
    served.wait_for_end();
    host.assert_let_go();
    // xl gives numbers in turn; they go round.
    let again = host.again();
    let _served = again.serve(Plan::default());
    assert_serves(&mut again.connect(&Wish::default()));
}

#[test]
fn a_failed_flush_takes_the_disk_away_where_that_is_wished_for() {
    let host = Host::new();
    let script = |_: usize, seen: &Seen| match seen.kind == OpKind::Flush {
        true => Act::Fail(Errno::EIO),
        false => Act::Do,
    };
    let plan = Plan { on_failed_sync: OnFailedSync::Disconnect, ..Plan::scripted(script) };
    let served = host.serve(plan);
    let mut front = host.connect(&Wish::default());
    assert_eq!(front.driver.ask(&Request::write(0, &[1; 512])).unwrap().status, status::OKAY);
    assert_eq!(front.driver.ask(&Request::flush()).unwrap().status, status::FAILED, "and it is told");
    host.wait_for_back("state", state::CLOSING);
    front.follow().unwrap();
    let end = served.wait_for_end().end.unwrap();
    assert_eq!(end, "Taken");
    host.assert_let_go();
}

#[test]
fn a_failed_flush_leaves_the_disk_there_otherwise() {
    let host = Host::new();
    let mut failed = false;
    let script = move |_: usize, seen: &Seen| match seen.kind == OpKind::Flush && !failed {
        true => {
            failed = true;
            Act::Fail(Errno::EIO)
        }
        false => Act::Do,
    };
    let _served = host.serve(Plan::scripted(script));
    let mut front = host.connect(&Wish::default());
    assert_eq!(front.driver.ask(&Request::flush()).unwrap().status, status::FAILED);
    assert_serves(&mut front);
    assert_eq!(host.back("state").as_deref(), Some(state::CONNECTED));
}

#[test]
fn the_back_ends_kind_and_the_device_are_where_its_nodes_are() {
    let nodes = Nodes::new(GUEST, DEVICE, KIND);
    assert_eq!(nodes.back, "/local/domain/0/backend/vbd3/5/51728");
    assert_eq!(nodes.front, "/local/domain/5/device/vbd/51728");
}
