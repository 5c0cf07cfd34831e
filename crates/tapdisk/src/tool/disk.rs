//! A disk that a tool works on: the image, open, and those below it.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use block::Error;
use image::metadata::LedgerFile;
use image::{Chain, Format, Header, Layer, vhd, walk};
use runtime::Handle;
use storage::file::{self, Cache};

use crate::cli::tool::Places;
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
        Asked { path, format, access, cache: Cache::Buffered, places }
    }

    /// How its file is opened: at once or not at all.
    pub(super) fn file(&self) -> anyhow::Result<file::Options> {
        let read_only = self.access != Access::Write;
        let records = state::records(self.places.state_dir.as_ref(), true)?;
        Ok(file::Options { read_only, cache: self.cache, create: None, wait: Duration::ZERO, records })
    }

    fn options(&self) -> anyhow::Result<image::Options> {
        Ok(image::Options {
            format: self.format,
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
        let image::Disk { chain, layers } = image::open(handle, self.path, self.options()?).await?;
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
    image.parent().unwrap_or(Path::new("")).join(name)
}
