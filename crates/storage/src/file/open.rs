//! Opening a file or block device as an image: its kind, size and alignment, and that nobody else writes it.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use block::Error;
use rustix::fs::{AtFlags, OFlags, StatxFlags};

use super::lock::{self, Holder};
use super::{Record, Records};

/// How the host's page cache is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Cache {
    /// Not at all (O_DIRECT) where the file system allows that.
    #[default]
    Direct,
    /// For reads and writes; a flush writes back what it holds.
    Buffered,
}

/// How to open.
#[derive(Clone, Debug)]
pub struct Options {
    /// Refuse writes; then others may read the file too.
    pub read_only: bool,
    /// How the page cache is to be used.
    pub cache: Cache,
    /// Make a sparse file of this many bytes if there is none, or an empty one.
    pub create: Option<u64>,
    /// How long to wait for another process to let go of the file. For one that is dead, and whose last requests the kernel
    /// is still about, it is 10 seconds at least.
    pub wait: Duration,
    /// Where it is kept which files are poisoned; without it a crash of the process is forgetful. It has no say where
    /// writes are refused.
    pub records: Option<Records>,
}

impl Default for Options {
    fn default() -> Options {
        let wait = Duration::from_secs(30);
        Options { read_only: false, cache: Cache::Direct, create: None, wait, records: None }
    }
}

/// Why a file cannot be opened as an image.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A system call failed.
    #[error("{}: cannot {doing}: {source}", path.display())]
    System {
        /// Of what.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// There is no such file.
    #[error("{} does not exist; `tapdisk create` makes an image, `tapdisk serve --create SIZE` a sparse one", .0.display())]
    Missing(PathBuf),
    /// Neither a file nor a block device.
    #[error("{} is {found}: expected a regular file or a block device", path.display())]
    Kind {
        /// What path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// No byte to serve.
    #[error("{} is empty: expected an image; `tapdisk create` makes one, `tapdisk serve --create SIZE` a sparse one", .0.display())]
    Empty(PathBuf),
    /// Short transfers are not continued where they stopped.
    #[error(
        "{}: what follows a short transfer on this file system is not where it belongs, and nothing says so: use another \
         file system, or serve a loop device on the file", .0.display()
    )]
    Misplaced(PathBuf),
    /// Somebody else uses it.
    #[error("{} is in use by {holder}: an image has one writer at a time{}", path.display(), after(waited))]
    Busy {
        /// What path.
        path: PathBuf,
        /// By whom, as far as the kernel tells.
        holder: Holder,
        /// How long we waited for it.
        waited: Duration,
    },
}

fn after(waited: &Duration) -> String {
    if waited.as_secs() == 0 { String::new() } else { format!(" (waited {} s for it)", waited.as_secs()) }
}

/// An image file, open and locked, and what was found out about it.
#[derive(Debug)]
pub struct Opened {
    /// The open file description that carries the I/O and the lock.
    pub file: std::fs::File,
    /// The same file without O_DIRECT, for the end of a file whose size is no multiple of the alignment, or is not once
    /// it has grown.
    pub tail: Option<std::fs::File>,
    /// Where it is.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Whether it was made just now.
    pub created: bool,
    /// Whether it is a block device.
    pub is_block_device: bool,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Bytes: offsets and lengths of I/O are multiples of it; 1 without O_DIRECT.
    pub align: u32,
    /// Bytes: addresses of memory are multiples of it; 1 without O_DIRECT.
    pub memory_align: u32,
    /// Whether O_DIRECT is in force.
    pub direct: bool,
    /// Why O_DIRECT is not in force although it was asked for.
    pub not_direct: Option<String>,
    /// Where a failed sync is recorded.
    pub record: Option<Record>,
    /// The error of a sync that failed in a process before this one.
    pub poison: Option<Error>,
}

/// For the last requests of a dead process.
const ENDING: Duration = Duration::from_secs(10);

