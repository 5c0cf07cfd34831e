//! How wide reference counts are: 1 to 64 bits each, in words of the file.

/// Reference counts of 2 to the power of this many bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Width(u32);

impl Width {
    /// The width of the header's `refcount_order`; that is no more than 6.
    pub(super) fn new(order: u32) -> Width {
        assert!(order <= 6, "the header's order of reference counts was checked when it was read");
        Width(order)
    }

    /// Bits of a count.
    fn bits(self) -> u32 {
        1 << self.0
    }

    /// The largest count.
    pub(super) fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// Counts of a word of 8 bytes.
    pub(super) fn per_word(self) -> u64 {
        64 >> self.0
    }

    /// Counts of a block of so many bytes, a multiple of 8.
    pub(super) fn per_block(self, bytes: u64) -> u64 {
        bytes / 8 * self.per_word()
    }

    /// How far to the left a count is in its word. Counts of a byte or more are in order; those of less begin with the least
    /// significant bits of their byte.
    fn shift(self, index: u64) -> u32 {
        let bit = (index % self.per_word()) as u32 * self.bits();
        if self.bits() >= 8 { 64 - self.bits() - bit } else { (56 - bit / 8 * 8) + bit % 8 }
    }

    /// The count of this index, of which the word has those from a multiple of `per_word` on.
    pub(super) fn get(self, word: u64, index: u64) -> u64 {
        word >> self.shift(index) & self.max()
    }

    /// The larger one of each count of two words.
    pub(super) fn larger(self, one: u64, other: u64) -> u64 {
        let larger = |index| self.get(one, index).max(self.get(other, index));
        (0..self.per_word()).fold(0, |word, index| self.put(word, index, larger(index)))
    }

    /// The word with another count there; it is no more than `max`.
    pub(super) fn put(self, word: u64, index: u64, count: u64) -> u64 {
        debug_assert!(count <= self.max());
        word & !(self.max() << self.shift(index)) | count << self.shift(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts in bytes as the specification has them, written down apart.
    fn bytes(order: u32, counts: &[u64]) -> [u8; 8] {
        let bits = 1_usize << order;
        let mut bytes = [0; 8];
        for (index, count) in counts.iter().enumerate() {
            if bits < 8 {
                bytes[index * bits / 8] |= (*count as u8) << (index * bits % 8);
            } else {
                let len = bits / 8;
                bytes[index * len..(index + 1) * len].copy_from_slice(&count.to_be_bytes()[8 - len..]);
            }
        }
        bytes
    }

    #[test]
    fn counts_of_all_widths_are_where_the_specification_has_them() {
        for order in 0..=6 {
            let width = Width::new(order);
            assert_eq!(width.per_word(), 64 >> order);
            assert_eq!(width.per_block(512), 4096 >> order);
            let counts: Vec<u64> = (0..width.per_word())
                .map(|index| index.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(7) & width.max())
                .collect();
            let word = u64::from_be_bytes(bytes(order, &counts));
            let mut copy = !word;
            for (index, count) in counts.iter().enumerate() {
                assert_eq!(width.get(word, index as u64), *count, "{order} {index}");
                // The index counts on from word to word.
                assert_eq!(width.get(word, index as u64 + 3 * width.per_word()), *count);
                copy = width.put(copy, index as u64, *count);
            }
            assert_eq!(copy, word);
        }
        assert_eq!((Width::new(0).max(), Width::new(4).max(), Width::new(6).max()), (1, 65535, u64::MAX));
    }
}
