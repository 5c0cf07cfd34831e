//! Warnings about clients: a bounded number of them, since clients decide how often there is a reason.

use std::cell::Cell;
use std::time::Duration;

use runtime::Instant;

/// So many warnings are given in [`TIME`]; the others are counted.
const COUNT_MAX: u32 = 10;
const TIME: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(crate) struct Complaints {
    since: Cell<Instant>,
    said: Cell<u32>,
    kept: Cell<u64>,
}

impl Complaints {
    /// Whether one more warning may be given now. If so, how many were kept back since the last one.
    pub(crate) fn admit(&self, now: Instant) -> Option<u64> {
        if now.since(self.since.get()) > TIME {
            self.since.set(now);
            self.said.set(0);
        }
        if self.said.get() == COUNT_MAX {
            self.kept.set(self.kept.get() + 1);
            return None;
        }
        self.said.set(self.said.get() + 1);
        Some(self.kept.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted_and_told_later() {
        let complaints = Complaints::default();
        let now = Instant::default();
        let given: Vec<_> = (0..1000).filter_map(|_| complaints.admit(now)).collect();
        assert_eq!(given, [0; 10]);
        assert_eq!(complaints.admit(now.after(TIME)), None);
        assert_eq!(complaints.admit(now.after(Duration::from_secs(11))), Some(991));
        assert_eq!(complaints.admit(now.after(Duration::from_secs(11))), Some(0));
    }
}
