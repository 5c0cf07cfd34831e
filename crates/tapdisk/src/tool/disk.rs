//! A disk that a tool works on: the image, open, and those below it.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::bail;
use block::Error;
use image::{Chain, Format, Raw};
use runtime::Handle;
use storage::Storage;
use storage::file::{self, Cache, File, Options};

/// What is going to be done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// A disk, open.
pub(super) struct Disk {
    pub(super) chain: Rc<Chain>,
    /// From the top down.
    pub(super) layers: Vec<Layer>,
}

/// An image of it.
pub(super) struct Layer {
    pub(super) path: PathBuf,
    pub(super) format: Format,
    /// By which images above know it, if it is a VHD.
    pub(super) unique_id: Option<[u8; 16]>,
}

impl Disk {
    /// The image itself.
    pub(super) fn top(&self) -> &Layer {
        self.layers.first().expect("a disk has an image")
    }

    /// The images that are plain bytes in a file.
    pub(super) fn flat(&self) -> Vec<usize> {
        let raw = |(depth, layer): (usize, &Layer)| (layer.format == Format::Raw).then_some(depth);
        self.layers.iter().enumerate().filter_map(raw).collect()
    }
}

/// Opens an image, and those below it for reading. An image that somebody uses is refused.
///
/// # Errors
/// In words for people.
pub(super) async fn open(
    handle: &Handle,
    path: &Path,
    format: Option<Format>,
    access: Access,
    cache: Cache,
) -> anyhow::Result<Disk> {
    let format = match format {
        Some(format) => format,
        None => guess(path)?,
    };
    let options =
        Options { read_only: access == Access::Read, cache, wait: Duration::ZERO, ..Options::default() };
    let file: Rc<dyn Storage> = Rc::new(File::new(handle, file::open(path, &options)?));
    if format != Format::Raw {
        bail!("{} cannot be opened as {format}", path.display());
    }
    let chain = Rc::new(Chain::new(handle, Rc::new(Raw::new(file))));
    Ok(Disk { chain, layers: vec![Layer { path: path.to_owned(), format, unique_id: None }] })
}

fn guess(path: &Path) -> anyhow::Result<Format> {
    let is_named_so = path.extension().is_some_and(|extension| extension == "raw" || extension == "img");
    let is_block_device = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
    if is_named_so || is_block_device {
        return Ok(Format::Raw);
    }
    bail!("{}: which format is it? Say it with -f", path.display());
}

/// What to say of an error of a file.
pub(super) fn failed(path: &Path, doing: &str) -> impl FnOnce(Error) -> anyhow::Error {
    let what = format!("cannot {doing} {}", path.display());
    move |error| anyhow::Error::from(error).context(what)
}
