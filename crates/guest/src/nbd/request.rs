//! What a client asks for in the transmission phase, judged by its header alone ("Request types").

use block::{Errno, Span};

use super::wire::{self, Header, Style, command, flag};

/// A payload that is too long is read and thrown away up to this many bytes, so that the request can be answered:
/// other servers take as much, so there are clients that send it. Beyond it the client is disconnected, which the
/// specification allows for a payload of more than 32 MiB ("Size constraints").
pub(crate) const SKIP_LEN_MAX: u64 = 64 << 20;

/// What client and server agreed on, and what the disk is like, as far as requests are concerned.
#[derive(Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) style: Style,
    /// Whether block status may be asked for.
    pub(crate) allocation: bool,
    /// Bytes of the disk.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is the disk's.
    Serve(Asked),
    /// It is done as soon as it is understood: it is about no byte at all.
    Nothing,
    /// It is answered with an error, after this many bytes of payload that follow it.
    Refuse { errno: Errno, why: &'static str, payload: u64 },
    /// The client takes its leave; there is no answer.
    Disconnect,
    /// The client is disconnected.
    Drop(Violation),
}

/// Why a client is disconnected during transmission: what was found, and what was expected.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Violation {
    #[error("a request began with {found:#010x} instead of {expected:#010x}")]
    Magic { found: u32, expected: u32 },
    #[error("command {command} with a payload of {len} bytes, at most {max} are taken")]
    TooLong { command: u16, len: u64, max: u64 },
}

/// A request for the disk; everything in it lies within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Read { span: Span },
    Write { span: Span, fua: bool },
    Flush,
    Trim { span: Span, fua: bool },
    WriteZeroes { span: Span, unmap: bool, fua: bool, fast: bool },
    Cache { span: Span },
    Status { span: Span, one: bool },
}

/// Judges a request. It looks at nothing but its arguments, so what it says can be put in a table.
pub(crate) fn judge(header: &Header, terms: Terms) -> Verdict {
    let expected = terms.style.request_magic();
    if header.magic != expected {
        return Verdict::Drop(Violation::Magic { found: header.magic, expected });
    }
    if header.command == command::DISC {
        return Verdict::Disconnect;
    }
    let payload = payload_len(header, terms.style);
    // extension-ext-header: "A server SHOULD initiate hard disconnect if a client sets the
    // NBD_CMD_FLAG_PAYLOAD_LEN flag and uses a length larger than [the] maximum payload length".
    let max = match terms.style {
        Style::Simple | Style::Structured => SKIP_LEN_MAX,
        Style::Extended => wire::PAYLOAD_LEN_MAX.into(),
    };
    if payload > max {
        return Verdict::Drop(Violation::TooLong { command: header.command, len: payload, max });
    }
    match asked(header, terms) {
        Ok(Some(asked)) => Verdict::Serve(asked),
        Ok(None) => Verdict::Nothing,
        Err((errno, why)) => Verdict::Refuse { errno, why, payload },
    }
}

/// How many bytes follow the header.
fn payload_len(header: &Header, style: Style) -> u64 {
    // A write's payload follows with or without the flag: clients in use leave it out, and what they mean is beyond
    // doubt.
    let follows = header.command == command::WRITE
        || (style == Style::Extended && header.flags & flag::PAYLOAD_LEN != 0);
    if follows { header.len } else { 0 }
}

