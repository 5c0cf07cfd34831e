//! A split virtqueue in memory that a guest shares and may change at any time (virtio 1.2, section 2.7).
//!
//! Each word is read once; the copy is checked, and only the copy is used.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::fence;

use super::inflight::InflightError;
use super::memory::{Memory, Outside};
use crate::mapping::Mapping;
use crate::words::Words;

/// The longest ring: QEMU's longest (VIRTQUEUE_MAX_SIZE). Virtio would allow 32768 (2.7), and each descriptor of
/// those could be a request with a thousand pieces that we keep.
pub(crate) const SIZE_MAX: u16 = 1024;
/// Pieces of one request, in the ring and in a table together. One that keeps to our limits has 128.
const PIECES_MAX: usize = 1024;
/// The longest table of indirect descriptors. A request that keeps to our limits has 128; others accept as many.
const TABLE_MAX: usize = 1024;
const DESCRIPTOR_LEN: usize = 16;

/// Flags of a descriptor (2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// The available ring and the used ring have flags, an index, and then the ring (2.7.6, 2.7.8).
const FLAGS_AT: usize = 0;
const INDEX_AT: usize = 2;
const RING_AT: usize = 4;
/// VIRTQ_AVAIL_F_NO_INTERRUPT: the driver does not want to be signalled.
const NO_INTERRUPT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY: the driver need not kick.
const NO_NOTIFY: u16 = 1;

/// Why a ring cannot go on: what the driver put there has no meaning.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RingError {
    #[error("the available index is {found}, and {next} was the next of a ring of {size}")]
    Index { found: u16, next: u16, size: u16 },
    #[error("head {head} in a ring of {size}")]
    Head { head: u16, size: u16 },
    #[error("head {0} was made available again before it was used")]
    Duplicate(u16),
    #[error("descriptor {next} follows in a table of {size}")]
    Next { next: u16, size: usize },
    #[error("a chain of more than the {0} descriptors that there are: it goes round in circles")]
    Circle(usize),
    #[error("an indirect descriptor, which was not negotiated")]
    Indirect,
    #[error("an indirect descriptor within a table of these")]
    Nested,
    #[error("an indirect descriptor with another one behind it")]
    NotLast,
    #[error("a table of {0} bytes: from 1 to 1024 descriptors of 16 bytes are expected")]
    Table(u32),
    #[error("a request of more than {PIECES_MAX} pieces")]
    Pieces,
    #[error("a descriptor to read from behind one to write to")]
    Order,
    #[error("a request whose header has {0} bytes: 16 are expected")]
    Header(u64),
    #[error("a request without a byte for its status")]
    NoStatus,
    #[error("the ring's {what} at {at:#x}, which is no multiple of {align}")]
    Misaligned { what: &'static str, at: u64, align: usize },
    #[error("{what}: {outside}")]
    Outside { what: &'static str, outside: Outside },
    #[error("the file behind the ring's memory was cut short")]
    Gone,
    #[error(transparent)]
    Inflight(#[from] InflightError),
}

/// Names what lies outside of the memory.
pub(crate) fn outside(what: &'static str) -> impl Fn(Outside) -> RingError {
    move |outside| RingError::Outside { what, outside }
}

/// Where a ring's parts lie, as addresses of the front end's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Addresses {
    pub(crate) descriptors: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
}

/// What was negotiated about rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ways {
    /// VIRTIO_F_INDIRECT_DESC.
    pub(crate) indirect: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub(crate) event_idx: bool,
}

/// A piece of a guest's memory, as a descriptor tells it: not checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) at: u64,
    pub(crate) len: u32,
}

/// The pieces of one request.
#[derive(Default)]
pub(crate) struct Chain {
    pieces: Vec<Piece>,
    /// The first so many are for us to read, the others for us to write.
    readable: usize,
    /// Room for a table of indirect descriptors.
    table: Vec<u8>,
}

impl Chain {
    /// What the driver wrote for us.
    pub(crate) fn readable(&self) -> &[Piece] {
        &self.pieces[..self.readable]
    }

