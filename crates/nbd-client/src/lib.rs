//! An NBD client for tests: one connection, many requests in flight, answers in any order.
//!
//! Written against the protocol's text only (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>),
//! so that it shares no code, and no mistake, with the server.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

mod request;
pub use request::Request;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Options of the negotiation.
pub mod option {
    #![allow(missing_docs)] // named as in the protocol
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;

/// An error as it travels: the protocol's own numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Errno(pub u32);

#[allow(missing_docs)] // named as in the protocol
impl Errno {
    pub const PERM: Errno = Errno(1);
    pub const IO: Errno = Errno(5);
    pub const INVAL: Errno = Errno(22);
    pub const NOSPC: Errno = Errno(28);
    pub const OVERFLOW: Errno = Errno(75);
    pub const NOTSUP: Errno = Errno(95);
    pub const SHUTDOWN: Errno = Errno(108);
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("EPERM"),
            5 => f.write_str("EIO"),
            12 => f.write_str("ENOMEM"),
            22 => f.write_str("EINVAL"),
            28 => f.write_str("ENOSPC"),
            75 => f.write_str("EOVERFLOW"),
            95 => f.write_str("ENOTSUP"),
            108 => f.write_str("ESHUTDOWN"),
            other => write!(f, "error {other}"),
        }
    }
}

/// How requests and answers look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Simple replies.
    Simple,
    /// Structured replies.
    Structured,
    /// Extended headers.
    Extended,
}

/// What a request was answered with, other than an error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Payload {
    /// What was read.
    pub bytes: Vec<u8>,
    /// Length and flags of each run that a block status told.
    pub runs: Vec<(u64, u64)>,
}

/// The answer to one request.
pub type Answer = Result<Payload, Errno>;

/// One connection in its transmission phase.
pub struct Client {
    stream: UnixStream,
    style: Style,
    size: u64,
    flags: u16,
    next_cookie: u64,
    /// The requests that are not answered yet.
    open: HashMap<u64, Open>,
    /// Answers that came while another was waited for.
    early: HashMap<u64, Answer>,
}

/// A request without its (last) answer.
struct Open {
    /// Bytes that a read is to give.
    asked: usize,
    given: usize,
    payload: Payload,
    error: Option<Errno>,
}

impl Client {
    /// Connects to a unix socket and negotiates the default export.
    pub fn connect(socket: &Path, style: Style) -> io::Result<Client> {
        Client::negotiate(UnixStream::connect(socket)?, style)
    }

