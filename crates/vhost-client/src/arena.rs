//! Who has which bytes of a region: pieces are handed out and come back.

use std::collections::BTreeMap;

/// Bytes of a region that nobody has.
#[derive(Debug)]
pub(crate) struct Arena {
    /// Where each free run begins, and how long it is. No two of them touch.
    free: BTreeMap<u64, u64>,
}

impl Arena {
    /// All from `at` on, so many bytes.
    pub(crate) fn new(at: u64, len: u64) -> Arena {
        Arena { free: BTreeMap::from([(at, len)]) }
    }

    /// So many bytes that begin `skew` bytes behind a multiple of `align`.
    pub(crate) fn take(&mut self, len: u64, align: u64, skew: u64) -> Option<u64> {
        let (run, run_len, at) = self.free.iter().find_map(|(run, run_len)| {
            let at = run.next_multiple_of(align) + skew;
            (at + len <= run + run_len).then_some((*run, *run_len, at))
        })?;
        self.free.remove(&run);
        if at > run {
            self.free.insert(run, at - run);
        }
        let (end, run_end) = (at + len, run + run_len);
        if run_end > end {
            self.free.insert(end, run_end - end);
        }
        Some(at)
    }

    /// Takes back what was handed out.
    pub(crate) fn give_back(&mut self, mut at: u64, mut len: u64) {
        if let Some((before, before_len)) = self.free.range(..at).next_back().map(|(at, len)| (*at, *len))
            && before + before_len == at
        {
            self.free.remove(&before);
            (at, len) = (before, before_len + len);
        }
        if let Some(behind_len) = self.free.remove(&(at + len)) {
            len += behind_len;
        }
        self.free.insert(at, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_back_can_be_handed_out_as_one() {
        let mut arena = Arena::new(64, 4096);
        let places: Vec<u64> = (0..4).map(|_| arena.take(1000, 8, 3).unwrap()).collect();
        assert!(places.windows(2).all(|pair| pair[0] + 1000 <= pair[1]));
        assert!(places.iter().all(|at| at % 8 == 3));
        assert_eq!(arena.take(1000, 8, 0), None);
        for place in [2, 0, 3, 1] {
            arena.give_back(places[place], 1000);
        }
        assert_eq!(arena.take(4096, 64, 0), Some(64));
    }
}
