//! Making bytes read as zero by what the tables say, and giving back what is not needed any more.

use block::{Result, Span};
use storage::Zeroing;

use super::entry::{Cluster, Entry};
use super::image::Qcow2;
use super::map::{Entries, Look};
use super::refcount::span;
use crate::{Extent, Zeroed};

/// What becomes of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Nothing: it says already what it should.
    None,
    /// It becomes this.
    To(Cluster),
    /// It cannot say what it should.
    Impossible,
}

/// What is asked for.
#[derive(Clone, Copy)]
enum Wish {
    /// These bytes read as zero; their space may be given back.
    Zero { unmap: bool },
    /// They are not needed.
    Discard,
}

/// So many clusters, of which those in front were changed, and the first one behind them could not be.
struct Done {
    clusters: u64,
    impossible: bool,
}

impl Qcow2 {
    /// See [`crate::Image::zero`].
    pub(super) async fn zero_by_map(&self, wanted: Span, how: Zeroing) -> Result<Zeroed> {
        self.health.check()?;
        if self.raw_data {
            // The other file alone has to show it too.
            return Ok(Zeroed::Write { len: wanted.len() });
        }
        let part = self.shape.part();
        let first_end = (wanted.at() / part + 1) * part;
        // Behind the disk's end there is nothing that would have to stay.
        let ends_within = wanted.end() < first_end && wanted.end() != self.size.get();
        if !wanted.at().is_multiple_of(part) || ends_within {
            // A part of what the map can tell apart.
            let len = wanted.len().min(first_end - wanted.at());
            let piece = span(wanted.at(), len)?;
            return Ok(match self.find(|| self.look(piece)).await? {
                Extent::Zero { len } => {
                    // Another request may have made it so, whose answer still waits.
                    self.metadata.saved().await?;
                    Zeroed::Done { len }
                }
                Extent::Below { len } if !self.has_backing => {
                    self.metadata.saved().await?;
                    Zeroed::Done { len }
                }
                Extent::Data { len, .. } | Extent::Below { len } | Extent::Packed { len, .. } => {
                    Zeroed::Write { len }
                }
            });
        }
        let end = if wanted.end() == self.size.get() { wanted.end() } else { wanted.end() / part * part };
        let whole = span(wanted.at(), end - wanted.at())?;
        let done = self.change_clusters(whole, Wish::Zero { unmap: how.unmap }).await?;
        let bytes_of = |clusters: u64| {
            let first = whole.at() >> self.shape.cluster_bits;
            ((first + clusters) << self.shape.cluster_bits).min(whole.end()) - whole.at()
        };
        Ok(match done {
            Done { clusters: 0, impossible: _ } => Zeroed::Write { len: bytes_of(1) },
            Done { clusters, impossible: _ } => Zeroed::Done { len: bytes_of(clusters) },
        })
    }

    /// See [`crate::Image::discard`].
    pub(super) async fn discard_clusters(&self, wanted: Span) -> Result<()> {
        self.health.check()?;
        let cluster = self.shape.cluster();
        let start = wanted.at().div_ceil(cluster) * cluster;
        let end =
            if wanted.end() == self.size.get() { wanted.end() } else { wanted.end() / cluster * cluster };
        let mut at = start;
        while at < end {
            let rest = span(at, end - at)?;
            if self.raw_data {
                // What the tables say of it stays true.
                return self.punch(vec![rest]).await;
            }
            let done = self.change_clusters(rest, Wish::Discard).await?;
            // One that cannot be changed stays as it is.
            at += (done.clusters + u64::from(done.impossible)) << self.shape.cluster_bits;
        }
        Ok(())
    }

    /// Takes out the first clusters of a span beyond the disk's end, over nothing; gives how many bytes these are.
    pub(super) async fn clear_some(&self, wanted: Span) -> Result<u64> {
        let done = self.change_clusters(wanted, Wish::Zero { unmap: true }).await?;
        if done.clusters == 0 {
            return Err(block::Error::new(
                block::Errno::EOPNOTSUPP,
                "say in an L2 table that a cluster is zero",
            ));
        }
        Ok(done.clusters << self.shape.cluster_bits)
    }

