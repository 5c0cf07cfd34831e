//! Sources on a real io_uring, with a peer on another thread that rings only when it was asked to.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::task::{Poll, Waker};
use std::time::Duration;

use block::{Buf, Pool};
use runtime::{Fd, Handle, Io, RingFlags, Runtime, Source, Uring};
use rustix::event::{EventfdFlags, eventfd};

fn runtime() -> Runtime {
    let pool = Pool::new(64 << 10);
    let uring = Uring::open(RingFlags::Auto, &pool).expect("these tests need io_uring");
    Runtime::new(Box::new(uring), pool)
}

fn bell(flags: EventfdFlags) -> OwnedFd {
    eventfd(0, flags | EventfdFlags::CLOEXEC).unwrap()
}

/// What a ring in shared memory comes down to: a count that the peer raises, and a wish to be rung for.
#[derive(Default)]
struct Shared {
    count: AtomicU64,
    wants_bell: AtomicBool,
    taken: AtomicU64,
}

struct Counter {
    shared: Arc<Shared>,
    seen: Cell<u64>,
    task: RefCell<Option<Waker>>,
    settled: Cell<u64>,
}

impl Counter {
    fn has_more(&self) -> bool {
        self.shared.count.load(Ordering::Acquire) != self.seen.get()
    }

    fn wake(&self) {
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }
}

impl Source for Counter {
    fn settle(&self) {
        self.shared.taken.store(self.seen.get(), Ordering::Release);
        self.settled.set(self.settled.get() + 1);
    }

    fn look(&self) -> bool {
        let news = self.has_more();
        if news {
            self.wake();
        }
        news
    }

    fn arm(&self) -> bool {
        self.shared.wants_bell.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.look()
    }
}

async fn count_up_to(handle: Handle, counter: Rc<Counter>, bell: Rc<Fd>, last: u64) {
    let ringing = counter.clone();
    let rung = handle.clone();
    handle.spawn(async move {
        while rung.readable(&bell).await.is_ok() {
            let mut count = [0; 8];
            rustix::io::read(bell.as_fd(), &mut count).unwrap();
            ringing.wake();
        }
    });
    std::future::poll_fn(|cx| {
        counter.shared.wants_bell.store(false, Ordering::Relaxed);
        counter.seen.set(counter.shared.count.load(Ordering::Acquire));
        if counter.seen.get() == last {
            return Poll::Ready(());
        }
        *counter.task.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    })
    .await;
}

#[test]
fn no_news_of_a_peer_is_lost_whether_the_thread_looks_or_sleeps() {
    const LAST: u64 = 20_000;
    let shared = Arc::new(Shared::default());
    let eventfd = Arc::new(bell(EventfdFlags::NONBLOCK));
    let (peer, rings) = (shared.clone(), eventfd.clone());
    let thread = std::thread::spawn(move || {
        for n in 1..=LAST {
            peer.count.store(n, Ordering::Release);
            fence(Ordering::SeqCst);
            if peer.wants_bell.load(Ordering::Relaxed) {
                rustix::io::write(&*rings, &1u64.to_ne_bytes()).unwrap();
            }
            // Now and then the other side is to fall asleep; now and then it is to be met while it falls asleep.
            if n % 1000 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            } else if n % 3 == 0 {
                while peer.taken.load(Ordering::Acquire) < n {
                    std::hint::spin_loop();
                }
            }
        }
    });
    let runtime = runtime();
    let counter =
        Rc::new(Counter { shared, seen: Cell::new(0), task: RefCell::default(), settled: Cell::new(0) });
    let handle = runtime.handle().clone();
    let fd = handle.register(eventfd.as_fd().try_clone_to_owned().unwrap());
    let watched = counter.clone();
    runtime.block_on(async move {
        let watch = handle.watch(watched.clone());
        count_up_to(handle.clone(), watched.clone(), fd, LAST).await;
        handle.yield_now().await;
        // The last round is settled before the ring gets its turn.
        handle.sleep(Duration::from_millis(1)).await;
        drop(watch);
        let settled = watched.settled.get();
        handle.sleep(Duration::from_millis(1)).await;
        assert_eq!(watched.settled.get(), settled, "not looked after any more");
    });
    thread.join().unwrap();
    assert_eq!(counter.shared.taken.load(Ordering::Acquire), LAST);
}

