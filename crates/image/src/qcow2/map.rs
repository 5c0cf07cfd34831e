//! Where the disk's bytes are: runs of them, out of the tables that are in memory.

use std::ops::Range;

use block::{Result, Span};

use super::entry::{Cluster, Entry, Part};
use super::image::Qcow2;
use super::refcount::span;
use super::table::Index;
use crate::Extent;
use crate::metadata::Loaded;

/// What a look at the tables gives.
pub(super) enum Look<T> {
    /// What was looked for.
    Found(T),
    /// These bytes of the file have to be loaded first.
    Load(Span),
    /// The tables make no sense.
    Nonsense(String),
}

/// What a run of the disk is. Of data it is the place of the first byte, in the image's storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data { at: u64 },
    Zero,
    Below,
    Packed,
}

/// A table of entries for some clusters, all of which are in memory.
#[derive(Clone, Copy)]
pub(super) struct Entries {
    /// The L2 table's first byte in the file.
    pub(super) table: u64,
    /// The entry of the first cluster.
    pub(super) first: Index,
}

impl Qcow2 {
    /// The entry that is so many behind the first one, if it is in memory.
    pub(super) fn entry(&self, entries: Entries, number: u64) -> Look<Entry> {
        let at = self.shape.entry_at(entries.table, entries.first.entry + number);
        let absent = || match span(at, 8 * self.shape.words()) {
            Ok(entry) => Look::Load(entry),
            Err(error) => Look::Nonsense(error.to_string()),
        };
        let Some(word) = self.metadata.word(at) else { return absent() };
        let bitmap = if self.shape.extended {
            let Some(bitmap) = self.metadata.word(at + 8) else { return absent() };
            bitmap
        } else {
            0
        };
        match self.shape.read([word, bitmap]) {
            Ok(Entry::Plain(Cluster { place: Some(place), .. }))
                if self.shape.external && place.at != self.disk_at(entries, number) =>
            {
                Look::Nonsense(format!(
                    "the entry at byte {at} of an L2 table: the disk's byte {} is at byte {} of the data file",
                    self.disk_at(entries, number),
                    place.at
                ))
            }
            Ok(entry) => Look::Found(entry),
            Err(nonsense) => Look::Nonsense(format!("the entry at byte {at} of an L2 table: {nonsense}")),
        }
    }

    /// The first byte of the disk that an entry tells of.
    fn disk_at(&self, entries: Entries, number: u64) -> u64 {
        let Index { table, entry } = entries.first;
        (table as u64 * self.shape.entries() + entry + number) << self.shape.cluster_bits
    }

    /// The bytes of the file with the entries of clusters that are in one L2 table: so many that they are loaded together.
    pub(super) fn entries_span(&self, table: u64, first: Index, count: u64) -> Result<Span> {
        let words = self.shape.words() * 8;
        let from = self.shape.entry_at(table, first.entry);
        let end = self.shape.entry_at(table, (first.entry + count).min(self.shape.entries()));
        // No more than to the end of a block of metadata.
        let block = self.block_size();
        let end = end.min((from / block + 1) * block).max(from + words);
        span(from, end - from)
    }

    /// What the bytes of a span are, from its first one on; it is within the disk.
    pub(super) fn look(&self, wanted: Span) -> Look<Extent> {
        let shape = self.shape;
        let first = wanted.at() >> shape.cluster_bits;
        let index = self.tables.index(first);
        let table = match self.tables.table(index.table) {
            Ok(Some(table)) => table.at,
            Ok(None) => {
                let last = self.tables.index((wanted.end() - 1) >> shape.cluster_bits).table;
                let next = self.tables.next_table(index.table + 1, last + 1) as u64;
                let end = next.saturating_mul(self.tables.reach()).min(wanted.end());
                return Look::Found(Extent::Below { len: end - wanted.at() });
            }
            Err(wrong) => return Look::Nonsense(wrong),
        };
        let entries = Entries { table, first: index };
        let mut run: Option<(Kind, u64)> = None;
        for number in 0..shape.entries() - index.entry {
            let start = (first + number) << shape.cluster_bits;
            if start >= wanted.end() {
                break;
            }
            let within = wanted.at().max(start) - start..(wanted.end() - start).min(shape.cluster());
            let entry = match (self.entry(entries, number), &run) {
                (Look::Found(entry), _) => entry,
                // What comes before it is an answer too, unless it is nothing.
                (Look::Load(_) | Look::Nonsense(_), Some(_)) => break,
                (Look::Load(_), None) => {
                    let count = ((wanted.end() - 1) >> shape.cluster_bits) - first + 1;
                    return match self.entries_span(table, index, count) {
                        Ok(entries) => Look::Load(entries),
                        Err(error) => Look::Nonsense(error.to_string()),
                    };
                }
                (Look::Nonsense(wrong), None) => return Look::Nonsense(wrong),
            };
            let len = within.end - within.start;
            let added = self.lengthen(&mut run, entry, within);
            if added < len {
                break;
            }
        }
        let Some((kind, len)) = run else {
            return Look::Nonsense(format!("no cluster holds the disk's bytes {wanted:?}"));
        };
        self.extent(kind, len)
    }

