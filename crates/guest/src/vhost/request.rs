//! What a chain of descriptors asks for: judged once, from copies, before anything is done (virtio 1.2, section 5.2.6).

use block::{Buf, Op, Span};

use super::config::{DATA_MAX, DISCARD_SECTORS_MAX, RANGES_MAX, SECTOR, ZERO_SECTORS_MAX, feature};
use super::memory::{Byte, Memory, Outside};
use super::ring::{Chain, Piece, RingError, outside};
use super::status::Status;

/// Types of requests.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const HEADER_LEN: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const RANGE_LEN: u64 = 16;
/// The only flag of a range: what is behind zeroes may be freed.
const UNMAP: u32 = 1;
/// Bytes of a disk's name: shorter ones end with a 0.
pub(crate) const ID_LEN: usize = 20;

/// What a request is measured by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// Bytes that a guest may use.
    pub(crate) capacity: u64,
    /// Bytes of a block, a power of two.
    pub(crate) block: u32,
    pub(crate) read_only: bool,
    /// As negotiated.
    pub(crate) features: u64,
    /// The guest believes that there is no write cache: what changes the disk is durable before its answer.
    pub(crate) durable: bool,
    pub(crate) id: [u8; ID_LEN],
}

/// What is to become of a request.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Ask the disk. Where that succeeds, so many bytes were written for the driver besides the status.
    Serve(Op, u32),
    /// Ask the disk several things; none of them writes anything for the driver.
    ServeAll(Vec<Op>),
    /// Answer at once. So many bytes were written besides the status.
    Answer(Status, u32),
}

/// A request, and where its status goes.
pub(crate) struct Judged {
    pub(crate) status: Byte,
    pub(crate) verdict: Verdict,
}

const REFUSED: Verdict = Verdict::Answer(Status::IoErr, 0);
const UNSUPPORTED: Verdict = Verdict::Answer(Status::Unsupp, 0);

/// Judges the request of a chain.
///
/// # Errors
/// Where nobody can be told: there is no header or no place for the status.
#[inline(always)]
pub(crate) fn judge(chain: &Chain, memory: &Memory, terms: &Terms) -> Result<Judged, RingError> {
    let status = status_byte(chain.writable(), memory)?;
    let header = header(chain.readable(), memory)?;
    let verdict = verdict(header, chain, memory, terms).unwrap_or(REFUSED);
    Ok(Judged { status, verdict })
}

/// Bytes of these pieces. Their number is bounded, so that it cannot wrap around.
fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| u64::from(piece.len)).sum()
}

/// 5.2.6: the status is the last byte that the device may write.
#[inline(always)]
fn status_byte(writable: &[Piece], memory: &Memory) -> Result<Byte, RingError> {
    let last = writable.iter().rfind(|piece| piece.len > 0).ok_or(RingError::NoStatus)?;
    let hole = Outside::Hole { at: last.at, len: last.len.into() };
    let at = last.at.checked_add(u64::from(last.len) - 1).ok_or(outside("a status")(hole))?;
    memory.byte(at).map_err(outside("a status"))
}

/// A header that was copied out.
#[derive(Clone, Copy)]
struct Header {
    kind: u32,
    sector: u64,
}

#[inline(always)]
fn header(readable: &[Piece], memory: &Memory) -> Result<Header, RingError> {
    let number = match readable.first() {
        Some(first) if first.len >= HEADER_LEN as u32 => {
            memory.u128(first.at).map_err(outside("a header"))?
        }
        Some(_) | None => split_header(readable, memory)?,
    };
    Ok(Header { kind: number as u32, sector: (number >> 64) as u64 })
}

/// A header in several pieces.
#[cold]
fn split_header(readable: &[Piece], memory: &Memory) -> Result<u128, RingError> {
    let mut bytes = [0; HEADER_LEN];
    let done = copy(readable, 0, &mut bytes, memory).map_err(outside("a header"))?;
    if done == HEADER_LEN { Ok(u128::from_le_bytes(bytes)) } else { Err(RingError::Header(done as u64)) }
}

