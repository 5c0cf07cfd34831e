//! The folder where the lab and the clients work: on a file system with room, ours alone, swept before use.

use crate::command::{command, interrupt, output, target};
use crate::sweep;
use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, flock, statfs, statvfs};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Once;

/// From linux/magic.h.
const TMPFS_MAGIC: u64 = 0x0102_1994;
const ROOM_MIB: u64 = 4096;

/// The folder, and the lock that keeps a second run out of it.
pub(crate) struct Work {
    folder: PathBuf,
    _lock: File,
}

impl Work {
    /// Opens the folder, clears what an earlier run left there, and arranges that Ctrl-C does the same.
    pub(crate) fn open() -> Result<Work> {
        let folder = target()?.join("lab");
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let lock = File::create(folder.join("lock"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .with_context(|| format!("{} is in use by another run", folder.display()))?;
        sweep_at_interrupt(&folder)?;
        sweep::sweep(&folder)?;
        Ok(Work { folder, _lock: lock })
    }

    /// Refuses a folder where faults would come from the ground and not from the test: on a full tmpfs, ext4
    /// on a loop device acknowledges a short O_DIRECT write with no server at all.
    pub(crate) fn require_room(&self) -> Result<()> {
        let kind = statfs(&self.folder)?.f_type;
        ensure!(kind as u64 != TMPFS_MAGIC, "{} is on tmpfs; the lab needs a disk", self.folder.display());
        let room = statvfs(&self.folder)?;
        let free_mib = room.f_bavail * room.f_frsize / (1 << 20);
        ensure!(
            free_mib >= ROOM_MIB,
            "{} has {free_mib} MiB free; the lab needs {ROOM_MIB}",
            self.folder.display()
        );
        Ok(())
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A path in the folder; whatever was there is gone.
    pub(crate) fn fresh(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        if path.exists() {
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
        Ok(path)
    }

    /// A new sparse file of that size.
    pub(crate) fn sparse(&self, name: &str, len: u64) -> Result<PathBuf> {
        let path = self.fresh(name)?;
        File::create(&path)?.set_len(len)?;
        Ok(path)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Err(error) = sweep::sweep(&self.folder) {
            eprintln!("xtask: the lab is not clean: {error:#}");
        }
    }
}

fn sweep_at_interrupt(folder: &Path) -> Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    let folder = folder.to_owned();
    ONCE.call_once(|| {
        result = ctrlc::set_handler(move || {
            interrupt();
            eprintln!("\nxtask: interrupted, cleaning up");
            if let Err(error) = sweep::sweep(&folder) {
                eprintln!("xtask: the lab is not clean: {error:#}");
            }
            std::process::exit(130);
        });
    });
    result.context("handle Ctrl-C")
}

/// Drops the host's clean cached pages, so that what is read next comes from below.
pub(crate) fn drop_caches() -> Result<()> {
    output(&mut command("sync", [] as [&str; 0]))?;
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop the page cache (this needs root)")
}
