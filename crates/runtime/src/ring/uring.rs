//! The engine of real hosts: io_uring, and a helper thread for what it cannot do.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use block::pool::ARENA;
use block::{Buf, Errno, Pool, Segment};
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use rustix::event::EventfdFlags;

use super::engine::{Engine, Idle, Io, Seek, Wait};
use super::spin::Spin;
use crate::Instant;

/// Submission queue entries: as many operations go to the kernel in one call.
const ENTRIES: u32 = 256;
/// So many entries go to the kernel at once, before the turn ends: a device is not to wait for the last of many, nor to
/// be done with all at the same time. Smaller batches have a few per cent more IOPS on a disk, for as much more CPU.
const BATCH: usize = 8;
/// Completion queue entries: beyond them the kernel keeps completions aside (IORING_FEAT_NODROP).
const COMPLETIONS: u32 = 4096;
/// Files that can be registered; more are used by their descriptor.
const FILES: usize = 1024;
/// Pieces of memory that can be registered, the pool's arena being the first.
const MEMORIES: u16 = 1024;
/// What an eventfd is told.
static ONE: u64 = 1;
/// Completions of our own, which no slot waits for.
const UNPARKED: u64 = u64::MAX;
const CANCELLED: u64 = u64::MAX - 1;

/// How completions reach the thread. What is fastest depends on kernel, device and load; see `docs/decisions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum RingFlags {
    /// The first of `Cooperative`, `Plain` that the kernel takes.
    #[default]
    Auto,
    /// IORING_SETUP_DEFER_TASKRUN: completions are worked on only when asked for. Linux 6.1.
    Deferred,
    /// IORING_SETUP_COOP_TASKRUN: completions do not interrupt the thread. Linux 5.19.
    Cooperative,
    /// No flags.
    Plain,
}

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kernel has no io_uring.
    #[error("this kernel has no io_uring ({0}): tapdisk needs Linux 5.11 or later with CONFIG_IO_URING")]
    Missing(Errno),
    /// Somebody forbids it.
    #[error(
        "io_uring is forbidden ({0}): check `sysctl kernel.io_uring_disabled` (0 allows it to all, 1 to root and the \
         group in kernel.io_uring_group), and in a container its seccomp profile, which must allow io_uring_setup, \
         io_uring_enter and io_uring_register"
    )]
    Forbidden(Errno),
    /// The kernel's io_uring is too old.
    #[error("this kernel's io_uring is too old: it lacks {0}; tapdisk needs Linux 5.11 or later")]
    TooOld(&'static str),
    /// Locked memory is limited.
    #[error(
        "no memory for an io_uring ({0}): on Linux before 5.12 raise the limit on locked memory (`ulimit -l`)"
    )]
    Memory(Errno),
    /// Something else.
    #[error("setting up io_uring failed: {0}")]
    Other(Errno),
}

impl OpenError {
    fn from(error: &std::io::Error) -> OpenError {
        match Errno::from_std(error) {
            errno @ Errno::ENOSYS => OpenError::Missing(errno),
            errno @ (Errno::EPERM | Errno::EACCES) => OpenError::Forbidden(errno),
            errno @ Errno::ENOMEM => OpenError::Memory(errno),
            errno => OpenError::Other(errno),
        }
    }
}

/// Takes over a descriptor that the kernel made for us (accept).
pub(crate) fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: called once for each completion of an accept, with the new descriptor in it, which nobody else has.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// An io_uring, its registered files and memory, and the helper thread.
pub struct Uring {
    ring: IoUring,
    files: Files,
    /// What goes into the submission queue at the next call.
    backlog: VecDeque<squeue::Entry>,
    /// The headers of sendmsg and recvmsg, by token. The kernel reads each when it is submitted, and writes that of
    /// a recvmsg when it completes (flags and lengths; `____sys_recvmsg` in net/socket.c): so it stays where it is
    /// until the next operation with this token.
    headers: Vec<Option<Box<libc::msghdr>>>,
    bell: Arc<Bell>,
    helper: Option<Helper>,
    spin: Spin,
    /// Since when there has been something to do.
    busy_since: std::time::Instant,
    /// Which tokens are operations of storage in flight, and how many.
    storing: Vec<bool>,
    stores: usize,
    memory: Memory,
    start: std::time::Instant,
}

