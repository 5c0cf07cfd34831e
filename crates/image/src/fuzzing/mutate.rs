//! New inputs from old ones, for loops without libFuzzer.

use storage::conformance::Random;

use super::program::{Program, Record, VALUES, damage, step};

/// Another input, made of some of these or out of nothing.
pub fn mutate(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut program = match corpus.len() {
        0 => Program::decode(&[]),
        len if random.below(4) > 0 => Program::decode(&corpus[random.below(len as u64) as usize]),
        _ => Program::decode(&[]),
    };
    if random.below(2) == 0 {
        program.options = random.draw() as u8;
    }
    if random.below(4) == 0 {
        program.flags = random.draw() as u8 & 7;
    }
    for _ in 0..random.below(4) {
        let code = random.below(u64::from(damage::COUNT)) as u8;
        change(random, &mut program.damages, code);
    }
    for _ in 0..1 + random.below(8) {
        let code = step::FIRST + random.below(u64::from(step::COUNT)) as u8;
        change(random, &mut program.steps, code);
    }
    let mut bytes = program.encode();
    if random.below(8) == 0 {
        let at = random.below(bytes.len() as u64) as usize;
        bytes[at] = random.draw() as u8;
    }
    bytes
}

fn change(random: &mut Random, records: &mut Vec<Record>, code: u8) {
    let is_damage = code < step::FIRST;
    // Most of what is worth damaging is at the beginning.
    let place = if is_damage && random.below(2) == 0 { random.below(16) } else { random.draw() } as u16;
    let param = if random.below(2) == 0 { random.below(64) } else { random.draw() } as u16;
    let value = if is_damage { random.below(u64::from(VALUES)) } else { random.draw() } as u8;
    let record = Record { code, value, place, param };
    match (records.len(), random.below(4)) {
        (1.., 0) => {
            let at = random.below(records.len() as u64) as usize;
            records[at] = record;
        }
        (1.., 1) => {
            let at = random.below(records.len() as u64) as usize;
            records.remove(at);
        }
        _ => records.push(record),
    }
}
