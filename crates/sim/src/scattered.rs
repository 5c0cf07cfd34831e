//! An image whose clusters lie anywhere in its storage: so requests fall into parts, as those of formats do.

use std::fmt;
use std::rc::Rc;

use block::{Errno, Error, Span};
use image::{Extent, Image, Placement};
use storage::{Io, Storage, Zeroing};

use crate::dice::Dice;

/// Where each cluster of a disk lies in its file. What does not fill a cluster at the end stays where it is.
#[derive(Clone)]
pub(crate) struct Layout {
    size: u64,
    cluster: u64,
    places: Rc<Vec<u64>>,
}

impl Layout {
    /// A disk that is its file as it is.
    pub(crate) fn plain(size: u64) -> Layout {
        Layout { size, cluster: size, places: Rc::new(vec![0]) }
    }

    /// Clusters of this many bytes in any order.
    pub(crate) fn scattered(size: u64, cluster: u64, dice: &mut Dice) -> Layout {
        let mut places: Vec<u64> = (0..size / cluster).collect();
        dice.shuffle(&mut places);
        Layout { size, cluster, places: Rc::new(places) }
    }

    /// Where in the file the first bytes of the span are, and how many of them lie together.
    fn find(&self, span: Span) -> (u64, u64) {
        let (number, skip) = (span.at() / self.cluster, span.at() % self.cluster);
        match self.places.get(number as usize) {
            Some(place) => (place * self.cluster + skip, span.len().min(self.cluster - skip)),
            None => (span.at(), span.len()),
        }
    }

    /// The parts of the span: of the disk, and where in the file each begins.
    pub(crate) fn parts(&self, span: Span) -> impl Iterator<Item = (Span, u64)> {
        let mut rest = span;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let (at, len) = self.find(rest);
            let (part, others) = rest.split_at(rest.at() + len);
            rest = others;
            Some((part, at))
        })
    }

    /// The bytes of the disk whose file holds these.
    pub(crate) fn disk_of(&self, file: &[u8]) -> Vec<u8> {
        let mut disk = Vec::with_capacity(self.size as usize);
        for (part, at) in self.parts(Span::new(0, self.size).expect("a small disk")) {
            disk.extend_from_slice(&file[at as usize..(at + part.len()) as usize]);
        }
        disk
    }
}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} clusters of {} bytes", self.places.len(), self.cluster)
    }
}

/// An image with such a layout.
pub(crate) struct Scattered {
    layout: Layout,
    storage: Rc<dyn Storage>,
}

impl Scattered {
    pub(crate) fn new(layout: Layout, storage: Rc<dyn Storage>) -> Scattered {
        Scattered { layout, storage }
    }

    fn place_of(part: Span, at: u64) -> Span {
        Span::new(at, part.len()).expect("within the file")
    }
}

impl Image for Scattered {
    fn size(&self) -> u64 {
        self.layout.size
    }

    fn storage(&self) -> &Rc<dyn Storage> {
        &self.storage
    }

    fn map(&self, span: Span) -> Io<'_, Extent> {
        let (at, len) = self.layout.find(span);
        Box::pin(std::future::ready(Ok(Extent::Data { at, len, pin: None })))
    }

    fn place(&self, span: Span) -> Io<'_, Placement> {
        let (at, len) = self.layout.find(span);
        Box::pin(std::future::ready(Ok(Placement { at, len, undo: None })))
    }

    fn commit(&self, _placement: Placement) -> Io<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        Box::pin(async move {
            for (part, at) in self.layout.parts(span) {
                self.storage.zero(Scattered::place_of(part, at), how).await?;
            }
            Ok(())
        })
    }

    fn discard(&self, span: Span) -> Io<'_> {
        Box::pin(async move {
            for (part, at) in self.layout.parts(span) {
                self.storage.discard(Scattered::place_of(part, at)).await?;
            }
            Ok(())
        })
    }

    fn flush(&self) -> Io<'_> {
        self.storage.flush()
    }

    fn grow(&self) -> Io<'_, u64> {
        Box::pin(std::future::ready(Err(Error::new(Errno::EOPNOTSUPP, "grow a scattered image"))))
    }
}