    /// Adds bytes of a cluster to a run as far as they go on with it; gives how many.
    fn lengthen(&self, run: &mut Option<(Kind, u64)>, entry: Entry, within: Range<u64>) -> u64 {
        let (shape, mut at) = (self.shape, within.start);
        while at < within.end {
            let (kind, end) = match entry {
                Entry::Packed(_) => (Kind::Packed, within.end),
                Entry::Plain(cluster) => {
                    let part = (at >> shape.part_bits()) as u32;
                    let end = u64::from(cluster.run_end(part, shape.parts())) << shape.part_bits();
                    (kind_of(cluster, part, at), end.min(within.end))
                }
            };
            match run {
                None => *run = Some((kind, end - at)),
                Some((Kind::Data { at: first }, len)) if kind == (Kind::Data { at: *first + *len }) => {
                    *len += end - at;
                }
                Some((Kind::Zero, len)) if kind == Kind::Zero => *len += end - at,
                Some((Kind::Below, len)) if kind == Kind::Below => *len += end - at,
                // Compressed clusters are unpacked one by one.
                Some(_) => break,
            }
            at = end;
        }
        at - within.start
    }

    fn extent(&self, kind: Kind, len: u64) -> Look<Extent> {
        let pin = || Some(self.metadata.pin());
        Look::Found(match kind {
            Kind::Zero => Extent::Zero { len },
            Kind::Below => Extent::Below { len },
            Kind::Packed => Extent::Packed { len, pin: pin() },
            Kind::Data { at } => {
                // The file's last cluster may be there in part, and an external file may be shorter than the disk: what is
                // missing is zero, as with QEMU. But of a cluster that is not there at all the bytes are lost.
                let there = self.data.size().saturating_sub(at).min(len);
                let (cluster, within) = (self.shape.cluster(), at % self.shape.cluster());
                match there {
                    0 if self.shape.external => Extent::Zero { len },
                    0 if at - within >= self.data.size() => {
                        return Look::Nonsense(format!(
                            "the cluster at byte {} is behind the file's end: it was cut off",
                            at - within
                        ));
                    }
                    0 => Extent::Zero { len: len.min(cluster - within) },
                    there => Extent::Data { at, len: there, pin: pin() },
                }
            }
        })
    }

    /// As `look`, and loads what is missing.
    pub(super) async fn find<T>(&self, look: impl Fn() -> Look<T>) -> Result<T> {
        // What was loaded stays until the look. Tables that are replaced meanwhile stay what they are.
        let _pin = self.metadata.pin();
        let mut loaded: Vec<Loaded> = Vec::new();
        loop {
            match look() {
                Look::Found(found) => return Ok(found),
                Look::Load(entries) => loaded.push(self.tables.load(entries).await?),
                Look::Nonsense(wrong) => return Err(self.health.corrupt(wrong).await),
            }
        }
    }
}

/// What the byte at `at` of a cluster is, which is in this part.
fn kind_of(cluster: Cluster, part: u32, at: u64) -> Kind {
    match (cluster.part(part), cluster.place) {
        (Part::Data, Some(place)) => Kind::Data { at: place.at + at },
        (Part::Zero, _) => Kind::Zero,
        // Data without a place makes no sense, and is no entry that is read.
        (Part::Below, _) | (Part::Data, None) => Kind::Below,
    }
}