/// An eventfd that ends a waiting turn.
struct Bell {
    eventfd: OwnedFd,
    /// Results of the helper thread.
    results: Mutex<Vec<(usize, i64)>>,
}

impl Bell {
    fn ring(&self) {
        // It can fail only when its count is full, and then it has been rung.
        if let Err(errno) = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes()) {
            debug_assert_eq!(errno, rustix::io::Errno::AGAIN);
        }
    }

    fn silence(&self) {
        let mut count = [0; 8];
        if let Err(errno) = rustix::io::read(&self.eventfd, &mut count) {
            debug_assert_eq!(errno, rustix::io::Errno::AGAIN);
        }
    }
}

/// The memory that the kernel was told of.
struct Memory {
    /// Keeps the pool's arena, number 0, if it is registered.
    arena: Option<Buf>,
    /// The other numbers that can be had: none on kernels before 5.19.
    free: Vec<u16>,
}

/// Which numbers of registered files are in use.
struct Files {
    registered: bool,
    free: Vec<u32>,
}

impl Uring {
    /// Sets up a ring with the memory of `pool` registered where the kernel allows that.
    pub fn open(flags: RingFlags, pool: &Pool) -> Result<Uring, OpenError> {
        Uring::with_queues(flags, pool, ENTRIES, COMPLETIONS)
    }

