//! A file or block device of the host.
//!
//! What callers may do at any byte, the file may allow only at multiples of its alignment (O_DIRECT): what is
//! misaligned goes through memory of ours and, when written, reads the blocks at its ends first. That takes its range
//! alone; see `RangeLocks`.

mod lock;
mod open;
mod record;
mod sync;
mod transfer;
mod trust;

use std::any::Any;
use std::cell::{Cell, OnceCell};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use block::{Buf, Errno, Error, Limits, Result, Run, Span};
use runtime::{Allocate, Fd, Handle, Seek};

use crate::permits::Permits;
use crate::{Access, Io, RangeLocks, Storage, Zeroing};
pub use lock::Holder;
pub use open::{Cache, OpenError, Opened, Options, open};
pub use record::{Record, Records};
use sync::Sync;
use transfer::{Direction, transfer};
pub use trust::check_short_transfers;

/// Bytes of a misaligned request that go through our own memory at a time.
const BOUNCE: u64 = 256 << 10;
/// How many misaligned requests do so at a time: with `BOUNCE`, a bound on that memory.
const BOUNCES_MAX: usize = 64;
/// Bytes of zeroes written at a time where the file system cannot zero.
const ZEROES: u64 = 256 << 10;
/// Runs told at a time: bounds the work of one request on a fragmented file.
const RUNS_MAX: usize = 256;
/// So long until the file's end is looked for again while it moves.
const RESIZING: Duration = Duration::from_millis(1);

/// A file, open and locked.
pub struct File {
    handle: Handle,
    fd: Rc<Fd>,
    /// The same file without O_DIRECT, for its last bytes where its size is no multiple of the alignment.
    tail: Option<Rc<Fd>>,
    name: String,
    /// Bytes.
    size: Cell<u64>,
    resizes: Cell<Resizes>,
    align: u64,
    memory_align: usize,
    direct: bool,
    is_block_device: bool,
    read_only: bool,
    locks: RangeLocks,
    /// Taken last and held only over I/O, so that nobody who has one waits for anybody.
    bounces: Permits,
    /// `ZEROES` bytes of zero, for all who write them.
    zeroes: OnceCell<Buf>,
    sync: Sync,
    /// Whether the file system punches holes, as far as we know; likewise for zeroing ranges.
    can_punch: Cell<bool>,
    can_zero: Cell<bool>,
    can_reserve: Cell<bool>,
}

/// What we do to the file's end ourselves.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Resizes {
    running: u32,
    ended: u64,
}

/// A resize that is running.
struct Resizing<'a>(&'a Cell<Resizes>);

impl Resizing<'_> {
    fn start(resizes: &Cell<Resizes>) -> Resizing<'_> {
        let Resizes { running, ended } = resizes.get();
        resizes.set(Resizes { running: running + 1, ended });
        Resizing(resizes)
    }
}

impl Drop for Resizing<'_> {
    fn drop(&mut self) {
        let Resizes { running, ended } = self.0.get();
        self.0.set(Resizes { running: running - 1, ended: ended + 1 });
    }
}

/// A file in parts, for those that do not come from [`open`]: simulated ones.
#[derive(Debug)]
pub struct Parts {
    /// What carries the I/O.
    pub fd: Rc<Fd>,
    /// See [`Opened::tail`].
    pub tail: Option<Rc<Fd>>,
    /// What errors call it.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// See [`Opened::align`].
    pub align: u32,
    /// See [`Opened::memory_align`].
    pub memory_align: u32,
    /// See [`Opened::direct`].
    pub direct: bool,
    /// See [`Opened::is_block_device`].
    pub is_block_device: bool,
    /// See [`Opened::read_only`].
    pub read_only: bool,
}

impl File {
    /// Takes in a file that was opened.
    pub fn new(handle: &Handle, opened: Opened) -> File {
        let parts = Parts {
            fd: handle.register(opened.file.into()),
            tail: opened.tail.map(|tail| handle.register(tail.into())),
            name: file_name(&opened.path),
            size: opened.size,
            align: opened.align,
            memory_align: opened.memory_align,
            direct: opened.direct,
            is_block_device: opened.is_block_device,
            read_only: opened.read_only,
        };
        let mut file = File::from_parts(handle, parts);
        file.sync = Sync::new(opened.record, opened.poison);
        file
    }

