//! What a request asks for: judged once, from copies, before anything is done (blkif.h).

use ::xen::PAGE;
use ::xen::grants::Piece;
use block::Span;

use super::device::Offered;
use super::layout::{
    DISCARD, FLUSH_DISKCACHE, INDIRECT, INDIRECT_PAGES_MAX, READ, Raw, SECTOR, SECURE, SEGMENT_LEN,
    SEGMENTS_MAX, SEGMENTS_PER_PAGE, Segment, WRITE, WRITE_BARRIER,
};
use super::status::Status;

/// What a request is measured by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// Bytes that the disk has at the moment.
    pub(crate) capacity: u64,
    pub(crate) read_only: bool,
    /// What the guest was told that it may ask for.
    pub(crate) offered: Offered,
}

/// What is to become of a request. Which bytes of the guest it concerns is in its pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Read these bytes of the disk.
    Read(Span),
    /// Write them.
    Write(Span),
    /// Make durable what was answered.
    Flush,
    /// Make durable what was answered, and write these bytes if there are any, durably.
    Barrier {
        /// The bytes.
        write: Option<Span>,
        /// All that was asked for before is done first, and all that is asked for afterwards later.
        in_order: bool,
    },
    /// Discard them.
    Discard(Span),
    /// Answer at once.
    Answer(Status),
}

const REFUSED: Verdict = Verdict::Answer(Status::Error);
const UNSUPPORTED: Verdict = Verdict::Answer(Status::Unsupported);

/// How many segments a request names, as far as it may.
fn count(raw: &Raw, terms: &Terms) -> u16 {
    match raw.operation() {
        READ | WRITE | WRITE_BARRIER | FLUSH_DISKCACHE if raw.segment_count() <= SEGMENTS_MAX => {
            raw.segment_count()
        }
        INDIRECT if raw.indirect_count() <= terms.offered.indirect => raw.indirect_count(),
        _ => 0,
    }
}

/// Bytes of data that a request may need memory for, before its segments are known.
pub(crate) fn memory(raw: &Raw, terms: &Terms) -> usize {
    usize::from(count(raw, terms)) * PAGE
}

/// Whether a request may have to wait for others before it, and others for it.
pub(crate) fn is_in_steps(raw: &Raw) -> bool {
    match raw.operation() {
        WRITE_BARRIER => true,
        FLUSH_DISKCACHE => raw.segment_count() > 0,
        _ => false,
    }
}

/// Whether it is a flush or a barrier without data.
pub(crate) fn is_empty_flush(raw: &Raw) -> bool {
    matches!(raw.operation(), FLUSH_DISKCACHE | WRITE_BARRIER) && raw.segment_count() == 0
}

/// Where the segments of an indirect request are, for who copies them from the guest; nothing where it is another
/// request, or has too many of them.
pub(crate) fn indirect(raw: &Raw, terms: &Terms, pieces: &mut Vec<Piece>) {
    pieces.clear();
    if raw.operation() != INDIRECT {
        return;
    }
    let mut left = usize::from(count(raw, terms));
    for nth in 0..INDIRECT_PAGES_MAX {
        let here = left.min(SEGMENTS_PER_PAGE);
        if here == 0 {
            return;
        }
        left -= here;
        let len = (here * SEGMENT_LEN) as u16;
        pieces.push(Piece { gref: raw.indirect_page(nth), offset: 0, len });
    }
    // More than eight pages of them.
    if left > 0 {
        pieces.clear();
    }
}