    /// The same with queues of these lengths.
    pub fn with_queues(
        flags: RingFlags,
        pool: &Pool,
        entries: u32,
        completions: u32,
    ) -> Result<Uring, OpenError> {
        let wanted: &[RingFlags] = match flags {
            RingFlags::Auto => &[RingFlags::Cooperative, RingFlags::Plain],
            RingFlags::Deferred => &[RingFlags::Deferred],
            RingFlags::Cooperative => &[RingFlags::Cooperative],
            RingFlags::Plain => &[RingFlags::Plain],
        };
        let mut first = None;
        let mut opened = None;
        for &flags in wanted {
            match build(flags, entries, completions) {
                Ok(ring) => {
                    opened = Some((ring, flags));
                    break;
                }
                Err(error) => first = first.or(Some(error)),
            }
        }
        let (ring, flags) = match (opened, first) {
            (Some(opened), _) => opened,
            (None, Some(error)) => return Err(OpenError::from(&error)),
            (None, None) => return Err(OpenError::Other(Errno::EINVAL)),
        };
        check(&ring)?;
        let registered = ring.submitter().register_files(&[-1; FILES]).is_ok();
        let memory = register_arena(&ring, pool);
        tracing::debug!(?flags, files = registered, memory = memory.arena.is_some(), "io_uring is set up");
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| OpenError::Other(Errno::new(errno.raw_os_error()).unwrap_or(Errno::EIO)))?;
        let mut uring = Uring {
            ring,
            files: Files { registered, free: (0..FILES as u32).rev().collect() },
            backlog: VecDeque::new(),
            headers: Vec::new(),
            bell: Arc::new(Bell { eventfd, results: Mutex::default() }),
            helper: None,
            spin: Spin::up_to(Duration::MAX),
            busy_since: std::time::Instant::now(),
            storing: Vec::new(),
            stores: 0,
            memory,
            start: std::time::Instant::now(),
        };
        uring.listen_for_the_bell();
        Ok(uring)
    }

    fn listen_for_the_bell(&mut self) {
        let fd = types::Fd(self.bell.eventfd.as_raw_fd());
        let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(UNPARKED);
        self.push(entry);
    }

    /// Queues an entry for the next call of the kernel.
    fn push(&mut self, entry: squeue::Entry) {
        self.backlog.push_back(entry);
        if self.backlog.len() >= BATCH {
            self.push_backlog();
            self.enter(0, None);
        }
    }

    /// The same, before all others: a peer waits for it, while they take their time in the kernel one after the other.
    fn push_first(&mut self, entry: squeue::Entry) {
        self.backlog.push_front(entry);
    }

    fn push_backlog(&mut self) {
        while let Some(entry) = self.backlog.pop_front() {
            if !self.try_push(&entry) {
                self.backlog.push_front(entry);
                return;
            }
        }
    }

    fn try_push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the entry names memory that stays until its completion: buffers and segments by the contract of
        // `Engine::submit`, a header in `self.headers` (see there), our eventfd for good.
        unsafe { self.ring.submission().push(entry).is_ok() }
    }

    /// Submits, and waits for `want` completions, until `deadline` at the latest.
    fn enter(&mut self, want: usize, deadline: Option<Instant>) {
        if want == 0 {
            let submission = self.ring.submission();
            if submission.is_empty() && !submission.taskrun() && !submission.cq_overflow() {
                return;
            }
        }
        let result = match deadline {
            Some(deadline) if want > 0 => {
                let left = deadline.since(self.now());
                let timeout = Timespec::new().sec(left.as_secs()).nsec(left.subsec_nanos());
                self.ring.submitter().submit_with_args(want, &SubmitArgs::new().timespec(&timeout))
            }
            Some(_) | None => self.ring.submit_and_wait(want),
        };
        match result.map_err(|error| Errno::from_std(&error)) {
            Ok(_) | Err(Errno::ETIME | Errno::EINTR) => {}
            // Completions wait to be reaped first: the caller does that and comes back.
            Err(Errno::EBUSY) => {}
            // The kernel has no memory for a request just now. What is in the queue stays there.
            Err(Errno::EAGAIN | Errno::ENOMEM) => std::thread::sleep(Duration::from_millis(1)),
            Err(errno) => {
                // Nothing can be done for any request without the ring; its death must not look like a hang.
                tracing::error!(%errno, "io_uring_enter failed: tapdisk cannot go on");
                std::process::abort();
            }
        }
    }

    /// Submits, then waits for a completion or for news: looking for them first, if that has been of use lately.
    fn wait(&mut self, deadline: Option<Instant>, idle: &dyn Idle) {
        // What has completed already needs no waiting for, but what was queued must go out.
        if !self.ring.completion().is_empty() || !self.backlog.is_empty() {
            return self.enter(0, None);
        }
        let begun = std::time::Instant::now();
        let mut look = self.spin.length(begun.duration_since(self.busy_since), self.stores);
        if let Some(deadline) = deadline {
            look = look.min(deadline.since(self.now()));
        }
        if !look.is_zero() {
            self.enter(0, None);
            loop {
                for _ in 0..8 {
                    if self.has_news() || idle.has_news() {
                        self.busy_since = std::time::Instant::now();
                        return self.enter(0, None);
                    }
                    std::hint::spin_loop();
                }
                if begun.elapsed() >= look {
                    break;
                }
            }
        }
        if !idle.may_sleep() {
            return self.enter(0, None);
        }
        self.enter(1, deadline);
        idle.woken();
        self.busy_since = std::time::Instant::now();
        self.spin.slept(self.busy_since.duration_since(begun));
    }

    /// Whether there are completions, or work that the kernel needs a call of ours to do.
    fn has_news(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }

    fn reap(&mut self, done: &mut Vec<(usize, i64)>) -> bool {
        let before = done.len();
        let mut unparked = false;
        for entry in self.ring.completion() {
            match entry.user_data() {
                UNPARKED => unparked = true,
                CANCELLED => {}
                token => {
                    let token = token as usize;
                    self.stores -= usize::from(std::mem::take(&mut self.storing[token]));
                    done.push((token, result_of(&entry)));
                }
            }
        }
        if unparked {
            self.bell.silence();
            self.listen_for_the_bell();
            done.append(&mut self.bell.results.lock().unwrap_or_else(PoisonError::into_inner));
        }
        unparked || done.len() > before
    }

    fn header(&mut self, buf: &Buf, token: usize) -> *mut libc::msghdr {
        if self.headers.len() <= token {
            self.headers.resize_with(token + 1, || None);
        }
        // SAFETY: an all-zero msghdr is valid: null pointers and lengths of zero.
        let header = self.headers[token].get_or_insert_with(|| Box::new(unsafe { std::mem::zeroed() }));
        header.msg_iov = buf.segments().as_ptr().cast_mut().cast();
        header.msg_iovlen = buf.segments().len() as _;
        // What the kernel wrote there for the operation before.
        header.msg_controllen = 0;
        header.msg_flags = 0;
        &raw mut **header
    }

    fn entry(&mut self, io: &Io, token: usize) -> squeue::Entry {
        // A registered file is named by its number and a flag.
        let (fd, flags) = match io.fd().index() {
            Some(index) => (types::Fd(index as i32), squeue::Flags::FIXED_FILE),
            None => (types::Fd(io.fd().as_fd().as_raw_fd()), squeue::Flags::empty()),
        };
        self.entry_on(io, token, fd).flags(flags).user_data(token as u64)
    }

    fn entry_on(&mut self, io: &Io, token: usize, fd: types::Fd) -> squeue::Entry {
        match io {
            Io::Read { at, buf, .. } => match one(buf) {
                Some((ptr, len, Some(memory))) if self.memory.has(memory) => {
                    opcode::ReadFixed::new(fd, ptr, len, memory).offset(*at).build()
                }
                Some((ptr, len, _)) => opcode::Read::new(fd, ptr, len).offset(*at).build(),
                None => opcode::Readv::new(fd, vector(buf), buf.segments().len() as u32).offset(*at).build(),
            },
            Io::Write { at, buf, .. } => match one(buf) {
                Some((ptr, len, Some(memory))) if self.memory.has(memory) => {
                    opcode::WriteFixed::new(fd, ptr, len, memory).offset(*at).build()
                }
                Some((ptr, len, _)) => opcode::Write::new(fd, ptr, len).offset(*at).build(),
                None => opcode::Writev::new(fd, vector(buf), buf.segments().len() as u32).offset(*at).build(),
            },
            Io::Sync { .. } => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Io::Allocate { mode, span, .. } => {
                opcode::Fallocate::new(fd, span.len()).offset(span.at()).mode(mode.mode()).build()
            }
            Io::WillNeed { span, .. } => {
                let len = span.len().min(i32::MAX as u64) as i64;
                opcode::Fadvise::new(fd, len, libc::POSIX_FADV_WILLNEED).offset(span.at()).build()
            }
            Io::Receive { buf, .. } => match one(buf) {
                Some((ptr, len, _)) => opcode::Recv::new(fd, ptr, len).build(),
                None => opcode::RecvMsg::new(fd, self.header(buf, token)).build(),
            },
            Io::Send { buf, .. } => {
                let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
                match one(buf) {
                    Some((ptr, len, _)) => opcode::Send::new(fd, ptr, len).flags(flags).build(),
                    None => opcode::SendMsg::new(fd, self.header(buf, token)).flags(flags as u32).build(),
                }
            }
            Io::Accept { .. } => opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut())
                .flags(libc::SOCK_CLOEXEC)
                .build(),
            Io::Poll { .. } => opcode::PollAdd::new(fd, libc::POLLIN as u32).build(),
            // Through the ring and not by write(2): that would block this thread where a peer fills a blocking eventfd.
            Io::Signal { .. } => opcode::Write::new(fd, (&raw const ONE).cast(), 8).build(),
            Io::Seek { .. } => opcode::Nop::new().build(), // the helper's, see `submit`
        }
    }
}

