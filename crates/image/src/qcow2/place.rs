//! Places for what is written: those that are there, and new ones, which are published when they are filled.

use std::any::Any;
use std::ops::Range;

use block::{Error, Result, Span};

use super::entry::{Cluster, Entry, Place, hull, mask};
use super::image::Qcow2;
use super::map::{Entries, Look};
use super::refcount::{Allocated, span};
use crate::Placement;
use crate::metadata::{Loaded, UnitLock};

/// Most bytes of a new place, unless a cluster has more.
const PLACE_MAX: u64 = 2 << 20;

/// A place that does not show yet.
struct Pending {
    /// Number of its first cluster on the disk.
    first: u64,
    entries: Entries,
    /// Of each cluster the mask of parts that will be there.
    parts: Vec<u32>,
    /// Byte of the storage with the first cluster.
    at: u64,
    /// What was given out for it, if anything was.
    allocated: Option<Allocated>,
    /// The entries stay in memory.
    _loaded: Loaded,
    lock: UnitLock,
}

/// What is to be done for a write.
enum Plan {
    /// Nothing: so many bytes have their place.
    Shown { at: u64, len: u64 },
    /// The clusters, which are so many, need a new place.
    New { clusters: u64 },
    /// The first cluster's own place is to be filled, for parts of it are not there yet.
    Fill { at: u64 },
}

impl Qcow2 {
    /// The place of the first bytes of a span, if they have one that may be written.
    pub(super) fn shown(&self, wanted: Span) -> Option<Placement> {
        if !self.health.is_writable() {
            return None;
        }
        let index = self.tables.index(wanted.at() >> self.shape.cluster_bits);
        let table = self.tables.table(index.table).ok().flatten().filter(|table| table.sole)?;
        match self.plan(wanted, Entries { table: table.at, first: index }) {
            Look::Found(Plan::Shown { at, len }) => {
                let place = Span::new(at, len)?;
                let is_sound = place.is_within(self.data.size()) && !self.is_metadata(place);
                is_sound.then(|| self.in_use(place))
            }
            Look::Found(Plan::New { .. } | Plan::Fill { .. }) | Look::Load(_) | Look::Nonsense(_) => None,
        }
    }

    fn in_use(&self, place: Span) -> Placement {
        Placement::shown(place.at(), place.len(), Some(self.metadata.pin()))
    }

    /// Whether data that was to go there would be written over metadata.
    fn is_metadata(&self, place: Span) -> bool {
        !self.shape.external && self.allocator.as_ref().is_some_and(|allocator| allocator.is_reserved(place))
    }

    /// What a write of a span's first bytes needs, by the entries that are in memory.
    fn plan(&self, wanted: Span, entries: Entries) -> Look<Plan> {
        let shape = self.shape;
        let first = wanted.at() >> shape.cluster_bits;
        let mut plan: Option<Plan> = None;
        for number in 0..shape.entries() - entries.first.entry {
            let start = (first + number) << shape.cluster_bits;
            if start >= wanted.end() {
                break;
            }
            let within = wanted.at().max(start) - start..(wanted.end() - start).min(shape.cluster());
            let entry = match (self.entry(entries, number), &plan) {
                (Look::Found(entry), _) => entry,
                (Look::Load(_) | Look::Nonsense(_), Some(_)) => break,
                (Look::Load(entry), None) => return Look::Load(entry),
                (Look::Nonsense(wrong), None) => return Look::Nonsense(wrong),
            };
            let own = match entry {
                Entry::Plain(cluster) => cluster.own_place().map(|at| (cluster, at)),
                Entry::Packed(_) => None,
            };
            let go_on = match (&mut plan, own) {
                (None, None) => {
                    plan = Some(Plan::New { clusters: 1 });
                    true
                }
                (Some(Plan::New { clusters }), None) => {
                    *clusters += 1;
                    true
                }
                (None, Some((cluster, place))) => {
                    let len = self.shown_in(cluster, &within);
                    let at = place + within.start;
                    plan = Some(if len > 0 { Plan::Shown { at, len } } else { Plan::Fill { at: place } });
                    len == within.end - within.start
                }
                (Some(Plan::Shown { at, len }), Some((cluster, place))) if *at + *len == place => {
                    let more = self.shown_in(cluster, &within);
                    *len += more;
                    more == within.end - within.start
                }
                (Some(_), Some(_)) | (Some(_), None) => false,
            };
            if !go_on {
                break;
            }
        }
        plan.map_or_else(
            || Look::Nonsense(format!("no cluster holds the disk's bytes {wanted:?}")),
            Look::Found,
        )
    }

