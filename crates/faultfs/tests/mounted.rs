//! The mounted file system asked through plain system calls: what the kernel answers is what counts.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use faultfs::{Cache, FaultFs, Options, mount_for_test};
use rustix::fs::{
    FallocateFlags, FlockOperation, Mode, OFlags, SeekFrom, fallocate, fdatasync, flock, fsync, seek,
};
use rustix::io::{Errno, pread, pwrite};

const LONG: Duration = Duration::from_secs(20);

/// The file system, or the end of the test where an ordinary user cannot mount.
macro_rules! mount {
    ($options:expr) => {
        match mount_for_test($options) {
            Some(fs) => fs,
            None => return,
        }
    };
    () => {
        mount!(Options::default())
    };
}

fn open(fs: &FaultFs, name: &str) -> File {
    open_with(&fs.path().join(name), OFlags::RDWR | OFlags::CREATE | OFlags::DIRECT)
}

fn open_with(path: &Path, flags: OFlags) -> File {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from(0o600)).unwrap().into()
}

fn rule(fs: &FaultFs, text: &str) {
    fs.rule(text.parse().unwrap());
}

/// A buffer as O_DIRECT wants it.
#[repr(align(4096))]
struct Aligned<const LEN: usize>([u8; LEN]);

fn read(file: &File, at: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0xa5; len];
    let len = pread(file, &mut bytes, at)?;
    bytes.truncate(len);
    Ok(bytes)
}

#[test]
fn what_was_written_with_o_direct_reads_back() {
    let fs = mount!();
    let file = open(&fs, "disk");
    let bytes = Aligned::<8192>(std::array::from_fn(|at| (at / 512) as u8 + 1));
    assert_eq!(pwrite(&file, &bytes.0, 512), Ok(8192));
    let mut back = Aligned::<8192>([0; 8192]);
    assert_eq!(pread(&file, &mut back.0, 512), Ok(8192));
    assert_eq!(back.0, bytes.0);
    assert_eq!(read(&file, 0, 1024).unwrap(), [[0; 512], [1; 512]].concat());
    assert_eq!(read(&file, 8192, 4096).unwrap(), [16; 512], "short at the end of the file");
    assert_eq!(read(&file, 8704, 512), Ok(vec![]));
    assert_eq!(file.metadata().unwrap().len(), 8704);
    assert_eq!(fs.snapshot("disk").unwrap().bytes_at(512, 8192), bytes.0);
}

#[test]
fn o_direct_wants_whole_sectors_and_buffered_does_not() {
    let fs = mount!();
    let direct = open(&fs, "disk");
    assert_eq!(pwrite(&direct, &[1; 512], 100), Err(Errno::INVAL));
    assert_eq!(pwrite(&direct, &[1; 100], 0), Err(Errno::INVAL));
    assert_eq!(read(&direct, 0, 100), Err(Errno::INVAL));
    let buffered = open_with(&fs.path().join("disk"), OFlags::RDWR);
    assert_eq!(pwrite(&buffered, &[1; 100], 33), Ok(100));
    assert_eq!(read(&buffered, 32, 3), Ok(vec![0, 1, 1]));
    drop((direct, buffered));

    let fs = mount!(Options { sector_bytes: 4096, ..Options::default() });
    let direct = open(&fs, "disk");
    assert_eq!(pwrite(&direct, &[1; 512], 0), Err(Errno::INVAL));
    assert_eq!(pwrite(&direct, &[1; 4096], 4096), Ok(4096));
}

