//! What is in a file: a size and the blocks that are allocated, each written or only promised.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::sync::Arc;

/// The unit of allocation, of holes and of the capacity, in bytes.
pub(crate) const BLOCK: u64 = 4096;

/// The unit that a disk writes whole or not at all, in bytes.
pub(crate) const SECTOR: usize = 512;

type Block = Arc<[u8; BLOCK as usize]>;

/// One change to a file. The live copy takes it at once, the durable one when the file is synced.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Write { at: u64, bytes: Vec<u8> },
    Zero(Range<u64>),
    Punch(Range<u64>),
    Allocate(Range<u64>),
    Resize(u64),
}

/// A block that is `None` is allocated and was never written: it reads as zeros and counts as a hole, as an
/// unwritten extent of ext4 or XFS does.
#[derive(Clone, Debug, Default)]
pub(crate) struct Content {
    size: u64,
    blocks: BTreeMap<u64, Option<Block>>,
}

impl Content {
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn allocated_bytes(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK
    }

    /// How many bytes must be allocated before all of `span` is.
    pub(crate) fn missing_bytes(&self, span: Range<u64>) -> u64 {
        let blocks = blocks_touched(span);
        let present = self.blocks.range(blocks.clone()).count() as u64;
        (blocks.end - blocks.start - present) * BLOCK
    }

    /// How long a beginning of `span` can be written when only `free` bytes can be allocated.
    pub(crate) fn writable_len(&self, span: Range<u64>, free: u64) -> u64 {
        let mut free_blocks = free / BLOCK;
        for block in blocks_touched(span.clone()) {
            if !self.blocks.contains_key(&block) {
                if free_blocks == 0 {
                    return (block * BLOCK).saturating_sub(span.start);
                }
                free_blocks -= 1;
            }
        }
        span.end - span.start
    }

    /// Fills `into` from `at` on and says how much of it lies before the end of the file.
    pub(crate) fn read(&self, at: u64, into: &mut [u8]) -> usize {
        let len = self.size.saturating_sub(at).min(into.len() as u64) as usize;
        let into = &mut into[..len];
        for (block, within, piece) in pieces(at, len) {
            match self.blocks.get(&block) {
                Some(Some(bytes)) => into[piece].copy_from_slice(&bytes[within]),
                Some(None) | None => into[piece].fill(0),
            }
        }
        len
    }

    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Write { at, bytes } => self.write(*at, bytes),
            Change::Zero(span) => self.clear(span.clone(), true),
            Change::Punch(span) => self.clear(span.clone(), false),
            Change::Allocate(span) => {
                for block in blocks_touched(span.clone()) {
                    self.blocks.entry(block).or_insert(None);
                }
            }
            Change::Resize(size) => self.resize(*size),
        }
    }

    /// Writes without regard to the size: growing is a change of its own, which a power cut may lose by itself.
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) {
        for (block, within, piece) in pieces(at, bytes.len()) {
            let block = self.blocks.entry(block).or_default();
            let block = block.get_or_insert_with(|| Arc::new([0; BLOCK as usize]));
            Arc::make_mut(block)[within].copy_from_slice(&bytes[piece]);
        }
    }

    /// Makes `span` zeros: whole blocks become unwritten when `allocate`, a hole otherwise.
    fn clear(&mut self, span: Range<u64>, allocate: bool) {
        let whole = span.start.div_ceil(BLOCK)..span.end / BLOCK;
        if allocate {
            for block in blocks_touched(span.clone()) {
                let kept = self.blocks.entry(block).or_insert(None);
                if whole.contains(&block) {
                    *kept = None;
                }
            }
        } else if whole.start < whole.end {
            let gone: Vec<u64> = self.blocks.range(whole.clone()).map(|(block, _)| *block).collect();
            for block in gone {
                self.blocks.remove(&block);
            }
        }
        let head_end = span.end.min(span.start.next_multiple_of(BLOCK));
        let tail_start = span.start.max(span.end / BLOCK * BLOCK);
        self.blank(span.start..head_end);
        self.blank(tail_start..span.end);
    }

    /// Zeros a span inside one block, if that was ever written.
    fn blank(&mut self, span: Range<u64>) {
        if let Some(Some(block)) =
            self.blocks.get_mut(&(span.start / BLOCK)).filter(|_| span.start < span.end)
        {
            let start = (span.start % BLOCK) as usize;
            let len = (span.end - span.start) as usize;
            Arc::make_mut(block)[start..start + len].fill(0);
        }
    }

    fn resize(&mut self, size: u64) {
        if size < self.size {
            self.size = size;
            self.trim();
        }
        self.size = size;
    }

    /// Forgets what lies beyond the end of the file.
    pub(crate) fn trim(&mut self) {
        let end = self.size.next_multiple_of(BLOCK);
        drop(self.blocks.split_off(&(end / BLOCK)));
        self.blank(self.size..end);
    }

    /// The first byte at or behind `at` that is written, up to the granularity of a block.
    pub(crate) fn next_data(&self, at: u64) -> Option<u64> {
        let written = |(block, bytes): (&u64, &Option<Block>)| bytes.as_ref().map(|_| *block);
        let block = self.blocks.range(at / BLOCK..).find_map(written)?;
        Some(at.max(block * BLOCK)).filter(|found| *found < self.size)
    }

    /// The first byte at or behind `at` that is not written; the end of the file counts as one.
    pub(crate) fn next_hole(&self, at: u64) -> Option<u64> {
        if at >= self.size {
            return None;
        }
        let mut block = at / BLOCK;
        while matches!(self.blocks.get(&block), Some(Some(_))) {
            block += 1;
        }
        Some(at.max(block * BLOCK).min(self.size))
    }
}

/// The numbers of the blocks that `span` touches.
fn blocks_touched(span: Range<u64>) -> Range<u64> {
    span.start / BLOCK..span.end.div_ceil(BLOCK)
}

/// Cuts `len` bytes from `at` on into (block, where in the block, where in the buffer).
fn pieces(at: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let here = at + done as u64;
        let within = (here % BLOCK) as usize;
        let piece = (BLOCK as usize - within).min(len - done);
        done += piece;
        Some((here / BLOCK, within..within + piece, done - piece..done))
    })
}

/// A copy of a file as it was at one moment; holes cost nothing.
#[derive(Clone, Debug)]
pub struct Snapshot {
    content: Content,
    at: u64,
}

impl Snapshot {
    pub(crate) fn of(content: &Content) -> Snapshot {
        Snapshot { content: content.clone(), at: 0 }
    }

    /// The size of the file in bytes.
    pub fn size(&self) -> u64 {
        self.content.size
    }

    /// How many bytes of it are allocated.
    pub fn allocated_bytes(&self) -> u64 {
        self.content.allocated_bytes()
    }

    /// Fills `into` with what lies at `at` and says how much of it lies before the end of the file.
    pub fn read_at(&self, at: u64, into: &mut [u8]) -> usize {
        self.content.read(at, into)
    }

    /// `len` bytes from `at` on, fewer at the end of the file.
    pub fn bytes_at(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let len = self.read_at(at, &mut bytes);
        bytes.truncate(len);
        bytes
    }

    /// The runs of the file that are written, in order.
    pub fn extents(&self) -> Vec<Range<u64>> {
        let mut extents = Vec::new();
        let mut at = 0;
        while let Some(start) = self.content.next_data(at) {
            at = self.content.next_hole(start).expect("data lies before the end of the file");
            extents.push(start..at);
        }
        extents
    }
}

impl Read for Snapshot {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.read_at(self.at, into);
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Snapshot {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.content.size.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = to.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
