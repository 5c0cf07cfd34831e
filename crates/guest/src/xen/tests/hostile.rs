//! Front ends that do what no front end should: their ring stops, or their request fails, and nobody else notices.

use std::cell::Cell;
use std::rc::Rc;

use ::xen::PAGE;
use ::xen::grants::Access;

use super::super::DataPath;
use super::super::device::{Parting, Start};
use super::front;
use super::host::{Host, run, segs};

#[test]
fn requests_beyond_the_ring_stop_it_and_no_other() {
    for jump in [33, 1000, 1 << 31, u32::MAX - 5] {
        run(move |handle| async move {
            let mut host = Host::new(&handle, DataPath::Auto);
            let (mut front, mut other) = (host.front(1, 1), host.front(2, 1));
            host.connect(&[&front, &other]).await;
            host.disk.waits.set(true);
            let pages = segs(&host.pages(&[7; PAGE], Access::Write));
            front.ask(&front::request(host.abi, 1, 1, 0, &pages));
            host.waiting(1).await;
            front.guest.store(front.at, front.made.wrapping_add(jump));
            front.guest.ring(front.port);
            host.quiet().await;
            assert_eq!(host.disk.waiting(), 1);
            // What was taken before is answered.
            host.disk.waits.set(false);
            host.disk.step_all();
            assert_eq!(host.responses(&mut front, 1).await, [(1, 1, 0)]);
            other.ask(&front::request(host.abi, 1, 2, 0, &pages));
            assert_eq!(host.responses(&mut other, 1).await, [(2, 1, 0)]);
            // It does not come back to life.
            front.guest.store(front.at, front.made);
            front.ask(&front::request(host.abi, 1, 3, 0, &pages));
            host.quiet().await;
            assert_eq!(front.responses(), []);
            host.leave(Parting::Tell).await;
        });
    }
}

#[test]
fn a_ring_that_makes_no_sense_from_the_start_is_not_served_and_the_others_are() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let (mut front, mut other) = (host.front(1, 1), host.front(2, 1));
        front.guest.store(front.at, 33);
        host.connect(&[&front, &other]).await;
        let pages = segs(&host.pages(&[7; PAGE], Access::Write));
        other.ask(&front::request(host.abi, 1, 2, 0, &pages));
        assert_eq!(host.responses(&mut other, 1).await, [(2, 1, 0)]);
        // Nor after a takeover with responses that nobody has given.
        host.disk.waits.set(true);
        other.ask(&front::request(host.abi, 1, 3, 0, &pages));
        host.waiting(1).await;
        front.guest.store(front.at, 0);
        front.guest.store(front.at + 8, 1);
        host.kill().await;
        host.disk.waits.set(false);
        host.try_connect(&[&front, &other], Start::TakeOver).await.unwrap();
        assert_eq!(host.responses(&mut other, 1).await, [(3, 1, 0)]);
        assert_eq!(front.seen, 0);
        front.guest.store(front.at + 8, 0);
        assert_eq!(front.responses(), []);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn a_front_end_that_rings_for_nothing_gets_nothing() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let (mut front, mut other) = (host.front(1, 1), host.front(2, 1));
        host.connect(&[&front, &other]).await;
        let pages = segs(&host.pages(&[7; PAGE], Access::Write));
        for nth in 0..200 {
            front.guest.ring(front.port);
            other.ask(&front::request(host.abi, 1, nth, 0, &pages));
            assert_eq!(host.responses(&mut other, 1).await, [(nth, 1, 0)]);
        }
        assert_eq!(front.responses(), []);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn a_request_that_changes_after_it_was_taken_is_done_as_it_was() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let mut front = host.front(1, 1);
        host.connect(&[&front]).await;
        host.disk.waits.set(true);
        let pages = segs(&host.pages(&[7; PAGE], Access::Write));
        front.ask(&front::request(host.abi, 1, 1, 0, &pages));
        host.waiting(1).await;
        front.guest.write(front.at + 64, &front::request(host.abi, 0, 99, 800, &[]));
        host.disk.step(0);
        assert_eq!(host.responses(&mut front, 1).await, [(1, 1, 0)]);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn a_front_end_that_takes_no_responses_makes_no_more_requests_than_its_ring_has() {
    run(|handle| async move {
        let mut host = Host::new(&handle, DataPath::Auto);
        let front = host.front(1, 1);
        host.connect(&[&front]).await;
        // All of the ring's places are requests, again and again, whatever was answered there.
        let asked = Rc::new(Cell::new(0));
        let pages = segs(&host.pages(&[7; PAGE], Access::Write));
        for round in 1..50u32 {
            for nth in 0..32 {
                let at = front.at + 64 + 112 * nth;
                front.guest.write(at, &front::request(host.abi, 1, u64::MAX, 0, &pages));
            }
            front.guest.store(front.at, 32 * round);
            front.guest.ring(front.port);
            host.quiet().await;
            asked.set(asked.get() + host.disk.take_asked().len());
        }
        assert_eq!(asked.get(), 49 * 32);
        assert_eq!(front.guest.load(front.at + 8), 49 * 32);
        host.leave(Parting::Tell).await;
    });
}

#[test]
fn bytes_that_mean_nothing_are_answered_or_stop_the_ring() {
    // A generator of its own, the same each time (Numerical Recipes' constants).
    let state = Rc::new(Cell::new(12345u64));
    run(move |handle| async move {
        let next = move || {
            let value = state.get().wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state.set(value);
            (value >> 33) as u32
        };
        for data in [DataPath::Copy, DataPath::Map] {
            let mut host = Host::new(&handle, data);
            let mut front = host.front(1, 1);
            host.connect(&[&front]).await;
            let pages = segs(&host.pages(&[7; 2 * PAGE], Access::Write));
            for _ in 0..60 {
                for _ in 0..32 {
                    let mut bytes: Vec<u8> = (0..112).map(|_| next() as u8).collect();
                    // Half of them nearly make sense.
                    if next() % 2 == 0 {
                        bytes = front::request(
                            host.abi,
                            (next() % 8) as u8,
                            next().into(),
                            u64::from(next() % 9000),
                            &pages,
                        );
                        let at = next() as usize % 48;
                        bytes[at] = next() as u8;
                    }
                    front.put(&bytes);
                }
                front.show();
                host.responses(&mut front, 32).await;
            }
            host.leave(Parting::Tell).await;
        }
    });
}