#[test]
fn an_errno_reaches_the_caller_of_each_operation() {
    let fs = mount!();
    let file = open(&fs, "disk");
    assert_eq!(pwrite(&file, &[7; 4096], 0), Ok(4096));
    for (name, errno) in [
        ("EIO", Errno::IO),
        ("ENOSPC", Errno::NOSPC),
        ("EDQUOT", Errno::DQUOT),
        ("EINTR", Errno::INTR),
        ("EAGAIN", Errno::AGAIN),
        ("EOPNOTSUPP", Errno::OPNOTSUPP),
        ("ETIMEDOUT", Errno::TIMEDOUT),
    ] {
        rule(&fs, &format!("any:{name}:file=disk"));
        assert_eq!(read(&file, 0, 512), Err(errno));
        assert_eq!(pwrite(&file, &[1; 512], 0), Err(errno));
        assert_eq!(fsync(&file), Err(errno));
        assert_eq!(fdatasync(&file), Err(errno));
        assert_eq!(fallocate(&file, FallocateFlags::empty(), 0, 8192), Err(errno));
        assert_eq!(rustix::fs::ftruncate(&file, 1), Err(errno));
        fs.clear();
    }
    assert_eq!(read(&file, 0, 8192), Ok(vec![7; 4096]), "what failed has not happened");
    rule(&fs, "open:EACCES");
    assert_eq!(File::open(fs.path().join("disk")).unwrap_err().raw_os_error(), Some(13));
    rule(&fs, "seek:EINVAL");
    assert_eq!(seek(&file, SeekFrom::Data(0)), Err(Errno::INVAL));
    rule(&fs, "syncdir:EIO");
    assert_eq!(fsync(File::open(fs.path()).unwrap()), Err(Errno::IO));
}

#[test]
fn a_rule_strikes_its_range_and_its_turn_only() {
    let fs = mount!();
    let file = open(&fs, "disk");
    let other = open(&fs, "other");
    rule(&fs, "write:EIO:4096..8192:nth=3:file=disk");
    let write = |file: &File, at| pwrite(file, &[1; 1024], at);
    assert_eq!(write(&file, 4096), Ok(1024));
    assert_eq!(write(&file, 8192), Ok(1024));
    assert_eq!(write(&file, 3072), Ok(1024));
    assert_eq!(write(&file, 3584), Ok(1024));
    assert_eq!(write(&other, 4096), Ok(1024));
    assert_eq!(write(&file, 7680), Err(Errno::IO));
    assert_eq!(write(&file, 7680), Ok(1024));
    assert_eq!(fs.counters().struck, 1);
}

#[test]
fn a_short_count_reaches_the_caller_even_if_it_is_zero() {
    let fs = mount!();
    let file = open(&fs, "disk");
    assert_eq!(pwrite(&file, &[1; 4096], 0), Ok(4096));
    for k in [0, 1, 511, 512, 4095] {
        rule(&fs, &format!("read+write:short={k}"));
        assert_eq!(read(&file, 0, 4096), Ok(vec![1; k]));
        assert_eq!(pwrite(&file, &[2; 4096], 0), Ok(k));
        fs.clear();
        assert_eq!(read(&file, 0, 4096).unwrap(), [vec![2; k], vec![1; 4096 - k]].concat());
        assert_eq!(pwrite(&file, &[1; 4096], 0), Ok(4096));
    }
}

#[test]
fn asynchronous_direct_io_changes_nothing_for_a_synchronous_caller() {
    let fs = mount!(Options { async_direct_io: true, ..Options::default() });
    let file = open(&fs, "disk");
    assert_eq!(pwrite(&file, &[1; 4096], 0), Ok(4096));
    rule(&fs, "read+write:short=512");
    assert_eq!(read(&file, 0, 4096), Ok(vec![1; 512]));
    assert_eq!(pwrite(&file, &[2; 4096], 0), Ok(512));
    fs.clear();
    rule(&fs, "any:ENOSPC");
    assert_eq!(pwrite(&file, &[2; 4096], 0), Err(Errno::NOSPC));
}

#[test]
fn a_power_cut_keeps_what_was_synced_and_drops_the_rest() {
    let fs = mount!();
    let file = open(&fs, "disk");
    assert_eq!(pwrite(&file, &[1; 4096], 0), Ok(4096));
    assert_eq!(fsync(&file), Ok(()));
    assert_eq!(pwrite(&file, &[2; 512], 512), Ok(512));
    assert_eq!(pwrite(&file, &[3; 4096], 4096), Ok(4096));
    fallocate(&file, FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE, 2048, 1024).unwrap();
    assert_eq!(fs.durable("disk").unwrap().bytes_at(0, 9999), [1; 4096]);
    fs.power_cut(None);
    assert_eq!(file.metadata().unwrap().len(), 4096);
    assert_eq!(read(&file, 0, 8192), Ok(vec![1; 4096]));

    assert_eq!(pwrite(&file, &[4; 512], 0), Ok(512));
    assert_eq!(fdatasync(&file), Ok(()));
    fs.power_cut(Some(7));
    assert_eq!(read(&file, 0, 512), Ok(vec![4; 512]), "a seed takes nothing away that was synced");
}