    /// Where we write for the driver.
    pub(crate) fn writable(&self) -> &[Piece] {
        &self.pieces[self.readable..]
    }

    /// How many pieces.
    pub(crate) fn len(&self) -> usize {
        self.pieces.len()
    }

    fn clear(&mut self) {
        self.pieces.clear();
        self.readable = 0;
    }

    #[inline]
    fn add(&mut self, descriptor: Descriptor) -> Result<(), RingError> {
        if descriptor.flags & WRITE == 0 {
            // 2.7.4.2: "The driver MUST place any device-writable descriptor elements after any device-readable".
            if self.readable != self.pieces.len() {
                return Err(RingError::Order);
            }
            self.readable += 1;
        }
        if self.pieces.len() >= PIECES_MAX {
            return Err(RingError::Pieces);
        }
        self.pieces.push(Piece { at: descriptor.at, len: descriptor.len });
        Ok(())
    }
}

/// A copy of a descriptor.
#[derive(Clone, Copy)]
struct Descriptor {
    at: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[inline]
    fn new(at: u64, rest: u64) -> Descriptor {
        Descriptor { at, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    fn from_bytes(bytes: &[u8; DESCRIPTOR_LEN]) -> Descriptor {
        let number = u128::from_le_bytes(*bytes);
        Descriptor::new(number as u64, (number >> 64) as u64)
    }
}

/// The words of a ring.
struct Parts {
    descriptors: Words<Mapping>,
    avail: Words<Mapping>,
    used: Words<Mapping>,
}

impl Parts {
    fn find(memory: &Memory, addresses: Addresses, size: u16, ways: Ways) -> Result<Parts, RingError> {
        let size = usize::from(size);
        // The event index behind each ring is used only where it was negotiated.
        let event = if ways.event_idx { 2 } else { 0 };
        let find = |what: &'static str, at: u64, len: usize, align: usize| {
            let words = memory.words(at, len).map_err(outside(what))?;
            match words.is_aligned(align) {
                true => Ok(words),
                false => Err(RingError::Misaligned { what, at, align }),
            }
        };
        Ok(Parts {
            descriptors: find("descriptors", addresses.descriptors, DESCRIPTOR_LEN * size, 16)?,
            avail: find("available ring", addresses.avail, RING_AT + 2 * size + event, 2)?,
            used: find("used ring", addresses.used, RING_AT + 8 * size + event, 4)?,
        })
    }

    fn is_broken(&self) -> bool {
        self.descriptors.is_broken() || self.avail.is_broken() || self.used.is_broken()
    }
}

/// The device's side of a ring.
pub(crate) struct Ring {
    parts: Parts,
    size: u16,
    ways: Ways,
    /// The index in the available ring of what is taken next.
    next: u16,
    /// The available index as it was last read.
    avail: u16,
    /// The used index, as it was last published.
    used: u16,
    /// Used elements that are in the ring and not published yet.
    staged: u16,
    /// The used index when the driver's wish to be signalled was last looked at.
    signalled: Option<u16>,
    /// What the driver was told of kicks.
    kicks: Kicks,
}

/// What a driver was told of kicks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kicks {
    /// Whatever a predecessor has told it, or it finds in other memory.
    Unknown,
    /// They are not needed.
    Silenced,
    /// They are needed from this index in the available ring on.
    Asked(u16),
}

impl Ring {
    /// A ring of `size`, a power of two that is no more than [`SIZE_MAX`]. Its used index is the one in memory; what
    /// is taken next is told later.
    pub(crate) fn new(
        memory: &Memory,
        addresses: Addresses,
        size: u16,
        ways: Ways,
    ) -> Result<Ring, RingError> {
        assert!(size.is_power_of_two() && size <= SIZE_MAX, "a ring of {size}");
        let parts = Parts::find(memory, addresses, size, ways)?;
        let used = parts.used.u16(INDEX_AT, Relaxed);
        let ring = Ring {
            parts,
            size,
            ways,
            next: used,
            avail: used,
            used,
            staged: 0,
            signalled: None,
            kicks: Kicks::Unknown,
        };
        Ok(ring)
    }