impl Memory {
    fn has(&self, index: u16) -> bool {
        index != ARENA || self.arena.is_some()
    }
}

/// The one segment of a buffer that has one, if its length fits the kernel's 32 bits, and the number of the registered
/// memory that it lies in.
fn one(buf: &Buf) -> Option<(*mut u8, u32, Option<u16>)> {
    match buf.segments() {
        [segment] => Some((segment.ptr(), u32::try_from(segment.len()).ok()?, buf.registered())),
        _ => None,
    }
}

/// A buffer's segments as the kernel's vector; `block::buf` asserts that they are laid out alike.
fn vector(buf: &Buf) -> *const libc::iovec {
    buf.segments().as_ptr().cast()
}

/// The result in a completion, as the kernel gave it.
fn result_of(entry: &cqueue::Entry) -> i64 {
    i64::from(entry.result())
}

fn build(flags: RingFlags, entries: u32, completions: u32) -> std::io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_cqsize(completions);
    match flags {
        RingFlags::Deferred => {
            builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
        }
        RingFlags::Cooperative => {
            builder.setup_coop_taskrun().setup_taskrun_flag();
        }
        RingFlags::Plain | RingFlags::Auto => {}
    }
    builder.build(entries)
}

fn check(ring: &IoUring) -> Result<(), OpenError> {
    let parameters = ring.params();
    for (has, what) in [
        (parameters.is_feature_nodrop(), "IORING_FEAT_NODROP"),
        (parameters.is_feature_submit_stable(), "IORING_FEAT_SUBMIT_STABLE"),
        (parameters.is_feature_ext_arg(), "IORING_FEAT_EXT_ARG"),
    ] {
        if !has {
            return Err(OpenError::TooOld(what));
        }
    }
    Ok(())
}