#[test]
fn a_seed_keeps_some_unsynced_sectors_whole_and_always_the_same() {
    let fs = mount!();
    let file = open(&fs, "disk");
    let survivors = |seed| {
        assert_eq!(pwrite(&file, &[1; 65536], 0), Ok(65536));
        fsync(&file).unwrap();
        assert_eq!(pwrite(&file, &[2; 65536], 0), Ok(65536));
        fs.power_cut(Some(seed));
        read(&file, 0, 65536).unwrap()
    };
    let first = survivors(1);
    let kept = first.chunks(512).filter(|sector| *sector == [2; 512]).count();
    let dropped = first.chunks(512).filter(|sector| *sector == [1; 512]).count();
    assert_eq!(kept + dropped, 128, "no sector is torn");
    assert!(kept > 16 && dropped > 16, "{kept} of 128 kept");
    assert_eq!(survivors(1), first);
    assert_ne!(survivors(2), first);
}

#[test]
fn a_name_survives_a_power_cut_once_the_directory_or_the_new_file_is_synced() {
    let fs = mount!();
    let names = || {
        let mut names: Vec<_> = std::fs::read_dir(fs.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let directory = File::open(fs.path()).unwrap();
    let path = |name| fs.path().join(name);
    fsync(open(&fs, "synced")).unwrap();
    open(&fs, "unsynced");
    fs.power_cut(None);
    assert_eq!(names(), ["synced"]);
    std::fs::rename(path("synced"), path("renamed")).unwrap();
    assert_eq!(names(), ["renamed"]);
    fs.power_cut(None);
    assert_eq!(names(), ["synced"]);
    std::fs::rename(path("synced"), path("renamed")).unwrap();
    fsync(&directory).unwrap();
    fs.power_cut(None);
    assert_eq!(names(), ["renamed"]);
    std::fs::remove_file(path("renamed")).unwrap();
    fs.power_cut(None);
    assert_eq!(names(), ["renamed"]);
    std::fs::remove_file(path("renamed")).unwrap();
    fsync(&directory).unwrap();
    fs.power_cut(None);
    assert_eq!(names(), [""; 0]);
}

#[test]
fn an_fsync_that_failed_and_lost_the_writes_succeeds_the_next_time_without_them() {
    let fs = mount!();
    let file = open(&fs, "disk");
    assert_eq!(pwrite(&file, &[1; 512], 0), Ok(512));
    fsync(&file).unwrap();
    rule(&fs, "fsync:EIO:once,lose");
    assert_eq!(pwrite(&file, &[2; 512], 0), Ok(512));
    assert_eq!(fsync(&file), Err(Errno::IO));
    assert_eq!(fsync(&file), Ok(()));
    assert_eq!(read(&file, 0, 512), Ok(vec![2; 512]), "it still looks written");
    fs.power_cut(None);
    assert_eq!(read(&file, 0, 512), Ok(vec![1; 512]));
}

#[test]
fn what_is_dropped_is_acknowledged_and_does_not_last() {
    let fs = mount!();
    let file = open(&fs, "disk");
    assert_eq!(pwrite(&file, &[1; 1024], 0), Ok(1024));
    fsync(&file).unwrap();
    rule(&fs, "write:0..512:drop");
    assert_eq!(pwrite(&file, &[2; 512], 0), Ok(512));
    assert_eq!(read(&file, 0, 1024), Ok(vec![1; 1024]));
    fs.clear();
    rule(&fs, "fsync:drop:once");
    assert_eq!(pwrite(&file, &[3; 512], 512), Ok(512));
    assert_eq!(fsync(&file), Ok(()));
    assert_eq!(fs.durable("disk").unwrap().bytes_at(512, 512), [1; 512]);
    assert_eq!(fsync(&file), Ok(()));
    assert_eq!(fs.durable("disk").unwrap().bytes_at(512, 512), [3; 512]);
}

#[test]
fn the_disk_is_full_at_its_capacity_until_it_is_enlarged() {
    let fs = mount!(Options { capacity: Some(16384), ..Options::default() });
    let file = open(&fs, "disk");
    assert_eq!(pwrite(&file, &[1; 8192], 0), Ok(8192));
    assert_eq!(pwrite(&file, &[1; 16384], 1 << 30), Ok(8192), "as much as there is space for");
    assert_eq!(pwrite(&file, &[1; 512], 1 << 20), Err(Errno::NOSPC));
    assert_eq!(pwrite(&file, &[2; 512], 4096), Ok(512), "what is allocated can be overwritten");
    assert_eq!(fallocate(&file, FallocateFlags::KEEP_SIZE, 1 << 20, 1), Err(Errno::NOSPC));
    let space = rustix::fs::statvfs(fs.path()).unwrap();
    assert_eq!((space.f_blocks * space.f_frsize, space.f_bavail), (16384, 0));

    fs.set_capacity(Some(20480));
    assert_eq!(pwrite(&file, &[1; 512], 1 << 20), Ok(512));
    assert_eq!(pwrite(&file, &[1; 512], 2 << 20), Err(Errno::NOSPC));
    fallocate(&file, FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE, 0, 4096).unwrap();
    assert_eq!(pwrite(&file, &[1; 512], 2 << 20), Ok(512), "a hole gives its space back");

    std::fs::remove_file(fs.path().join("disk")).unwrap();
    assert_eq!(fs.used_bytes(), 20480, "a deleted file keeps its space while it is open");
    drop(file);
    let deadline = Instant::now() + LONG;
    while fs.used_bytes() > 0 && Instant::now() < deadline {
        thread::yield_now(); // The kernel sends the release after close has returned.
    }
    assert_eq!(fs.used_bytes(), 0);
}

#[test]
fn holes_are_where_nothing_was_written_or_what_was_written_was_punched() {
    let fs = mount!();
    let file = open(&fs, "disk");
    rustix::fs::ftruncate(&file, 1 << 40).unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(0)), Err(Errno::NXIO));
    assert_eq!(seek(&file, SeekFrom::Hole(0)), Ok(0));
    assert_eq!(pwrite(&file, &[9; 16384], 65536), Ok(16384));
    assert_eq!(seek(&file, SeekFrom::Data(0)), Ok(65536));
    assert_eq!(seek(&file, SeekFrom::Hole(65536)), Ok(81920));
    fallocate(&file, FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE, 69632 - 512, 4096 + 1024)
        .unwrap();
    assert_eq!(seek(&file, SeekFrom::Hole(65536)), Ok(69632));
    assert_eq!(seek(&file, SeekFrom::Data(69632)), Ok(73728));
    let back = [vec![9; 3584], vec![0; 5120], vec![9; 7680]].concat();
    assert_eq!(read(&file, 65536, 16384).unwrap(), back);
    assert_eq!(seek(&file, SeekFrom::Hole(73728)), Ok(81920));
    assert_eq!(seek(&file, SeekFrom::Data(81920)), Err(Errno::NXIO));
    assert_eq!(fs.snapshot("disk").unwrap().extents(), [65536..69632, 73728..81920]);
    let mut snapshot = fs.snapshot("disk").unwrap();
    assert_eq!(snapshot.size(), 1 << 40);
    std::io::Seek::seek(&mut snapshot, std::io::SeekFrom::Start(65536)).unwrap();
    let mut streamed = vec![0; 16384];
    snapshot.read_exact(&mut streamed).unwrap();
    assert_eq!(streamed, back);
}

