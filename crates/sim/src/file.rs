//! A simulated file: what reading it gives, what of it survives a power cut, and the space behind it.

use std::collections::{BTreeMap, BTreeSet};

use block::{Errno, Span};

use crate::dice::Dice;

/// What a disk writes whole or not at all.
pub(crate) const SECTOR: u64 = 512;
/// What a file system allocates.
pub(crate) const BLOCK: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Space {
    Hole,
    /// Allocated, reads as zero, told as a hole (ext4's unwritten extents).
    Unwritten,
    Data,
}

/// What a sector held after a write that is not durable yet.
#[derive(Clone)]
struct Version {
    /// Which operation wrote it.
    operation: u64,
    bytes: Box<[u8; SECTOR as usize]>,
}

/// One file.
#[derive(Clone)]
pub(crate) struct SimFile {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// By sector, what was written since it was last made durable, in the order of the writes.
    unsynced: BTreeMap<u64, Vec<Version>>,
    /// Sectors that a failed sync has lost.
    lost: BTreeSet<u64>,
    space: Vec<Space>,
    /// How many blocks it may have.
    capacity: usize,
    /// Whether the file system punches holes; likewise for zeroing ranges.
    pub(crate) can_punch: bool,
    pub(crate) can_zero: bool,
}

impl SimFile {
    /// A file of holes with data where `data` says, all durable.
    pub(crate) fn new(content: Vec<u8>, data: &[Span], spare_blocks: Option<u64>) -> SimFile {
        let blocks = content.len().div_ceil(BLOCK as usize);
        let mut space = vec![Space::Hole; blocks];
        for span in data.iter().filter(|span| !span.is_empty()) {
            space[(span.at() / BLOCK) as usize..span.end().div_ceil(BLOCK) as usize].fill(Space::Data);
        }
        let used = space.iter().filter(|space| **space != Space::Hole).count();
        let capacity = spare_blocks.map_or(usize::MAX, |spare| used + spare as usize);
        let mut durable = content.clone();
        durable.resize(content.len().next_multiple_of(SECTOR as usize), 0);
        let (unsynced, lost) = (BTreeMap::new(), BTreeSet::new());
        SimFile { live: content, durable, unsynced, lost, space, capacity, can_punch: true, can_zero: true }
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.live.len() as u64
    }

    /// What a power cut now would surely leave.
    pub(crate) fn durable(&self) -> &[u8] {
        &self.durable
    }

    /// Gives it more space.
    pub(crate) fn enlarge(&mut self, blocks: usize) {
        self.capacity = self.capacity.saturating_add(blocks);
    }

    /// How many bytes of these can be read.
    pub(crate) fn readable(&self, at: u64, len: u64) -> u64 {
        self.len().saturating_sub(at).min(len)
    }

    /// Bytes as they read now; zero beyond the end.
    pub(crate) fn read(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let have = self.readable(at, len) as usize;
        if have > 0 {
            bytes[..have].copy_from_slice(&self.live[at as usize..at as usize + have]);
        }
        bytes
    }

    /// Allocates what these bytes need, from the first on; how many of them have space then.
    pub(crate) fn allocate(&mut self, at: u64, len: u64, written: bool) -> u64 {
        let end = at + len;
        let last = end.div_ceil(BLOCK) as usize;
        if self.space.len() < last {
            self.space.resize(last, Space::Hole);
        }
        let mut used = self.space.iter().filter(|space| **space != Space::Hole).count();
        for number in (at / BLOCK) as usize..last {
            if self.space[number] == Space::Hole {
                if used >= self.capacity {
                    return (number as u64 * BLOCK).saturating_sub(at);
                }
                used += 1;
                self.space[number] = Space::Unwritten;
            }
            if written {
                self.space[number] = Space::Data;
            }
        }
        len
    }

    /// Whether every byte of these has space.
    pub(crate) fn has_space(&self, at: u64, len: u64) -> bool {
        ((at / BLOCK) as usize..(at + len).div_ceil(BLOCK) as usize)
            .all(|number| self.space.get(number).is_some_and(|space| *space != Space::Hole))
    }

    /// Changes bytes; the file grows where they lie beyond its end.
    pub(crate) fn write(&mut self, operation: u64, at: u64, bytes: &[u8]) {
        let end = at as usize + bytes.len();
        if self.live.len() < end {
            self.live.resize(end, 0);
        }
        self.live[at as usize..end].copy_from_slice(bytes);
        self.note(operation, at, bytes.len() as u64);
    }

    /// Makes bytes zero, as far as the file reaches.
    pub(crate) fn clear(&mut self, operation: u64, at: u64, len: u64) {
        let have = self.readable(at, len);
        if have > 0 {
            self.live[at as usize..(at + have) as usize].fill(0);
            self.note(operation, at, have);
        }
    }

