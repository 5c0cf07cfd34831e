//! The executor on a real io_uring: the kernel is what these tests compare with.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::time::Duration;

use block::{Buf, Errno, Pool, Span};
use runtime::{Allocate, BoxFuture, Handle, Io, Mailbox, RingFlags, Runtime, Seek, Uring, join_all};

fn runtime_with(flags: RingFlags, entries: u32, completions: u32) -> Runtime {
    let pool = Pool::new(64 << 10);
    let uring = Uring::with_queues(flags, &pool, entries, completions).expect("these tests need io_uring");
    Runtime::new(Box::new(uring), pool)
}

fn runtime() -> Runtime {
    runtime_with(RingFlags::Auto, 16, 64)
}

/// Runs `test` with each set of ring flags.
fn each<F: Future<Output = ()> + 'static>(test: impl Fn(Handle) -> F) {
    for flags in [RingFlags::Auto, RingFlags::Deferred, RingFlags::Cooperative, RingFlags::Plain] {
        let runtime = runtime_with(flags, 16, 64);
        runtime.block_on(test(runtime.handle().clone()));
    }
}

fn write(handle: &Handle, fd: &Rc<runtime::Fd>, at: u64, buf: &Buf) -> runtime::Completion {
    handle.start(Io::Write { fd: fd.clone(), at, buf: buf.clone() }, None)
}

#[test]
fn what_is_written_is_in_the_file_and_what_is_in_the_file_is_read() {
    each(|handle| async move {
        let file = tempfile::tempfile().unwrap();
        let fd = handle.register(OwnedFd::from(file.try_clone().unwrap()));
        for buf in [Buf::from_bytes(b"0123456789"), handle.pool().take(10)] {
            buf.put(0, b"abcdefghij");
            assert_eq!(write(&handle, &fd, 5, &buf).await, Ok(10));
            let mut seen = [0; 15];
            file.read_exact_at(&mut seen, 0).unwrap();
            assert_eq!(&seen, b"\0\0\0\0\0abcdefghij");
            file.write_all_at(b"XY", 6).unwrap();
            assert_eq!(handle.read(&fd, 5, &buf).await, Ok(10));
            assert_eq!(buf.to_vec(), b"aXYdefghij");
        }
        let pieces = Buf::concat(vec![Buf::zeroed(3), Buf::zeroed(4)]);
        assert_eq!(handle.read(&fd, 8, &pieces).await, Ok(7));
        assert_eq!(pieces.to_vec(), b"defghij");
        assert_eq!(handle.read(&fd, 15, &pieces).await, Ok(0), "the end of the file");
        assert_eq!(handle.sync(&fd).await, Ok(0));
    });
}

#[test]
fn the_kernels_errors_arrive_as_they_are() {
    each(|handle| async move {
        let full = handle.register(File::options().write(true).open("/dev/full").unwrap().into());
        assert_eq!(write(&handle, &full, 0, &Buf::zeroed(512)).await, Err(Errno::ENOSPC));
        let read_only = handle.register(File::open("/dev/null").unwrap().into());
        assert_eq!(write(&handle, &read_only, 0, &Buf::zeroed(1)).await, Err(Errno::EBADF));
    });
}

#[test]
fn space_is_given_back_and_holes_are_found() {
    each(|handle| async move {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 65536], 0).unwrap();
        file.set_len(1 << 20).unwrap();
        let fd = handle.register(OwnedFd::from(file.try_clone().unwrap()));
        let span = Span::new(4096, 8192).unwrap();
        assert_eq!(handle.allocate(&fd, Allocate::PunchHole, span).await, Ok(0));
        assert_eq!(handle.seek(&fd, 0, Seek::Hole).await, Ok(4096));
        assert_eq!(handle.seek(&fd, 4096, Seek::Data).await, Ok(12288));
        assert_eq!(handle.seek(&fd, 65536, Seek::Data).await, Err(Errno::ENXIO));
        let mut seen = [1; 8192];
        file.read_exact_at(&mut seen, 4096).unwrap();
        assert_eq!(seen, [0; 8192]);
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    });
}