    /// Puts a file together.
    pub fn from_parts(handle: &Handle, parts: Parts) -> File {
        File {
            handle: handle.clone(),
            fd: parts.fd,
            tail: parts.tail,
            name: parts.name,
            size: Cell::new(parts.size),
            resizes: Cell::default(),
            align: u64::from(parts.align),
            memory_align: parts.memory_align as usize,
            direct: parts.direct,
            is_block_device: parts.is_block_device,
            read_only: parts.read_only,
            locks: RangeLocks::default(),
            bounces: Permits::new(BOUNCES_MAX),
            zeroes: OnceCell::new(),
            sync: Sync::default(),
            can_punch: Cell::new(true),
            can_zero: Cell::new(true),
            can_reserve: Cell::new(true),
        }
    }

    /// Where the part that can be read and written directly ends.
    fn direct_end(&self) -> u64 {
        self.size.get() & !(self.align - 1)
    }

    /// The aligned blocks that a span touches, as far as they can be read and written directly, and the rest: the
    /// bytes of the last, incomplete block.
    fn split_tail(&self, span: Span) -> (Span, Span) {
        span.split_at(self.direct_end())
    }

    fn is_straight(&self, span: Span, buf: &Buf) -> bool {
        self.align == 1 || (span.is_aligned(self.align) && buf.is_aligned(self.memory_align))
    }

    async fn move_bytes(
        &self,
        fd: &Rc<Fd>,
        direction: Direction,
        at: u64,
        buf: &Buf,
        keep: Option<Rc<dyn Any>>,
    ) -> Result<()> {
        // Off the tail O_DIRECT can only go on from multiples of the alignment.
        let step = if Rc::ptr_eq(fd, &self.fd) { self.align } else { 1 };
        transfer(&self.handle, fd, direction, at, buf, step, keep).await.map_err(|error| {
            error.during(format_args!("{} {} bytes at {at} of {}", direction.name(), buf.len(), self.name))
        })
    }

    async fn read_bytes(&self, span: Span, buf: &Buf) -> Result<()> {
        if self.is_straight(span, buf) {
            return self.move_bytes(&self.fd, Direction::Read, span.at(), buf, None).await;
        }
        let (blocks, rest) = self.split_tail(span);
        let straight = blocks.align_in(self.align);
        if !straight.is_empty() && buf.part(span.at(), straight).is_aligned(self.memory_align) {
            let (head, others) = blocks.split_at(straight.at());
            let (_, end) = others.split_at(straight.end());
            self.bounce_in(head, span.at(), buf).await?;
            self.move_bytes(&self.fd, Direction::Read, straight.at(), &buf.part(span.at(), straight), None)
                .await?;
            self.bounce_in(end, span.at(), buf).await?;
        } else {
            self.bounce_in(blocks, span.at(), buf).await?;
        }
        if !rest.is_empty() {
            let tail = self.tail_fd();
            self.move_bytes(tail, Direction::Read, rest.at(), &buf.part(span.at(), rest), None).await?;
        }
        Ok(())
    }

    /// Reads `span` through memory of ours into `buf`, which holds the disk's bytes from `base` on.
    async fn bounce_in(&self, span: Span, base: u64, buf: &Buf) -> Result<()> {
        for piece in pieces(span, BOUNCE, self.align) {
            let blocks = piece.align_out(self.align);
            let _permit = self.bounces.take().await;
            let bounce = self.handle.pool().take(blocks.len() as usize);
            self.move_bytes(&self.fd, Direction::Read, blocks.at(), &bounce, None).await?;
            buf.part(base, piece).copy_from(0, &bounce.part(blocks.at(), piece));
        }
        Ok(())
    }

