//! The image that all servers serve in turn: one file, so that it lies at one place of one disk for all of them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{Advice, FlockOperation, fadvise, flock, statfs};

/// Size of every image and export.
pub(crate) const SIZE: u64 = 1 << 30;
pub(crate) const STAMP_LEN: usize = 8;
const BLOCK: usize = 4096;
/// What a block holds besides its stamp: not zeroes, which a server may treat in its own way.
const FILLING: u8 = 0xa5;

/// What a reader finds in an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contents {
    /// A null back end answers what it likes.
    Unknown,
    /// Each block of 4 KiB begins with its own offset.
    Stamped,
}

/// An image on disk, fully written; removed at the end.
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    /// The file system that it lies on, by name.
    pub(crate) file_system: String,
    /// One run at a time: two would measure each other.
    _lock: File,
}

impl Image {
    pub(crate) fn create(dir: &Path) -> Result<Image> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let lock = File::open(dir)?;
        let locked = flock(&lock, FlockOperation::NonBlockingLockExclusive);
        locked.with_context(|| format!("another run holds {}", dir.display()))?;
        let path = dir.join("image.raw");
        File::create(&path).with_context(|| format!("create {}", path.display()))?;
        let image = Image { path, file_system: file_system(dir)?, _lock: lock };
        image.stamp()?;
        Ok(image)
    }

    /// Writes every block as a reader expects it; again after a writer that has no stamps.
    ///
    /// In writes of 4 KiB, past an empty page cache, so that the cache holds the image in small folios: ext4 walks all
    /// buffers of a folio for each write into it, which in large folios costs 25 µs for 4 KiB (Linux 6.18) and hides
    /// what the servers cost.
    pub(crate) fn stamp(&self) -> Result<()> {
        self.settle(false)?;
        let mut file = File::options().write(true).open(&self.path)?;
        let mut bytes = vec![FILLING; BLOCK];
        for at in (0..SIZE).step_by(BLOCK) {
            fill(&mut bytes, at);
            file.write_all(&bytes).with_context(|| format!("write {}", self.path.display()))?;
        }
        file.sync_all().context("sync the image")
    }

    /// Leaves the disk quiet and the page cache full (or, for O_DIRECT, empty) whatever the last server did.
    pub(crate) fn settle(&self, cached: bool) -> Result<()> {
        let mut file = File::open(&self.path)?;
        file.sync_all()?;
        if !cached {
            return fadvise(&file, 0, None, Advice::DontNeed).context("drop the image from the page cache");
        }
        let mut bytes = vec![0; 1 << 20];
        while file.read(&mut bytes)? > 0 {}
        Ok(())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            eprintln!("could not remove {}: {error}", self.path.display());
        }
    }
}

/// Stamps each block of a payload that goes to `at`. The rest of a block is left as it is.
pub(crate) fn fill(payload: &mut [u8], at: u64) {
    for (block, at) in payload.chunks_mut(BLOCK).zip((at..).step_by(BLOCK)) {
        block[..STAMP_LEN].copy_from_slice(&stamp(at));
    }
}

/// Whether a payload that was read at `at` begins as it was written.
pub(crate) fn is_stamped(payload: &[u8], at: u64) -> bool {
    payload.first_chunk() == Some(&stamp(at))
}

/// Never zero, also at offset 0.
fn stamp(at: u64) -> [u8; STAMP_LEN] {
    (at | 1).to_le_bytes()
}

fn file_system(dir: &Path) -> Result<String> {
    let kind = statfs(dir)?.f_type as u64;
    Ok(match kind {
        0xef53 => "ext4".into(), // also ext2 and ext3, which share the number
        0x0102_1994 => "tmpfs".into(),
        0x5846_5342 => "xfs".into(),
        0x9123_683e => "btrfs".into(),
        0x794c_7630 => "overlayfs".into(),
        other => format!("file system {other:#x}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_bears_its_own_offset() {
        let mut payload = vec![FILLING; 2 * BLOCK];
        fill(&mut payload, 8192);
        assert!(is_stamped(&payload, 8192));
        assert!(is_stamped(&payload[BLOCK..], 12288));
        assert!(!is_stamped(&payload, 0));
        assert!(!is_stamped(&[0; BLOCK], 0));
    }
}
