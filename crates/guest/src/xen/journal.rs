//! What a successor of this process must know of a guest's requests: which are taken and not answered.
//!
//! Blkif has no such record of its own, and its responses take the places of requests: of one that is not answered
//! there may be nothing left in the ring. So each request is copied into a file before it counts as taken. The file is
//! mapped by whoever serves the guest, and what a process has stored in it before it dies is there afterwards: only the
//! order of the program matters, and each store here is a release. (It need not outlive the machine, and the guest does
//! not either.)
//!
//! It starts with a head that says whose requests these are: this boot of this machine, this guest, these rings. It is
//! written whole before the file gets its name, and never changes. Behind it each ring has a part: a word `answered`, and
//! for each of its entries a slot with a state, an index, and a copy of a request. There are never more requests out than
//! a ring has entries. A slot is
//!
//! - *free*: state 0;
//! - *taken*: a request that is to be answered. The index is its own, from which the order of requests is known;
//! - *staged*, with a number: its response is being put into the ring as the one of this number.
//!
//! To take a request: copy it and its index into a free slot, then make that one *taken*. From then on the request counts
//! as taken; before, it is still in the ring, where nothing has overwritten it.
//!
//! To answer some: make the slot of each *staged*, and put its response into the ring; then store the ring's `rsp_prod`,
//! and these responses count as given; then store the same number in `answered`, and then free the slots.
//!
//! A successor compares `rsp_prod`, which the guest could have changed, with `answered`: it is at most as many ahead
//! as there are slots staged from `answered` on, else the ring makes no sense. Then it makes `answered` what `rsp_prod`
//! is. A slot that is *staged* with a number before that was answered, and is freed. One with this number or a later one
//! was not: it becomes *taken* again. As many requests as have been taken are answered or in a slot, so the next
//! request in the ring has the index `rsp_prod` plus the count of taken slots. What is taken is done once more, in the
//! order of indices. Death on the way leaves what the next successor repairs in the same way, because no response is
//! given meanwhile.
//!
//! A request that is done once more finds its pages granted as before: the front end has them until the answer. The
//! segments of an indirect request are in such pages too, and are read again.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use ::xen::Domain;
use block::Errno;
use rustix::fs::{FallocateFlags, Mode, OFlags};

use super::device::Connection;
use super::layout::{Layout, REQUEST_MAX, Raw};
use crate::mapping::{MapError, Mapping};
use crate::words::Words;

/// The first bytes, with the version of what follows.
const MAGIC: &str = "tapdisk journal of a Xen disk 1\n";
/// The head ends at a multiple of this many bytes.
const HEAD_ALIGN: usize = 4096;
/// A ring's part: `answered` and padding, then slots.
const ANSWERED: usize = 0;
const SLOTS: usize = 64;
/// A slot: its state, the number that goes with the state, the request's index, and the request.
const STATE: usize = 0;
const INDEX: usize = 8;
const REQUEST: usize = 16;
const SLOT_LEN: usize = REQUEST + REQUEST_MAX;
/// States, in the upper half of a word whose lower half is the number.
const TAKEN: u64 = 1 << 32;
const STAGED: u64 = 2 << 32;

/// Why there is no journal to work with.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum JournalError {
    #[error(
        "the guest has had a back end before, whose record of requests is not at {}: what they were is lost; detach the \
         disk from the guest and attach it anew",
        path.display()
    )]
    Missing { path: PathBuf },
    #[error(
        "the record of requests at {} is not of this guest's connection: {why}; detach the disk from the guest and attach \
         it anew",
        path.display()
    )]
    Other { path: PathBuf, why: &'static str },
    #[error("the record of requests at {} cannot be {what}: {errno}", path.display())]
    File { path: PathBuf, what: &'static str, errno: Errno },
    #[error("the record of requests at {} cannot be mapped: {error}", path.display())]
    Map { path: PathBuf, error: MapError },
    #[error(
        "its front end sees {ring} responses, where {answered} were given for certain and {staged} more may have been"
    )]
    Answered { ring: u32, answered: u32, staged: u32 },
    #[error("the record of its requests is damaged: {0}")]
    Damaged(&'static str),
}

/// The record of one connection, with a part for each of its rings.
pub(crate) struct Journal {
    path: PathBuf,
    words: Words<Mapping>,
    /// Where each ring's part is, and for how many entries.
    parts: Vec<(usize, u16)>,
}

/// A ring as a new journal needs to know it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Entries.
    pub(crate) size: u16,
    /// Responses that were given before.
    pub(crate) answered: u32,
}

/// Where the journal of this device is.
pub(crate) fn path(directory: &Path, domain: Domain, device: u32) -> PathBuf {
    directory.join(format!("blkif-{domain}-{device}"))
}

