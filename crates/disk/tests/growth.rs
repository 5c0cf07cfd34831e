//! A disk that grows: who is told, who is let further, and what a failure changes.

use std::cell::{Cell, RefCell};
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use block::{Answer, Buf, Errno, Op, Payload, Pool, Reply, Request, Ticket};
use disk::{Config, Disk, Policy};
use runtime::{Handle, RingFlags, Runtime, Uring};
use storage::file::{File, Options, open};

#[derive(Default)]
struct Guest(RefCell<Vec<Result<Payload, Errno>>>);

impl Answer for Guest {
    fn answer(&self, _ticket: Ticket, result: Result<Payload, Errno>) {
        self.0.borrow_mut().push(result);
    }
}

/// Runs a test on a disk of 1000 bytes.
fn on_disk<F: Future<Output = ()> + 'static>(test: impl FnOnce(Handle, Disk, Rc<std::fs::File>) -> F) {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("disk.raw");
    let outside = std::fs::File::create_new(&path).unwrap();
    outside.set_len(1000).unwrap();
    let pool = Pool::new(1 << 20);
    let uring = Uring::open(RingFlags::Auto, &pool).expect("these tests need io_uring");
    let runtime = Runtime::new(Box::new(uring), pool);
    let file = File::new(runtime.handle(), open(&path, &Options::default()).unwrap());
    let config = Config { name: "disk".into(), read_only: false, policy: Policy::default() };
    let disk = Disk::new(runtime.handle(), Rc::new(file), config);
    runtime.block_on(test(runtime.handle().clone(), disk, Rc::new(outside)));
    assert_eq!(runtime.handle().panics(), 0, "a task panicked");
}

async fn write(disk: &Disk, at: u64, len: usize) -> Result<Payload, Errno> {
    let (guest, session) = (Rc::new(Guest::default()), disk.session());
    let op = Op::Write { at, buf: Buf::from_bytes(&vec![7; len]), fua: false };
    session.submit(Request { op, reply: Reply::new(guest.clone(), Ticket(0)) });
    session.stop(disk::GiveUp::Tell).await;
    guest.0.take().remove(0)
}

#[test]
fn requests_reach_as_far_as_it_has_grown() {
    on_disk(async |_, disk, outside| {
        assert_eq!(write(&disk, 999, 2).await, Err(Errno::EINVAL));
        outside.set_len(5001).unwrap();
        assert_eq!(write(&disk, 999, 2).await, Err(Errno::EINVAL), "nobody has said so yet");
        assert_eq!(disk.grow().await, Ok(5001));
        assert_eq!(disk.size(), 5001);
        assert_eq!(write(&disk, 999, 4002).await, Ok(Payload::None));
        assert_eq!(write(&disk, 1000, 4002).await, Err(Errno::EINVAL));
        disk.close().await.unwrap();
        let mut bytes = [0; 4002];
        outside.read_exact_at(&mut bytes, 999).unwrap();
        assert_eq!(bytes, [7; 4002]);
    });
}

#[test]
fn who_waits_for_it_is_told_once_for_each_time() {
    on_disk(async |handle, disk, outside| {
        let told = Rc::new(Cell::new(0));
        for _ in 0..2 {
            let (disk, told) = (disk.clone(), told.clone());
            // Asked for before the task runs: what happens meanwhile counts.
            let mut resized = Box::pin(disk.resized()) as runtime::BoxFuture<'static, ()>;
            handle.spawn(async move {
                loop {
                    resized.await;
                    told.set(told.get() + 1);
                    resized = Box::pin(disk.resized());
                }
            });
        }
        assert_eq!(disk.grow().await, Ok(1000));
        handle.yield_now().await;
        assert_eq!(told.get(), 0, "nothing was added");
        for (size, times) in [(1001, 2), (2048, 4)] {
            outside.set_len(size).unwrap();
            disk.grow().await.unwrap();
            while told.get() < times {
                handle.yield_now().await;
            }
        }
        handle.yield_now().await;
        assert_eq!(told.get(), 4);
    });
}

#[test]
fn a_file_that_has_become_smaller_leaves_the_disk_as_it_is() {
    on_disk(async |_, disk, outside| {
        outside.set_len(999).unwrap();
        let error = disk.grow().await.unwrap_err();
        assert!(error.to_string().contains("shrunk to 999 bytes, 1000 are served"), "{error}");
        assert_eq!(disk.size(), 1000);
        outside.set_len(1000).unwrap();
        assert_eq!(write(&disk, 990, 10).await, Ok(Payload::None));
    });
}