    /// The same by TCP.
    pub fn connect_tcp(address: impl ToSocketAddrs, style: Style) -> io::Result<Client> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        // A descriptor is a descriptor: reads, writes and timeouts are the same for both kinds of socket.
        Client::negotiate(UnixStream::from(OwnedFd::from(stream)), style)
    }

    fn negotiate(stream: UnixStream, style: Style) -> io::Result<Client> {
        let (open, early) = (HashMap::new(), HashMap::new());
        let mut client = Client { stream, style, size: 0, flags: 0, next_cookie: 1, open, early };
        client.set_patience(Duration::from_secs(60))?;
        ensure(client.u64()? == NBDMAGIC && client.u64()? == IHAVEOPT, "this is no NBD server")?;
        let offered = client.u16()?;
        ensure(offered & 1 == 1, "the server is not fixed newstyle")?;
        client.stream.write_all(&u32::from(offered & 3).to_be_bytes())?;
        match style {
            Style::Simple => {}
            Style::Structured => drop(client.option(option::STRUCTURED_REPLY, &[])?),
            Style::Extended => drop(client.option(option::EXTENDED_HEADERS, &[])?),
        }
        if style != Style::Simple {
            // The empty name, one query.
            let query = [&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 15][..], b"base:allocation"].concat();
            client.option(option::SET_META_CONTEXT, &query)?;
        }
        // The empty name; NBD_INFO_BLOCK_SIZE, or the server must assume that we keep to 512 bytes.
        for (kind, info) in client.option(option::GO, &[0, 0, 0, 0, 0, 1, 0, 3])? {
            if let (REP_INFO, [0, 0, size @ .., high, low]) = (kind, &info[..]) {
                client.size = be(size);
                client.flags = u16::from_be_bytes([*high, *low]);
            }
        }
        Ok(client)
    }

    /// Sends an option and returns the replies before the last, which must be an acknowledgement.
    fn option(&mut self, option: u32, body: &[u8]) -> io::Result<Vec<(u32, Vec<u8>)>> {
        let len = body.len() as u32;
        let head = [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes(), body];
        self.stream.write_all(&head.concat())?;
        let mut replies = Vec::new();
        loop {
            ensure(self.u64()? == OPTION_REPLY_MAGIC, "no reply to an option")?;
            ensure(self.u32()? == option, "a reply to another option")?;
            let (kind, len) = (self.u32()?, self.u32()?);
            let body = self.bytes(len as usize)?;
            match kind {
                REP_ACK => return Ok(replies),
                REP_INFO | REP_META_CONTEXT => replies.push((kind, body)),
                refusal => {
                    let why = String::from_utf8_lossy(&body);
                    return Err(io::Error::other(format!("option {option} refused: {refusal:#x}: {why}")));
                }
            }
        }
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its transmission flags.
    pub fn flags(&self) -> u16 {
        self.flags
    }

    /// The socket itself, for whoever wants to break the rules.
    pub fn stream(&mut self) -> &mut UnixStream {
        &mut self.stream
    }

    /// How long the other side is waited for before a read or write fails.
    pub fn set_patience(&self, patience: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(patience))?;
        self.stream.set_write_timeout(Some(patience))
    }

    /// Sends a request and returns its cookie.
    pub fn send(&mut self, request: &Request<'_>) -> io::Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.stream.write_all(&request.header(self.style, cookie))?;
        self.stream.write_all(request.payload())?;
        let asked = request.answer_len() as usize;
        self.open.insert(cookie, Open { asked, given: 0, payload: Payload::default(), error: None });
        Ok(cookie)
    }

    /// How many requests are not answered yet.
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// Sends a request and waits for its answer. Answers to others may come before it.
    pub fn ask(&mut self, request: &Request<'_>) -> io::Result<Answer> {
        let cookie = self.send(request)?;
        self.wait(cookie)
    }

    /// Waits for the answer to the request with this cookie.
    pub fn wait(&mut self, cookie: u64) -> io::Result<Answer> {
        loop {
            if let Some(answer) = self.early.remove(&cookie) {
                return Ok(answer);
            }
            let (other, answer) = self.next()?;
            self.early.insert(other, answer);
        }
    }

    /// The next answer, of whichever request.
    pub fn receive(&mut self) -> io::Result<(u64, Answer)> {
        if let Some(&cookie) = self.early.keys().next() {
            return Ok((cookie, self.early.remove(&cookie).expect("it was there")));
        }
        self.next()
    }

    fn next(&mut self) -> io::Result<(u64, Answer)> {
        loop {
            let (magic, is_last) = (self.u32()?, true);
            let (cookie, is_last) = match magic {
                SIMPLE_REPLY_MAGIC if self.style != Style::Extended => (self.simple()?, is_last),
                STRUCTURED_REPLY_MAGIC if self.style == Style::Structured => self.chunk()?,
                EXTENDED_REPLY_MAGIC if self.style == Style::Extended => self.chunk()?,
                other => return Err(io::Error::other(format!("an answer begins with {other:#x}"))),
            };
            if !is_last {
                continue;
            }
            let open = self.open.remove(&cookie).expect("looked up just now");
            let answer = match open.error {
                Some(errno) => Err(errno),
                None => {
                    ensure(open.given == open.asked, "a read was answered with too few bytes")?;
                    Ok(open.payload)
                }
            };
            return Ok((cookie, answer));
        }
    }

    fn simple(&mut self) -> io::Result<u64> {
        let (errno, cookie) = (self.u32()?, self.u64()?);
        let asked = self.find(cookie)?.asked;
        ensure(asked == 0 || self.style == Style::Simple, "a read was answered with a simple reply")?;
        if errno != 0 {
            self.find(cookie)?.error = Some(Errno(errno));
            return Ok(cookie);
        }
        let bytes = self.bytes(asked)?;
        let open = self.find(cookie)?;
        (open.given, open.payload.bytes) = (asked, bytes);
        Ok(cookie)
    }

    /// One chunk of an answer, and whether it was the last.
    fn chunk(&mut self) -> io::Result<(u64, bool)> {
        let (flags, kind, cookie) = (self.u16()?, self.u16()?, self.u64()?);
        let len = if self.style == Style::Extended {
            self.u64()?; // the request's offset, again
            self.u64()?
        } else {
            self.u32()?.into()
        };
        ensure(len <= 64 << 20, "a chunk is larger than any that was asked for")?;
        let body = self.bytes(len as usize)?;
        let open = self.find(cookie)?;
        // Chunks of a read may come in any order; this client wants them, or one, from the front on.
        match (kind, &body[..]) {
            (0, []) => {}
            (1, [_, _, _, _, _, _, _, _, data @ ..]) => {
                open.given += data.len();
                open.payload.bytes.extend_from_slice(data);
            }
            (2, [_, _, _, _, _, _, _, _, hole @ ..]) => {
                open.given += be(hole) as usize;
                open.payload.bytes.resize(open.given, 0);
            }
            (5, [_, _, _, _, runs @ ..]) => {
                open.payload.runs.extend(runs.chunks(8).map(|run| (be(&run[..4]), be(&run[4..]))));
            }
            (6, [_, _, _, _, _, _, _, _, runs @ ..]) => {
                open.payload.runs.extend(runs.chunks(16).map(|run| (be(&run[..8]), be(&run[8..]))));
            }
            (kind, [a, b, c, d, ..]) if kind & 0x8000 != 0 => {
                open.error.get_or_insert(Errno(u32::from_be_bytes([*a, *b, *c, *d])));
            }
            (other, body) => {
                let len = body.len();
                return Err(io::Error::other(format!("a chunk of type {other} and {len} bytes")));
            }
        }
        Ok((cookie, flags & 1 != 0))
    }

    fn find(&mut self, cookie: u64) -> io::Result<&mut Open> {
        self.open.get_mut(&cookie).ok_or_else(|| {
            io::Error::other(format!("an answer to request {cookie}, answered already or never sent"))
        })
    }

    fn bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        Ok(be(&self.bytes(2)?) as u16)
    }

    fn u32(&mut self) -> io::Result<u32> {
        Ok(be(&self.bytes(4)?) as u32)
    }

    fn u64(&mut self) -> io::Result<u64> {
        Ok(be(&self.bytes(8)?))
    }
}

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn ensure(is_so: bool, otherwise: &str) -> io::Result<()> {
    if is_so { Ok(()) } else { Err(io::Error::other(otherwise)) }
}
