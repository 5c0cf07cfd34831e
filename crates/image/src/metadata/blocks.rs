//! The blocks of an image's metadata that are in memory.

use std::cell::Cell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use slab::Slab;

use super::Stage;

/// Bytes that a block costs besides its words: its record, its place in the index, what the allocator adds.
const BESIDE: usize = 128;

/// A hasher for numbers of blocks: one multiplication (Fibonacci hashing).
#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        let product = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }
}

/// A block in memory.
struct Block {
    number: u64,
    /// In the machine's byte order.
    words: Box<[u64]>,
    stage: Stage,
    /// How many rely on its being here.
    holds: u32,
    /// Changed since it was last written or copied for that.
    is_dirty: bool,
    /// A copy of it is being written.
    is_written: bool,
    /// Used since the hand came by.
    is_used: Cell<bool>,
}

impl Block {
    fn may_go(&self) -> bool {
        self.holds == 0 && !self.is_dirty && !self.is_written
    }
}

/// A copy of a changed block.
pub(super) struct Copy {
    pub(super) number: u64,
    pub(super) stage: Stage,
    /// As they are stored.
    pub(super) bytes: Vec<u8>,
}

/// All of them.
pub(super) struct Blocks {
    /// Bytes of one, a power of two.
    len: usize,
    /// How many there may be before those that may go do.
    most: usize,
    slots: Slab<Block>,
    index: HashMap<u64, usize, BuildHasherDefault<Spread>>,
    /// What was asked for last: neighbours follow each other.
    last: Cell<(u64, usize)>,
    hand: usize,
    dirty: usize,
}

impl Blocks {
    pub(super) fn new(len: usize, budget: usize) -> Blocks {
        let most = (budget / (len + BESIDE)).max(16);
        let (slots, index, last) = (Slab::new(), HashMap::default(), Cell::new((u64::MAX, 0)));
        Blocks { len, most, slots, index, last, hand: 0, dirty: 0 }
    }

    /// Bytes of those that are changed.
    pub(super) fn dirty(&self) -> usize {
        self.dirty * self.len
    }

    /// Bytes of memory for all.
    pub(super) fn memory(&self) -> usize {
        self.slots.len() * (self.len + BESIDE)
    }

    fn find(&self, number: u64) -> Option<usize> {
        let (last, slot) = self.last.get();
        if last == number {
            return Some(slot);
        }
        let slot = *self.index.get(&number)?;
        self.last.set((number, slot));
        Some(slot)
    }

    /// The word at this byte of the file, a multiple of 8.
    pub(super) fn word(&self, at: u64) -> Option<u64> {
        // On the way of each request: no divisions.
        let block = &self.slots[self.find(at >> self.len.trailing_zeros())?];
        if !block.is_used.get() {
            block.is_used.set(true);
        }
        Some(block.words[(at as usize & (self.len - 1)) / 8])
    }

    pub(super) fn contains(&self, number: u64) -> bool {
        self.find(number).is_some()
    }

