//! Who gets which cluster of the file: the allocator, over the reference counts of all clusters.
//!
//! A count is raised before anything points to its cluster, and lowered when, durably, nothing does any more. New clusters
//! are free ones that are known: those that came back, and those that a cursor has found on its way through the counts, a
//! step for each allocation, so that none waits for a walk through all of a large file. Else the file grows.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Poll, Waker};

use block::{Errno, Error, Result, Span};
use storage::{Io, Permits, Zeroing};

use super::Header;
use super::free::{Free, Run};
use super::header::REFCOUNT_TABLE_MAX;
use super::health::Health;
use super::packed::Unpacked;
use super::reserved::Reserved;
use super::width::Width;
use crate::metadata::{Loaded, Metadata, Reclaim, Stage};

/// Blocks with counts are written before the table that points to them, and that before what points to counted clusters.
const BLOCKS: Stage = 0;
const TABLE: Stage = 1;
/// Bits 9 to 63 of an entry of the refcount table: a byte of the file.
const BLOCK: u64 = !0x1ff;
/// Where the header has the refcount table's place and, right behind, its size in clusters.
const TABLE_FIELDS_AT: u64 = 48;
/// The file grows by so many clusters at a time, or by this part of what it has, whichever is more, but by no less and no
/// more than so many bytes.
const STEP_CLUSTERS: u64 = 64;
const STEP_PART: u64 = 32;
const STEP_MIN: u64 = 1 << 20;
const STEP_MAX: u64 = 64 << 20;
/// Clusters behind the file's end that may be counted as in use: a crash leaves some.
const SKIPPED_MAX: u64 = 1 << 22;
/// Most bytes that are written in one piece.
const PIECE: usize = 1 << 20;

/// The refcount table.
struct Table {
    /// Its first byte in the file.
    at: u64,
    /// Its entries; live, as the metadata has them.
    blocks: Vec<u64>,
}

/// Clusters in a row that were given out. Whoever drops it without a word keeps them.
pub(super) struct Allocated {
    /// Their numbers.
    pub(super) clusters: Range<u64>,
    /// Whether they read as zero.
    pub(super) blank: bool,
    /// Their counts.
    counts: Loaded,
}

