//! The requests that are out, in memory that outlives the process: vhost-user's "Inflight I/O tracking" for split rings.
//!
//! The front end keeps the memory and hands it to a successor of ours, which does again what was not answered. Each
//! store happens in the order that the specification gives, so that death between any two of them neither loses a
//! request nor answers one twice. (What a process has stored before it dies is there afterwards: only the order of
//! the program matters, and each store here is a release.)
//!
//! Behind the part of the rings there is a page of our own, for what a successor must know and the protocol does not
//! carry: whether the guest has turned the write cache off.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::Ordering::{Relaxed, Release};

use block::Errno;
use rustix::fs::{MemfdFlags, SealFlags};

use crate::mapping::{MapError, Mapping};
use crate::words::Words;

/// "QueueRegionSplit", before its array.
const FEATURES: usize = 0;
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const HEADER_LEN: usize = 16;
/// "DescStateSplit".
const STATE_LEN: usize = 16;
const IN_FLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;
/// The version that this is; 0 is a region that nobody has used yet.
const VERSION_SPLIT: u16 = 1;
/// Each ring's part starts at a multiple of so many bytes, so that no two share a cache line.
const PART_ALIGN: usize = 64;

/// Our own page: what it is, how it is laid out, and the write cache (1 on, 0 off).
const PAGE_LEN: usize = 4096;
const PAGE_MAGIC: u64 = u64::from_le_bytes(*b"tapdisk:");
const PAGE_VERSION: u32 = 1;
const PAGE_MAGIC_AT: usize = 0;
const PAGE_VERSION_AT: usize = 8;
const PAGE_WCE_AT: usize = 12;

/// Why a region cannot be used, or not by a ring.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InflightError {
    #[error("an in-flight region of {len} bytes for {queues} rings of {queue_len}: {needed} are needed")]
    TooShort { len: u64, queues: u16, queue_len: u16, needed: u64 },
    #[error("an in-flight region at byte {0} of its file: a multiple of 8 is needed")]
    Misaligned(u64),
    #[error(
        "an in-flight region for {queues} rings of {queue_len}: from 1 ring, and of 1 to {}",
        super::ring::SIZE_MAX
    )]
    Shape { queues: u16, queue_len: u16 },
    #[error("the in-flight region is for {queues} rings of {queue_len}, and this is ring {index} of {size}")]
    NotForRing { index: u16, size: u16, queues: u16, queue_len: u16 },
    #[error("the in-flight region has version {version} and features {features:#x}: 1 and 0 are known")]
    Version { version: u16, features: u64 },
    #[error("the in-flight region tells of {found} descriptors where {expected} were asked for")]
    DescNum { found: u16, expected: u16 },
    #[error(
        "the in-flight region's used index is {region}, the ring's is {ring}: no batch of {len} lies between"
    )]
    Batch { region: u16, ring: u16, len: u16 },
    #[error("the in-flight region names head {head} of a ring of {size}")]
    Head { head: u16, size: u16 },
    #[error("the in-flight region: {0}")]
    Map(#[from] MapError),
}

/// Bytes of one ring's part.
fn part_len(queue_len: u16) -> usize {
    (HEADER_LEN + STATE_LEN * usize::from(queue_len)).next_multiple_of(PART_ALIGN)
}

/// Bytes of all rings' parts.
fn parts_len(queues: u16, queue_len: u16) -> usize {
    part_len(queue_len) * usize::from(queues)
}

fn check_shape(queues: u16, queue_len: u16) -> Result<(), InflightError> {
    if queues == 0 || queue_len == 0 || queue_len > super::ring::SIZE_MAX {
        return Err(InflightError::Shape { queues, queue_len });
    }
    Ok(())
}

/// A region for the rings of one device.
pub(crate) struct Inflight {
    words: Words<Mapping>,
    queues: u16,
    queue_len: u16,
    /// Where our own page starts, if the region has one.
    page: Option<usize>,
}

