//! The bytes of a file, in pages that copies share until one of them changes.

use std::collections::BTreeMap;
use std::rc::Rc;

use block::Span;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// What storage writes as a whole or not at all.
pub(crate) const SECTOR: u64 = 512;

/// A sparse file.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Bytes {
    size: u64,
    pages: BTreeMap<u64, Rc<[u8; PAGE as usize]>>,
}

impl Bytes {
    /// So many bytes of zero.
    pub(crate) fn new(size: u64) -> Bytes {
        Bytes { size, pages: BTreeMap::new() }
    }

    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Makes it so long: what is added is zero, what is cut off is gone.
    pub(crate) fn resize(&mut self, size: u64) {
        if size < self.size {
            self.pages.retain(|page, _| page * PAGE < size);
            if let Some(page) = self.pages.get_mut(&(size / PAGE)) {
                Rc::make_mut(page)[(size % PAGE) as usize..].fill(0);
            }
        }
        self.size = size;
    }

    pub(crate) fn read(&self, at: u64, into: &mut [u8]) {
        for (page, from, range) in pieces(at, into.len()) {
            match self.pages.get(&page) {
                Some(page) => into[range.clone()].copy_from_slice(&page[from..from + range.len()]),
                None => into[range].fill(0),
            }
        }
    }

    /// Stores bytes. What lies beyond the end is stored nowhere.
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) {
        let within = usize::try_from(self.size.saturating_sub(at)).unwrap_or(usize::MAX).min(bytes.len());
        for (page, from, range) in pieces(at, within) {
            let page = self.pages.entry(page).or_insert_with(|| Rc::new([0; PAGE as usize]));
            Rc::make_mut(page)[from..from + range.len()].copy_from_slice(&bytes[range]);
        }
    }

    /// Makes bytes zero, and gives whole pages back.
    pub(crate) fn clear(&mut self, span: Span) {
        for (number, from, range) in pieces(span.at(), span.len() as usize) {
            if range.len() as u64 == PAGE {
                self.pages.remove(&number);
            } else if let Some(page) = self.pages.get_mut(&number) {
                Rc::make_mut(page)[from..from + range.len()].fill(0);
            }
        }
    }

    /// Whether the page of this byte takes space.
    pub(crate) fn is_there(&self, at: u64) -> bool {
        self.pages.contains_key(&(at / PAGE))
    }

    /// Byte after the page of this one.
    pub(crate) fn page_end(at: u64) -> u64 {
        (at / PAGE + 1) * PAGE
    }

    /// The first byte in which two files differ.
    pub(crate) fn difference(&self, other: &Bytes) -> Option<u64> {
        if self.size != other.size {
            return Some(self.size.min(other.size));
        }
        let numbers = self.pages.keys().chain(other.pages.keys());
        let zero = Rc::new([0; PAGE as usize]);
        let page = |bytes: &Bytes, number| bytes.pages.get(number).cloned().unwrap_or_else(|| zero.clone());
        numbers
            .filter_map(|number| {
                let (one, two) = (page(self, number), page(other, number));
                let byte = one.iter().zip(two.iter()).position(|(one, two)| one != two)?;
                Some(number * PAGE + byte as u64)
            })
            .min()
    }

    /// All of them; for small files.
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        let mut all = vec![0; self.size as usize];
        self.read(0, &mut all);
        all
    }
}

/// A run of bytes by pages: the page's number, the first byte in it, and which of the run's bytes these are.
fn pieces(at: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = at + done as u64;
        let from = (at % PAGE) as usize;
        let start = done;
        done += (PAGE as usize - from).min(len - done);
        (done > start).then_some((at / PAGE, from, start..done))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_its_bytes() {
        let mut file = Bytes::new(10_000);
        let mut plain = vec![0; 10_000];
        let mut dice = crate::dice::Dice::new(1);
        for step in 0..500 {
            let at = dice.below(10_000);
            let len = dice.between(1, 10_000 - at);
            let range = at as usize..(at + len) as usize;
            if step % 3 == 0 {
                file.clear(Span::new(at, len).unwrap());
                plain[range].fill(0);
            } else {
                file.write(at, &vec![step as u8; len as usize]);
                plain[range].fill(step as u8);
            }
            assert!(file.to_vec() == plain);
        }
        let copy = file.clone();
        file.write(5000, &[0xee; 5]);
        assert_eq!(copy.difference(&file), Some(5000));
        assert!(copy.to_vec() == plain, "a copy stays as it was");
        file.resize(5002);
        file.resize(6000);
        assert_eq!(file.to_vec()[4999..5005], [plain[4999], 0xee, 0xee, 0, 0, 0]);
        file.write(5999, &[1, 2]);
        assert_eq!(file.to_vec().len(), 6000, "writing does not make it longer");
    }
}
