//! The walk over all that refers to clusters: tables of the disk and of its snapshots, bitmaps, the refcount table itself.

use std::collections::BTreeMap;
use std::rc::Rc;

use block::Result;
use storage::Storage;

use super::super::bitmap::bitmaps;
use super::super::bytes;
use super::super::header::{Header, L1_MAX};
use super::super::snapshot::table;
use super::counter::Counter;
use super::entry::{Fault, Judge, REFCOUNT_RESERVED, Target};
use crate::{ImageError, Report};

/// Memory for counts, in bytes: enough for 2 TiB in clusters of 64 KiB. Larger files take several turns; tests do, too.
pub(super) const MEMORY: usize = if cfg!(test) { 0 } else { 128 << 20 };
/// Bytes of a table read at a time.
const PIECE: u64 = 1 << 20;

/// An L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super) struct Root {
    /// Its first byte.
    pub(in super::super) at: u64,
    /// Its entries.
    pub(in super::super) entries: u64,
}

/// What an image is about to refer to, besides what it does.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Plan {
    /// Bytes of the file.
    pub(in super::super) spans: Vec<(u64, u64)>,
    /// L1 tables, and what they lead to.
    pub(in super::super) roots: Vec<Root>,
    /// L2 tables, and what they lead to.
    pub(in super::super) tables: Vec<u64>,
}

/// What is wrong with what refers, as far as it is not a matter of counts.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults {
    /// Entries of tables that make no sense, each with its byte of the file and what it should be.
    pub(super) entries: u64,
    /// Clusters may be referred to that nobody knows of: some entry is lost, or a table that should tell.
    pub(super) lost: bool,
    /// Of these, what no repair brings back.
    pub(super) hopeless: bool,
    /// The refcount structure is to be made anew.
    pub(super) rebuild: bool,
    /// The bitmaps' directory makes no sense.
    pub(super) bitmaps: bool,
}

/// What a walk does with entries that make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entries {
    /// They have been told of: nothing.
    Known,
    /// They are noted.
    Note,
    /// They are put right.
    Fix,
}