impl Inflight {
    /// A new region that nobody can change the size of, with its length in bytes.
    pub(crate) fn make(queues: u16, queue_len: u16) -> Result<(OwnedFd, u64), InflightError> {
        check_shape(queues, queue_len)?;
        let failed = |errno: rustix::io::Errno| {
            InflightError::Map(MapError::Map(Errno::new(errno.raw_os_error()).unwrap_or(Errno::EIO)))
        };
        let len = (parts_len(queues, queue_len).next_multiple_of(PAGE_LEN) + PAGE_LEN) as u64;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("tapdisk-inflight", flags).map_err(failed)?;
        rustix::fs::ftruncate(&fd, len).map_err(failed)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals).map_err(failed)?;
        let region = Inflight::open(fd.as_fd(), len, 0, queues, queue_len)?;
        for index in 0..queues {
            region.words.put_u16(region.part_at(index) + DESC_NUM, queue_len, Relaxed);
        }
        Ok((fd, len))
    }

    /// A region that the front end has kept: `len` bytes of a file from byte `offset` on.
    pub(crate) fn open(
        fd: BorrowedFd<'_>,
        len: u64,
        offset: u64,
        queues: u16,
        queue_len: u16,
    ) -> Result<Inflight, InflightError> {
        check_shape(queues, queue_len)?;
        let needed = parts_len(queues, queue_len);
        if len < needed as u64 {
            return Err(InflightError::TooShort { len, queues, queue_len, needed: needed as u64 });
        }
        let page = needed.next_multiple_of(PAGE_LEN);
        let has_page = len >= (page + PAGE_LEN) as u64;
        // No more than is used, whatever length is told.
        let used = if has_page { page + PAGE_LEN } else { needed };
        // Its length is bounded by the rings, and a device has one at a time: it counts by itself.
        let mapping = Mapping::new(fd, offset, used as u64, &Rc::default())?;
        let words = mapping.words(0, used).expect("all of the mapping");
        if !words.is_aligned(8) {
            return Err(InflightError::Misaligned(offset));
        }
        Ok(Inflight { words, queues, queue_len, page: has_page.then_some(page) })
    }

    fn part_at(&self, index: u16) -> usize {
        part_len(self.queue_len) * usize::from(index)
    }

    /// Whether the guest had its write cache on, as a predecessor has noted; `None` where nothing is noted.
    pub(crate) fn wce(&self) -> Option<bool> {
        let page = self.page?;
        let is_ours = self.words.u64(page + PAGE_MAGIC_AT, Relaxed) == PAGE_MAGIC
            && self.words.u32(page + PAGE_VERSION_AT, Relaxed) == PAGE_VERSION;
        is_ours.then(|| self.words.u8(page + PAGE_WCE_AT, Relaxed) != 0)
    }

    /// Notes whether the guest has its write cache on.
    pub(crate) fn set_wce(&self, wce: bool) {
        let Some(page) = self.page else { return };
        self.words.put_u8(page + PAGE_WCE_AT, u8::from(wce), Release);
        self.words.put_u32(page + PAGE_VERSION_AT, PAGE_VERSION, Release);
        // Last: what is not whole is not believed.
        self.words.put_u64(page + PAGE_MAGIC_AT, PAGE_MAGIC, Release);
    }

    /// Nothing is out any more: the guest has forgotten it. The region counts as unused.
    pub(crate) fn forget(&self) {
        for index in 0..self.queues {
            self.words.put_u16(self.part_at(index) + VERSION, 0, Release);
        }
    }

    /// The part of one ring.
    pub(crate) fn marks(&self, index: u16, size: u16) -> Result<Marks, InflightError> {
        let (queues, queue_len) = (self.queues, self.queue_len);
        if index >= queues || size > queue_len {
            return Err(InflightError::NotForRing { index, size, queues, queue_len });
        }
        let words = self.words.clone();
        Ok(Marks { words, at: self.part_at(index), len: queue_len, size, counter: 0, last_batch_head: 0 })
    }
}

/// One ring's part of a region: which of its heads are out.
pub(crate) struct Marks {
    words: Words<Mapping>,
    /// Where its part starts.
    at: usize,
    /// Heads that there is room for.
    len: u16,
    /// Heads that the ring has, no more than that.
    size: u16,
    /// Of the next request.
    counter: u64,
    last_batch_head: u16,
}

/// What a predecessor has left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Left {
    /// Heads that are out, in the order in which they were taken.
    pub(crate) heads: Vec<u16>,
    /// Whether there was a predecessor: then the ring goes on behind what is answered and what is out, whatever base
    /// the front end tells.
    pub(crate) is_resumed: bool,
}

impl Marks {
    fn state(&self, head: u16) -> usize {
        self.at + HEADER_LEN + STATE_LEN * usize::from(head)
    }

