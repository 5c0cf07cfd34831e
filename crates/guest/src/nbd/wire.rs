//! The bytes of NBD: its magic numbers, constants and headers, named as in its specification.
//!
//! The specification is `doc/proto.md` of NetworkBlockDevice/nbd; headings of it are quoted. What the branch
//! `extension-ext-header` of the same repository adds is marked so. All numbers travel in network byte order.

/// "Newstyle negotiation": the server's first eight bytes.
pub(crate) const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// "Newstyle negotiation": the server's next eight bytes, and the head of every option.
pub(crate) const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// "Fixed newstyle negotiation": the head of every reply to an option.
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// "Request message".
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// "Request message", extended (extension-ext-header).
pub(crate) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// "Simple reply message".
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// "Structured reply chunk message".
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// "Extended reply chunk message" (extension-ext-header).
pub(crate) const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// "Conventions": no string is longer, in bytes.
pub(crate) const STRING_LEN_MAX: usize = 4096;
/// "Size constraints": the payload in bytes that a client may count on, and that we advertise as our maximum.
pub(crate) const PAYLOAD_LEN_MAX: u32 = 1 << 25;
/// "Size constraints": the preferred block size that we advertise, in bytes.
pub(crate) const BLOCK_SIZE_PREFERRED: u32 = 4096;

/// "Handshake flags" and "Client flags"; the bits of the two are the same.
pub(crate) mod handshake {
    pub(crate) const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub(crate) const NO_ZEROES: u16 = 1 << 1;
}

/// "Transmission flags".
pub(crate) mod export {
    pub(crate) const HAS_FLAGS: u16 = 1 << 0;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_CACHE: u16 = 1 << 10;
    pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// "Option types".
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    /// extension-ext-header
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

/// "Option reply types".
pub(crate) mod option_reply {
    const ERROR: u32 = 1 << 31;
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERR_UNSUP: u32 = ERROR | 1;
    pub(crate) const ERR_INVALID: u32 = ERROR | 3;
    pub(crate) const ERR_UNKNOWN: u32 = ERROR | 6;
    pub(crate) const ERR_TOO_BIG: u32 = ERROR | 9;
    /// extension-ext-header
    pub(crate) const ERR_EXT_HEADER_REQD: u32 = ERROR | 10;
}

/// "Option reply types", `NBD_REP_INFO`: what a client may ask to be told of an export.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// "Request types".
pub(crate) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// "Command flags".
pub(crate) mod flag {
    pub(crate) const FUA: u16 = 1 << 0;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
    /// extension-ext-header: the header's length is that of a payload.
    pub(crate) const PAYLOAD_LEN: u16 = 1 << 5;
}

/// "Structured reply types".
pub(crate) mod chunk {
    const ERROR_BIT: u16 = 1 << 15;
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    /// extension-ext-header
    pub(crate) const BLOCK_STATUS_EXT: u16 = 6;
    pub(crate) const ERROR: u16 = ERROR_BIT | 1;
    /// "Structured reply flags": no chunk of this reply follows.
    pub(crate) const FLAG_DONE: u16 = 1 << 0;
}

/// "`base:allocation` metadata context".
pub(crate) mod allocation {
    pub(crate) const NAME: &str = "base:allocation";
    /// The query that lists every context of the namespace.
    pub(crate) const WILDCARD: &str = "base:";
    /// Ours to choose, and unique on a connection.
    pub(crate) const ID: u32 = 1;
    pub(crate) const HOLE: u32 = 1 << 0;
    pub(crate) const ZERO: u32 = 1 << 1;
}

/// How the messages of the transmission phase look, as negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// "Simple reply message"
    Simple,
    /// "Structured reply chunk message"
    Structured,
    /// "Extended reply chunk message" (extension-ext-header), and requests to match.
    Extended,
}

impl Style {
    /// Bytes of the header of a request.
    pub(crate) const fn header_len(self) -> usize {
        match self {
            Style::Simple | Style::Structured => 28,
            Style::Extended => 32,
        }
    }

    /// The first four bytes of a request.
    pub(crate) const fn request_magic(self) -> u32 {
        match self {
            Style::Simple | Style::Structured => REQUEST_MAGIC,
            Style::Extended => EXTENDED_REQUEST_MAGIC,
        }
    }
}

/// Bytes of the longest header of a request.
pub(crate) const HEADER_LEN_MAX: usize = Style::Extended.header_len();

/// "Request message": its header, as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) magic: u32,
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    /// Bytes.
    pub(crate) at: u64,
    /// Bytes; 32 bits of it travel unless headers are extended.
    pub(crate) len: u64,
}

impl Header {
    /// Reads the first [`Style::header_len`] bytes.
    pub(crate) fn parse(bytes: &[u8; HEADER_LEN_MAX], style: Style) -> Header {
        let [m0, m1, m2, m3, f0, f1, c0, c1, rest @ ..] = *bytes;
        let [k0, k1, k2, k3, k4, k5, k6, k7, rest @ ..] = rest;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, l4, l5, l6, l7] = rest;
        Header {
            magic: u32::from_be_bytes([m0, m1, m2, m3]),
            flags: u16::from_be_bytes([f0, f1]),
            command: u16::from_be_bytes([c0, c1]),
            cookie: u64::from_be_bytes([k0, k1, k2, k3, k4, k5, k6, k7]),
            at: u64::from_be_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: match style {
                Style::Simple | Style::Structured => u32::from_be_bytes([l0, l1, l2, l3]).into(),
                Style::Extended => u64::from_be_bytes([l0, l1, l2, l3, l4, l5, l6, l7]),
            },
        }
    }
}

/// Takes fields off the front of an option's data; `None` where they would reach beyond its end.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length of 32 bits and as many bytes.
    pub(crate) fn string(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        let (string, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(string)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magic_numbers_spell_what_the_specification_says() {
        assert_eq!(&NBDMAGIC.to_be_bytes(), b"NBDMAGIC");
        assert_eq!(&IHAVEOPT.to_be_bytes(), b"IHAVEOPT");
    }

    #[test]
    fn a_header_is_read_in_both_lengths() {
        let mut bytes = [0; HEADER_LEN_MAX];
        bytes.copy_from_slice(
            b"\x25\x60\x95\x13\x00\x01\x00\x06cookie!!\0\0\0\0\0\0\x10\0\0\0\x02\0\xff\xff\xff\xff",
        );
        let header = Header::parse(&bytes, Style::Simple);
        assert_eq!(header.magic, REQUEST_MAGIC);
        assert_eq!((header.flags, header.command), (flag::FUA, command::WRITE_ZEROES));
        assert_eq!(&header.cookie.to_be_bytes(), b"cookie!!");
        assert_eq!((header.at, header.len), (4096, 512));
        assert_eq!(Header::parse(&bytes, Style::Extended).len, 0x200_ffff_ffff);
    }

    #[test]
    fn a_field_beyond_the_end_is_none() {
        assert_eq!(Fields(b"\0\0\0\x05hell").string(), None);
        assert_eq!(Fields(b"\xff\xff\xff\xff").string(), None);
        assert_eq!(Fields(b"\0").u16(), None);
        let mut fields = Fields(b"\0\0\0\x02hi\0\x07");
        assert_eq!((fields.string(), fields.u16()), (Some(&b"hi"[..]), Some(7)));
        assert!(fields.is_empty());
    }
}
