//! A disk that a tool works on: the image, open, and those below it.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, bail};
use block::Error;
use image::metadata::{Ledger, LedgerFile};
use image::probe::{self, Look};
use image::{Chain, Format, Header, Layer, vhd, walk};
use runtime::Handle;
use storage::Storage;
use storage::file::{self, Cache};

use crate::cli::tool::Places;
use crate::screen::harmless;
use crate::state;

/// What is going to be done with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// It is read, and so are those below it.
    Read,
    /// It is read, and those below it are left alone: what only they say reads as zero.
    ReadAlone,
    /// It is written, over those below it.
    Write,
}

/// Which image, and how.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) path: &'a Path,
    /// What its name and header say, if not given.
    pub(super) format: Option<Format>,
    /// The option by which its format is said.
    pub(super) format_by: &'static str,
    pub(super) access: Access,
    pub(super) cache: Cache,
    pub(super) places: &'a Places,
}

/// A disk, open.
pub(super) struct Disk {
    pub(super) chain: Rc<Chain>,
    /// From the top down.
    pub(super) layers: Vec<Layer>,
}

impl<'a> Asked<'a> {
    /// An image, through the page cache: it is often looked at soon after it was made.
    pub(super) fn new(
        path: &'a Path,
        format: Option<Format>,
        access: Access,
        places: &'a Places,
    ) -> Asked<'a> {
        Asked { path, format, format_by: "-f", access, cache: Cache::Buffered, places }
    }

    /// The same, of an image that is to be below another one.
    pub(super) fn below(path: &'a Path, format: Option<Format>, places: &'a Places) -> Asked<'a> {
        Asked { format_by: "-F", ..Asked::new(path, format, Access::Read, places) }
    }

    fn records(&self) -> anyhow::Result<Option<file::Records>> {
        let what_for = match self.access {
            Access::Write => state::For::Changing,
            Access::Read | Access::ReadAlone => state::For::Reading,
        };
        state::records(self.places.state_dir.as_ref(), what_for)
    }

    /// How its file is opened: at once or not at all.
    pub(super) fn file(&self) -> anyhow::Result<file::Options> {
        let read_only = self.access != Access::Write;
        let records = self.records()?;
        Ok(file::Options { read_only, cache: self.cache, create: None, wait: Duration::ZERO, records })
    }

    /// Of which format a file is that was opened without regard to its header.
    ///
    /// # Errors
    /// It is not said, and not to be seen.
    pub(super) async fn format_of(
        &self,
        file: &Rc<dyn Storage>,
        is_block_device: bool,
    ) -> anyhow::Result<Format> {
        if let Some(format) = self.format {
            return Ok(format);
        }
        if probe::is_raw_by_name(self.path, is_block_device) {
            return Ok(Format::Raw);
        }
        let path = self.path.display();
        let look = probe::look(file, self.path, is_block_device).await;
        match look.with_context(|| format!("cannot look at {path}"))? {
            Look::Of(format) => Ok(format),
            look @ Look::Unclear(begins) => bail!("{path} {look}: -f vhd or -f {begins} says which it is"),
            Look::Foreign(name) => bail!("{path} looks like {name}, which tapdisk does not know"),
            Look::Nothing => {
                bail!("{path} begins like no image that tapdisk knows: say with -f which it should be")
            }
        }
    }

    /// Refuses an image that lacks what its server, which has died, has noted for a successor.
    ///
    /// # Errors
    /// It does, or that cannot be found out.
    pub(super) fn refuse_pending(&self, opened: &file::Opened) -> anyhow::Result<()> {
        let Some(records) = self.records()? else { return Ok(()) };
        let path = self.path.display();
        let record = records.of(&opened.file, self.path).with_context(|| format!("cannot look at {path}"))?;
        if let Some(error) = record.restore().filter(|_| opened.read_only) {
            say_that_it_is_suspect(self.path, &error);
        }
        let failed = || format!("cannot read the ledger of {path}");
        let changes = LedgerFile::open(&record).with_context(failed)?.changes().with_context(failed)?;
        if !changes.is_empty() {
            bail!(
                "{path}: a tapdisk that wrote it died, and {} changes of its map that guests were answered for are not in it \
                 yet. Serve it once so that they are written, and stop that in order; then do this again",
                changes.len()
            );
        }
        Ok(())
    }

    fn options(&self) -> anyhow::Result<image::Options> {
        Ok(image::Options {
            format: self.format,
            format_by: Some(self.format_by),
            file: self.file()?,
            no_backing: self.access == Access::ReadAlone,
            allowed: self.places.allow_folder.clone(),
            ..image::Options::default()
        })
    }

    /// Opens the files and reads the headers, and no more.
    ///
    /// # Errors
    /// In words for people.
    pub(super) async fn walk(&self, handle: &Handle) -> anyhow::Result<Vec<Layer>> {
        Ok(walk(handle, self.path, &mut self.options()?).await?)
    }

    /// Opens the images. One that somebody uses is refused.
    ///
    /// # Errors
    /// In words for people.
    pub(super) async fn open(&self, handle: &Handle) -> anyhow::Result<Disk> {
        let disk = image::open(handle, self.path, self.options()?).await?;
        disk.suspect().for_each(|(held, error)| say_that_it_is_suspect(&held.path, &error));
        let image::Disk { chain, layers } = disk;
        Ok(Disk { chain: Rc::new(chain), layers })
    }
}

