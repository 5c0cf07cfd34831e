//! Files of a real file system: every size, alignment and cache mode against an array of bytes and against the kernel.

use std::future::poll_fn;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use block::{Buf, Errno, Pool, Span};
use runtime::{Handle, RingFlags, Runtime, Uring, join_all};
use storage::file::{Cache, File, OpenError, Options, open};
use storage::{Storage, Zeroing, conformance};

/// A directory on the file system of the build, which has O_DIRECT where /tmp may not.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Handle) -> F) {
    let pool = Pool::new(1 << 20);
    let uring = Uring::open(RingFlags::Auto, &pool).unwrap();
    let runtime = Runtime::new(Box::new(uring), pool);
    runtime.block_on(test(runtime.handle().clone()));
}

fn image(dir: &Path, size: u64) -> PathBuf {
    let path = dir.join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn options(cache: Cache) -> Options {
    Options { cache, wait: Duration::ZERO, ..Options::default() }
}

#[test]
fn files_of_any_size_behave_like_an_array_of_bytes() {
    for size in [1, 511, 512, 513, 4095, 4096, 4097, 100_000, 262_144, 300_001] {
        for cache in [Cache::Direct, Cache::Buffered] {
            let dir = directory();
            let path = image(dir.path(), size);
            let at = path.clone();
            run(async move |handle| {
                let file = File::new(&handle, open(&at, &options(cache)).unwrap());
                conformance::check(&file, size, 300).await;
            });
            assert_eq!(std::fs::metadata(&path).unwrap().len(), size, "the file keeps its size");
        }
    }
}

/// Makes a file larger from outside, as truncate(1) does.
fn lengthen(path: &Path, size: u64) {
    std::fs::File::options().write(true).open(path).unwrap().set_len(size).unwrap();
}

#[test]
fn a_file_that_grows_keeps_its_bytes_and_its_new_ones_are_zero() {
    // From and to whole blocks and parts of them, also within one block.
    let sizes = [1, 511, 512, 513, 1000, 4095, 4096, 4097, 100_000, 262_144, 300_001];
    for cache in [Cache::Direct, Cache::Buffered] {
        for (from, to) in sizes.iter().flat_map(|from| sizes.iter().map(move |to| (*from, *to))) {
            if from >= to || (to > 10_000 && from < 4095) {
                continue;
            }
            let dir = directory();
            let path = image(dir.path(), from);
            run(async move |handle| {
                let file = File::new(&handle, open(&path, &options(cache)).unwrap());
                let bytes: Vec<u8> = (0..from).map(|byte| (byte % 251) as u8 + 1).collect();
                file.write(0, Buf::from_bytes(&bytes)).await.unwrap();
                assert_eq!(file.grow().await, Ok(from), "nothing was added");
                lengthen(&path, to);
                assert_eq!(file.size(), from, "it is not taken in before it is asked for");
                assert_eq!(file.grow().await, Ok(to));
                assert_eq!(file.size(), to);
                let all = Buf::from_bytes(&vec![0xdb; to as usize]);
                file.read(0, all.clone()).await.unwrap();
                let mut expected = bytes;
                expected.resize(to as usize, 0);
                assert!(all.to_vec() == expected, "{cache:?}, {from} to {to}");
                // Over what was the end, and at what is.
                for (at, len) in [(from - 1, 2), (to - 1, 1)] {
                    file.write(at, Buf::from_bytes(&vec![0xee; len])).await.unwrap();
                    expected[at as usize..at as usize + len].fill(0xee);
                }
                file.flush().await.unwrap();
                assert!(std::fs::read(&path).unwrap() == expected, "{cache:?}, {from} to {to}");
                conformance::check(&file, from ^ to, 20).await;
                assert_eq!(std::fs::metadata(&path).unwrap().len(), to, "the file keeps its size");
            });
        }
    }
}

#[test]
fn writes_at_the_old_end_while_it_grows_are_all_there() {
    let dir = directory();
    let path = image(dir.path(), 1000);
    run(async move |handle| {
        let file = Rc::new(File::new(&handle, open(&path, &options(Cache::Direct)).unwrap()));
        let mut expected = vec![0; 1000];
        for size in (1100..60_000).step_by(1777) {
            let old = expected.len();
            lengthen(&path, size);
            expected.resize(size as usize, 0);
            // Each byte around the end by a write of its own, some before and some after the growth.
            let writes = (old - 16..old).map(|at| {
                expected[at] = (at % 255) as u8 + 1;
                let buf = Buf::from_bytes(&expected[at..=at]);
                Box::pin(file.write(at as u64, buf)) as runtime::BoxFuture<'_, _>
            });
            let mut parts: Vec<_> = writes.collect();
            let grow = async { file.grow().await.map(|found| assert_eq!(found, size)) };
            parts.insert(8, Box::pin(grow));
            join_all(parts).await.into_iter().for_each(|result| result.unwrap());
            let at = old - 700.min(old);
            expected[at..old + 50].fill(7);
            file.write(at as u64, Buf::from_bytes(&vec![7; old + 50 - at])).await.unwrap();
            let all = Buf::zeroed(size as usize);
            file.read(0, all.clone()).await.unwrap();
            assert!(all.to_vec() == expected, "{size}");
        }
        file.flush().await.unwrap();
        assert!(std::fs::read(&path).unwrap() == expected);
    });
}

#[test]
fn what_has_become_smaller_is_refused_and_nothing_changes() {
    for cache in [Cache::Direct, Cache::Buffered] {
        let dir = directory();
        let path = image(dir.path(), 10_000);
        run(async move |handle| {
            let file = File::new(&handle, open(&path, &options(cache)).unwrap());
            lengthen(&path, 9_000);
            let error = file.grow().await.unwrap_err();
            assert_eq!(error.errno(), Errno::EIO);
            for what in ["9000", "10000", "shrunk"] {
                assert!(error.to_string().contains(what), "no {what} in {error}");
            }
            assert_eq!(file.size(), 10_000);
            lengthen(&path, 10_001);
            assert_eq!(file.grow().await, Ok(10_001));
        });
    }
}

/// An image gives back the end of its file while another request's flush is under way.
#[test]
fn a_flush_while_we_cut_off_the_end_ourselves_is_no_loss() {
    let dir = directory();
    let path = image(dir.path(), 8192);
    run(async move |handle| {
        let file = File::new(&handle, open(&path, &options(Cache::Direct)).unwrap());
        for size in [8192, 16384] {
            file.resize(size).await.unwrap();
            let mut flush = file.flush();
            // As far as its sync.
            let begun = poll_fn(|cx| Poll::Ready(flush.as_mut().poll(cx))).await;
            assert!(begun.is_pending());
            file.resize(4096).await.unwrap();
            flush.await.unwrap();
        }
        // What others cut off is one, also when we have resized it before.
        file.resize(8192).await.unwrap();
        lengthen(&path, 4096);
        assert_eq!(file.flush().await.unwrap_err().errno(), Errno::EIO);
    });
}

#[test]
fn a_flush_after_growth_makes_the_new_size_durable() {
    let dir = directory();
    let path = image(dir.path(), 4096);
    run(async move |handle| {
        let file = File::new(&handle, open(&path, &options(Cache::Direct)).unwrap());
        file.flush().await.unwrap();
        lengthen(&path, 8192);
        file.grow().await.unwrap();
        // Cut off again: a flush that has something to do looks at the size, and one that has nothing does not.
        lengthen(&path, 4096);
        assert_eq!(file.flush().await.unwrap_err().errno(), Errno::EIO);
    });
}

#[test]
fn memory_does_not_grow() {
    run(async move |_| {
        let disks: [Rc<dyn Storage>; 2] =
            [Rc::new(storage::Ram::new(4096)), Rc::new(storage::Null::new(4096))];
        for disk in disks {
            assert_eq!(disk.grow().await.unwrap_err().errno(), Errno::EOPNOTSUPP);
            assert_eq!(disk.size(), 4096);
        }
    });
}

#[test]
fn what_is_written_is_what_the_kernel_reads() {
    let dir = directory();
    let path = image(dir.path(), 1 << 20);
    run(async move |handle| {
        let opened = open(&path, &options(Cache::Direct)).unwrap();
        assert!(opened.direct, "{:?}", opened.not_direct);
        let file = File::new(&handle, opened);
        for (at, len) in [(0, 4096), (5000, 3), (1023, 600_000), ((1 << 20) - 1, 1)] {
            let bytes: Vec<u8> = (0..len).map(|byte| (byte % 251) as u8 + 1).collect();
            file.write(at, Buf::from_bytes(&bytes)).await.unwrap();
            let mut seen = vec![0; len];
            std::fs::File::open(&path).unwrap().read_exact_at(&mut seen, at).unwrap();
            assert!(seen == bytes, "{len} bytes at {at}");
        }
        file.flush().await.unwrap();
    });
}

#[test]
fn misaligned_writes_side_by_side_lose_nothing() {
    let dir = directory();
    let path = image(dir.path(), 64 << 10);
    run(async move |handle| {
        let file = Rc::new(File::new(&handle, open(&path, &options(Cache::Direct)).unwrap()));
        // Neighbours of 100 bytes share blocks: each must read, change and write its block alone.
        for round in 1..=20u8 {
            let writes = (0..600)
                .map(|at: u64| {
                    let bytes = [(at as u8).wrapping_add(round); 100];
                    file.write(at * 100, Buf::from_bytes(&bytes))
                })
                .collect();
            assert!(join_all(writes).await.iter().all(Result::is_ok));
            let buf = Buf::zeroed(60_000);
            file.read(0, buf.clone()).await.unwrap();
            for (at, bytes) in buf.to_vec().chunks(100).enumerate() {
                assert_eq!(bytes, [(at as u8).wrapping_add(round); 100]);
            }
        }
    });
}

#[test]
fn a_second_writer_is_refused_and_told_who_is_first() {
    let dir = directory();
    let path = image(dir.path(), 4096);
    let first = open(&path, &options(Cache::Direct)).unwrap();
    match open(&path, &options(Cache::Buffered)) {
        Err(OpenError::Busy { holder, .. }) => {
            assert!(holder.to_string().contains(&std::process::id().to_string()), "{holder}");
        }
        other => panic!("{other:?}"),
    }
    let reader = Options { read_only: true, ..options(Cache::Direct) };
    assert!(matches!(open(&path, &reader), Err(OpenError::Busy { .. })));
    drop(first);
    let first = open(&path, &reader).unwrap();
    let second = open(&path, &reader).unwrap();
    drop((first, second));
    open(&path, &options(Cache::Direct)).unwrap();
}

#[test]
fn a_lock_is_waited_for() {
    let dir = directory();
    let path = image(dir.path(), 4096);
    let first = open(&path, &options(Cache::Direct)).unwrap();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(first);
    });
    let patient = Options { wait: Duration::from_secs(20), ..options(Cache::Direct) };
    open(&path, &patient).unwrap();
    thread.join().unwrap();
}