    /// How many of these bytes of a cluster are there, from the first on.
    fn shown_in(&self, cluster: Cluster, within: &Range<u64>) -> u64 {
        let part = (within.start >> self.shape.part_bits()) as u32;
        if cluster.data >> part & 1 == 0 {
            return 0;
        }
        let end = u64::from(cluster.run_end(part, self.shape.parts())) << self.shape.part_bits();
        end.min(within.end) - within.start
    }

    /// See [`crate::Image::place`].
    pub(super) async fn find_place(&self, wanted: Span) -> Result<Placement> {
        self.health.check()?;
        self.metadata.admit().await?;
        let bits = self.shape.cluster_bits;
        let first = wanted.at() >> bits;
        let index = self.tables.index(first);
        // No more than is worth it, and no further than the entries that are loaded at once reach.
        let most = (PLACE_MAX >> bits).max(1).min(((wanted.end() - 1) >> bits) - first + 1);
        let entries_of = |table| self.entries_span(table, index, most);
        // The entries stay loaded while somebody looks at them.
        let _pin = self.metadata.pin();
        let plan = match self.tables.table(index.table) {
            Ok(Some(table)) if table.sole => {
                let _loaded = self.tables.load(entries_of(table.at)?).await?;
                self.plan_or_say(wanted, Entries { table: table.at, first: index }).await?
            }
            Ok(_) => Plan::New { clusters: most },
            Err(wrong) => return Err(self.health.corrupt(wrong).await),
        };
        let clusters = match plan {
            Plan::Shown { at, len } => return self.show(span(at, len)?).await,
            Plan::New { clusters } => clusters.min(most),
            Plan::Fill { .. } => 1,
        };
        let mut lock = self.units.lock(first..first + clusters).await;
        let table = self.tables.own_table(index.table, self.allocator()?).await?;
        let entries = Entries { table, first: index };
        let loaded_span = self.entries_span(table, index, clusters)?;
        let loaded = self.tables.load(loaded_span).await?;
        let clusters = clusters.min(loaded_span.len() / (8 * self.shape.words()));
        self.health.check()?;
        // Whoever had the lock before may have made the place.
        match self.plan_or_say(wanted, entries).await? {
            Plan::Shown { at, len } => {
                drop(lock);
                self.show(span(at, len)?).await
            }
            Plan::Fill { at } => {
                lock.shorten(first + 1);
                // To its end or the last byte that is written, whatever is there already: so one request locks it once.
                let within = wanted.split_at((first + 1) << bits).0;
                self.fill_up(within, Pending::new(first, entries, at, None, loaded, lock)).await
            }
            Plan::New { clusters: needed } => {
                let needed = needed.min(clusters);
                let (at, len, allocated) = if self.shape.external {
                    // There each cluster has the place that it has on the disk.
                    (first << bits, needed, None)
                } else {
                    let allocated = self.allocator()?.allocate(needed).await?;
                    let len = allocated.clusters.end - allocated.clusters.start;
                    (allocated.clusters.start << bits, len, Some(allocated))
                };
                lock.shorten(first + len);
                let within = wanted.split_at((first + len) << bits).0;
                self.fill_up(within, Pending::new(first, entries, at, allocated, loaded, lock)).await
            }
        }
    }

