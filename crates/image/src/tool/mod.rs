//! Work on images that nobody serves: conversion, maps, commits, rebases. None of it knows a format.

mod commit;
mod convert;
mod layers;
mod map;
mod pack;
mod pump;
mod rebase;

use block::{Buf, Error, Span};

pub use commit::commit;
pub use convert::{Convert, convert};
pub use map::{Mapped, map};
pub use pack::pack;
pub use rebase::rebase;

/// Bytes that are moved in one piece, as a rule.
const PIECE: u64 = 1 << 20;
/// Pieces that are under way at a time; with `PIECE` this bounds the memory for them.
const PIECES_MAX: usize = 16;
/// The least number of bytes that are looked at together for being zero.
const GRAIN_MIN: u64 = 4096;

/// So many bytes are looked at first.
const FIRST: usize = 256;

/// Who watches work that may take long.
pub trait Watch {
    /// So many bytes more, of the disk, are behind us.
    fn advance(&self, bytes: u64);

    /// Whether it is to stop at the next place where that does no harm.
    fn is_stopped(&self) -> bool;
}

/// Nobody watches.
pub struct Unwatched;

impl Watch for Unwatched {
    fn advance(&self, _bytes: u64) {}

    fn is_stopped(&self) -> bool {
        false
    }
}

/// Why work on images ended early.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ToolError {
    /// Whoever watches it said so.
    #[error("told to stop before the end")]
    Stopped,
    /// What was to be copied could not be read.
    #[error("cannot read what is to be copied")]
    Source(#[source] Error),
    /// Where it was to be copied could not be written.
    #[error("cannot write the copy")]
    Target(#[source] Error),
    /// A piece of the work ended without a result.
    #[error("a part of the work panicked (a bug in tapdisk)")]
    Panicked,
}

/// The first bytes of a span, up to the next multiple of `len`, and the rest.
fn next_piece(span: Span, len: u64) -> (Span, Span) {
    span.split_at((span.at() / len + 1).saturating_mul(len))
}

/// The runs of bytes of `buf`, which holds the disk's bytes from `at` on, and whether each is zero. They begin and end at
/// multiples of `grain` bytes of the disk, or where the buffer does.
fn zero_runs(buf: &Buf, at: u64, grain: u64) -> Vec<(Span, bool)> {
    let mut runs: Vec<(Span, bool)> = Vec::new();
    let mut rest = Span::of(at, buf);
    while !rest.is_empty() {
        let (piece, others) = next_piece(rest, grain);
        let zero = is_zero(&buf.part(at, piece));
        match runs.last_mut() {
            Some((run, same)) if *same == zero => {
                *run = Span::new(run.at(), run.len() + piece.len()).expect("it is within a buffer's span")
            }
            Some(_) | None => runs.push((piece, zero)),
        }
        rest = others;
    }
    runs
}

/// Whether all bytes are zero. They are copied out bit by bit, since a kernel may write them.
fn is_zero(buf: &Buf) -> bool {
    let mut bytes = [0; GRAIN_MIN as usize];
    let mut at = 0;
    while at < buf.len() {
        // What is not zero most often begins with something else.
        let most = if at == 0 { FIRST } else { bytes.len() };
        let part = &mut bytes[..(buf.len() - at).min(most)];
        buf.get(at, part);
        if part.iter().fold(0, |all, byte| all | byte) != 0 {
            return false;
        }
        at += part.len();
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_zeroes_are_found_at_multiples_of_the_disks_bytes() {
        // Bytes 1000 to 21000 of a disk, of which 8191 and 20999 are not zero.
        let buf = Buf::zeroed(20_000);
        buf.put(8191 - 1000, &[1]);
        buf.put(20_999 - 1000, &[1]);
        let runs = zero_runs(&buf, 1000, 4096);
        let expected = [(1000, 4096, true), (4096, 8192, false), (8192, 20480, true), (20480, 21000, false)];
        let found: Vec<_> = runs.iter().map(|(span, zero)| (span.at(), span.end(), *zero)).collect();
        assert_eq!(found, expected);
    }
}
