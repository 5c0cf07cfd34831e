//! Guests that do what no guest should: with their rings, their grants, their bells and their part of the xenstore.
//! They harm themselves at most, and when they behave again, they are served.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blkfront::{Abi, Driver, Front, Request, UNWRITTEN, Wish, op, state, status};
use block::Errno;
use guest::xen::DataPath;
use xen::fake::{Deed, Fate, Guest};
use xen::grants::{Access, GrantRef};

use crate::disk::{Act, fresh};
use crate::serve::{GUEST, Host, Plan, SIZE};

fn ask(driver: &mut Driver, request: &Request) -> (i16, Vec<u8>) {
    let answer = driver.ask(request).unwrap();
    (answer.status, answer.bytes)
}

/// A guest that behaves is served, on each of its rings.
fn assert_served(front: &mut Front) {
    for queue in 0..front.driver.wish().queues {
        let ticket = front.driver.send(queue, &Request::write(16, &[queue as u8 + 1; 4096])).unwrap();
        assert_eq!(front.driver.wait(ticket).unwrap().status, status::OKAY);
        let ticket = front.driver.send(queue, &Request::read(16, 4096)).unwrap();
        assert_eq!(front.driver.wait(ticket).unwrap().bytes, [queue as u8 + 1; 4096]);
    }
}

/// A guest that has gone wrong closes, takes back what it can, and begins anew.
fn start_over(host: &Host, front: Front, wish: &Wish) -> Front {
    for step in [state::CLOSING, state::CLOSED] {
        front.set_state(step).unwrap();
    }
    host.wait_for_back("state", state::CLOSED);
    host.assert_let_go();
    drop(front.crash());
    host.nodes.start_over(&host.store).unwrap();
    host.connect(wish)
}

/// What can be said in a request that makes no sense, and what is answered.
fn nonsense() -> Vec<(&'static str, Request, i16)> {
    let bytes = vec![1; 4096];
    let write = || Request::write(0, &bytes);
    let none = 0xffff_fff0_u32.to_le_bytes();
    vec![
        ("twelve segments", write().lying(1, &[12]), status::ERROR),
        ("255 segments", write().lying(1, &[255]), status::ERROR),
        ("no segments", write().lying(1, &[0]), status::ERROR),
        ("a last sector behind the page", write().cut_in(&[(0, 8)]), status::ERROR),
        ("a last sector far behind", write().cut_in(&[(0, 255)]), status::ERROR),
        ("both sectors behind the page", write().cut_in(&[(8, 8)]), status::ERROR),
        ("a first sector behind the last", write().cut_in(&[(7, 0)]), status::ERROR),
        ("a second segment that makes none", write().cut_in(&[(0, 7), (1, 0)]), status::ERROR),
        ("a page that is not granted", write().lying(24, &none), status::ERROR),
        ("a table that is not granted", write().indirect().lying(28, &none), status::ERROR),
        ("an indirect request of nothing", write().indirect().lying(2, &[0, 0]), status::ERROR),
        ("one of 257 segments", write().indirect().lying(2, &[1, 1]), status::ERROR),
        ("one of 65535 segments", write().indirect().lying(2, &[255, 255]), status::ERROR),
        ("a flush within one", write().indirect().lying(1, &[op::FLUSH_DISKCACHE]), status::ERROR),
        ("a discard within one", write().indirect().lying(1, &[op::DISCARD]), status::ERROR),
        ("one within one", write().indirect().lying(1, &[op::INDIRECT]), status::ERROR),
        ("a table whose segments make none", write().indirect().cut_in(&[(0, 9)]), status::ERROR),
        ("a sector at the end of numbers", Request::write(u64::MAX, &bytes), status::ERROR),
        ("bytes at the end of numbers", Request::write(1 << 55, &bytes), status::ERROR),
        ("a barrier beyond the end", Request::write_barrier(1 << 40, &bytes), status::ERROR),
        ("sectors that wrap around", Request::discard(2, u64::MAX), status::ERROR),
        ("more than there is", Request::discard(0, SIZE as u64 / 512 + 1), status::ERROR),
        ("to leave no trace", Request::secure_discard(0, 8), status::EOPNOTSUPP),
        ("packets", Request::other(4), status::EOPNOTSUPP),
        ("what nobody knows", Request::other(200), status::EOPNOTSUPP),
    ]
}

