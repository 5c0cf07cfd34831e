//! Looking for what is wrong in a qcow image, and putting it right.
//!
//! Without counts of references there is one question: does each entry lead to a place that nothing else leads to? What
//! no entry leads to is lost to the format for good, and counts as a leak where it takes up space, that is, where there is
//! anything but zeroes.

use std::rc::Rc;

use block::{Buf, Span};
use storage::{Storage, Zeroing};

use super::Header;
use super::entry::{Entry, Geometry, Nonsense};
use super::header::read_exactly;
use crate::{ImageError, Repair, Report};

/// Bytes that are read at a time.
const PIECE: u64 = 64 << 10;
/// Clusters of a file that can be checked, each of which takes two bits.
const CLUSTERS_MAX: u64 = 1 << 31;

/// Checks an image that nobody has open, and repairs what it may.
///
/// # Errors
/// It is no image that can be checked, or repairing failed; repairing again is safe. Where reading failed the report says
/// so instead.
pub async fn check(file: &Rc<dyn Storage>, repair: Repair) -> Result<Report, ImageError> {
    look(file, repair, true).await
}

/// Looks whether the tables make sense, and not for leaks: for these all would be read that the file has and nothing leads to.
///
/// # Errors
/// It is no image that can be checked.
pub(super) async fn faults(file: &Rc<dyn Storage>) -> Result<Report, ImageError> {
    look(file, Repair::No, false).await
}

async fn look(file: &Rc<dyn Storage>, repair: Repair, leaks: bool) -> Result<Report, ImageError> {
    let header = Header::read(file).await?;
    header.readable()?;
    let geometry = header.geometry;
    let clusters = file.size().div_ceil(geometry.cluster());
    if clusters > CLUSTERS_MAX {
        return Err(ImageError::Refused(format!(
            "a file of {} bytes is too large to be checked: in clusters of {} bytes that can be done up to {}",
            file.size(),
            geometry.cluster(),
            CLUSTERS_MAX * geometry.cluster()
        )));
    }
    let mut check = Check {
        file,
        repair,
        geometry,
        disk_clusters: header.size().div_ceil(geometry.cluster()),
        owned: Bits::new(clusters),
        packed: Bits::new(clusters),
        report: Report::default(),
    };
    check.report.total_clusters = check.disk_clusters;
    check.claim(Span::new(0, geometry.header_len).expect("small"));
    check.claim(geometry.l1_span());
    let tables = check.tables().await?;
    let mut expected = None;
    for (index, table) in tables {
        check.table(index, table, &mut expected).await?;
    }
    if check.report.corruptions_fixed > 0 {
        file.flush().await?;
    }
    if leaks {
        check.leaks(header.xen().is_some_and(|xen| !xen.sparse)).await?;
    }
    Ok(check.report)
}

/// A bit for each cluster of the file.
struct Bits(Vec<u64>);

impl Bits {
    fn new(bits: u64) -> Bits {
        Bits(vec![0; bits.div_ceil(64) as usize])
    }

    fn get(&self, bit: u64) -> bool {
        self.0.get(bit as usize / 64).is_some_and(|word| word >> (bit % 64) & 1 == 1)
    }

    fn set(&mut self, bit: u64) {
        if let Some(word) = self.0.get_mut(bit as usize / 64) {
            *word |= 1 << (bit % 64);
        }
    }
}

struct Check<'a> {
    file: &'a Rc<dyn Storage>,
    repair: Repair,
    geometry: Geometry,
    disk_clusters: u64,
    /// Clusters with a table or a cluster of the disk.
    owned: Bits,
    /// Clusters with compressed ones, of which there may be many.
    packed: Bits,
    report: Report,
}

