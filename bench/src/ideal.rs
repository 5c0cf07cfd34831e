//! A server that does nothing but the protocol: what it reaches is the most that the load generator can measure.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::cell::DEPTH_MAX;
use crate::client::{
    CMD_DISC, CMD_READ, CMD_WRITE, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, INFO_EXPORT, NBDMAGIC,
    OPT_GO, REP_ACK, REP_INFO, REP_MAGIC, REPLY_LEN, REQUEST_LEN, parse_request, reply, u32_from, u64_from,
};
use crate::image;

const RECEIVE_LEN: usize = 256 << 10;
const READ_MAX: usize = 1 << 20;

/// Serves one client after the other until it is killed. It trusts them: they are ours.
pub(crate) fn serve(socket: &Path) -> Result<()> {
    let listener = UnixListener::bind(socket).with_context(|| format!("listen on {}", socket.display()))?;
    loop {
        let (mut stream, _) = listener.accept()?;
        negotiate(&mut stream)?;
        transmit(&mut stream)?;
    }
}

fn negotiate(stream: &mut UnixStream) -> Result<()> {
    let mut hello = Vec::new();
    hello.extend(NBDMAGIC.to_be_bytes());
    hello.extend(IHAVEOPT.to_be_bytes());
    hello.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    stream.write_all(&hello)?;
    u32_from(stream).context("read the client's flags")?;
    ensure!(u64_from(stream)? == IHAVEOPT, "wrong magic in an option");
    ensure!(u32_from(stream)? == OPT_GO, "not OPT_GO");
    let mut option = vec![0; u32_from(stream)? as usize];
    stream.read_exact(&mut option)?;

    let mut info = Vec::new();
    info.extend(INFO_EXPORT.to_be_bytes());
    info.extend(image::SIZE.to_be_bytes());
    info.extend(1u16.to_be_bytes());
    for (kind, payload) in [(REP_INFO, info), (REP_ACK, Vec::new())] {
        stream.write_all(&REP_MAGIC.to_be_bytes())?;
        stream.write_all(&OPT_GO.to_be_bytes())?;
        stream.write_all(&kind.to_be_bytes())?;
        stream.write_all(&(payload.len() as u32).to_be_bytes())?;
        stream.write_all(&payload)?;
    }
    Ok(())
}

/// Answers all requests that one receive brought with one send.
pub(crate) fn transmit(stream: &mut UnixStream) -> Result<()> {
    let zeroes = vec![0; READ_MAX];
    let mut received = vec![0; RECEIVE_LEN];
    let mut replies: Vec<([u8; REPLY_LEN], usize)> = Vec::with_capacity(DEPTH_MAX);
    let (mut held, mut arriving) = (0, None);
    loop {
        let end = match stream.read(&mut received[held..])? {
            0 => return Ok(()),
            len => held + len,
        };
        let mut start = 0;
        loop {
            if let Some((cookie, left)) = arriving {
                let here = usize::min(left, end - start);
                start += here;
                if here < left {
                    arriving = Some((cookie, left - here));
                    break;
                }
                arriving = None;
                replies.push((reply(cookie), 0));
            }
            let Some(header) = received[start..end].first_chunk() else { break };
            let (command, cookie, _, len) = parse_request(header)?;
            start += REQUEST_LEN;
            match command {
                CMD_READ => replies.push((reply(cookie), len as usize)),
                CMD_WRITE => arriving = Some((cookie, len as usize)),
                CMD_DISC => return Ok(()),
                other => bail!("command {other} is not served here"),
            }
        }
        received.copy_within(start..end, 0);
        held = end - start;

        for some in replies.chunks(DEPTH_MAX) {
            let mut slices = [IoSlice::new(&[]); 2 * DEPTH_MAX];
            for (pair, (header, len)) in slices.chunks_mut(2).zip(some) {
                pair.copy_from_slice(&[IoSlice::new(header), IoSlice::new(&zeroes[..*len])]);
            }
            let mut left = &mut slices[..2 * some.len()];
            while !left.is_empty() {
                match stream.write_vectored(left) {
                    // At depth 1 the last slices may be empty, and nothing is left to send.
                    Ok(sent) => IoSlice::advance_slices(&mut left, sent),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        replies.clear();
    }
}
