//! A load on an NBD connection.
//!
//! All requests that can be sent go out in one system call, all replies that have arrived come in with one, and payload
//! is copied nowhere but by the kernel. At depth 1 that is a plain send and receive.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::cell::{Cell, DEPTH_MAX, Direction, Offsets};
use crate::client::{CMD_READ, CMD_WRITE, Client, REPLY_LEN, REQUEST_LEN, fill_request, parse_reply};
use crate::image::{Contents, STAMP_LEN, fill, is_stamped};
use crate::load::{self, Tally};

/// Large enough for all replies of 4 KiB that can be in flight, small enough for the second level cache.
const RECEIVE_LEN: usize = 256 << 10;

pub(crate) struct Load<'a> {
    client: Client,
    cell: &'a Cell,
    contents: Contents,
    offsets: Offsets,
    slots: Vec<Slot>,
    /// Slots whose request was answered, to be sent again.
    ready: Vec<usize>,
    turns: u64,
    received: Vec<u8>,
    /// Bytes at the start of `received` that are not parsed yet.
    held: usize,
    /// The request whose payload is arriving, and how much of that is still to come.
    arriving: Option<(usize, usize)>,
    tally: Tally,
}

/// Room for one request in flight.
struct Slot {
    /// The bytes that go out: the header, and the payload of a write.
    frame: Vec<u8>,
    at: u64,
    cookie: u64,
    /// When the request went out; none while it is not in flight.
    sent: Option<Instant>,
}

impl<'a> Load<'a> {
    pub(crate) fn new(client: Client, cell: &'a Cell, contents: Contents) -> Load<'a> {
        let offsets = cell.offsets(client.size);
        let frame_len = match cell.direction {
            Direction::Read => REQUEST_LEN,
            Direction::Write => REQUEST_LEN + cell.len,
        };
        let slot = || Slot { frame: vec![0; frame_len], at: 0, cookie: 0, sent: None };
        Load {
            client,
            cell,
            contents,
            offsets,
            slots: (0..cell.depth).map(|_| slot()).collect(),
            ready: Vec::with_capacity(cell.depth),
            turns: 0,
            received: vec![0; RECEIVE_LEN],
            held: 0,
            arriving: None,
            tally: Tally::new(),
        }
    }

    /// Sends a request from each slot that is ready. This blocks while the server takes nothing, and can't lock up:
    /// what the server may send meanwhile (replies without payload, or all that fits beside requests without
    /// payload) is less than the socket holds.
    fn send(&mut self, now: Instant) -> Result<()> {
        for &index in &self.ready {
            let slot = &mut self.slots[index];
            let at = self.offsets.next().context("offsets never end")?;
            self.turns += 1;
            slot.at = at;
            slot.cookie = self.turns << 8 | index as u64;
            slot.sent = Some(now);
            let len = u32::try_from(self.cell.len)?;
            match self.cell.direction {
                Direction::Read => fill_request(&mut slot.frame, CMD_READ, slot.cookie, at, len),
                Direction::Write => {
                    fill_request(&mut slot.frame, CMD_WRITE, slot.cookie, at, len);
                    fill(&mut slot.frame[REQUEST_LEN..], at);
                }
            }
        }
        write_frames(&mut self.client.stream, &self.slots, &self.ready).context("send requests")?;
        self.ready.clear();
        Ok(())
    }

    /// Takes what has arrived, waiting if nothing has.
    fn receive(&mut self) -> Result<Instant> {
        let len = match self.client.stream.read(&mut self.received[self.held..]) {
            Ok(0) => bail!("the server hung up with requests in flight"),
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                bail!("the server kept silent, requests in flight")
            }
            Err(error) => return Err(error).context("receive replies"),
        };
        let now = Instant::now();
        let end = self.held + len;
        let parsed = self.parse(end, now)?;
        self.received.copy_within(parsed..end, 0);
        self.held = end - parsed;
        Ok(now)
    }

    /// Goes through the bytes up to `end`; says how many of them are done with.
    fn parse(&mut self, end: usize, now: Instant) -> Result<usize> {
        let (payload, look) = match self.cell.direction {
            Direction::Read => (self.cell.len, STAMP_LEN),
            Direction::Write => (0, 0),
        };
        let mut start = 0;
        loop {
            if let Some((index, left)) = self.arriving {
                let here = left.min(end - start);
                start += here;
                if here < left {
                    self.arriving = Some((index, left - here));
                    return Ok(start);
                }
                self.arriving = None;
                self.complete(index, now);
            }
            // Of a payload only the start is looked at, and only when it is here with its header.
            let bytes = &self.received[start..end];
            if bytes.len() < REPLY_LEN + look {
                // An error has no payload: do not wait for one before it is seen.
                if let Some(header) = bytes.first_chunk() {
                    parse_reply(header)?;
                }
                return Ok(start);
            }
            let (header, rest) = bytes.split_first_chunk().context("the length was checked")?;
            let cookie = parse_reply(header)?;
            let index = (cookie & 0xff) as usize;
            let slot = self.slots.get(index).filter(|slot| slot.cookie == cookie && slot.sent.is_some());
            let slot =
                slot.with_context(|| format!("a reply to a request that is not in flight: {cookie:#x}"))?;
            match self.contents {
                Contents::Unknown => {}
                Contents::Stamped if look == 0 => {}
                Contents::Stamped => ensure!(is_stamped(rest, slot.at), "wrong data was read at {}", slot.at),
            }
            start += REPLY_LEN;
            self.arriving = Some((index, payload));
        }
    }

