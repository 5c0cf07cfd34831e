//! The lock that keeps an image to one writer: flock(2) on the very open file description that carries the I/O.
//!
//! The ring holds that description, so the lock of a process that died is let go of only when the kernel is done with
//! the last request of its ring. Whoever holds the lock can be sure that nobody's late write follows.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::FlockOperation;

pub(super) enum Error {
    /// Somebody holds it: who, as far as the kernel tells.
    Held(String),
    System(io::Error),
}

/// Takes the lock or tells who has it.
pub(super) fn take(file: &std::fs::File, shared: bool) -> Result<(), Error> {
    let operation =
        if shared { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    loop {
        match rustix::fs::flock(file, operation) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::Held(holder(file))),
            Err(errno) => return Err(Error::System(errno.into())),
        }
    }
}

/// Who uses a block device that the kernel says is busy.
pub(super) fn holder_of_device(path: &Path) -> String {
    match std::fs::File::open(path).map(|file| find(&file)) {
        Ok(Some(holder)) => holder,
        Ok(None) | Err(_) => {
            "the kernel or another process (mounted, part of a volume, or opened exclusively)".into()
        }
    }
}

fn holder(file: &std::fs::File) -> String {
    find(file).unwrap_or_else(|| "another process".into())
}

/// The process that /proc/locks names for this file (proc(5)); a dead one may still be named while its ring ends.
fn find(file: &std::fs::File) -> Option<String> {
    let metadata = file.metadata().ok()?;
    let device = metadata.dev();
    let place =
        format!("{:02x}:{:02x}:{}", rustix::fs::major(device), rustix::fs::minor(device), metadata.ino());
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let pid = locks.lines().find_map(|line| {
        // "1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF"
        let mut words = line.split_whitespace().skip_while(|word| *word != "FLOCK");
        let (pid, what) = (words.nth(3)?, words.next()?);
        (what == place).then(|| pid.to_owned())
    })?;
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => Some(format!("process {pid} ({})", name.trim_end())),
        Err(_) => Some(format!("process {pid}, which is ending")),
    }
}