#[test]
fn more_operations_than_the_queues_hold_all_complete() {
    for flags in [RingFlags::Deferred, RingFlags::Cooperative, RingFlags::Plain] {
        let runtime = runtime_with(flags, 2, 4);
        let handle = runtime.handle().clone();
        runtime.block_on(async move {
            let fd = handle.register(tempfile::tempfile().unwrap().into());
            let writes: Vec<BoxFuture<'_, Result<u64, Errno>>> = (0..500u64)
                .map(|at| {
                    let completion = write(&handle, &fd, at * 8, &Buf::from_bytes(&at.to_le_bytes()));
                    Box::pin(completion) as BoxFuture<'_, _>
                })
                .collect();
            assert!(join_all(writes).await.iter().all(|result| *result == Ok(8u64)));
            let buf = Buf::zeroed(4000);
            assert_eq!(handle.read(&fd, 0, &buf).await, Ok(4000));
            for (at, bytes) in buf.to_vec().chunks(8).enumerate() {
                assert_eq!(bytes, (at as u64).to_le_bytes());
            }
        });
    }
}

#[test]
fn an_abandoned_read_keeps_its_memory_until_the_kernel_is_done() {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    runtime.block_on(async move {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let fd = handle.register(reader.into());
        let buf = Buf::zeroed(4);
        let watched: Rc<dyn std::any::Any> = Rc::new(());
        let weak = Rc::downgrade(&watched);
        let io = Io::Read { fd: fd.clone(), at: u64::MAX, buf: buf.clone() };
        let mut completion = Box::pin(handle.start(io, Some(watched)));
        std::future::poll_fn(|cx| {
            assert!(completion.as_mut().poll(cx).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        handle.yield_now().await;
        drop(completion);
        assert!(weak.upgrade().is_some(), "the kernel has not answered yet");
        assert_eq!(handle.in_flight(), 1);
        writer.write_all(b"late").unwrap();
        while handle.in_flight() > 0 {
            handle.sleep(Duration::from_millis(1)).await;
        }
        assert!(weak.upgrade().is_none());
        assert_eq!(buf.to_vec(), b"late", "it was still this memory that was written");
    });
}

#[test]
fn what_waits_for_a_peer_is_cancelled_when_nobody_wants_it() {
    each(|handle| async move {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let fd = handle.register(ours.into());
        drop(handle.receive(&fd, &Buf::zeroed(4)));
        while handle.in_flight() > 0 {
            handle.sleep(Duration::from_millis(1)).await;
        }
        theirs.write_all(b"kept").unwrap();
        let buf = Buf::zeroed(8);
        assert_eq!(handle.receive(&fd, &buf).await, Ok(4));
        assert_eq!(buf.slice(0, 4).to_vec(), b"kept");
    });
}

#[test]
fn sockets_carry_pieces_and_tell_their_end() {
    each(|handle| async move {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let listening = handle.register(OwnedFd::from(listener));
        let mut theirs = UnixStream::connect(dir.path().join("socket")).unwrap();
        let fd = handle.register(handle.accept(&listening).await.unwrap());
        let pieces = Buf::concat((0..1000).map(|at: u32| Buf::from_bytes(&at.to_le_bytes())).collect());
        assert_eq!(handle.send(&fd, &pieces).await, Ok(4000));
        let mut seen = vec![0; 4000];
        theirs.read_exact(&mut seen).unwrap();
        assert_eq!(seen, pieces.to_vec());
        theirs.write_all(b"bye").unwrap();
        drop(theirs);
        let to = Buf::concat(vec![Buf::zeroed(1), Buf::zeroed(9)]);
        assert_eq!(handle.receive(&fd, &to).await, Ok(3));
        assert_eq!(to.slice(0, 3).to_vec(), b"bye");
        assert_eq!(handle.receive(&fd, &to).await, Ok(0));
        assert_eq!(handle.send(&fd, &pieces).await, Err(Errno::EPIPE));
    });
}

#[test]
fn messages_from_another_thread_wake_a_sleeping_executor() {
    each(|handle| async move {
        let mut mailbox = Mailbox::default();
        let sender = mailbox.sender();
        let thread = std::thread::spawn(move || {
            for number in 0..1000 {
                if number % 100 == 0 {
                    std::thread::sleep(Duration::from_millis(2));
                }
                sender.send(number);
            }
        });
        for number in 0..1000 {
            assert_eq!(mailbox.receive().await, number);
        }
        thread.join().unwrap();
        drop(handle);
    });
}

#[test]
fn timers_fire_in_their_order_and_not_before() {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    runtime.block_on(async move {
        let order = Rc::new(RefCell::new(Vec::new()));
        let start = std::time::Instant::now();
        for delay in [30, 10, 20] {
            let (order, sleep) = (order.clone(), handle.sleep(Duration::from_millis(delay)));
            handle.spawn(async move {
                sleep.await;
                order.borrow_mut().push(delay);
            });
        }
        drop(handle.sleep(Duration::from_millis(1)));
        handle.sleep(Duration::from_millis(40)).await;
        assert!(start.elapsed() >= Duration::from_millis(40));
        assert_eq!(*order.borrow(), [10, 20, 30]);
    });
}

#[test]
fn a_panicking_task_ends_alone_and_its_scope_outlives_its_io() {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    runtime.block_on(async move {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let fd = handle.register(reader.into());
        struct Ended(Rc<Cell<bool>>);
        impl Drop for Ended {
            fn drop(&mut self) {
                self.0.set(true);
            }
        }
        let ended = Rc::new(Cell::new(false));
        let (h, scope) = (handle.clone(), Rc::new(Ended(ended.clone())));
        handle.spawn_in(scope, async move {
            let read = h.start(Io::Read { fd, at: u64::MAX, buf: Buf::zeroed(1) }, None);
            h.yield_now().await;
            drop(read);
            panic!("this panic is part of the test");
        });
        while handle.panics() == 0 {
            handle.yield_now().await;
        }
        assert!(!ended.get(), "the kernel still has the memory");
        writer.write_all(b"x").unwrap();
        while handle.in_flight() > 0 {
            handle.sleep(Duration::from_millis(1)).await;
        }
        assert!(ended.get());
    });
}

#[test]
fn dropping_the_runtime_drops_tasks_and_waits_for_the_kernel() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let buf = Buf::zeroed(100);
    let alive = Rc::new(());
    let runtime = runtime();
    let handle = runtime.handle().clone();
    let (inner, kept, memory) = (handle.clone(), alive.clone(), buf.clone());
    runtime.block_on(async move {
        let fd = inner.register(ours.into());
        let h = inner.clone();
        inner.spawn(async move {
            let _kept = kept;
            let result = h.receive(&fd, &memory).await;
            panic!("nothing was sent: {result:?}");
        });
        inner.yield_now().await;
    });
    drop(runtime);
    assert_eq!(Rc::strong_count(&alive), 1);
    assert_eq!(handle.in_flight(), 0);
}

#[test]
fn an_accept_that_nobody_waits_for_closes_what_it_accepted_and_nothing_else() {
    each(|handle| async move {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listening = handle.register(UnixListener::bind(&path).unwrap().into());
        // Cancelled: it completes with an errno, which is no descriptor.
        drop(handle.start(Io::Accept { fd: listening.clone() }, None));
        while handle.in_flight() > 0 {
            handle.sleep(Duration::from_millis(1)).await;
        }
        // Completed, and then dropped.
        let accepting = handle.start(Io::Accept { fd: listening }, None);
        let mut client = UnixStream::connect(&path).unwrap();
        handle.sleep(Duration::from_millis(10)).await;
        drop(accepting);
        assert_eq!(client.read(&mut [0]).unwrap(), 0, "the other end is closed");
    });
}

#[test]
fn a_receive_that_is_called_back_tells_what_it_received() {
    each(|handle| async move {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let fd = handle.register(ours.into());
        let buf = Buf::zeroed(100);
        let nothing = handle.receive(&fd, &buf);
        handle.yield_now().await;
        nothing.cancel();
        assert_eq!(nothing.await, Err(Errno::ECANCELED));
        let something = handle.receive(&fd, &buf);
        theirs.write_all(b"some").unwrap();
        handle.sleep(Duration::from_millis(1)).await;
        something.cancel();
        assert_eq!(something.await, Ok(4));
    });
}
