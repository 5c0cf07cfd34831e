//! What a check of an image finds.

use serde::Serialize;

/// How many findings are told one by one.
const NOTES_MAX: usize = 100;

/// What a check may change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    #[default]
    No,
    /// It gives back space that nothing uses.
    Leaks,
    /// It also makes the image consistent, at the cost of what makes no sense in it.
    All,
}

/// What was found, and put right. Numbers count clusters (blocks, for VHD) unless they say otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// What could lose data or show wrong bytes, and is still so.
    pub corruptions: u64,
    /// Space that nothing uses, still so.
    pub leaks: u64,
    /// Corruptions that were put right.
    pub corruptions_fixed: u64,
    /// Leaks that were given back.
    pub leaks_fixed: u64,
    /// Parts that could not be checked, since reading them failed.
    pub check_errors: u64,
    /// Units of the disk.
    pub total_clusters: u64,
    /// Of these, with a place of their own.
    pub allocated_clusters: u64,
    /// Of these, not right behind the one before.
    pub fragmented_clusters: u64,
    /// Of these, compressed.
    pub compressed_clusters: u64,
    /// Byte after the last one in use.
    pub image_end_offset: u64,
    /// The first findings, in words.
    pub notes: Vec<String>,
}

impl Report {
    /// Whether there is nothing left to put right.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }

    /// Whether at most space is wasted.
    pub fn is_safe(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }

    /// Notes a finding in words, unless there are too many already.
    pub fn note(&mut self, finding: impl FnOnce() -> String) {
        if self.notes.len() < NOTES_MAX {
            self.notes.push(finding());
        }
    }
}
