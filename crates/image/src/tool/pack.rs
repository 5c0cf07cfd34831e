//! Copying a disk into a compressed qcow2 image: other threads compress, this one writes what they made in its order.

use std::collections::VecDeque;
use std::num::NonZero;
use std::rc::Rc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use block::{Buf, Errno, Error, Run, Span};
use runtime::{Handle, Mailbox, Sender};
use storage::Storage;

use super::pump::Pump;
use super::{PIECE, ToolError, Watch, next_piece};
use crate::ImageError;
use crate::qcow2::{Compression, Compressor, Packed, Packer};

/// Pieces that wait for each thread.
const PIECES_EACH: usize = 3;

/// Clusters of one piece: its bytes, and what became of each cluster of them.
struct Piece {
    span: Span,
    bytes: Vec<u8>,
    packed: Vec<Packed>,
}

type Outcome = Result<Piece, ToolError>;

/// Tells how a piece ended, also if that is a panic.
struct Reply(Option<Sender<Outcome>>);

impl Reply {
    fn send(mut self, outcome: Outcome) {
        if let Some(sender) = self.0.take() {
            sender.send(outcome);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(sender) = self.0.take() {
            sender.send(Err(ToolError::Panicked));
        }
    }
}

struct Job {
    piece: Piece,
    cluster: usize,
    reply: Reply,
}

/// Threads that compress. They end when this is dropped.
struct Threads {
    jobs: SyncSender<Job>,
    count: usize,
}

impl Threads {
    fn start(how: Compression) -> std::io::Result<Threads> {
        let count = std::thread::available_parallelism().map_or(1, NonZero::get);
        let (jobs, receiver) = sync_channel(count * PIECES_EACH);
        let receiver: Arc<Mutex<Receiver<Job>>> = Arc::new(Mutex::new(receiver));
        for number in 0..count {
            let receiver = receiver.clone();
            let mut compressor = Compressor::new(how)?;
            std::thread::Builder::new().name(format!("compress-{number}")).spawn(move || {
                loop {
                    let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    match next {
                        Ok(job) => job.run(&mut compressor),
                        Err(_ended) => return,
                    }
                }
            })?;
        }
        Ok(Threads { jobs, count })
    }
}

impl Job {
    fn run(self, compressor: &mut Compressor) {
        let Job { mut piece, cluster, reply } = self;
        let packed = piece.bytes.chunks(cluster).map(|bytes| compressor.pack(bytes));
        match packed.collect::<std::io::Result<Vec<Packed>>>() {
            Ok(packed) => {
                piece.packed = packed;
                reply.send(Ok(piece));
            }
            Err(error) => {
                let errno = Errno::from_std(&error);
                reply.send(Err(ToolError::Target(Error::new(errno, format!("compress: {error}")))));
            }
        }
    }
}

/// Copies all of `source` into the qcow2 image in `file`, which was just made, has the disk's size and nothing below it,
/// and makes it durable.
///
/// # Errors
/// The file holds no whole image.
pub async fn pack(
    handle: &Handle,
    source: &Rc<dyn Storage>,
    file: &Rc<dyn Storage>,
    watch: &Rc<dyn Watch>,
) -> Result<(), ToolError> {
    let packer = Packer::new(file).await.map_err(refused)?;
    let threads = Threads::start(packer.compression()).map_err(|error| {
        let errno = Errno::from_std(&error);
        ToolError::Target(Error::new(errno, "start threads that compress"))
    })?;
    let mut packing = Packing {
        handle,
        source: source.clone(),
        file: file.clone(),
        packer,
        waiting: VecDeque::new(),
        threads,
    };
    let pump = Pump::new(handle, watch);
    let done = packing.run(&pump).await;
    pump.end(done).await?;
    packing.packer.finish(file).await.map_err(refused)
}

/// Takes the first `len` bytes away, or all that there are.
fn forget(runs: &mut VecDeque<Run>, mut len: u64) {
    while let Some(run) = runs.front_mut() {
        if run.len > len {
            run.len -= len;
            return;
        }
        len -= run.len;
        runs.pop_front();
    }
}

/// What of an image cannot be, on the way of storage's errors.
fn refused(error: ImageError) -> ToolError {
    match error {
        ImageError::Io(error) => ToolError::Target(error),
        other @ (ImageError::Invalid(_) | ImageError::Unsupported(_) | ImageError::Refused(_)) => {
            ToolError::Target(Error::new(other.errno(), other.to_string()))
        }
    }
}

struct Packing<'a> {
    handle: &'a Handle,
    source: Rc<dyn Storage>,
    file: Rc<dyn Storage>,
    packer: Packer,
    /// Pieces that are read or compressed, in their order.
    waiting: VecDeque<Mailbox<Outcome>>,
    threads: Threads,
}