/// Judges a copy of a request. `table` is a copy of the segments of an indirect one; `pieces` becomes the bytes of the
/// guest that it concerns, in the order of the disk's bytes.
pub(crate) fn judge(raw: &Raw, table: &[u8], terms: &Terms, pieces: &mut Vec<Piece>) -> Verdict {
    pieces.clear();
    match raw.operation() {
        operation @ (READ | WRITE) => {
            let span = direct(raw, terms, pieces);
            transfer(operation, span, terms)
        }
        INDIRECT => {
            if terms.offered.indirect == 0 {
                return UNSUPPORTED;
            }
            let (segments, _) = table.as_chunks::<SEGMENT_LEN>();
            let count = count(raw, terms);
            if count == 0 || segments.len() != usize::from(count) {
                return REFUSED;
            }
            let span = gather(raw, segments.iter().map(Segment::from_bytes), terms, pieces);
            transfer(raw.indirect_operation(), span, terms)
        }
        // Accepted whether or not they were offered: what is not needed harms nobody, and to "unsupported" Linux would
        // have to be told in another way.
        operation @ (FLUSH_DISKCACHE | WRITE_BARRIER) => flush(operation, raw, terms, pieces),
        DISCARD => discard(raw, terms),
        _ => UNSUPPORTED,
    }
}

fn transfer(operation: u8, span: Option<Span>, terms: &Terms) -> Verdict {
    match (operation, span) {
        (READ, Some(span)) => Verdict::Read(span),
        (WRITE, Some(span)) if !terms.read_only => Verdict::Write(span),
        // Within an indirect request there may be nothing else.
        _ => REFUSED,
    }
}

/// An empty one has a sector number and segments that mean nothing: whatever was there before.
fn flush(operation: u8, raw: &Raw, terms: &Terms, pieces: &mut Vec<Piece>) -> Verdict {
    let in_order = operation == WRITE_BARRIER;
    if raw.segment_count() == 0 {
        return if in_order { Verdict::Barrier { write: None, in_order } } else { Verdict::Flush };
    }
    match direct(raw, terms, pieces) {
        Some(span) if !terms.read_only => Verdict::Barrier { write: Some(span), in_order },
        Some(_) | None => REFUSED,
    }
}

fn discard(raw: &Raw, terms: &Terms) -> Verdict {
    // A discard that is to leave no trace is another thing than one: it is not offered, and not done by halves.
    if !terms.offered.discard || raw.discard_flag() & SECURE != 0 {
        return UNSUPPORTED;
    }
    let bytes = raw.sector().checked_mul(SECTOR).zip(raw.discard_sectors().checked_mul(SECTOR));
    match bytes.and_then(|(at, len)| Span::new(at, len)) {
        Some(span) if span.is_within(terms.capacity) && !terms.read_only => Verdict::Discard(span),
        Some(_) | None => REFUSED,
    }
}

/// The bytes of the disk that the segments within a request are for.
fn direct(raw: &Raw, terms: &Terms, pieces: &mut Vec<Piece>) -> Option<Span> {
    if !(1..=SEGMENTS_MAX).contains(&raw.segment_count()) {
        return None;
    }
    gather(raw, (0..raw.segment_count()).map(|nth| raw.segment(nth)), terms, pieces)
}

/// Turns segments into pieces; the bytes of the disk that they are for, if these are whole blocks that it has and all
/// segments make sense.
fn gather(
    raw: &Raw,
    segments: impl Iterator<Item = Segment>,
    terms: &Terms,
    pieces: &mut Vec<Piece>,
) -> Option<Span> {
    const LAST: u8 = (PAGE as u64 / SECTOR) as u8 - 1;
    let mut sectors = 0;
    for Segment { gref, first, last } in segments {
        if first > last || last > LAST {
            pieces.clear();
            return None;
        }
        let count = u16::from(last - first) + 1;
        let (offset, len) = (u16::from(first) * SECTOR as u16, count * SECTOR as u16);
        pieces.push(Piece { gref, offset, len });
        sectors += u64::from(count);
    }
    let span = Span::new(raw.sector().checked_mul(SECTOR)?, sectors * SECTOR)?;
    let block = u64::from(terms.offered.block).max(SECTOR);
    let fits = span.is_aligned(block) && span.is_within(terms.capacity);
    fits.then_some(span)
}