impl Disk {
    /// The image itself.
    pub(super) fn top(&self) -> &Layer {
        self.layers.first().expect("a disk has an image")
    }

    /// The images that are plain bytes in a file.
    pub(super) fn flat(&self) -> Vec<usize> {
        let flat = |(depth, layer): (usize, &Layer)| is_flat(&layer.header).then_some(depth);
        self.layers.iter().enumerate().filter_map(flat).collect()
    }

    /// Makes all that was written durable, and leaves the image as one who comes later expects it.
    ///
    /// # Errors
    /// It may not be durable.
    pub(super) async fn close(&self) -> anyhow::Result<()> {
        let path = &self.top().file.path;
        self.chain.close().await.map_err(failed(path, "make durable what was changed in"))?;
        if let Some(record) = self.top().file.record.as_ref().filter(|_| !self.top().file.read_only) {
            LedgerFile::remove(record)
                .with_context(|| format!("cannot remove the ledger of {}", path.display()))?;
        }
        Ok(())
    }
}

/// The page cache may show what the disk does not hold.
fn say_that_it_is_suspect(path: &Path, error: &Error) {
    let said = format!(
        "{}: {error}; who served it then did not end in order, and what is read from it may not be what is on the disk",
        path.display()
    );
    eprintln!("tapdisk: {}", harmless(&said));
}

fn is_flat(header: &Header) -> bool {
    match header {
        Header::Raw { .. } => true,
        Header::Vhd(header) => header.subformat() == vhd::Subformat::Fixed,
        Header::Qcow(_) | Header::Qcow2(_) => false,
    }
}

/// What to say of an error of a file.
pub(super) fn failed(path: &Path, doing: &str) -> impl FnOnce(Error) -> anyhow::Error {
    let what = format!("cannot {doing} {}", path.display());
    move |error| anyhow::Error::from(error).context(what)
}

/// Where a name leads that the image at `image` has, or is to have.
pub(super) fn from_image(image: &Path, name: &str) -> PathBuf {
    image::named(image, name).unwrap_or_else(|| image.parent().unwrap_or(Path::new("")).join(name))
}

/// Refuses a name by which the image at `image`, which is to have it, would not be opened.
///
/// # Errors
/// It is no path to those who open the image.
pub(super) fn refuse_no_path(image: &Path, name: &str) -> anyhow::Result<()> {
    if image::named(image, name).is_none() {
        bail!(
            "{name:?} would be no path for who opens {}: where a colon comes before the first slash, a name has to begin \
             with `./` or `/`",
            image.display()
        );
    }
    Ok(())
}

