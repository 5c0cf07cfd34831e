//! Sessions: what ends with one, what it leaves alone, and what it waits for.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use block::{Answer, Buf, Errno, Error, Limits, Op, Payload, Pool, Reply, Request, Run, Span, Ticket};
use disk::{Config, Disk, GiveUp, OnError, Policy, Session};
use runtime::{Handle, RingFlags, Runtime, Uring};
use storage::{Io, Storage, Zeroing};

/// What the storage does with a write: the byte that is written says it.
const WELL: u8 = 0;
/// It works on it until it is let go of, and then does it.
const STUCK: u8 = 1;
/// The same, and then it fails with ENOSPC.
const STUCK_AND_FULL: u8 = 2;
const FULL: u8 = 3;
/// Fails with EAGAIN, which is tried again by and by.
const BUSY: u8 = 4;

struct Moody {
    handle: Handle,
    let_go: Cell<bool>,
    /// Whether there is space.
    space: Cell<bool>,
}

impl Storage for Moody {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn limits(&self) -> Limits {
        Limits { align: 1, preferred: 4096, read_only: false, fast_zero: true }
    }

    fn read(&self, _at: u64, _buf: Buf) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }

    fn write(&self, _at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move {
            let how = buf.to_vec()[0];
            while [STUCK, STUCK_AND_FULL].contains(&how) && !self.let_go.get() {
                self.handle.sleep(Duration::from_millis(1)).await;
            }
            match how {
                FULL | STUCK_AND_FULL if !self.space.get() => Err(Error::new(Errno::ENOSPC, "write")),
                BUSY => Err(Error::new(Errno::EAGAIN, "write")),
                _ => Ok(()),
            }
        })
    }

    fn zero(&self, _span: Span, _how: Zeroing) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }

    fn discard(&self, _span: Span) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        Box::pin(async move { Ok(vec![Run { len: span.len(), allocated: true, zero: false }]) })
    }

    fn prefetch(&self, _span: Span) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }

    fn grow(&self) -> Io<'_, u64> {
        Box::pin(async { Err(Error::new(Errno::EOPNOTSUPP, "grow")) })
    }

    fn poison(&self) -> Option<Error> {
        None
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Answer(Result<(), Errno>),
    Left,
}

/// A guest whose requests outlive the process.
#[derive(Default)]
struct Guest(RefCell<BTreeMap<u64, Heard>>);

impl Guest {
    fn hears(&self, ticket: Ticket, what: Heard) {
        assert_eq!(self.0.borrow_mut().insert(ticket.0, what), None, "request {} ends twice", ticket.0);
    }

    fn heard(&self) -> Vec<(u64, Heard)> {
        self.0.borrow().iter().map(|(ticket, heard)| (*ticket, *heard)).collect()
    }
}

impl Answer for Guest {
    fn answer(&self, ticket: Ticket, result: Result<Payload, Errno>) {
        self.hears(ticket, Heard::Answer(result.map(drop)));
    }

    fn leave(&self, ticket: Ticket) {
        self.hears(ticket, Heard::Left);
    }
}

const DONE: Heard = Heard::Answer(Ok(()));

fn failed(errno: Errno) -> Heard {
    Heard::Answer(Err(errno))
}

struct World {
    handle: Handle,
    storage: Rc<Moody>,
    disk: Disk,
}

/// Runs a test on a disk that holds what fails.
fn on_disk<F: Future<Output = ()> + 'static>(test: impl FnOnce(World) -> F) {
    let pool = Pool::new(1 << 20);
    let uring = Uring::open(RingFlags::Auto, &pool).expect("these tests need io_uring");
    let runtime = Runtime::new(Box::new(uring), pool);
    let handle = runtime.handle().clone();
    let storage =
        Rc::new(Moody { handle: handle.clone(), let_go: Cell::new(false), space: Cell::new(false) });
    let policy = Policy { on_error: OnError::Hold, on_enospc: None };
    let config = Config { name: "disk".into(), read_only: false, policy };
    let disk = Disk::new(&handle, storage.clone(), config);
    runtime.block_on(test(World { handle, storage, disk }));
    assert_eq!(runtime.handle().panics(), 0, "a task panicked");
}

fn write(session: &Session, guest: &Rc<Guest>, ticket: u64, how: u8) {
    let op = Op::Write { at: 0, buf: Buf::from_bytes(&[how]), fua: false };
    session.submit(Request { op, reply: Reply::new(guest.clone(), Ticket(ticket)) });
}

impl World {
    /// Waits until this is so.
    async fn until(&self, is_so: impl Fn() -> bool) {
        for _ in 0..20_000 {
            if is_so() {
                return;
            }
            self.handle.sleep(Duration::from_millis(1)).await;
        }
        panic!("it does not come: {}", self.disk.stats());
    }

