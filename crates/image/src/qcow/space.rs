//! Places for new clusters and tables: behind all that was ever in the file, and what was taken and not used.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use block::{Errno, Error, Result};

use crate::metadata::Metadata;

/// The file is made longer by so many clusters or bytes at a time, whichever is more: each time costs a change of the
/// file's size, which the next sync has to write.
const STEP_CLUSTERS: u64 = 64;
const STEP_BYTES: u64 = 1 << 20;

/// What of the file is free.
pub(super) struct Space {
    cluster: u64,
    /// Nothing from this byte on was ever taken, and all of it is zero, or beyond the end of the file.
    next: Cell<u64>,
    /// Runs before `next` that were given back: byte and length. Anything may be in them.
    free: RefCell<BTreeMap<u64, u64>>,
    /// The file was made longer.
    extended: Cell<bool>,
}

/// A run of clusters in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) at: u64,
    /// Nothing but zeroes is there.
    pub(super) blank: bool,
}

impl Space {
    /// What is free in a file of this length: what lies behind its end. What the tables lead to says nothing of that: the
    /// last cluster need not be theirs.
    pub(super) fn new(cluster: u64, file_len: u64) -> Space {
        let next = Cell::new(file_len.next_multiple_of(cluster));
        Space { cluster, next, free: RefCell::default(), extended: Cell::new(false) }
    }

    /// Takes a run of so many bytes, whole clusters, which the file then has.
    ///
    /// # Errors
    /// The file cannot be made longer; nothing is taken then.
    pub(super) async fn take(&self, metadata: &Metadata, len: u64) -> Result<Place> {
        let place = self.choose(len)?;
        let end = place.at + len;
        if let Err(error) = self.lengthen(metadata, end).await {
            self.give_back(place.at, len);
            return Err(error.during("make room for a cluster"));
        }
        Ok(place)
    }

    fn choose(&self, len: u64) -> Result<Place> {
        let mut free = self.free.borrow_mut();
        if let Some((at, had)) = free.iter().find(|(_, had)| **had >= len).map(|(at, had)| (*at, *had)) {
            free.remove(&at);
            if had > len {
                free.insert(at + len, had - len);
            }
            return Ok(Place { at, blank: false });
        }
        let at = self.next.get();
        match at.checked_add(len).filter(|end| *end <= i64::MAX as u64) {
            Some(end) => {
                self.next.set(end);
                Ok(Place { at, blank: true })
            }
            None => Err(Error::new(Errno::EFBIG, format!("take {len} bytes at {at} of the image"))),
        }
    }

    async fn lengthen(&self, metadata: &Metadata, end: u64) -> Result<()> {
        if metadata.file().size() >= end {
            return Ok(());
        }
        let step = (self.cluster * STEP_CLUSTERS).max(STEP_BYTES);
        let far = end.saturating_add(step);
        // Where there is no room for a whole step there may be for what is needed.
        if far > i64::MAX as u64 || metadata.extend(far).await.is_err() {
            metadata.extend(end).await?;
        }
        self.extended.set(true);
        Ok(())
    }

    /// Takes back what nothing points to and nobody writes to.
    pub(super) fn give_back(&self, at: u64, len: u64) {
        let mut free = self.free.borrow_mut();
        let mut run = (at, len);
        if let Some((before, had)) = free.range(..at).next_back().map(|(at, had)| (*at, *had))
            && before + had == at
        {
            free.remove(&before);
            run = (before, had + len);
        }
        if let Some(had) = free.remove(&(at + len)) {
            run.1 += had;
        }
        free.insert(run.0, run.1);
    }

    /// Cuts off what of the file was added and is not used.
    ///
    /// # Errors
    /// Those of [`storage::Storage::resize`].
    pub(super) async fn trim(&self, metadata: &Metadata) -> Result<()> {
        let end = self.end();
        if self.extended.replace(false) && metadata.file().size() > end {
            metadata.file().resize(end).await?;
        }
        Ok(())
    }

    /// Byte from which on nothing is used; what was given back there is forgotten.
    fn end(&self) -> u64 {
        let mut free = self.free.borrow_mut();
        let next = self.next.get();
        if let Some(last) = free.last_entry().filter(|last| *last.key() + *last.get() == next) {
            self.next.set(*last.key());
            last.remove();
        }
        self.next.get()
    }
}