#[test]
fn allocation_without_data_reads_as_zeros_and_takes_space() {
    use std::os::unix::fs::MetadataExt;
    let fs = mount!();
    let file = open(&fs, "disk");
    fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).unwrap();
    assert_eq!((file.metadata().unwrap().len(), file.metadata().unwrap().blocks()), (1 << 20, 2048));
    fallocate(&file, FallocateFlags::KEEP_SIZE, 1 << 20, 4096).unwrap();
    assert_eq!((file.metadata().unwrap().len(), file.metadata().unwrap().blocks()), (1 << 20, 2056));
    assert_eq!(seek(&file, SeekFrom::Data(0)), Err(Errno::NXIO));
    assert_eq!(pwrite(&file, &[5; 8192], 0), Ok(8192));
    fallocate(&file, FallocateFlags::ZERO_RANGE, 512, 7168).unwrap();
    assert_eq!(read(&file, 0, 8192).unwrap(), [vec![5; 512], vec![0; 7168], vec![5; 512]].concat());
    assert_eq!(file.metadata().unwrap().blocks(), 2056);
    assert_eq!(fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, 4096), Err(Errno::OPNOTSUPP));
    rustix::fs::ftruncate(&file, 512).unwrap();
    rustix::fs::ftruncate(&file, 8192).unwrap();
    assert_eq!(read(&file, 0, 8192).unwrap(), [vec![5; 512], vec![0; 7680]].concat());
}

