//! The lock that keeps an image to one writer: flock(2) on the very open file description that carries the I/O.
//!
//! The ring holds that description, so the lock of a process that died is let go of only when the kernel is done with
//! the last request of its ring. Whoever holds the lock can be sure that nobody's late write follows.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::{fmt, io};

use rustix::fs::FlockOperation;

pub(super) enum Error {
    Held(Holder),
    System(io::Error),
}

/// Who has an image.
#[derive(Clone, Debug)]
pub struct Holder {
    /// As far as the kernel tells.
    who: String,
    /// It is dead, and only the last requests of its ring are not.
    pub(super) is_ending: bool,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.who)
    }
}

/// Takes the lock or tells who has it.
pub(super) fn take(file: &std::fs::File, shared: bool) -> Result<(), Error> {
    let operation =
        if shared { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    let mut tries = 0;
    loop {
        match rustix::fs::flock(file, operation) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => match find(file) {
                Some(holder) => return Err(Error::Held(holder)),
                // It may have let go of it before we looked.
                None if tries < 3 => tries += 1,
                None => return Err(Error::Held(Holder { who: "another process".into(), is_ending: false })),
            },
            Err(errno) => return Err(Error::System(errno.into())),
        }
    }
}

/// Who uses a block device that the kernel says is busy.
pub(super) fn holder_of_device(path: &Path) -> Holder {
    let found = std::fs::File::open(path).ok().and_then(|file| find(&file));
    found.unwrap_or_else(|| Holder {
        who: "the kernel or another process (mounted, part of a volume, or opened exclusively)".into(),
        is_ending: false,
    })
}

/// The process that /proc/locks names for this file (proc(5)); a dead one may still be named while its ring ends.
fn find(file: &std::fs::File) -> Option<Holder> {
    let metadata = file.metadata().ok()?;
    let device = metadata.dev();
    let place =
        format!("{:02x}:{:02x}:{}", rustix::fs::major(device), rustix::fs::minor(device), metadata.ino());
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let (kind, pid) = locks.lines().find_map(|line| {
        // "1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF"
        let mut words = line.split_whitespace().skip_while(|word| *word != "FLOCK");
        let (kind, pid, what) = (words.nth(2)?, words.next()?, words.next()?);
        (what == place).then_some((kind, pid))
    })?;
    let reads =
        if kind == "READ" { ", which only reads it (maybe since another image stands on it)" } else { "" };
    // "1234 (name) S 1 ...": the name may have any character in it.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let alive = stat.split_once(" (").and_then(|(_, rest)| rest.rsplit_once(") "));
    let alive = alive.filter(|(_, rest)| !rest.starts_with(['Z', 'X']));
    Some(match alive {
        Some((name, _)) => Holder { who: format!("process {pid} ({name}){reads}"), is_ending: false },
        None => Holder { who: format!("process {pid}, which is ending"), is_ending: true },
    })
}