/// Opens `path`; waits for a lock that another process holds, saying so.
pub fn open(path: &Path, options: &Options) -> Result<Opened, OpenError> {
    let started = Instant::now();
    let mut said = false;
    loop {
        let (path, holder) = match try_open(path, options) {
            Err(OpenError::Busy { path, holder, .. }) => (path, holder),
            result => return result,
        };
        let wait = if holder.is_ending { options.wait.max(ENDING) } else { options.wait };
        let waited = started.elapsed();
        if waited >= wait {
            return Err(OpenError::Busy { path, holder, waited });
        }
        // Of the end of a dead process, which takes milliseconds as a rule, nothing is said at first.
        let (quiet, pause) = if holder.is_ending { (1000, 10) } else { (0, 100) };
        if !said && waited >= Duration::from_millis(quiet) {
            let seconds = wait.as_secs();
            tracing::warn!(path = %path.display(), %holder, "the image is in use: waiting up to {seconds} s");
            said = true;
        }
        std::thread::sleep(Duration::from_millis(pause));
    }
}

fn try_open(path: &Path, options: &Options) -> Result<Opened, OpenError> {
    let system = |doing| move |source| OpenError::System { path: path.to_owned(), doing, source };
    let (file, is_block_device, direct, mut not_direct) = open_descriptor(path, options)?;
    lock::take(&file, options.read_only).map_err(|error| match error {
        lock::Error::Held(holder) => {
            OpenError::Busy { path: path.to_owned(), holder, waited: Duration::ZERO }
        }
        lock::Error::System(source) => system("lock it")(source),
    })?;
    let (size, created) = sized(&file, path, is_block_device, options)?;
    let mut opened = Opened {
        file,
        tail: None,
        path: path.to_owned(),
        size,
        created,
        is_block_device,
        read_only: options.read_only,
        align: 1,
        memory_align: 1,
        direct,
        not_direct: None,
        record: None,
        poison: None,
    };
    if direct {
        match alignment(&opened) {
            Some((align, memory_align)) => (opened.align, opened.memory_align) = (align, memory_align),
            None => {
                let flags =
                    rustix::fs::fcntl_getfl(&opened.file).map_err(|e| system("read its flags")(e.into()))?;
                rustix::fs::fcntl_setfl(&opened.file, flags - OFlags::DIRECT)
                    .map_err(|e| system("turn O_DIRECT off")(e.into()))?;
                opened.direct = false;
                not_direct = Some("no alignment was found with which O_DIRECT works here".into());
            }
        }
    }
    opened.not_direct = not_direct;
    let has_tail = !opened.size.is_multiple_of(u64::from(opened.align));
    if has_tail || (opened.align > 1 && !opened.is_block_device) {
        // A new open file description, since O_DIRECT belongs to the description; through /proc, since the name may
        // mean another file by now.
        let same = format!("/proc/self/fd/{}", opened.file.as_raw_fd());
        match std::fs::File::options().read(true).write(!options.read_only).open(same) {
            Ok(tail) => opened.tail = Some(tail),
            Err(error) if has_tail => return Err(system("open its end without O_DIRECT")(error)),
            Err(error) => tracing::debug!(path = %path.display(), %error, "it can grow by whole blocks only"),
        }
    }
    if let Some(records) = options.records.as_ref().filter(|_| !options.read_only) {
        let record = records.of(&opened.file, path).map_err(system("find out its identity"))?;
        if opened.created {
            record.forget(); // of a file that was there before
        }
        opened.poison = record.restore();
        opened.record = Some(record);
    }
    Ok(opened)
}

type Descriptor = (std::fs::File, bool, bool, Option<String>);

