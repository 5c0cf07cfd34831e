//! A file system in memory that fails on command, to be mounted under a program that must not lie about it.
//!
//! The program's own system calls and rings stay as they are shipped; only the storage under them is ours:
//!
//! ```no_run
//! use faultfs::FaultFs;
//!
//! let disk = FaultFs::temporary(faultfs::Options::default())?;
//! disk.rule("write:ENOSPC:1M..2M:once".parse()?);
//! // … run the program on disk.path().join("disk.img") …
//! disk.power_cut(Some(42));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! - [`rule`] has the grammar of the faults, [`control`] that of the commands which the `faultfs` binary takes from a
//!   socket.
//! - The directory is flat and holds regular files only: no links, no directories, no special files.
//! - Every file has a live and a durable copy; [`FaultFs::power_cut`] leaves only what was synced, or with a seed any
//!   subset of the unsynced sectors as well. Both copies and the changes since the last sync are in memory, so a file
//!   that is written once takes twice what was written. Holes take nothing.
//! - By default each read and write of the program reaches us as it was made (FOPEN_DIRECT_IO), whether or not the
//!   file was opened with O_DIRECT. With O_DIRECT, offsets and lengths that are not of whole sectors are `EINVAL`.
//!
//! # What the kernel puts in between
//!
//! Seen on Linux 6.18.
//!
//! - A write answered short, or with 0, reaches the caller of pwrite(2) as that count. io_uring writes the rest by
//!   itself: it reports fewer bytes only if the rest fails, and `EAGAIN` if nothing is written again and again.
//! - Without [`Options::async_direct_io`] and with [`Cache::None`], io_uring cannot be relied on after a short count:
//!   tapdisk refuses such an image, so its tests use another combination.
//! - io_uring repeats an O_DIRECT write that fails with `EAGAIN`, hundreds or thousands of times, before it reports it:
//!   say `count=N`.
//! - With O_DIRECT, io_uring does reads and writes *within* io_uring_enter(2), which therefore waits for a request
//!   that hangs or is delayed, unlike on a disk. [`Options::async_direct_io`] makes it asynchronous as on a disk; then
//!   the kernel answers `EIO` to an asynchronous write that is short or empty.
//! - What is longer than 1 MiB arrives as several requests.
//! - A truncate, fallocate, fsync or write beyond the end of the file holds the inode's lock in the kernel, and a
//!   synchronous write inside the file shares it. So while such a write hangs, an fsync of the same file does not reach
//!   us, and the other way round; reads, and other writes inside the file, do.
//! - A caller whose request hangs cannot be killed until the request is released, the power is cut, or the
//!   file system unmounted.
//! - statx(2) tells no alignment for O_DIRECT (STATX_DIOALIGN), and that of the memory is not checked.
//! - Through a cache a write answered with 0 is `EIO`. With [`Cache::Back`] the kernel trusts its own idea of the size,
//!   so a file that is open during a power cut keeps it.

pub mod control;
pub mod rule;

mod content;
mod fs;
mod guard;
mod script;
mod shared;
mod store;

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuser::{BackgroundSession, Config, INodeNo, Session, SessionACL};
use rustix::mount::{MountFlags, UnmountFlags};

pub use content::Snapshot;
pub use rule::Rule;
pub use script::RuleId;
pub use shared::Counters;

use guard::Guard;
use shared::Shared;
use store::Store;

/// What the kernel may keep in its page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Nothing: every read and write reaches us.
    #[default]
    None,
    /// What was read and written without O_DIRECT; writes still reach us before they return.
    Through,
    /// Writes reach us when the kernel writes them back, at the latest in fsync, which then reports their errors.
    Back,
}

/// How to mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// What the kernel may cache.
    pub cache: Cache,
    /// How many bytes may be allocated, or no bound. Unwritten and deleted but open files count as well.
    pub capacity: Option<u64>,
    /// What offsets and lengths must be multiples of with O_DIRECT; 1 for anything.
    pub sector_bytes: u64,
    /// Lets the kernel serve asynchronous requests (io_uring, libaio) of O_DIRECT as a disk does, without a thread that
    /// waits for the answer. The price: it answers them `EIO` if a write is short.
    pub async_direct_io: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { cache: Cache::None, capacity: None, sector_bytes: 512, async_direct_io: false }
    }
}