/// Refuses to put an image below itself, or below one that stands on it.
///
/// # Errors
/// The image at `image` is one of these.
pub(super) fn refuse_loop(image: &Path, below: &[Layer]) -> anyhow::Result<()> {
    match one_of(below, image)? {
        Some(same) => {
            bail!("{} cannot be below itself: {} is the same file", image.display(), same.display())
        }
        None => Ok(()),
    }
}

/// Which of the files of these images one is, whatever it is called.
///
/// # Errors
/// One of these cannot be looked at.
pub(super) fn one_of<'a>(images: &'a [Layer], path: &Path) -> anyhow::Result<Option<&'a Path>> {
    let Ok(wanted) = std::fs::metadata(path) else { return Ok(None) };
    for file in images.iter().flat_map(Layer::files) {
        let found = std::fs::metadata(&file.path)
            .with_context(|| format!("cannot look at {}", file.path.display()))?;
        if is_same(&found, &wanted) {
            return Ok(Some(&file.path));
        }
    }
    Ok(None)
}

/// Whether two names lead to the same bytes: of one file, of one block device by whatever node, of a loop device and the file
/// that it shows.
pub(super) fn is_same(one: &Metadata, other: &Metadata) -> bool {
    let file = |found: &Metadata| (found.dev(), found.ino());
    let shows = |device: &Metadata, shown: &Metadata| {
        backing_of_loop(device.rdev()).is_some_and(|backing| file(&backing) == file(shown))
    };
    match (one.file_type().is_block_device(), other.file_type().is_block_device()) {
        (true, true) => one.rdev() == other.rdev(),
        (true, false) => shows(one, other),
        (false, true) => shows(other, one),
        (false, false) => file(one) == file(other),
    }
}

/// The file that a loop device shows, or the one that a partition is on.
fn backing_of_loop(device: u64) -> Option<Metadata> {
    let place = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let read = |name: &str| std::fs::read(format!("{place}/{name}")).ok();
    let path = read("loop/backing_file").or_else(|| read("../loop/backing_file"))?;
    let path = OsStr::from_bytes(path.strip_suffix(b"\n").unwrap_or(&path));
    std::fs::metadata(path).ok()
}

/// Refuses to change what is below an image whose snapshots show it, too.
///
/// # Errors
/// It has snapshots.
pub(super) fn refuse_snapshots(image: &Path, header: &Header) -> anyhow::Result<()> {
    let count = match header {
        Header::Qcow2(header) => header.snapshots,
        Header::Raw { .. } | Header::Qcow(_) | Header::Vhd(_) => 0,
    };
    if count > 0 {
        bail!(
            "{} has {count} snapshot{} within, and what such a one does not hold it shows of the image below: that would \
             change. Delete them first (`tapdisk snapshot -l` and `-d`), or make a copy without them (`tapdisk convert -O \
             qcow2`)",
            image.display(),
            if count == 1 { "" } else { "s" }
        );
    }
    Ok(())
}

/// Says so where an image names a file that is opened only if that is allowed.
pub(super) fn say_if_forbidden(image: &Path, named: &Path, places: &Places) {
    let is_block_device = std::fs::metadata(image).is_ok_and(|found| found.file_type().is_block_device());
    // Whether it can be opened was found out already.
    let allowed = image::Allowed::new(image, is_block_device, &places.allow_folder);
    if allowed.is_ok_and(|allowed| allowed.forbids(named)) {
        let folder = named.parent().filter(|folder| !folder.as_os_str().is_empty());
        let said = format!(
            "{} is not in the folder of {}: whoever opens it has to allow that with --allow-folder {}",
            named.display(),
            image.display(),
            folder.unwrap_or(Path::new(".")).display()
        );
        eprintln!("tapdisk: {}", harmless(&said));
    }
}
