//! What each block of a disk may hold, as a client knows it: what it was told, and what it asked for.
//!
//! A block is 4 KiB. Every one of its sectors names its own place and the generation of the write, so that
//! old, torn, lost and misdirected contents are all told apart.

use anyhow::{Result, ensure};
use std::collections::BTreeMap;
use std::fmt;

pub(crate) const BLOCK: usize = 4096;
const SECTOR: usize = 512;

/// The number of a write: larger is later. Zero is the disk as it was made, all zeroes.
pub(crate) type Generation = u32;

/// What may be found where.
#[derive(Clone)]
pub(crate) struct Model {
    /// What the server said is there.
    settled: Vec<Generation>,
    /// What may be there instead: asked for after that, and failed, or not answered yet.
    open: BTreeMap<usize, Vec<Generation>>,
    filler: Vec<u8>,
}

/// How many blocks were found how.
#[derive(Default, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Found {
    /// Holds exactly what was acknowledged.
    pub(crate) acknowledged: u64,
    /// Never written with success, and unchanged.
    pub(crate) old: u64,
    /// Not acknowledged, and yet (partly) there: allowed.
    pub(crate) new: u64,
    /// Acknowledged and not there, or holds what nobody wrote.
    pub(crate) wrong: u64,
    /// Where the first wrong block lies.
    pub(crate) first_wrong: Option<u64>,
}

impl Found {
    pub(crate) fn add(&mut self, other: Found) {
        self.acknowledged += other.acknowledged;
        self.old += other.old;
        self.new += other.new;
        self.wrong += other.wrong;
        self.first_wrong = self.first_wrong.or(other.first_wrong);
    }

    /// Fails if anything is wrong.
    pub(crate) fn require(&self, when: &str) -> Result<Found> {
        ensure!(self.wrong == 0, "{when}: {self}; the first wrong block is at {:?}", self.first_wrong);
        Ok(*self)
    }
}

impl fmt::Display for Found {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Found { acknowledged, old, new, wrong, .. } = self;
        write!(
            formatter,
            "{acknowledged} blocks as acknowledged, {old} old, {new} unacknowledged but new, {wrong} wrong"
        )
    }
}

impl Model {
    /// A disk of zeroes.
    pub(crate) fn new(size: u64) -> Model {
        let blocks = usize::try_from(size).expect("64 bits") / BLOCK;
        Model { settled: vec![0; blocks], open: BTreeMap::new(), filler: filler() }
    }

    pub(crate) fn blocks(&self) -> usize {
        self.settled.len()
    }

