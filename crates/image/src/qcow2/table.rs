//! The L1 table, and the L2 tables that it points to.

use std::cell::RefCell;
use std::rc::Rc;

use block::{Error, Result, Span};

use super::entry::{Place, Shape};
use super::health::Health;
use super::refcount::{Allocator, read_words, span};
use super::reserved::Reserved;
use super::{COPIED, Header};
use crate::metadata::{Metadata, Stage, Units};

/// What points to the disk's data is written last.
pub(super) const POINTERS: Stage = 2;
/// Bytes of a table that are copied in one piece.
const PIECE: u64 = 64 << 10;

/// The tables of one image.
pub(super) struct Tables {
    metadata: Metadata,
    health: Rc<Health>,
    shape: Shape,
    at: u64,
    /// Live, as the metadata has it.
    l1: RefCell<Vec<u64>>,
    /// Who makes a table for an entry of L1 does so alone.
    making: Units,
}

/// Where the entries of a cluster are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Index {
    /// Of L1.
    pub(super) table: usize,
    /// In the L2 table.
    pub(super) entry: u64,
}

impl Tables {
    /// Reads the L1 table.
    ///
    /// # Errors
    /// Those of reading.
    pub(super) async fn open(
        metadata: &Metadata,
        header: &Header,
        health: &Rc<Health>,
        shape: Shape,
    ) -> Result<Tables> {
        let l1 = read_words(metadata, header.l1_at, u64::from(header.l1_entries), POINTERS).await?;
        Ok(Tables {
            metadata: metadata.clone(),
            health: health.clone(),
            shape,
            at: header.l1_at,
            l1: RefCell::new(l1),
            making: Units::default(),
        })
    }

    /// The clusters of the file that they are in. What makes no sense is left out: it is met when it is needed.
    pub(super) fn reserved(&self) -> Result<Reserved> {
        let mut reserved = Reserved::new(self.shape.cluster_bits);
        let l1 = self.l1.borrow();
        if !l1.is_empty() {
            reserved.add(span(self.at, l1.len() as u64 * 8)?);
        }
        for place in l1.iter().filter_map(|word| self.shape.table(*word).unwrap_or(None)) {
            if let Some(table) = Span::new(place.at, self.shape.cluster()) {
                reserved.add(table);
            }
        }
        Ok(reserved)
    }

    /// The bytes of the disk that one L2 table tells of.
    pub(super) fn reach(&self) -> u64 {
        self.shape.entries() << self.shape.cluster_bits
    }

    /// How many bytes of the disk all of them can tell of.
    pub(super) fn capacity(&self) -> u64 {
        (self.l1.borrow().len() as u64).saturating_mul(self.reach())
    }

    /// Where a cluster's entry is.
    pub(super) fn index(&self, cluster: u64) -> Index {
        let bits = self.shape.entries_bits();
        Index { table: (cluster >> bits) as usize, entry: cluster & ((1 << bits) - 1) }
    }

    /// The L2 table of an entry of L1, if it has one; else what is wrong with it.
    pub(super) fn table(&self, index: usize) -> std::result::Result<Option<Place>, String> {
        let word = self.l1.borrow().get(index).copied().unwrap_or(0);
        if word == 0 {
            return Ok(None);
        }
        let table = self
            .shape
            .table(word)
            .map_err(|nonsense| format!("entry {index} of its L1 table: {nonsense}"))?;
        match table {
            Some(table) if table.at >= self.metadata.file().size() => Err(format!(
                "entry {index} of its L1 table points to byte {}, behind the file's end",
                table.at
            )),
            table => Ok(table),
        }
    }

    /// The first entry of L1 from this one on that is not zero, or the one at `end`.
    pub(super) fn next_table(&self, from: usize, end: usize) -> usize {
        let l1 = self.l1.borrow();
        (from..end).find(|index| l1.get(*index).is_some_and(|word| *word != 0)).unwrap_or(end)
    }

    /// The place of an L2 table that may be changed: the one that is there, or a new one.
    ///
    /// # Errors
    /// There is no space for it, or it cannot be written.
    pub(super) async fn own_table(&self, index: usize, allocator: &Allocator) -> Result<u64> {
        let own = |table: Option<Place>| table.filter(|table| table.sole).map(|table| table.at);
        match self.table(index) {
            Ok(table) if own(table).is_some() => return Ok(own(table).unwrap_or_default()),
            Ok(_) => {}
            Err(wrong) => return Err(self.health.corrupt(wrong).await),
        }
        let _making = self.making.lock(index as u64..index as u64 + 1).await;
        let old = match self.table(index) {
            Ok(old) => old,
            Err(wrong) => return Err(self.health.corrupt(wrong).await),
        };
        if let Some(at) = own(old) {
            return Ok(at);
        }
        let allocated = allocator.allocate(1).await.map_err(|error| error.during("make a new L2 table"))?;
        let at = allocated.clusters.start << self.shape.cluster_bits;
        match self.link(index, old, at).await {
            Ok(()) => {}
            Err(error) => {
                allocator.undo(allocated);
                return Err(error.during("make a new L2 table"));
            }
        }
        allocator.reserve(span(at, self.shape.cluster())?);
        if let Some(old) = old {
            // Who reads it still has a pin.
            let place = span(old.at, self.shape.cluster())?;
            allocator.unreserve(place);
            allocator.retire(place);
        }
        Ok(at)
    }

    /// Fills a new table, with what is in the old one that others share, and lets L1 point to it.
    async fn link(&self, index: usize, old: Option<Place>, at: u64) -> Result<()> {
        // Written at once: if there is no space for it, this request hears of it and not a flush.
        let mut done = 0;
        while done < self.shape.cluster() {
            let len = PIECE.min(self.shape.cluster() - done);
            let bytes = match old {
                None => vec![0; len as usize],
                Some(old) => {
                    let words = read_words(&self.metadata, old.at + done, len / 8, POINTERS).await?;
                    words.into_iter().flat_map(u64::to_be_bytes).collect()
                }
            };
            self.metadata.write_through(at + done, &bytes).await?;
            done += len;
        }
        let word_at = self.at + index as u64 * 8;
        let _l1 = self.metadata.load(span(word_at, 8)?, POINTERS).await?;
        self.metadata.set(&[(word_at, at | COPIED)]);
        if let Some(word) = self.l1.borrow_mut().get_mut(index) {
            *word = at | COPIED;
        }
        Ok(())
    }

    /// Brings entries of an L2 table into memory.
    pub(super) async fn load(&self, entries: Span) -> Result<crate::metadata::Loaded> {
        self.metadata.load(entries, POINTERS).await.map_err(|error: Error| error.during("read an L2 table"))
    }
}