#[test]
fn nonsense_is_refused_and_the_disk_is_not_asked() {
    for data in [DataPath::Copy, DataPath::Map] {
        let host = Host::new();
        let served = host.serve(Plan { data, ..Plan::default() });
        let mut front = host.connect(&Wish { abi: Abi::X86_64, ..Wish::default() });
        for (what, request, expected) in nonsense() {
            assert_eq!(ask(&mut front.driver, &request).0, expected, "{what}, {data:?}");
        }
        assert_eq!(served.seen(), []);
        assert_served(&mut front);
        front.close().unwrap();
        host.assert_let_go();
    }
}

#[test]
fn what_a_read_cannot_get_is_not_made_up() {
    for data in [DataPath::Copy, DataPath::Map] {
        let host = Host::new();
        // The poison of memory that was not written (0xa5) would be seen.
        let served = host.serve(Plan { data, ..Plan::scripted(|_, _| Act::Fail(Errno::EIO)) });
        let mut front = host.connect(&Wish::default());
        for request in [
            Request::read(0, 4096),
            Request::read(0, 64 << 10).indirect(),
            Request::read(0, 4096).cut_in(&[(0, 8)]),
            Request::read(SIZE as u64 / 512 - 7, 4096),
        ] {
            let (told, bytes) = ask(&mut front.driver, &request);
            assert_eq!(told, status::ERROR);
            assert!(bytes.iter().all(|byte| *byte == UNWRITTEN), "{request:?}, {data:?}");
        }
        assert_eq!(served.seen().len(), 2);
    }
}

#[test]
fn a_ring_with_more_requests_than_it_can_have_stops_and_the_others_go_on() {
    for jump in [33, 1 << 16, 1 << 31, u32::MAX] {
        let host = Host::new();
        let served = host.serve(Plan::default());
        let wish = Wish { queues: 2, ..Wish::default() };
        let mut front = host.connect(&wish);
        assert_served(&mut front);
        let seen = served.seen().len();
        let (asked, answered) = (front.driver.ring(0).asked(), front.driver.ring(0).answered());
        front.driver.ring(0).jump(asked.wrapping_add(jump));
        front.driver.kick(0);
        for _ in 0..20 {
            let ticket = front.driver.send(1, &Request::read(0, 4096)).unwrap();
            assert_eq!(front.driver.wait(ticket).unwrap().status, status::OKAY);
        }
        assert_eq!(front.driver.ring(0).answered(), answered, "by {jump}");
        assert_eq!(served.seen().len(), seen + 20);
        let mut front = start_over(&host, front, &wish);
        assert_served(&mut front);
    }
}

/// Does something on another thread until dropped.
struct Meanwhile<'a>(&'a AtomicBool);

impl Drop for Meanwhile<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `test` while `mischief` is done again and again.
fn while_doing(mischief: impl Fn(u64) + Send, test: impl FnOnce()) {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let is_over = &is_over;
        let _guard = Meanwhile(is_over);
        scope.spawn(move || {
            for round in 0.. {
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
                mischief(round);
            }
        });
        test();
    });
}