/// The allocator of one image.
pub(super) struct Allocator {
    metadata: Metadata,
    health: Rc<Health>,
    unpacked: Rc<Unpacked>,
    cluster_bits: u32,
    is_extended: bool,
    width: Width,
    table: RefCell<Table>,
    /// A new table that is whole, but that the header may or may not point to: writing it has failed.
    pending: RefCell<Option<Table>>,
    reserved: RefCell<Reserved>,
    free: RefCell<Free>,
    /// The cluster whose count the cursor looks at next, and the one where it ends.
    cursor: Cell<u64>,
    cursor_end: u64,
    /// Nothing is known of clusters from here on; those from `blank_from` on read as zero.
    fresh: Cell<u64>,
    blank_from: Cell<u64>,
    /// Of each there is one at a time: who allocates, who gives back.
    allocating: Permits,
    reclaiming: Permits,
    /// Places that were retired and have not come back, and who waits until all have.
    retired: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Allocator {
    /// That of an image whose other tables are `reserved`. The table's words are loaded one after the other.
    ///
    /// # Errors
    /// Those of reading.
    pub(super) async fn open(
        metadata: &Metadata,
        header: &Header,
        health: &Rc<Health>,
        unpacked: &Rc<Unpacked>,
        mut reserved: Reserved,
    ) -> Result<Rc<Allocator>> {
        let at = header.refcount_table_at;
        let len = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let blocks = read_words(metadata, at, len / 8, TABLE).await?;
        reserved.add(span(at, len)?);
        for block in blocks.iter().map(|word| word & BLOCK).filter(|block| *block != 0) {
            // What makes no sense is met, and said, when a count of it is needed.
            if let Some(block) = Span::new(block, header.cluster_size()) {
                reserved.add(block);
            }
        }
        let size = metadata.file().size();
        let (whole, all) = (size >> header.cluster_bits, size.div_ceil(header.cluster_size()));
        let allocator = Allocator {
            metadata: metadata.clone(),
            health: health.clone(),
            unpacked: unpacked.clone(),
            cluster_bits: header.cluster_bits,
            is_extended: header.has_extended_l2(),
            width: Width::new(header.refcount_order),
            table: RefCell::new(Table { at, blocks }),
            pending: RefCell::new(None),
            reserved: RefCell::new(reserved),
            free: RefCell::default(),
            cursor: Cell::new(0),
            // The last cluster may be there in part; then a block device has no more of it.
            cursor_end: whole,
            fresh: Cell::new(all),
            blank_from: Cell::new(all),
            allocating: Permits::new(1),
            reclaiming: Permits::new(1),
            retired: Cell::new(0),
            waiting: RefCell::default(),
        };
        Ok(Rc::new(allocator))
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The bytes of clusters.
    fn bytes(&self, clusters: &Range<u64>) -> Result<Span> {
        let bits = self.cluster_bits;
        let fits = clusters.end <= i64::MAX as u64 >> bits;
        let bytes = fits.then(|| Span::new(clusters.start << bits, (clusters.end - clusters.start) << bits));
        bytes.flatten().ok_or_else(|| Error::new(Errno::EFBIG, "find a place in the image's file"))
    }

    /// Counts in a refcount block.
    fn per_block(&self) -> u64 {
        self.width.per_block(self.cluster())
    }

    /// Where the word with the count of a cluster is, in the block at byte `block`.
    fn word_at(&self, block: u64, cluster: u64) -> u64 {
        block + cluster % self.per_block() / self.width.per_word() * 8
    }

    /// The block with the count of a cluster, if there is one.
    async fn block_of(&self, cluster: u64) -> Result<Option<u64>> {
        let index = cluster / self.per_block();
        let block =
            usize::try_from(index).ok().and_then(|index| self.table.borrow().blocks.get(index).copied());
        let block = block.unwrap_or(0) & BLOCK;
        if block == 0 {
            return Ok(None);
        }
        if !block.is_multiple_of(self.cluster()) || block >= self.metadata.file().size() {
            let what = format!("entry {index} of its refcount table points to byte {block}");
            return Err(self.health.corrupt(what).await);
        }
        Ok(Some(block))
    }

    /// Brings counts into memory: those of clusters whose block is at byte `block`.
    async fn load(&self, block: u64, clusters: &Range<u64>) -> Result<Loaded> {
        let first = self.word_at(block, clusters.start);
        let last = self.word_at(block, clusters.end - 1);
        self.metadata.load(span(first, last + 8 - first)?, BLOCKS).await
    }

    /// A count that is loaded.
    fn count(&self, block: u64, cluster: u64) -> u64 {
        let word =
            self.metadata.word(self.word_at(block, cluster)).expect("counts that are looked at are loaded");
        self.width.get(word, cluster)
    }

    /// Changes counts that are loaded: all of these clusters, whose block is at byte `block`.
    fn change(&self, block: u64, clusters: Range<u64>, change: impl Fn(u64) -> u64) {
        let mut words: Vec<(u64, u64)> = Vec::new();
        for cluster in clusters {
            let at = self.word_at(block, cluster);
            if words.last().is_none_or(|(last, _)| *last != at) {
                words.push((at, self.metadata.word(at).expect("counts that are changed are loaded")));
            }
            if let Some((_, word)) = words.last_mut() {
                *word = self.width.put(*word, cluster, change(self.width.get(*word, cluster)));
            }
        }
        self.metadata.set(&words);
    }

    /// Says that clusters hold metadata from now on, or no more.
    pub(super) fn reserve(&self, place: Span) {
        self.reserved.borrow_mut().add(place);
    }

    /// See [`Allocator::reserve`].
    pub(super) fn unreserve(&self, place: Span) {
        self.reserved.borrow_mut().remove(place);
    }

    /// Whether one of these bytes is metadata.
    pub(super) fn is_reserved(&self, place: Span) -> bool {
        self.reserved.borrow().overlaps(place)
    }

    /// Gives out free clusters in a row: at least one, no more than `most`. They are counted from now on.
    ///
    /// # Errors
    /// There is no space, or a table cannot be read or written; nothing is given out then.
    pub(super) async fn allocate(&self, most: u64) -> Result<Allocated> {
        let _permit = self.allocating.take().await;
        self.health.check()?;
        self.finish_table().await?;
        self.look_on().await;
        loop {
            self.health.check()?;
            // Rather a new place in one piece than a fragment of an old one.
            let found = self.free.borrow_mut().take(most, most.div_ceil(4));
            let result = match found {
                Some(run) => self.claim(run).await?,
                None => match self.extend(most).await {
                    Ok(allocated) => Some(allocated),
                    Err(error) if error.errno().is_no_space() || error.errno() == Errno::EFBIG => {
                        // The file cannot grow: whatever there is.
                        let found = self.free.borrow_mut().take(most, 1);
                        match found {
                            Some(run) => self.claim(run).await?,
                            None if self.look_on().await => None,
                            None => return Err(error),
                        }
                    }
                    Err(error) => return Err(error),
                },
            };
            if let Some(allocated) = result {
                return Ok(allocated);
            }
        }
    }

    /// The cursor goes on a step; whether there was one to go. What cannot be read is not known to be free, and no more.
    async fn look_on(&self) -> bool {
        let from = self.cursor.get();
        if from >= self.cursor_end || self.free.borrow().is_full() {
            return false;
        }
        let block_end = (from / self.per_block() + 1).saturating_mul(self.per_block()).min(self.cursor_end);
        let block = match self.block_of(from).await {
            Ok(Some(block)) => block,
            Ok(None) => {
                self.free.borrow_mut().add_found(from..block_end);
                self.cursor.set(block_end);
                return true;
            }
            Err(_) => {
                self.cursor.set(block_end);
                return true;
            }
        };
        // As many as a block of metadata holds.
        let step = self.width.per_block(self.cluster().min(4096));
        let to = (from / step + 1).saturating_mul(step).min(block_end);
        self.cursor.set(to);
        match self.load(block, &(from..to)).await {
            Ok(_counts) => {
                let mut free = self.free.borrow_mut();
                let mut at = from;
                while at < to {
                    let end = (at..to).find(|cluster| self.count(block, *cluster) != 0).unwrap_or(to);
                    free.add_found(at..end);
                    at = (end..to).find(|cluster| self.count(block, *cluster) == 0).unwrap_or(to);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "reference counts cannot be read: free clusters among them are not used")
            }
        }
        true
    }

    /// Counts free clusters as used, or makes a block to count them in. If that fails they are free again.
    async fn claim(&self, run: Run) -> Result<Option<Allocated>> {
        let put_back = |run: Run| self.free.borrow_mut().add(run);
        // Counts of one block are changed at once.
        let block_end = (run.clusters.start / self.per_block() + 1).saturating_mul(self.per_block());
        let Run { mut clusters, blank } = run;
        if clusters.end > block_end {
            put_back(Run { clusters: block_end..clusters.end, blank });
            clusters.end = block_end;
        }
        let Some(block) = self.block_of(clusters.start).await? else {
            let first = clusters.start;
            put_back(Run { clusters, blank: false });
            return self.make_block(first).await.map(|_| None);
        };
        match self.count_in(block, clusters.clone(), blank).await {
            Ok(allocated) => Ok(Some(allocated)),
            Err(error) => {
                put_back(Run { clusters, blank });
                Err(error)
            }
        }
    }

    /// Counts clusters whose count is zero, and whose block is at byte `block`, as used.
    async fn count_in(&self, block: u64, clusters: Range<u64>, blank: bool) -> Result<Allocated> {
        let bytes = self.bytes(&clusters)?;
        let counts = self.load(block, &clusters).await?;
        if let Some(used) = clusters.clone().find(|cluster| self.count(block, *cluster) != 0) {
            let what = format!("cluster {used} of the file was counted as free and as used");
            return Err(self.health.corrupt(what).await);
        }
        self.check_free(bytes).await?;
        self.lengthen(bytes).await?;
        self.change(block, clusters.clone(), |_| 1);
        Ok(Allocated { clusters, blank, counts })
    }

    /// What is about to be given out must not be metadata.
    async fn check_free(&self, bytes: Span) -> Result<()> {
        if !self.is_reserved(bytes) {
            return Ok(());
        }
        let what =
            format!("its tables lie at {bytes:?} of the file, or in between, which is counted as free");
        Err(self.health.corrupt(what).await)
    }

    /// Gives out clusters behind all that were in use.
    async fn extend(&self, most: u64) -> Result<Allocated> {
        let step = self.width.per_block(self.cluster().min(4096));
        let mut skipped = 0;
        while skipped < SKIPPED_MAX {
            let from = self.fresh.get();
            let Some(block) = self.block_of(from).await? else {
                // That one is in use then, at least.
                self.make_block(from).await?;
                continue;
            };
            let to = (from / step + 1).saturating_mul(step);
            let counts = self.load(block, &(from..to)).await?;
            // What is counted and beyond the file's end was lost at a crash, and so was what would point to it.
            let is_free = |cluster: &u64| self.count(block, *cluster) == 0;
            let Some(start) = (from..to).find(is_free) else {
                self.fresh.set(to);
                skipped += to - from;
                continue;
            };
            let to = start.saturating_add(most).min(to);
            let end = (start..to).find(|cluster| !is_free(cluster)).unwrap_or(to);
            drop(counts);
            let blank = start >= self.blank_from.get();
            let allocated = self.count_in(block, start..end, blank).await?;
            self.fresh.set(end);
            return Ok(allocated);
        }
        let what = format!("{skipped} clusters and more behind the file's end are counted as in use");
        Err(self.health.corrupt(what).await)
    }

    /// Makes the file so long that it has these clusters, and somewhat longer, so that not each cluster needs that.
    async fn lengthen(&self, clusters: Span) -> Result<()> {
        let (size, to) = (self.metadata.file().size(), clusters.end());
        if to <= size {
            return Ok(());
        }
        let step = (STEP_CLUSTERS << self.cluster_bits).max(size / STEP_PART);
        let step = step.clamp(STEP_MIN, STEP_MAX).max(self.cluster());
        let result = match self.metadata.extend(to.max(size.saturating_add(step))).await {
            // It need not be so much.
            Err(_) => self.metadata.extend(to).await,
            Ok(size) => Ok(size),
        };
        result.map_err(|error| error.during("make the image's file longer"))?;
        // Else each first write to a hole has the file to itself while the file system looks for space (ext4). What has
        // subclusters is to take no more space than these.
        if !self.is_extended {
            let all = span(clusters.at(), self.metadata.file().size() - clusters.at())?;
            self.metadata.reserve(all).await;
        }
        Ok(())
    }

    /// Makes the cluster `place`, which is free, the block that counts it and its neighbours, of which there is none. So each
    /// new block counts itself.
    async fn make_block(&self, place: u64) -> Result<u64> {
        let index = place / self.per_block();
        if index >= self.table.borrow().blocks.len() as u64 {
            self.grow_table(place).await?;
            return self.block_of(place).await?.ok_or_else(|| {
                Error::new(Errno::EIO, "make a new refcount table: it does not reach as far as it should")
            });
        }
        let bytes = self.bytes(&(place..place + 1))?;
        self.check_free(bytes).await?;
        self.no_longer_blank(place + 1);
        let content = self.block_content(index, &(place..place + 1));
        let during = |error: Error| error.during("make a new refcount block");
        self.write_pieces(bytes.at(), &content).await.map_err(during)?;
        let entry_at = self.table.borrow().at + index * 8;
        let _entry = self.metadata.load(span(entry_at, 8)?, TABLE).await.map_err(during)?;
        self.metadata.set(&[(entry_at, bytes.at())]);
        if let Some(entry) = self.table.borrow_mut().blocks.get_mut(index as usize) {
            *entry = bytes.at();
        }
        self.reserve(bytes);
        self.taken(place..place + 1);
        Ok(bytes.at())
    }

    /// A new block of counts: one for each of the clusters `used`, as far as they are its.
    fn block_content(&self, index: u64, used: &Range<u64>) -> Vec<u8> {
        let per_block = self.per_block();
        let (first, end) = (index * per_block, (index + 1) * per_block);
        let mut words = vec![0; self.cluster() as usize / 8];
        for cluster in used.start.max(first)..used.end.min(end) {
            if let Some(word) = words.get_mut(((cluster - first) / self.width.per_word()) as usize) {
                *word = self.width.put(*word, cluster, 1);
            }
        }
        words.into_iter().flat_map(u64::to_be_bytes).collect()
    }

    async fn write_pieces(&self, at: u64, bytes: &[u8]) -> Result<()> {
        for (index, piece) in bytes.chunks(PIECE).enumerate() {
            self.metadata.write_through(at + (index * PIECE) as u64, piece).await?;
        }
        Ok(())
    }

    /// Clusters are in use that nobody had asked for.
    fn taken(&self, clusters: Range<u64>) {
        if clusters.end > self.fresh.get() {
            self.fresh.set(clusters.end);
        }
        self.free.borrow_mut().take_out(clusters);
    }

    /// Something was written to clusters before this one, whatever becomes of them.
    fn no_longer_blank(&self, end: u64) {
        self.blank_from.set(self.blank_from.get().max(end));
    }

    /// Makes a larger refcount table. It begins, behind the blocks that count it and them, at the cluster `first`, for which
    /// the old one has no entry any more: so nothing is counted there, and all is free.
    async fn grow_table(&self, first: u64) -> Result<()> {
        let (old_at, old_len) = (self.table.borrow().at, self.table.borrow().blocks.len() as u64);
        let (per_block, per_cluster) = (self.per_block(), self.cluster() / 8);
        let (mut blocks, mut clusters) = (1, 1);
        loop {
            let end = first + blocks + clusters;
            let needed = (end - 1) / per_block + 1;
            let most = REFCOUNT_TABLE_MAX / 8;
            if needed > most {
                return Err(Error::new(
                    Errno::EFBIG,
                    format!("make a new refcount table: it would have more than {REFCOUNT_TABLE_MAX} bytes"),
                ));
            }
            // Half as large again, so that it does not happen often.
            let wanted = needed.max((old_len + old_len / 2).min(most)).div_ceil(per_cluster);
            let new_blocks = needed - first / per_block;
            if (new_blocks, wanted) == (blocks, clusters) {
                break;
            }
            (blocks, clusters) = (new_blocks.max(blocks), wanted.max(clusters));
        }
        let all = first..first + blocks + clusters;
        let bytes = self.bytes(&all)?;
        let at = bytes.at() + (blocks << self.cluster_bits);
        self.check_free(bytes).await?;
        self.no_longer_blank(all.end);
        let during = |error: Error| error.during("make a new refcount table");
        let mut table = self.table.borrow().blocks.clone();
        table.resize((clusters * per_cluster) as usize, 0);
        for number in 0..blocks {
            let (index, place) = (first / per_block + number, (first + number) << self.cluster_bits);
            self.write_pieces(place, &self.block_content(index, &all)).await.map_err(during)?;
            if let Some(entry) = table.get_mut(index as usize) {
                *entry = place;
            }
        }
        let content: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.write_pieces(at, &content).await.map_err(during)?;
        self.metadata.sync().await.map_err(during)?;
        // From here on either table is as good as the other, until the new one alone is changed.
        *self.pending.borrow_mut() = Some(Table { at, blocks: table });
        self.reserve(bytes);
        self.taken(all);
        tracing::debug!(old_at, at, clusters, "the refcount table has a new place");
        self.finish_table().await
    }

    /// Lets the header point to the new refcount table, if there is one, and gives the old one back.
    async fn finish_table(&self) -> Result<()> {
        let Some((at, len)) =
            self.pending.borrow().as_ref().map(|table| (table.at, table.blocks.len() as u64 * 8))
        else {
            return Ok(());
        };
        let mut fields = at.to_be_bytes().to_vec();
        fields.extend_from_slice(&((len >> self.cluster_bits) as u32).to_be_bytes());
        let during = |error: Error| error.during("let the header point to a new refcount table");
        self.metadata.write_through(TABLE_FIELDS_AT, &fields).await.map_err(during)?;
        self.metadata.sync().await.map_err(during)?;
        if let Some(table) = self.pending.take() {
            let old = self.table.replace(table);
            let place = span(old.at, old.blocks.len() as u64 * 8)?;
            // What was changed there and is not written is in the new one.
            self.metadata.forget(place);
            self.unreserve(place);
            self.retire(place);
        }
        Ok(())
    }

    /// Brings to its end what an error has left half done: until then the header may point to either of two tables.
    ///
    /// # Errors
    /// Those of writing the header.
    pub(super) async fn settle(&self) -> Result<()> {
        let _permit = self.allocating.take().await;
        self.finish_table().await
    }

    /// Takes clusters back that nothing has ever pointed to.
    pub(super) fn undo(&self, allocated: Allocated) {
        let Allocated { clusters, counts, .. } = allocated;
        let index = clusters.start / self.per_block();
        let block = self.table.borrow().blocks.get(index as usize).map_or(0, |word| word & BLOCK);
        self.change(block, clusters.clone(), |_| 0);
        drop(counts);
        self.free.borrow_mut().add(Run { clusters, blank: false });
    }

    /// Says that one pointer less leads to each of these clusters, by what was set before.
    pub(super) fn retire(&self, place: Span) {
        self.retired.set(self.retired.get() + 1);
        self.metadata.retire(place);
    }

    /// Waits until all that was retired has come back, which takes a round.
    pub(super) async fn all_reclaimed(&self) {
        poll_fn(|cx| {
            if self.retired.get() == 0 {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Lowers the counts of clusters of one block by one.
    async fn lower(&self, clusters: Range<u64>) -> Result<()> {
        let Some(block) = self.block_of(clusters.start).await? else {
            let what = format!("cluster {} of the file was in use and has no count", clusters.start);
            return Err(self.health.corrupt(what).await);
        };
        let _counts = self.load(block, &clusters).await?;
        if let Some(bad) = clusters.clone().find(|cluster| self.count(block, *cluster) == 0) {
            let what = format!("cluster {bad} of the file was in use and is counted as free");
            return Err(self.health.corrupt(what).await);
        }
        // Nobody raises counts of clusters in use, and nobody else lowers any: those that are one stay so meanwhile.
        let mut freed: Vec<Run> = Vec::new();
        let mut at = clusters.start;
        while at < clusters.end {
            let is_last = |cluster: u64| self.count(block, cluster) == 1;
            let same = (at..clusters.end).find(|cluster| is_last(*cluster) != is_last(at));
            let run = at..same.unwrap_or(clusters.end);
            at = run.end;
            if is_last(run.start) {
                let bytes = self.bytes(&run)?;
                self.unpacked.forget(bytes);
                freed.push(Run { blank: self.punch(bytes).await, clusters: run });
            }
        }
        let _permit = self.allocating.take().await;
        self.change(block, clusters, |count| count.saturating_sub(1));
        freed.into_iter().for_each(|run| self.free.borrow_mut().add(run));
        Ok(())
    }

    /// Gives the space of clusters back to the file system; whether they read as zero now.
    async fn punch(&self, bytes: Span) -> bool {
        let file = self.metadata.file();
        let there = bytes.split_at(file.size()).0;
        let how = Zeroing { unmap: true, fast: true };
        // One that cannot do this is none the worse for it.
        there == bytes && file.zero(there, how).await.is_ok()
    }

    /// The byte behind the last cluster that is in use.
    ///
    /// # Errors
    /// Those of reading counts.
    pub(super) async fn end(&self) -> Result<u64> {
        let _permit = self.allocating.take().await;
        // What is counted behind the file's end is nothing to cut off.
        let there = self.metadata.file().size().div_ceil(self.cluster()).div_ceil(self.per_block());
        let mut index = there.min(self.table.borrow().blocks.len() as u64);
        while index > 0 {
            index -= 1;
            let Some(block) = self.block_of(index * self.per_block()).await? else { continue };
            let step = self.width.per_block(self.cluster().min(4096));
            let mut to = (index + 1) * self.per_block();
            while to > index * self.per_block() {
                let from = to - step;
                let _counts = self.load(block, &(from..to)).await?;
                if let Some(last) = (from..to).rev().find(|cluster| self.count(block, *cluster) != 0) {
                    return Ok(self.bytes(&(last..last + 1))?.end());
                }
                to = from;
            }
        }
        Ok(self.cluster())
    }
}

impl Reclaim for Allocator {
    fn reclaim(&self, place: Span) -> Io<'_> {
        /// Counts a place as come back, whatever becomes of it.
        struct Back<'a>(&'a Allocator);

        impl Drop for Back<'_> {
            fn drop(&mut self) {
                let retired = self.0.retired.get().saturating_sub(1);
                self.0.retired.set(retired);
                if retired == 0 {
                    self.0.waiting.take().into_iter().for_each(Waker::wake);
                }
            }
        }

        Box::pin(async move {
            let _back = Back(self);
            let _permit = self.reclaiming.take().await;
            self.health.check()?;
            let end = place.end().div_ceil(self.cluster());
            let mut at = place.at() >> self.cluster_bits;
            // Not all in one go: nobody is to wait long for the counts.
            let step = self.width.per_block(self.cluster().min(4096));
            while at < end {
                let to = (at / step + 1).saturating_mul(step).min(end);
                self.lower(at..to).await?;
                self.metadata.relieve().await?;
                at = to;
            }
            Ok(())
        })
    }
}

/// Reads so many words of a table, of which a process before this one may have left some unwritten.
pub(super) async fn read_words(metadata: &Metadata, at: u64, count: u64, stage: Stage) -> Result<Vec<u64>> {
    let mut words = Vec::with_capacity(count as usize);
    while (words.len() as u64) < count {
        let from = at + words.len() as u64 * 8;
        let to = (from + (64 << 10)).min(at + count * 8);
        let _loaded = metadata.load(span(from, to - from)?, stage).await?;
        words.extend((from..to).step_by(8).filter_map(|at| metadata.word(at)));
    }
    Ok(words)
}

/// Bytes of the file, as far as a file reaches.
pub(super) fn span(at: u64, len: u64) -> Result<Span> {
    Span::new(at, len).ok_or_else(|| Error::new(Errno::EIO, format!("look for metadata at {at}+{len}")))
}
