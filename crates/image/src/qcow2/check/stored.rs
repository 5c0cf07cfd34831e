//! Reference counts as the file has them: compared with the references that there are, raised and lowered to them.

use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use block::Result;
use storage::Storage;

use super::super::header::{Header, REFCOUNT_TABLE_MAX};
use super::super::{bytes, counts};
use super::counter::Counter;
use super::walk::{refcount_block, words};

/// Memory for refcount blocks that are looked into again and again.
const CACHE: usize = 16 << 20;

/// The refcount table of a file; its blocks are read when they are needed.
pub(super) struct Stored {
    file: Rc<dyn Storage>,
    order: u32,
    cluster_bits: u32,
    max: u64,
    per_block: u64,
    /// Clusters of the file, the last of which may be there in part.
    clusters: u64,
    /// The table's entries; none where it cannot be.
    pub(super) table: Vec<u64>,
    header: Header,
    cache: HashMap<u64, Vec<u8>>,
}

/// What comparing found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Differences {
    /// Clusters with fewer references than their count says.
    pub(super) leaks: u64,
    /// Clusters with more.
    pub(super) corruptions: u64,
    /// There is no block for some of these.
    pub(super) rebuild: bool,
    /// How many of these have more references than can be counted.
    pub(super) overflows: u64,
    /// Byte after the last cluster with a count or a reference.
    pub(super) end: u64,
    /// Blocks that could not be read.
    pub(super) unread: u64,
}

/// What is done where a count and its references differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing.
    No,
    /// Counts that are too low become what they should be.
    Raise,
    /// Those that are too high do.
    Lower,
}

