//! Clusters of the file that are known to be free.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Runs that are remembered; of more, those that come last are forgotten until the image is opened again.
const RUNS_MAX: usize = 1 << 16;

/// Runs of free clusters, by place and by length.
#[derive(Default)]
pub(super) struct Free {
    /// First cluster of each: how many, and whether they read as zero.
    runs: BTreeMap<u64, (u64, bool)>,
    by_len: BTreeSet<(u64, u64)>,
}

/// Free clusters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Their numbers.
    pub(super) clusters: Range<u64>,
    /// Whether they read as zero.
    pub(super) blank: bool,
}

impl Free {
    /// Whether no more runs can be remembered.
    pub(super) fn is_full(&self) -> bool {
        self.runs.len() >= RUNS_MAX
    }

    fn put(&mut self, start: u64, len: u64, blank: bool) {
        self.runs.insert(start, (len, blank));
        self.by_len.insert((len, start));
    }

    fn remove(&mut self, start: u64) -> Option<(u64, bool)> {
        let (len, blank) = self.runs.remove(&start)?;
        self.by_len.remove(&(len, start));
        Some((len, blank))
    }

    /// Adds clusters, of which none is in it.
    pub(super) fn add(&mut self, run: Run) {
        let Run { clusters, blank } = run;
        let (mut start, mut end) = (clusters.start, clusters.end);
        if start >= end {
            return;
        }
        let before = self.runs.range(..start).next_back().map(|(at, (len, blank))| (*at, *len, *blank));
        if let Some((at, len, is_blank)) = before
            && at + len == start
            && is_blank == blank
        {
            self.remove(at);
            start = at;
        }
        if let Some(&(len, is_blank)) = self.runs.get(&end)
            && is_blank == blank
        {
            self.remove(end);
            end += len;
        }
        if !self.is_full() {
            self.put(start, end - start, blank);
        }
    }

    /// Adds clusters of which some may be in it already.
    pub(super) fn add_found(&mut self, clusters: Range<u64>) {
        let mut at = clusters.start;
        while at < clusters.end {
            let before = self.runs.range(..=at).next_back().map(|(start, (len, _))| start + len);
            if let Some(end) = before.filter(|end| *end > at) {
                at = end;
                continue;
            }
            let next = self.runs.range(at..).next().map_or(u64::MAX, |(start, _)| *start);
            let end = clusters.end.min(next);
            self.add(Run { clusters: at..end, blank: false });
            at = end;
        }
    }

    /// Takes these clusters out, as far as they are in it.
    pub(super) fn take_out(&mut self, clusters: Range<u64>) {
        loop {
            let last = self.runs.range(..clusters.end).next_back();
            let Some((start, end)) =
                last.map(|(start, (len, _))| (*start, start + len)).filter(|(_, end)| *end > clusters.start)
            else {
                return;
            };
            let Some((_, blank)) = self.remove(start) else { return };
            self.add(Run { clusters: clusters.end..end, blank });
            self.add(Run { clusters: start..clusters.start, blank });
        }
    }

    /// Takes clusters in a row: `most` if there are so many, else as many as there are, but no fewer than `least`.
    pub(super) fn take(&mut self, most: u64, least: u64) -> Option<Run> {
        let fitting = self.by_len.range((most, 0)..).next();
        let &(len, start) = fitting.or_else(|| self.by_len.last().filter(|(len, _)| *len >= least))?;
        let (_, blank) = self.remove(start)?;
        let taken = len.min(most);
        if len > taken {
            self.put(start + taken, len - taken, blank);
        }
        Some(Run { clusters: start..start + taken, blank })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(clusters: Range<u64>, blank: bool) -> Run {
        Run { clusters, blank }
    }

    #[test]
    fn the_smallest_run_that_suffices_is_taken_else_the_largest() {
        let mut free = Free::default();
        [2..4, 10..20, 30..34].into_iter().for_each(|clusters| free.add(run(clusters, false)));
        assert_eq!(free.take(3, 3), Some(run(30..33, false)));
        assert_eq!(free.take(1, 1), Some(run(33..34, false)));
        assert_eq!(free.take(50, 20), None);
        assert_eq!(free.take(50, 10), Some(run(10..20, false)));
        assert_eq!(free.take(1, 1), Some(run(2..3, false)));
        assert_eq!((free.take(5, 1), free.take(1, 1)), (Some(run(3..4, false)), None));
    }

    #[test]
    fn neighbours_become_one_run_if_they_are_alike() {
        let mut free = Free::default();
        free.add(run(2..4, true));
        free.add(run(6..8, true));
        free.add(run(8..9, false));
        free.add(run(4..6, true));
        assert_eq!(free.take(7, 6), Some(run(2..8, true)));
        assert_eq!(free.take(7, 1), Some(run(8..9, false)));
    }

    #[test]
    fn what_is_taken_out_is_not_in_it() {
        let mut free = Free::default();
        [2..4, 10..20, 30..34].into_iter().for_each(|clusters| free.add(run(clusters, true)));
        free.take_out(3..12);
        free.take_out(14..15);
        free.take_out(33..50);
        let left: Vec<_> = free.runs.iter().map(|(start, (len, _))| (*start, *len)).collect();
        assert_eq!(left, [(2, 1), (12, 2), (15, 5), (30, 3)]);
        assert_eq!(free.by_len.len(), 4);
    }

    #[test]
    fn what_is_found_again_is_there_once() {
        let mut random = storage::conformance::Random(3);
        for _ in 0..200 {
            let (mut free, mut model) = (Free::default(), BTreeSet::new());
            for _ in 0..30 {
                let start = random.below(100);
                let found = start..start + random.below(20);
                model.extend(found.clone());
                free.add_found(found);
            }
            let mut count = 0;
            while let Some(run) = free.take(1 + random.below(5), 1) {
                count += run.clusters.end - run.clusters.start;
                run.clusters.for_each(|cluster| assert!(model.remove(&cluster)));
            }
            assert!(count > 0 && model.is_empty());
        }
    }
}