    /// What a write of this generation puts at this place, whole blocks.
    pub(crate) fn contents(&self, at: u64, len: usize, generation: Generation) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        let mut sector = at / SECTOR as u64;
        while bytes.len() < len {
            bytes.extend_from_slice(&self.sector(sector, generation));
            sector += 1;
        }
        bytes
    }

    fn sector(&self, sector: u64, generation: Generation) -> [u8; SECTOR] {
        if generation == 0 {
            return [0; SECTOR];
        }
        let mut bytes = [0; SECTOR];
        // The filler's length is odd in sectors, so that neighbours differ in all their bytes.
        let start = usize::try_from(sector * 61 + u64::from(generation) * 7).expect("64 bits") % SECTOR;
        bytes.copy_from_slice(&self.filler[start..start + SECTOR]);
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&generation.to_le_bytes());
        bytes
    }

    /// A write was sent.
    pub(crate) fn sent(&mut self, at: u64, len: usize, generation: Generation) {
        for block in span(at, len) {
            self.open.entry(block).or_default().push(generation);
        }
    }

    /// The write is there: what was there before, and older attempts, can't come back.
    pub(crate) fn settled(&mut self, at: u64, len: usize, generation: Generation) {
        for block in span(at, len) {
            self.settled[block] = generation;
            if let Some(open) = self.open.get_mut(&block) {
                open.retain(|other| *other > generation);
                if open.is_empty() {
                    self.open.remove(&block);
                }
            }
        }
    }

    /// Whether the server said that this block is there.
    pub(crate) fn is_settled(&self, block: usize) -> bool {
        self.settled[block] != 0
    }

    /// Compares what was read at this place, whole blocks.
    pub(crate) fn check(&self, at: u64, bytes: &[u8]) -> Found {
        let mut found = Found::default();
        for (index, bytes) in bytes.chunks(BLOCK).enumerate() {
            let block = usize::try_from(at).expect("64 bits") / BLOCK + index;
            self.check_block(block, bytes, &mut found);
        }
        found
    }

    fn check_block(&self, block: usize, bytes: &[u8], found: &mut Found) {
        let settled = self.settled[block];
        let open = self.open.get(&block).map(Vec::as_slice).unwrap_or_default();
        let mut is_settled = true;
        for (index, bytes) in bytes.chunks(SECTOR).enumerate() {
            let sector = (block * BLOCK / SECTOR + index) as u64;
            if bytes == self.sector(sector, settled) {
                continue;
            }
            is_settled = false;
            if !open.iter().any(|generation| bytes == self.sector(sector, *generation)) {
                found.wrong += 1;
                found.first_wrong = found.first_wrong.or(Some((block * BLOCK) as u64));
                return;
            }
        }
        match (is_settled, settled) {
            (true, 0) => found.old += 1,
            (true, _) => found.acknowledged += 1,
            (false, _) => found.new += 1,
        }
    }
}

fn span(at: u64, len: usize) -> std::ops::Range<usize> {
    let at = usize::try_from(at).expect("64 bits");
    assert!(at.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK), "the model knows whole blocks");
    at / BLOCK..(at + len) / BLOCK
}

/// Bytes that look random and are the same each time (splitmix64).
fn filler() -> Vec<u8> {
    let mut numbers = Numbers::new(2006);
    std::iter::repeat_with(|| numbers.next().to_le_bytes()).take(2 * SECTOR / 8).flatten().collect()
}

/// Numbers from a seed (splitmix64).
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Numbers {
        Numbers(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ (number >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 4 * BLOCK as u64;

    fn found(model: &Model, bytes: &[u8]) -> (u64, u64, u64, u64) {
        let found = model.check(0, bytes);
        (found.acknowledged, found.old, found.new, found.wrong)
    }

    #[test]
    fn an_acknowledged_block_must_be_there() {
        let mut model = Model::new(SIZE);
        model.sent(0, BLOCK, 1);
        model.settled(0, BLOCK, 1);
        let right = model.contents(0, BLOCK, 1);
        assert_eq!(found(&model, &right), (1, 0, 0, 0));
        assert_eq!(found(&model, &[0; BLOCK]), (0, 0, 0, 1));
    }

    #[test]
    fn a_failed_block_may_be_old_new_or_torn_but_nothing_else() {
        let mut model = Model::new(SIZE);
        model.sent(0, BLOCK, 1);
        let new = model.contents(0, BLOCK, 1);
        let mut torn = new.clone();
        torn[SECTOR..].fill(0);
        assert_eq!(found(&model, &[0; BLOCK]), (0, 1, 0, 0));
        assert_eq!(found(&model, &new), (0, 0, 1, 0));
        assert_eq!(found(&model, &torn), (0, 0, 1, 0));
        assert_eq!(found(&model, &model.contents(SIZE, BLOCK, 1)), (0, 0, 0, 1));
        assert_eq!(found(&model, &model.contents(0, BLOCK, 2)), (0, 0, 0, 1));
    }

    #[test]
    fn a_failed_attempt_does_not_come_back_over_a_later_write() {
        let mut model = Model::new(SIZE);
        model.sent(0, BLOCK, 1);
        model.sent(0, BLOCK, 2);
        model.settled(0, BLOCK, 2);
        assert_eq!(found(&model, &model.contents(0, BLOCK, 1)), (0, 0, 0, 1));
    }
}
