//! The file system as the kernel talks to it: each FUSE request becomes a question to the script, then one to the
//! store, then an answer.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::content::BLOCK;
use crate::rule::{Op, Outcome};
use crate::shared::{Shared, State};
use crate::store::Inode;
use crate::{Cache, Options};

/// Nothing that the kernel could remember outlives the request: a power cut changes sizes and names under it.
const TTL: Duration = Duration::ZERO;

/// What statfs reports when there is no capacity, in bytes.
const BOUNDLESS: u64 = 16 << 40;

pub(crate) struct Fs {
    pub(crate) shared: Arc<Shared>,
    pub(crate) options: Options,
}

impl Fs {
    fn fopen_flags(&self) -> FopenFlags {
        // Without PARALLEL_DIRECT_WRITES the kernel holds the inode's lock during each write, so that one that
        // hangs would keep all others from reaching us.
        match self.options.cache {
            Cache::None => {
                FopenFlags::FOPEN_DIRECT_IO
                    | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
                    | FopenFlags::FOPEN_NOFLUSH
            }
            Cache::Through | Cache::Back => FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        }
    }

    /// FUSE itself accepts O_DIRECT at any offset; a disk answers EINVAL, and so do we.
    fn is_misaligned(&self, flags: OpenFlags, at: u64, len: usize) -> bool {
        let sector = self.options.sector_bytes;
        let direct = flags.0.cast_unsigned() & OFlags::DIRECT.bits() != 0;
        direct && !(at.is_multiple_of(sector) && (len as u64).is_multiple_of(sector))
    }
}