/// A mounted fault file system. Dropping it unmounts it: whoever still has a file open gets ENOTCONN from then on.
pub struct FaultFs {
    path: PathBuf,
    is_temporary: bool,
    cache: Cache,
    shared: Arc<Shared>,
    session: Option<BackgroundSession>,
    guard: Option<Guard>,
}

impl FaultFs {
    /// Mounts with the default options on a directory that exists.
    pub fn mount(path: &Path) -> io::Result<FaultFs> {
        FaultFs::mount_with(path, Options::default())
    }

    /// Mounts on a directory that exists.
    pub fn mount_with(path: &Path, options: Options) -> io::Result<FaultFs> {
        if options.sector_bytes == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a sector has at least one byte"));
        }
        let path = path.canonicalize()?;
        let shared = Arc::new(Shared::new(Store::new(INodeNo::ROOT.0, options.capacity)));
        let fs = fs::Fs { shared: Arc::clone(&shared), options };
        let guard = Guard::over(&path)?;
        match start(fs, &path) {
            Ok(session) => Ok(FaultFs {
                path,
                is_temporary: false,
                cache: options.cache,
                shared,
                session: Some(session),
                guard: Some(guard),
            }),
            Err(error) => {
                guard.dismiss()?;
                Err(io::Error::new(error.kind(), format!("cannot mount on {}: {error}", path.display())))
            }
        }
    }

    /// Mounts on a new directory, which goes away with the file system.
    pub fn temporary(options: Options) -> io::Result<FaultFs> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("faultfs-{}-{count}", std::process::id()));
        std::fs::create_dir(&path)?;
        match FaultFs::mount_with(&path, options) {
            Ok(mut fs) => {
                fs.is_temporary = true;
                Ok(fs)
            }
            Err(error) => std::fs::remove_dir(&path).and(Err(error)),
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is still mounted: someone else may have unmounted it.
    pub fn is_mounted(&self) -> bool {
        self.session.as_ref().is_some_and(|session| !session.guard.is_finished())
    }

    /// Adds a rule behind those already there.
    pub fn rule(&self, rule: Rule) -> RuleId {
        self.shared.lock().script.add(rule)
    }

    /// Removes one rule and says whether it was there. Requests that it holds stay held.
    pub fn remove(&self, id: RuleId) -> bool {
        self.shared.lock().script.remove(id)
    }

    /// Removes all rules. Requests that they hold stay held.
    pub fn clear(&self) {
        self.shared.lock().script.clear();
    }

    /// The rules in force, in the order in which they are asked, and how often each has struck.
    pub fn rules(&self) -> Vec<(RuleId, String, u64)> {
        self.shared.lock().script.list()
    }

    /// How often this rule has struck; nothing when it is not in force.
    pub fn struck(&self, id: RuleId) -> Option<u64> {
        self.shared.lock().script.struck(id)
    }

    /// Lets all requests that hang go on, and says how many they were. A rule that makes requests hang stays.
    pub fn release(&self) -> usize {
        self.shared.release()
    }

    /// How many requests hang.
    pub fn hanging(&self) -> usize {
        self.shared.lock().hanging()
    }

    /// Waits until at least `count` requests hang and says whether they do.
    pub fn wait_hanging(&self, count: usize, at_most: Duration) -> bool {
        self.shared.wait_hanging(count, at_most)
    }

    /// Takes away what was not synced. With a seed, a random subset of the unsynced sectors survives, always the same
    /// for the same seed and the same changes. What is held back is answered EIO and does not happen.
    pub fn power_cut(&self, seed: Option<u64>) {
        self.shared.power_cut(seed, || {
            if self.cache != Cache::None
                && let Err(error) = self.forget_cache()
            {
                eprintln!("faultfs: the kernel keeps its cache: {error}");
            }
        });
    }

    /// What has been asked for so far.
    pub fn counters(&self) -> Counters {
        self.shared.lock().counters
    }

    /// Changes how many bytes may be allocated. Fewer than are allocated already is a full disk.
    pub fn set_capacity(&self, capacity: Option<u64>) {
        self.shared.lock().store.set_capacity(capacity);
    }

    /// How many bytes are allocated.
    pub fn used_bytes(&self) -> u64 {
        self.shared.lock().store.used_bytes()
    }

    /// The file as a reader sees it now, behind the kernel's back.
    pub fn snapshot(&self, name: &str) -> io::Result<Snapshot> {
        Ok(self.shared.lock().store.live_snapshot(name)?)
    }

    /// The file as a power cut without a seed would leave it now; ENOENT if it would leave none of this name.
    pub fn durable(&self, name: &str) -> io::Result<Snapshot> {
        Ok(self.shared.lock().store.durable_snapshot(name)?)
    }

    fn forget_cache(&self) -> io::Result<()> {
        let Some(session) = &self.session else { return Ok(()) };
        let notifier = session.notifier();
        let state = self.shared.lock();
        let inodes = state.store.inodes();
        let names: Vec<String> = state.store.names().keys().cloned().collect();
        drop(state); // The kernel writes back what is dirty before it forgets it, and we must answer.
        for inode in inodes {
            notifier.inval_inode(INodeNo(inode), 0, 0)?;
        }
        for name in names {
            notifier.inval_entry(INodeNo::ROOT, OsStr::new(&name))?;
        }
        Ok(())
    }

    fn unmount(&mut self) -> io::Result<()> {
        self.shared.fail_held();
        if let Some(session) = self.session.take() {
            if !session.guard.is_finished() {
                detach(&self.path)?;
            }
            session.join()?;
        }
        if let Some(guard) = self.guard.take() {
            guard.dismiss()?;
        }
        if self.is_temporary { std::fs::remove_dir(&self.path) } else { Ok(()) }
    }
}