/// A walker.
pub(super) struct Walk<'a> {
    pub(super) file: &'a Rc<dyn Storage>,
    pub(super) header: &'a Header,
    pub(super) judge: Judge,
    pub(super) report: &'a mut Report,
    pub(super) faults: Faults,
    pub(super) plan: &'a Plan,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        file: &'a Rc<dyn Storage>,
        header: &'a Header,
        report: &'a mut Report,
        plan: &'a Plan,
    ) -> Walk<'a> {
        let judge = Judge::new(header, file.size());
        Walk { file, header, judge, report, faults: Faults::default(), plan }
    }

    /// The active L1 table.
    pub(super) fn active(&self) -> Root {
        Root { at: self.header.l1_at, entries: self.header.l1_entries.into() }
    }

    fn cluster(&self) -> u64 {
        self.header.cluster_size()
    }

    /// Notes that something could not be read: then nothing is known of what it refers to.
    pub(super) fn unread(&mut self, error: &block::Error) {
        self.report.check_errors += 1;
        self.report.note(|| error.to_string());
        self.faults.lost = true;
        self.faults.hopeless = true;
    }

    /// Notes something that is wrong.
    pub(super) fn wrong(&mut self, entries: Entries, finding: impl FnOnce() -> String) {
        if entries != Entries::Known {
            self.report.corruptions += 1;
            self.report.note(finding);
        }
    }

    /// Counts the clusters with these bytes. What begins beyond the end of the file is not there.
    fn span(&mut self, counter: &mut Counter, at: u64, len: u64, times: u64, entries: Entries, what: &str) {
        if len == 0 {
            return;
        }
        let cluster = self.cluster();
        let end = at.checked_add(len).filter(|end| *end < self.file.size().saturating_add(cluster));
        let Some(end) = end.filter(|_| at < self.file.size()) else {
            self.wrong(entries, || format!("the {what} at {at}+{len} reaches beyond the end of the file"));
            self.faults.lost = true;
            self.faults.hopeless = true;
            return;
        };
        for number in at / cluster..end.div_ceil(cluster) {
            counter.add(number, times);
        }
    }

    /// Counts all references to clusters of the counter's window; those of the refcount structure only if it is `there`.
    pub(super) async fn references(
        &mut self,
        counter: &mut Counter,
        entries: Entries,
        refcounts: Option<&[u64]>,
    ) -> Result<()> {
        self.span(counter, 0, self.cluster(), 1, entries, "header");
        let active = self.active();
        self.roots(counter, &[(active, 1)], &[], entries, true).await?;
        let mut others: BTreeMap<Root, u64> = BTreeMap::new();
        match table(self.file, self.header).await {
            Ok(table) => {
                if self.header.has_data_file() && !table.snapshots.is_empty() {
                    self.wrong(entries, || {
                        "there are snapshots, which cannot be with a data file".to_owned()
                    });
                    self.faults.hopeless = true;
                }
                for snapshot in table.snapshots {
                    let root = Root { at: snapshot.l1_at, entries: snapshot.l1_entries.into() };
                    let len = root.entries * 8;
                    if len > L1_MAX || !root.at.is_multiple_of(self.cluster()) {
                        self.wrong(entries, || {
                            format!("the L1 table of snapshot `{}` is at {}+{len}", snapshot.name, root.at)
                        });
                        self.faults.lost = true;
                        self.faults.hopeless = true;
                        continue;
                    }
                    *others.entry(root).or_default() += 1;
                }
                self.span(counter, self.header.snapshots_at, table.len, 1, entries, "snapshot table");
            }
            Err(ImageError::Io(error)) => self.unread(&error),
            Err(odd) => {
                self.wrong(entries, || odd.to_string());
                self.faults.lost = true;
                self.faults.hopeless = true;
            }
        }
        for root in &self.plan.roots {
            *others.entry(*root).or_default() += 1;
        }
        let others: Vec<(Root, u64)> = others.into_iter().collect();
        self.roots(counter, &others, &self.plan.tables, entries, false).await?;
        for (at, len) in &self.plan.spans {
            self.span(counter, *at, *len, 1, entries, "new table");
        }
        self.bitmaps(counter, entries).await?;
        if let Some(refcounts) = refcounts {
            self.refcounts(counter, refcounts, entries);
        }
        Ok(())
    }

    /// Counts what refers while the disk is used: its own tables, and those of the counts.
    pub(super) async fn own_references(&mut self, counter: &mut Counter, refcounts: &[u64]) -> Result<()> {
        self.span(counter, 0, self.cluster(), 1, Entries::Known, "header");
        let active = self.active();
        self.roots(counter, &[(active, 1)], &[], Entries::Known, false).await?;
        self.refcounts(counter, refcounts, Entries::Known);
        Ok(())
    }

    /// Counts what L1 tables and L2 tables refer to, each so many times. `stats`: and counts the disk's clusters.
    async fn roots(
        &mut self,
        counter: &mut Counter,
        roots: &[(Root, u64)],
        tables: &[u64],
        entries: Entries,
        stats: bool,
    ) -> Result<()> {
        for (root, times) in roots {
            self.span(counter, root.at, root.entries * 8, *times, entries, "L1 table");
        }
        let mut l2 = Counter::new(1, MEMORY / 4);
        let mut first = true;
        loop {
            let now = if first { entries } else { Entries::Known };
            for (root, times) in roots {
                self.l1(*root, *times, &mut l2, first.then_some(&mut *counter), now).await?;
            }
            for at in tables {
                l2.add(at / self.cluster(), 1);
                if first {
                    counter.add(at / self.cluster(), 1);
                }
            }
            let found: Vec<(u64, u64)> = l2.used().collect();
            for (number, times) in found {
                self.l2(number * self.cluster(), times, counter, entries, stats).await?;
            }
            first = false;
            if !l2.advance() {
                return Ok(());
            }
        }
    }

    /// Counts the L2 tables of an L1 table.
    async fn l1(
        &mut self,
        root: Root,
        times: u64,
        l2: &mut Counter,
        mut counter: Option<&mut Counter>,
        entries: Entries,
    ) -> Result<()> {
        let mut next = 0;
        while next < root.entries {
            let at = root.at + next * 8;
            let until = root.entries.min(next + PIECE / 8);
            if at >= self.file.size() {
                return Ok(());
            }
            let piece = match bytes::read(self.file, at, ((until - next) * 8) as usize).await {
                Ok(piece) => piece,
                Err(error) => {
                    self.unread(&error);
                    return Ok(());
                }
            };
            for (index, word) in words(&piece).enumerate().filter(|(_, word)| *word != 0) {
                let place = at + index as u64 * 8;
                let table = match self.judge.l1(word) {
                    Ok(table) => table,
                    Err(fault) => match self.fault("L1", place, [word, 0], fault, entries).await? {
                        Target::Cluster { at } => Some(at),
                        Target::None | Target::Packed { .. } => None,
                    },
                };
                if let Some(table) = table {
                    l2.add(table / self.cluster(), times);
                    if let Some(counter) = counter.as_deref_mut() {
                        counter.add(table / self.cluster(), times);
                    }
                }
            }
            next = until;
        }
        Ok(())
    }

    /// Counts what an L2 table refers to.
    async fn l2(
        &mut self,
        table: u64,
        times: u64,
        counter: &mut Counter,
        entries: Entries,
        stats: bool,
    ) -> Result<()> {
        let all = match bytes::read(self.file, table, self.cluster() as usize).await {
            Ok(all) => all,
            Err(error) => {
                self.unread(&error);
                return Ok(());
            }
        };
        let stats = stats && entries == Entries::Note;
        let mut next_in_order = 0;
        for (place, words) in l2_entries(&all, table, self.header) {
            let target = match self.judge.l2(words) {
                Ok(target) => target,
                Err(fault) => self.fault("L2", place, words, fault, entries).await?,
            };
            for number in self.judge.clusters(target) {
                counter.add(number, times);
            }
            if stats {
                match target {
                    Target::None => {}
                    Target::Cluster { at } => {
                        self.report.allocated_clusters += times;
                        self.report.fragmented_clusters +=
                            u64::from(next_in_order != 0 && at != next_in_order);
                        next_in_order = at + self.cluster();
                    }
                    Target::Packed { .. } => {
                        self.report.allocated_clusters += times;
                        self.report.compressed_clusters += times;
                        self.report.fragmented_clusters += times; // by nature, as QEMU says
                    }
                }
            }
        }
        Ok(())
    }

    /// Deals with an entry that makes no sense; what it points to as long as it is as it is.
    async fn fault(
        &mut self,
        which: &str,
        place: u64,
        words: [u64; 2],
        fault: Fault,
        entries: Entries,
    ) -> Result<Target> {
        self.wrong(entries, || format!("the {which} entry {:#x} at {place} {}", words[0], fault.what));
        match entries {
            Entries::Known => {}
            Entries::Note => self.faults.entries += 1,
            Entries::Fix => {
                let long = which == "L2" && self.header.has_extended_l2();
                let instead: Vec<u8> = fault
                    .instead
                    .iter()
                    .take(if long { 2 } else { 1 })
                    .flat_map(|word| word.to_be_bytes())
                    .collect();
                bytes::write(self.file, place, &instead).await?;
                return Ok(fault.target);
            }
        }
        self.faults.lost |= fault.lost;
        Ok(fault.target)
    }

    async fn bitmaps(&mut self, counter: &mut Counter, entries: Entries) -> Result<()> {
        let Some(directory) = self.header.extensions.bitmaps else { return Ok(()) };
        let all = match bitmaps(self.file, self.header).await {
            Ok(all) => all,
            Err(ImageError::Io(error)) => {
                self.unread(&error);
                return Ok(());
            }
            Err(odd) => {
                self.wrong(entries, || odd.to_string());
                self.faults.lost = true;
                self.faults.bitmaps = true;
                return Ok(());
            }
        };
        self.span(counter, directory.at, directory.len, 1, entries, "bitmaps' directory");
        for bitmap in all {
            let (table, count) = bitmap.table;
            let len = u64::from(count) * 8;
            if table.checked_add(len).is_none_or(|end| end >= self.file.size() + self.cluster()) {
                self.wrong(entries, || {
                    format!("the table of bitmap `{}` is beyond the end of the file", bitmap.name)
                });
                self.faults.lost = true;
                self.faults.bitmaps = true;
                continue;
            }
            self.span(counter, table, len, 1, entries, "table of a bitmap");
            let mut done = 0;
            while done < len {
                let piece = match bytes::read(self.file, table + done, PIECE.min(len - done) as usize).await {
                    Ok(piece) => piece,
                    Err(error) => {
                        self.unread(&error);
                        break;
                    }
                };
                done += piece.len() as u64;
                for word in words(&piece).filter(|word| *word & !1 != 0) {
                    let place = word & 0x00ff_ffff_ffff_fe00;
                    let sound =
                        word == place && place.is_multiple_of(self.cluster()) && place < self.file.size();
                    if sound {
                        counter.add(place / self.cluster(), 1);
                    } else {
                        self.wrong(entries, || {
                            format!(
                                "an entry of the table of bitmap `{}` is {word:#x}, which is no place",
                                bitmap.name
                            )
                        });
                        self.faults.lost = true;
                        self.faults.bitmaps = true;
                    }
                }
            }
        }
        Ok(())
    }

    /// Counts the refcount table and its blocks.
    fn refcounts(&mut self, counter: &mut Counter, table: &[u64], entries: Entries) {
        let len = u64::from(self.header.refcount_table_clusters) << self.header.cluster_bits;
        let at = self.header.refcount_table_at;
        let end = at.saturating_add(len);
        if len == 0 || table.is_empty() || end >= self.file.size().saturating_add(self.cluster()) {
            self.wrong(entries, || format!("there is no refcount table at {at}+{len}"));
            self.faults.rebuild = true;
            return;
        }
        self.span(counter, at, len, 1, entries, "refcount table");
        for (index, word) in table.iter().enumerate().filter(|(_, word)| **word != 0) {
            match refcount_block(*word, self.header, self.file.size()) {
                Some(block) => counter.add(block / self.cluster(), 1),
                None => {
                    self.wrong(entries, || {
                        format!("entry {index} of the refcount table is {word:#x}, which is no place")
                    });
                    self.faults.rebuild = true;
                }
            }
        }
        // One that something else refers to as well, or that is there twice, would be overwritten.
        for word in table {
            let Some(block) = refcount_block(*word, self.header, self.file.size()) else { continue };
            let count = counter.get(block / self.cluster());
            if count > 1 {
                // Each window tells of its own, so these are told of once whatever `entries` says.
                self.wrong(Entries::Note, || {
                    format!("the refcount block at {block} is referred to {count} times")
                });
                self.faults.rebuild = true;
            }
        }
    }
}

/// Where the refcount block of this entry of the refcount table is, if that can be.
pub(super) fn refcount_block(word: u64, header: &Header, file: u64) -> Option<u64> {
    let sound = word != 0
        && word & REFCOUNT_RESERVED == 0
        && word.is_multiple_of(header.cluster_size())
        && word < file;
    sound.then_some(word)
}

/// Big-endian numbers of 8 bytes.
pub(super) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().expect("eight bytes")))
}

/// The entries of an L2 table that are not zero, each with its byte of the file.
pub(super) fn l2_entries(bytes: &[u8], table: u64, header: &Header) -> impl Iterator<Item = (u64, [u64; 2])> {
    let size = header.l2_entry_size() as usize;
    let entries = bytes.chunks_exact(size).enumerate().map(move |(index, entry)| {
        let mut words = words(entry);
        let both = [words.next().unwrap_or(0), words.next().unwrap_or(0)];
        (table + (index * size) as u64, both)
    });
    entries.filter(|(_, words)| *words != [0, 0])
}
