//! The metadata of an image: what says where the disk's bytes are, cached, changed in memory, and written in an order that a
//! power cut at any time leaves whole.
//!
//! A format sees *words*: 8 bytes of the file as a big-endian number. It changes them in memory alone ([`Metadata::set`]),
//! and keeps one promise: at any time the words in memory are whole, that is, all that they point to is there, is counted
//! and is filled. They are written in *rounds*. A round copies all that has changed at one moment, and then writes the
//! copies in *stages*, each durable before the next one begins; first of all it makes the data durable that was written
//! until then. So whatever part of a round a power cut leaves, what is pointed to is there before the pointer is.
//!
//! Giving space back goes the other way: whoever has unpublished a place retires it ([`Metadata::retire`]), and gets it back
//! ([`Reclaim`]) when a whole round has made that durable and when nobody who saw the old pointer still uses it ([`pins`]).
//! Only then may it be counted as free.
//!
//! Answers do not wait for rounds. What a request has changed is noted in the [`Ledger`] before its answer, where a successor
//! of this process finds it; the guest's flush waits for a round.

mod blocks;
mod ledger;
mod ledger_file;
mod patched;
mod pins;
mod round;
mod takeover;
mod units;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};

use block::{Buf, Error, Result, Span};
use runtime::{Handle, join_all};
use storage::{Io, Storage};

use blocks::Blocks;
pub use ledger::{Change, Ledger};
pub use ledger_file::LedgerFile;
use pins::Pins;
pub use units::{Lock as UnitLock, Units};

/// Memory for metadata, in bytes, if nobody says: enough for the tables of 256 GiB in clusters of 64 KiB.
pub(crate) const CACHE: usize = 32 << 20;
/// Blocks next to each other are read and written together, up to this many bytes.
const TOGETHER: usize = 64 << 10;
/// Changes in the ledger that are let stand before there is a round.
const NOTES_MAX: usize = 1 << 16;
/// Changes that nobody's answer waits for, and that are noted together.
const GROUP: usize = 1 << 10;

/// When a round writes a block. Stage 0 is for what counts places, the last one for what points to data.
pub type Stage = u8;

/// Of what kind the metadata of an image is.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Bytes of a block, a power of two from 8 on: no block has both metadata and data of the disk.
    pub block: u32,
    /// Bytes of memory for blocks; 0 for what suits most. What is changed or in use stays all the same.
    pub budget: usize,
    /// How many stages a round has.
    pub stages: Stage,
    /// Whether what was answered must be there after the death of this process.
    pub lasting: bool,
}

/// Who gets back what was retired.
pub trait Reclaim {
    /// Nothing points to this place any more, on disk or in memory, and nobody uses it: it may be given back to the file
    /// system and counted as free. Failing to wastes it until a check finds it.
    fn reclaim(&self, place: Span) -> Io<'_>;
}

/// The metadata of one image; a clone is the same.
#[derive(Clone)]
pub struct Metadata(Rc<Inner>);

struct Inner {
    handle: Handle,
    file: Rc<dyn Storage>,
    /// Files with data that this metadata points to, if that is not in `file`.
    also: Vec<Rc<dyn Storage>>,
    settings: Settings,
    blocks: RefCell<Blocks>,
    /// The numbers of blocks that are being read, and who waits for them.
    reading: RefCell<BTreeMap<u64, Vec<Waker>>>,
    ledger: Option<Box<dyn Ledger>>,
    /// Changes that are not noted yet.
    unnoted: RefCell<Vec<Change>>,
    /// How many were noted since the last round began.
    notes: Cell<usize>,
    /// The ledger failed: changes are safe only in the image.
    ledger_failed: Cell<bool>,
    /// That was said, and it has not worked since.
    ledger_said: Cell<bool>,
    /// Places that were unpublished since the last round began.
    retired: RefCell<Vec<Span>>,
    reclaim: RefCell<Option<Weak<dyn Reclaim>>>,
    pins: Pins,
    rounds: round::Rounds,
    /// Taken by who makes the file longer, one after the other.
    length: storage::Permits,
}

/// Blocks that stay in memory until it is dropped.
#[must_use = "dropping it lets the blocks go"]
pub struct Loaded {
    inner: Rc<Inner>,
    numbers: Range<u64>,
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let mut blocks = self.inner.blocks.borrow_mut();
        self.numbers.clone().for_each(|number| blocks.let_go(number));
    }
}