fn open_descriptor(path: &Path, options: &Options) -> Result<Descriptor, OpenError> {
    let system = |doing| move |source| OpenError::System { path: path.to_owned(), doing, source };
    let mut create = false;
    let is_block_device = match std::fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_block_device() => true,
        Ok(metadata) if metadata.is_file() => false,
        Ok(metadata) => {
            let found = if metadata.is_dir() { "a directory" } else { "a special file" };
            return Err(OpenError::Kind { path: path.to_owned(), found });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if options.create.is_none() || options.read_only {
                return Err(OpenError::Missing(path.to_owned()));
            }
            create = true;
            false
        }
        Err(error) => return Err(system("look at it")(error)),
    };
    // On a block device without O_CREAT, O_EXCL asks the kernel for its only user: no mount, no other claim.
    let exclusive = if is_block_device && !options.read_only { libc::O_EXCL } else { 0 };
    let open = |flags| {
        std::fs::File::options()
            .read(true)
            .write(!options.read_only)
            .create(create)
            .custom_flags(libc::O_CLOEXEC | exclusive | flags)
            .mode(0o600)
            .open(path)
    };
    let opened = match options.cache {
        Cache::Buffered => open(0).map(|file| (file, false, None)),
        Cache::Direct => match open(libc::O_DIRECT) {
            Ok(file) => Ok((file, true, None)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                open(0).map(|file| (file, false, Some("its file system has no O_DIRECT".into())))
            }
            Err(error) => Err(error),
        },
    };
    match opened {
        Ok((file, direct, why)) => Ok((file, is_block_device, direct, why)),
        Err(error) if exclusive != 0 && error.raw_os_error() == Some(libc::EBUSY) => {
            let holder = lock::holder_of_device(path);
            Err(OpenError::Busy { path: path.to_owned(), holder, waited: Duration::ZERO })
        }
        Err(error) => Err(system("open it")(error)),
    }
}

/// The size in bytes, after making it as large as asked for where it is empty.
fn sized(
    file: &std::fs::File,
    path: &Path,
    is_block_device: bool,
    options: &Options,
) -> Result<(u64, bool), OpenError> {
    let system = |doing| move |source| OpenError::System { path: path.to_owned(), doing, source };
    // The end is the size for block devices too, whose metadata says 0. We never use a file position otherwise.
    let size = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))
        .map_err(|e| system("find its size")(e.into()))?;
    match options.create {
        _ if size > 0 => Ok((size, false)),
        Some(size) if size > 0 && !is_block_device && !options.read_only => {
            file.set_len(size).map_err(system("make it as large as asked for"))?;
            file.sync_all().map_err(system("make its creation durable"))?;
            let parent = match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                Some(_) | None => Path::new("."),
            };
            let directory = std::fs::File::open(parent).map_err(system("open its directory"))?;
            directory.sync_all().map_err(system("make its name durable"))?;
            Ok((size, true))
        }
        Some(_) | None => Err(OpenError::Empty(path.to_owned())),
    }
}

/// The alignment of offsets and of memory that O_DIRECT asks for; `None` where it does not work.
fn alignment(opened: &Opened) -> Option<(u32, u32)> {
    let usable = |align: u32| align.is_power_of_two() && align <= block::pool::ALIGN as u32;
    let statx = rustix::fs::statx(&opened.file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(found) = statx
        && found.stx_mask & StatxFlags::DIOALIGN.bits() != 0
    {
        let (align, memory) = (found.stx_dio_offset_align, found.stx_dio_mem_align);
        return (usable(align) && usable(memory)).then_some((align, memory));
    }
    if opened.is_block_device {
        let align = rustix::fs::ioctl_blksszget(&opened.file).ok()?;
        return usable(align).then_some((align, align));
    }
    // Linux before 6.1, or a file system that does not tell (FUSE, NFS): try.
    [512, 1024, 2048, 4096]
        .into_iter()
        .find(|&align| probe(&opened.file, opened.size, align))
        .map(|align| (align, align))
}

/// Whether a direct read of this length works from a place, and into memory, aligned to it and to no more.
fn probe(file: &std::fs::File, size: u64, align: u32) -> bool {
    let align = align as usize;
    let mut memory = vec![0; 4 * block::pool::ALIGN];
    let page = memory.as_ptr().align_offset(block::pool::ALIGN);
    let piece = &mut memory[page + align..][..align];
    // At the end of the file the kernel answers before it looks at the alignment.
    let at = if size >= 2 * align as u64 { align as u64 } else { 0 };
    file.read_at(piece, at).is_ok()
}
