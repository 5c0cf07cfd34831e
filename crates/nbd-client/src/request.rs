//! A request as a client sends it, also one that breaks the rules.

use crate::Style;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;

const FLAG_FUA: u16 = 1;
const FLAG_PAYLOAD_LEN: u16 = 32;

/// What is asked for. The fields are free, for requests that make no sense.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // named as in the protocol
pub struct Request<'a> {
    pub command: u16,
    pub flags: u16,
    pub at: u64,
    pub len: u64,
    pub payload: &'a [u8],
}

impl<'a> Request<'a> {
    /// Of any command, without payload.
    pub fn new(command: u16, at: u64, len: u64) -> Request<'a> {
        Request { command, flags: 0, at, len, payload: &[] }
    }

    /// Read these bytes.
    pub fn read(at: u64, len: u64) -> Request<'a> {
        Request::new(0, at, len)
    }

    /// Write these bytes.
    pub fn write(at: u64, payload: &'a [u8]) -> Request<'a> {
        Request { payload, ..Request::new(1, at, payload.len() as u64) }
    }

    /// Make durable what has been answered.
    pub fn flush() -> Request<'a> {
        Request::new(3, 0, 0)
    }

    /// These bytes are not needed any more.
    pub fn trim(at: u64, len: u64) -> Request<'a> {
        Request::new(4, at, len)
    }

    /// Read ahead.
    pub fn cache(at: u64, len: u64) -> Request<'a> {
        Request::new(5, at, len)
    }

    /// Write zeroes.
    pub fn zeroes(at: u64, len: u64) -> Request<'a> {
        Request::new(6, at, len)
    }

    /// Tell what is allocated.
    pub fn status(at: u64, len: u64) -> Request<'a> {
        Request::new(7, at, len)
    }

    /// With these flags as well: 2 is NO_HOLE, 4 DF, 8 REQ_ONE, 16 FAST_ZERO.
    pub fn flagged(mut self, flags: u16) -> Request<'a> {
        self.flags |= flags;
        self
    }

    /// Durable before it is answered.
    pub fn fua(self) -> Request<'a> {
        self.flagged(FLAG_FUA)
    }

    pub(crate) fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// Bytes that a successful answer carries.
    pub(crate) fn answer_len(&self) -> u64 {
        if self.command == 0 { self.len } else { 0 }
    }

    /// The header as it is sent.
    pub fn header(&self, style: Style, cookie: u64) -> Vec<u8> {
        let is_extended = style == Style::Extended;
        let magic = if is_extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let payload = if is_extended && self.command == 1 { FLAG_PAYLOAD_LEN } else { 0 };
        let mut header = Vec::with_capacity(32);
        header.extend(magic.to_be_bytes());
        header.extend((self.flags | payload).to_be_bytes());
        header.extend(self.command.to_be_bytes());
        header.extend(cookie.to_be_bytes());
        header.extend(self.at.to_be_bytes());
        match style {
            Style::Extended => header.extend(self.len.to_be_bytes()),
            Style::Simple | Style::Structured => header.extend((self.len as u32).to_be_bytes()),
        }
        header
    }
}