/// Blocks that somebody reads, told when that is over.
struct Reading<'a> {
    inner: &'a Inner,
    numbers: Vec<u64>,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        let mut reading = self.inner.reading.borrow_mut();
        let wakers: Vec<Waker> =
            self.numbers.iter().filter_map(|number| reading.remove(number)).flatten().collect();
        drop(reading);
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Metadata {
    /// The metadata in `file`, which points to data there and in the files of `also`.
    pub fn new(
        handle: &Handle,
        file: Rc<dyn Storage>,
        also: Vec<Rc<dyn Storage>>,
        settings: Settings,
        ledger: Option<Box<dyn Ledger>>,
    ) -> Metadata {
        assert!(settings.block.is_power_of_two() && settings.block >= 8, "blocks of whole words");
        let budget = if settings.budget == 0 { CACHE } else { settings.budget };
        let inner = Inner {
            handle: handle.clone(),
            file,
            also,
            blocks: RefCell::new(Blocks::new(settings.block as usize, budget)),
            settings: Settings { budget, ..settings },
            reading: RefCell::default(),
            ledger,
            unnoted: RefCell::default(),
            notes: Cell::new(0),
            ledger_failed: Cell::new(false),
            ledger_said: Cell::new(false),
            retired: RefCell::default(),
            reclaim: RefCell::default(),
            pins: Pins::default(),
            rounds: round::Rounds::default(),
            length: storage::Permits::new(1),
        };
        Metadata(Rc::new(inner))
    }

    /// The thread that it lives on.
    pub fn handle(&self) -> &Handle {
        &self.0.handle
    }

    /// The file that it is in.
    pub fn file(&self) -> &Rc<dyn Storage> {
        &self.0.file
    }

    /// The word at this byte of the file, a multiple of 8, if it is in memory.
    pub fn word(&self, at: u64) -> Option<u64> {
        self.0.blocks.borrow().word(at)
    }

    /// Brings the blocks of these bytes into memory, where they stay while the guard lives. What lies beyond the end of the
    /// file is zero.
    ///
    /// # Errors
    /// Those of reading.
    pub async fn load(&self, span: Span, stage: Stage) -> Result<Loaded> {
        let inner = &self.0;
        let len = inner.block();
        let numbers = span_numbers(span, len);
        let mut loaded = Loaded { inner: inner.clone(), numbers: numbers.start..numbers.start };
        while loaded.numbers.end < numbers.end {
            let number = loaded.numbers.end;
            if inner.blocks.borrow().contains(number) {
                inner.blocks.borrow_mut().hold(number, stage);
                loaded.numbers.end += 1;
            } else if inner.reading.borrow().contains_key(&number) {
                inner.has_been_read(number).await;
            } else {
                let run = inner.absent(number..numbers.end);
                inner.read(run, stage).await?;
            }
        }
        Ok(loaded)
    }

    /// Changes words, all of which are in loaded blocks. They count together: a round writes all of them or none, and a
    /// successor finds all or none.
    ///
    /// # Panics
    /// If a block is not loaded.
    pub fn set(&self, words: &[(u64, u64)]) {
        let inner = &self.0;
        let mut blocks = inner.blocks.borrow_mut();
        let mut unnoted = inner.unnoted.borrow_mut();
        for &(at, new) in words {
            let (old, stage) = blocks.set(at, new);
            if old != new && inner.ledger.is_some() && !inner.ledger_failed.get() {
                unnoted.push(Change { at, old, new, stage });
            }
        }
        drop((blocks, unnoted));
        round::soon(inner);
    }

    /// Returns when a successor of this process would find all that was changed so far: to be called before an answer
    /// leaves. Where nothing has to outlive the process that is at once.
    ///
    /// # Errors
    /// Without a ledger, or with one that fails, it takes a round: that one's.
    pub async fn saved(&self) -> Result<()> {
        if self.is_saved() { Ok(()) } else { self.flush().await }
    }

    /// As [`Metadata::saved`], where there is nothing to wait for: whether that is so.
    pub fn is_saved(&self) -> bool {
        // What is not changed any more is in the image already: whoever only meets what another has changed waits for that.
        !self.0.settings.lasting || self.0.note() || !self.0.is_dirty()
    }

    /// Waits while too much is changed and not written; to be called before an operation that changes something takes any
    /// lock.
    ///
    /// # Errors
    /// Those of the round that was to make room.
    pub async fn admit(&self) -> Result<()> {
        while self.0.is_full() {
            round::flush(&self.0).await?;
            // A ledger that cannot be emptied takes what there is room for: nobody waits for that.
            if !self.0.is_full_of_changes() {
                break;
            }
        }
        Ok(())
    }

    /// To be called now and then by who changes very many words for nobody's request: what is changed is noted, and waits
    /// for a round where there is too much of it.
    ///
    /// # Errors
    /// As [`Metadata::admit`].
    pub async fn relieve(&self) -> Result<()> {
        if self.0.unnoted.borrow().len() >= GROUP {
            self.0.note();
        }
        self.admit().await
    }

    /// Whether something that was retired has not come back although a round has ended: its ledger cannot be emptied.
    pub fn has_retired(&self) -> bool {
        !self.0.retired.borrow().is_empty()
    }

    /// Makes all that was set before durable, and all data that was written before.
    ///
    /// # Errors
    /// Those of the round: what was changed stays changed in memory, and the next flush tries again, unless a sync failed.
    pub async fn flush(&self) -> Result<()> {
        round::flush(&self.0).await
    }

    /// Whether something is changed and not yet durable.
    pub fn is_dirty(&self) -> bool {
        self.0.is_dirty()
    }

    /// Bytes of memory that blocks take.
    pub fn memory(&self) -> usize {
        self.0.blocks.borrow().memory()
    }

    /// Says that nothing in memory points to this place any more, by what was set before: it comes back by [`Reclaim`].
    pub fn retire(&self, place: Span) {
        self.0.retired.borrow_mut().push(place);
        round::soon(&self.0);
    }

    /// Who gets back what is retired from now on.
    pub fn on_reclaim(&self, reclaim: Weak<dyn Reclaim>) {
        *self.0.reclaim.borrow_mut() = Some(reclaim);
    }

    /// Keeps each place that is pointed to now from being reclaimed, until it is dropped.
    pub fn pin(&self) -> Rc<dyn Any> {
        self.0.pins.pin()
    }

    /// Drops the blocks of bytes that are no metadata any more, whatever was changed in them.
    pub fn forget(&self, span: Span) {
        self.0.forget(span);
    }

    /// Writes bytes as they are, past memory and ledger: a table that nothing points to yet, a header. The blocks there
    /// are dropped from memory. The file grows if they lie beyond its end.
    ///
    /// # Errors
    /// Those of growing and writing.
    pub async fn write_through(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let span = Span::new(at, bytes.len() as u64).expect("within a file");
        self.0.forget(span);
        self.extend(span.end()).await?;
        let buf = self.0.handle.pool().take(bytes.len());
        buf.put(0, bytes);
        self.0.file.write(at, buf).await
    }

    /// Reads bytes as they are in the file, past memory; zero beyond its end.
    ///
    /// # Errors
    /// Those of reading.
    pub async fn read_through(&self, span: Span) -> Result<Vec<u8>> {
        let mut bytes = vec![0; span.len() as usize];
        let there = span.split_at(self.0.file.size()).0;
        if !there.is_empty() {
            let buf = self.0.handle.pool().take(there.len() as usize);
            self.0.file.read(there.at(), buf.clone()).await?;
            buf.get(0, &mut bytes[..there.len() as usize]);
        }
        Ok(bytes)
    }

    /// Makes the file at least so many bytes long; gives how long it was.
    ///
    /// # Errors
    /// Those of [`Storage::resize`]; ENOSPC where a block device ends before that.
    pub async fn extend(&self, to: u64) -> Result<u64> {
        self.0.extend(to).await
    }

    /// Asks for space behind bytes of the file that are about to be written for the first time. A tool writes them one after
    /// the other and all of them, which goes as well without.
    pub async fn reserve(&self, span: Span) {
        if self.0.settings.lasting
            && let Err(error) = self.0.file.reserve(span).await
        {
            // Who writes there finds out whether there is room.
            tracing::debug!(%error, ?span, "no space was reserved");
        }
    }

    /// Why nothing is durable any more, if that is so: the first of the files whose sync has failed.
    pub fn poison(&self) -> Option<Error> {
        self.0.also.iter().chain([&self.0.file]).find_map(|file| file.poison())
    }

    /// A plain sync of all files.
    ///
    /// # Errors
    /// Those of the storages; such an error is for good.
    pub async fn sync(&self) -> Result<()> {
        self.0.sync().await
    }
}

