//! How answers look on the wire: simple, structured and extended replies.

use block::{Errno, Run, Span};

use super::status::status;
use super::wire::{self, Style, allocation, chunk};

/// A status tells at most so many runs; the client asks on where they end. Their bytes fit a block of 64 KiB.
pub(crate) const EXTENTS_MAX: usize = 4000;
/// Bytes of the longest head: an extended error with its message.
const HEAD_LEN_MAX: usize = 32 + 6 + MESSAGE_LEN_MAX;
/// Messages are for humans and ours are short; the specification allows 4096 bytes.
const MESSAGE_LEN_MAX: usize = 64;

/// What a reply goes back to: some of its request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct To {
    pub(crate) style: Style,
    pub(crate) cookie: u64,
    /// The request's offset, which extended replies repeat.
    pub(crate) at: u64,
}

/// All bytes of a reply, or those before its payload.
pub(crate) struct Head {
    bytes: [u8; HEAD_LEN_MAX],
    len: usize,
}

impl Head {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn new() -> Head {
        Head { bytes: [0; HEAD_LEN_MAX], len: 0 }
    }

    fn put(mut self, bytes: &[u8]) -> Head {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self
    }

    /// "Simple reply message"
    fn simple(to: To, error: u32) -> Head {
        Head::new()
            .put(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes())
            .put(&error.to_be_bytes())
            .put(&to.cookie.to_be_bytes())
    }

    /// "Structured reply chunk message" and "Extended reply chunk message": the only chunk of its reply.
    fn chunk(to: To, kind: u16, payload_len: u32) -> Head {
        let extended = to.style == Style::Extended;
        let magic = if extended { wire::EXTENDED_REPLY_MAGIC } else { wire::STRUCTURED_REPLY_MAGIC };
        let head = Head::new()
            .put(&magic.to_be_bytes())
            .put(&chunk::FLAG_DONE.to_be_bytes())
            .put(&kind.to_be_bytes())
            .put(&to.cookie.to_be_bytes());
        if extended {
            head.put(&to.at.to_be_bytes()).put(&u64::from(payload_len).to_be_bytes())
        } else {
            head.put(&payload_len.to_be_bytes())
        }
    }
}

/// The request succeeded, and there is nothing more to tell.
pub(crate) fn done(to: To) -> Head {
    match to.style {
        Style::Simple => Head::simple(to, 0),
        Style::Structured | Style::Extended => Head::chunk(to, chunk::NONE, 0),
    }
}

/// What comes before the bytes that were read. They are in memory already, so no error can be met on the way:
/// that is why this chunk may be the reply's last.
pub(crate) fn read(to: To, span: Span) -> Head {
    match to.style {
        Style::Simple => Head::simple(to, 0),
        Style::Structured | Style::Extended => {
            // At most 32 MiB and 8 bytes: `request::judge` takes no longer read.
            Head::chunk(to, chunk::OFFSET_DATA, 8 + span.len() as u32).put(&span.at().to_be_bytes())
        }
    }
}

/// The request failed; nothing follows. The errno itself, or why the request was refused, is the message: so a
/// human sees an EDQUOT that NBD has no number for.
pub(crate) fn error(to: To, errno: Errno, fast_zero: bool, why: Option<&str>) -> Head {
    let told = status(errno, fast_zero);
    let message = why.or_else(|| errno.name()).unwrap_or_default().as_bytes();
    let message = &message[..message.len().min(MESSAGE_LEN_MAX)];
    match to.style {
        Style::Simple => Head::simple(to, told),
        Style::Structured | Style::Extended => Head::chunk(to, chunk::ERROR, 6 + message.len() as u32)
            .put(&told.to_be_bytes())
            .put(&(message.len() as u16).to_be_bytes())
            .put(message),
    }
}

/// All bytes of the reply to a block status request of `len` bytes: these runs, of which there is at least one
/// byte.
pub(crate) fn extents(to: To, runs: &[Run], len: u64, one: bool) -> Vec<u8> {
    let extents = merge(runs, len, if one { 1 } else { EXTENTS_MAX });
    let count = extents.len() as u32;
    let mut bytes = Vec::new();
    if to.style == Style::Extended {
        // extension-ext-header, `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`
        bytes.extend(Head::chunk(to, chunk::BLOCK_STATUS_EXT, 8 + 16 * count).bytes());
        bytes.extend(allocation::ID.to_be_bytes());
        bytes.extend(count.to_be_bytes());
        for (len, flags) in extents {
            bytes.extend(len.to_be_bytes());
            bytes.extend(u64::from(flags).to_be_bytes());
        }
    } else {
        // `NBD_REPLY_TYPE_BLOCK_STATUS`; the request had 32 bits for its length, so each extent fits them.
        bytes.extend(Head::chunk(to, chunk::BLOCK_STATUS, 4 + 8 * count).bytes());
        bytes.extend(allocation::ID.to_be_bytes());
        for (len, flags) in extents {
            bytes.extend((len as u32).to_be_bytes());
            bytes.extend(flags.to_be_bytes());
        }
    }
    bytes
}