    /// Gives back the space of the whole blocks within.
    pub(crate) fn release(&mut self, span: Span) {
        let span = if span.end() >= self.len() { span.split_at(self.len()).0 } else { span };
        // A block that the file ends in counts as whole.
        let end = if span.end() == self.len() { span.end().next_multiple_of(BLOCK) } else { span.end() };
        for number in span.at().div_ceil(BLOCK)..end / BLOCK {
            if let Some(space) = self.space.get_mut(number as usize) {
                *space = Space::Hole;
            }
        }
    }

    /// Zeroed blocks need not be data any more.
    pub(crate) fn unwrite(&mut self, span: Span) {
        let inner = span.align_in(BLOCK);
        for number in inner.at() / BLOCK..inner.end() / BLOCK {
            if let Some(space @ Space::Data) = self.space.get_mut(number as usize) {
                *space = Space::Unwritten;
            }
        }
    }

    /// Cuts off what lies from `len` on.
    pub(crate) fn truncate(&mut self, operation: u64, len: u64) {
        let gone = self.len().saturating_sub(len);
        self.clear(operation, len, gone);
        self.release(Span::new(len, gone).expect("within the file"));
        self.live.truncate(len as usize);
    }

    /// The sectors that these bytes lie in are as they are now, but only for those who read them.
    fn note(&mut self, operation: u64, at: u64, len: u64) {
        let end = ((at + len).next_multiple_of(SECTOR)) as usize;
        if self.durable.len() < end {
            self.durable.resize(end, 0);
        }
        for number in at / SECTOR..(at + len).div_ceil(SECTOR) {
            let mut bytes = Box::new([0; SECTOR as usize]);
            let from = (number * SECTOR) as usize;
            let have = (self.live.len() - from).min(SECTOR as usize);
            bytes[..have].copy_from_slice(&self.live[from..from + have]);
            self.unsynced.entry(number).or_default().push(Version { operation, bytes });
        }
    }

    /// Makes durable what operations wrote of which `covered` is true; the rest may or may not become so.
    pub(crate) fn sync(&mut self, covered: impl Fn(u64) -> bool) {
        let durable = &mut self.durable;
        self.unsynced.retain(|number, versions| {
            if let Some(last) = versions.iter().rposition(|version| covered(version.operation)) {
                let from = (number * SECTOR) as usize;
                durable[from..from + SECTOR as usize].copy_from_slice(&*versions[last].bytes);
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
    }

    /// A sync that fails as Linux's does: the data is lost, and nobody will hear of it again.
    pub(crate) fn lose(&mut self, covered: impl Fn(u64) -> bool, dice: &mut Dice) {
        let (durable, lost) = (&mut self.durable, &mut self.lost);
        self.unsynced.retain(|number, versions| {
            if let Some(last) = versions.iter().rposition(|version| covered(version.operation)) {
                if dice.percent(20) {
                    let from = (number * SECTOR) as usize;
                    durable[from..from + SECTOR as usize].copy_from_slice(&*versions[last].bytes);
                }
                versions.drain(..=last);
                lost.insert(*number);
            }
            !versions.is_empty()
        });
    }

    /// The page cache lets go of what was lost: it reads as before it was written.
    pub(crate) fn evict(&mut self) {
        for number in std::mem::take(&mut self.lost) {
            let from = (number * SECTOR) as usize;
            if !self.unsynced.contains_key(&number) && from < self.live.len() {
                let have = (self.live.len() - from).min(SECTOR as usize);
                self.live[from..from + have].copy_from_slice(&self.durable[from..from + have]);
            }
        }
    }

    /// The file after a power cut: of each sector the durable bytes or any that were written since.
    pub(crate) fn crash(mut self, dice: &mut Dice) -> SimFile {
        let mood = dice.below(4); // none, all, or some of what was not synced
        for (number, versions) in std::mem::take(&mut self.unsynced) {
            let kept = match mood {
                0 => 0,
                1 => versions.len(),
                2 | 3.. => dice.below(versions.len() as u64 + 1) as usize,
            };
            if kept > 0 {
                let from = (number * SECTOR) as usize;
                self.durable[from..from + SECTOR as usize].copy_from_slice(&*versions[kept - 1].bytes);
            }
        }
        let len = self.live.len();
        self.live.copy_from_slice(&self.durable[..len]);
        self.space.fill(Space::Data);
        self
    }

    /// lseek(2) with SEEK_DATA.
    pub(crate) fn next_data(&self, at: u64) -> Result<u64, Errno> {
        (at / BLOCK..self.len().div_ceil(BLOCK))
            .find(|number| self.space[*number as usize] == Space::Data)
            .map(|number| at.max(number * BLOCK))
            .filter(|_| at < self.len())
            .ok_or(Errno::ENXIO)
    }

    /// lseek(2) with SEEK_HOLE; every file ends with one.
    pub(crate) fn next_hole(&self, at: u64) -> Result<u64, Errno> {
        if at >= self.len() {
            return Err(Errno::ENXIO);
        }
        let hole = (at / BLOCK..self.len().div_ceil(BLOCK))
            .find(|number| self.space[*number as usize] != Space::Data)
            .map_or(self.len(), |number| at.max(number * BLOCK));
        Ok(hole.min(self.len()))
    }
}
