//! A file in the making. It has another name until it is whole, so that what has the right name is whole, whatever ends
//! the work before.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use image::metadata::LedgerFile;
use storage::file::{self, Cache, OpenError, Opened, Options, Record, Records};

/// Bytes of a file that was made just now, until somebody says how large it is to be.
const SOME: u64 = 4096;

/// A file in the making; dropped before it is finished, it is removed.
pub(super) struct Target {
    /// What it is to be called.
    path: PathBuf,
    /// What it is called until then; `None` for a block device, which is written where it is.
    part: Option<PathBuf>,
    /// The file that it replaces, locked so that nobody opens it meanwhile.
    replaced: Option<std::fs::File>,
    /// Of that file: what a server that died has noted for it is of no interest to the new one.
    record: Option<Record>,
}

/// Makes a new file, or takes a block device. A file that exists is replaced if `force` is set or it is empty, in the end. What
/// a server that died has noted for what was there is forgotten then: it must not find its way into the new image.
///
/// # Errors
/// It exists, is in use, or cannot be made.
pub(super) fn make(
    path: &Path,
    force: bool,
    cache: Cache,
    records: Option<&Records>,
) -> anyhow::Result<(Target, Opened)> {
    let options = Options { cache, wait: Duration::ZERO, ..Options::default() };
    // A name for another file is that file's: it is not replaced itself.
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut replaced = None;
    let mut record = None;
    let record_of = |file: &std::fs::File, path: &Path| {
        let record = records.map(|records| records.of(file, path)).transpose();
        record.with_context(|| format!("cannot look at {}", path.display()))
    };
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.file_type().is_block_device() => {
            let opened = file::open(&path, &options)?;
            forget_ledger(record_of(&opened.file, &path)?.as_ref())?;
            return Ok((Target { path, part: None, replaced: None, record: None }, opened));
        }
        Ok(metadata) if metadata.is_file() && metadata.len() > 0 => {
            if !force {
                bail!("{} exists: `--force` replaces it", path.display());
            }
            let old = file::open(&path, &options)?.file;
            record = record_of(&old, &path)?;
            replaced = Some(old);
        }
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => bail!("{} is neither a file nor a block device", path.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => refuse_nowhere(&path)?,
        Err(error) => return Err(error).with_context(|| format!("cannot look at {}", path.display())),
    }
    let part = part_of(&path)?;
    let was_there = part.exists();
    let opened = file::open(&part, &Options { create: Some(SOME), ..options }).map_err(|error| {
        let is_busy = matches!(error, OpenError::Busy { .. });
        if !is_busy && !was_there && part.exists() {
            drop(Target { path: path.clone(), part: Some(part.clone()), replaced: None, record: None });
        }
        let hint = if is_busy { ": somebody is just making this image" } else { "" };
        anyhow::Error::from(error).context(format!("cannot make {}{hint}", path.display()))
    })?;
    // Who had it until just now may have given it its name meanwhile.
    let (ours, named) = (opened.file.metadata()?, std::fs::metadata(&part));
    if !named.is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())) {
        bail!("{} was just made by somebody else", path.display());
    }
    // Where a file system does not tell when a file was born, it may be taken for one that had its inode before.
    forget_ledger(record_of(&opened.file, &part)?.as_ref())?;
    Ok((Target { path, part: Some(part), replaced, record }, opened))
}

fn forget_ledger(record: Option<&Record>) -> anyhow::Result<()> {
    record.map_or(Ok(()), LedgerFile::remove).context("cannot remove the ledger of what was there before")
}

