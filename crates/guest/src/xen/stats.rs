//! What a guest has asked of its disk, counted, and shown to xentop and its like in a small file.
//!
//! The file is /dev/shm/td3-PID/vbd-DOMID-DEVICE, where PID is what the store says in `kthread-pid`: that is where
//! libxenstat (from Xen 4.20 on) and XenServer's xcp-rrdd look for a back end of kind `vbd3`. It is written through the
//! ring, and its space is there from the start: the disk's thread neither waits for memory nor can fault.
//!
//! Sources: tools/libs/stat/xenstat_linux.c and xenstat_priv.h (`struct vbd3_stats`) of Xen.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::xen::Domain;
use block::Buf;
use runtime::{Handle, Io};
use rustix::fs::{AtFlags, Dir, FallocateFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::signal::Signal;

/// What a guest has asked of one disk, on all of its rings.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    reads: Kind,
    writes: Kind,
    waits: Cell<u64>,
    errors: Cell<u64>,
}

/// Counts of one kind of request.
#[derive(Debug, Default)]
struct Kind {
    taken: Cell<u64>,
    answered: Cell<u64>,
    /// Of those that were done.
    sectors: Cell<u64>,
    /// How long the answers took, in microseconds, together.
    micros: Cell<u64>,
}

/// What kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Asked {
    Read,
    /// Barriers too, if they have data.
    Write,
    /// All that moves no data.
    #[default]
    Other,
}

impl Counts {
    /// A request was taken off a ring.
    pub(crate) fn taken(&self, asked: Asked) {
        if let Some(kind) = self.of(asked) {
            add(&kind.taken, 1);
        }
    }

    /// A request that was taken has its answer: that it failed, or else that so many sectors of 512 bytes were moved.
    pub(crate) fn answered(&self, asked: Asked, moved: Option<u64>, took: Duration) {
        if moved.is_none() {
            add(&self.errors, 1);
        }
        if let Some(kind) = self.of(asked) {
            add(&kind.answered, 1);
            add(&kind.sectors, moved.unwrap_or(0));
            add(&kind.micros, u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        }
    }

    /// A request stays on its ring until others have given memory back.
    pub(crate) fn waits(&self) {
        add(&self.waits, 1);
    }

    fn of(&self, asked: Asked) -> Option<&Kind> {
        match asked {
            Asked::Read => Some(&self.reads),
            Asked::Write => Some(&self.writes),
            Asked::Other => None,
        }
    }

    /// `struct vbd3_stats`, version 1.
    pub(super) fn bytes(&self) -> [u8; STATS_LEN] {
        let Kind { taken: reads, answered: reads_done, sectors: read, micros: reading } = &self.reads;
        let Kind { taken: writes, answered: writes_done, sectors: written, micros: writing } = &self.writes;
        let fields = [
            &self.waits,
            reads,
            reads_done,
            read,
            reading,
            writes,
            writes_done,
            written,
            writing,
            &self.errors,
        ];
        let mut bytes = [0; STATS_LEN];
        bytes[..4].copy_from_slice(&VERSION.to_ne_bytes());
        // Four bytes of padding, and behind the last field one of flags, none of which is ever set.
        for (field, to) in fields.iter().zip(bytes[8..].chunks_exact_mut(8)) {
            to.copy_from_slice(&field.get().to_ne_bytes());
        }
        bytes
    }
}

fn add(to: &Cell<u64>, more: u64) {
    to.set(to.get().saturating_add(more));
}

const VERSION: u32 = 1;
/// Bytes of `struct vbd3_stats`.
const STATS_LEN: usize = 96;
/// Bytes of the file. Who maps it maps a page.
const FILE_LEN: u64 = 4096;
/// How often it is brought up to date.
const PERIOD: Duration = Duration::from_secs(1);

/// Where those who look for such files look.
pub(crate) const SHARED_MEMORY: &str = "/dev/shm";

/// The file of one disk. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct Page {
    file: OwnedFd,
    place: Place,
}

/// Where such a file is.
#[derive(Debug)]
struct Place {
    folder: PathBuf,
    /// Locked for as long as somebody has a file in it.
    directory: OwnedFd,
    name: String,
}

impl Page {
    /// Makes the file, with counts of zero, after those that died without removing theirs were cleared away. This may
    /// block, and so is done before anything is served.
    ///
    /// # Errors
    /// If there is no such directory, or no space in it, or somebody else keeps us from it.
    pub(crate) fn create(shared: &Path, domain: Domain, device: u32) -> io::Result<Page> {
        sweep(shared)?;
        let folder = shared.join(format!("td3-{}", std::process::id()));
        match rustix::fs::mkdir(&folder, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        let directory = open_own(&folder)?;
        if rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok() {
            // No disk of this process has a file in it: what is there is of a dead process of the same number.
            let (ours, _others) = names(&directory)?;
            remove(&directory, &ours)?;
        }
        rustix::fs::flock(&directory, FlockOperation::NonBlockingLockShared)?;
        let name = format!("vbd-{domain}-{device}");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&directory, &name, flags, Mode::RUSR | Mode::WUSR)?;
        let page = Page { file, place: Place { folder, directory, name } };
        rustix::fs::fallocate(&page.file, FallocateFlags::empty(), 0, FILE_LEN)?;
        rustix::io::pwrite(&page.file, &Counts::default().bytes(), 0)?;
        Ok(page)
    }

