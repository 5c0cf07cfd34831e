//! Any bytes as the messages of a front end (vhost-user).

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use block::{Limits, Payload, Request};
use runtime::{BoxFuture, Runtime};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::{Bytes, RUNTIME};
use crate::vhost::{Server, Settings};
use crate::{Disk, GiveUp, Session};

/// Bytes of the memory that a message may hand over.
const MEMORY_LEN: u64 = 256 << 10;
/// A message has at most so many descriptors with it here.
const FDS_MAX: usize = 3;
/// How long descriptors may stay open.
const PATIENCE: Duration = Duration::from_secs(10);
/// The library's bound on a message; a reply is no longer.
const MESSAGE_MAX: usize = 4096 + 12;

/// A disk that answers everything at once.
struct Obliging;

impl Disk for Obliging {
    fn session(&self) -> Box<dyn Session> {
        Box::new(Obliging)
    }

    fn size(&self) -> u64 {
        1 << 20
    }

    fn limits(&self) -> Limits {
        Limits { align: 512, preferred: 4096, read_only: false, fast_zero: true }
    }

    fn resized(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

impl Session for Obliging {
    fn submit(&self, request: Request) {
        request.reply.send(Ok(Payload::None));
    }

    fn stop(&self, _how: GiveUp) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// Says these messages to a server: it lives, its replies are messages, and when the front end is gone it has kept
/// none of the descriptors.
///
/// Each message is a byte for its request, one for its flags, one for the length of its payload, one that chooses its
/// descriptors, and the payload.
pub fn messages(bytes: &[u8]) {
    RUNTIME.with(|runtime| {
        // The first front end of all sets up what stays.
        exchange(runtime, &[]);
        let before = open_descriptors();
        let heard = exchange(runtime, bytes);
        check(&heard);
        // The thread of its messages ends a little later than it says so.
        let patience = Instant::now();
        while open_descriptors() > before {
            assert!(patience.elapsed() < PATIENCE, "descriptors are kept");
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("Linux has it").count()
}

/// Everything that the server says to these messages.
fn exchange(runtime: &Runtime, bytes: &[u8]) -> Vec<u8> {
    let handle = runtime.handle().clone();
    let (front, back) = UnixStream::pair().expect("a pair of sockets");
    let settings =
        Settings { name: "fuzzed".into(), queues: 4, block: 512, id: "fuzzed".into(), pin_memory: false };
    let server = Server::new(handle.clone(), Rc::new(Obliging), settings);
    let said = bytes.to_vec();
    let talk = std::thread::spawn(move || talk(&front, &said));
    let back = OwnedFd::from(back);
    runtime.block_on(async move {
        server.serve_one(back).await;
        // Its last signals, and what ends with the connection.
        let patience = Instant::now();
        while handle.in_flight() > 0 {
            assert!(patience.elapsed() < PATIENCE, "something is still waited for");
            handle.sleep(Duration::from_millis(1)).await;
        }
    });
    talk.join().expect("the front end does not panic")
}

/// Says the messages, listens at the same time, and leaves.
fn talk(front: &UnixStream, bytes: &[u8]) -> Vec<u8> {
    let listening = front.try_clone().expect("a copy of a socket");
    let ear = std::thread::spawn(move || {
        let mut heard = Vec::new();
        let mut listening = listening;
        // The server may hang up on us at any time.
        match listening.read_to_end(&mut heard) {
            Ok(_) | Err(_) => heard,
        }
    });
    let mut bytes = Bytes(bytes);
    while let Some(((request, flags), (len, fds))) =
        bytes.number(1).zip(bytes.number(1)).zip(bytes.number(1).zip(bytes.number(1)))
    {
        let payload = bytes.take((len as usize).min(bytes.0.len())).unwrap_or_default();
        if !say(front, request as u32, flags as u32, payload, fds as u8) {
            break;
        }
    }
    match front.shutdown(std::net::Shutdown::Write) {
        Ok(()) | Err(_) => {} // the server may have hung up
    }
    ear.join().expect("listening does not panic")
}

fn say(front: &UnixStream, request: u32, flags: u32, payload: &[u8], fds: u8) -> bool {
    let mut message = Vec::new();
    for word in [request, flags, payload.len() as u32] {
        message.extend_from_slice(&word.to_ne_bytes());
    }
    message.extend_from_slice(payload);
    let fds: Vec<OwnedFd> = (0..FDS_MAX).filter_map(|nth| descriptor(fds >> (2 * nth) & 3, nth)).collect();
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)), "there is space for them");
    }
    let parts = [IoSlice::new(&message)];
    rustix::net::sendmsg(front, &parts, &mut control, SendFlags::NOSIGNAL) == Ok(message.len())
}

/// Of each kind that a message may bring, fitting or not.
fn descriptor(kind: u8, nth: usize) -> Option<OwnedFd> {
    match kind {
        0 => None,
        1 => Some(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")),
        2 => {
            let memory = memfd_create("front end", MemfdFlags::CLOEXEC).expect("a memfd");
            ftruncate(&memory, MEMORY_LEN).expect("it may grow");
            Some(memory)
        }
        _ if nth == 0 => Some(UnixStream::pair().expect("a pair of sockets").0.into()),
        _ => Some(std::fs::File::open("/dev/null").expect("it is there").into()),
    }
}

/// What was said is messages in the version of the protocol, each a reply.
fn check(heard: &[u8]) {
    let mut bytes = heard;
    while !bytes.is_empty() {
        let word = |at: usize| {
            bytes.get(at..at + 4).map(|word| u32::from_ne_bytes(word.try_into().expect("4 bytes")))
        };
        let (Some(request), Some(flags), Some(len)) = (word(0), word(4), word(8)) else {
            panic!("{} bytes are no header", bytes.len());
        };
        assert_eq!(flags & 7, 5, "version 1 and REPLY: {flags:#x} for request {request}");
        assert!(len as usize <= MESSAGE_MAX, "a reply of {len} bytes");
        let Some(rest) = bytes.get(12 + len as usize..) else { panic!("a reply is cut short") };
        bytes = rest;
    }
}
