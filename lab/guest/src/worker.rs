//! One thread of the verifier, with a stretch of the disk that nobody else writes.

use crate::block;
use anyhow::{Context, Result, bail};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How many of each all threads have done.
#[derive(Default)]
pub(crate) struct Counts {
    writes: AtomicU64,
    reads: AtomicU64,
    syncs: AtomicU64,
}

impl fmt::Display for Counts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        write!(
            formatter,
            "writes {} reads {} syncs {}",
            count(&self.writes),
            count(&self.reads),
            count(&self.syncs)
        )
    }
}

/// The longest request, in blocks.
const BLOCKS_MAX: u64 = 8;
/// One in so many writes is followed by a sync.
const SYNC_EVERY: u64 = 32;

/// A thread of the verifier.
pub(crate) struct Worker {
    disk: Arc<File>,
    /// Where our stretch starts, in blocks.
    first: u64,
    /// How often each block was written; 0 if never, and then it is not looked at.
    generations: Vec<u64>,
    dice: u64,
    memory: Vec<u8>,
    counts: Arc<Counts>,
}

impl Worker {
    /// For `blocks` blocks from `first` on.
    pub(crate) fn new(disk: Arc<File>, first: u64, blocks: u64, seed: u64, counts: Arc<Counts>) -> Worker {
        let generations = (0..blocks).map(|_| 0).collect();
        // O_DIRECT wants aligned memory: room to find some in.
        let memory = vec![0; block::LEN * (usize::try_from(BLOCKS_MAX).expect("small") + 1)];
        Worker {
            disk,
            first,
            generations,
            dice: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            memory,
            counts,
        }
    }

    /// Writes, reads and syncs at random until it is over.
    pub(crate) fn work(&mut self, is_over: &AtomicBool) -> Result<()> {
        self.settle_on_a_cpu()?;
        while !is_over.load(Ordering::SeqCst) {
            let blocks = self.generations.len() as u64;
            let count = (self.roll(BLOCKS_MAX) + 1).min(blocks);
            let at = self.roll(blocks - count + 1);
            if self.roll(4) == 0 {
                self.verify(at, count)?;
            } else {
                self.write(at, count)?;
            }
            if self.roll(SYNC_EVERY) == 0 {
                self.disk.sync_data().context("sync")?;
                self.counts.syncs.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Reads back all that was written, and returns how many blocks that were.
    pub(crate) fn verify_all(&mut self) -> Result<u64> {
        let blocks = self.generations.len() as u64;
        let mut at = 0;
        while at < blocks {
            let count = BLOCKS_MAX.min(blocks - at);
            self.verify(at, count)?;
            at += count;
        }
        Ok(self.generations.iter().filter(|generation| **generation > 0).count() as u64)
    }

    /// Each thread stays on a CPU, so that every queue of the disk is used.
    fn settle_on_a_cpu(&mut self) -> Result<()> {
        let all = sched_getaffinity(None).context("ask for the CPUs")?;
        let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)).collect();
        let mut one = CpuSet::new();
        let stretch = self.first / self.generations.len() as u64;
        one.set(cpus[usize::try_from(stretch)? % cpus.len()]);
        sched_setaffinity(None, &one).context("settle on a CPU")
    }

    fn write(&mut self, at: u64, count: u64) -> Result<()> {
        let start = self.memory.as_ptr().align_offset(block::LEN);
        for index in 0..count {
            let generation = &mut self.generations[usize::try_from(at + index)?];
            *generation += 1;
            let from = start + usize::try_from(index)? * block::LEN;
            block::fill(&mut self.memory[from..from + block::LEN], self.first + at + index, *generation);
        }
        let bytes = &self.memory[start..start + usize::try_from(count)? * block::LEN];
        let place = (self.first + at) * block::LEN as u64;
        let done = self.disk.write_at(bytes, place).with_context(|| format!("write at {place}"))?;
        if done != bytes.len() {
            bail!("write at {place}: {done} of {} bytes", bytes.len());
        }
        self.counts.writes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn verify(&mut self, at: u64, count: u64) -> Result<()> {
        let start = self.memory.as_ptr().align_offset(block::LEN);
        let bytes = &mut self.memory[start..start + usize::try_from(count)? * block::LEN];
        let place = (self.first + at) * block::LEN as u64;
        let done = self.disk.read_at(bytes, place).with_context(|| format!("read at {place}"))?;
        if done != bytes.len() {
            bail!("read at {place}: {done} of {} bytes", bytes.len());
        }
        for (block, number) in bytes.chunks_exact(block::LEN).zip(at..) {
            let generation = self.generations[usize::try_from(number)?];
            if generation > 0
                && let Some(complaint) = block::complaint(block, self.first + number, generation)
            {
                bail!("{complaint}");
            }
        }
        self.counts.reads.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// A number below `sides`, by Marsaglia's xorshift64.
    fn roll(&mut self, sides: u64) -> u64 {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.dice % sides
    }
}
