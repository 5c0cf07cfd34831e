//! The mark of what may be written in place, which entries of the active tables have where a count is exactly one.
//!
//! A count that is too high is a leak, which a repair lowers to the references that there are. Where these are one the mark may be
//! there or not until then: what changes an image offline raises counts before it takes marks away, and sets marks before it
//! lowers counts, and may die in between. Whoever writes in place then does that to the only reference.

use block::Result;

use super::super::{COPIED, bytes};
use super::counter::Counter;
use super::entry::Target;
use super::stored::Stored;
use super::walk::{MEMORY, Root, Walk, l2_entries, words};

/// What marks are compared with.
#[derive(Clone, Copy)]
pub(super) enum Truth<'a> {
    /// The counts in the file.
    Counts,
    /// These counts, but where there are fewer references, these: of clusters of the counter's window.
    References(&'a Counter),
}

/// Bytes of a table read at a time.
const PIECE: u64 = 1 << 20;

impl Walk<'_> {
    /// Compares the marks in a table and those that it leads to with the truth; gives how many are wrong, after it has put them
    /// right if told so.
    ///
    /// # Errors
    /// The storage's, when it writes.
    pub(super) async fn marks(
        &mut self,
        stored: &mut Stored,
        root: Root,
        truth: Truth<'_>,
        fix: bool,
    ) -> Result<u64> {
        let mut wrong = 0;
        let mut tables = Counter::new(1, MEMORY / 4);
        let len = root.entries * 8;
        let mut first = true;
        loop {
            let mut done = 0;
            while done < len && root.at + done < self.file.size() {
                let at = root.at + done;
                let piece = match bytes::read(self.file, at, PIECE.min(len - done) as usize).await {
                    Ok(piece) => piece,
                    Err(error) => {
                        self.unread(&error);
                        return Ok(wrong);
                    }
                };
                for (index, word) in words(&piece).enumerate() {
                    let Ok(Some(table)) = self.judge.l1(word) else { continue };
                    tables.add(table >> self.header.cluster_bits, 1);
                    if first {
                        wrong +=
                            self.mark(stored, at + index as u64 * 8, word, Some(table), truth, fix).await?;
                    }
                }
                done += piece.len() as u64;
            }
            let found: Vec<u64> =
                tables.used().map(|(number, _)| number << self.header.cluster_bits).collect();
            for table in found {
                let all = match bytes::read(self.file, table, self.header.cluster_size() as usize).await {
                    Ok(all) => all,
                    Err(error) => {
                        self.unread(&error);
                        continue;
                    }
                };
                for (place, words) in l2_entries(&all, table, self.header) {
                    if let Ok(Target::Cluster { at }) = self.judge.l2(words) {
                        let counted = (!self.header.has_data_file()).then_some(at);
                        wrong += self.mark(stored, place, words[0], counted, truth, fix).await?;
                    }
                }
            }
            first = false;
            if !tables.advance() {
                return Ok(wrong);
            }
        }
    }

    /// Looks at the mark of the entry at `place`. What lies in a data file counts as one.
    async fn mark(
        &mut self,
        stored: &mut Stored,
        place: u64,
        word: u64,
        target: Option<u64>,
        truth: Truth<'_>,
        fix: bool,
    ) -> Result<u64> {
        let number = target.map_or(0, |at| at >> self.header.cluster_bits);
        if let Truth::References(counter) = truth
            && !counter.window().contains(&number)
        {
            return Ok(0);
        }
        let count = match target {
            None => 1,
            Some(_) => match stored.get(number).await {
                Ok(count) => count,
                Err(error) => {
                    self.unread(&error);
                    return Ok(0);
                }
            },
        };
        let references = match (target, truth) {
            (Some(_), Truth::References(counter)) => counter.get(number),
            (None, _) | (Some(_), Truth::Counts) => count,
        };
        let should = if count.min(references) == 1 { word | COPIED } else { word & !COPIED };
        let leaks = references == 1 && count > 1;
        if should == word || leaks && !fix {
            return Ok(0);
        }
        self.report.note(|| {
            format!(
                "the entry {word:#x} at {place} is marked wrongly: what it points to has the count {count}"
            )
        });
        if fix {
            bytes::write(self.file, place, &should.to_be_bytes()).await?;
        }
        Ok(1)
    }
}