/// Removes one that nobody needs any more, if it is there.
pub(crate) fn forget(path: &Path) {
    match rustix::fs::unlink(path) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(errno) => {
            let path = path.display();
            tracing::warn!(%path, %errno, "the record of a guest's requests, which nobody needs any more, stays");
        }
    }
}

/// What tells one connection from any other.
fn identity(connection: &Connection, device: u32, boot: &str) -> String {
    use std::fmt::Write;
    let mut text = format!("{MAGIC}{}\n{} {device}\n{:?}\n", boot.trim(), connection.domain, connection.abi);
    for ring in &connection.rings {
        // Writing into a string cannot fail.
        write!(text, "{}:", ring.port.0).expect("there is memory");
        for gref in &ring.refs {
            write!(text, " {}", gref.0).expect("there is memory");
        }
        text.push('\n');
    }
    text
}

impl Journal {
    /// An empty one in the place of any other.
    pub(crate) fn create(
        directory: &Path,
        connection: &Connection,
        device: u32,
        shapes: &[Shape],
    ) -> Result<Journal, JournalError> {
        let path = path(directory, connection.domain, device);
        let file = |what| move |errno: rustix::io::Errno| (what, errno);
        let failed = |(what, errno): (&'static str, rustix::io::Errno)| {
            let errno = Errno::new(errno.raw_os_error()).unwrap_or(Errno::EIO);
            JournalError::File { path: path.clone(), what, errno }
        };
        let io = |what: &'static str| {
            let path = path.clone();
            move |error: std::io::Error| JournalError::File { path, what, errno: Errno::from_std(&error) }
        };
        let identity = identity(connection, device, &boot_id(&path)?);
        let (parts, len) = places(&identity, shapes.iter().map(|shape| shape.size));
        let new = path.with_extension("new");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            rustix::fs::open(&new, flags, Mode::RUSR | Mode::WUSR).map_err(file("made")).map_err(failed)?;
        // No store is to meet a lack of space later.
        rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, len as u64)
            .map_err(file("given its space"))
            .map_err(failed)?;
        let written = File::from(fd);
        written.write_all_at(identity.as_bytes(), 0).map_err(io("written"))?;
        for ((at, _), shape) in parts.iter().zip(shapes) {
            let answered = shape.answered.to_le_bytes();
            written.write_all_at(&answered, (at + ANSWERED) as u64).map_err(io("written"))?;
        }
        rustix::fs::rename(&new, &path).map_err(file("put in its place")).map_err(failed)?;
        Journal::map(written.into(), path, parts, len)
    }

    /// That of a predecessor who served this very connection.
    pub(crate) fn open(
        directory: &Path,
        connection: &Connection,
        device: u32,
        sizes: impl Iterator<Item = u16>,
    ) -> Result<Journal, JournalError> {
        let path = path(directory, connection.domain, device);
        let failed = |what: &'static str| {
            let path = path.clone();
            move |error: std::io::Error| JournalError::File { path, what, errno: Errno::from_std(&error) }
        };
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match rustix::fs::open(&path, flags, Mode::empty()).map_err(std::io::Error::from) {
            Ok(fd) => File::from(fd),
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(JournalError::Missing { path }),
            Err(error) => return Err(failed("opened")(error)),
        };
        let identity = identity(connection, device, &boot_id(&path)?);
        let (parts, len) = places(&identity, sizes);
        if file.metadata().map_err(failed("looked at"))?.len() != len as u64 {
            return Err(JournalError::Other { path, why: "its length is another" });
        }
        let mut found = vec![0; identity.len()];
        file.read_exact_at(&mut found, 0).map_err(failed("read"))?;
        if found != identity.as_bytes() {
            let why = "it names another boot, another guest, or other rings";
            return Err(JournalError::Other { path, why });
        }
        Journal::map(file.into(), path, parts, len)
    }

    fn map(
        fd: OwnedFd,
        path: PathBuf,
        parts: Vec<(usize, u16)>,
        len: usize,
    ) -> Result<Journal, JournalError> {
        let mapping = match Mapping::own(fd.as_fd(), len as u64) {
            Ok(mapping) => mapping,
            Err(error) => return Err(JournalError::Map { path, error }),
        };
        let words = mapping.words(0, len).expect("all of the mapping");
        Ok(Journal { path, words, parts })
    }

    /// The part of one ring.
    ///
    /// # Panics
    /// If there is no such ring.
    pub(crate) fn part(&self, ring: usize) -> Part {
        let (at, size) = self.parts[ring];
        Part { words: self.words.clone(), at, size }
    }

    /// Nobody needs it any more.
    pub(crate) fn remove(self) {
        forget(&self.path);
    }
}

