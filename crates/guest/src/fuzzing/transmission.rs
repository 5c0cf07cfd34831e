//! Any bytes as requests.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use block::{Buf, Errno, Limits, Op, Payload, Request, Run};
use runtime::{BoxFuture, Fd, Handle, Runtime, join_all};

use super::{Bytes, RUNTIME};
use crate::nbd::{Exports, Server, Settings};
use crate::{Disk, GiveUp, Session};

const SIZE: u64 = 64 << 10;
const SIMPLE: u8 = 0;
const EXTENDED: u8 = 2;
/// "Size constraints": a longer payload may end the connection.
const PAYLOAD_MAX: u64 = 32 << 20;

/// Says these bytes after a handshake, and checks that what comes back answers each whole request once, by its
/// cookie, in the form that was agreed on.
///
/// The first byte chooses the style, the second how the disk behaves, the third how the bytes are cut. Cookies are
/// replaced by the request's number, so that answers can be told apart.
pub fn transmission(bytes: &[u8]) {
    let [style, mood, step, bytes @ ..] = bytes else { return };
    let style = style % 3;
    let mut bytes = bytes.to_vec();
    let asked = number(&mut bytes, style);
    let heard = RUNTIME.with(|runtime| exchange(runtime, style, *mood, usize::from(*step) + 1, bytes));
    check(&heard, &asked, style);
}

/// What the bytes ask for.
struct Asked {
    /// Command and length of each whole request; a cookie is an index.
    requests: Vec<(u16, u64)>,
    /// A rule is broken behind them: the connection may end before all are answered.
    is_broken: bool,
}

/// Reads the requests as the specification writes them, and puts their numbers for their cookies.
fn number(bytes: &mut [u8], style: u8) -> Asked {
    let mut asked = Asked { requests: Vec::new(), is_broken: false };
    let (header_len, magic) = if style == EXTENDED { (32, 0x21e4_1c71) } else { (28, 0x2560_9513) };
    let mut at = 0;
    while let Some(header) = bytes.get_mut(at..at + header_len) {
        let cookie = asked.requests.len() as u64;
        header[8..16].copy_from_slice(&cookie.to_be_bytes());
        let mut fields = Bytes(header);
        let found = fields.number(4);
        let flags = fields.number(2).unwrap_or_default();
        let command = fields.number(2).unwrap_or_default() as u16;
        let len = fields.0.get(16..).map(|len| Bytes(len).number(len.len()).unwrap_or_default());
        let len = len.unwrap_or_default();
        let payload = if command == 1 || (style == EXTENDED && flags & 32 != 0) { len } else { 0 };
        if found != Some(magic) || (payload > PAYLOAD_MAX && command != 2) {
            asked.is_broken = true;
            break;
        }
        let whole = (bytes.len() - at - header_len) as u64 >= payload;
        if command == 2 || !whole {
            break;
        }
        asked.requests.push((command, len));
        at += header_len + payload as usize;
    }
    asked
}

/// Everything that the server says after the handshake.
fn exchange(runtime: &Runtime, style: u8, mood: u8, step: usize, bytes: Vec<u8>) -> Vec<u8> {
    let handle = runtime.handle().clone();
    let heard = runtime.block_on(async move {
        let disk = Rc::new(Moody(Rc::new(Mood {
            handle: handle.clone(),
            mood,
            nth: Cell::new(0),
            late: Cell::new(0),
            bytes: RefCell::new(vec![7; SIZE as usize]),
        })));
        let exports = Exports::one("disk", "", disk).expect("the name is a name");
        let server = Server::new(handle.clone(), exports, Settings::default());
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        server.adopt(theirs.into());
        let socket = handle.register(ours.into());
        let heard = Rc::new(RefCell::new(Vec::new()));
        let mut message = handshake(style);
        let start = message.len();
        message.extend(bytes);
        let parts: Vec<BoxFuture<'static, ()>> = vec![
            Box::pin(say(handle.clone(), socket.clone(), message, start, step)),
            Box::pin(hear(handle.clone(), socket, heard.clone())),
        ];
        join_all(parts).await;
        while server.stats().connections > 0 {
            handle.yield_now().await;
        }
        assert_eq!((server.stats().unanswered, server.stats().memory), (0, 0), "something is left behind");
        heard.take()
    });
    assert_eq!(runtime.handle().panics(), 0, "a task panicked");
    let answers = if style == SIMPLE { 18 + 32 + 20 } else { 18 + 20 + 39 + 20 + 32 + 20 };
    heard.get(answers..).expect("the handshake is answered").to_vec()
}