    async fn write_bytes(&self, span: Span, buf: &Buf) -> Result<()> {
        if self.align == 1 {
            return self.move_bytes(&self.fd, Direction::Write, span.at(), buf, None).await;
        }
        let blocks = span.align_out(self.align);
        let access = if blocks == span { Access::Write } else { Access::Exclusive };
        let guard: Rc<dyn Any> = Rc::new(self.locks.lock(blocks, access).await);
        let keep = || Some(guard.clone());
        if self.is_straight(span, buf) {
            return self.move_bytes(&self.fd, Direction::Write, span.at(), buf, keep()).await;
        }
        let (blocks, rest) = self.split_tail(span);
        let straight = blocks.align_in(self.align);
        if !straight.is_empty() && buf.part(span.at(), straight).is_aligned(self.memory_align) {
            let (head, others) = blocks.split_at(straight.at());
            let (_, end) = others.split_at(straight.end());
            self.bounce_out(head, span.at(), buf, &guard).await?;
            let part = buf.part(span.at(), straight);
            self.move_bytes(&self.fd, Direction::Write, straight.at(), &part, keep()).await?;
            self.bounce_out(end, span.at(), buf, &guard).await?;
        } else {
            self.bounce_out(blocks, span.at(), buf, &guard).await?;
        }
        if !rest.is_empty() {
            let part = buf.part(span.at(), rest);
            self.move_bytes(self.tail_fd(), Direction::Write, rest.at(), &part, keep()).await?;
        }
        Ok(())
    }

    /// Writes `span` from `buf`, which holds the disk's bytes from `base` on, through memory of ours; the blocks that
    /// it covers only in part are read first.
    async fn bounce_out(&self, span: Span, base: u64, buf: &Buf, guard: &Rc<dyn Any>) -> Result<()> {
        let block = self.align as usize;
        for piece in pieces(span, BOUNCE, self.align) {
            let blocks = piece.align_out(self.align);
            let _permit = self.bounces.take().await;
            let bounce = self.handle.pool().take(blocks.len() as usize);
            let last = blocks.end() - self.align;
            if blocks.at() < piece.at() || (last == blocks.at() && piece.end() < blocks.end()) {
                self.move_bytes(&self.fd, Direction::Read, blocks.at(), &bounce.slice(0, block), None)
                    .await?;
            }
            if last > blocks.at() && piece.end() < blocks.end() {
                let end = bounce.slice(bounce.len() - block, block);
                self.move_bytes(&self.fd, Direction::Read, last, &end, None).await?;
            }
            bounce.part(blocks.at(), piece).copy_from(0, &buf.part(base, piece));
            let keep = Some(guard.clone());
            self.move_bytes(&self.fd, Direction::Write, blocks.at(), &bounce, keep).await?;
        }
        Ok(())
    }

    fn tail_fd(&self) -> &Rc<Fd> {
        self.tail.as_ref().expect("a file with an incomplete last block has a way to it")
    }

    /// Takes in what was added at the end. What was an incomplete last block may be a whole one afterwards, and is no
    /// longer reached through the tail; a write that is under way there keeps others off by its lock on the block.
    async fn take_in(&self) -> Result<u64> {
        let found = self.whole().await?;
        if !found.is_multiple_of(self.align) && self.tail.is_none() {
            let doing =
                format!("its end at {found} is no multiple of {} bytes and cannot be reached", self.align);
            return Err(Error::new(Errno::EINVAL, doing));
        }
        if found > self.size.get() {
            self.size.set(found);
            // Whoever made it larger may not have made that durable: the next flush has something to do.
            drop(self.sync.changing());
        }
        Ok(found)
    }