impl Inner {
    /// Bytes of a block.
    fn block(&self) -> u64 {
        u64::from(self.settings.block)
    }

    fn is_dirty(&self) -> bool {
        self.blocks.borrow().dirty() > 0
            || !self.retired.borrow().is_empty()
            || self.notes.get() > 0
            || self.rounds.is_running()
    }

    fn is_full(&self) -> bool {
        self.is_full_of_changes() || self.notes.get() > NOTES_MAX
    }

    fn is_full_of_changes(&self) -> bool {
        self.blocks.borrow().dirty() > self.settings.budget / 2
    }

    /// The first blocks of these, none of which is here or being read; the first one is known not to be.
    fn absent(&self, numbers: Range<u64>) -> Range<u64> {
        let (blocks, reading) = (self.blocks.borrow(), self.reading.borrow());
        let most = (TOGETHER as u64 / self.block()).max(1);
        let run = numbers.start..numbers.end.min(numbers.start + most);
        let is_there = |number: &u64| blocks.contains(*number) || reading.contains_key(number);
        let end = run.clone().find(is_there).unwrap_or(run.end);
        run.start..end
    }

    async fn read(&self, run: Range<u64>, stage: Stage) -> Result<()> {
        let numbers: Vec<u64> = run.clone().collect();
        self.reading.borrow_mut().extend(numbers.iter().map(|number| (*number, Vec::new())));
        let _reading = Reading { inner: self, numbers };
        let len = self.block();
        let span = Span::new(run.start * len, (run.end - run.start) * len).expect("within a file");
        let there = span.split_at(self.file.size()).0;
        let mut bytes = vec![0; span.len() as usize];
        if !there.is_empty() {
            let buf = self.handle.pool().take(there.len() as usize);
            let result = self.file.read(there.at(), buf.clone()).await;
            result.map_err(|error| error.during("read metadata"))?;
            buf.get(0, &mut bytes[..there.len() as usize]);
        }
        let mut blocks = self.blocks.borrow_mut();
        for (number, bytes) in run.zip(bytes.chunks_exact(len as usize)) {
            blocks.insert(number, bytes, stage);
            // Not to go before whoever asked for it has it.
            blocks.hold(number, stage);
        }
        drop(blocks);
        let mut blocks = self.blocks.borrow_mut();
        span_numbers(span, len).for_each(|number| blocks.let_go(number));
        Ok(())
    }

