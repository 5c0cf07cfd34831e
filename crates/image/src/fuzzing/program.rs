//! Inputs of the fuzz targets: an image, damages, and operations, in records of a few bytes.

/// Bytes of a record.
pub(super) const RECORD: usize = 6;

/// An input, taken apart.
pub(super) struct Program {
    /// Which image.
    pub(super) options: u8,
    /// Bits: 1, checksums stay as they are after the damage; 2, each change must be in the image before its answer; 4, there
    /// is little memory for metadata.
    pub(super) flags: u8,
    pub(super) damages: Vec<Record>,
    pub(super) steps: Vec<Record>,
}

/// A damage or an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) code: u8,
    pub(super) value: u8,
    pub(super) place: u16,
    pub(super) param: u16,
}

/// Damages, by their code.
pub(super) mod damage {
    /// A word (8 bytes) of the metadata.
    pub(crate) const WORD: u8 = 0;
    /// Four bytes of one, the upper ones for an even parameter.
    pub(crate) const HALF: u8 = 1;
    /// A byte of one: the parameter's lowest bits say which, the upper half is its value.
    pub(crate) const BYTE: u8 = 2;
    /// Any eight bytes of the file.
    pub(crate) const ANYWHERE: u8 = 3;
    /// The length of the file.
    pub(crate) const LENGTH: u8 = 4;
    /// A word becomes that of another place.
    pub(crate) const COPY: u8 = 5;
    /// How many there are.
    pub(crate) const COUNT: u8 = 6;
}

/// Operations, by their code.
pub(super) mod step {
    /// The first one.
    pub(crate) const FIRST: u8 = 64;
    pub(crate) const READ: u8 = 64;
    pub(crate) const WRITE: u8 = 65;
    pub(crate) const ZERO: u8 = 66;
    pub(crate) const DISCARD: u8 = 67;
    pub(crate) const FLUSH: u8 = 68;
    pub(crate) const RESIZE: u8 = 69;
    /// Closed and opened anew.
    pub(crate) const REOPEN: u8 = 70;
    /// Left as by a death of the process, and opened anew.
    pub(crate) const DIE: u8 = 71;
    /// Two writes side by side, which overlap.
    pub(crate) const PAIR: u8 = 72;
    pub(crate) const EXTENTS: u8 = 73;
    /// How many there are.
    pub(crate) const COUNT: u8 = 10;
}

impl Program {
    /// Any bytes are a program.
    pub(super) fn decode(bytes: &[u8]) -> Program {
        let (options, flags) = (bytes.first().copied().unwrap_or(0), bytes.get(1).copied().unwrap_or(0));
        let mut program = Program { options, flags, damages: Vec::new(), steps: Vec::new() };
        let (records, _) = bytes.get(2..).unwrap_or_default().as_chunks::<RECORD>();
        // More would only take longer.
        for &[code, value, place1, place2, param1, param2] in records.iter().take(64) {
            let place = u16::from_be_bytes([place1, place2]);
            let param = u16::from_be_bytes([param1, param2]);
            if code < step::FIRST {
                let code = code % damage::COUNT;
                program.damages.push(Record { code, value, place, param });
            } else {
                let code = step::FIRST + (code - step::FIRST) % step::COUNT;
                program.steps.push(Record { code, value, place, param });
            }
        }
        program
    }

    /// The bytes of which this is made.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.options, self.flags];
        for record in self.damages.iter().chain(&self.steps) {
            bytes.extend([record.code, record.value]);
            bytes.extend(record.place.to_be_bytes());
            bytes.extend(record.param.to_be_bytes());
        }
        bytes
    }
}

/// How many kinds of values there are.
pub(super) const VALUES: u8 = 24;

/// A number that programs get wrong, in place of `old`, in a file of `len` bytes.
pub(super) fn value(kind: u8, param: u16, old: u64, len: u64) -> u64 {
    let param = u64::from(param);
    let bit = 1_u64 << (param % 64);
    match kind % VALUES {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => u64::MAX - 1,
        4 => i64::MAX as u64,
        5 => len,
        6 => len.wrapping_sub(1),
        7 => len.next_multiple_of(512),
        8 => param,
        9 => param << 9,
        10 => param << 12,
        11 => bit,
        12 => bit - 1,
        13 => 0_u64.wrapping_sub(bit),
        14 => old.wrapping_add(param),
        15 => old.wrapping_sub(param),
        16 => old ^ bit,
        17 => old.swap_bytes(),
        18 => old | 1 << 63,
        19 => (old & 0xffff_ffff_ffff) | param << 48,
        20 => (old & 0xffff_ffff) | param << 32,
        21 => (old & !0xffff_ffff) | param,
        22 => old.wrapping_add(param << 9),
        _ => old.wrapping_mul(param | 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_together_is_taken_apart() {
        let record = |code| Record { code, value: 3, place: 1000, param: 0x7788 };
        let program = Program {
            options: 5,
            flags: 1,
            damages: vec![record(damage::LENGTH), record(damage::WORD)],
            steps: vec![record(step::READ), record(step::EXTENTS)],
        };
        let again = Program::decode(&program.encode());
        assert_eq!((again.options, again.flags), (5, 1));
        assert_eq!((again.damages, again.steps), (program.damages, program.steps));
        assert!(Program::decode(&[]).steps.is_empty());
    }
}
