//! Making a qcow disk larger: where it takes a larger L1 table, that gets a new place.

use block::{Errno, Error, Result, Span};
use storage::Zeroing;

use super::entry::{Entry, Geometry};
use super::header::{L1_AT, SECTOR, SIZE_AT};
use super::{POINTERS, Qcow};

/// blktap knows its own images by an L1 table at a multiple of this.
const L1_ALIGN: u64 = 4096;
/// Bytes of a table that are copied at a time.
const PIECE: u64 = 64 << 10;
/// More entries than any L1 table has.
const ALL: u64 = 1 << 32;

impl Qcow {
    /// See [`Image::resize`](crate::Image::resize). The new table is durable before the header leads to it, and one sector
    /// with both the size and the table's place makes it so: whatever happens, the image has one of the two sizes.
    pub(super) async fn resize_to(&self, bytes: u64) -> Result<()> {
        self.may_change()?;
        let refused = |doing| Err(Error::new(Errno::EOPNOTSUPP, doing));
        let large = || Error::new(Errno::EFBIG, format!("make a qcow disk of {bytes} bytes"));
        let size = bytes.checked_next_multiple_of(SECTOR).ok_or_else(large)?;
        if size < self.size.get() {
            return refused("make a qcow disk smaller: convert it to a new image of that size");
        }
        if self.has_backing && size > self.size.get() {
            return refused(
                "make a qcow disk with a backing file larger, where that one could show: convert it to an image of its own",
            );
        }
        // First of all what stands before tables in all other operations.
        let cluster = self.geometry.get().cluster();
        let last = (self.size.get() - 1) / cluster;
        let _last = self.clusters.lock(last..last + 1).await;
        let _tables = self.tables.lock(0..ALL).await;
        let (old, old_size) = (self.geometry.get(), self.size.get());
        let found = Geometry::new(old.cluster_bits, old.l2_bits, size, old.l1_at).ok_or_else(large)?;
        if size <= old_size {
            return Ok(());
        }
        self.clear_beyond(old_size).await?;
        let _header = self.metadata.load(Span::new(0, L1_AT + 8).expect("small"), POINTERS).await?;
        if found.l1_entries == old.l1_entries {
            self.metadata.set(&[(SIZE_AT, size)]);
            self.size.set(size);
            return self.metadata.flush().await;
        }
        let l1_at = self.copy_table(found.l1_entries * 8).await?;
        self.metadata.set(&[(SIZE_AT, size), (L1_AT, l1_at)]);
        self.geometry.set(Geometry { l1_at, l1_entries: found.l1_entries, ..old });
        self.size.set(size);
        self.metadata.flush().await?;
        let behind_header = old.header_len.next_multiple_of(cluster);
        let unused = old.l1_span().split_at(behind_header).1;
        self.metadata.forget(unused);
        if !unused.is_empty()
            && let Err(error) = self.file.zero(unused, Zeroing { unmap: true, fast: false }).await
        {
            tracing::warn!(%error, "the space of the former L1 table cannot be given back: a check finds it");
        }
        Ok(())
    }

    /// Makes zero what the image has beyond the disk's end, which is about to show: in the last cluster, and in the entries
    /// of the last L2 table.
    async fn clear_beyond(&self, size: u64) -> Result<()> {
        let geometry = self.geometry.get();
        let (last, used) = ((size - 1) >> geometry.cluster_bits, size % geometry.cluster());
        let table_first = geometry.l1_word(last).1;
        let table_end = table_first + (1 << geometry.l2_bits);
        let rest = Span::new(last << geometry.cluster_bits, (table_end - last) << geometry.cluster_bits);
        let _loaded =
            self.load(rest.ok_or_else(|| Error::new(Errno::EFBIG, "reach the end of a table"))?).await?;
        let Some(table) = self.table(last).expect("its block was just loaded")? else { return Ok(()) };
        let word = |cluster: u64| {
            let at = table + (cluster - table_first) * 8;
            (at, self.metadata.word(at).expect("its block was just loaded"))
        };
        let beyond: Vec<(u64, u64)> =
            (last + 1..table_end).map(word).filter(|(_, entry)| *entry != 0).map(|(at, _)| (at, 0)).collect();
        if !beyond.is_empty() {
            self.metadata.set(&beyond);
            self.metadata.flush().await?;
        }
        if used == 0 {
            return Ok(());
        }
        let entry = word(last).1;
        match geometry.entry(entry, self.file.size()).map_err(|what| self.nonsense(what, last))? {
            Entry::Empty => Ok(()),
            Entry::Data(at) => {
                let place = Span::new(at, geometry.cluster()).expect("within the file");
                let (there, _) = place.split_at(self.file.size());
                let tail = there.split_at(at + used).1;
                if tail.is_empty() {
                    return Ok(());
                }
                self.file.zero(tail, Zeroing { unmap: false, fast: false }).await
            }
            Entry::Packed(packed) => {
                let content = self.inflate(entry, packed).await?;
                match content.iter().skip(used as usize).all(|byte| *byte == 0) {
                    true => Ok(()),
                    false => Err(Error::new(
                        Errno::EIO,
                        "make a qcow disk larger whose last cluster, a compressed one, has bytes beyond its end",
                    )),
                }
            }
        }
    }

    /// Writes the L1 table once more, `len` bytes of it, and gives its new place.
    async fn copy_table(&self, len: u64) -> Result<u64> {
        let old = self.geometry.get();
        let room = len.next_multiple_of(L1_ALIGN).next_multiple_of(old.cluster()) + L1_ALIGN;
        let place = self.take(room).await?;
        let at = place.at.next_multiple_of(L1_ALIGN);
        let copied = async {
            let mut done = 0;
            while done < len {
                let piece =
                    Span::new(old.l1_at + done, PIECE.min(len - done)).expect("a table of 2 GiB at most");
                let there = piece.split_at(old.l1_span().end()).0;
                let _loaded = match there.is_empty() {
                    false => Some(self.metadata.load(there, POINTERS).await?),
                    true => None,
                };
                let words = (0..there.len() / 8).map(|nth| self.metadata.word(there.at() + nth * 8));
                let mut bytes: Vec<u8> =
                    words.flat_map(|word| word.expect("its block was just loaded").to_be_bytes()).collect();
                bytes.resize(piece.len() as usize, 0);
                self.metadata.write_through(at + done, &bytes).await?;
                done += piece.len();
            }
            Ok(())
        };
        copied.await.inspect_err(|_: &Error| self.space.give_back(place.at, room)).map(|()| at)
    }
}