    /// The front end has changed its memory: finds the ring's words there.
    pub(crate) fn move_to(&mut self, memory: &Memory, addresses: Addresses) -> Result<(), RingError> {
        self.parts = Parts::find(memory, addresses, self.size, self.ways)?;
        self.kicks = Kicks::Unknown;
        Ok(())
    }

    /// How many descriptors it has.
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The used index, as the driver sees it.
    pub(crate) fn used(&self) -> u16 {
        self.used
    }

    /// The index in the available ring of what is taken next.
    pub(crate) fn next(&self) -> u16 {
        self.next
    }

    /// Goes on with this index in the available ring.
    pub(crate) fn start_at(&mut self, next: u16) {
        self.next = next;
        self.avail = next;
    }

    /// Whether the driver has made something available that was not taken. Cheap.
    #[inline]
    pub(crate) fn has_news(&self) -> bool {
        self.parts.avail.u16(INDEX_AT, Relaxed) != self.next
    }

    /// Asks the driver for kicks, and looks once more.
    pub(crate) fn arm(&mut self) -> bool {
        let asked = Kicks::Asked(self.next);
        if self.kicks == asked {
            // It has seen that, or we would have seen what it made available before.
            return self.has_news();
        }
        if self.ways.event_idx {
            self.parts.used.put_u16(self.avail_event_at(), self.next, Relaxed);
        } else {
            self.parts.used.put_u16(FLAGS_AT, 0, Relaxed);
        }
        self.kicks = asked;
        // What the driver makes available before it sees that it is to kick, must be seen here (2.7.10: it looks at
        // our wish after a barrier of its own).
        fence(std::sync::atomic::Ordering::SeqCst);
        self.has_news()
    }

    /// The driver need not kick while we look by ourselves.
    fn silence(&mut self) {
        // An event index is left where it is: far behind, where the driver does not come by soon.
        if !self.ways.event_idx && self.kicks != Kicks::Silenced {
            self.kicks = Kicks::Silenced;
            self.parts.used.put_u16(FLAGS_AT, NO_NOTIFY, Relaxed);
        }
    }

    /// The next head that the driver has made available, checked to be one. It counts as taken by [`Ring::advance`].
    #[inline]
    pub(crate) fn peek(&mut self) -> Result<Option<u16>, RingError> {
        if self.next == self.avail {
            let (found, next, size) = (self.parts.avail.u16(INDEX_AT, Acquire), self.next, self.size);
            if found.wrapping_sub(next) > size {
                return Err(RingError::Index { found, next, size });
            }
            self.avail = found;
            if found == next {
                return Ok(None);
            }
            self.silence();
        }
        let place = usize::from(self.next & (self.size - 1));
        let (head, size) = (self.parts.avail.u16(RING_AT + 2 * place, Relaxed), self.size);
        if head >= size {
            return Err(RingError::Head { head, size });
        }
        Ok(Some(head))
    }

