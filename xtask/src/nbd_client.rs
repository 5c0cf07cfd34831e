//! An NBD client: one connection, many requests in flight, answers in any order.
//!
//! Written against the protocol's text only, so that it shares no code, and no mistake, with the server.

use anyhow::{Context, Result, bail, ensure};
use std::collections::HashMap;
use std::fmt;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const CMD_FLAG_FUA: u16 = 1;

/// An error as it travels: the protocol's own numbers, which happen to be Linux's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Errno(pub(crate) u32);

impl Errno {
    pub(crate) const NOSPC: Errno = Errno(28);
    pub(crate) const SHUTDOWN: Errno = Errno(108);
}

impl fmt::Debug for Errno {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => formatter.write_str("EPERM"),
            5 => formatter.write_str("EIO"),
            12 => formatter.write_str("ENOMEM"),
            22 => formatter.write_str("EINVAL"),
            28 => formatter.write_str("ENOSPC"),
            95 => formatter.write_str("ENOTSUP"),
            108 => formatter.write_str("ESHUTDOWN"),
            other => write!(formatter, "error {other}"),
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ask<'a> {
    Read { at: u64, len: u32 },
    Write { at: u64, bytes: &'a [u8], fua: bool },
    Flush,
}

/// The answer to the request that carried this cookie.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) cookie: u64,
    /// The bytes of a read; nothing for the rest.
    pub(crate) result: Result<Vec<u8>, Errno>,
}

/// One connection in its transmission phase.
pub(crate) struct Client {
    stream: UnixStream,
    size: u64,
    next_cookie: u64,
    /// The length of the payload that each open request will be answered with.
    open: HashMap<u64, u32>,
}

impl Client {
    /// Connects and negotiates the default export with simple replies.
    pub(crate) fn connect(socket: &Path) -> Result<Client> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_write_timeout(Some(Duration::from_secs(60)))?;
        let mut client = Client { stream, size: 0, next_cookie: 1, open: HashMap::new() };
        client.negotiate().context("negotiate")?;
        Ok(client)
    }

    fn negotiate(&mut self) -> Result<()> {
        ensure!(self.u64()? == NBDMAGIC && self.u64()? == IHAVEOPT, "this is no NBD server");
        let offered = self.u16()?;
        ensure!(offered & 1 == 1, "the server is not fixed newstyle");
        // FIXED_NEWSTYLE, and NO_ZEROES if it was offered.
        self.stream.write_all(&u32::from(offered & 3).to_be_bytes())?;
        // The name is empty, and no particular information is asked for.
        let mut option = Vec::new();
        option.extend(IHAVEOPT.to_be_bytes());
        option.extend(OPT_GO.to_be_bytes());
        option.extend(6_u32.to_be_bytes());
        option.extend([0; 6]);
        self.stream.write_all(&option)?;
        loop {
            ensure!(self.u64()? == OPTION_REPLY_MAGIC, "no reply to an option");
            ensure!(self.u32()? == OPT_GO, "a reply to another option");
            let kind = self.u32()?;
            let len = self.u32()?;
            let payload = self.bytes(len)?;
            match kind {
                REP_ACK => return Ok(()),
                REP_INFO if payload.starts_with(&[0, 0]) && payload.len() >= 10 => {
                    self.size = u64::from_be_bytes(payload[2..10].try_into().expect("eight bytes"));
                }
                REP_INFO => {}
                refusal => bail!("refused: {refusal:#x}: {}", String::from_utf8_lossy(&payload)),
            }
        }
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// How long an answer is waited for.
    pub(crate) fn set_patience(&self, patience: Duration) -> Result<()> {
        self.stream.set_read_timeout(Some(patience)).context("set a timeout")
    }

    /// Sends a request and returns its cookie.
    pub(crate) fn send(&mut self, ask: Ask<'_>) -> Result<u64> {
        let (flags, kind, at, len, payload, answered): (u16, u16, u64, u32, &[u8], u32) = match ask {
            Ask::Read { at, len } => (0, 0, at, len, &[], len),
            Ask::Write { at, bytes, fua } => {
                let flags = if fua { CMD_FLAG_FUA } else { 0 };
                (flags, 1, at, u32::try_from(bytes.len())?, bytes, 0)
            }
            Ask::Flush => (0, 3, 0, 0, &[], 0),
        };
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut request = Vec::with_capacity(28 + payload.len());
        request.extend(REQUEST_MAGIC.to_be_bytes());
        request.extend(flags.to_be_bytes());
        request.extend(kind.to_be_bytes());
        request.extend(cookie.to_be_bytes());
        request.extend(at.to_be_bytes());
        request.extend(len.to_be_bytes());
        request.extend_from_slice(payload);
        self.stream.write_all(&request).context("send a request")?;
        self.open.insert(cookie, answered);
        Ok(cookie)
    }

    /// Takes the next answer, of whichever request.
    pub(crate) fn receive(&mut self) -> Result<Answer> {
        let magic = self.u32().context("wait for an answer")?;
        ensure!(magic == REPLY_MAGIC, "an answer begins with {magic:#x}");
        let errno = self.u32()?;
        let cookie = self.u64()?;
        let Some(len) = self.open.remove(&cookie) else {
            bail!("an answer to request {cookie}, which is not open: answered twice, or never sent");
        };
        let result = if errno == 0 { Ok(self.bytes(len)?) } else { Err(Errno(errno)) };
        Ok(Answer { cookie, result })
    }

    /// One request and its answer, with nothing else in flight.
    pub(crate) fn ask(&mut self, ask: Ask<'_>) -> Result<Result<Vec<u8>, Errno>> {
        ensure!(self.open.is_empty(), "something is in flight already");
        self.send(ask)?;
        Ok(self.receive()?.result)
    }

    fn bytes(&mut self, len: u32) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len)?];
        self.stream.read_exact(&mut bytes).context("read from the server")?;
        Ok(bytes)
    }

    fn array<const LEN: usize>(&mut self) -> Result<[u8; LEN]> {
        let mut bytes = [0; LEN];
        self.stream.read_exact(&mut bytes).context("read from the server")?;
        Ok(bytes)
    }

    fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.array()?))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Politeness only: a server must cope without. NBD_CMD_DISC has no answer.
        let mut goodbye = Vec::with_capacity(28);
        goodbye.extend(REQUEST_MAGIC.to_be_bytes());
        goodbye.extend([0, 0, 0, 2]);
        goodbye.extend([0; 20]);
        if let Err(error) = self.stream.write_all(&goodbye) {
            // The server may be dead, and often is on purpose.
            drop(error);
        }
    }
}
