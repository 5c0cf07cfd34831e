//! A file in the making. It has another name until it is whole, so that what has the right name is whole, whatever ends
//! the work before. Nothing of anybody else is lost for it: neither what has one of its names before, nor what gets it
//! meanwhile.

use std::ffi::OsString;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use image::Format;
use image::metadata::LedgerFile;
use rustix::fs::{CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use storage::file::{self, Cache, OpenError, Opened, Options, Record, Records};

/// Bytes of a file that was made just now, until somebody says how large it is to be.
const SOME: u64 = 4096;

/// A file in the making; dropped before it is finished, it is removed.
pub(super) struct Target {
    /// What it is to be called.
    path: PathBuf,
    /// The new file; `None` for a block device, which is written where it is.
    part: Option<Part>,
    before: Before,
    /// Whether the name is taken from whatever has it.
    force: bool,
    /// Of what is replaced: what a server that died has noted for it is of no interest to the new one.
    record: Option<Record>,
}

/// What had the name in the begin.
enum Before {
    Nothing,
    /// A file without a byte, made beforehand for its owner and mode. It can only be looked at.
    Empty(std::fs::File),
    /// A file that is replaced, locked so that nobody opens it meanwhile; or the block device.
    Old(Option<std::fs::File>),
}

/// A new file under the name that it has while it is made.
struct Part {
    path: PathBuf,
    file: std::fs::File,
    /// Whether it stays, whoever has its name.
    stays: bool,
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
    let mut record = None;
    let record_of = |file: &std::fs::File, path: &Path| {
        let record = records.map(|records| records.of(file, path)).transpose();
        record.with_context(|| format!("cannot look at {}", path.display()))
    };
    let before = match std::fs::metadata(&path) {
        Ok(metadata) if metadata.file_type().is_block_device() => {
            let opened = file::open(&path, &options)?;
            let record = record_of(&opened.file, &path)?;
            forget_ledger(record.as_ref())?;
            return Ok((Target { path, part: None, before: Before::Old(None), force, record }, opened));
        }
        Ok(metadata) if metadata.is_file() && metadata.len() > 0 => {
            if !force {
                bail!("{} exists: `--force` replaces it", path.display());
            }
            let old = file::open(&path, &options)?.file;
            record = record_of(&old, &path)?;
            Before::Old(Some(old))
        }
        Ok(metadata) if metadata.is_file() => {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let empty = rustix::fs::open(&path, flags, Mode::empty());
            let empty = empty.with_context(|| format!("cannot look at {}", path.display()))?;
            Before::Empty(empty.into())
        }
        Ok(_) => bail!("{} is neither a file nor a block device", path.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            refuse_nowhere(&path)?;
            Before::Nothing
        }
        Err(error) => return Err(error).with_context(|| format!("cannot look at {}", path.display())),
    };
    let failed = || format!("cannot make {}", path.display());
    let part = Part::make(part_of(&path)?, force).with_context(failed)?;
    let opened = file::open(&part.path, &options).with_context(failed)?;
    if !same(&opened.file.metadata()?, &part.file.metadata()?) {
        bail!("{} was just made by somebody else", path.display());
    }
    part.look_like(&before).with_context(failed)?;
    // Where a file system does not tell when a file was born, it may be taken for one that had its inode before.
    forget(record_of(&opened.file, &part.path)?.as_ref())?;
    Ok((Target { path, part: Some(part), before, force, record }, opened))
}

/// Refuses to make an image of a format on a block device where it could not be written.
///
/// # Errors
/// It is qcow, which allocates at the end of its file.
pub(super) fn refuse_no_room(path: &Path, format: Format) -> anyhow::Result<()> {
    let is_device = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
    match format {
        Format::Qcow if is_device => bail!(
            "{} is a block device: a qcow image gets longer with each first write, which a block device cannot. Make it \
             in a file, or a qcow2 or raw image on the block device",
            path.display()
        ),
        Format::Raw | Format::Qcow | Format::Qcow2 | Format::Vhd => Ok(()),
    }
}

/// What a process before this one has noted of a file is of no interest any more, for it is made anew.
fn forget(record: Option<&Record>) -> anyhow::Result<()> {
    if let Some(record) = record {
        record.forget();
        if record.restore().is_some() {
            bail!(
                "cannot remove {}: it says that a sync of what was there before failed",
                record.path().display()
            );
        }
    }
    forget_ledger(record)
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

fn same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

impl Part {
    /// A new file. What has its name is left alone, but for a file that nobody uses where `force` is set.
    fn make(path: PathBuf, force: bool) -> anyhow::Result<Part> {
        // Exclusive: nor is a link followed.
        let new = || std::fs::File::options().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let made = match new() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                make_room(&path, force)?;
                new()
            }
            made => made,
        };
        let failed = || format!("cannot make {}", path.display());
        let part = Part { file: made.with_context(failed)?, path: path.clone(), stays: false };
        part.file.set_len(SOME).with_context(failed)?;
        Ok(part)
    }

    /// Gives it the owner and the mode of what had its name before.
    fn look_like(&self, before: &Before) -> anyhow::Result<()> {
        let (Before::Empty(old) | Before::Old(Some(old))) = before else { return Ok(()) };
        let (old, new) = (old.metadata()?, self.file.metadata()?);
        if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
            std::os::unix::fs::fchown(&self.file, Some(old.uid()), Some(old.gid()))
                .context("it cannot have the owner of what it replaces")?;
        }
        self.file.set_permissions(old.permissions()).context("it cannot have the mode of what it replaces")
    }

    /// Gives it a name that nothing has; whether it got it.
    fn take_free(&self, path: &Path) -> io::Result<bool> {
        match rustix::fs::renameat_with(CWD, &self.path, CWD, path, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(errno) if is_unknown(errno) => self.link_free(path),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The same where a file system (NFS) has only the ways of old.
    fn link_free(&self, path: &Path) -> io::Result<bool> {
        match std::fs::hard_link(&self.path, path) {
            Ok(()) => std::fs::remove_file(&self.path).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            // There is no other way here than to look, and then to be fast.
            Err(_) => match std::fs::symlink_metadata(path) {
                Ok(_) => Ok(false),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    std::fs::rename(&self.path, path).map(|()| true)
                }
                Err(error) => Err(error),
            },
        }
    }

    /// Gives it the name that this empty file has; whether it got it.
    fn take_from(&self, empty: &std::fs::File, path: &Path) -> io::Result<bool> {
        let empty = empty.metadata()?;
        let is_it = |path: &Path| {
            std::fs::symlink_metadata(path).map(|found| same(&found, &empty) && found.len() == 0)
        };
        match is_it(path) {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.take_free(path),
            Err(error) => return Err(error),
        }
        let exchange = || rustix::fs::renameat_with(CWD, &self.path, CWD, path, RenameFlags::EXCHANGE);
        match exchange() {
            Ok(()) if is_it(&self.path)? => std::fs::remove_file(&self.path).map(|()| true),
            Ok(()) => Ok(exchange().map(|()| false)?),
            Err(Errno::NOENT) => self.take_free(path),
            Err(errno) if is_unknown(errno) => std::fs::rename(&self.path, path).map(|()| true),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Whether a file system does not know a way to rename a file (renameat2(2)).
fn is_unknown(errno: Errno) -> bool {
    [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP].contains(&errno)
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        let ours = |found: Metadata| self.file.metadata().is_ok_and(|ours| same(&ours, &found));
        if std::fs::symlink_metadata(&self.path).is_ok_and(ours)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            eprintln!("tapdisk: {} stays behind, incomplete: {error}", self.path.display());
        }
    }
}

/// Removes what has the name that a new file is to have while it is made, if that is allowed.
fn make_room(part: &Path, force: bool) -> anyhow::Result<()> {
    let name = part.display();
    let found = match std::fs::symlink_metadata(part) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot look at {name}")),
    };
    if !found.is_file() {
        bail!(
            "it would be called {name} until it is whole: remove that, which is no file, or give another name"
        );
    }
    let options =
        Options { read_only: !force, cache: Cache::Buffered, wait: Duration::ZERO, ..Options::default() };
    let opened = match file::open(part, &options) {
        Err(error @ OpenError::Busy { .. }) => {
            return Err(anyhow::Error::from(error).context("somebody is just making this image"));
        }
        opened => opened,
    };
    if !force {
        bail!(
            "it would be called {name} until it is whole, and there is such a file: a command that was killed has left it, \
             or it is somebody else's. Remove it, or have `--force` do that"
        );
    }
    match opened {
        Ok(opened) if !same(&opened.file.metadata()?, &found) => {
            bail!("{name} was exchanged just now");
        }
        // Locked until it is gone: nobody begins to use it now.
        Ok(_) | Err(OpenError::Empty(_)) => {
            std::fs::remove_file(part).with_context(|| format!("cannot remove {name}"))
        }
        Err(OpenError::Missing(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl Target {
    /// Whether it is a new file, and reads as zero where it was not written.
    pub(super) fn is_file(&self) -> bool {
        self.part.is_some()
    }

    /// Gives the file its name, for good. What is in it has to be durable already.
    ///
    /// # Errors
    /// Somebody else has taken the name: then it stays, whole, under the one that it has. It has no name any more, or its name
    /// may not be durable.
    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        let path = self.path.clone();
        let Some(part) = &mut self.part else { return forget(self.record.as_ref()) };
        let named = match &self.before {
            _ if self.force => std::fs::rename(&part.path, &path).map(|()| true),
            Before::Nothing | Before::Old(_) => part.take_free(&path),
            Before::Empty(empty) => part.take_from(empty, &path),
        };
        if !named.with_context(|| format!("cannot give {} its name", path.display()))? {
            part.stays = true;
            bail!(
                "somebody else has made {} meanwhile, which is left as it is. The new image is whole, and called {}: give it \
                 another name",
                path.display(),
                part.path.display()
            );
        }
        forget(self.record.as_ref())?;
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            Some(_) | None => Path::new("."),
        };
        let folder = std::fs::File::open(folder)
            .with_context(|| format!("cannot open the folder of {}", path.display()))?;
        folder.sync_all().with_context(|| format!("the name {} may not be durable", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

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
    fn who_cannot_forget_a_failed_sync_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, "old").unwrap();
        let records = Records::open(&folder.path().join("state")).unwrap();
        let record = records.of(&std::fs::File::open(&path).unwrap(), &path).unwrap();
        std::fs::create_dir(record.path()).unwrap();
        let (target, opened) = make(&path, true, Cache::Buffered, Some(&records)).unwrap();
        drop(opened);
        let error = target.finish().unwrap_err().to_string();
        assert!(error.contains(record.path().to_str().unwrap()), "{error}");
        std::fs::remove_dir(record.path()).unwrap();
        std::fs::write(&path, "old").unwrap();
        let record = records.of(&std::fs::File::open(&path).unwrap(), &path).unwrap();
        std::fs::write(record.path(), "errno: EIO 5\n").unwrap();
        let (target, opened) = make(&path, true, Cache::Buffered, Some(&records)).unwrap();
        assert!(record.path().exists(), "the old image is still there");
        drop(opened);
        target.finish().unwrap();
        assert!(!record.path().exists());
    }

    #[test]
    fn what_has_the_name_of_a_part_is_somebody_elses() {
        let folder = tempfile::tempdir().unwrap();
        let (path, part) = (folder.path().join("disk"), folder.path().join("disk.part"));
        let other = folder.path().join("other");
        std::fs::write(&other, "other's").unwrap();
        std::os::unix::fs::symlink(&other, &part).unwrap();
        for force in [false, true] {
            let error = format!("{:#}", make(&path, force, Cache::Buffered, None).err().unwrap());
            assert!(error.contains("disk.part") && error.contains("no file"), "{error}");
        }
        assert!(part.is_symlink());
        std::fs::remove_file(&part).unwrap();
        std::fs::hard_link(&other, &part).unwrap();
        let error = format!("{:#}", make(&path, false, Cache::Buffered, None).err().unwrap());
        assert!(error.contains("disk.part") && error.contains("--force"), "{error}");
        assert!(same(&std::fs::metadata(&part).unwrap(), &std::fs::metadata(&other).unwrap()));
        let options = Options { wait: Duration::ZERO, read_only: true, ..Options::default() };
        let held = file::open(&other, &options).unwrap();
        let error = format!("{:#}", make(&path, true, Cache::Buffered, None).err().unwrap());
        assert!(error.contains("in use by"), "{error}");
        drop(held);
        let (target, opened) = make(&path, true, Cache::Buffered, None).unwrap();
        drop(opened);
        target.finish().unwrap();
        assert_eq!(std::fs::read(&other).unwrap(), b"other's");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), SOME);
        assert!(!part.exists());
    }

    #[test]
    fn what_gets_the_name_meanwhile_keeps_it() {
        let folder = tempfile::tempdir().unwrap();
        let (path, part) = (folder.path().join("disk"), folder.path().join("disk.part"));
        for was_empty in [false, true] {
            if was_empty {
                std::fs::write(&path, "").unwrap();
            }
            let (target, opened) = make(&path, false, Cache::Buffered, None).unwrap();
            // Into the very file, if there is one.
            std::fs::write(&path, "other's").unwrap();
            drop(opened);
            let error = target.finish().unwrap_err().to_string();
            assert!(error.contains("meanwhile") && error.contains("disk.part"), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), b"other's");
            assert_eq!(std::fs::metadata(&part).unwrap().len(), SOME);
            let (target, opened) = make(&path, true, Cache::Buffered, None).unwrap();
            drop(opened);
            target.finish().unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), SOME);
            std::fs::remove_file(&path).unwrap();
        }
        // Another empty file than the one that was there.
        std::fs::write(&path, "").unwrap();
        let (target, opened) = make(&path, false, Cache::Buffered, None).unwrap();
        let new = folder.path().join("new");
        std::fs::write(&new, "").unwrap();
        std::fs::rename(&new, &path).unwrap();
        drop(opened);
        assert!(target.finish().unwrap_err().to_string().contains("meanwhile"));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    }

    #[test]
    fn a_name_is_got_without_renameat2_and_never_from_another() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("disk"), folder.path().join("other"));
        let part = Part::make(folder.path().join("disk.part"), false).unwrap();
        std::fs::write(&other, "other's").unwrap();
        assert!(!part.link_free(&other).unwrap());
        assert!(part.link_free(&path).unwrap());
        assert_eq!(std::fs::read(&other).unwrap(), b"other's");
        let (made, ours) = (std::fs::metadata(&path).unwrap(), part.file.metadata().unwrap());
        assert!(same(&made, &ours) && ours.nlink() == 1 && !part.path.exists());
        drop(part);
        assert!(path.exists());
    }

    #[test]
    fn an_empty_file_that_was_made_beforehand_keeps_its_owner_and_mode() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, "").unwrap();
        let is_root = rustix::process::geteuid().is_root();
        if is_root {
            std::os::unix::fs::chown(&path, Some(12), Some(34)).unwrap();
        }
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        let (target, opened) = make(&path, false, Cache::Buffered, None).unwrap();
        drop(opened);
        target.finish().unwrap();
        let made = std::fs::metadata(&path).unwrap();
        assert_eq!((made.len(), made.mode() & 0o7777), (SOME, 0o640));
        assert!(!is_root || (made.uid(), made.gid()) == (12, 34));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
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