#[test]
fn a_request_hangs_until_it_is_released_and_blocks_no_other() {
    let fs = mount!();
    let file = open(&fs, "disk");
    assert_eq!(pwrite(&file, &[1; 8192], 0), Ok(8192));
    rule(&fs, "write:hang:0..512");
    rule(&fs, "read:hang:512..1024:EIO");
    thread::scope(|scope| {
        let write = scope.spawn(|| pwrite(&file, &[2; 512], 0));
        let failing_read = scope.spawn(|| read(&file, 512, 512));
        assert!(fs.wait_hanging(2, LONG));
        assert_eq!(read(&file, 0, 512), Ok(vec![1; 512]));
        assert_eq!(pwrite(&file, &[3; 4096], 4096), Ok(4096));
        assert!(!write.is_finished() && !failing_read.is_finished());
        assert_eq!(fs.release(), 2);
        assert_eq!(write.join().unwrap(), Ok(512));
        assert_eq!(failing_read.join().unwrap(), Err(Errno::IO));
    });
    assert_eq!(fs.hanging(), 0);
    assert_eq!(read(&file, 0, 512), Ok(vec![2; 512]));
}

#[test]
fn what_hangs_when_the_power_is_cut_fails_and_never_happens() {
    let fs = mount!();
    let file = open(&fs, "disk");
    assert_eq!(pwrite(&file, &[1; 512], 0), Ok(512));
    fsync(&file).unwrap();
    rule(&fs, "write:hang:once");
    thread::scope(|scope| {
        let write = scope.spawn(|| pwrite(&file, &[2; 512], 0));
        assert!(fs.wait_hanging(1, LONG));
        fs.power_cut(Some(1));
        assert_eq!(write.join().unwrap(), Err(Errno::IO));
    });
    assert_eq!(fs.release(), 0);
    assert_eq!(read(&file, 0, 512), Ok(vec![1; 512]));
}

#[test]
fn a_delayed_request_takes_its_time_and_blocks_no_other() {
    let fs = mount!();
    let file = open(&fs, "disk");
    assert_eq!(pwrite(&file, &[1; 8192], 0), Ok(8192));
    rule(&fs, "read:0..512:delay=500");
    thread::scope(|scope| {
        let began = Instant::now();
        let slow = scope.spawn(|| (read(&file, 0, 512), Instant::now()));
        while fs.counters().reads < 1 {
            thread::yield_now();
        }
        assert_eq!(read(&file, 512, 512), Ok(vec![1; 512]));
        assert_eq!(pwrite(&file, &[1; 512], 512), Ok(512));
        assert_eq!(fsync(&file), Ok(()));
        let quick_done = Instant::now();
        let (read, slow_done) = slow.join().unwrap();
        assert_eq!(read, Ok(vec![1; 512]));
        assert!(slow_done - began >= Duration::from_millis(500));
        assert!(quick_done < slow_done);
    });
}

#[test]
fn the_counters_count_each_kind_of_call() {
    let fs = mount!();
    let file = open(&fs, "disk");
    pwrite(&file, &[1; 4096], 0).unwrap();
    pwrite(&file, &[1; 512], 0).unwrap();
    read(&file, 0, 8192).unwrap();
    fsync(&file).unwrap();
    fdatasync(&file).unwrap();
    fdatasync(&file).unwrap();
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 512).unwrap();
    rustix::fs::ftruncate(&file, 512).unwrap();
    let counters = fs.counters();
    assert_eq!((counters.reads, counters.read_bytes), (1, 4096));
    assert_eq!((counters.writes, counters.written_bytes), (2, 4608));
    assert_eq!((counters.fsyncs, counters.fdatasyncs), (1, 2));
    assert_eq!((counters.fallocates, counters.truncates, counters.struck), (1, 1, 0));
}