    /// Changes the first clusters of a span, which begins with a part of one and ends with one: so many as are worth doing at
    /// once.
    async fn change_clusters(&self, wanted: Span, wish: Wish) -> Result<Done> {
        self.metadata.admit().await?;
        let bits = self.shape.cluster_bits;
        let (first, end) = (wanted.at() >> bits, ((wanted.end() - 1) >> bits) + 1);
        let index = self.tables.index(first);
        let table_end = (end - first).min(self.shape.entries() - index.entry);
        let needs_entries = match wish {
            Wish::Zero { .. } => self.has_backing,
            Wish::Discard => false,
        };
        match self.tables.table(index.table) {
            // Nothing is there.
            Ok(None) if !needs_entries => return Ok(Done { clusters: table_end, impossible: false }),
            Ok(None) if !self.shape.zeroes => return Ok(Done { clusters: 0, impossible: true }),
            Ok(_) => {}
            Err(wrong) => return Err(self.health.corrupt(wrong).await),
        }
        let _pin = self.metadata.pin();
        let count = self.entries_span(0, index, table_end)?.len() / (8 * self.shape.words());
        let lock = self.units.lock(first..first + count).await;
        let table = self.tables.own_table(index.table, self.allocator()?).await?;
        let entries = Entries { table, first: index };
        let _loaded = self.tables.load(self.entries_span(table, index, count)?).await?;
        self.health.check()?;
        let (mut words, mut retired, mut punched) = (Vec::new(), Vec::new(), Vec::new());
        let mut done = Done { clusters: 0, impossible: false };
        while done.clusters < count {
            let start = (first + done.clusters) << bits;
            let entry = match self.entry(entries, done.clusters) {
                Look::Found(entry) => entry,
                // What was done so far counts.
                Look::Nonsense(_) | Look::Load(_) if done.clusters > 0 => break,
                Look::Nonsense(wrong) => return Err(self.health.corrupt(wrong).await),
                Look::Load(_) => {
                    return Err(block::Error::new(
                        block::Errno::EIO,
                        "change an L2 table: it was not loaded",
                    ));
                }
            };
            let within = wanted.at().max(start) - start..(wanted.end() - start).min(self.shape.cluster());
            // The disk may end within a part; what is behind belongs to nobody.
            match self.change(entry, self.shape.touched(within), wish) {
                Change::None => {}
                Change::To(new) => {
                    self.set_entry(&mut words, entries, done.clusters, new);
                    let freed = self.freed(entry, new.place.map(|place| place.at));
                    retired.extend(freed);
                    if self.shape.external && new.place.is_none() {
                        punched.push(span(start, self.shape.cluster())?);
                    }
                }
                Change::Impossible => {
                    done.impossible = true;
                    break;
                }
            }
            done.clusters += 1;
        }
        self.metadata.set(&words);
        self.retire(retired)?;
        self.punch(punched).await?;
        drop(lock);
        self.metadata.saved().await?;
        Ok(done)
    }

    /// Gives space in a data file back. Nobody else gets a cluster's place there: so this needs no round, but the lock.
    async fn punch(&self, places: Vec<Span>) -> Result<()> {
        for place in places {
            let there = place.split_at(self.data.size()).0;
            if !there.is_empty() {
                self.data.discard(there).await?;
            }
        }
        Ok(())
    }

    fn change(&self, entry: Entry, parts: u32, wish: Wish) -> Change {
        let all = self.shape.all();
        // Where there is nothing below, what is nowhere is zero.
        let nothing =
            if self.has_backing { Cluster { zero: all, ..Cluster::default() } } else { Cluster::default() };
        let can = !self.has_backing || self.shape.zeroes;
        match (entry, wish) {
            (Entry::Packed(_), Wish::Zero { .. } | Wish::Discard) if parts == all && can => {
                Change::To(nothing)
            }
            (Entry::Packed(_), Wish::Zero { .. } | Wish::Discard) => Change::Impossible,
            (Entry::Plain(old), Wish::Discard) => match old {
                Cluster { place: None, .. } => Change::None,
                Cluster { place: Some(_), .. } if can => Change::To(nothing),
                Cluster { place: Some(_), .. } => Change::Impossible,
            },
            (Entry::Plain(old), Wish::Zero { unmap }) => {
                let is_zero = if self.has_backing { old.zero } else { !old.data };
                if is_zero & parts == parts {
                    return Change::None;
                }
                if !self.shape.zeroes {
                    // Version 2 can only say that there is nothing.
                    let gives_back = unmap || old.own_place().is_none();
                    return if can && gives_back { Change::To(nothing) } else { Change::Impossible };
                }
                let new = Cluster { data: old.data & !parts, zero: old.zero | parts, ..old };
                let is_kept = new.data != 0 || !unmap;
                Change::To(if is_kept { new } else { Cluster { place: None, ..new } })
            }
        }
    }
}