    /// Keeps the file up to date until `over` happens, and removes it then.
    pub(crate) async fn follow(self, handle: &Handle, counts: &Counts, over: &Signal) {
        let Page { file, place } = self;
        let (file, mut shown) = (handle.register(file), Counts::default().bytes());
        while !over.has_happened() {
            let bytes = counts.bytes();
            if bytes != shown {
                let write = Io::Write { fd: file.clone(), at: 0, buf: Buf::from_bytes(&bytes) };
                match handle.start(write, None).await {
                    Ok(_written) => shown = bytes,
                    Err(errno) => {
                        tracing::debug!(%errno, name = place.name, "counts are not shown to xentop")
                    }
                }
            }
            if over.or(handle.sleep(PERIOD)).await.is_none() {
                return;
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let removed = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty());
        match removed.and_then(|()| rustix::fs::rmdir(&self.folder)) {
            // Another disk of this process has its file there.
            Ok(()) | Err(Errno::NOTEMPTY) => {}
            Err(errno) => {
                tracing::debug!(%errno, folder = %self.folder.display(), name = self.name, "not removed")
            }
        }
    }
}

/// Removes what tapdisks left behind that died.
fn sweep(shared: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(shared)? {
        let name = entry?.file_name();
        let pid: Option<u32> = name.to_str().and_then(|name| name.strip_prefix("td3-")?.parse().ok());
        let Some(pid) = pid else { continue };
        if pid == std::process::id() || Path::new("/proc").join(pid.to_string()).exists() {
            continue;
        }
        let folder = shared.join(name);
        // What cannot be removed is in nobody's way.
        if let Err(error) = remove_dead(&folder) {
            tracing::debug!(%error, folder = %folder.display(), "the counts of a dead process stay");
        }
    }
    Ok(())
}

fn remove_dead(folder: &Path) -> io::Result<()> {
    let directory = open_own(folder)?;
    // A process that is alive elsewhere, where processes have other numbers, holds the lock.
    rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
    let (ours, others) = names(&directory)?;
    if others {
        return Err(io::Error::other("it has files that are not tapdisk's"));
    }
    remove(&directory, &ours)?;
    Ok(rustix::fs::rmdir(folder)?)
}

/// A folder of this user, and no link to one: anyone can make either here.
fn open_own(folder: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(folder, flags, Mode::empty())?;
    if rustix::fs::fstat(&directory)?.st_uid != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other(format!("{} is another user's", folder.display())));
    }
    Ok(directory)
}

/// The files in a folder that are named as ours are, and whether there are others.
fn names(directory: &OwnedFd) -> io::Result<(Vec<String>, bool)> {
    let (mut ours, mut others) = (Vec::new(), false);
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if is_ours(&name) {
            ours.push(name);
        } else if name != "." && name != ".." {
            others = true;
        }
    }
    Ok((ours, others))
}

/// `vbd-DOMID-DEVICE`.
fn is_ours(name: &str) -> bool {
    let numbers = name.strip_prefix("vbd-").and_then(|rest| rest.split_once('-'));
    numbers.is_some_and(|(domain, device)| domain.parse::<u16>().is_ok() && device.parse::<u32>().is_ok())
}