/// Where the parts of rings of these sizes are, and how long a journal is with them.
fn places(identity: &str, sizes: impl Iterator<Item = u16>) -> (Vec<(usize, u16)>, usize) {
    // A byte at least behind the identity is zero: no longer one starts with the same words.
    let mut end = (identity.len() + 1).next_multiple_of(HEAD_ALIGN);
    let place = |size: u16| {
        let at = end;
        end += SLOTS + SLOT_LEN * usize::from(size);
        (at, size)
    };
    let parts = sizes.map(place).collect();
    (parts, end)
}

/// Tells one boot of a machine from another.
fn boot_id(path: &Path) -> Result<String, JournalError> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(|error| {
        let errno = Errno::from_std(&error);
        JournalError::File { path: path.into(), what: "told from another boot's", errno }
    })
}

/// One ring's part of a journal.
pub(crate) struct Part {
    words: Words<Mapping>,
    at: usize,
    size: u16,
}

/// A request that a predecessor has taken and not answered.
pub(crate) struct Left {
    pub(crate) slot: u16,
    pub(crate) raw: Raw,
}

impl Part {
    fn slot(&self, slot: u16) -> usize {
        assert!(slot < self.size, "slot {slot} of {}", self.size);
        self.at + SLOTS + SLOT_LEN * usize::from(slot)
    }

    /// A request is taken; the slot is free.
    #[inline]
    pub(crate) fn take(&mut self, slot: u16, index: u32, raw: &Raw) {
        let at = self.slot(slot);
        let (words, _) = raw.bytes.as_chunks::<8>();
        for (nth, word) in words.iter().enumerate() {
            self.words.put_u64(at + REQUEST + 8 * nth, u64::from_le_bytes(*word), Release);
        }
        self.words.put_u64(at + INDEX, index.into(), Release);
        self.words.put_u64(at + STATE, TAKEN, Release);
    }

    /// Its response is being put into the ring as the one of this number.
    #[inline]
    pub(crate) fn stage(&mut self, slot: u16, response: u32) {
        self.words.put_u64(self.slot(slot) + STATE, STAGED | u64::from(response), Release);
    }

    /// The front end sees so many responses, those of these slots among them.
    #[inline]
    pub(crate) fn published(&mut self, slots: &[u16], answered: u32) {
        self.words.put_u32(self.at + ANSWERED, answered, Release);
        for slot in slots {
            self.words.put_u64(self.slot(*slot) + STATE, 0, Release);
        }
    }

    /// Takes over from a predecessor: what is to be done once more, in the order of requests. `answered` is what the ring
    /// says.
    pub(crate) fn recover(
        &mut self,
        answered: u32,
        layout: &'static Layout,
    ) -> Result<Vec<Left>, JournalError> {
        let known = self.words.u32(self.at + ANSWERED, Acquire);
        let (mut unanswered, mut over) = (Vec::new(), Vec::new());
        let mut staged = 0;
        for slot in 0..self.size {
            let state = self.words.u64(self.slot(slot) + STATE, Relaxed);
            let number = state as u32;
            match state & !u64::from(u32::MAX) {
                0 if number == 0 => {}
                TAKEN if number == 0 => unanswered.push(slot),
                STAGED => {
                    // No number is further from `answered` than there are slots.
                    staged += u32::from(number.wrapping_sub(known) < u32::from(self.size));
                    let is_over = (number.wrapping_sub(answered) as i32) < 0;
                    if is_over { over.push(slot) } else { unanswered.push(slot) }
                }
                _ => return Err(JournalError::Damaged("a slot of no known state")),
            }
        }
        if answered.wrapping_sub(known) > staged {
            return Err(JournalError::Answered { ring: answered, answered: known, staged });
        }
        self.published(&over, answered);
        for slot in &unanswered {
            self.words.put_u64(self.slot(*slot) + STATE, TAKEN, Release);
        }
        let next = answered.wrapping_add(unanswered.len() as u32);
        let age = |slot: &u16| (self.words.u64(self.slot(*slot) + INDEX, Relaxed) as u32).wrapping_sub(next);
        unanswered.sort_by_key(age);
        Ok(unanswered.into_iter().map(|slot| Left { slot, raw: self.raw(slot, layout) }).collect())
    }

    fn raw(&self, slot: u16, layout: &'static Layout) -> Raw {
        let at = self.slot(slot) + REQUEST;
        let mut raw = Raw { bytes: [0; REQUEST_MAX], layout };
        let (words, _) = raw.bytes.as_chunks_mut::<8>();
        for (nth, word) in words.iter_mut().enumerate() {
            *word = self.words.u64(at + 8 * nth, Relaxed).to_le_bytes();
        }
        raw
    }

    /// Whether the file behind it was cut short.
    pub(crate) fn is_broken(&self) -> bool {
        self.words.is_broken()
    }
}