#[test]
fn a_signal_is_not_lost_and_no_two_are_under_way() {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    for flags in [EventfdFlags::NONBLOCK, EventfdFlags::empty()] {
        let eventfd = bell(flags);
        let fd = handle.register(eventfd.try_clone().unwrap());
        let handle = handle.clone();
        runtime.block_on(async move {
            for _ in 0..1000 {
                handle.signal(&fd);
            }
            assert_eq!(handle.in_flight(), 1);
            handle.readable(&fd).await.unwrap();
            // The second, for all that came after the first, may take a way of its own.
            while handle.in_flight() > 0 {
                handle.sleep(Duration::from_millis(1)).await;
            }
            handle.signal(&fd);
            handle.turn().await;
            while handle.in_flight() > 0 {
                handle.sleep(Duration::from_millis(1)).await;
            }
        });
        let mut count = [0; 8];
        assert_eq!(rustix::io::read(&eventfd, &mut count), Ok(8));
        assert_eq!(u64::from_ne_bytes(count), 3);
    }
}

#[test]
fn a_peer_whose_eventfd_is_full_holds_up_nothing() {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    let eventfd = bell(EventfdFlags::empty());
    // The most that it can count to (eventfd(2)): a write would block.
    rustix::io::write(&eventfd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let fd = handle.register(eventfd.try_clone().unwrap());
    runtime.block_on(async move {
        for _ in 0..10_000 {
            handle.signal(&fd);
            if handle.in_flight().is_multiple_of(100) {
                handle.turn().await;
            }
        }
        handle.turn().await;
        assert_eq!(handle.in_flight(), 1);
        let file = handle.register(tempfile::tempfile().unwrap().into());
        let buf = Buf::from_bytes(b"goes on");
        assert_eq!(handle.start(Io::Write { fd: file, at: 0, buf }, None).await, Ok(7));
        handle.end_signal(&fd);
        while handle.in_flight() > 0 {
            handle.sleep(Duration::from_millis(1)).await;
        }
        handle.signal(&fd);
    });
    drop(runtime); // ends, although the signal never arrived
}

#[test]
#[allow(unsafe_code)]
fn registered_memory_is_read_into_and_its_number_is_used_again() {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    let mut numbers = Vec::new();
    for round in 0..3u8 {
        let memory = Buf::zeroed(8192);
        let segment = memory.segments()[0];
        // SAFETY: `memory` outlives the registration.
        let registered = unsafe { handle.register_memory(segment) }.expect("Linux 5.19 can do it");
        numbers.push(registered.index());
        let ptr = std::ptr::NonNull::new(segment.ptr()).unwrap();
        // SAFETY: `memory` is kept, and written by the kernel only.
        let buf = unsafe { Buf::from_raw(ptr, 8192, Some(registered.index()), Rc::new(memory.clone())) };
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[round + 1; 5000], 0).unwrap();
        let fd = handle.register(file.into());
        let reading = handle.clone();
        runtime.block_on(async move {
            assert_eq!(reading.read(&fd, 0, &buf.slice(100, 6000)).await, Ok(5000));
        });
        let bytes = memory.to_vec();
        assert!(bytes[100..5100].iter().all(|&byte| byte == round + 1));
        assert!(bytes[..100].iter().chain(&bytes[5100..]).all(|&byte| byte == 0));
        drop(registered);
    }
    assert_eq!(numbers, [numbers[0]; 3], "a number that was given back is used again");
}

#[test]
fn a_thread_that_a_completion_has_woken_is_not_rung_for_besides() {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let fd = handle.register(file.into());
    // Each unpark is a write(2) to our eventfd, which /proc counts for this thread.
    let written = || {
        let told = std::fs::read_to_string("/proc/thread-self/io").unwrap();
        let calls = told.lines().find_map(|line| line.strip_prefix("syscw: ")).unwrap();
        calls.parse::<u64>().unwrap()
    };
    let before = written();
    runtime.block_on(async move {
        for _ in 0..1000 {
            // Each has a sleep before it, and a completion that ends it.
            assert_eq!(handle.sync(&fd).await, Ok(0));
        }
    });
    let calls = written() - before;
    assert!(calls < 100, "{calls} calls of write for 1000 completions");
}
