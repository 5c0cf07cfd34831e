//! What does the I/O: the kernel's io_uring, or a simulated kernel. The rest of tapdisk knows only this much of it.

use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;

use block::{Buf, Errno, Segment, Span};

use super::Fd;
use crate::Instant;

/// One thing to do, with all that must stay valid while it is done.
#[derive(Clone, Debug)]
pub enum Io {
    /// pread(2) or preadv(2) at byte `at`.
    Read {
        /// From where.
        fd: Rc<Fd>,
        /// Byte of the file.
        at: u64,
        /// To where.
        buf: Buf,
    },
    /// pwrite(2) or pwritev(2) at byte `at`.
    Write {
        /// To where.
        fd: Rc<Fd>,
        /// Byte of the file.
        at: u64,
        /// From where.
        buf: Buf,
    },
    /// fdatasync(2).
    Sync {
        /// Which file.
        fd: Rc<Fd>,
    },
    /// fallocate(2).
    Allocate {
        /// Which file.
        fd: Rc<Fd>,
        /// What is to become of the bytes.
        mode: Allocate,
        /// Which bytes.
        span: Span,
    },
    /// lseek(2) for data, a hole or the end; completes with the offset found, or ENXIO.
    Seek {
        /// Which file.
        fd: Rc<Fd>,
        /// From which byte on.
        at: u64,
        /// For what.
        what: Seek,
    },
    /// ftruncate(2).
    Truncate {
        /// Which file.
        fd: Rc<Fd>,
        /// Bytes that it is to have.
        len: u64,
    },
    /// posix_fadvise(2) with POSIX_FADV_WILLNEED.
    WillNeed {
        /// Which file.
        fd: Rc<Fd>,
        /// Which bytes.
        span: Span,
    },
    /// recv(2) or recvmsg(2): completes with the first bytes to arrive, with 0 at the end of the stream.
    Receive {
        /// From which socket.
        fd: Rc<Fd>,
        /// To where.
        buf: Buf,
    },
    /// send(2) or sendmsg(2): completes when all is handed over, unless an error cuts it short.
    Send {
        /// To which socket.
        fd: Rc<Fd>,
        /// From where.
        buf: Buf,
    },
    /// accept4(2) with SOCK_CLOEXEC: completes with a new file descriptor, which is then the caller's to close.
    Accept {
        /// On which listening socket.
        fd: Rc<Fd>,
    },
    /// poll(2) for POLLIN, once: completes when there is something to read.
    Poll {
        /// From what.
        fd: Rc<Fd>,
    },
    /// write(2) of a 1 to an eventfd(2).
    Signal {
        /// Which one.
        fd: Rc<Fd>,
    },
}

impl Io {
    /// The file it works on.
    pub fn fd(&self) -> &Rc<Fd> {
        match self {
            Io::Read { fd, .. }
            | Io::Write { fd, .. }
            | Io::Sync { fd }
            | Io::Allocate { fd, .. }
            | Io::Seek { fd, .. }
            | Io::Truncate { fd, .. }
            | Io::WillNeed { fd, .. }
            | Io::Receive { fd, .. }
            | Io::Send { fd, .. }
            | Io::Accept { fd }
            | Io::Poll { fd }
            | Io::Signal { fd } => fd,
        }
    }

    /// Whether it may wait for somebody else for ever, so that it is cancelled when nobody wants it any more.
    pub(crate) fn waits_for_a_peer(&self) -> bool {
        match self {
            Io::Receive { .. }
            | Io::Send { .. }
            | Io::Accept { .. }
            | Io::Poll { .. }
            | Io::Signal { .. } => true,
            Io::Read { .. }
            | Io::Write { .. }
            | Io::Sync { .. }
            | Io::Allocate { .. }
            | Io::Seek { .. }
            | Io::Truncate { .. }
            | Io::WillNeed { .. } => false,
        }
    }
}

/// What fallocate(2) is to do; the size of the file stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocate {
    /// FALLOC_FL_PUNCH_HOLE: give the space back; it reads as zeroes.
    PunchHole,
    /// FALLOC_FL_ZERO_RANGE: zeroes, with space for them.
    ZeroRange,
    /// No flag: space behind what has none. No byte changes.
    Reserve,
}

impl Allocate {
    /// The `mode` of fallocate(2), always with FALLOC_FL_KEEP_SIZE.
    pub const fn mode(self) -> i32 {
        match self {
            Allocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Allocate::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            Allocate::Reserve => libc::FALLOC_FL_KEEP_SIZE,
        }
    }
}

/// What lseek(2) is to look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // SEEK_DATA, SEEK_HOLE, and SEEK_END for the size
pub enum Seek {
    Data,
    Hole,
    End,
}

/// How long a turn of the engine may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Submit and look; do not wait.
    No,
    /// Wait for a completion or an unpark, until then at the latest.
    Until(Option<Instant>),
}

/// What an engine asks the executor while it waits. Neither answer starts I/O.
pub trait Idle {
    /// Whether something besides completions wants the thread. Called often while the engine looks before it sleeps.
    fn has_news(&self) -> bool;

    /// Called last before a sleep: whether there is still nothing to do. From then on whatever comes ends the sleep, by
    /// an unpark or by a completion.
    fn may_sleep(&self) -> bool;

    /// Called after a sleep, before anything is made of what ended it.
    fn woken(&self);
}

/// Does I/O for one thread.
///
/// Results are as the kernel gives them: negative for an errno, else a count, an offset or a descriptor.
pub trait Engine {
    /// Makes a file known, so that using it costs less; `None` where that is not to be had.
    fn register_file(&mut self, fd: BorrowedFd<'_>) -> Option<u32>;

    /// Forgets a registered file; I/O on it that is in flight goes on.
    fn forget_file(&mut self, index: u32);

    /// Makes memory known, so that I/O on it costs less; the number goes into [`block::Buf::from_raw`].
    ///
    /// # Errors
    /// ENOMEM where the limit on locked memory forbids it, EOPNOTSUPP where the kernel cannot do it, ENOSPC where there
    /// is no number left.
    ///
    /// # Safety
    /// The memory stays until it is forgotten.
    #[allow(unsafe_code)] // a promise asked of the caller, no code
    unsafe fn register_memory(&mut self, memory: Segment) -> Result<u16, Errno>;

    /// Forgets registered memory; no I/O on it is in flight.
    fn forget_memory(&mut self, index: u16);

    /// Takes `io` to be done; its completion carries `token`. Never fails: what cannot be submitted yet waits.
    ///
    /// # Safety
    /// Until that completion the caller keeps `io` alive and where it is: its file, its memory, its segments.
    #[allow(unsafe_code)] // a promise asked of the caller, no code
    unsafe fn submit(&mut self, io: &Io, token: usize);

    /// Asks to end the I/O with this token early; it completes all the same, with ECANCELED or as it would have.
    fn cancel(&mut self, token: usize);

    /// Submits what waits, perhaps waits, and adds what has completed to `done`, as (token, result).
    fn turn(&mut self, wait: Wait, idle: &dyn Idle, done: &mut Vec<(usize, i64)>);

    /// The time now.
    fn now(&self) -> Instant;

    /// What ends a waiting turn from any thread, also one that is only about to begin.
    fn unpark(&self) -> Arc<dyn Fn() + Send + Sync>;
}