    /// Takes over: "When reconnecting". `used` is the used index as it is in the ring.
    pub(crate) fn recover(&mut self, used: u16) -> Result<Left, InflightError> {
        let version = self.words.u16(self.at + VERSION, Relaxed);
        if version == 0 {
            self.begin(used);
            return Ok(Left { heads: Vec::new(), is_resumed: false });
        }
        let features = self.words.u64(self.at + FEATURES, Relaxed);
        if version != VERSION_SPLIT || features != 0 {
            return Err(InflightError::Version { version, features });
        }
        let (found, expected) = (self.words.u16(self.at + DESC_NUM, Relaxed), self.len);
        if found != expected {
            return Err(InflightError::DescNum { found, expected });
        }
        self.repair(used)?;
        let mut out = self.out();
        // A sort that keeps equals in order: counters are as hostile as all else.
        out.sort_by_key(|(counter, _)| *counter);
        self.counter = out.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let heads: Vec<u16> = out.into_iter().map(|(_, head)| head).collect();
        if let Some(&head) = heads.iter().find(|head| **head >= self.size) {
            return Err(InflightError::Head { head, size: self.size });
        }
        Ok(Left { heads, is_resumed: true })
    }

    /// A region that nobody has used: nothing is out.
    fn begin(&mut self, used: u16) {
        for head in 0..self.len {
            self.words.put_u8(self.state(head) + IN_FLIGHT, 0, Release);
        }
        self.words.put_u64(self.at + FEATURES, 0, Release);
        self.words.put_u16(self.at + DESC_NUM, self.len, Release);
        self.words.put_u16(self.at + LAST_BATCH_HEAD, 0, Release);
        self.words.put_u16(self.at + USED_IDX, used, Release);
        // Last: what is not whole counts as unused.
        self.words.put_u16(self.at + VERSION, VERSION_SPLIT, Release);
    }

    /// Ends what the predecessor had begun: its last batch is in the ring, but may still be marked as out.
    fn repair(&mut self, used: u16) -> Result<(), InflightError> {
        let region = self.words.u16(self.at + USED_IDX, Relaxed);
        self.last_batch_head = self.words.u16(self.at + LAST_BATCH_HEAD, Relaxed);
        let batch = used.wrapping_sub(region);
        if batch == 0 {
            return Ok(());
        }
        if batch > self.len {
            // A driver that started its ring anew, with nothing out, is no reason to stop.
            if !self.out().is_empty() {
                return Err(InflightError::Batch { region, ring: used, len: self.len });
            }
        } else {
            let mut head = self.last_batch_head;
            for _ in 0..batch {
                if head >= self.size {
                    return Err(InflightError::Head { head, size: self.size });
                }
                self.words.put_u8(self.state(head) + IN_FLIGHT, 0, Release);
                head = self.words.u16(self.state(head) + NEXT, Relaxed);
            }
        }
        self.words.put_u16(self.at + USED_IDX, used, Release);
        Ok(())
    }

    /// Which heads are marked as out, with their counters.
    fn out(&self) -> Vec<(u64, u16)> {
        (0..self.len)
            .filter(|head| self.words.u8(self.state(*head) + IN_FLIGHT, Relaxed) != 0)
            .map(|head| (self.words.u64(self.state(head) + COUNTER, Relaxed), head))
            .collect()
    }

    /// Marks a head as out: "When receiving available buffers from the driver".
    #[inline]
    pub(crate) fn take(&mut self, head: u16) {
        let state = self.state(head);
        self.words.put_u64(state + COUNTER, self.counter, Release);
        self.counter = self.counter.wrapping_add(1);
        self.words.put_u8(state + IN_FLIGHT, 1, Release);
    }

    /// Puts a head into the batch that is published next: "When supplying used buffers to the driver", steps 1 to 3.
    #[inline]
    pub(crate) fn stage(&mut self, head: u16) {
        self.words.put_u16(self.state(head) + NEXT, self.last_batch_head, Release);
        self.words.put_u16(self.at + LAST_BATCH_HEAD, head, Release);
        self.last_batch_head = head;
    }

    /// The batch is in the ring, whose used index is now `used`.
    #[inline]
    pub(crate) fn published(&mut self, batch: &[u16], used: u16) {
        for head in batch {
            self.words.put_u8(self.state(*head) + IN_FLIGHT, 0, Release);
        }
        self.words.put_u16(self.at + USED_IDX, used, Release);
    }

    /// Whether the file behind it was cut short.
    pub(crate) fn is_broken(&self) -> bool {
        self.words.is_broken()
    }
}