/// What the disk is to do, or `None` where that is nothing.
fn asked(header: &Header, terms: Terms) -> Result<Option<Asked>, (Errno, &'static str)> {
    let &Header { flags, command, at, len, .. } = header;
    check_flags(header, terms)?;
    // "SHOULD return NBD_EPERM if it receives a write or trim request on a read-only export".
    let changes = matches!(command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
    if changes && terms.read_only {
        return Err((Errno::EPERM, "the export is read-only"));
    }
    if command == command::FLUSH {
        // "length and offset are reserved, and MUST be set to all-zero".
        return match (at, len) {
            (0, 0) => Ok(Some(Asked::Flush)),
            _ => Err((Errno::EINVAL, "a flush has neither offset nor length")),
        };
    }
    // "SHOULD return NBD_ENOSPC if it receives a write request including one or more sectors beyond the size of
    // the device", and of zeroes too; "NBD_EINVAL if it receives a read or trim request" of that kind.
    let beyond = match command {
        command::WRITE | command::WRITE_ZEROES => Errno::ENOSPC,
        _ => Errno::EINVAL,
    };
    let span = match Span::new(at, len) {
        Some(span) if span.is_within(terms.size) => span,
        Some(_) | None => return Err((beyond, "the request reaches beyond the end of the export")),
    };
    if matches!(command, command::READ | command::WRITE) && len > wire::PAYLOAD_LEN_MAX.into() {
        return Err(match (command, terms.style) {
            // "permitted to reject large read requests up front with NBD_EOVERFLOW" is said of chunks only.
            (command::READ, Style::Structured | Style::Extended) => {
                (Errno::EOVERFLOW, "a read has at most 32 MiB")
            }
            _ => (Errno::EINVAL, "a payload has at most 32 MiB"),
        });
    }
    if span.is_empty() {
        // "The behavior of a server on such a request is unspecified": there is nothing that could fail. But a
        // status must describe at least one byte, so for none there is no truthful answer.
        return match command {
            command::BLOCK_STATUS => Err((Errno::EINVAL, "a status is of at least one byte")),
            _ => Ok(None),
        };
    }
    let fua = flags & flag::FUA != 0;
    Ok(Some(match command {
        command::READ => Asked::Read { span },
        command::WRITE => Asked::Write { span, fua },
        command::TRIM => Asked::Trim { span, fua },
        command::CACHE => Asked::Cache { span },
        command::WRITE_ZEROES => Asked::WriteZeroes {
            span,
            unmap: flags & flag::NO_HOLE == 0,
            fua,
            fast: flags & flag::FAST_ZERO != 0,
        },
        command::BLOCK_STATUS if terms.allocation => Asked::Status { span, one: flags & flag::REQ_ONE != 0 },
        // "Servers SHOULD reply with NBD_EINVAL to clients sending NBD_CMD_BLOCK_STATUS without selecting at
        // least one metadata context".
        command::BLOCK_STATUS => return Err((Errno::EINVAL, "no metadata context was selected")),
        _ => return Err(UNKNOWN),
    }))
}

const UNKNOWN: (Errno, &str) = (Errno::EINVAL, "the command is unknown");

/// "SHOULD return NBD_EINVAL if it receives an unknown command flag", or "a flag not explicitly documented as
/// applicable to the given request". FUA is applicable to all.
fn check_flags(header: &Header, terms: Terms) -> Result<(), (Errno, &'static str)> {
    let extended = terms.style == Style::Extended;
    let known = match header.command {
        command::READ if terms.style == Style::Simple => 0,
        command::READ => flag::DF,
        command::WRITE if extended => flag::PAYLOAD_LEN,
        command::WRITE | command::FLUSH | command::TRIM | command::CACHE => 0,
        command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
        command::BLOCK_STATUS => flag::REQ_ONE,
        _ => return Err(UNKNOWN),
    };
    if header.flags & !(known | flag::FUA) != 0 {
        return Err((Errno::EINVAL, "a flag is unknown or not for this command"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;
    const SIMPLE: Terms = Terms { style: Style::Simple, allocation: false, size: SIZE, read_only: false };
    const STRUCTURED: Terms = Terms { style: Style::Structured, allocation: true, ..SIMPLE };
    const EXTENDED: Terms = Terms { style: Style::Extended, ..STRUCTURED };
    const FUA: u16 = 1;
    const NO_HOLE: u16 = 2;
    const DF: u16 = 4;
    const REQ_ONE: u16 = 8;
    const FAST_ZERO: u16 = 16;
    const PAYLOAD_LEN: u16 = 32;

    /// Judges a request of this command, flags, offset and length.
    fn told(terms: Terms, (command, flags, at, len): (u16, u16, u64, u64)) -> Verdict {
        let magic = if terms.style == Style::Extended { 0x21e41c71 } else { 0x25609513 };
        judge(&Header { magic, flags, command, cookie: 7, at, len }, terms)
    }

    /// The errno with which it is refused, and the payload that is skipped before.
    fn refused(terms: Terms, request: (u16, u16, u64, u64)) -> (Errno, u64) {
        let told = told(terms, request);
        let Verdict::Refuse { errno, payload, .. } = told else {
            panic!("{request:?} is not refused: {told:?}");
        };
        (errno, payload)
    }

    fn span(at: u64, len: u64) -> Span {
        Span::new(at, len).unwrap()
    }

    #[test]
    fn every_command_becomes_what_it_says() {
        let table = [
            ((0, 0, 4096, 512), Asked::Read { span: span(4096, 512) }),
            ((0, DF | FUA, SIZE - 1, 1), Asked::Read { span: span(SIZE - 1, 1) }),
            ((0, 0, 0, 32 * MIB), Asked::Read { span: span(0, 32 * MIB) }),
            ((1, 0, 1, 2), Asked::Write { span: span(1, 2), fua: false }),
            ((1, FUA, 0, 32 * MIB), Asked::Write { span: span(0, 32 * MIB), fua: true }),
            ((3, 0, 0, 0), Asked::Flush),
            ((3, FUA, 0, 0), Asked::Flush),
            ((4, 0, 0, SIZE), Asked::Trim { span: span(0, SIZE), fua: false }),
            ((4, FUA, 0, 1), Asked::Trim { span: span(0, 1), fua: true }),
            ((5, FUA, 0, SIZE), Asked::Cache { span: span(0, SIZE) }),
            (
                (6, 0, 0, SIZE),
                Asked::WriteZeroes { span: span(0, SIZE), unmap: true, fua: false, fast: false },
            ),
            (
                (6, FUA | NO_HOLE | FAST_ZERO, 3, 5),
                Asked::WriteZeroes { span: span(3, 5), unmap: false, fua: true, fast: true },
            ),
            ((7, 0, 0, SIZE), Asked::Status { span: span(0, SIZE), one: false }),
            ((7, REQ_ONE, 0, 1), Asked::Status { span: span(0, 1), one: true }),
        ];
        for (request, asked) in table {
            assert_eq!(told(STRUCTURED, request), Verdict::Serve(asked), "{request:?}");
        }
    }

    #[test]
    fn requests_beyond_the_end_are_refused_without_wrapping_around() {
        let beyond = [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 511, 512), (i64::MAX as u64, 1)];
        for (at, len) in beyond {
            assert_eq!(refused(SIMPLE, (0, 0, at, len)), (Errno::EINVAL, 0), "read");
            assert_eq!(refused(SIMPLE, (1, 0, at, len)), (Errno::ENOSPC, len), "write, after its payload");
            assert_eq!(refused(SIMPLE, (4, 0, at, len)), (Errno::EINVAL, 0), "trim");
            assert_eq!(refused(SIMPLE, (5, 0, at, len)), (Errno::EINVAL, 0), "cache");
            assert_eq!(refused(SIMPLE, (6, 0, at, len)), (Errno::ENOSPC, 0), "write zeroes");
            assert_eq!(refused(STRUCTURED, (7, 0, at, len)), (Errno::EINVAL, 0), "block status");
        }
    }

    #[test]
    fn a_read_only_export_refuses_what_would_change_it() {
        for terms in [SIMPLE, STRUCTURED] {
            let terms = Terms { read_only: true, ..terms };
            assert_eq!(refused(terms, (1, 0, 0, 512)), (Errno::EPERM, 512));
            assert_eq!(refused(terms, (4, 0, 0, 512)), (Errno::EPERM, 0));
            assert_eq!(refused(terms, (6, 0, 0, 512)), (Errno::EPERM, 0));
            assert_eq!(refused(terms, (1, 0, SIZE, 512)), (Errno::EPERM, 512), "also beyond the end");
            assert!(matches!(told(terms, (0, 0, 0, 512)), Verdict::Serve(_)));
            assert!(matches!(told(terms, (3, 0, 0, 0)), Verdict::Serve(Asked::Flush)));
        }
    }

    #[test]
    fn unknown_commands_and_flags_are_refused() {
        for command in [8, 9, 255, 0xffff] {
            assert_eq!(refused(SIMPLE, (command, 0, 0, 512)), (Errno::EINVAL, 0));
        }
        for command in [0, 1, 3, 4, 5, 6, 7] {
            for bit in 6..16 {
                let len = if command == 3 { 0 } else { 512 };
                assert_eq!(refused(STRUCTURED, (command, 1 << bit, 0, len)).0, Errno::EINVAL);
            }
        }
        for (command, flags) in
            [(0, NO_HOLE), (1, DF), (3, REQ_ONE), (4, NO_HOLE), (5, DF), (6, DF), (7, FAST_ZERO)]
        {
            assert_eq!(refused(STRUCTURED, (command, flags, 0, 512)).0, Errno::EINVAL, "{command} {flags}");
        }
        assert_eq!(refused(SIMPLE, (0, DF, 0, 512)), (Errno::EINVAL, 0), "DF is offered with chunks only");
        assert_eq!(
            refused(SIMPLE, (1, PAYLOAD_LEN, 0, 512)),
            (Errno::EINVAL, 512),
            "a flag of extended headers"
        );
    }

    #[test]
    fn a_flush_has_neither_offset_nor_length() {
        assert_eq!(refused(SIMPLE, (3, 0, 1, 0)), (Errno::EINVAL, 0));
        assert_eq!(refused(SIMPLE, (3, 0, 0, 1)), (Errno::EINVAL, 0));
    }

    #[test]
    fn block_status_needs_a_context_and_a_byte() {
        assert_eq!(refused(Terms { allocation: false, ..STRUCTURED }, (7, 0, 0, 512)), (Errno::EINVAL, 0));
        assert_eq!(refused(STRUCTURED, (7, 0, 0, 0)), (Errno::EINVAL, 0));
    }

    #[test]
    fn no_bytes_are_no_work_but_still_have_a_place() {
        for command in [0, 1, 4, 5, 6] {
            assert_eq!(told(SIMPLE, (command, 0, SIZE, 0)), Verdict::Nothing);
            assert!(matches!(told(SIMPLE, (command, 0, SIZE + 1, 0)), Verdict::Refuse { .. }));
        }
    }

    #[test]
    fn long_payloads_are_refused_and_longer_ones_end_the_connection() {
        assert_eq!(refused(SIMPLE, (0, 0, 0, 32 * MIB + 1)), (Errno::EINVAL, 0));
        assert_eq!(refused(STRUCTURED, (0, 0, 0, 32 * MIB + 1)), (Errno::EOVERFLOW, 0));
        assert_eq!(refused(EXTENDED, (0, 0, 0, 33 * MIB)), (Errno::EOVERFLOW, 0));
        assert_eq!(refused(SIMPLE, (1, 0, 0, 32 * MIB + 1)), (Errno::EINVAL, 32 * MIB + 1));
        assert_eq!(refused(SIMPLE, (1, 0, 0, 64 * MIB)), (Errno::EINVAL, 64 * MIB));
        for (terms, flags, len) in [
            (SIMPLE, 0, 64 * MIB + 1),
            (STRUCTURED, 0, u32::MAX.into()),
            (EXTENDED, PAYLOAD_LEN, 32 * MIB + 1),
            (EXTENDED, PAYLOAD_LEN, u64::MAX),
        ] {
            assert!(matches!(told(terms, (1, flags, 0, len)), Verdict::Drop(Violation::TooLong { .. })));
        }
    }

    #[test]
    fn extended_headers_say_whether_a_payload_follows() {
        let write = Asked::Write { span: span(0, 512), fua: false };
        assert_eq!(told(EXTENDED, (1, PAYLOAD_LEN, 0, 512)), Verdict::Serve(write));
        assert_eq!(told(EXTENDED, (1, 0, 0, 512)), Verdict::Serve(write), "as clients in use send it");
        // "For other commands, the flag will trigger an NBD_EINVAL error", after the payload.
        for command in [0, 3, 4, 5, 6, 7, 8, 99] {
            assert_eq!(refused(EXTENDED, (command, PAYLOAD_LEN, 0, 512)), (Errno::EINVAL, 512), "{command}");
        }
        assert!(matches!(told(EXTENDED, (99, PAYLOAD_LEN, 0, u64::MAX)), Verdict::Drop(_)));
        let terms = Terms { size: i64::MAX as u64, ..EXTENDED };
        let huge = span(4096, 1 << 40);
        assert_eq!(
            told(terms, (4, 0, 4096, 1 << 40)),
            Verdict::Serve(Asked::Trim { span: huge, fua: false })
        );
    }

    #[test]
    fn a_disconnect_is_no_request_whatever_else_it_says() {
        for terms in [SIMPLE, STRUCTURED, EXTENDED] {
            for request in [(2, 0, 0, 0), (2, 0xffff, 1, 2)] {
                assert_eq!(told(terms, request), Verdict::Disconnect);
            }
        }
    }

    #[test]
    fn a_bad_magic_ends_the_connection() {
        for (terms, magic) in [(SIMPLE, 0x25609514), (STRUCTURED, 0x21e41c71), (EXTENDED, 0x25609513)] {
            let header = Header { magic, flags: 0, command: 0, cookie: 0, at: 0, len: 0 };
            assert!(
                matches!(judge(&header, terms), Verdict::Drop(Violation::Magic { found, .. }) if found == magic)
            );
        }
    }
}