    fn complete(&mut self, index: usize, now: Instant) {
        if let Some(sent) = self.slots[index].sent.take() {
            self.tally.count(now.saturating_duration_since(sent));
            self.ready.push(index);
        }
    }
}

impl load::Load for Load<'_> {
    fn start(&mut self) -> Result<()> {
        self.ready.extend(0..self.cell.depth);
        self.send(Instant::now())
    }

    fn turn(&mut self) -> Result<Instant> {
        let now = self.receive()?;
        self.send(now)?;
        Ok(now)
    }

    fn finish(mut self) -> Result<()> {
        while self.slots.iter().any(|slot| slot.sent.is_some()) {
            self.receive()?;
        }
        ensure!(self.held == 0, "{} bytes more than were asked for", self.held);
        self.client.disconnect()
    }

    fn tally(&mut self) -> &mut Tally {
        &mut self.tally
    }
}

fn write_frames(stream: &mut UnixStream, slots: &[Slot], ready: &[usize]) -> io::Result<()> {
    if let [only] = ready {
        return stream.write_all(&slots[*only].frame);
    }
    let mut slices = [IoSlice::new(&[]); DEPTH_MAX];
    for (slice, index) in slices.iter_mut().zip(ready) {
        *slice = IoSlice::new(&slots[*index].frame);
    }
    let mut left = &mut slices[..ready.len()];
    while !left.is_empty() {
        match stream.write_vectored(left) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(sent) => IoSlice::advance_slices(&mut left, sent),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cell::CELLS;
    use crate::client::reply;
    use crate::ideal;
    use crate::load::Load as _;
    use std::thread;

    const SIZE: u64 = 64 << 20;

    /// Three rounds of requests of one cell against a server of the test's own.
    fn three_turns(
        cell: &Cell,
        contents: Contents,
        server: impl FnOnce(UnixStream) -> Result<()> + Send + 'static,
    ) -> Result<u64> {
        let (stream, other) = UnixStream::pair()?;
        let server = thread::spawn(move || server(other));
        let mut load = Load::new(Client { stream, size: SIZE }, cell, contents);
        load.start()?;
        for _ in 0..3 {
            load.turn()?;
        }
        let served = load.tally.served;
        load.finish()?;
        server.join().expect("the server does not panic")?;
        Ok(served)
    }

    /// Answers the first request with these bytes and waits until the client leaves.
    fn answer(
        bytes: impl Fn(u64) -> Vec<u8> + Send + 'static,
    ) -> impl FnOnce(UnixStream) -> Result<()> + Send + 'static {
        move |mut stream| {
            let mut header = [0; REQUEST_LEN];
            stream.read_exact(&mut header)?;
            let cookie = u64::from_be_bytes(header[8..16].try_into()?);
            stream.write_all(&bytes(cookie))?;
            io::copy(&mut stream, &mut io::sink())?;
            Ok(())
        }
    }

    #[test]
    fn every_cell_is_served_by_the_ideal_server() {
        for cell in &CELLS {
            let served =
                three_turns(cell, Contents::Unknown, |mut stream| ideal::transmit(&mut stream)).unwrap();
            assert!(served <= 3 * cell.depth as u64, "{}", cell.name);
        }
    }

    #[test]
    fn a_wrong_answer_is_found() {
        fn failed(cookie: u64) -> Vec<u8> {
            let mut reply = reply(cookie);
            reply[7] = 28;
            reply.to_vec()
        }
        fn another(cookie: u64) -> Vec<u8> {
            [&reply(cookie + 256)[..], &[0; 4096]].concat()
        }
        fn zeroes(cookie: u64) -> Vec<u8> {
            [&reply(cookie)[..], &[0; 4096]].concat()
        }
        type Answer = fn(u64) -> Vec<u8>;
        for (wrong, expected) in
            [(failed as Answer, "error 28"), (another, "not in flight"), (zeroes, "wrong data")]
        {
            let error = three_turns(&CELLS[0], Contents::Stamped, answer(wrong)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
