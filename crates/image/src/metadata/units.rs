//! Locks on units of a disk, such as clusters: whoever gives one its place does so alone.

use std::ops::Range;

use block::Span;
use storage::{Access, RangeGuard, RangeLocks};

/// The locks of one image.
#[derive(Clone, Default)]
pub struct Units(RangeLocks);

impl Units {
    /// Waits until nobody else has any of these units, which are numbered from 0; first come, first served.
    ///
    /// # Panics
    /// If there is none: an empty range locks nothing.
    pub async fn lock(&self, units: Range<u64>) -> RangeGuard {
        assert!(units.start < units.end, "at least one unit");
        let span = Span::new(units.start, units.end - units.start).expect("units are fewer than bytes");
        self.0.lock(span, Access::Exclusive).await
    }
}