    /// Waits until nobody reads this block any more.
    async fn has_been_read(&self, number: u64) {
        poll_fn(|cx| match self.reading.borrow_mut().get_mut(&number) {
            None => Poll::Ready(()),
            Some(wakers) => {
                wakers.push(cx.waker().clone());
                Poll::Pending
            }
        })
        .await;
    }

    /// Notes what is not noted yet; whether a successor would find all that was changed.
    fn note(&self) -> bool {
        let Some(ledger) = self.ledger.as_ref().filter(|_| !self.ledger_failed.get()) else { return false };
        let mut unnoted = self.unnoted.borrow_mut();
        if unnoted.is_empty() {
            return true;
        }
        match ledger.note(&unnoted) {
            Ok(()) => {
                self.notes.set(self.notes.get() + unnoted.len());
                unnoted.clear();
                self.ledger_said.set(false);
                true
            }
            Err(error) => {
                // It is tried again after each round.
                if !self.ledger_said.replace(true) {
                    tracing::error!(
                        %error,
                        "changes of an image's map cannot be noted for a successor: until they can, each is written to the \
                         image before its answer, which is slow"
                    );
                }
                self.ledger_failed.set(true);
                unnoted.clear();
                false
            }
        }
    }

    fn forget(&self, span: Span) {
        let mut blocks = self.blocks.borrow_mut();
        let numbers = span_numbers(span, self.block());
        if numbers.end - numbers.start > blocks.count() as u64 {
            for number in blocks.numbers() {
                if numbers.contains(&number) {
                    blocks.forget(number);
                }
            }
        } else {
            numbers.for_each(|number| blocks.forget(number));
        }
    }

    async fn extend(&self, to: u64) -> Result<u64> {
        let size = self.file.size();
        if size >= to {
            return Ok(size);
        }
        // One after the other, so that a smaller size never comes after a larger one.
        let _permit = self.length.take().await;
        let size = self.file.size();
        if size < to {
            self.file.resize(to).await?;
        }
        Ok(size)
    }

    /// All files side by side. Of each the storage itself knows whether there is anything to do.
    async fn sync(&self) -> Result<()> {
        let files = self.also.iter().chain([&self.file]);
        crate::worst(join_all(files.map(|file| file.flush()).collect()).await)
    }

    /// Writes bytes that follow each other from the first one's place on.
    async fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.extend(at + bytes.len() as u64).await?;
        let buf: Buf = self.handle.pool().take(bytes.len());
        buf.put(0, bytes);
        self.file.write(at, buf).await
    }
}

fn span_numbers(span: Span, block: u64) -> Range<u64> {
    span.at() / block..span.end().div_ceil(block)
}

#[cfg(test)]
mod tests;
