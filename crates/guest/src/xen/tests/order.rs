//! Barriers: what comes before one is done before it, what comes after it is done after it, over all rings.

use std::time::Duration;

use ::xen::PAGE;
use ::xen::grants::Access;
use block::{Errno, Op, OpKind};

use super::super::DataPath;
use super::super::device::{Parting, Start};
use super::front;
use super::host::{Host, run, segs};

#[test]
fn earlier_writes_complete_before_a_barrier_and_later_ones_begin_after_it() {
    for data in [DataPath::Copy, DataPath::Map] {
        run(|handle| async move {
            let mut host = Host::new(&handle, data);
            let (mut front, mut other) = (host.front(1, 1), host.front(2, 1));
            host.connect(&[&front, &other]).await;
            host.disk.waits.set(true);
            let pages = segs(&host.pages(&[7; PAGE], Access::Write));
            other.ask(&front::request(host.abi, 1, 10, 800, &pages));
            other.ask(&front::discard(host.abi, 11, 0, 808, 8));
            host.waiting(2).await;
            front.put(&front::request(host.abi, 1, 1, 0, &pages));
            front.put(&front::request(host.abi, 0, 2, 0, &pages));
            front.put(&front::request(host.abi, 2, 3, 8, &pages));
            front.put(&front::request(host.abi, 1, 4, 16, &pages));
            front.show();
            let asked = |host: &Host| host.disk.take_asked();
            host.waiting(4).await;
            assert_eq!(
                asked(&host),
                ["write 4096 at 409600", "discard 413696+4096", "write 4096 at 0", "read 4096 at 0"]
            );
            // Nothing of any ring is taken now.
            other.ask(&front::request(host.abi, 0, 12, 0, &pages));
            other.ask(&front::request(host.abi, 1, 13, 816, &pages));
            // The write of its own ring is done, those of the other ring are not.
            host.disk.step(2);
            assert_eq!(host.responses(&mut front, 1).await, [(1, 1, 0)]);
            host.disk.step(0);
            assert_eq!(host.responses(&mut other, 1).await, [(10, 1, 0)]);
            host.quiet().await;
            assert_eq!(asked(&host), [""; 0]);
            host.disk.step(0);
            assert_eq!(host.responses(&mut other, 1).await, [(11, 5, 0)]);
            // Now it begins: all that was answered, and then its own data, durably. The read need not be over.
            host.waiting(2).await;
            assert_eq!(asked(&host), ["flush"]);
            host.disk.step(1);
            host.waiting(2).await;
            assert_eq!(asked(&host), ["write 4096 at 4096 durably"]);
            host.quiet().await;
            assert_eq!(front.responses(), []);
            host.disk.step(1);
            assert_eq!(host.responses(&mut front, 1).await, [(3, 2, 0)]);
            // And then the others.
            host.waiting(4).await;
            let mut after = asked(&host);
            after.sort_unstable();
            assert_eq!(after, ["read 4096 at 0", "write 4096 at 417792", "write 4096 at 8192"]);
            host.disk.step_all();
            assert_eq!(host.responses(&mut front, 2).await.len(), 2);
            assert_eq!(host.responses(&mut other, 2).await.len(), 2);
            host.leave(Parting::Tell).await;
        });
    }
}