#[test]
fn locks_are_kept_by_the_kernel() {
    let fs = mount!();
    let mine = open(&fs, "disk");
    let other = open(&fs, "disk");
    flock(&mine, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert_eq!(flock(&other, FlockOperation::NonBlockingLockShared), Err(Errno::WOULDBLOCK));
    drop(mine);
    assert_eq!(flock(&other, FlockOperation::LockShared), Ok(()));
}

#[test]
fn with_a_write_back_cache_a_failed_write_shows_in_fsync() {
    let fs = mount!(Options { cache: Cache::Back, ..Options::default() });
    let file = open_with(&fs.path().join("disk"), OFlags::RDWR | OFlags::CREATE);
    rule(&fs, "write:ENOSPC");
    assert_eq!(pwrite(&file, &[1; 8192], 0), Ok(8192));
    assert_eq!(fs.counters().writes, 0);
    assert_eq!(fsync(&file), Err(Errno::NOSPC));
    fs.clear();
    assert_eq!(fsync(&file), Ok(()), "Linux reports it once");
    assert_eq!(read(&file, 0, 1), Ok(vec![1]), "and keeps showing it");
    assert_eq!(fs.snapshot("disk").unwrap().bytes_at(0, 8192), [0; 0]);
}

#[test]
fn a_power_cut_empties_the_caches_of_the_kernel() {
    for cache in [Cache::Through, Cache::Back] {
        let fs = mount!(Options { cache, ..Options::default() });
        let file = open_with(&fs.path().join("disk"), OFlags::RDWR | OFlags::CREATE);
        assert_eq!(pwrite(&file, &[1; 8192], 0), Ok(8192));
        assert_eq!(fsync(&file), Ok(()));
        assert_eq!(pwrite(&file, &[2; 4096], 4096), Ok(4096));
        assert_eq!(read(&file, 4096, 1), Ok(vec![2]));
        fs.power_cut(None);
        assert_eq!(read(&file, 4096, 1), Ok(vec![1]), "{cache:?}");
        assert_eq!(fsync(&file), Ok(()));
        assert_eq!(fs.durable("disk").unwrap().bytes_at(0, 9999), [1; 8192], "{cache:?}");
    }
}

fn is_mount_point(path: &Path) -> bool {
    std::fs::read_to_string("/proc/self/mounts")
        .unwrap()
        .lines()
        .any(|line| line.split(' ').nth(1) == path.to_str())
}

#[test]
fn a_dropped_file_system_is_gone_even_if_it_is_busy_hangs_or_panics() {
    let fs = mount!();
    let path = fs.path().to_owned();
    let file = open(&fs, "disk");
    rule(&fs, "read:hang");
    let same_file = file.try_clone().unwrap();
    let reader = thread::spawn(move || read(&same_file, 0, 512));
    assert!(fs.wait_hanging(1, LONG));
    assert!(is_mount_point(&path));
    let panic = thread::spawn(move || {
        let _fs = fs;
        std::panic::resume_unwind(Box::new("as a failed assertion does"));
    });
    assert!(panic.join().is_err());
    assert!(!is_mount_point(&path));
    assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    assert_eq!(read(&file, 0, 512), Err(Errno::NOTCONN));
    assert!(!path.exists());
}

#[test]
fn sixty_four_requests_can_hang_at_once() {
    let fs = mount!();
    let file = open(&fs, "disk");
    rustix::fs::ftruncate(&file, 1 << 20).unwrap();
    rule(&fs, "read+write:hang");
    thread::scope(|scope| {
        for n in 0..32 {
            let file = file.as_fd();
            scope.spawn(move || assert_eq!(pwrite(file, &[1; 512], n * 512), Ok(512)));
            scope.spawn(move || assert_eq!(pread(file, &mut [0; 512], n * 512 + 65536), Ok(512)));
        }
        assert!(fs.wait_hanging(64, LONG));
        fs.clear();
        assert_eq!(fs.release(), 64);
    });
    assert_eq!(fs.snapshot("disk").unwrap().bytes_at(0, 16384), [1; 16384]);
}