impl fuser::Filesystem for Fs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut wanted = InitFlags::FUSE_PARALLEL_DIROPS;
        if self.options.cache == Cache::Back {
            wanted |= InitFlags::FUSE_WRITEBACK_CACHE;
        }
        if self.options.async_direct_io {
            wanted |= InitFlags::FUSE_ASYNC_DIO;
        }
        let lacks = |lacking| io::Error::other(format!("the kernel's FUSE lacks {lacking:?}"));
        config.add_capabilities(wanted).map_err(lacks)?;
        // So that many hanging requests do not keep the next from being sent.
        let too_many = |most| io::Error::other(format!("at most {most} requests in the background"));
        config.set_max_background(4096).map_err(too_many)?;
        config.set_congestion_threshold(4096).map_err(too_many)?;
        Ok(())
    }

    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let state = self.shared.lock();
        match utf8(name).and_then(|name| state.store.find(name)).and_then(|inode| attr(&state, inode)) {
            Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        answer_attr(attr(&self.shared.lock(), inode.0), reply);
    }

    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _accessed: Option<TimeOrNow>,
        _modified: Option<TimeOrNow>,
        _changed: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _created: Option<SystemTime>,
        _changed_flags: Option<SystemTime>,
        _backed_up: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let inode = inode.0;
        let Some(size) = size else { return answer_attr(attr(&self.shared.lock(), inode), reply) };
        let mut state = self.shared.lock();
        state.counters.truncates += 1;
        let old_size = state.store.file(inode).map_or(0, |file| file.size());
        drop(state);
        let span = size.min(old_size)..size.max(old_size);
        self.shared.serve(Op::Truncate, inode, Some(span), move |shared, outcome| {
            let mut state = shared.lock();
            let done = match outcome {
                Outcome::Serve | Outcome::Short(_) => state.store.resize(inode, size),
                Outcome::Fail { errno, .. } => Err(errno),
                Outcome::Drop => Ok(()),
            };
            answer_attr(done.and_then(|()| attr(&state, inode)), reply);
        });
    }

    fn create(
        &self,
        _request: &Request,
        _parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let mut state = self.shared.lock();
        let created = utf8(name).and_then(|name| state.store.create(name, mode & !umask)).and_then(|inode| {
            state.store.open(inode)?;
            attr(&state, inode)
        });
        match created {
            Ok(attr) => reply.created(&TTL, &attr, Generation(0), FileHandle(attr.ino.0), self.fopen_flags()),
            Err(errno) => reply.error(fuse(errno)),
        }
    }

    fn open(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let flags = self.fopen_flags();
        self.shared.serve(Op::Open, inode.0, None, move |shared, outcome| {
            let opened = match outcome {
                Outcome::Fail { errno, .. } => Err(errno),
                Outcome::Serve | Outcome::Short(_) | Outcome::Drop => shared.lock().store.open(inode.0),
            };
            match opened {
                Ok(()) => reply.opened(FileHandle(inode.0), flags),
                Err(errno) => reply.error(fuse(errno)),
            }
        });
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        at: u64,
        len: u32,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let len = len as usize;
        self.shared.lock().counters.reads += 1;
        if self.is_misaligned(flags, at, len) {
            return reply.error(fuse(Errno::INVAL));
        }
        let span = at..at.saturating_add(len as u64);
        self.shared.serve(Op::Read, inode.0, Some(span), move |shared, outcome| {
            let mut state = shared.lock();
            let bytes = match outcome {
                Outcome::Serve | Outcome::Drop => state.store.read(inode.0, at, len),
                Outcome::Short(at_most) => state.store.read(inode.0, at, len.min(at_most)),
                Outcome::Fail { errno, .. } => Err(errno),
            };
            state.counters.read_bytes += bytes.as_ref().map_or(0, |bytes| bytes.len() as u64);
            drop(state);
            match bytes {
                Ok(bytes) => reply.data(&bytes),
                Err(errno) => reply.error(fuse(errno)),
            }
        });
    }

    fn write(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        at: u64,
        bytes: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.shared.lock().counters.writes += 1;
        let from_cache = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        if !from_cache && self.is_misaligned(flags, at, bytes.len()) {
            return reply.error(fuse(Errno::INVAL));
        }
        let span = at..at.saturating_add(bytes.len() as u64);
        let mut bytes = bytes.to_vec();
        self.shared.serve(Op::Write, inode.0, Some(span), move |shared, outcome| {
            let mut state = shared.lock();
            let written = match outcome {
                Outcome::Serve => state.store.write(inode.0, at, bytes),
                Outcome::Short(at_most) => {
                    bytes.truncate(at_most);
                    state.store.write(inode.0, at, bytes)
                }
                Outcome::Fail { errno, .. } => Err(errno),
                Outcome::Drop => Ok(bytes.len()),
            };
            state.counters.written_bytes += written.map_or(0, |len| len as u64);
            drop(state);
            match written {
                Ok(len) => reply.written(len as u32),
                Err(errno) => reply.error(fuse(errno)),
            }
        });
    }

    fn fsync(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        let mut state = self.shared.lock();
        let counter = if data_only { &mut state.counters.fdatasyncs } else { &mut state.counters.fsyncs };
        *counter += 1;
        drop(state);
        self.shared.serve(Op::Fsync, inode.0, None, move |shared, outcome| {
            let mut state = shared.lock();
            let synced = match outcome {
                Outcome::Serve | Outcome::Short(_) => state.store.sync(inode.0),
                Outcome::Fail { errno, lose: false } => Err(errno),
                Outcome::Fail { errno, lose: true } => state.store.lose_unsynced(inode.0).and(Err(errno)),
                Outcome::Drop => Ok(()),
            };
            drop(state);
            answer_empty(synced, reply);
        });
    }

    fn fallocate(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        at: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.shared.lock().counters.fallocates += 1;
        let Some(end) = at.checked_add(len) else { return reply.error(fuse(Errno::FBIG)) };
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        self.shared.serve(Op::Fallocate, inode.0, Some(at..end), move |shared, outcome| {
            let allocated = match outcome {
                Outcome::Serve | Outcome::Short(_) => shared.lock().store.allocate(inode.0, at..end, mode),
                Outcome::Fail { errno, .. } => Err(errno),
                Outcome::Drop => Ok(()),
            };
            answer_empty(allocated, reply);
        });
    }

    /// The kernel asks only for SEEK_DATA and SEEK_HOLE.
    fn lseek(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        at: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        const SEEK_DATA: i32 = 3; // lseek(2), linux/fs.h
        const SEEK_HOLE: i32 = 4;
        let to = match (u64::try_from(at), whence) {
            (Ok(at), SEEK_DATA) => SeekFrom::Data(at),
            (Ok(at), SEEK_HOLE) => SeekFrom::Hole(at),
            _ => return reply.error(fuse(Errno::INVAL)),
        };
        self.shared.serve(Op::Seek, inode.0, None, move |shared, outcome| {
            let found = match outcome {
                Outcome::Serve | Outcome::Short(_) | Outcome::Drop => shared.lock().store.seek(inode.0, to),
                Outcome::Fail { errno, .. } => Err(errno),
            };
            match found {
                Ok(at) => reply.offset(at.cast_signed()),
                Err(errno) => reply.error(fuse(errno)),
            }
        });
    }

    fn flush(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn release(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        answer_empty(self.shared.lock().store.close(inode.0), reply);
    }

    fn unlink(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer_empty(utf8(name).and_then(|name| self.shared.lock().store.unlink(name)), reply);
    }

    fn rename(
        &self,
        _request: &Request,
        _parent: INodeNo,
        from: &OsStr,
        _new_parent: INodeNo,
        to: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if flags.intersects(RenameFlags::RENAME_NOREPLACE.complement()) {
            return reply.error(fuse(Errno::INVAL));
        }
        let replace = !flags.contains(RenameFlags::RENAME_NOREPLACE);
        let renamed = utf8(from).and_then(|from| self.shared.lock().store.rename(from, utf8(to)?, replace));
        answer_empty(renamed, reply);
    }

    fn readdir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        from: u64,
        mut reply: ReplyDirectory,
    ) {
        let state = self.shared.lock();
        let dots = [".", ".."].map(|name| (INodeNo::ROOT, FileType::Directory, name));
        let files = state.store.names().iter();
        let files = files.map(|(name, inode)| (INodeNo(*inode), FileType::RegularFile, name.as_str()));
        for (at, (inode, kind, name)) in dots.into_iter().chain(files).enumerate().skip(from as usize) {
            if reply.add(inode, at as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        self.shared.lock().counters.syncdirs += 1;
        self.shared.serve(Op::Syncdir, inode.0, None, move |shared, outcome| {
            let synced = match outcome {
                Outcome::Fail { errno, .. } => Err(errno),
                Outcome::Drop => Ok(()),
                Outcome::Serve | Outcome::Short(_) => {
                    shared.lock().store.sync_names();
                    Ok(())
                }
            };
            answer_empty(synced, reply);
        });
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let state = self.shared.lock();
        let capacity = state.store.capacity().unwrap_or(BOUNDLESS);
        let free = capacity.saturating_sub(state.store.used_bytes()) / BLOCK;
        let total = capacity / BLOCK;
        reply.statfs(total, free, free, 1 << 20, 1 << 20, BLOCK as u32, 255, BLOCK as u32);
    }
}

fn attr(state: &State, inode: Inode) -> Result<FileAttr, Errno> {
    let directory = FileAttr {
        ino: INodeNo(inode),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::Directory,
        perm: 0o755,
        nlink: 2,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK as u32,
        flags: 0,
    };
    if inode == INodeNo::ROOT.0 {
        return Ok(directory);
    }
    let file = state.store.file(inode)?;
    Ok(FileAttr {
        size: file.size(),
        blocks: file.allocated_bytes() / 512, // stat(2): always in units of 512
        atime: file.modified,
        mtime: file.modified,
        ctime: file.modified,
        kind: FileType::RegularFile,
        perm: (file.mode & 0o7777) as u16,
        nlink: u32::from(state.store.name_of(inode).is_some()),
        ..directory
    })
}

fn utf8(name: &OsStr) -> Result<&str, Errno> {
    name.to_str().ok_or(Errno::INVAL)
}

fn fuse(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.raw_os_error())
}

fn answer_attr(attr: Result<FileAttr, Errno>, reply: ReplyAttr) {
    match attr {
        Ok(attr) => reply.attr(&TTL, &attr),
        Err(errno) => reply.error(fuse(errno)),
    }
}

fn answer_empty(done: Result<(), Errno>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(fuse(errno)),
    }
}
