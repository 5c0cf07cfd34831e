//! References to clusters of a file, counted in bounded memory: as many of the first clusters at a time as it has room for.
//!
//! Whoever counts does it anew for each window. Most images need one.

use std::collections::BTreeMap;
use std::ops::Range;

/// Clusters whose counts are kept together.
const CHUNK: u64 = 512;

/// Counts of references. What lies outside of its window is not counted.
pub(super) struct Counter {
    window: Range<u64>,
    /// Windows end at multiples of this.
    unit: u64,
    chunks: BTreeMap<u64, Box<[u32]>>,
    chunks_max: usize,
}

impl Counter {
    /// All zero, with room for about `bytes` of counts. A window ends at a multiple of `unit`, a power of two; the room is enough
    /// for more than that.
    pub(super) fn new(unit: u64, bytes: usize) -> Counter {
        let unit = unit.max(CHUNK);
        let chunks_max = (bytes / (CHUNK as usize * 4)).max(2 * (unit / CHUNK) as usize);
        Counter { window: 0..u64::MAX, unit, chunks: BTreeMap::new(), chunks_max }
    }

    /// The clusters whose counts it has. Its end comes closer while there is too much to count.
    pub(super) fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// Adds this many references to a cluster.
    pub(super) fn add(&mut self, cluster: u64, times: u64) {
        if !self.window.contains(&cluster) || times == 0 {
            return;
        }
        let chunk = self.chunks.entry(cluster / CHUNK).or_insert_with(|| vec![0; CHUNK as usize].into());
        if let Some(count) = chunk.get_mut((cluster % CHUNK) as usize) {
            *count = count.saturating_add(u32::try_from(times).unwrap_or(u32::MAX));
        }
        while self.chunks.len() > self.chunks_max {
            let Some(last) = self.chunks.keys().next_back().copied() else { break };
            self.window.end = last * CHUNK / self.unit * self.unit;
            self.chunks.split_off(&(self.window.end / CHUNK));
        }
    }

    /// References to a cluster of the window.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        self.chunks
            .get(&(cluster / CHUNK))
            .and_then(|chunk| chunk.get((cluster % CHUNK) as usize))
            .map_or(0, |n| (*n).into())
    }

    /// The counts of a few clusters from this one on, at least one and as many as lie together; `None` for zeroes.
    pub(super) fn run(&self, cluster: u64) -> (u64, Option<&[u32]>) {
        let from = cluster % CHUNK;
        let counts = self.chunks.get(&(cluster / CHUNK)).and_then(|chunk| chunk.get(from as usize..));
        (CHUNK - from, counts)
    }

    /// Whether some cluster of these has a reference.
    pub(super) fn any(&self, clusters: Range<u64>) -> bool {
        self.used_from(clusters.start).next().is_some_and(|(cluster, _)| cluster < clusters.end)
    }

    /// The clusters that have references, rising, with their counts.
    pub(super) fn used(&self) -> impl Iterator<Item = (u64, u64)> {
        self.used_from(0)
    }

    /// Those from this one on.
    pub(super) fn used_from(&self, from: u64) -> impl Iterator<Item = (u64, u64)> {
        let chunks = self.chunks.range(from / CHUNK..);
        chunks
            .flat_map(|(chunk, counts)| (chunk * CHUNK..).zip(counts.iter()))
            .filter(move |(cluster, count)| *cluster >= from && **count > 0)
            .map(|(cluster, count)| (cluster, u64::from(*count)))
    }

    /// The last cluster that has references.
    pub(super) fn last(&self) -> Option<u64> {
        let (chunk, counts) = self.chunks.last_key_value()?;
        counts.iter().rposition(|count| *count > 0).map(|index| chunk * CHUNK + index as u64)
    }

    /// Goes on to the next window, in which all is to be counted anew; false where there is none.
    pub(super) fn advance(&mut self) -> bool {
        self.chunks.clear();
        self.window = self.window.end..u64::MAX;
        self.window.start < u64::MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_together_count_all_in_little_memory() {
        let mut random = storage::conformance::Random(3);
        let references: Vec<u64> =
            (0..3000).map(|number| random.below([1 << 12, 1 << 20, 1 << 50][number % 3])).collect();
        let mut expected = BTreeMap::new();
        for cluster in &references {
            *expected.entry(*cluster).or_insert(0) += 3_u64;
        }
        let mut counter = Counter::new(1024, 0);
        let (mut found, mut windows) = (BTreeMap::new(), 0);
        loop {
            for cluster in &references {
                counter.add(*cluster, 3);
                assert!(counter.chunks.len() <= 4);
            }
            windows += 1;
            let window = counter.window();
            assert!(
                window.start.is_multiple_of(1024)
                    && (window.end.is_multiple_of(1024) || window.end == u64::MAX)
            );
            for (cluster, count) in counter.used() {
                assert!(window.contains(&cluster) && counter.get(cluster) == count);
                assert!(counter.any(cluster..cluster + 1));
                assert!(found.insert(cluster, count).is_none());
            }
            if !counter.advance() {
                break;
            }
        }
        assert!(windows > 100, "{windows}");
        assert_eq!(found, expected);
        assert!(!counter.any(0..u64::MAX));
    }

    #[test]
    fn counts_do_not_wrap_around() {
        let mut counter = Counter::new(1, 1 << 20);
        counter.add(7, u64::MAX);
        counter.add(7, 1);
        assert_eq!(counter.get(7), u64::from(u32::MAX));
        assert_eq!(counter.run(6).1.map(|counts| counts[1]), Some(u32::MAX));
        assert_eq!(counter.run(600), (CHUNK * 2 - 600, None));
    }
}