#[test]
fn barriers_of_two_rings_follow_each_other() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let (mut front, mut other) = (host.front(1, 1), host.front(2, 1));
        host.connect(&[&front, &other]).await;
        host.disk.waits.set(true);
        let pages = segs(&host.pages(&[7; PAGE], Access::Write));
        for front in [&mut front, &mut other] {
            front.put(&front::request(host.abi, 2, 1, u64::MAX, &[]));
            front.put(&front::request(host.abi, 2, 2, 8, &pages));
            front.show();
        }
        // Two flushes and a flush with a write, for each.
        for _ in 0..6 {
            host.waiting(1).await;
            host.quiet().await;
            assert_eq!(host.disk.waiting(), 1);
            host.disk.step(0);
        }
        assert_eq!(host.responses(&mut front, 2).await, [(1, 2, 0), (2, 2, 0)]);
        assert_eq!(host.responses(&mut other, 2).await, [(1, 2, 0), (2, 2, 0)]);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn a_barrier_is_told_its_own_error_and_no_other() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        let pages = segs(&host.pages(&[7; PAGE], Access::Write));
        let three = |front: &mut front::Front, host: &Host| {
            front.put(&front::request(host.abi, 1, 1, 0, &pages));
            front.put(&front::request(host.abi, 2, 2, 8, &pages));
            front.put(&front::request(host.abi, 1, 3, 16, &pages));
            front.show();
        };
        let at = |wanted: u64| {
            move |op: &Op| {
                let is_it = matches!(op, Op::Write { at, .. } if *at == wanted);
                is_it.then_some(Errno::EIO)
            }
        };
        let cases = [(0, [-1, 0, 0]), (8 * 512, [0, -1, 0]), (16 * 512, [0, 0, -1])];
        for (bad, statuses) in cases {
            host.disk.fails(at(bad));
            three(&mut front, &host);
            let mut responses = host.responses(&mut front, 3).await;
            responses.sort_unstable();
            let [first, second, third] = statuses;
            assert_eq!(responses, [(1, 1, first), (2, 2, second), (3, 1, third)]);
        }
        // Its flush fails: then its data is not written.
        host.quiet().await;
        host.disk.take_asked();
        host.disk.fails(|op| (op.kind() == OpKind::Flush).then_some(Errno::EIO));
        three(&mut front, &host);
        let mut responses = host.responses(&mut front, 3).await;
        responses.sort_unstable();
        assert_eq!(responses, [(1, 1, 0), (2, 2, -1), (3, 1, 0)]);
        let asked = host.disk.take_asked();
        assert!(
            asked.iter().any(|op| op == "flush") && !asked.iter().any(|op| op.contains("durably")),
            "{asked:?}"
        );
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn a_flush_with_data_makes_that_durable_too() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        let pages = segs(&host.pages(&[7; PAGE], Access::Write));
        front.ask(&front::request(host.abi, 3, 1, 8, &pages));
        assert_eq!(host.responses(&mut front, 1).await, [(1, 3, 0)]);
        assert_eq!(host.disk.take_asked(), ["flush", "write 4096 at 4096 durably"]);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn a_barrier_whose_bytes_cannot_be_had_does_nothing_and_stops_nobody() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        let pages = segs(&host.pages(&[7; PAGE], Access::Write));
        front.put(&front::request(host.abi, 2, 1, 8, &[(::xen::grants::GrantRef(400_000), 0, 7)]));
        front.put(&front::request(host.abi, 2, 2, 8, &[(pages[0].0, 7, 0)]));
        front.put(&front::request(host.abi, 1, 3, 8, &pages));
        front.show();
        let mut responses = host.responses(&mut front, 3).await;
        responses.sort_unstable();
        assert_eq!(responses, [(1, 2, -1), (2, 2, -1), (3, 1, 0)]);
        assert_eq!(host.disk.take_asked(), ["write 4096 at 4096"]);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn a_barrier_that_waits_when_the_disk_is_left_is_done_by_the_successor_in_its_place() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        let pages = segs(&host.pages(&[7; PAGE], Access::Write));
        // The write before it is held, so that it waits; the one after it is not taken.
        host.disk.holds.set(true);
        front.put(&front::request(host.abi, 1, 1, 0, &pages));
        front.put(&front::request(host.abi, 2, 2, 8, &pages));
        front.put(&front::request(host.abi, 1, 3, 16, &pages));
        front.show();
        host.quiet().await;
        host.leave(Parting::Leave).await;
        assert_eq!(front.responses(), []);
        host.disk.holds.set(false);
        host.disk.take_asked();
        host.kill().await;
        host.try_connect(&[&front], Start::TakeOver).await.unwrap();
        assert_eq!(host.responses(&mut front, 3).await, [(1, 1, 0), (2, 2, 0), (3, 1, 0)]);
        let expected = ["write 4096 at 0", "flush", "write 4096 at 4096 durably", "write 4096 at 8192"];
        assert_eq!(host.disk.take_asked(), expected);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn after_a_death_a_barrier_waits_for_what_other_rings_have_to_do_again() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let (mut front, mut other) = (host.front(1, 1), host.front(2, 1));
        host.connect(&[&front, &other]).await;
        host.disk.waits.set(true);
        let pages = segs(&host.pages(&[7; PAGE], Access::Write));
        other.ask(&front::request(host.abi, 1, 10, 0, &pages));
        host.waiting(1).await;
        front.ask(&front::request(host.abi, 2, 1, 8, &pages));
        other.ask(&front::request(host.abi, 2, 11, 16, &pages));
        host.quiet().await;
        host.disk.take_asked();
        host.kill().await;
        // The first ring comes first, and begins with a barrier.
        host.try_connect(&[&front, &other], Start::TakeOver).await.unwrap();
        host.waiting(1).await;
        host.quiet().await;
        assert_eq!(host.disk.take_asked(), ["write 4096 at 0"]);
        host.disk.waits.set(false);
        host.disk.step_all();
        assert_eq!(host.responses(&mut front, 1).await, [(1, 2, 0)]);
        assert_eq!(host.responses(&mut other, 2).await, [(10, 1, 0), (11, 2, 0)]);
        let expected = ["flush", "write 4096 at 4096 durably", "flush", "write 4096 at 8192 durably"];
        assert_eq!(host.disk.take_asked(), expected);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn a_barrier_that_is_half_done_when_the_disk_is_left_ends_as_was_said() {
    for (how, expected) in
        [(Parting::Leave, vec![]), (Parting::Tell, vec![(1, 2, -1)]), (Parting::Forget, vec![])]
    {
        run(move |handle| async move {
            let mut host = Host::new(&handle, DataPath::Map);
            let mut front = host.front(1, 1);
            host.connect(&[&front]).await;
            let pages = segs(&host.pages(&[7; PAGE], Access::Write));
            host.disk.waits.set(true);
            front.ask(&front::request(host.abi, 2, 1, 8, &pages));
            host.waiting(1).await;
            let (disk, sleeper) = (host.disk.clone(), host.handle.clone());
            host.handle.spawn(async move {
                sleeper.sleep(Duration::from_millis(5)).await;
                disk.step(0);
            });
            host.leave(how).await;
            assert_eq!(front.responses(), expected);
            assert_eq!(host.disk.take_asked(), ["flush"], "its data is not written");
        });
    }
}