/// Lengths and flags of at most `count` extents of `len` bytes: "the server SHOULD use different status values
/// between consecutive descriptors".
fn merge(runs: &[Run], len: u64, count: usize) -> Vec<(u64, u32)> {
    let mut extents: Vec<(u64, u32)> = Vec::new();
    let mut left = len;
    for run in runs {
        let part = run.len.min(left);
        if part == 0 {
            continue;
        }
        let hole = if run.allocated { 0 } else { allocation::HOLE };
        let zero = if run.zero { allocation::ZERO } else { 0 };
        let is_full = extents.len() == count;
        match extents.last_mut() {
            Some((len, flags)) if *flags == hole | zero => *len += part,
            Some(_) if is_full => break,
            Some(_) | None => extents.push((part, hole | zero)),
        }
        left -= part;
    }
    extents
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOKIE: u64 = u64::from_be_bytes(*b"biscuits");
    const SIMPLE: To = To { style: Style::Simple, cookie: COOKIE, at: 0x1000 };
    const STRUCTURED: To = To { style: Style::Structured, ..SIMPLE };
    const EXTENDED: To = To { style: Style::Extended, ..SIMPLE };

    const DATA: Run = Run { len: 512, allocated: true, zero: false };
    const HOLE: Run = Run { len: 4096, allocated: false, zero: true };

    #[test]
    fn success_is_told_in_each_style() {
        assert_eq!(done(SIMPLE).bytes(), b"\x67\x44\x66\x98\0\0\0\0biscuits");
        assert_eq!(done(STRUCTURED).bytes(), b"\x66\x8e\x33\xef\0\x01\0\0biscuits\0\0\0\0");
        assert_eq!(
            done(EXTENDED).bytes(),
            b"\x6e\x8a\x27\x8c\0\x01\0\0biscuits\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0"
        );
    }

    #[test]
    fn a_read_announces_its_bytes() {
        let span = Span::new(0x1000, 512).unwrap();
        assert_eq!(read(SIMPLE, span).bytes(), b"\x67\x44\x66\x98\0\0\0\0biscuits");
        assert_eq!(
            read(STRUCTURED, span).bytes(),
            b"\x66\x8e\x33\xef\0\x01\0\x01biscuits\0\0\x02\x08\0\0\0\0\0\0\x10\0"
        );
        assert_eq!(
            read(EXTENDED, span).bytes(),
            b"\x6e\x8a\x27\x8c\0\x01\0\x01biscuits\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x02\x08\0\0\0\0\0\0\x10\0"
        );
    }

    #[test]
    fn an_error_carries_its_cause_as_a_message() {
        assert_eq!(error(SIMPLE, Errno::EDQUOT, false, None).bytes(), b"\x67\x44\x66\x98\0\0\0\x1cbiscuits");
        assert_eq!(
            error(STRUCTURED, Errno::EDQUOT, false, None).bytes(),
            b"\x66\x8e\x33\xef\0\x01\x80\x01biscuits\0\0\0\x0c\0\0\0\x1c\0\x06EDQUOT"
        );
        assert_eq!(
            error(EXTENDED, Errno::EINVAL, false, Some("no")).bytes(),
            b"\x6e\x8a\x27\x8c\0\x01\x80\x01biscuits\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x08\0\0\0\x16\0\x02no"
        );
        let long = "x".repeat(5000);
        assert_eq!(error(EXTENDED, Errno::EIO, false, Some(&long)).bytes().len(), HEAD_LEN_MAX);
    }

    #[test]
    fn extents_are_told_in_both_widths() {
        assert_eq!(
            extents(STRUCTURED, &[DATA, HOLE], 4608, false),
            b"\x66\x8e\x33\xef\0\x01\0\x05biscuits\0\0\0\x14\0\0\0\x01\0\0\x02\0\0\0\0\0\0\0\x10\0\0\0\0\x03"
        );
        assert_eq!(
            extents(EXTENDED, &[HOLE], 1 << 40, false)[32..],
            *b"\0\0\0\x01\0\0\0\x01\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x03"
        );
    }

    #[test]
    fn equal_neighbours_are_one_extent_and_none_is_empty() {
        let empty = Run { len: 0, ..HOLE };
        assert_eq!(merge(&[empty, DATA, empty, DATA, HOLE, empty], 1 << 20, 99), [(1024, 0), (4096, 3)]);
        let odd =
            [Run { len: 1, allocated: true, zero: true }, Run { len: 2, allocated: false, zero: false }];
        assert_eq!(merge(&odd, 1 << 20, 99), [(1, 2), (2, 1)]);
    }

    #[test]
    fn extents_stop_at_the_count_and_at_the_end_of_the_request() {
        assert_eq!(merge(&[DATA, DATA, HOLE, DATA], 1 << 20, 1), [(1024, 0)]);
        assert_eq!(merge(&[DATA, HOLE], 600, 99), [(512, 0), (88, 3)]);
        let runs: Vec<Run> = (0..10_000).map(|at| if at % 2 == 0 { DATA } else { HOLE }).collect();
        assert_eq!(merge(&runs, u64::MAX, EXTENTS_MAX).len(), EXTENTS_MAX);
        assert!(extents(EXTENDED, &runs, u64::MAX, false).len() <= 64 << 10);
    }
}