/// All that a client sends to get to transmission, with `base:allocation` where that can be had.
fn handshake(style: u8) -> Vec<u8> {
    let mut bytes = b"\0\0\0\x03".to_vec();
    if style != SIMPLE {
        bytes.extend(b"IHAVEOPT\0\0\0");
        bytes.extend(if style == EXTENDED { b"\x0b\0\0\0\0" } else { b"\x08\0\0\0\0" });
        bytes.extend(b"IHAVEOPT\0\0\0\x0a\0\0\0\x1b\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation");
    }
    bytes.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0");
    bytes
}

/// Sends the first `start` bytes at once and the others in pieces, then closes its side.
async fn say(handle: Handle, socket: Rc<Fd>, bytes: Vec<u8>, start: usize, step: usize) {
    let (first, others) = bytes.split_at(start);
    // Small pieces only of what is short: 255 pieces show as much as 255,000.
    let step = step.max(others.len() / 64);
    for piece in std::iter::once(first).chain(others.chunks(step)) {
        if handle.send(&socket, &Buf::from_bytes(piece)).await.is_err() {
            return;
        }
    }
    if let Err(error) = rustix::net::shutdown(socket.as_fd(), rustix::net::Shutdown::Write) {
        assert_eq!(error, rustix::io::Errno::NOTCONN);
    }
}

async fn hear(handle: Handle, socket: Rc<Fd>, heard: Rc<RefCell<Vec<u8>>>) {
    let buf = Buf::zeroed(64 << 10);
    loop {
        match handle.receive(&socket, &buf).await {
            Ok(0) | Err(Errno::ECONNRESET) => return,
            Ok(count) => heard.borrow_mut().extend(buf.slice(0, count as usize).to_vec()),
            Err(errno) => panic!("receive: {errno}"),
        }
    }
}

/// The answers are whole, well formed, and each is to a request that was made and has not been answered before.
fn check(heard: &[u8], asked: &Asked, style: u8) {
    let mut open: HashMap<u64, (u16, u64)> = (0..).zip(asked.requests.iter().copied()).collect();
    let mut bytes = Bytes(heard);
    let whole = loop {
        if bytes.0.is_empty() {
            break true;
        }
        let Some((cookie, error, payload)) = answer(&mut bytes, style, &open) else { break false };
        let (command, len) = open.remove(&cookie).expect("an answer to a request that is open");
        assert!([0, 1, 5, 22, 28, 75, 95, 108].contains(&error), "error {error}");
        let expected = match (command, error) {
            (0, 0) => Some(len),
            (7, 0) => None,
            _ => Some(0),
        };
        assert!(expected.is_none_or(|expected| expected == payload), "{payload} bytes of {expected:?}");
    };
    // Who breaks a rule is cut off, perhaps in the middle of an answer to an earlier request.
    assert!(asked.is_broken || (whole && open.is_empty()), "unanswered: {open:?}, whole: {whole}");
}