/// A number for each round and place, from a generator (SplitMix64).
fn scatter(seed: u64) -> u64 {
    let mixed = (seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[test]
fn words_that_change_while_they_are_read_harm_nobody() {
    for (data, is_indirect) in [(DataPath::Copy, false), (DataPath::Map, false), (DataPath::Copy, true)] {
        let host = Host::new();
        let late = |nth: usize, _: &_| if nth.is_multiple_of(3) { Act::Late(50) } else { Act::Do };
        let served = host.serve(Plan { data, ..Plan::scripted(late) });
        let mut front = host.connect(&Wish::default());
        // The requests are right, and what they say is turned over while they are there; also what a table says.
        let request = Request::write(64, &[5; 3 * 4096]);
        let request = if is_indirect { request.indirect() } else { request };
        let places: Vec<usize> =
            (0..32 * 112).map(|at| 64 + at).map(|at| front.driver.ring(0).address(at)).collect();
        let (guest, table): (Guest, usize) = (host.guest.clone(), 4096 * (host.guest.pages() - 6));
        while_doing(
            |round| {
                let word = scatter(round);
                let at = match is_indirect && round % 2 == 0 {
                    true => table + word as usize % 4096,
                    // Most of what matters is at the start of a slot.
                    false => places[(word as usize >> 8) % 32 * 112 + word as usize % 40],
                };
                let before = guest.read(at, 1);
                guest.write(at, &[(word >> 32) as u8]);
                std::hint::spin_loop();
                guest.write(at, &before);
            },
            || {
                // Answers need not be what this driver knows: it only looks how many there are.
                let mut bytes = Vec::new();
                for _ in 0..32 {
                    front.driver.prepare(0, &request).unwrap();
                }
                for nth in 0..32 {
                    let slot = front.driver.ring(0).slot(nth);
                    bytes.push(front.driver.ring(0).get(slot, 112));
                }
                front.driver.publish(0);
                let mut asked = front.driver.ring(0).asked();
                for _ in 0..200 {
                    let answered = || front.driver.ring(0).answered();
                    wait_until("all is answered", answered, asked);
                    for (nth, bytes) in bytes.iter().enumerate() {
                        let slot = front.driver.ring(0).slot(nth as u32);
                        front.driver.ring(0).put(slot, bytes);
                    }
                    asked = asked.wrapping_add(32);
                    front.driver.ring(0).jump(asked);
                    front.driver.kick(0);
                }
            },
        );
        assert!(served.seen().len() > 200, "some of it made sense");
        let mut front = start_over(&host, front, &Wish::default());
        assert_served(&mut front);
    }
}

#[track_caller]
fn wait_until(what: &str, mut now: impl FnMut() -> u32, wanted: u32) {
    let begun = std::time::Instant::now();
    while now() != wanted {
        assert!(begun.elapsed() < Duration::from_secs(40), "{what}: {} and not {wanted}", now());
        std::thread::yield_now();
    }
}

#[test]
fn who_rings_all_the_time_keeps_nobody_else_waiting() {
    let host = Host::new();
    let _served = host.serve(Plan::default());
    let mut front = host.connect(&Wish { queues: 2, ..Wish::default() });
    let port = front.driver.specs()[0].port;
    while_doing(
        |_| host.guest.ring(port),
        || {
            for nth in 0..500_u64 {
                let ticket = front.driver.send(1, &Request::read(nth % 100, 4096)).unwrap();
                let answer = front.driver.wait(ticket).unwrap();
                assert!(answer.bytes == fresh(nth % 100 * 512, 4096));
            }
        },
    );
    assert_served(&mut front);
}

#[test]
fn in_any_weather_each_request_is_answered_and_no_answer_is_wrong() {
    for (data, persistent) in [(DataPath::Copy, false), (DataPath::Map, false), (DataPath::Map, true)] {
        let host = Host::new();
        let _served = host.serve(Plan { data, ..Plan::default() });
        let mut front = host.connect(&Wish { persistent, ..Wish::default() });
        // Statuses of grant_table.h, again and again, and calls that fail for a lack of memory.
        host.world.script(|deed, nth| match (deed, scatter(nth) % 16) {
            (Deed::Map | Deed::Copy, 0) => Fate::Fail(Errno::ENOMEM),
            (Deed::Piece, 0) => Fate::Say(-1),
            (Deed::Piece, 1) => Fate::Say(-12),
            (Deed::Piece, 2) => Fate::SayNothing,
            (Deed::Piece, 3) => Fate::Say(-3),
            _ => Fate::Do,
        });
        let (mut done, mut failed) = (0, 0);
        for round in 0..100_u64 {
            // Each round has a place of its own, which is written at most once.
            let (at, len) = (round * 64, 512 * (1 + scatter(round) as usize % 60));
            let bytes: Vec<u8> = (0..len).map(|at| (at as u64 * 7 + round) as u8).collect();
            let request = Request::write(at, &bytes);
            let request = if len > 11 * 4096 || round % 3 == 0 { request.indirect() } else { request };
            let written = ask(&mut front.driver, &request).0;
            for _ in 0..4 {
                let request = Request::read(at, len);
                let request = if len > 11 * 4096 { request.indirect() } else { request };
                match (ask(&mut front.driver, &request), written) {
                    ((status::OKAY, read), status::OKAY) => assert!(read == bytes, "round {round}"),
                    ((status::OKAY, read), _) => assert!(read == fresh(at * 512, len), "round {round}"),
                    ((told, _), _) => assert_eq!(told, status::ERROR),
                }
            }
            if written == status::OKAY { done += 1 } else { failed += 1 }
        }
        assert!(done > 0, "{data:?}");
        // What cannot be mapped is copied.
        assert!(failed > 0 || data == DataPath::Map, "{data:?}");
        host.world.unscript();
        assert_served(&mut front);
        front.close().unwrap();
        host.assert_let_go();
    }
}

#[test]
fn a_ring_that_cannot_be_had_is_refused_and_nothing_of_it_is_kept() {
    let host = Host::new();
    let _served = host.serve(Plan::default());
    let wish = Wish { queues: 2, order: 1, ..Wish::default() };
    for deed in [Deed::Map, Deed::Bind] {
        for nth in 0..2 {
            host.world.script(move |done, count| match done == deed && count == nth {
                true => Fate::Fail(Errno::ENOMEM),
                false => Fate::Do,
            });
            Front::connect(&host.store, &host.guest, &host.nodes, &wish).err().expect("the back end closes");
            host.world.unscript();
            host.assert_let_go();
            host.store.write_as(GUEST, &format!("{}/state", host.nodes.front), state::CLOSED).unwrap();
            host.wait_for_back("state", state::CLOSED);
            host.nodes.start_over(&host.store).unwrap();
        }
    }
    assert_served(&mut host.connect(&wish));
}

#[test]
fn nodes_that_make_no_sense_connect_nobody_and_break_nothing() {
    let host = Host::new();
    let _served = host.serve(Plan::default());
    let wish = Wish { queues: 2, order: 1, ..Wish::default() };
    let long = "7".repeat(2000);
    let values = [
        "",
        " ",
        "-1",
        "+",
        "x",
        "0x10",
        "1 ",
        "4294967296",
        "99999999999999999999",
        "\u{1}\u{2}",
        "ä",
        &long,
    ];
    let keys = [
        "ring-page-order",
        "queue-0/ring-ref0",
        "queue-1/ring-ref1",
        "queue-0/event-channel",
        "multi-queue-num-queues",
        "protocol",
    ];
    for key in keys {
        for value in values {
            let front = Front::prepare(&host.store, &host.guest, &host.nodes, &wish).unwrap();
            front.write(key, value).unwrap();
            front.set_state(state::INITIALISED).unwrap();
            let told = front.wait_for_state(state::CONNECTED);
            assert!(told.is_err(), "{key} is {value:?}, and the back end connects");
            host.assert_let_go();
            front.set_state(state::CLOSED).unwrap();
            host.wait_for_back("state", state::CLOSED);
            drop(front.crash());
            host.nodes.start_over(&host.store).unwrap();
        }
    }
    assert_served(&mut host.connect(&wish));
}

#[test]
fn a_flood_of_writes_to_a_node_drowns_nobody() {
    let host = Host::new();
    let _served = host.serve(Plan::default());
    let mut front = host.connect(&Wish::default());
    for round in 0..30_000 {
        front.set_state(state::CONNECTED).unwrap();
        if round % 3000 == 0 {
            assert_served(&mut front);
        }
    }
    assert_served(&mut front);
    front.close().unwrap();
    host.assert_let_go();
}

#[test]
fn states_that_flap_end_where_they_end() {
    let host = Host::new();
    let _served = host.serve(Plan::default());
    let mut front = host.connect(&Wish::default());
    for round in 0..20_u64 {
        assert_served(&mut front);
        for step in 0..100 {
            // Also such as there are not.
            let said = (scatter(round * 1000 + step) % 9).to_string();
            front.set_state(&said).unwrap();
        }
        // Whatever the back end has made of it, a front end that closes and begins anew is served.
        front.set_state(state::CLOSED).unwrap();
        host.store.wait_until("the back end has settled", |read| {
            let back = read(&format!("{}/state", host.nodes.back));
            matches!(back.as_deref(), Some(state::CLOSED | state::INIT_WAIT))
        });
        drop(front.crash());
        host.nodes.start_over(&host.store).unwrap();
        front = host.connect(&Wish::default());
    }
    assert_served(&mut front);
}

#[test]
fn a_guest_of_another_number_cannot_be_named_in_its_nodes() {
    // A grant and a port of somebody else's mean nothing: they are looked for in the guest that the disk is for.
    let host = Host::new();
    let _served = host.serve(Plan::default());
    let other = host.world.domain(xen::Domain(6), 8);
    let theirs = GrantRef(4000);
    other.grant_as(theirs, 0, Access::Write);
    let front = Front::prepare(&host.store, &host.guest, &host.nodes, &Wish::default()).unwrap();
    front.write("ring-ref", &theirs.0.to_string()).unwrap();
    front.set_state(state::INITIALISED).unwrap();
    assert!(front.wait_for_state(state::CONNECTED).is_err());
    assert_eq!((other.mappings(theirs), host.world.counts().mapped), (0, 0));
}
