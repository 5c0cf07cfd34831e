//! Opening an image with all that it stands on, as a disk.

use std::path::Path;
use std::rc::Rc;

use block::Error;
use runtime::Handle;
use storage::Storage;

use crate::frozen::{Frozen, FrozenLedger};
use crate::metadata::{self, Ledger, LedgerFile};
use crate::qcow::Qcow;
use crate::qcow2::Qcow2;
use crate::vhd::Vhd;
use crate::walk::{Held, Layer, Options, walk};
use crate::{Chain, Header, Image, ImageError, Raw, Settings};

/// The least memory for the metadata of an image below others, in bytes, where all have to share what was asked for.
const CACHE_MIN: usize = 256 << 10;

/// A disk, and what it is made of.
pub struct Disk {
    /// The images, as one.
    pub chain: Chain,
    /// The same one by one, from the top down.
    pub layers: Vec<Layer>,
}

impl Disk {
    /// The files that are written: none where the disk is only read, else that of the image, and that with its data where
    /// it is another one.
    pub fn written(&self) -> impl Iterator<Item = &Held> {
        self.layers.iter().flat_map(Layer::files).filter(|held| !held.read_only)
    }

    /// The files that are only read and of which a sync has failed, by whoever wrote them, and its error: what is read there
    /// may not be what is on the disk.
    pub fn suspect(&self) -> impl Iterator<Item = (&Held, Error)> {
        let files = self.layers.iter().flat_map(Layer::files);
        files.filter(|held| held.read_only).filter_map(|held| Some((held, held.record.as_ref()?.restore()?)))
    }
}

/// Opens the image at this path.
///
/// # Errors
/// As [`walk`]; what else is wrong with one of the images; what a process before this one has noted for it cannot be used.
pub async fn open(handle: &Handle, path: &Path, mut options: Options) -> Result<Disk, ImageError> {
    let layers = walk(handle, path, &mut options).await?;
    let mut images: Vec<Rc<dyn Image>> = Vec::new();
    for (depth, layer) in layers.iter().enumerate() {
        let writable = !layer.file.read_only;
        let ledger = ledger(layer)?;
        let pending = ledger.as_ref().map_or(Ok(0), |ledger| ledger.changes().map(|changes| changes.len()));
        let pending = pending.map_err(|error| ImageError::Refused(error.to_string()))?;
        if pending > 0 && !writable {
            return Err(ImageError::Refused(format!(
                "{}: a tapdisk that wrote it died, and {pending} changes of its map that guests were answered for are not in \
                 it yet. Serve it once so that it is written, and stop that in order",
                layer.file.path.display()
            )));
        }
        let settings = Settings {
            writable,
            cache: share(options.cache, depth, layers.len()),
            // Who need not outlive this process only has to take over.
            ledger: ledger.filter(|_| writable && (options.lasting || pending > 0)).map(
                |ledger| -> Box<dyn Ledger> {
                    match layer.poison() {
                        None => Box::new(ledger),
                        Some(_) => Box::new(FrozenLedger(ledger)),
                    }
                },
            ),
            lasting: options.lasting && writable,
        };
        let image = open_image(handle, layer, settings).await.map_err(|error| match (left(layer, pending), &layer.file.record) {
            (left @ 1.., Some(record)) => error.with(format_args!(
                ". Its ledger, {} and others like it, holds {left} changes of its map that guests were answered for. If \
                 they can be done without, remove it and check the image",
                LedgerFile::path(record).display()
            )),
            (0, _) | (_, None) => error,
        });
        images.push(image.map_err(|error| error.within(layer.file.path.display()))?);
    }
    let mut images = images.into_iter();
    let top = images.next().expect("a way down begins with its top");
    Ok(Disk { chain: Chain::over(handle, top, images.collect()), layers })
}

/// How many changes its ledger has now, if that is to be found out; `pending` were there before.
fn left(layer: &Layer, pending: usize) -> usize {
    if pending == 0 {
        return 0;
    }
    let changes = ledger(layer).ok().flatten().and_then(|ledger| ledger.changes().ok());
    changes.map_or(pending, |changes| changes.len())
}

async fn open_image(handle: &Handle, layer: &Layer, settings: Settings) -> Result<Rc<dyn Image>, ImageError> {
    let data = layer.data.as_ref().map(|data| data.storage.clone());
    let Some(poison) = layer.poison() else {
        return open_on(handle, layer, layer.file.storage.clone(), data, settings).await;
    };
    let freeze = |storage: Rc<dyn Storage>| Rc::new(Frozen::new(storage, poison.clone()));
    let (file, data) = (freeze(layer.file.storage.clone()), data.map(freeze));
    let image = open_on(handle, layer, file.clone(), data.clone().map(|data| data as _), settings).await?;
    [Some(file), data].into_iter().flatten().for_each(|frozen| frozen.is_opened());
    Ok(image)
}

async fn open_on(
    handle: &Handle,
    layer: &Layer,
    file: Rc<dyn Storage>,
    data: Option<Rc<dyn Storage>>,
    settings: Settings,
) -> Result<Rc<dyn Image>, ImageError> {
    // Their futures are large, and a raw image has none of it on its stack.
    Ok(match layer.header.clone() {
        Header::Raw { .. } => Rc::new(Raw::new(file)),
        Header::Qcow(header) => Rc::new(Box::pin(Qcow::open(handle, *header, file, settings)).await?),
        Header::Qcow2(header) => Rc::new(Box::pin(Qcow2::open(handle, *header, file, data, settings)).await?),
        Header::Vhd(header) => Rc::new(Box::pin(Vhd::open(handle, *header, file, settings)).await?),
    })
}

/// Where changes of the map are noted, and were by the process before. A raw image has no map.
fn ledger(layer: &Layer) -> Result<Option<LedgerFile>, ImageError> {
    let record = match (&layer.header, &layer.file.record) {
        (Header::Raw { .. }, _) | (_, None) => return Ok(None),
        (Header::Qcow(_) | Header::Qcow2(_) | Header::Vhd(_), Some(record)) => record,
    };
    LedgerFile::open(record).map(Some).map_err(|error| ImageError::Refused(error.to_string()))
}

/// How much of `cache` bytes an image of `count` has: the top one half, the others the rest together. Where nobody said how
/// much, the top has what suits most, and the others together as much again.
fn share(cache: usize, depth: usize, count: usize) -> usize {
    match (cache, depth, count) {
        (0, ..) if count > 1 => share(2 * metadata::CACHE, depth, count),
        (0, ..) => metadata::CACHE,
        (_, 0, 1) => cache,
        (_, 0, _) => cache / 2,
        (_, _, count) => (cache / 2 / (count - 1)).max(CACHE_MIN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_for_tables_is_shared_and_half_of_it_is_the_tops() {
        assert_eq!([share(0, 0, 1), share(0, 0, 3), share(0, 2, 3)], [32 << 20, 32 << 20, 16 << 20]);
        assert_eq!(share(64 << 20, 0, 1), 64 << 20);
        for count in [2, 3, 30] {
            let all: usize = (0..count).map(|depth| share(64 << 20, depth, count)).sum();
            assert!((63 << 20..=64 << 20).contains(&all), "{count}: {all}");
            assert_eq!(share(64 << 20, 0, count), 32 << 20);
        }
        assert_eq!(share(1 << 20, 5, 100), CACHE_MIN);
    }
}