    /// Takes in a block as it is stored.
    pub(super) fn insert(&mut self, number: u64, bytes: &[u8], stage: Stage) {
        self.make_room();
        let words = bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().expect("8 bytes")));
        let block = Block {
            number,
            words: words.collect(),
            stage,
            holds: 0,
            is_dirty: false,
            is_written: false,
            is_used: Cell::new(false),
        };
        let slot = self.slots.insert(block);
        self.index.insert(number, slot);
    }

    /// The second-chance clock: who was not used since the hand last came by goes.
    fn make_room(&mut self) {
        // Twice around each is without use, if it may go at all.
        let mut steps = 2 * self.slots.len();
        while self.slots.len() >= self.most && steps > 0 {
            steps -= 1;
            self.hand = (self.hand + 1) % self.slots.capacity().max(1);
            let Some(block) = self.slots.get(self.hand) else { continue };
            if block.may_go() && !block.is_used.replace(false) {
                self.remove(self.hand);
            }
        }
    }

    fn remove(&mut self, slot: usize) {
        let block = self.slots.remove(slot);
        self.index.remove(&block.number);
        self.dirty -= usize::from(block.is_dirty);
        self.last.set((u64::MAX, 0));
    }

    /// Keeps a block, which is here, in memory; told again by whoever let go of it.
    pub(super) fn hold(&mut self, number: u64, stage: Stage) {
        let slot = self.find(number).expect("what is held is here");
        let block = &mut self.slots[slot];
        block.holds += 1;
        if !block.is_dirty {
            block.stage = stage;
        }
    }

    pub(super) fn let_go(&mut self, number: u64) {
        if let Some(slot) = self.find(number) {
            let block = &mut self.slots[slot];
            block.holds = block.holds.saturating_sub(1);
        }
    }

    /// Changes a word; gives what it was, and the stage of its block.
    ///
    /// # Panics
    /// If its block is not in memory: who changes it holds it.
    pub(super) fn set(&mut self, at: u64, new: u64) -> (u64, Stage) {
        let slot = self.find(at / self.len as u64).expect("a word that is changed is in memory");
        let block = &mut self.slots[slot];
        let old = std::mem::replace(&mut block.words[at as usize % self.len / 8], new);
        if !block.is_dirty && old != new {
            block.is_dirty = true;
            self.dirty += 1;
        }
        (old, block.stage)
    }

    /// Copies of all that is changed, by stage and place. They count as clean from now on, but stay.
    pub(super) fn copy_dirty(&mut self) -> Vec<Copy> {
        let mut copies = Vec::with_capacity(self.dirty);
        for (_, block) in self.slots.iter_mut().filter(|(_, block)| block.is_dirty) {
            (block.is_dirty, block.is_written) = (false, true);
            let bytes = block.words.iter().flat_map(|word| word.to_be_bytes()).collect();
            copies.push(Copy { number: block.number, stage: block.stage, bytes });
        }
        self.dirty = 0;
        copies.sort_unstable_by_key(|copy| (copy.stage, copy.number));
        copies
    }

    /// A copy is stored, or is not: then its block counts as changed again.
    pub(super) fn written(&mut self, number: u64, is_stored: bool) {
        if let Some(slot) = self.find(number) {
            let block = &mut self.slots[slot];
            block.is_written = false;
            if !is_stored && !block.is_dirty {
                block.is_dirty = true;
                self.dirty += 1;
            }
        }
    }

    /// Drops a block, changed or not.
    pub(super) fn forget(&mut self, number: u64) {
        if let Some(slot) = self.find(number) {
            self.remove(slot);
        }
    }

    /// How many blocks there are.
    pub(super) fn count(&self) -> usize {
        self.slots.len()
    }

    /// The numbers of all.
    pub(super) fn numbers(&self) -> Vec<u64> {
        self.slots.iter().map(|(_, block)| block.number).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(budget: usize) -> Blocks {
        Blocks::new(512, budget)
    }

    #[test]
    fn words_are_big_endian_and_where_the_file_has_them() {
        let mut blocks = blocks(0);
        let mut bytes = vec![0; 512];
        bytes[8..16].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        blocks.insert(3, &bytes, 0);
        assert_eq!(blocks.word(3 * 512 + 8), Some(0x0102_0304_0506_0708));
        assert_eq!((blocks.word(3 * 512), blocks.word(4 * 512)), (Some(0), None));
        assert_eq!(blocks.set(3 * 512, 0xff00), (0, 0));
        bytes[6] = 0xff;
        assert_eq!(blocks.copy_dirty()[0].bytes, bytes);
    }

    #[test]
    fn what_is_used_changed_held_or_being_written_stays() {
        let mut blocks = blocks(16 * 512);
        for number in 0..16 {
            blocks.insert(number, &[0; 512], 2);
        }
        blocks.hold(0, 2);
        blocks.set(512, 7);
        blocks.set(1024, 7);
        assert_eq!(blocks.copy_dirty().len(), 2);
        blocks.set(512, 8);
        for number in 16..200 {
            assert_eq!(blocks.word(3 * 512), Some(0), "it is in use");
            blocks.insert(number, &[0; 512], 2);
        }
        assert!(blocks.slots.len() <= 17, "{}", blocks.slots.len());
        assert!([0, 1, 2, 3].iter().all(|number| blocks.contains(*number)));
        blocks.let_go(0);
        blocks.written(2, true);
        blocks.written(1, true);
        for number in 200..300 {
            blocks.insert(number, &[0; 512], 2);
        }
        assert!(!blocks.contains(0) && !blocks.contains(2));
        assert_eq!(blocks.word(512), Some(8), "it was changed after it was copied");
        assert_eq!(blocks.dirty(), 512);
    }

    #[test]
    fn what_could_not_be_stored_is_changed_again() {
        let mut blocks = blocks(0);
        blocks.insert(1, &[0; 512], 0);
        blocks.insert(2, &[0; 512], 1);
        blocks.set(512, 1);
        blocks.set(1024, 2);
        let order: Vec<_> = blocks.copy_dirty().iter().map(|copy| (copy.stage, copy.number)).collect();
        assert_eq!((order, blocks.dirty()), (vec![(0, 1), (1, 2)], 0));
        blocks.written(1, true);
        blocks.written(2, false);
        assert_eq!(blocks.dirty(), 512);
        blocks.forget(2);
        assert_eq!((blocks.dirty(), blocks.word(1024)), (0, None));
    }
}
