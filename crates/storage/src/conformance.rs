//! What every storage must do, put to it as questions; the expected answers come from a plain array of bytes.

use block::{Buf, Span};

use crate::{Storage, Zeroing};

/// A small generator of reproducible numbers (SplitMix64).
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not zero.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.draw() % limit
    }

    /// A span of 1 to `longest` bytes within `size`, aligned half of the time.
    pub fn span(&mut self, size: u64, longest: u64) -> Span {
        let align = [1, 1, 512, 4096][self.below(4) as usize];
        let at = self.below(size) & !(align - 1);
        let len = (1 + self.below(longest)).next_multiple_of(align).min(size - at);
        Span::new(at, len).expect("within the disk")
    }
}

/// Compares a storage with an array of bytes over `steps` operations drawn from `seed`.
///
/// All that is on the storage at first is read and taken as it is.
///
/// # Panics
/// At the first difference.
pub async fn check(storage: &dyn Storage, seed: u64, steps: usize) {
    let size = storage.size();
    let mut random = Random(seed);
    let mut model = vec![0; size as usize];
    read_into(storage, 0, &mut model).await;
    for step in 0..steps {
        let span = random.span(size, 40_000);
        let range = span.at() as usize..span.end() as usize;
        let context = format!("step {step} of seed {seed}, {span:?}");
        // Memory that is not aligned, half of the time.
        let skip = random.below(2) as usize * random.below(600) as usize;
        let buf = Buf::zeroed(skip + span.len() as usize).slice(skip, span.len() as usize);
        match random.below(10) {
            0..=3 => {
                let mut bytes = vec![0; span.len() as usize];
                bytes.fill_with(|| random.draw() as u8);
                buf.put(0, &bytes);
                storage.write(span.at(), buf).await.unwrap_or_else(|error| panic!("{context}: {error}"));
                model[range].copy_from_slice(&bytes);
            }
            4..=6 => {
                buf.fill(0xa5);
                storage
                    .read(span.at(), buf.clone())
                    .await
                    .unwrap_or_else(|error| panic!("{context}: {error}"));
                assert!(buf.to_vec() == model[range], "{context}: other bytes were read");
            }
            7 => {
                let how = Zeroing { unmap: random.below(2) == 0, fast: false };
                storage.zero(span, how).await.unwrap_or_else(|error| panic!("{context}: {error}"));
                model[range].fill(0);
            }
            8 => {
                storage.discard(span).await.unwrap_or_else(|error| panic!("{context}: {error}"));
                // Discarded bytes may be anything: what they are now is what they stay.
                let mut now = vec![0; span.len() as usize];
                read_into(storage, span.at(), &mut now).await;
                model[range].copy_from_slice(&now);
            }
            _ => {
                storage.flush().await.unwrap_or_else(|error| panic!("{context}: {error}"));
                let runs = storage.extents(span).await.unwrap_or_else(|error| panic!("{context}: {error}"));
                let mut at = span.at();
                for run in runs {
                    assert!(run.len > 0, "{context}: an empty run");
                    let end = at + run.len;
                    assert!(end <= span.end(), "{context}: runs beyond the request");
                    let zeroes = model[at as usize..end as usize].iter().all(|byte| *byte == 0);
                    assert!(!run.zero || zeroes, "{context}: data is said to be zero");
                    at = end;
                }
                assert!(at > span.at(), "{context}: no run at all");
            }
        }
    }
    let mut now = vec![0; size as usize];
    read_into(storage, 0, &mut now).await;
    assert!(now == model, "at the end of seed {seed}: other bytes");
}

async fn read_into(storage: &dyn Storage, at: u64, bytes: &mut [u8]) {
    let buf = Buf::zeroed(bytes.len());
    storage.read(at, buf.clone()).await.expect("reading works");
    buf.get(0, bytes);
}