fn remove(directory: &OwnedFd, names: &[String]) -> io::Result<()> {
    for name in names {
        rustix::fs::unlinkat(directory, name.as_str(), AtFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::rc::Rc;

    use block::Pool;
    use runtime::{RingFlags, Runtime, Uring};

    use super::*;

    const XVDB: u32 = 51728;

    /// 64-bit words of the file, as a reader of another program has them.
    fn words(file: &Path) -> Vec<u64> {
        let bytes = std::fs::read(file).unwrap();
        bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
    }

    fn own(shared: &Path) -> PathBuf {
        shared.join(format!("td3-{}", std::process::id()))
    }

    fn counts() -> Counts {
        let counts = Counts::default();
        counts.waits();
        (0..4).for_each(|_| counts.taken(Asked::Read));
        counts.answered(Asked::Read, Some(8), Duration::from_micros(100));
        counts.answered(Asked::Read, Some(3), Duration::from_micros(11));
        counts.answered(Asked::Read, None, Duration::from_micros(5));
        (0..3).for_each(|_| counts.taken(Asked::Write));
        counts.answered(Asked::Write, Some(2048), Duration::from_millis(3));
        counts.answered(Asked::Write, None, Duration::from_secs(1));
        counts.taken(Asked::Other);
        counts.answered(Asked::Other, None, Duration::from_secs(9));
        counts
    }

    #[test]
    fn it_is_laid_out_as_xen_reads_it() {
        // version and padding, oo_reqs; of reads: submitted, completed, sectors, ticks (microseconds); the same of
        // writes; io_errors, flags.
        let expected = [1, 1, 4, 3, 11, 116, 3, 2, 2048, 1_003_000, 3, 0];
        let bytes = counts().bytes();
        assert_eq!(bytes.len(), 12 * 8);
        assert_eq!((u32::from_ne_bytes(bytes[..4].try_into().unwrap()), &bytes[4..8]), (1, &[0; 4][..]));
        for (at, word) in expected.into_iter().enumerate().skip(1) {
            assert_eq!(u64::from_ne_bytes(bytes[at * 8..][..8].try_into().unwrap()), word, "word {at}");
        }
    }

    #[test]
    fn the_file_follows_the_counts_and_is_gone_in_the_end() {
        let shared = tempfile::tempdir().unwrap();
        let page = Page::create(shared.path(), Domain(7), XVDB).unwrap();
        let file = own(shared.path()).join("vbd-7-51728");
        assert_eq!(std::fs::metadata(&file).unwrap().blocks() * 512, FILE_LEN, "the space is there");
        assert_eq!(words(&file).len(), 512);
        assert_eq!(words(&file)[1..], [0; 511]);
        let pool = Pool::new(1 << 16);
        let runtime = Runtime::new(Box::new(Uring::open(RingFlags::Auto, &pool).unwrap()), pool);
        let handle = runtime.handle().clone();
        let seen = file.clone();
        runtime.block_on(async move {
            let (counts, over) = (Rc::new(Counts::default()), Rc::new(Signal::default()));
            let (task, ended) = ((handle.clone(), counts.clone(), over.clone()), Rc::new(Signal::default()));
            let end = ended.clone();
            handle.spawn(async move {
                page.follow(&task.0, &task.1, &task.2).await;
                end.happen();
            });
            for round in 1..=2 {
                counts.taken(Asked::Read);
                while words(&seen)[2] != round {
                    handle.sleep(Duration::from_millis(5)).await;
                }
            }
            over.happen();
            ended.wait().await;
        });
        assert!(!own(shared.path()).exists());
    }

    #[test]
    fn disks_of_one_process_share_its_folder_and_the_last_one_removes_it() {
        let shared = tempfile::tempdir().unwrap();
        let first = Page::create(shared.path(), Domain(7), XVDB).unwrap();
        let second = Page::create(shared.path(), Domain(7), XVDB + 16).unwrap();
        assert!(Page::create(shared.path(), Domain(7), XVDB).is_err(), "that disk has its file");
        drop(first);
        let third = Page::create(shared.path(), Domain(8), XVDB).unwrap();
        assert_eq!(words(&own(shared.path()).join("vbd-7-51744")).len(), 512);
        drop(second);
        assert_eq!(words(&own(shared.path()).join("vbd-8-51728")).len(), 512);
        drop(third);
        assert_eq!(std::fs::read_dir(shared.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_dead_tapdisks_left_is_cleared_away_and_nothing_else() {
        let shared = tempfile::tempdir().unwrap();
        let make = |folder: &str, files: &[&str]| {
            std::fs::create_dir(shared.path().join(folder)).unwrap();
            files.iter().for_each(|file| std::fs::write(shared.path().join(folder).join(file), "x").unwrap());
        };
        // No process has a number beyond 2^22 (proc(5)).
        make("td3-4194305", &["vbd-1-51712", "vbd-1-51728"]);
        make("td3-4194306", &["vbd-1-51712", "vdi-3"]);
        make("td3-4194307", &["vbd-1-51712"]);
        make("td3-1", &["vbd-1-51712"]); // alive
        make("td3-what", &["vbd-1-51712"]);
        make(&format!("td3-{}", std::process::id()), &["vbd-7-51728", "vbd-2-768", "vdi-3"]);
        symlink(shared.path().join("td3-what"), shared.path().join("td3-4194308")).unwrap();
        let elsewhere = open_own(&shared.path().join("td3-4194307")).unwrap();
        rustix::fs::flock(&elsewhere, FlockOperation::NonBlockingLockShared).unwrap();

        let page = Page::create(shared.path(), Domain(7), XVDB).unwrap();
        let has = |name: &str| shared.path().join(name).symlink_metadata().is_ok();
        assert!(!has("td3-4194305"));
        for kept in [
            "td3-4194306/vbd-1-51712",
            "td3-4194307/vbd-1-51712",
            "td3-1/vbd-1-51712",
            "td3-what/vbd-1-51712",
            "td3-4194308",
        ] {
            assert!(has(kept), "{kept}");
        }
        let own = own(shared.path());
        assert!(
            own.join("vbd-7-51728").exists() && !own.join("vbd-2-768").exists() && own.join("vdi-3").exists()
        );
        drop(page);
        assert!(!own.join("vbd-7-51728").exists() && own.join("vdi-3").exists());
    }

    #[test]
    fn a_folder_that_another_has_prepared_is_not_used() {
        let shared = tempfile::tempdir().unwrap();
        let trap = tempfile::tempdir().unwrap();
        symlink(trap.path(), own(shared.path())).unwrap();
        assert!(Page::create(shared.path(), Domain(7), XVDB).is_err());
        assert_eq!(std::fs::read_dir(trap.path()).unwrap().count(), 0);
        assert!(Page::create(Path::new("/nowhere"), Domain(7), XVDB).is_err());
    }
}