    async fn plan_or_say(&self, wanted: Span, entries: Entries) -> Result<Plan> {
        match self.plan(wanted, entries) {
            Look::Found(plan) => Ok(plan),
            Look::Nonsense(wrong) => Err(self.health.corrupt(wrong).await),
            Look::Load(_) => Err(Error::new(
                block::Errno::EIO,
                "find a place: the entries of the L2 table were not loaded",
            )),
        }
    }

    /// A place that shows, after a closer look than `shown` has.
    async fn show(&self, place: Span) -> Result<Placement> {
        let shown = self.in_use(place);
        self.check_data(place).await?;
        self.lengthen_data(place.end()).await?;
        Ok(shown)
    }

    async fn check_data(&self, place: Span) -> Result<()> {
        if self.is_metadata(place) {
            let what = format!(
                "an L2 table says that the disk's data is at {place:?} of the file, where tables are"
            );
            return Err(self.health.corrupt(what).await);
        }
        Ok(())
    }

    /// Makes the file with data at least so long.
    pub(super) async fn lengthen_data(&self, to: u64) -> Result<()> {
        if self.data.size() >= to {
            return Ok(());
        }
        if !self.shape.external {
            return self.metadata.extend(to).await.map(drop);
        }
        let _permit = self.lengthening.take().await;
        if self.data.size() < to {
            self.data.resize(to).await.map_err(|error| error.during("make the data file longer"))?;
        }
        Ok(())
    }

    /// Makes a placement of clusters of which some parts will be there that are not yet: those that are written, and what has
    /// to go with them.
    async fn fill_up(&self, wanted: Span, mut pending: Pending) -> Result<Placement> {
        let (bits, part) = (self.shape.cluster_bits, self.shape.part());
        let last = (wanted.end() - 1) >> bits;
        let (mut before, mut after) = (0, 0);
        for cluster in pending.first..last + 1 {
            let start = cluster << bits;
            let within = wanted.at().max(start) - start..(wanted.end() - start).min(self.shape.cluster());
            let touched = self.shape.touched(within.clone());
            let entry = match self.entry(pending.entries, cluster - pending.first) {
                Look::Found(entry) => entry,
                Look::Load(_) | Look::Nonsense(_) => {
                    self.drop_pending(pending);
                    return Err(Error::new(
                        block::Errno::EIO,
                        "fill a place: its entry cannot be read any more",
                    ));
                }
            };
            // Of a cluster that moves, what was there moves along; so do the parts between, for it is one piece.
            let (whole, there) = match entry {
                Entry::Packed(_) => (self.shape.all(), 0),
                Entry::Plain(cluster) if pending.allocated.is_none() => (touched, cluster.data),
                Entry::Plain(cluster) => (mask(hull(touched | cluster.data)), 0),
            };
            let parts = hull(whole);
            // The first and the last part are brought as a whole unless they are there.
            let is_there = |part: u32| there >> part & 1 == 1;
            if cluster == pending.first && !is_there(parts.start) {
                before = within.start - u64::from(parts.start) * part;
            }
            if cluster == last && !is_there(parts.end - 1) {
                after = u64::from(parts.end) * part - within.end;
            }
            pending.parts.push(whole);
        }
        let skip = wanted.at() - (pending.first << bits);
        let at = pending.at + skip;
        let blank = pending.allocated.as_ref().is_some_and(|allocated| allocated.blank);
        if self.raw_data {
            // Its file is the disk and nothing more.
            after = after.min(self.size.get().saturating_sub(wanted.end()));
        }
        let place = span(at - before, before + wanted.len() + after)?;
        let checked = match self.check_data(place).await {
            Ok(()) => self.lengthen_data(place.end()).await,
            Err(error) => Err(error),
        };
        if let Err(error) = checked {
            self.drop_pending(pending);
            return Err(error);
        }
        let keep: Option<Box<dyn Any>> = Some(Box::new(pending));
        Ok(Placement { at, len: wanted.len(), before, after, blank, pin: None, keep })
    }

