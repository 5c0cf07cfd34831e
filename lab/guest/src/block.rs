//! A block that says what it is: its number, how often it was written, contents that follow from both, and a checksum.

/// Bytes of a block. Disks with 4096-byte sectors can be written in these.
pub(crate) const LEN: usize = 4096;
/// `lab disk` in ASCII, where a block starts.
const MAGIC: u64 = u64::from_le_bytes(*b"lab disk");
const WORDS: usize = LEN / 8;

/// Fills a block for the `generation`th time.
pub(crate) fn fill(bytes: &mut [u8], number: u64, generation: u64) {
    let mut state =
        number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ generation.wrapping_mul(0xd134_2543_de82_ef95) ^ MAGIC;
    let mut sum = checksum(0, &[MAGIC, number, generation]);
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = match index {
            0 => MAGIC,
            1 => number,
            2 => generation,
            last if last == WORDS - 1 => sum,
            _ => {
                // Marsaglia's xorshift64.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                sum = checksum(sum, &[state]);
                state
            }
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// What is wrong with a block, if it is not what was written last.
pub(crate) fn complaint(bytes: &[u8], number: u64, generation: u64) -> Option<String> {
    let mut wanted = vec![0; LEN];
    if generation > 0 {
        fill(&mut wanted, number, generation);
    }
    if bytes == wanted {
        return None;
    }
    let word = |index: usize| u64::from_le_bytes(std::array::from_fn(|byte| bytes[index * 8 + byte]));
    let sum = (0..WORDS - 1).fold(0, |sum, index| checksum(sum, &[word(index)]));
    let found = if bytes.iter().all(|byte| *byte == 0) {
        "zeroes".to_owned()
    } else if word(0) != MAGIC {
        format!("something else, {:016x}", word(0))
    } else {
        let state = if sum == word(WORDS - 1) { "whole" } else { "torn" };
        format!("block {} of generation {}, {state}", word(1), word(2))
    };
    Some(format!("block {number} should be of generation {generation}, and is {found}"))
}

/// FNV-1a, a word at a time.
fn checksum(sum: u64, words: &[u64]) -> u64 {
    words.iter().fold(sum, |sum, word| (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_only_itself() {
        let mut bytes = vec![0; LEN];
        assert_eq!(complaint(&bytes, 7, 0), None);
        fill(&mut bytes, 7, 3);
        assert_eq!(complaint(&bytes, 7, 3), None);
        let said = complaint(&bytes, 7, 4).unwrap();
        assert!(said.contains("block 7 of generation 3, whole"), "{said}");
        let said = complaint(&bytes, 8, 3).unwrap();
        assert!(said.contains("block 8 should") && said.contains("is block 7 of"), "{said}");
        bytes[2000] ^= 1;
        let said = complaint(&bytes, 7, 3).unwrap();
        assert!(said.contains("torn"), "{said}");
        assert!(complaint(&vec![0; LEN], 7, 3).unwrap().contains("is zeroes"));
    }
}