impl Check<'_> {
    fn clusters(&self, span: Span) -> std::ops::Range<u64> {
        span.at() >> self.geometry.cluster_bits..span.end().div_ceil(self.geometry.cluster())
    }

    fn claim(&mut self, span: Span) {
        self.clusters(span).for_each(|cluster| self.owned.set(cluster));
        self.report.image_end_offset = self.report.image_end_offset.max(span.end());
    }

    /// Whether something that is not compressed leads there.
    fn is_owned(&self, span: Span) -> bool {
        self.clusters(span).any(|cluster| self.owned.get(cluster))
    }

    fn is_packed(&self, span: Span) -> bool {
        self.clusters(span).any(|cluster| self.packed.get(cluster))
    }

    /// An entry is wrong: it is noted, or made zero.
    async fn wrong(&mut self, at: u64, finding: String) -> Result<(), ImageError> {
        if self.repair != Repair::All {
            self.report.corruptions += 1;
            self.report.note(|| finding);
            return Ok(());
        }
        // What of an entry is behind the end of the file is zero.
        let there = self.file.size().saturating_sub(at).min(8);
        if there > 0 {
            self.file.write(at, Buf::zeroed(there as usize)).await?;
        }
        self.report.corruptions_fixed += 1;
        self.report.note(|| format!("{finding}; it is empty now"));
        Ok(())
    }

    /// Goes over the L1 table; gives the L2 tables that make sense, with the number of their entry.
    async fn tables(&mut self) -> Result<Vec<(u64, u64)>, ImageError> {
        let geometry = self.geometry;
        let mut tables = Vec::new();
        let mut rest = geometry.l1_span();
        while !rest.is_empty() {
            let (piece, others) = rest.split_at(rest.at() + PIECE);
            let Some(words) = self.read_words(piece).await else {
                rest = others;
                continue;
            };
            for (nth, word) in words.into_iter().enumerate() {
                let word_at = piece.at() + nth as u64 * 8;
                let index = (word_at - geometry.l1_at) / 8;
                let entry = geometry.l1_entry(word);
                match geometry.table(entry, self.file.size()) {
                    Ok(None) => {}
                    Ok(Some(table)) => {
                        let span = Span::new(table, geometry.l2_len()).expect("judged above");
                        if self.is_owned(span) {
                            let finding =
                                format!("L1 entry {index}: the L2 table at {table} overlaps another one");
                            self.wrong(word_at, finding).await?;
                        } else {
                            self.claim(span);
                            tables.push((index, table));
                        }
                    }
                    Err(what) => self.wrong(word_at, format!("L1 entry {index}: {entry:#x} {what}")).await?,
                }
            }
            rest = others;
        }
        Ok(tables)
    }

    /// Goes over an L2 table. `expected` is where the next cluster would be if they lay one after the other.
    async fn table(&mut self, index: u64, table: u64, expected: &mut Option<u64>) -> Result<(), ImageError> {
        let geometry = self.geometry;
        let whole = Span::new(table, geometry.l2_len()).expect("a table that was judged");
        let Some(words) = self.read_words(whole).await else { return Ok(()) };
        let file_len = self.file.size();
        for (nth, entry) in words.into_iter().enumerate() {
            let cluster = (index << geometry.l2_bits) + nth as u64;
            let judged = geometry.entry(entry, file_len).map_err(|what: Nonsense| what.to_string());
            let wrong = match judged {
                Ok(Entry::Empty) => None,
                Ok(Entry::Data(at)) => {
                    let place = Span::new(at, geometry.cluster()).expect("judged above");
                    if self.is_owned(place) || self.is_packed(place) {
                        Some("leads where something else is".to_owned())
                    } else {
                        self.claim(place);
                        if cluster < self.disk_clusters {
                            self.report.allocated_clusters += 1;
                            self.report.fragmented_clusters +=
                                u64::from(expected.is_some_and(|expected| expected != at));
                            *expected = Some(place.end());
                        }
                        None
                    }
                }
                Ok(Entry::Packed(place)) => {
                    if self.is_owned(place) {
                        Some("leads where something else is".to_owned())
                    } else {
                        self.clusters(place).for_each(|cluster| self.packed.set(cluster));
                        self.report.image_end_offset = self.report.image_end_offset.max(place.end());
                        if cluster < self.disk_clusters {
                            self.report.allocated_clusters += 1;
                            self.report.compressed_clusters += 1;
                            *expected = None;
                        }
                        None
                    }
                }
                Err(what) => Some(what),
            };
            if let Some(what) = wrong {
                let finding = format!("cluster {cluster} of the disk: its entry {entry:#x} {what}");
                self.wrong(table + nth as u64 * 8, finding).await?;
            }
        }
        Ok(())
    }

    /// The words of a span, part of which may lie beyond the end of the file; `None`, and an error in the report, if they
    /// cannot be read.
    async fn read_words(&mut self, span: Span) -> Option<Vec<u64>> {
        let mut bytes = vec![0; span.len() as usize];
        let there = span.split_at(self.file.size()).0.len() as usize;
        if let Err(error) = read_exactly(self.file, span.at(), &mut bytes[..there]).await {
            self.report.check_errors += 1;
            self.report.note(|| format!("the table at {} cannot be read: {error}", span.at()));
            return None;
        }
        let words = bytes.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_be_bytes));
        Some(words.collect())
    }

    /// Finds what nothing leads to and takes up space, and gives it back.
    async fn leaks(&mut self, keep_length: bool) -> Result<(), ImageError> {
        let cluster = self.geometry.cluster();
        // With wrong or unread tables nobody knows what is used.
        let may_repair = self.repair != Repair::No && self.report.is_safe();
        let clusters = self.file.size().div_ceil(cluster);
        let mut from = 0;
        while from < clusters {
            let is_used = |nth: &u64| self.owned.get(*nth) || self.packed.get(*nth);
            let Some(begin) = (from..clusters).find(|nth| !is_used(nth)) else { break };
            let end = (begin..clusters).find(is_used).unwrap_or(clusters);
            let unused = Span::new(begin * cluster, (end - begin) * cluster);
            let unused = unused.expect("within the file, and a cluster").split_at(self.file.size()).0;
            self.unused(unused, may_repair).await?;
            from = end;
        }
        if self.report.leaks_fixed > 0 {
            let end = self.report.image_end_offset.next_multiple_of(cluster);
            if end < self.file.size() && !keep_length {
                self.file.resize(end).await?;
            }
            self.file.flush().await?;
        }
        Ok(())
    }

    async fn unused(&mut self, span: Span, may_repair: bool) -> Result<(), ImageError> {
        let mut rest = span;
        while !rest.is_empty() {
            let runs = match self.file.extents(rest).await {
                Ok(runs) => runs,
                Err(error) => return self.unread(rest, &error),
            };
            let (before, mut end) = (rest, rest.at());
            for run in runs {
                end = end.saturating_add(run.len);
                rest = self.unused_run(rest, end, run.zero, may_repair).await?;
            }
            if rest == before {
                // Less than a cluster is known to be zero.
                rest = self.unused_run(rest, rest.at() + 1, false, may_repair).await?;
            }
        }
        Ok(())
    }

    /// Looks at the bytes from the beginning of `rest` to `end`, in whole clusters, so that none is counted twice; gives
    /// what is left.
    async fn unused_run(
        &mut self,
        rest: Span,
        end: u64,
        zero: bool,
        may_repair: bool,
    ) -> Result<Span, ImageError> {
        let cluster = self.geometry.cluster();
        let end = if zero && end < rest.end() { end - end % cluster } else { end.next_multiple_of(cluster) };
        let (mut run, rest) = rest.split_at(end);
        while !run.is_empty() && !zero {
            let (piece, others) = run.split_at((run.at() + PIECE).next_multiple_of(cluster));
            run = others;
            let mut bytes = vec![0; piece.len() as usize];
            if let Err(error) = read_exactly(self.file, piece.at(), &mut bytes).await {
                self.unread(piece, &error)?;
                continue;
            }
            let leaks = bytes.chunks(cluster as usize).filter(|bytes| bytes.iter().any(|byte| *byte != 0));
            let leaks = leaks.count() as u64;
            if leaks > 0 && may_repair {
                self.file.zero(piece, Zeroing { unmap: true, fast: false }).await?;
                self.report.leaks_fixed += leaks;
            } else {
                self.report.leaks += leaks;
            }
        }
        Ok(rest)
    }

    fn unread(&mut self, span: Span, error: &block::Error) -> Result<(), ImageError> {
        self.report.check_errors += 1;
        self.report.note(|| format!("the {} bytes at {} cannot be read: {error}", span.len(), span.at()));
        Ok(())
    }
}
