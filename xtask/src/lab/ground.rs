//! The host's file system in small: ext4 on a loop device on a sparse file, with as much room as we say.

use crate::command::{command, output, root, until, within};
use crate::work::{Work, drop_caches};
use anyhow::{Context, Result, ensure};
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::thread::{CapabilitySet, capabilities};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

pub(crate) const MIB: u64 = 1 << 20;

/// What its own tables and journal take, generously; the rest is filled up.
const OVERHEAD: u64 = 64 * MIB;
/// Room that is taken up from the start, to be given back where enlarging is not permitted.
const BALLAST: u64 = 1536 * MIB;
const BALLAST_NAME: &str = "ballast";

/// A mounted file system of ours. Dropped, it is gone.
pub(crate) struct Ground {
    backing: PathBuf,
    device: String,
    mount: PathBuf,
}

impl Ground {
    /// Makes one with exactly so much free space.
    pub(crate) fn with_free(work: &Work, name: &str, free: u64) -> Result<Ground> {
        let backing = work.sparse(&format!("{name}.ext4"), free + OVERHEAD + BALLAST)?;
        output(
            // All tables are written now: later they would take the space that we count.
            command("mkfs.ext4", ["-q", "-F", "-b", "4096", "-m", "0", "-N", "1024", "-J", "size=16", "-E"])
                .arg("lazy_itable_init=0,lazy_journal_init=0,nodiscard")
                .arg(&backing),
        )?;
        let ground = Ground::attach(work, name, backing)?;
        let surplus = ground.free()?.checked_sub(free).context("the file system came out too small")?;
        ground.take_up(BALLAST_NAME, BALLAST)?;
        ground.take_up("filler", surplus - BALLAST)?;
        let free_now = ground.free()?;
        ensure!(free_now.abs_diff(free) < MIB, "{free_now} bytes are free instead of {free}");
        Ok(ground)
    }

    fn take_up(&self, name: &str, len: u64) -> Result<()> {
        let file = File::create(self.path(name))?;
        fallocate(&file, FallocateFlags::empty(), 0, len).context("fill it up")?;
        file.sync_all().context("fill it up")
    }

    /// Mounts a file that holds such a file system. If it was not unmounted, its journal is replayed.
    fn attach(work: &Work, name: &str, backing: PathBuf) -> Result<Ground> {
        let mount = work.folder().join(name);
        fs::create_dir_all(&mount)?;
        let device = attach_loop(&backing, &[])?;
        let ground = Ground { backing, device, mount };
        output(command("mount", [&ground.device]).arg(&ground.mount))?;
        Ok(ground)
    }

    /// The disk as a power cut would leave it now: what the file system wrote to its device so far, and
    /// nothing of what it still keeps in memory.
    pub(crate) fn after_a_power_cut(&self, work: &Work, name: &str) -> Result<Ground> {
        Ground::copy_of(work, name, &self.backing)
    }

    /// A copy of a file that holds such a file system, mounted.
    pub(crate) fn copy_of(work: &Work, name: &str, original: &Path) -> Result<Ground> {
        let backing = work.fresh(&format!("{name}.ext4"))?;
        output(command("cp", ["--sparse=always", "--"]).arg(original).arg(&backing))?;
        Ground::attach(work, name, backing)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.mount.join(name)
    }

    /// Bytes that can still be had.
    pub(crate) fn free(&self) -> Result<u64> {
        let room = statvfs(&self.mount)?;
        Ok(room.f_bavail * room.f_frsize)
    }

    /// Makes it larger while it is mounted and in use, as an administrator would. That needs
    /// `CAP_SYS_RESOURCE`, which some containers keep even from root; there as much room is set free.
    pub(crate) fn enlarge(&self) -> Result<()> {
        let may_resize = capabilities(None)?.effective.contains(CapabilitySet::SYS_RESOURCE);
        if !may_resize {
            return fs::remove_file(self.path(BALLAST_NAME)).context("set room free");
        }
        let file = File::options().write(true).open(&self.backing)?;
        file.set_len(file.metadata()?.len() + BALLAST)?;
        output(&mut command("losetup", ["--set-capacity", &self.device]))?;
        output(&mut command("resize2fs", [&self.device]))?;
        Ok(())
    }

    /// Unmounts and mounts it, and drops the page cache, so that what is read next comes from the disk.
    pub(crate) fn remount(&self) -> Result<()> {
        self.unmount()?;
        drop_caches()?;
        output(command("mount", [&self.device]).arg(&self.mount))?;
        Ok(())
    }

    /// The kernel tears down the ring of a process that has ended in its own time, and until then the image
    /// is in use.
    fn unmount(&self) -> Result<()> {
        until(Duration::from_secs(5), &format!("{} is free", self.mount.display()), || {
            let ended = within(Duration::from_secs(60), command("umount", ["--"]).arg(&self.mount))?;
            ensure!(ended.status.success() || ended.stderr.contains("busy"), "umount: {}", ended.said());
            Ok(ended.status.success())
        })
    }

    fn release(&self) -> Result<()> {
        self.unmount()?;
        output(&mut command("losetup", ["--detach", &self.device]))?;
        fs::remove_file(&self.backing).context("remove the backing file")
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            // The sweep at the end of the run tries harder, and fails the run if it can't.
            eprintln!("xtask: {error:#}");
        }
    }
}

/// Attaches a loop device to a file and returns its name.
pub(crate) fn attach_loop(file: &Path, how: &[&str]) -> Result<String> {
    let mut losetup = Command::new("losetup");
    losetup.current_dir(root()).args(["--find", "--show"]).args(how).arg(file);
    Ok(output(&mut losetup)?.trim().to_owned())
}