    /// ftruncate(2), but for a block device.
    async fn set_size(&self, bytes: u64) -> Result<()> {
        let size = self.size.get();
        if bytes == size || (self.is_block_device && bytes < size) {
            return Ok(());
        }
        if self.is_block_device {
            return Err(Error::new(Errno::ENOSPC, format!("the block device has {size} bytes")));
        }
        // Without a way to an incomplete last block there must be none.
        if !bytes.is_multiple_of(self.align) && self.tail.is_none() {
            let doing =
                format!("its end would be no multiple of {} bytes and could not be reached", self.align);
            return Err(Error::new(Errno::EINVAL, doing));
        }
        let _resizing = Resizing::start(&self.resizes);
        // Before, where it shrinks: nothing is to be done any more with what goes.
        self.size.set(size.min(bytes));
        loop {
            match self.handle.truncate(&self.fd, bytes).await {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    self.size.set(size);
                    return Err(errno.into());
                }
            }
        }
        self.size.set(bytes);
        Ok(())
    }

    /// Where the file ends by the kernel; an error if somebody else has cut it off, which loses what was there.
    async fn whole(&self) -> Result<u64> {
        loop {
            let before = self.resizes.get();
            let found = self.seek(0, Seek::End).await?;
            let size = self.size.get();
            if before == self.resizes.get() && before.running == 0 {
                return if found < size { Err(shrunk(found, size)) } else { Ok(found) };
            }
            // It may be from before or after our own doing.
            self.handle.sleep(RESIZING).await;
        }
    }

    /// fallocate(2) over the span; `Ok(false)` where the file system does not have it.
    async fn allocate(&self, mode: Allocate, span: Span) -> Result<bool> {
        let access = if self.align == 1 {
            None
        } else {
            Some(self.locks.lock(span.align_out(self.align), Access::Write).await)
        };
        let guard: Rc<dyn Any> = Rc::new(access);
        loop {
            let io = runtime::Io::Allocate { fd: self.fd.clone(), mode, span };
            match self.handle.start(io, Some(guard.clone())).await {
                Ok(_) => return Ok(true),
                Err(Errno::EINTR) => {}
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV) => return Ok(false),
                // Block devices and some file systems want their own alignment, which they do not tell.
                Err(Errno::EINVAL) => return Ok(false),
                Err(errno) => {
                    let doing = match mode {
                        Allocate::PunchHole => "punch a hole of",
                        Allocate::ZeroRange => "zero",
                        Allocate::Reserve => "reserve",
                    };
                    let (len, at) = (span.len(), span.at());
                    return Err(Error::new(errno, format!("{doing} {len} bytes at {at} of {}", self.name)));
                }
            }
        }
    }

    async fn zero_bytes(&self, span: Span, how: Zeroing) -> Result<()> {
        if how.unmap && self.can_punch.get() {
            if self.allocate(Allocate::PunchHole, span).await? {
                return Ok(());
            }
            self.can_punch.set(!span.is_aligned(4096)); // refused as such, not for its alignment
        }
        if self.can_zero.get() {
            if self.allocate(Allocate::ZeroRange, span).await? {
                return Ok(());
            }
            self.can_zero.set(!span.is_aligned(4096));
        }
        if how.fast {
            let doing = format!("zero {} bytes at {} of {} fast", span.len(), span.at(), self.name);
            return Err(Error::new(Errno::EOPNOTSUPP, doing));
        }
        let zeroes = self.zeroes.get_or_init(|| Buf::zeroed(ZEROES as usize));
        for piece in pieces(span, ZEROES, self.align) {
            self.write_bytes(piece, &zeroes.slice(0, piece.len() as usize)).await?;
        }
        Ok(())
    }

    async fn reserve_space(&self, span: Span) -> Result<()> {
        if self.can_reserve.get() && !self.is_block_device {
            if self.allocate(Allocate::Reserve, span).await? {
                return Ok(());
            }
            self.can_reserve.set(false);
        }
        Err(Error::new(Errno::EOPNOTSUPP, format!("reserve space in {}", self.name)))
    }

    async fn find_runs(&self, span: Span) -> Result<Vec<Run>> {
        let mut runs = Vec::new();
        let mut at = span.at();
        while at < span.end() && runs.len() < RUNS_MAX {
            let data = match self.seek(at, Seek::Data).await {
                Ok(data) => data.clamp(at, span.end()),
                Err(error) if error.errno() == Errno::ENXIO => {
                    // Nothing but a hole up to the end. What was cut off the file is none: reading it fails.
                    self.whole()
                        .await
                        .map_err(|error| error.during(format_args!("look at {}", self.name)))?;
                    span.end()
                }
                // A file that cannot tell is all data.
                Err(error)
                    if matches!(
                        error.errno(),
                        Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ESPIPE
                    ) =>
                {
                    runs.push(Run { len: span.end() - at, allocated: true, zero: false });
                    break;
                }
                Err(error) => return Err(error),
            };
            if data > at {
                runs.push(Run { len: data - at, allocated: false, zero: true });
                at = data;
                continue;
            }
            // At data: its end is the next hole; every file ends with one.
            let hole = self.seek(at, Seek::Hole).await?.clamp(at, span.end());
            // A hole may have been punched between the two calls: look again.
            if hole > at {
                runs.push(Run { len: hole - at, allocated: true, zero: false });
                at = hole;
            }
        }
        Ok(runs)
    }

    async fn seek(&self, at: u64, what: Seek) -> Result<u64> {
        loop {
            match self.handle.seek(&self.fd, at, what).await {
                Err(Errno::EINTR) => {}
                result => {
                    return result.map_err(|errno| {
                        Error::new(errno, format!("look for data and holes at {at} of {}", self.name))
                    });
                }
            }
        }
    }

    /// What must hold before bytes are changed.
    fn check_writable(&self) -> Result<()> {
        match self.sync.poison() {
            Some(error) => Err(error),
            None if self.read_only => {
                Err(Error::new(Errno::EROFS, format!("write to {}, open for reading", self.name)))
            }
            None => Ok(()),
        }
    }
}

