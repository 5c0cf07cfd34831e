//! What of a file is durable, and what becomes of it when making it durable fails: poison.
//!
//! Linux tells of lost data once and then marks the pages clean, so that the next sync succeeds without the data.
//! Therefore a failed sync is final: it is never tried again, and every later flush and write fails with its error. That
//! is recorded outside of the process (`record`) before anybody hears of it, so that a successor knows.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use block::{Errno, Error, Result};
use runtime::{Fd, Handle};

use super::Record;

/// A sync that could not even start (EAGAIN) is tried again after this long, doubled each time.
const BACKOFF_MIN: Duration = Duration::from_millis(1);
/// As often as that: up to a second apart, half a minute in all.
const BACKOFF_STEPS: u32 = 35;

/// The durable state of one file.
pub(super) struct Sync {
    /// Changes that have ended, well or badly, since the start. One more than there were, so that the first flush
    /// syncs: what others left unsynced is part of the disk too.
    changes: Cell<u64>,
    /// How many of them the last good sync covers.
    synced: Cell<u64>,
    running: Cell<bool>,
    waiting: RefCell<Vec<Waker>>,
    poison: RefCell<Option<Error>>,
    record: Option<Record>,
}

impl Default for Sync {
    fn default() -> Sync {
        Sync {
            changes: Cell::new(1),
            synced: Cell::new(0),
            running: Cell::new(false),
            waiting: RefCell::default(),
            poison: RefCell::default(),
            record: None,
        }
    }
}

/// A change under way. It counts when it ends, before its answer: only then does a later sync surely cover it.
pub(super) struct Change<'a>(&'a Sync);

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.0.changes.set(self.0.changes.get() + 1);
    }
}

impl Sync {
    /// Of a file whose poison is recorded there, and is this already.
    pub(super) fn new(record: Option<Record>, poison: Option<Error>) -> Sync {
        Sync { record, poison: RefCell::new(poison), ..Sync::default() }
    }

    /// Notes that bytes are being changed; hold it until that is done.
    pub(super) fn changing(&self) -> Change<'_> {
        Change(self)
    }

    /// The error of the sync that failed.
    pub(super) fn poison(&self) -> Option<Error> {
        self.poison.borrow().clone()
    }

    /// Makes all changes that have ended durable, and asks then whether the file `is_whole`, for what was cut off is lost
    /// and a sync does not say so. Flushes that come while a sync runs share the next one.
    pub(super) async fn flush(
        &self,
        handle: &Handle,
        fd: &Rc<Fd>,
        name: &str,
        is_whole: impl AsyncFn() -> Result<()>,
    ) -> Result<()> {
        let wanted = self.changes.get();
        loop {
            if let Some(error) = self.poison() {
                return Err(error);
            }
            if self.synced.get() >= wanted {
                return Ok(());
            }
            if self.running.get() {
                self.ended().await;
                continue;
            }
            let run = Run::start(self);
            let covered = self.changes.get();
            let result = match sync(handle, fd).await {
                Ok(()) => is_whole().await,
                Err(error) => Err(error),
            };
            let result = result.map_err(|error| error.during(format_args!("sync {name}")));
            if let (Err(error), Some(record)) = (&result, &self.record) {
                record.keep(error).await;
            }
            run.end(covered, result);
        }
    }

    /// Waits until the sync that is running ends.
    async fn ended(&self) {
        poll_fn(|cx| {
            if !self.running.get() {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// A sync that is running. If it is dropped before its end, its result is lost, and that is as bad as an error.
struct Run<'a> {
    sync: &'a Sync,
    result: Option<Result<u64>>,
}

impl<'a> Run<'a> {
    fn start(sync: &'a Sync) -> Run<'a> {
        sync.running.set(true);
        Run { sync, result: None }
    }

    fn end(mut self, covered: u64, result: Result<()>) {
        self.result = Some(result.map(|()| covered));
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        let result = self.result.take().unwrap_or_else(|| {
            let error = Error::new(Errno::EIO, "a sync was given up before its end");
            if let Some(record) = &self.sync.record {
                record.keep_at_once(&error);
            }
            Err(error)
        });
        match result {
            Ok(covered) => self.sync.synced.set(covered),
            Err(error) => *self.sync.poison.borrow_mut() = Some(error.lasting()),
        }
        self.sync.running.set(false);
        self.sync.waiting.take().into_iter().for_each(Waker::wake);
    }
}

async fn sync(handle: &Handle, fd: &Rc<Fd>) -> Result<()> {
    let mut backoff = BACKOFF_MIN;
    let mut steps = 0;
    loop {
        match handle.sync(fd).await {
            Ok(_) => return Ok(()),
            // Interrupted before anything was done (FAILURES C.4); the data is still dirty.
            Err(Errno::EINTR) => {}
            // Not even begun.
            Err(Errno::EAGAIN) if steps < BACKOFF_STEPS => {
                handle.sleep(backoff).await;
                backoff = (backoff * 2).min(Duration::from_secs(1));
                steps += 1;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}