/// Copies what these pieces hold from byte `skip` on; how many bytes that were.
fn copy(pieces: &[Piece], mut skip: u64, bytes: &mut [u8], memory: &Memory) -> Result<usize, Outside> {
    let mut done = 0;
    for piece in pieces {
        let here = u64::from(piece.len).saturating_sub(skip).min((bytes.len() - done) as u64) as usize;
        if here > 0 {
            let hole = Outside::Hole { at: piece.at, len: piece.len.into() };
            let at = piece.at.checked_add(skip).ok_or(hole)?;
            memory.read(at, &mut bytes[done..done + here])?;
            done += here;
        }
        skip = skip.saturating_sub(piece.len.into());
    }
    Ok(done)
}

#[inline(always)]
fn verdict(header: Header, chain: &Chain, memory: &Memory, terms: &Terms) -> Result<Verdict, Outside> {
    // The header and the status are there, so that neither can be less than that.
    let to_read = total(chain.readable()) - HEADER_LEN as u64;
    let to_write = total(chain.writable()) - 1;
    match header.kind {
        IN => {
            let Some(span) = span(header.sector, to_write, DATA_MAX, terms) else { return Ok(REFUSED) };
            let buf = gather(chain.writable(), 0, span.len(), memory)?;
            Ok(Verdict::Serve(Op::Read { at: span.at(), buf }, span.len() as u32))
        }
        OUT => {
            // Whether or not the guest took notice of VIRTIO_BLK_F_RO.
            if terms.read_only {
                return Ok(REFUSED);
            }
            let Some(span) = span(header.sector, to_read, DATA_MAX, terms) else { return Ok(REFUSED) };
            let buf = gather(chain.readable(), HEADER_LEN as u64, span.len(), memory)?;
            Ok(Verdict::Serve(Op::Write { at: span.at(), buf, fua: terms.durable }, 0))
        }
        kind => rare(kind, to_read, to_write, chain, memory, terms),
    }
}

/// The verdict on what is neither a read nor a write.
#[inline(never)]
fn rare(
    kind: u32,
    to_read: u64,
    to_write: u64,
    chain: &Chain,
    memory: &Memory,
    terms: &Terms,
) -> Result<Verdict, Outside> {
    match kind {
        // Accepted whatever was negotiated: a flush that is not needed harms nobody.
        FLUSH => Ok(Verdict::Serve(Op::Flush, 0)),
        GET_ID => {
            let len = to_write.min(ID_LEN as u64);
            gather(chain.writable(), 0, len, memory)?.put(0, &terms.id[..len as usize]);
            Ok(Verdict::Answer(Status::Ok, len as u32))
        }
        DISCARD if terms.features & feature::DISCARD != 0 => {
            ranges(Erase::Discard, to_read, chain, memory, terms)
        }
        WRITE_ZEROES if terms.features & feature::WRITE_ZEROES != 0 => {
            ranges(Erase::Zero, to_read, chain, memory, terms)
        }
        _ => Ok(UNSUPPORTED),
    }
}

/// The bytes of the disk from this sector on, whole blocks of it that it has, and no more than `max`.
#[inline(always)]
fn span(sector: u64, len: u64, max: u64, terms: &Terms) -> Option<Span> {
    let span = Span::new(sector.checked_mul(SECTOR)?, len)?;
    let fits =
        len <= max && span.is_aligned(u64::from(terms.block).max(SECTOR)) && span.is_within(terms.capacity);
    fits.then_some(span)
}