/// Registers the arena with the kernel, if that allows it: it saves pinning pages for each request.
fn register_arena(ring: &IoUring, pool: &Pool) -> Memory {
    let arena = pool.arena();
    let &[segment] = arena.segments() else { return Memory { arena: None, free: Vec::new() } };
    let submitter = ring.submitter();
    let has_table = submitter.register_buffers_sparse(MEMORIES.into()).is_ok(); // Linux 5.19
    // SAFETY: the arena is one allocation that lives as long as `arena`, which `Uring` keeps beside the ring; the
    // ring's field comes first, so it is closed first, and the kernel holds pins on the pages of its own.
    let result = unsafe {
        if has_table {
            submitter.register_buffers_update(ARENA.into(), &[vector_of(segment)], None).map(|_| ())
        } else {
            submitter.register_buffers(&[vector_of(segment)])
        }
    };
    if let Err(error) = &result {
        tracing::debug!(%error, "memory is not registered with io_uring: a little slower");
    }
    let free = if has_table { (ARENA + 1..MEMORIES).rev().collect() } else { Vec::new() };
    Memory { arena: result.is_ok().then_some(arena), free }
}

fn vector_of(segment: Segment) -> libc::iovec {
    libc::iovec { iov_base: segment.ptr().cast(), iov_len: segment.len() }
}

impl Engine for Uring {
    fn register_file(&mut self, fd: BorrowedFd<'_>) -> Option<u32> {
        if !self.files.registered {
            return None;
        }
        let index = self.files.free.pop()?;
        match self.ring.submitter().register_files_update(index, &[fd.as_raw_fd()]) {
            Ok(_) => Some(index),
            Err(error) => {
                tracing::debug!(%error, "a file is not registered with io_uring: a little slower");
                self.files.free.push(index);
                None
            }
        }
    }

    fn forget_file(&mut self, index: u32) {
        match self.ring.submitter().register_files_update(index, &[-1]) {
            Ok(_) => self.files.free.push(index),
            Err(error) => tracing::warn!(%error, index, "io_uring keeps a file that is no longer used"),
        }
    }

    unsafe fn register_memory(&mut self, memory: Segment) -> Result<u16, Errno> {
        let index = self.memory.free.pop().ok_or(Errno::ENOSPC)?;
        // SAFETY: the caller keeps the memory until it is forgotten; the kernel holds pins on the pages of its own.
        let result = unsafe {
            self.ring.submitter().register_buffers_update(index.into(), &[vector_of(memory)], None)
        };
        match result {
            Ok(_) => Ok(index),
            Err(error) => {
                self.memory.free.push(index);
                Err(Errno::from_std(&error))
            }
        }
    }

