//! Reference counts as they stand in a refcount block: numbers of 1 to 64 bits, side by side.

/// The count number `index` of a block whose counts have 2^`order` bits. Beyond its end there are none: 0.
#[cfg(test)]
pub(super) fn get(block: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        // The first of a byte is in its lowest bits.
        let bits = 1 << order;
        let byte = block.get(index >> (3 - order)).copied().unwrap_or(0);
        let shift = (index % (8 >> order)) << order;
        return u64::from(byte >> shift) & ((1 << bits) - 1);
    }
    let len = 1 << (order - 3);
    let bytes = block.chunks_exact(len).nth(index).unwrap_or_default();
    bytes.iter().fold(0, |count, byte| count << 8 | u64::from(*byte))
}

/// Sets it. Bits of `count` that it has no room for are lost: the caller has checked.
pub(super) fn set(block: &mut [u8], order: u32, index: usize, count: u64) {
    if order < 3 {
        let mask = ((1_u16 << (1 << order)) - 1) as u8;
        let shift = (index % (8 >> order)) << order;
        if let Some(byte) = block.get_mut(index >> (3 - order)) {
            *byte = *byte & !(mask << shift) | (count as u8 & mask) << shift;
        }
        return;
    }
    let len = 1 << (order - 3);
    if let Some(bytes) = block.chunks_exact_mut(len).nth(index) {
        bytes.copy_from_slice(&count.to_be_bytes()[8 - len..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_stand_where_the_specification_puts_them() {
        // The specification: bit 0 of a narrow count is its least significant, wide ones are big-endian.
        let block = [0b1110_0100, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde];
        assert_eq!((0..8).map(|bit| get(&block, 0, bit)).collect::<Vec<_>>(), [0, 0, 1, 0, 0, 1, 1, 1]);
        assert_eq!((0..4).map(|two| get(&block, 1, two)).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!((get(&block, 2, 0), get(&block, 2, 1), get(&block, 2, 3)), (4, 14, 1));
        assert_eq!((get(&block, 3, 1), get(&block, 4, 1), get(&block, 5, 1)), (0x12, 0x3456, 0x789a_bcde));
        assert_eq!((get(&block, 6, 0), get(&block, 6, 1)), (0xe412_3456_789a_bcde_u64, 0));
    }

    #[test]
    fn a_count_that_is_set_changes_no_other() {
        for order in 0..=6 {
            let mut block = [0x5a; 64];
            let before: Vec<u64> = (0..512 >> order).map(|index| get(&block, order, index)).collect();
            for (index, old) in before.iter().enumerate() {
                let new = old ^ 1;
                set(&mut block, order, index, new);
                let after: Vec<u64> = (0..512 >> order).map(|index| get(&block, order, index)).collect();
                let mut expected = before.clone();
                expected[index] = new;
                assert_eq!(after, expected);
                set(&mut block, order, index, *old);
            }
            assert_eq!(block, [0x5a; 64]);
            set(&mut block, order, 512 >> order, 1);
            assert_eq!(block, [0x5a; 64], "there is none beyond the end");
        }
    }
}