    /// Waits until so many requests are held, and as many have been tried again before.
    async fn held(&self, count: u64, retries: u64) {
        self.until(|| {
            let stats = self.disk.stats();
            stats.held == count && stats.retries >= retries
        })
        .await;
    }
}

#[test]
fn stopping_ends_what_waits_and_waits_for_what_is_done() {
    for (how, full, busy) in [
        (GiveUp::Tell, failed(Errno::ENOSPC), failed(Errno::EAGAIN)),
        (GiveUp::Leave, Heard::Left, Heard::Left),
    ] {
        on_disk(async move |world| {
            let (session, guest) = (Rc::new(world.disk.session()), Rc::new(Guest::default()));
            for (ticket, how) in [(1, WELL), (2, STUCK), (3, STUCK_AND_FULL), (4, FULL), (5, BUSY)] {
                write(&session, &guest, ticket, how);
            }
            // The pause of what is busy is long by then.
            world.held(1, 8).await;
            let stopped = Rc::new(Cell::new(false));
            let (stopping, done) = (session.clone(), stopped.clone());
            world.handle.spawn(async move {
                stopping.stop(how).await;
                done.set(true);
            });
            world.until(|| guest.heard().len() == 3).await;
            assert_eq!(guest.heard(), [(1, DONE), (4, full), (5, busy)]);
            assert!(!stopped.get(), "storage still works on two");
            world.storage.let_go.set(true);
            world.until(|| stopped.get()).await;
            assert_eq!(guest.heard(), [(1, DONE), (2, DONE), (3, full), (4, full), (5, busy)]);
            let stats = world.disk.stats();
            let left = if how == GiveUp::Leave { 3 } else { 0 };
            assert_eq!((stats.accepted, stats.answered, stats.left), (5, 5 - left, left));
            assert_eq!((stats.in_flight, stats.held, stats.lost), (0, 0, 0));
        });
    }
}

#[test]
fn other_sessions_and_the_policy_stay_as_they_are() {
    on_disk(async move |world| {
        let (ours, other) = (world.disk.session(), world.disk.session());
        let (guest, neighbour) = (Rc::new(Guest::default()), Rc::new(Guest::default()));
        write(&ours, &guest, 1, FULL);
        write(&other, &neighbour, 1, FULL);
        world.held(2, 0).await;
        ours.stop(GiveUp::Leave).await;
        assert_eq!(guest.heard(), [(1, Heard::Left)]);
        assert_eq!((neighbour.heard().len(), world.disk.stats().held), (0, 1));
        // It can be used again, and holds as before.
        write(&ours, &guest, 2, FULL);
        world.held(2, 0).await;
        world.storage.space.set(true);
        world.until(|| neighbour.heard().len() == 1 && guest.heard().len() == 2).await;
        assert_eq!((neighbour.heard(), guest.heard()[1]), (vec![(1, DONE)], (2, DONE)));
        ours.stop(GiveUp::Leave).await;
    });
}

#[test]
fn requests_of_a_session_that_was_dropped_are_answered_as_they_come() {
    on_disk(async move |world| {
        let (session, guest) = (world.disk.session(), Rc::new(Guest::default()));
        write(&session, &guest, 1, FULL);
        write(&session, &guest, 2, STUCK);
        drop(session);
        world.held(1, 0).await;
        world.storage.let_go.set(true);
        world.storage.space.set(true);
        world.until(|| guest.heard().len() == 2).await;
        assert_eq!(guest.heard(), [(1, DONE), (2, DONE)]);
    });
}

#[test]
fn a_stop_that_is_given_up_changes_nothing_more() {
    on_disk(async move |world| {
        let (session, guest) = (world.disk.session(), Rc::new(Guest::default()));
        write(&session, &guest, 1, STUCK);
        {
            let mut stop = std::pin::pin!(session.stop(GiveUp::Leave));
            std::future::poll_fn(|cx| {
                assert!(stop.as_mut().poll(cx).is_pending());
                std::task::Poll::Ready(())
            })
            .await;
        }
        write(&session, &guest, 2, FULL);
        world.held(1, 1).await;
        world.storage.let_go.set(true);
        session.stop(GiveUp::Tell).await;
        assert_eq!(guest.heard(), [(1, DONE), (2, failed(Errno::ENOSPC))]);
    });
}

#[test]
fn what_a_session_left_is_not_answered_when_the_disk_is_closed() {
    on_disk(async move |world| {
        let (ours, other) = (world.disk.session(), world.disk.session());
        let guest = Rc::new(Guest::default());
        write(&ours, &guest, 1, FULL);
        write(&other, &guest, 2, FULL);
        world.held(2, 0).await;
        ours.stop(GiveUp::Leave).await;
        world.disk.close().await.expect("the flush succeeds");
        assert_eq!(guest.heard(), [(1, Heard::Left), (2, failed(Errno::ENOSPC))]);
    });
}
