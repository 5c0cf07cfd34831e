//! An NBD client that is ready to send requests: connected, negotiated, nothing in flight.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

// Names as in the protocol, https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
pub(crate) const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
pub(crate) const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
pub(crate) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(crate) const FLAG_NO_ZEROES: u16 = 2;
pub(crate) const OPT_GO: u32 = 7;
pub(crate) const REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REP_ACK: u32 = 1;
pub(crate) const REP_INFO: u32 = 3;
pub(crate) const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
const FLAG_READ_ONLY: u16 = 1 << 1;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const CMD_READ: u16 = 0;
pub(crate) const CMD_WRITE: u16 = 1;
pub(crate) const CMD_DISC: u16 = 2;
pub(crate) const REQUEST_LEN: usize = 28;
pub(crate) const REPLY_LEN: usize = 16;

/// A server that says nothing for so long has hung.
const SILENCE_MAX: Duration = Duration::from_secs(20);

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    pub(crate) size: u64,
}

impl Client {
    /// Simple replies: we ask for structured ones from nobody, so that all servers speak the same protocol.
    pub(crate) fn connect(socket: &Path, export: &str) -> Result<Client> {
        let mut stream = UnixStream::connect(socket).context("connect")?;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        stream.set_write_timeout(Some(SILENCE_MAX))?;

        ensure!(
            u64_from(&mut stream)? == NBDMAGIC && u64_from(&mut stream)? == IHAVEOPT,
            "not a newstyle NBD server"
        );
        let flags = u16_from(&mut stream)?;
        ensure!(flags & FLAG_FIXED_NEWSTYLE != 0, "the server does not speak fixed newstyle");
        let mut hello = Vec::new();
        hello.extend(u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)).to_be_bytes());
        hello.extend(IHAVEOPT.to_be_bytes());
        hello.extend(OPT_GO.to_be_bytes());
        hello.extend((4 + export.len() as u32 + 2 + 2).to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend(1u16.to_be_bytes());
        hello.extend(INFO_BLOCK_SIZE.to_be_bytes()); // else a server must assume that we keep to 512 bytes
        stream.write_all(&hello)?;

        let mut size = None;
        loop {
            ensure!(u64_from(&mut stream)? == REP_MAGIC, "wrong magic in an option reply");
            ensure!(u32_from(&mut stream)? == OPT_GO, "a reply to an option that we did not send");
            let kind = u32_from(&mut stream)?;
            let mut reply = vec![0; u32_from(&mut stream)?.min(1 << 16) as usize];
            stream.read_exact(&mut reply)?;
            match kind {
                REP_ACK => break,
                REP_INFO => {
                    if let [0, 0, size_be @ .., flags_high, flags_low] = reply.as_slice() {
                        let flags = u16::from_be_bytes([*flags_high, *flags_low]);
                        ensure!(flags & FLAG_READ_ONLY == 0, "the export is read-only");
                        size = Some(u64::from_be_bytes(
                            size_be.try_into().context("wrong length of NBD_INFO_EXPORT")?,
                        ));
                    }
                }
                error => bail!("OPT_GO was refused: {error:#x} {}", String::from_utf8_lossy(&reply)),
            }
        }
        let size = size.context("the server did not say how large the export is")?;
        Ok(Client { stream, size })
    }

    /// Takes leave as the protocol wants it.
    pub(crate) fn disconnect(mut self) -> Result<()> {
        let mut request = [0; REQUEST_LEN];
        fill_request(&mut request, CMD_DISC, 0, 0, 0);
        self.stream.write_all(&request).context("disconnect")
    }
}

/// Writes a request's header into the start of `frame`.
pub(crate) fn fill_request(frame: &mut [u8], command: u16, cookie: u64, at: u64, len: u32) {
    frame[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    frame[4..6].copy_from_slice(&[0, 0]);
    frame[6..8].copy_from_slice(&command.to_be_bytes());
    frame[8..16].copy_from_slice(&cookie.to_be_bytes());
    frame[16..24].copy_from_slice(&at.to_be_bytes());
    frame[24..28].copy_from_slice(&len.to_be_bytes());
}

/// A request's command, cookie, offset and length.
pub(crate) fn parse_request(header: &[u8; REQUEST_LEN]) -> Result<(u16, u64, u64, u32)> {
    let [m0, m1, m2, m3, _, _, c0, c1, rest @ ..] = header;
    ensure!(u32::from_be_bytes([*m0, *m1, *m2, *m3]) == REQUEST_MAGIC, "wrong magic in a request");
    let (cookie, rest) = rest.split_first_chunk().context("short header")?;
    let (at, rest) = rest.split_first_chunk().context("short header")?;
    let (len, _) = rest.split_first_chunk().context("short header")?;
    Ok((
        u16::from_be_bytes([*c0, *c1]),
        u64::from_be_bytes(*cookie),
        u64::from_be_bytes(*at),
        u32::from_be_bytes(*len),
    ))
}

pub(crate) fn reply(cookie: u64) -> [u8; REPLY_LEN] {
    let mut reply = [0; REPLY_LEN];
    reply[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    reply[8..16].copy_from_slice(&cookie.to_be_bytes());
    reply
}

/// The cookie of a reply, if it is a simple reply that says success.
pub(crate) fn parse_reply(reply: &[u8; REPLY_LEN]) -> Result<u64> {
    let [m0, m1, m2, m3, e0, e1, e2, e3, cookie @ ..] = *reply;
    let magic = u32::from_be_bytes([m0, m1, m2, m3]);
    ensure!(magic == SIMPLE_REPLY_MAGIC, "wrong magic in a reply: {magic:#x}");
    let error = u32::from_be_bytes([e0, e1, e2, e3]);
    ensure!(error == 0, "a request was answered with error {error}");
    Ok(u64::from_be_bytes(cookie))
}

pub(crate) fn u16_from(stream: &mut UnixStream) -> Result<u16> {
    bytes_from(stream).map(u16::from_be_bytes)
}

pub(crate) fn u32_from(stream: &mut UnixStream) -> Result<u32> {
    bytes_from(stream).map(u32::from_be_bytes)
}

pub(crate) fn u64_from(stream: &mut UnixStream) -> Result<u64> {
    bytes_from(stream).map(u64::from_be_bytes)
}

fn bytes_from<const N: usize>(stream: &mut UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).context("the server hung up or kept silent during negotiation")?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_back_as_it_was_written() {
        let mut header = [0xff; REQUEST_LEN];
        fill_request(&mut header, CMD_WRITE, 1 << 40, 2 << 50, 4096);
        assert_eq!(parse_request(&header).unwrap(), (CMD_WRITE, 1 << 40, 2 << 50, 4096));
        assert_eq!(header[..8], [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1]);
    }

    #[test]
    fn a_reply_with_an_error_or_a_wrong_magic_is_refused() {
        assert_eq!(parse_reply(&reply(77)).unwrap(), 77);
        let mut failed = reply(77);
        failed[7] = 5;
        assert!(parse_reply(&failed).unwrap_err().to_string().contains("error 5"));
        let mut structured = reply(77);
        structured[..4].copy_from_slice(&0x668e_33ef_u32.to_be_bytes());
        assert!(parse_reply(&structured).is_err());
    }
}
