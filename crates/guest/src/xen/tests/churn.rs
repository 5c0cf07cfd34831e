//! Front ends that come and go ten thousand times with requests on their way: nothing of theirs is left behind.

use std::cell::Cell;
use std::rc::Rc;

use ::xen::PAGE;
use ::xen::grants::Access;

use super::super::DataPath;
use super::super::device::{Parting, Start};
use super::front::{self, Front, Seg};
use super::host::{Host, run, segs};

/// A descriptor or a mapping that were lost each time would be more than a process may have.
const ROUNDS: usize = 10_000;

/// Asks for something of each kind.
fn ask(host: &Host, front: &mut Front, pages: &[Seg], count: usize) {
    for nth in 0..count as u64 {
        let at = nth as usize % pages.len();
        let bytes = match nth % 5 {
            0 => front::request(host.abi, 1, nth, 8 * nth, &pages[at..=at]),
            1 => front::request(host.abi, 0, nth, 8 * nth, &pages[at..=at]),
            2 => front::request(host.abi, 3, nth, u64::MAX, &[]),
            3 => front::request(host.abi, 2, nth, 8 * nth, &pages[..1]),
            _ => front::request(host.abi, 0, nth, u64::MAX, &pages[at..=at]),
        };
        front.put(&bytes);
    }
    front.show();
}

#[test]
fn front_ends_that_come_and_go_with_requests_on_their_way_leave_nothing_behind() {
    run(|handle| async move {
        let hosts = [DataPath::Copy, DataPath::Map].map(|data| Host::new(&handle, data));
        for mut host in hosts {
            let pages = segs(&host.pages(&[7; 4 * PAGE], Access::Write));
            // A disk that takes its time, whoever has left meanwhile.
            let (is_over, disk, clock) = (Rc::new(Cell::new(false)), host.disk.clone(), handle.clone());
            let is_done = is_over.clone();
            handle.spawn(async move {
                while !is_done.get() {
                    if disk.waiting() > 0 {
                        disk.step(disk.waiting() - 1);
                    }
                    clock.yield_now().await;
                }
            });
            for round in 0..ROUNDS / 2 {
                host.persistent = round % 2 == 0;
                host.disk.waits.set(round % 3 > 0);
                let mut front = host.front(1, 1);
                host.connect(&[&front]).await;
                ask(&host, &mut front, &pages, round % 11);
                for _ in 0..round % 7 {
                    handle.yield_now().await;
                }
                if round % 5 == 0 {
                    host.leave(Parting::Leave).await;
                    host.try_connect(&[&front], Start::TakeOver).await.unwrap();
                }
                let how = if round % 4 == 0 { Parting::Forget } else { Parting::Tell };
                host.leave(how).await;
                // The disk has had the last word of each request: what was answered is in the ring, each once.
                let mut told: Vec<u64> = front.responses().iter().map(|(id, ..)| *id).collect();
                told.sort_unstable();
                assert!(told.windows(2).all(|pair| pair[0] < pair[1]), "{told:?} in round {round}");
                assert_eq!(host.disk.waiting(), 0, "round {round}");
                for gref in &front.refs {
                    host.guest.end(*gref).unwrap();
                }
                host.guest.close(front.port);
            }
            is_over.set(true);
            for (gref, ..) in &pages {
                host.guest.end(*gref).unwrap();
            }
            assert_eq!(host.guest.granted(), 0);
        }
    });
}
