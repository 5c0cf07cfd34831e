//! A larger disk while it is used.
//!
//! What is added reads as zero, whatever another program has left behind the end of the disk: in the rest of its last cluster, in
//! entries of clusters beyond, in a data file that is longer than the disk.

use block::{Buf, Errno, Error, Result, Span};
use storage::Zeroing;

use super::image::Qcow2;
use super::refcount::span;
use crate::{Extent, Placement};

/// Where the header has the disk's size.
const SIZE_AT: u64 = 24;
/// Disks have whole sectors: QEMU shows no part of one.
const SECTOR: u64 = 512;

impl Qcow2 {
    /// Makes the disk so many bytes large, rounded up to whole sectors, as far as its L1 table reaches.
    pub(super) async fn enlarge(&self, bytes: u64) -> Result<()> {
        self.health.check()?;
        let size = self.size.get();
        if bytes == size {
            return Ok(());
        }
        let refuse = |why: &str| {
            Error::new(
                Errno::EOPNOTSUPP,
                format!(
                    "make the qcow2 disk of {size} bytes one of {bytes} while it is used: {why}; tapdisk resize does it"
                ),
            )
        };
        if bytes < size {
            return Err(refuse("it would shrink"));
        }
        let most = self.tables.capacity().min(i64::MAX as u64);
        let Some(bytes) = bytes.checked_next_multiple_of(SECTOR).filter(|bytes| *bytes <= most) else {
            return Err(refuse("its L1 table is too small"));
        };
        if self.has_backing {
            return Err(refuse("what is below it may be larger than it is"));
        }
        self.clear_clusters(size, bytes)
            .await
            .map_err(|error| error.during("clear what is beyond the disk"))?;
        let end = size.next_multiple_of(self.shape.cluster()).min(bytes);
        if size < end {
            let rest = span(size, end - size)?;
            self.clear_tail(rest)
                .await
                .map_err(|error| error.during("clear what is behind the disk's end"))?;
        }
        if self.raw_data {
            let beyond = span(size, self.data.size().clamp(size, bytes) - size)?;
            if !beyond.is_empty() {
                self.data.zero(beyond, Zeroing { unmap: true, fast: false }).await?;
            }
            self.lengthen_data(bytes).await?;
        }
        // All of it is so for good before it can be seen.
        self.metadata.flush().await?;
        self.metadata.write_through(SIZE_AT, &bytes.to_be_bytes()).await?;
        self.metadata.sync().await?;
        self.size.set(bytes);
        Ok(())
    }

    /// Takes out what the tables have between the last cluster of a disk of `size` bytes and byte `end`.
    async fn clear_clusters(&self, size: u64, end: u64) -> Result<()> {
        let cluster = self.shape.cluster();
        // The capacity is a multiple of a cluster, so that rounding up does not leave it.
        let (mut at, end) = (size.div_ceil(cluster) * cluster, end.div_ceil(cluster) * cluster);
        let tables = end.div_ceil(self.tables.reach()) as usize;
        while at < end && !self.raw_data {
            let table = (at / self.tables.reach()) as usize;
            let used = self.tables.next_table(table, tables);
            if used > table {
                at = (used as u64).saturating_mul(self.tables.reach()).min(end);
                continue;
            }
            at += self.clear_some(span(at, end - at)?).await?;
        }
        Ok(())
    }

    /// Makes the rest of the last cluster zero, if anything is there: in its place, or in a new one where others have it too.
    async fn clear_tail(&self, tail: Span) -> Result<()> {
        let mut rest = tail;
        while !rest.is_empty() {
            let len = match self.find(|| self.look(rest)).await? {
                Extent::Zero { len } | Extent::Below { len } => len,
                // What it is now is not looked at: no guest writes there yet.
                Extent::Data { len, .. } | Extent::Packed { len, .. } => {
                    let piece = rest.split_at(rest.at() + len).0;
                    let placement = self.find_place(piece).await?;
                    let len = placement.len;
                    match self.fill_with_zeroes(piece.at(), &placement).await {
                        Ok(()) => self.publish(placement).await?,
                        Err(error) => {
                            self.give_up_place(placement);
                            return Err(error);
                        }
                    }
                    len
                }
            };
            rest = rest.split_at(rest.at() + len).1;
        }
        Ok(())
    }

    /// Writes zeroes to a place for the disk's bytes from `at` on, and brings those before them, which the disk shows.
    async fn fill_with_zeroes(&self, at: u64, placement: &Placement) -> Result<()> {
        let &Placement { at: place, len, before, after, blank: _, .. } = placement;
        if before > 0 {
            let bytes = Buf::zeroed(before as usize);
            self.unpack_bytes(at - before, bytes.clone()).await?;
            self.data.write(place - before, bytes).await?;
        }
        self.data.zero(span(place, len + after)?, Zeroing { unmap: false, fast: false }).await
    }
}