/// Mounts and starts to serve. The mount is made here and not by `fuser`, which after a forced unmount would unmount
/// again whatever is at the path by then.
fn start(fs: fs::Fs, path: &Path) -> io::Result<BackgroundSession> {
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let fd = device.as_raw_fd();
    let options = format!("fd={fd},rootmode=40000,user_id={user},group_id={group},allow_other");
    let options = CString::new(options)?;
    let flags = MountFlags::NODEV | MountFlags::NOSUID;
    rustix::mount::mount("faultfs", path, "fuse.faultfs", flags, options.as_c_str())?;
    let session =
        Session::from_fd(fs, device.into(), SessionACL::All, Config::default()).and_then(Session::spawn);
    if session.is_err() {
        detach(path)?;
    }
    session
}

/// Unmounts whatever is still under way: FORCE fails it, so that nobody waits; DETACH does not mind open files.
fn detach(path: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(path, UnmountFlags::FORCE | UnmountFlags::DETACH)?)
}

impl Drop for FaultFs {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            eprintln!("faultfs: cannot unmount {}: {error}", self.path.display());
        }
    }
}

/// Whether a fault file system can be mounted here, found out by doing it once; if not, why.
pub fn available() -> Result<(), String> {
    static ANSWER: OnceLock<Result<(), String>> = OnceLock::new();
    let attempt = || {
        if let Err(error) = File::options().read(true).write(true).open("/dev/fuse") {
            return Err(format!("/dev/fuse cannot be opened: {error}"));
        }
        FaultFs::temporary(Options::default()).map(drop).map_err(|error| error.to_string())
    };
    ANSWER.get_or_init(attempt).clone()
}

/// For a test that needs a mount: mounts; on failure panics as root and otherwise says why and returns nothing, since
/// an ordinary user may not be able to mount but a root that cannot would silently test nothing.
pub fn mount_for_test(options: Options) -> Option<FaultFs> {
    match available() {
        Ok(()) => Some(FaultFs::temporary(options).expect("it was possible a moment ago")),
        Err(why) if rustix::process::geteuid().is_root() => {
            panic!("root cannot mount a fault file system: {why}")
        }
        Err(why) => {
            eprintln!("not tested, for lack of a fault file system: {why}");
            None
        }
    }
}