    fn drop_pending(&self, pending: Pending) {
        let Pending { allocated, lock, .. } = pending;
        if let (Some(allocated), Some(allocator)) = (allocated, &self.allocator) {
            allocator.undo(allocated);
        }
        drop(lock);
    }

    /// See [`crate::Image::give_up`].
    pub(super) fn give_up_place(&self, placement: Placement) {
        if let Some(Ok(pending)) = placement.keep.map(|keep| keep.downcast::<Pending>()) {
            self.drop_pending(*pending);
        }
    }

    /// See [`crate::Image::commit`].
    pub(super) async fn publish(&self, placement: Placement) -> Result<()> {
        let Some(Ok(pending)) = placement.keep.map(|keep| keep.downcast::<Pending>()) else {
            // Another request may have published it, whose answer still waits.
            return self.metadata.saved().await;
        };
        self.health.check()?;
        let Pending { first: _, entries, parts, at, allocated, _loaded, lock } = *pending;
        let (mut words, mut retired) = (Vec::with_capacity(parts.len() * 2), Vec::new());
        for (number, parts) in (0..).zip(&parts) {
            let at = at + (number << self.shape.cluster_bits);
            let Look::Found(entry) = self.entry(entries, number) else {
                return Err(Error::new(
                    block::Errno::EIO,
                    "publish a place: its entry cannot be read any more",
                ));
            };
            let new = match entry {
                Entry::Plain(cluster) => cluster.with_data(at, *parts),
                Entry::Packed(_) => Cluster::default().with_data(at, self.shape.all()),
            };
            self.set_entry(&mut words, entries, number, new);
            retired.extend(self.freed(entry, Some(at)));
        }
        self.metadata.set(&words);
        drop((allocated, lock));
        self.retire(retired)?;
        self.metadata.saved().await
    }

    /// Adds the words of an entry to those that are to be set.
    pub(super) fn set_entry(&self, words: &mut Vec<(u64, u64)>, entries: Entries, number: u64, new: Cluster) {
        let at = self.shape.entry_at(entries.table, entries.first.entry + number);
        let [word, bitmap] = self.shape.write(new);
        words.push((at, word));
        if self.shape.extended {
            words.push((at + 8, bitmap));
        }
    }

    /// The clusters of the file that an entry points to and that have one pointer less when it points to `now`.
    pub(super) fn freed(&self, old: Entry, now: Option<u64>) -> Option<Span> {
        if self.shape.external {
            return None;
        }
        match old {
            Entry::Plain(Cluster { place: Some(Place { at, .. }), .. }) if Some(at) != now => {
                Span::new(at, self.shape.cluster())
            }
            Entry::Plain(_) => None,
            Entry::Packed(packed) => packed.clusters(self.shape),
        }
    }

    /// Retires what was freed, in long runs.
    pub(super) fn retire(&self, freed: Vec<Span>) -> Result<()> {
        let Some(allocator) = &self.allocator else { return Ok(()) };
        let mut run: Option<Span> = None;
        for place in freed {
            run = match run {
                Some(before) if before.end() == place.at() => {
                    Some(span(before.at(), before.len() + place.len())?)
                }
                Some(before) => {
                    allocator.retire(before);
                    Some(place)
                }
                None => Some(place),
            };
        }
        if let Some(last) = run {
            allocator.retire(last);
        }
        Ok(())
    }
}

impl Pending {
    fn new(
        first: u64,
        entries: Entries,
        at: u64,
        allocated: Option<Allocated>,
        loaded: Loaded,
        lock: UnitLock,
    ) -> Pending {
        Pending { first, entries, parts: Vec::new(), at, allocated, _loaded: loaded, lock }
    }
}
