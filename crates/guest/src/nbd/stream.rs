//! What a client sends during transmission, received many messages at a time.

use std::cell::Cell;
use std::rc::Rc;

use block::Buf;

use super::peer::{End, Peer};
use super::wire::{HEADER_LEN_MAX, Header, Style};

/// Bytes of a quiet client's buffer: a write of 4 KiB and its header fit, or some hundred headers.
const SMALL_LEN: usize = 8 << 10;
/// Bytes of a busy client's buffer.
const LARGE_LEN: usize = 128 << 10;
/// Bytes of all large buffers of a server together; who comes later stays with a small one.
const LARGE_TOTAL: usize = 16 << 20;
/// A large buffer that was filled to less than a small one so many times in a row is exchanged.
const QUIET_MAX: u32 = 256;
/// Bytes received behind a long payload: the next header, and little else, since what follows a long payload is
/// often another one, which is received to where it belongs.
const TAIL_LEN: usize = 512;
/// Bytes from which a payload is long.
const LONG_LEN: usize = 32 << 10;

/// Bytes of a server's large buffers that are in use.
#[derive(Clone, Default)]
pub(crate) struct LargeBuffers(Rc<Cell<usize>>);

impl LargeBuffers {
    pub(crate) fn used(&self) -> usize {
        self.0.get()
    }
}

/// Bytes received that are not used yet, and the buffer for more.
pub(crate) struct Stream {
    peer: Rc<Peer>,
    large_buffers: LargeBuffers,
    buf: Buf,
    /// What is received and not used lies in `start..end` of the buffer.
    start: usize,
    end: usize,
    /// The last receive filled the buffer.
    is_full: bool,
    quiet: u32,
    /// Requests since the last that had a long payload, that one included; zero where there was none lately.
    since_long: u8,
}

impl Stream {
    /// Goes on after these bytes, which were received before.
    pub(crate) fn new(peer: Rc<Peer>, large_buffers: LargeBuffers, received: &[u8]) -> Stream {
        let buf = peer.handle().pool().take(SMALL_LEN.max(received.len()));
        buf.put(0, received);
        let end = received.len();
        Stream { peer, large_buffers, buf, start: 0, end, is_full: false, quiet: 0, since_long: 0 }
    }

    /// Whether nothing that was received is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Takes the header of a request; `None` where it is not all there.
    pub(crate) fn header(&mut self, style: Style) -> Option<Header> {
        let len = style.header_len();
        if self.end - self.start < len {
            return None;
        }
        let mut bytes = [0; HEADER_LEN_MAX];
        self.buf.get(self.start, &mut bytes[..len]);
        self.start += len;
        self.since_long = match self.since_long {
            0 | 2 => 0,
            since => since + 1,
        };
        Some(Header::parse(&bytes, style))
    }

    /// Receives more, behind the beginning of a header if there is one.
    pub(crate) async fn fill(&mut self) -> Result<(), End> {
        loop {
            self.fit();
            self.peer.is_receiving.set(!self.is_empty());
            let room = self.buf.slice(self.end, self.room());
            let received = self.peer.receive(&room).await?;
            drop(room);
            match received {
                Some(count) => {
                    self.end += count;
                    self.note();
                    self.peer.is_receiving.set(false);
                    return Ok(());
                }
                None => self.exchange(SMALL_LEN),
            }
        }
    }

    /// Receives all of `payload`.
    pub(crate) async fn payload(&mut self, payload: &Buf) -> Result<(), End> {
        if payload.len() >= LONG_LEN {
            self.since_long = 1;
        }
        let mut got = payload.len().min(self.end - self.start);
        if got > 0 {
            payload.copy_from(0, &self.buf.slice(self.start, got));
            self.start += got;
        }
        if got == payload.len() {
            return Ok(());
        }
        self.peer.is_receiving.set(true);
        while got < payload.len() {
            // Nothing is left in the buffer: what comes behind the payload goes there, in the same receive.
            (self.start, self.end) = (0, 0);
            let left = payload.len() - got;
            self.fit();
            let both = Buf::concat(vec![payload.slice(got, left), self.buf.slice(0, self.room())]);
            if let Some(count) = self.peer.receive(&both).await? {
                got += count.min(left);
                self.end = count.saturating_sub(left);
                self.note();
            }
        }
        self.peer.is_receiving.set(false);
        Ok(())
    }

    /// Receives so many bytes and forgets them.
    pub(crate) async fn skip(&mut self, len: u64) -> Result<(), End> {
        let mut left = len;
        loop {
            let part = left.min((self.end - self.start) as u64);
            self.start += part as usize;
            left -= part;
            if left == 0 {
                return Ok(());
            }
            self.peer.is_receiving.set(true);
            (self.start, self.end) = (0, 0);
            if let Some(count) = self.peer.receive(&self.buf).await? {
                self.end = count;
            }
            self.peer.is_receiving.set(false);
        }
    }

    /// How many bytes to receive behind what there is.
    fn room(&self) -> usize {
        let room = self.buf.len() - self.end;
        if self.since_long > 0 { room.min(TAIL_LEN) } else { room }
    }

    /// Notes how far a receive filled the buffer.
    fn note(&mut self) {
        if self.since_long == 0 {
            self.is_full = self.end == self.buf.len();
            self.quiet = if self.end < SMALL_LEN { self.quiet + 1 } else { 0 };
        }
    }

    /// Makes room: moves what is left to the front of a buffer whose size suits the client.
    fn fit(&mut self) {
        let is_large = self.peer.is_large.get();
        if !is_large && self.is_full && self.large_buffers.0.get() + LARGE_LEN <= LARGE_TOTAL {
            self.exchange(LARGE_LEN);
        } else if is_large && self.quiet > QUIET_MAX {
            self.exchange(SMALL_LEN);
        } else if self.start > 0 {
            let left = self.end - self.start;
            if left > 0 {
                self.buf.copy_from(0, &self.buf.slice(self.start, left));
            }
            (self.start, self.end) = (0, left);
        }
    }

    /// Goes on with a buffer of another size; what is left fits both.
    fn exchange(&mut self, len: usize) {
        let left = self.end - self.start;
        debug_assert!(left < HEADER_LEN_MAX, "only the beginning of a header is ever left");
        let buf = self.peer.handle().pool().take(len);
        if left > 0 {
            buf.copy_from(0, &self.buf.slice(self.start, left));
        }
        self.buf = buf;
        (self.start, self.end) = (0, left);
        self.is_full = false;
        self.quiet = 0;
        self.count_as(len == LARGE_LEN);
    }

    fn count_as(&mut self, is_large: bool) {
        if self.peer.is_large.replace(is_large) {
            self.large_buffers.0.set(self.large_buffers.0.get() - LARGE_LEN);
        }
        if is_large {
            self.large_buffers.0.set(self.large_buffers.0.get() + LARGE_LEN);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.count_as(false);
    }
}