/// The memory of `len` bytes from byte `skip` of these pieces on, which have as many.
#[inline(always)]
fn gather(pieces: &[Piece], skip: u64, len: u64, memory: &Memory) -> Result<Buf, Outside> {
    let mut ahead = skip;
    for piece in pieces {
        let here = u64::from(piece.len);
        if here <= ahead {
            ahead -= here;
        } else if here - ahead >= len
            && let Some(at) = piece.at.checked_add(ahead)
        {
            return memory.buf(at, len as usize);
        } else {
            break;
        }
    }
    gather_all(pieces, skip, len, memory)
}

/// The same where it is not all in one piece.
#[inline(never)]
fn gather_all(pieces: &[Piece], mut skip: u64, len: u64, memory: &Memory) -> Result<Buf, Outside> {
    let mut left = len;
    let mut parts = pieces.iter().filter_map(move |piece| {
        let here = u64::from(piece.len).saturating_sub(skip).min(left);
        let from = skip;
        skip = skip.saturating_sub(piece.len.into());
        left -= here;
        // An address that wraps around is outside of any memory, and told as such.
        (here > 0).then(|| (piece.at.checked_add(from), here))
    });
    let checked = |(at, len): (Option<u64>, u64)| at.map(|at| (at, len)).ok_or(Outside::Hole { at: 0, len });
    let Some(first) = parts.next() else { return Ok(Buf::zeroed(0)) };
    let mut run = checked(first)?;
    let mut bufs = Vec::new();
    for part in parts {
        let part = checked(part)?;
        // What lies side by side is one.
        if run.0.checked_add(run.1) == Some(part.0) {
            run.1 += part.1;
        } else {
            bufs.push(memory.buf(run.0, run.1 as usize)?);
            run = part;
        }
    }
    let last = memory.buf(run.0, run.1 as usize)?;
    if bufs.is_empty() {
        return Ok(last);
    }
    bufs.push(last);
    Ok(Buf::concat(bufs))
}

/// What is to become of ranges.
#[derive(Clone, Copy)]
enum Erase {
    Discard,
    Zero,
}

/// The ranges of a discard or a write of zeroes.
fn ranges(
    erase: Erase,
    to_read: u64,
    chain: &Chain,
    memory: &Memory,
    terms: &Terms,
) -> Result<Verdict, Outside> {
    let is_whole = to_read.is_multiple_of(RANGE_LEN) && to_read / RANGE_LEN <= u64::from(RANGES_MAX);
    if terms.read_only || !is_whole || to_read == 0 {
        return Ok(REFUSED);
    }
    let mut bytes = [0; RANGE_LEN as usize * RANGES_MAX as usize];
    let bytes = &mut bytes[..to_read as usize];
    copy(chain.readable(), HEADER_LEN as u64, bytes, memory)?;
    let (known, max) = match erase {
        // 5.2.6.2: a discard with the flag for unmapping is unsupported too.
        Erase::Discard => (0, DISCARD_SECTORS_MAX),
        Erase::Zero => (UNMAP, ZERO_SECTORS_MAX),
    };
    let (ranges, _) = bytes.as_chunks::<{ RANGE_LEN as usize }>();
    let ranges = || {
        ranges.iter().map(|range| {
            let number = u128::from_le_bytes(*range);
            (number as u64, (number >> 64) as u32, (number >> 96) as u32)
        })
    };
    // All of it is judged before any of it is done.
    if ranges().any(|(_, _, flags)| flags & !known != 0) {
        return Ok(UNSUPPORTED);
    }
    let op = |(sector, sectors, flags): (u64, u32, u32)| {
        let span = span(sector, u64::from(sectors) * SECTOR, u64::from(max) * SECTOR, terms)?;
        let (unmap, fua) = (flags & UNMAP != 0, terms.durable);
        Some(match erase {
            Erase::Discard => Op::Discard { span, fua },
            Erase::Zero => Op::WriteZeroes { span, unmap, fua, fast: false },
        })
    };
    let ops: Option<Vec<Op>> = ranges().map(op).collect();
    Ok(ops.map_or(REFUSED, Verdict::ServeAll))
}
