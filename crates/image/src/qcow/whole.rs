//! Whether the file has all that the image's tables lead to. One that was cut off is not made longer: places that were lost
//! would be there again, with zeroes or with what is written next, and nobody could tell.

use std::cell::{Cell, RefCell};

use block::{Errno, Error, Result, Span};
use runtime::{BoxFuture, join_all};

use super::Qcow;
use super::entry::Nonsense;
use super::space::Place;
use crate::metadata::Units;

/// Bytes of the L1 table that are read at a time.
const PIECE: u64 = 64 << 10;
/// L2 tables that are read at a time.
const TOGETHER: usize = 32;

/// What is known of it.
#[derive(Default)]
pub(super) struct Whole {
    /// Taken by who looks.
    looking: Units,
    /// How many bytes of the L1 table have been looked at, with the L2 tables that they lead to.
    seen: Cell<u64>,
    /// How many L2 tables that were.
    tables: Cell<u64>,
    /// Nothing is missing.
    is_whole: Cell<bool>,
    /// Something is.
    cut: RefCell<Option<Error>>,
}

impl Qcow {
    /// Takes a run of so many bytes, whole clusters, which the file then has.
    ///
    /// # Errors
    /// The file was cut off, or it cannot be known whether it was; it cannot be made longer; nothing is taken then.
    pub(super) async fn take(&self, len: u64) -> Result<Place> {
        if !self.whole.is_whole.get() {
            self.look_for_a_cut().await?;
        }
        self.space.take(&self.metadata, len).await
    }

    /// All tables are looked at before the first new place is taken, not when the image is opened: images that only have what
    /// they have, and are the largest, are not looked at. Before that no table has changed but what was flushed.
    async fn look_for_a_cut(&self) -> Result<()> {
        let _looking = self.whole.looking.lock(0..1).await;
        let l1 = self.geometry.get().l1_span();
        while !self.whole.is_whole.get() {
            if let Some(error) = &*self.whole.cut.borrow() {
                return Err(error.clone());
            }
            let from = l1.at() + self.whole.seen.get();
            let piece = l1.split_at(from).1.split_at(from + PIECE).0;
            if piece.is_empty() {
                self.whole.is_whole.set(true);
                break;
            }
            // Where something cannot be read whoever comes next goes on from here.
            match self.cut_of(piece).await? {
                Some(what) => {
                    let doing = format!(
                        "add to the qcow image: its file was cut off: {what}. Nothing is added until a repair of the image has \
                         dropped what is lost"
                    );
                    *self.whole.cut.borrow_mut() = Some(Error::new(Errno::EIO, doing));
                }
                None => self.whole.seen.set(self.whole.seen.get() + piece.len()),
            }
        }
        Ok(())
    }

    /// What leads beyond the end of the file in this part of the L1 table, or in the L2 tables that it leads to.
    async fn cut_of(&self, piece: Span) -> Result<Option<String>> {
        let geometry = self.geometry.get();
        let file_len = self.file.size();
        let first = (piece.at() - geometry.l1_at) / 8;
        let mut tables = Vec::new();
        for (index, word) in (first..).zip(words(&self.metadata.read_through(piece).await?)) {
            match geometry.table(geometry.l1_entry(word), file_len) {
                Ok(None) => {}
                Ok(Some(table)) => tables.push((table, index)),
                Err(Nonsense::Beyond) => {
                    return Ok(Some(format!("entry {index} of its L1 table leads beyond the end")));
                }
                // It leads nowhere, and will not.
                Err(Nonsense::Misaligned | Nonsense::Header | Nonsense::L1 | Nonsense::NoBytes) => {}
            }
        }
        let all = self.whole.tables.get() + tables.len() as u64;
        if all > file_len / geometry.l2_len() {
            return Ok(Some(format!("its L1 table leads to {all} tables, for which it has no room")));
        }
        // In the order of the file.
        tables.sort_unstable();
        for some in tables.chunks(TOGETHER) {
            let reads = some.iter().map(|(table, _)| {
                let span = Span::new(*table, geometry.l2_len()).expect("judged above");
                Box::pin(self.metadata.read_through(span)) as BoxFuture<'_, Result<Vec<u8>>>
            });
            for ((_, index), bytes) in some.iter().zip(join_all(reads.collect()).await) {
                let mut entries = (index << geometry.l2_bits..).zip(words(&bytes?));
                if let Some((cluster, _)) =
                    entries.find(|(_, word)| geometry.entry(*word, file_len) == Err(Nonsense::Beyond))
                {
                    return Ok(Some(format!("cluster {cluster} of the disk is beyond the end")));
                }
            }
        }
        self.whole.tables.set(all);
        Ok(None)
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_be_bytes)).collect()
}