/// By how many bytes the file is made larger at a time.
const STEP: u64 = 64 << 20;

impl Packing<'_> {
    async fn run(&mut self, pump: &Pump) -> Result<(), ToolError> {
        let unit = PIECE.max(self.packer.cluster_size());
        let mut rest = Span::new(0, self.source.size()).expect("a disk is smaller than 8 EiB");
        // What is known of the first bytes of `rest`.
        let mut known: VecDeque<Run> = VecDeque::new();
        while !rest.is_empty() {
            let Some(first) = known.front() else {
                known = self.source.extents(rest).await.map_err(ToolError::Source)?.into();
                continue;
            };
            // Whole pieces of zeroes are passed by; where there is anything else in one, all of it is read.
            let end = rest.at() + if first.zero { first.len } else { 0 };
            let zeroes = rest.split_at(if end == rest.end() { end } else { end / unit * unit }).0;
            let passed = if zeroes.is_empty() { next_piece(rest, unit).0 } else { zeroes };
            rest = rest.split_at(passed.end()).1;
            forget(&mut known, passed.len());
            if !zeroes.is_empty() {
                pump.skip(zeroes.len())?;
                continue;
            }
            if self.waiting.len() >= self.threads.count * PIECES_EACH {
                self.take_first(pump).await?;
            }
            self.start(passed);
        }
        while !self.waiting.is_empty() {
            self.take_first(pump).await?;
        }
        Ok(())
    }

    /// Reads a piece and gives it to a thread.
    fn start(&mut self, span: Span) {
        let mailbox = Mailbox::default();
        let reply = Reply(Some(mailbox.sender()));
        self.waiting.push_back(mailbox);
        let (handle, source, jobs) = (self.handle.clone(), self.source.clone(), self.threads.jobs.clone());
        let cluster = self.packer.cluster_size() as usize;
        self.handle.spawn(async move {
            let buf = handle.pool().take(span.len() as usize);
            if let Err(error) = source.read(span.at(), buf.clone()).await {
                return reply.send(Err(ToolError::Source(error)));
            }
            // The last cluster of the disk may be there in part.
            let mut bytes = vec![0; buf.len().next_multiple_of(cluster)];
            buf.get(0, &mut bytes[..buf.len()]);
            let piece = Piece { span, bytes, packed: Vec::new() };
            // There is room: no more pieces are under way than the channel holds.
            if let Err(lost) = jobs.try_send(Job { piece, cluster, reply }) {
                drop(lost); // which says so
            }
        });
    }

    /// Waits for the first piece and writes what it became.
    async fn take_first(&mut self, pump: &Pump) -> Result<(), ToolError> {
        let Some(mut mailbox) = self.waiting.pop_front() else { return Ok(()) };
        let piece = mailbox.receive().await?;
        let cluster = self.packer.cluster_size();
        let first = piece.span.at() / cluster;
        for ((number, packed), bytes) in (first..).zip(piece.packed).zip(piece.bytes.chunks(cluster as usize))
        {
            self.packer.put(number, packed, bytes);
        }
        pump.skip(piece.span.len())?;
        while let Some((at, bytes)) = self.packer.output() {
            self.reserve(at + bytes.len() as u64).await?;
            let file = self.file.clone();
            pump.start(
                0,
                async move { file.write(at, Buf::from_bytes(&bytes)).await.map_err(ToolError::Target) },
            )
            .await?;
        }
        Ok(())
    }

    /// Makes the file large enough, in few steps: of a file, not of a block device, which has the size that it has.
    async fn reserve(&self, end: u64) -> Result<(), ToolError> {
        if end <= self.file.size() {
            return Ok(());
        }
        match self.file.resize(end.saturating_add(STEP)).await {
            Err(error) if error.errno() == Errno::ENOSPC => {
                self.file.resize(end).await.map_err(ToolError::Target)
            }
            result => result.map_err(ToolError::Target),
        }
    }
}
