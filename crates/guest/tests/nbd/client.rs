//! A client that says exactly what a test wants, with the numbers of the specification written out again.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const CACHE: u16 = 5;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const BLOCK_STATUS: u16 = 7;

pub(crate) const FUA: u16 = 1;
pub(crate) const NO_HOLE: u16 = 2;
pub(crate) const DF: u16 = 4;
pub(crate) const REQ_ONE: u16 = 8;
pub(crate) const FAST_ZERO: u16 = 16;
pub(crate) const PAYLOAD_LEN: u16 = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Simple,
    Structured,
    Extended,
}

pub(crate) const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

/// An answer, whatever it looked like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) cookie: u64,
    pub(crate) error: u32,
    pub(crate) bytes: Vec<u8>,
    /// Length and flags of each extent.
    pub(crate) extents: Vec<(u64, u64)>,
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    pub(crate) style: Style,
    /// Lengths of the reads that are not answered: a simple reply does not say its own.
    reads: HashMap<u64, Vec<usize>>,
}

/// An option of the handshake.
pub(crate) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &number.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

/// All that a client sends to get to transmission with the default export.
pub(crate) fn handshake(style: Style, allocation: bool) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    match style {
        Style::Simple => {}
        Style::Structured => bytes.extend(option(8, b"")),
        Style::Extended => bytes.extend(option(11, b"")),
    }
    if allocation {
        bytes.extend(option(10, b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation"));
    }
    bytes.extend(option(7, b"\0\0\0\0\0\0"));
    bytes
}

/// A request's header.
pub(crate) fn header(style: Style, command: u16, flags: u16, cookie: u64, at: u64, len: u64) -> Vec<u8> {
    let extended = style == Style::Extended;
    let mut bytes = if extended { 0x21e41c71_u32 } else { 0x25609513 }.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(at.to_be_bytes());
    if extended {
        bytes.extend(len.to_be_bytes());
    } else {
        bytes.extend((len as u32).to_be_bytes());
    }
    bytes
}

/// A write with its payload.
pub(crate) fn write(style: Style, cookie: u64, at: u64, payload: &[u8]) -> Vec<u8> {
    let flags = if style == Style::Extended { PAYLOAD_LEN } else { 0 };
    let mut bytes = header(style, WRITE, flags, cookie, at, payload.len() as u64);
    bytes.extend(payload);
    bytes
}

impl Client {
    pub(crate) fn connect(path: &Path, style: Style) -> Client {
        Client::on(UnixStream::connect(path).unwrap(), style)
    }

    /// Takes a fresh connection through the handshake, with `base:allocation` where that can be had.
    pub(crate) fn on(mut stream: UnixStream, style: Style) -> Client {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(&handshake(style, style != Style::Simple)).unwrap();
        let mut client = Client { stream, style, reads: HashMap::new() };
        client.take(18);
        loop {
            let reply = client.take(20);
            let number = |at: usize| u32::from_be_bytes(reply[at..at + 4].try_into().unwrap());
            client.take(number(16) as usize);
            assert!(number(12) < 1 << 31, "option {} failed: {:#x}", number(8), number(12));
            if (number(8), number(12)) == (7, 1) {
                return client;
            }
        }
    }

    pub(crate) fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Makes a request without a payload.
    pub(crate) fn ask(&mut self, command: u16, flags: u16, cookie: u64, at: u64, len: u64) {
        if command == READ {
            self.reads.entry(cookie).or_default().push(len as usize);
        }
        let bytes = header(self.style, command, flags, cookie, at, len);
        self.send(&bytes);
    }

    pub(crate) fn write(&mut self, cookie: u64, at: u64, payload: &[u8]) {
        let bytes = write(self.style, cookie, at, payload);
        self.send(&bytes);
    }

    /// Makes a request and takes its answer.
    pub(crate) fn get(&mut self, command: u16, flags: u16, at: u64, len: u64) -> Answer {
        self.ask(command, flags, 0xc00c1e, at, len);
        let answer = self.answer();
        assert_eq!(answer.cookie, 0xc00c1e);
        answer
    }

    /// Writes and takes the answer; the error.
    pub(crate) fn put(&mut self, at: u64, payload: &[u8]) -> u32 {
        self.write(0xdad, at, payload);
        let answer = self.answer();
        assert_eq!((answer.cookie, answer.bytes.len()), (0xdad, 0));
        answer.error
    }

    /// The next answer.
    pub(crate) fn answer(&mut self) -> Answer {
        let answer = match self.style {
            Style::Simple => self.simple(),
            Style::Structured | Style::Extended => self.chunk(),
        };
        if let Some(reads) = self.reads.get_mut(&answer.cookie) {
            reads.pop();
        }
        answer
    }

    fn simple(&mut self) -> Answer {
        let head = self.take(16);
        assert_eq!(head[..4], 0x67446698_u32.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
        let len = self.reads.get(&cookie).and_then(|reads| reads.last().copied()).unwrap_or(0);
        let bytes = if error == 0 { self.take(len) } else { vec![] };
        Answer { cookie, error, bytes, extents: vec![] }
    }

    fn chunk(&mut self) -> Answer {
        let extended = self.style == Style::Extended;
        let head = self.take(if extended { 32 } else { 20 });
        let magic = if extended { 0x6e8a278c_u32 } else { 0x668e33ef };
        assert_eq!(head[..4], magic.to_be_bytes());
        assert_eq!(head[4..6], [0, 1], "done");
        let kind = u16::from_be_bytes(head[6..8].try_into().unwrap());
        let cookie = u64::from_be_bytes(head[8..16].try_into().unwrap());
        let len = match extended {
            true => u64::from_be_bytes(head[24..32].try_into().unwrap()) as usize,
            false => u32::from_be_bytes(head[16..20].try_into().unwrap()) as usize,
        };
        let payload = self.take(len);
        let mut answer = Answer { cookie, error: 0, bytes: vec![], extents: vec![] };
        let number = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        match kind {
            0 => assert_eq!(len, 0),
            1 => answer.bytes = payload[8..].to_vec(),
            5 if !extended => {
                answer.extents = payload[4..]
                    .chunks(8)
                    .map(|extent| {
                        let part = |at: usize| u32::from_be_bytes(extent[at..at + 4].try_into().unwrap());
                        (part(0).into(), part(4).into())
                    })
                    .collect();
            }
            6 if extended => {
                answer.extents = payload[8..]
                    .chunks(16)
                    .map(|extent| {
                        let part = |at: usize| u64::from_be_bytes(extent[at..at + 8].try_into().unwrap());
                        (part(0), part(8))
                    })
                    .collect();
                assert_eq!(number(4) as usize, answer.extents.len());
            }
            0x8001 => answer.error = number(0),
            _ => panic!("chunk of type {kind}"),
        }
        answer
    }

    /// Takes the end of the stream, with nothing before it.
    pub(crate) fn end(mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => assert_eq!(rest, b"", "nothing comes before the end"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
}