/// A new file needs a folder, and a name that is its own.
fn refuse_nowhere(path: &Path) -> anyhow::Result<()> {
    if let Ok(leads) = path.read_link() {
        bail!(
            "{} is a link to {}, where nothing is: give that name, or remove the link",
            path.display(),
            leads.display()
        );
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder
        && !folder.is_dir()
    {
        bail!("{} cannot be made: {} is no folder", path.display(), folder.display());
    }
    Ok(())
}

fn part_of(path: &Path) -> anyhow::Result<PathBuf> {
    let mut name =
        path.file_name().map(OsString::from).with_context(|| format!("{} names no file", path.display()))?;
    name.push(".part");
    Ok(path.with_file_name(name))
}

impl Target {
    /// Whether it is a new file, and reads as zero where it was not written.
    pub(super) fn is_file(&self) -> bool {
        self.part.is_some()
    }

    /// Gives the file its name, for good. What is in it has to be durable already.
    ///
    /// # Errors
    /// It has no name any more, or its name may not be durable.
    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        let Some(part) = self.part.clone() else { return Ok(()) };
        let path = self.path.clone();
        let failed = || format!("cannot give {} its name", path.display());
        if let Some(replaced) = &self.replaced {
            let old = replaced.metadata().with_context(failed)?;
            std::fs::set_permissions(&part, old.permissions()).with_context(failed)?;
            let new = std::fs::metadata(&part).with_context(failed)?;
            if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
                std::os::unix::fs::chown(&part, Some(old.uid()), Some(old.gid())).with_context(failed)?;
            }
        }
        std::fs::rename(&part, &path).with_context(failed)?;
        self.part = None;
        forget_ledger(self.record.as_ref())?;
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            Some(_) | None => Path::new("."),
        };
        let folder = std::fs::File::open(folder)
            .with_context(|| format!("cannot open the folder of {}", path.display()))?;
        folder.sync_all().with_context(|| format!("the name {} may not be durable", path.display()))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(part) = &self.part
            && let Err(error) = std::fs::remove_file(part)
            && error.kind() != io::ErrorKind::NotFound
        {
            eprintln!("tapdisk: {} stays behind, incomplete: {error}", part.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let (target, opened) = make(&path, false, Cache::Buffered, None).unwrap();
        assert!(folder.path().join("disk.part").exists() && !path.exists());
        // While it is being made nobody else makes it.
        let error = format!("{:#}", make(&path, false, Cache::Buffered, None).err().unwrap());
        assert!(error.contains("somebody is just making"), "{error}");
        drop((target, opened));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_exists_is_replaced_only_by_force_and_only_in_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("disk"), folder.path().join("link"));
        std::fs::write(&path, "old").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let error = make(&link, false, Cache::Buffered, None).err().unwrap().to_string();
        assert!(error.contains("exists"), "{error}");
        let (target, opened) = make(&link, true, Cache::Buffered, None).unwrap();
        // Nobody opens the old one meanwhile.
        let options = Options { wait: Duration::ZERO, ..Options::default() };
        assert!(matches!(file::open(&path, &options), Err(OpenError::Busy { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        drop(opened);
        target.finish().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), SOME);
        assert!(link.is_symlink());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_is_replaced_leaves_no_ledger_and_what_stays_keeps_it() {
        use image::metadata::{Change, Ledger};

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, "old").unwrap();
        let records = Records::open(&folder.path().join("state")).unwrap();
        let record = records.of(&std::fs::File::open(&path).unwrap(), &path).unwrap();
        let change = Change { at: 0, old: 0, new: 1, stage: 0 };
        LedgerFile::open(&record).unwrap().note(&[change]).unwrap();
        let ledger = LedgerFile::path(&record);
        drop(make(&path, true, Cache::Buffered, Some(&records)).unwrap());
        assert!(ledger.exists(), "the old image is still there, and so is what it lacks");
        let (target, opened) = make(&path, true, Cache::Buffered, Some(&records)).unwrap();
        drop(opened);
        target.finish().unwrap();
        assert!(!ledger.exists());
    }

    #[test]
    fn an_image_in_use_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, "old").unwrap();
        let options = Options { wait: Duration::ZERO, ..Options::default() };
        let _held = file::open(&path, &options).unwrap();
        let error = make(&path, true, Cache::Buffered, None).err().unwrap().to_string();
        assert!(error.contains("in use by"), "{error}");
    }
}