impl Storage for File {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn limits(&self) -> Limits {
        let preferred = self.align.max(4096) as u32;
        let fast_zero = self.can_punch.get() || self.can_zero.get();
        Limits { align: self.align as u32, preferred, read_only: self.read_only, fast_zero }
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move {
            // What the page cache holds after a failed sync is not what the disk holds; and a sync may fail while we
            // read.
            let doubtful = || self.sync.poison().filter(|_| !self.direct);
            if let Some(error) = doubtful() {
                return Err(error);
            }
            self.read_bytes(Span::of(at, &buf), &buf).await?;
            doubtful().map_or(Ok(()), Err)
        })
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move {
            self.check_writable()?;
            let _changed = self.sync.changing();
            self.write_bytes(Span::of(at, &buf), &buf).await
        })
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        Box::pin(async move {
            self.check_writable()?;
            let _changed = self.sync.changing();
            self.zero_bytes(span, how).await
        })
    }

    fn discard(&self, span: Span) -> Io<'_> {
        Box::pin(async move {
            self.check_writable()?;
            // Whole blocks only: a hole in part of one would cost a write of zeroes and give nothing back.
            let span = span.align_in(self.align.max(512));
            if span.is_empty() || !self.can_punch.get() {
                return Ok(());
            }
            let _changed = self.sync.changing();
            if !self.allocate(Allocate::PunchHole, span).await? {
                self.can_punch.set(!span.is_aligned(4096));
            }
            Ok(())
        })
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            if self.read_only {
                return Ok(());
            }
            self.sync.flush(&self.handle, &self.fd, &self.name, async || self.whole().await.map(drop)).await
        })
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        Box::pin(self.find_runs(span))
    }

    fn prefetch(&self, span: Span) -> Io<'_> {
        Box::pin(async move {
            if !self.direct
                && let Err(errno) = self.handle.will_need(&self.fd, span).await
            {
                tracing::debug!(%errno, ?span, name = self.name, "reading ahead failed");
            }
            Ok(())
        })
    }

    fn grow(&self) -> Io<'_, u64> {
        Box::pin(async move {
            self.take_in().await.map_err(|error| error.during(format_args!("grow {}", self.name)))
        })
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        Box::pin(async move {
            self.check_writable()?;
            let _changed = self.sync.changing();
            self.set_size(bytes)
                .await
                .map_err(|error| error.during(format_args!("make {} {bytes} bytes long", self.name)))
        })
    }

    fn reserve(&self, span: Span) -> Io<'_> {
        Box::pin(async move {
            self.check_writable()?;
            let _changed = self.sync.changing();
            self.reserve_space(span).await
        })
    }

    fn poison(&self) -> Option<Error> {
        self.sync.poison()
    }
}

/// The span in pieces of at most `len` bytes that end at multiples of `align`, but for the last.
fn pieces(span: Span, len: u64, align: u64) -> impl Iterator<Item = Span> {
    let mut rest = span;
    std::iter::from_fn(move || {
        let end = rest.at().saturating_add(len) & !(align - 1);
        let (piece, others) =
            if end >= rest.end() { (rest, rest.split_at(rest.end()).1) } else { rest.split_at(end) };
        rest = others;
        (!piece.is_empty()).then_some(piece)
    })
}

/// The error of a file that somebody has cut off while it is served; sizes in bytes.
fn shrunk(found: u64, size: u64) -> Error {
    Error::new(Errno::EIO, format!("the file has shrunk to {found} bytes, {size} are served"))
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