    /// What was peeked at is taken.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.next = self.next.wrapping_add(1);
    }

    /// Collects the pieces of the request that starts at `head`, a head.
    #[inline]
    pub(crate) fn chain(&self, head: u16, memory: &Memory, chain: &mut Chain) -> Result<(), RingError> {
        chain.clear();
        let size = usize::from(self.size);
        match follow(usize::from(head), size, |index| self.descriptor(index), chain)? {
            Some(indirect) => self.table(indirect, memory, chain),
            None => Ok(()),
        }
    }

    /// Reads each of its words once.
    #[inline]
    fn descriptor(&self, index: usize) -> Descriptor {
        let at = DESCRIPTOR_LEN * index;
        let words = &self.parts.descriptors;
        Descriptor::new(words.u64(at, Relaxed), words.u64(at + 8, Relaxed))
    }

    /// Collects the pieces of a table of indirect descriptors (2.7.5.3), from a copy of it.
    fn table(&self, descriptor: Descriptor, memory: &Memory, chain: &mut Chain) -> Result<(), RingError> {
        if !self.ways.indirect {
            return Err(RingError::Indirect);
        }
        if descriptor.flags & NEXT != 0 {
            return Err(RingError::NotLast);
        }
        let len = descriptor.len as usize;
        if len == 0 || !len.is_multiple_of(DESCRIPTOR_LEN) || len > TABLE_MAX * DESCRIPTOR_LEN {
            return Err(RingError::Table(descriptor.len));
        }
        let mut table = std::mem::take(&mut chain.table);
        table.resize(len, 0);
        let read = memory.read(descriptor.at, &mut table).map_err(outside("a table of descriptors"));
        let result = read.and_then(|()| walk(&table, chain));
        chain.table = table;
        result
    }

    /// Puts a used element into the ring; the driver sees it when it is published. Of the heads that are out, each is
    /// put there once: so there is always room.
    #[inline]
    pub(crate) fn stage(&mut self, head: u16, written: u32) {
        let place = usize::from(self.used.wrapping_add(self.staged) & (self.size - 1));
        let at = RING_AT + 8 * place;
        self.parts.used.put_u32(at, u32::from(head), Relaxed);
        self.parts.used.put_u32(at + 4, written, Relaxed);
        self.staged += 1;
    }

    /// Shows the driver what was staged; its new index, or `None` where that was nothing.
    #[inline]
    pub(crate) fn publish(&mut self) -> Option<u16> {
        if self.staged == 0 {
            return None;
        }
        self.used = self.used.wrapping_add(std::mem::take(&mut self.staged));
        self.parts.used.put_u16(INDEX_AT, self.used, Release);
        Some(self.used)
    }

    /// Whether the driver wants a signal for what was published since this was asked last (2.7.7).
    #[inline]
    pub(crate) fn wants_signal(&mut self) -> bool {
        // It must see the index before we see that it does not want a signal: it says so, and then looks once more.
        fence(std::sync::atomic::Ordering::SeqCst);
        let before = self.signalled.replace(self.used);
        if !self.ways.event_idx {
            return self.parts.avail.u16(FLAGS_AT, Relaxed) & NO_INTERRUPT == 0;
        }
        let event = self.parts.avail.u16(self.used_event_at(), Relaxed);
        // Of what a predecessor signalled nothing is known.
        before.is_none_or(|before| passes(event, before, self.used))
    }

    /// `used_event`, behind the available ring.
    fn used_event_at(&self) -> usize {
        RING_AT + 2 * usize::from(self.size)
    }

    /// `avail_event`, behind the used ring.
    fn avail_event_at(&self) -> usize {
        RING_AT + 8 * usize::from(self.size)
    }

    /// Whether the file behind its memory was cut short.
    pub(crate) fn is_broken(&self) -> bool {
        self.parts.is_broken()
    }
}

/// Whether an index that goes from `before` to `now` passes `event` (2.7.10, `vring_need_event`): whether `event` is
/// one of those in `before..now`.
fn passes(event: u16, before: u16, now: u16) -> bool {
    now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
}

/// Collects the pieces of a copied table.
fn walk(table: &[u8], chain: &mut Chain) -> Result<(), RingError> {
    let (descriptors, _) = table.as_chunks::<DESCRIPTOR_LEN>();
    let descriptor = |index| Descriptor::from_bytes(&descriptors[index]);
    match follow(0, descriptors.len(), descriptor, chain)? {
        Some(_) => Err(RingError::Nested),
        None => Ok(()),
    }
}

/// Collects pieces from the descriptor `first` on, of `size` that there are, up to the chain's end or to an indirect
/// descriptor, which is the result. Each descriptor is looked at once.
#[inline]
fn follow(
    first: usize,
    size: usize,
    descriptor: impl Fn(usize) -> Descriptor,
    chain: &mut Chain,
) -> Result<Option<Descriptor>, RingError> {
    let mut index = first;
    for _ in 0..size {
        let found = descriptor(index);
        if found.flags & INDIRECT != 0 {
            return Ok(Some(found));
        }
        chain.add(found)?;
        if found.flags & NEXT == 0 {
            return Ok(None);
        }
        index = usize::from(found.next);
        if index >= size {
            return Err(RingError::Next { next: found.next, size });
        }
    }
    Err(RingError::Circle(size))
}
