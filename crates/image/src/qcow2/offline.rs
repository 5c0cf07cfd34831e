//! A change of the tables of an image that nobody has open: from a sound image to a sound image by one write of the header.
//!
//! New tables are written to free clusters, what they refer to is counted, then the header switches to them, and what was left
//! behind is given back. An interruption before the switch leaves the old image, one after it the new one, both with leaks at
//! most. While counts and marks are changed the image is marked as dirty (from version 3 on), so that whoever opens it next puts
//! them right.

use std::rc::Rc;

use storage::Storage;

use crate::{ImageError, Repair};

use super::check::{Plan, check, claim, free_run, settle, unmark};
use super::header::{Header, incompatible};
use super::{bytes, check::Root};

/// A change under way.
pub(super) struct Change<'a> {
    pub(super) file: &'a Rc<dyn Storage>,
    pub(super) header: Header,
    plan: Plan,
    /// Clusters of new tables: taken, though not counted yet.
    taken: Vec<std::ops::Range<u64>>,
}

impl<'a> Change<'a> {
    /// Begins one: the image is sound, and what others wrote half is repaired.
    ///
    /// # Errors
    /// It is not sound, or the storage failed.
    pub(super) async fn begin(file: &'a Rc<dyn Storage>) -> Result<Change<'a>, ImageError> {
        let header = Header::read(file).await?;
        let repair = if header.is_dirty() && !header.is_corrupt() { Repair::All } else { Repair::No };
        let report = check(file, repair).await?;
        if header.is_corrupt() || !report.is_safe() {
            return Err(ImageError::Invalid(format!(
                "this qcow2 image has {} faults, so it is not changed; tapdisk check shows and repairs them",
                report.corruptions + report.check_errors
            )));
        }
        let header = Header::read(file).await?;
        Ok(Change { file, header, plan: Plan::default(), taken: Vec::new() })
    }

    /// Writes a new table to free clusters, with zeroes up to the end of the last one; gives its first byte. An empty one is at 0.
    ///
    /// # Errors
    /// The storage's.
    async fn write(&mut self, table: &[u8]) -> Result<u64, ImageError> {
        if table.is_empty() {
            return Ok(0);
        }
        let cluster = self.header.cluster_size();
        let clusters = (table.len() as u64).div_ceil(cluster);
        let first = free_run(self.file, &self.header, clusters, &self.taken).await?;
        self.taken.push(first..first + clusters);
        let mut bytes = table.to_vec();
        bytes.resize((clusters * cluster) as usize, 0);
        bytes::write(self.file, first * cluster, &bytes).await?;
        Ok(first * cluster)
    }

    /// Writes a new table that refers to nothing.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn plain_table(&mut self, table: &[u8]) -> Result<u64, ImageError> {
        let at = self.write(table).await?;
        self.plan.spans.push((at, table.len() as u64));
        Ok(at)
    }

    /// Writes a new L1 table; what it leads to is counted for it.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn l1_table(&mut self, entries: &[u64]) -> Result<u64, ImageError> {
        let at = self.write(&bytes_of(entries)).await?;
        self.plan.roots.push(Root { at, entries: entries.len() as u64 });
        Ok(at)
    }

    /// Writes a new L2 table; what it leads to is counted for it.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn l2_table(&mut self, table: &[u8]) -> Result<u64, ImageError> {
        let at = self.write(table).await?;
        self.plan.tables.push(at);
        Ok(at)
    }

    /// Counts the new tables and what they lead to, and takes away the marks of what is no longer referred to once, in the active
    /// tables and the new ones. From now on the header may switch to them.
    ///
    /// # Errors
    /// A count would be too large for its bits, or the storage failed; the image is as it was, but for leaks.
    pub(super) async fn count(&mut self) -> Result<(), ImageError> {
        self.file.flush().await?;
        self.set_dirty(true).await?;
        if let Err(error) = claim(self.file, &mut self.header, &self.plan).await {
            if matches!(error, ImageError::Refused(_)) {
                self.set_dirty(false).await?;
            }
            return Err(error);
        }
        unmark(self.file, &self.header, &self.plan).await?;
        Ok(())
    }

    /// Says that the active tables lead to the new ones.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn publish(&mut self) -> Result<(), ImageError> {
        self.file.flush().await?;
        self.plan = Plan::default();
        Ok(())
    }

    /// Switches to what `header` says now.
    ///
    /// # Errors
    /// The storage's; the header is the old or the new one.
    pub(super) async fn switch(&mut self) -> Result<(), ImageError> {
        self.file.flush().await?;
        self.header.write_fields(self.file).await?;
        self.publish().await
    }

    /// Gives back what nothing refers to any more. The change is complete.
    ///
    /// # Errors
    /// The storage's; the change has happened, and a check gives back what leaks.
    pub(super) async fn end(mut self) -> Result<(), ImageError> {
        settle(self.file, &self.header).await?;
        self.set_dirty(false).await
    }

    async fn set_dirty(&mut self, dirty: bool) -> Result<(), ImageError> {
        if self.header.version == 2 || self.header.is_dirty() == dirty {
            return Ok(());
        }
        self.header.incompatible ^= incompatible::DIRTY;
        self.header.write_fields(self.file).await?;
        self.file.flush().await?;
        Ok(())
    }
}

/// The bytes of a table of 8-byte numbers.
pub(super) fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// Reads a table of 8-byte numbers.
///
/// # Errors
/// The storage's.
pub(super) async fn read_table(file: &Rc<dyn Storage>, at: u64, entries: u64) -> block::Result<Vec<u64>> {
    // No more than 32 MiB: the header was checked.
    let bytes = bytes::read(file, at, entries as usize * 8).await?;
    Ok(bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().expect("eight bytes"))).collect())
}