impl Stored {
    /// Reads the refcount table.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn read(file: &Rc<dyn Storage>, header: &Header) -> Result<Stored> {
        let len = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let at = header.refcount_table_at;
        let sound = at != 0
            && at.is_multiple_of(header.cluster_size())
            && len <= REFCOUNT_TABLE_MAX
            && at.checked_add(len).is_some_and(|end| end < file.size().saturating_add(header.cluster_size()));
        let table = if sound { bytes::read(file, at, len as usize).await? } else { Vec::new() };
        Ok(Stored {
            file: file.clone(),
            order: header.refcount_order,
            cluster_bits: header.cluster_bits,
            max: header.refcount_max(),
            per_block: header.refcounts_per_block(),
            clusters: file.size().div_ceil(header.cluster_size()),
            table: words(&table).collect(),
            header: header.clone(),
            cache: HashMap::new(),
        })
    }

    fn block_at(&self, number: u64) -> Option<u64> {
        let word = self.table.get(usize::try_from(number).unwrap_or(usize::MAX))?;
        refcount_block(*word, &self.header, self.file.size())
    }

    /// The first cluster behind the table and all its blocks.
    pub(super) fn end(&self) -> u64 {
        let blocks =
            self.table.iter().filter_map(|word| refcount_block(*word, &self.header, self.file.size()));
        let table = self.header.refcount_table_at + self.table.len() as u64 * 8;
        let last = blocks.map(|at| at + (1 << self.cluster_bits)).max().unwrap_or(0);
        let end = if self.table.is_empty() { last } else { last.max(table) };
        end.div_ceil(1 << self.cluster_bits)
    }

    /// A cluster's count.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn get(&mut self, cluster: u64) -> Result<u64> {
        let number = cluster / self.per_block;
        let Some(at) = self.block_at(number) else { return Ok(0) };
        if !self.cache.contains_key(&number) {
            let block = bytes::read(&self.file, at, 1 << self.cluster_bits).await?;
            if (self.cache.len() + 1) << self.cluster_bits > CACHE {
                self.cache.clear();
            }
            self.cache.insert(number, block);
        }
        let block = self.cache.get(&number).map_or(&[][..], Vec::as_slice);
        Ok(counts::get(block, self.order, (cluster % self.per_block) as usize))
    }

    /// Compares the counts of the counter's window with its references, and changes what it may. `differs` hears of each cluster
    /// that differs, with its count and its references.
    ///
    /// # Errors
    /// The storage's, when it writes.
    pub(super) async fn compare(
        &mut self,
        counter: &Counter,
        change: Change,
        mut differs: impl FnMut(u64, u64, u64),
    ) -> Result<Differences> {
        let mut found = Differences::default();
        let window = counter.window().start..counter.window().end.min(self.clusters);
        if window.is_empty() {
            return Ok(found);
        }
        for number in window.start / self.per_block..=(window.end - 1) / self.per_block {
            let first = number * self.per_block;
            let part = first.max(window.start)..(first + self.per_block).min(window.end);
            let at = self.block_at(number);
            if at.is_none() && !counter.any(part.clone()) {
                continue;
            }
            let mut block = match at {
                None => Vec::new(),
                Some(at) => match bytes::read(&self.file, at, 1 << self.cluster_bits).await {
                    Ok(block) => block,
                    Err(_unreadable) => {
                        found.unread += 1;
                        continue;
                    }
                },
            };
            let changed = self.compare_block(counter, part, &mut block, change, &mut found, &mut differs);
            if let Some((at, changed)) = at.zip(changed) {
                let bytes = block.get(changed.clone()).unwrap_or_default();
                bytes::write(&self.file, at + changed.start as u64, bytes).await?;
                self.cache.remove(&number);
            }
        }
        Ok(found)
    }

    /// Compares some counts of a block, an empty one if there is none; gives the bytes of it that were changed.
    fn compare_block(
        &self,
        counter: &Counter,
        part: Range<u64>,
        block: &mut [u8],
        change: Change,
        found: &mut Differences,
        differs: &mut impl FnMut(u64, u64, u64),
    ) -> Option<Range<usize>> {
        let mut changed: Option<Range<usize>> = None;
        let mut cluster = part.start;
        while cluster < part.end {
            let (len, run) = counter.run(cluster);
            let len = len.min(part.end - cluster);
            for step in 0..len {
                let number = cluster + step;
                let index = (number % self.per_block) as usize;
                let count = counts::get(block, self.order, index);
                let references = run.and_then(|run| run.get(step as usize)).copied().unwrap_or(0).into();
                if count > 0 || references > 0 {
                    found.end = found.end.max((number + 1) << self.cluster_bits);
                }
                if count == references {
                    continue;
                }
                differs(number, count, references);
                found.leaks += u64::from(count > references);
                found.corruptions += u64::from(count < references);
                found.rebuild |= references > 0 && block.is_empty();
                found.overflows += u64::from(references > self.max && count < references);
                let wanted = match change {
                    Change::No => false,
                    Change::Raise => count < references,
                    Change::Lower => count > references,
                };
                if wanted && !block.is_empty() {
                    counts::set(block, self.order, index, references.min(self.max));
                    let bits = index << self.order;
                    let bytes = bits / 8..((bits + (1 << self.order)).div_ceil(8));
                    let so_far = changed.unwrap_or_else(|| bytes.clone());
                    changed = Some(so_far.start.min(bytes.start)..so_far.end.max(bytes.end));
                }
            }
            cluster += len;
        }
        changed
    }

    /// See [`super::free_run`].
    pub(super) async fn free_run(&mut self, clusters: u64, taken: &[Range<u64>]) -> Result<u64> {
        let (mut run, mut behind) = (0, self.clusters.max(self.end()));
        for range in taken {
            behind = behind.max(range.end);
        }
        // Only where there are blocks to count it in: there is no need of new ones then.
        let blocks =
            (0..self.table.len() as u64).take_while(|number| self.block_at(*number).is_some()).count();
        for cluster in 0..blocks as u64 * self.per_block {
            let free = self.get(cluster).await? == 0 && !taken.iter().any(|range| range.contains(&cluster));
            run = if free { run + 1 } else { 0 };
            if run == clusters {
                return Ok(cluster + 1 - clusters);
            }
        }
        Ok(behind)
    }
}