/// Cookie, error and bytes of payload of the next answer; `None` where it is not all there.
fn answer(bytes: &mut Bytes<'_>, style: u8, open: &HashMap<u64, (u16, u64)>) -> Option<(u64, u64, u64)> {
    let magic = bytes.number(4)?;
    if style == SIMPLE {
        assert_eq!(magic, 0x6744_6698);
        let (error, cookie) = (bytes.number(4)?, bytes.number(8)?);
        let len = match open.get(&cookie) {
            Some((0, len)) if error == 0 => *len,
            Some(_) | None => 0,
        };
        bytes.take(len as usize)?;
        return Some((cookie, error, len));
    }
    assert_eq!(magic, if style == EXTENDED { 0x6e8a_278c } else { 0x668e_33ef });
    assert_eq!(bytes.number(2)?, 1, "each answer is one chunk");
    let (kind, cookie) = (bytes.number(2)?, bytes.number(8)?);
    let len = if style == EXTENDED {
        bytes.number(8)?;
        bytes.number(8)?
    } else {
        bytes.number(4)?
    };
    let mut payload = Bytes(bytes.take(len as usize)?);
    let mut error = 0;
    let mut len = 0;
    match kind {
        0 => {}
        1 => {
            payload.number(8)?;
            len = payload.0.len() as u64;
            assert!(len > 0, "a chunk of no bytes");
            payload.take(len as usize)?;
        }
        5 | 6 => {
            assert_eq!(kind == 6, style == EXTENDED);
            assert_eq!(payload.number(4), Some(1), "the context");
            let width = if kind == 6 { 8 } else { 4 };
            let count = if kind == 6 { payload.number(4)? } else { payload.0.len() as u64 / 8 };
            assert!(count > 0);
            for _ in 0..count {
                assert_ne!(payload.number(width), Some(0), "an extent of no bytes");
                assert!(payload.number(width).is_some_and(|flags| flags < 4));
            }
        }
        0x8001 => {
            error = payload.number(4)?;
            assert_ne!(error, 0);
            let message = payload.number(2)?;
            payload.take(message as usize)?;
        }
        _ => panic!("a chunk of type {kind:#x}"),
    }
    assert!(payload.0.is_empty(), "a chunk with bytes left over");
    Some((cookie, error, len))
}

/// A disk that answers at once, later, with an error or not at all, as its mood is. It has one session, for the one
/// client.
struct Moody(Rc<Mood>);

struct Mood {
    handle: Handle,
    mood: u8,
    nth: Cell<u8>,
    /// Requests that are to be answered later.
    late: Cell<usize>,
    bytes: RefCell<Vec<u8>>,
}

impl Disk for Moody {
    fn session(&self) -> Box<dyn Session> {
        Box::new(Moody(self.0.clone()))
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn limits(&self) -> Limits {
        Limits { align: 512, preferred: 4096, read_only: self.0.mood == 255, fast_zero: true }
    }

    fn resized(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

impl Session for Moody {
    fn submit(&self, request: Request) {
        let nth = self.0.nth.replace(self.0.nth.get().wrapping_add(1));
        match nth.wrapping_mul(self.0.mood) % 8 {
            0..=3 => self.0.perform(request),
            4 => request.reply.send(Err(Errno::EIO)),
            5 => request.reply.send(Err(Errno::EOPNOTSUPP)),
            6 => drop(request),
            _ => {
                self.0.perform_op(&request.op);
                let mood = self.0.clone();
                mood.late.set(mood.late.get() + 1);
                self.0.handle.spawn(async move {
                    for _ in 0..nth {
                        mood.handle.yield_now().await;
                    }
                    let payload = payload(&request.op);
                    request.reply.send(Ok(payload));
                    mood.late.set(mood.late.get() - 1);
                });
            }
        }
    }

    fn stop(&self, _how: GiveUp) -> BoxFuture<'_, ()> {
        Box::pin(async {
            while self.0.late.get() > 0 {
                self.0.handle.yield_now().await;
            }
        })
    }
}

impl Mood {
    fn perform(&self, request: Request) {
        self.perform_op(&request.op);
        let payload = payload(&request.op);
        request.reply.send(Ok(payload));
    }

    fn perform_op(&self, op: &Op) {
        let span = op.span().expect("the server checks what wraps around");
        assert!(span.is_within(SIZE), "the server checks what lies beyond the end");
        assert!(!op.kind().changes() || self.mood != 255, "the server checks what is read-only");
        let range = span.at() as usize..span.end() as usize;
        let mut bytes = self.bytes.borrow_mut();
        match op {
            Op::Read { buf, .. } => buf.put(0, &bytes[range]),
            Op::Write { buf, .. } => buf.get(0, &mut bytes[range]),
            Op::WriteZeroes { .. } | Op::Discard { .. } => bytes[range].fill(0),
            Op::Status { .. } | Op::Flush | Op::Prefetch { .. } => {}
        }
    }
}

/// Runs of 512 bytes, by turns a hole and not.
fn payload(op: &Op) -> Payload {
    let Op::Status { span } = op else { return Payload::None };
    let run = |at: u64| Run {
        len: 512.min(span.len() - at),
        allocated: at.is_multiple_of(1024),
        zero: !at.is_multiple_of(1024),
    };
    Payload::Runs((0..span.len()).step_by(512).map(run).collect())
}