    fn forget_memory(&mut self, index: u16) {
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: an empty entry names no memory.
        match unsafe { self.ring.submitter().register_buffers_update(index.into(), &[nothing], None) } {
            Ok(_) => self.memory.free.push(index),
            Err(error) => tracing::warn!(%error, index, "io_uring keeps memory that is no longer used"),
        }
    }

    unsafe fn submit(&mut self, io: &Io, token: usize) {
        if let Io::Seek { fd, at, what } = io {
            let bell = self.bell.clone();
            let helper = self.helper.get_or_insert_with(|| Helper::start(bell));
            // The caller keeps `io`, and with it the open file, until the completion.
            helper.ask(Job { token, fd: fd.as_fd().as_raw_fd(), at: *at, what: *what });
            return;
        }
        if self.storing.len() <= token {
            self.storing.resize(token + 1, false);
        }
        if !io.waits_for_a_peer() {
            self.storing[token] = true;
            self.stores += 1;
        }
        let entry = self.entry(io, token);
        match io {
            Io::Signal { .. } => self.push_first(entry),
            Io::Read { .. }
            | Io::Write { .. }
            | Io::Sync { .. }
            | Io::Allocate { .. }
            | Io::Seek { .. }
            | Io::WillNeed { .. }
            | Io::Receive { .. }
            | Io::Send { .. }
            | Io::Accept { .. }
            | Io::Poll { .. } => self.push(entry),
        }
    }

    fn cancel(&mut self, token: usize) {
        self.push(opcode::AsyncCancel::new(token as u64).build().user_data(CANCELLED));
    }

    fn turn(&mut self, wait: Wait, idle: &dyn Idle, done: &mut Vec<(usize, i64)>) {
        self.push_backlog();
        match wait {
            Wait::No => self.enter(0, None),
            Wait::Until(deadline) => self.wait(deadline, idle),
        }
        self.reap(done);
    }

    fn now(&self) -> Instant {
        Instant(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn unpark(&self) -> Arc<dyn Fn() + Send + Sync> {
        let bell = self.bell.clone();
        Arc::new(move || bell.ring())
    }
}

/// What the helper thread is to do.
struct Job {
    token: usize,
    fd: RawFd,
    at: u64,
    what: Seek,
}

/// A thread for calls that may block and that io_uring does not have.
struct Helper {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<std::thread::JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Helper {
    fn start(bell: Arc<Bell>) -> Helper {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let work = move || {
            for job in inbox {
                let result =
                    if stopped.load(Ordering::Relaxed) { -i64::from(libc::ECANCELED) } else { seek(&job) };
                bell.results.lock().unwrap_or_else(PoisonError::into_inner).push((job.token, result));
                bell.ring();
            }
        };
        let thread = std::thread::Builder::new().name("tapdisk-helper".into()).spawn(work);
        let thread = thread.expect("a process that serves disks may have a second thread");
        Helper { jobs: Some(jobs), thread: Some(thread), stop }
    }

    fn ask(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            jobs.send(job).expect("the helper ends only after its sender is gone");
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the helper thread panicked (a bug in tapdisk)");
        }
    }
}

fn seek(job: &Job) -> i64 {
    let whence = match job.what {
        Seek::Data => libc::SEEK_DATA,
        Seek::Hole => libc::SEEK_HOLE,
        Seek::End => libc::SEEK_END,
    };
    // SAFETY: lseek64 touches no memory; the descriptor stays open by the contract of `Engine::submit`. Nobody uses
    // the file's position, so moving it harms nobody.
    let found = unsafe { libc::lseek64(job.fd, job.at as i64, whence) };
    if found < 0 { -i64::from(Errno::from_std(&std::io::Error::last_os_error()).code()) } else { found }
}