#[test]
fn an_image_is_made_once_and_kept() {
    let dir = directory();
    let path = dir.path().join("new.raw");
    assert!(matches!(open(&path, &options(Cache::Direct)), Err(OpenError::Missing(_))));
    let create = |size| Options { create: Some(size), ..options(Cache::Direct) };
    let made = open(&path, &create(1 << 20)).unwrap();
    assert!(made.created);
    assert_eq!(made.size, 1 << 20);
    drop(made);
    let kept = open(&path, &create(1 << 30)).unwrap();
    assert!(!kept.created);
    assert_eq!(kept.size, 1 << 20);
    assert!(matches!(open(dir.path(), &create(1)), Err(OpenError::Kind { .. })));
    assert!(matches!(open(Path::new("/dev/null"), &create(1)), Err(OpenError::Kind { .. })));
}

#[test]
fn a_file_cut_off_under_us_gives_errors_and_not_zeroes() {
    let dir = directory();
    let path = image(dir.path(), 1 << 20);
    for cache in [Cache::Direct, Cache::Buffered] {
        let path = path.clone();
        run(async move |handle| {
            let other = std::fs::File::options().write(true).open(&path).unwrap();
            other.set_len(1 << 20).unwrap();
            let file = File::new(&handle, open(&path, &options(cache)).unwrap());
            file.write(0, Buf::from_bytes(&[1; 8192])).await.unwrap();
            file.flush().await.unwrap();
            other.set_len(4096).unwrap();
            let read = file.read(8192, Buf::zeroed(4096)).await;
            assert_eq!(read.unwrap_err().errno(), Errno::EIO);
            let straddling = file.read(2048, Buf::zeroed(4096)).await;
            assert_eq!(straddling.unwrap_err().errno(), Errno::EIO);
            let lost = file.extents(Span::new(4096, 8192).unwrap()).await;
            assert_eq!(lost.unwrap_err().errno(), Errno::EIO, "no hole of zeroes");
            file.write(0, Buf::from_bytes(&[1; 512])).await.unwrap();
            assert_eq!(file.flush().await.unwrap_err().errno(), Errno::EIO, "part of the disk is gone");
            let write = file.write(0, Buf::zeroed(512)).await.unwrap_err();
            assert!(write.is_lasting());
        });
    }
}

#[test]
fn discarded_and_zeroed_space_is_given_back() {
    let dir = directory();
    let path = image(dir.path(), 1 << 20);
    run(async move |handle| {
        let file = File::new(&handle, open(&path, &options(Cache::Direct)).unwrap());
        let blocks = || {
            std::fs::File::open(&path).unwrap().sync_all().unwrap();
            std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap())
        };
        let whole = Span::new(0, 1 << 20).unwrap();
        file.write(0, Buf::from_bytes(&vec![1; 1 << 20])).await.unwrap();
        assert!(blocks() >= 2048);
        file.discard(whole).await.unwrap();
        assert_eq!(blocks(), 0);
        file.zero(whole, Zeroing { unmap: false, fast: false }).await.unwrap();
        assert!(blocks() >= 2048, "zeroes with space for them");
        file.zero(whole, Zeroing { unmap: true, fast: true }).await.unwrap();
        assert_eq!(blocks(), 0);
        let runs = file.extents(whole).await.unwrap();
        assert_eq!(runs, [block::Run { len: 1 << 20, allocated: false, zero: true }]);
    });
}
