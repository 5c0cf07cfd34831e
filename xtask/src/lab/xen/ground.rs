//! A file system of dom0's on a virtio disk, with as much room as we say.

use crate::lab::ground::MIB;
use crate::lab::xen::boot::Boot;
use anyhow::{Context, Result, ensure};
use lab::shell::Shell;

/// What its own tables and journal take, generously; the rest is filled up.
const OVERHEAD: u64 = 32 * MIB;

/// A mounted file system of dom0's.
pub(crate) struct Ground {
    device: String,
    folder: String,
}

impl Ground {
    /// The one on this disk.
    pub(crate) fn on(disk: &str) -> Ground {
        Ground { device: format!("/dev/{disk}"), folder: format!("/images/{disk}") }
    }

    /// Makes one on a disk and mounts it under `/images`; with so much free space, or with all of the disk.
    pub(crate) fn make(boot: &mut Boot<'_>, disk: &str, free: Option<u64>) -> Result<Ground> {
        let ground = Ground::on(disk);
        let Ground { device, folder } = &ground;
        let blocks = free.map(|free| ((free + OVERHEAD) / 4096).to_string()).unwrap_or_default();
        // All tables are written now: later they would take the space that we count.
        boot.sh(&format!(
            "set -e; /sbin/mke2fs -q -F -t ext4 -b 4096 -m 0 -N 1024 -J size=8 \
             -E lazy_itable_init=0,lazy_journal_init=0,nodiscard {device} {blocks}\n\
             mkdir -p {folder}; mount -t ext4 {device} {folder}"
        ))?;
        if let Some(free) = free {
            let surplus =
                ground.free(boot)?.checked_sub(free).context("the file system came out too small")?;
            boot.sh(&format!("fallocate -l {surplus} {folder}/filler; sync"))?;
            let found = ground.free(boot)?;
            ensure!(found.abs_diff(free) < MIB, "{found} bytes are free instead of {free}");
        }
        Ok(ground)
    }

    /// A sparse file on it.
    pub(crate) fn sparse(&self, boot: &mut Boot<'_>, name: &str, len: u64) -> Result<String> {
        let path = format!("{}/{name}", self.folder);
        boot.sh(&format!("rm -f {path}; truncate -s {len} {path}"))?;
        Ok(path)
    }

    /// Bytes that can still be had.
    pub(crate) fn free(&self, boot: &mut Boot<'_>) -> Result<u64> {
        let blocks = boot.sh(&format!("stat -f -c %a {}", self.folder))?;
        Ok(blocks.parse::<u64>().with_context(|| format!("{blocks} free blocks"))? * 4096)
    }

    /// Makes it as large as its disk while it is mounted and in use, as an administrator would.
    pub(crate) fn enlarge(&self, boot: &mut Boot<'_>) -> Result<()> {
        boot.sh(&format!("/sbin/resize2fs {} 2>&1", self.device)).map(drop)
    }
}

/// Bytes of a file that have blocks of their own.
pub(crate) fn allocated(boot: &mut Boot<'_>, file: &str) -> Result<u64> {
    let blocks = boot.sh(&format!("stat -c %b {file}"))?;
    Ok(blocks.parse::<u64>().with_context(|| format!("{blocks} blocks"))? * 512)
}
