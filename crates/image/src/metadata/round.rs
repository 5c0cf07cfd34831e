//! Rounds: all that has changed is copied at one moment and written in stages, with syncs between.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use block::{Errno, Error, Result, Span};
use runtime::{BoxFuture, join_all};

use super::blocks::Copy;
use super::{Inner, TOGETHER};

/// A change is written at the latest this long after it was made, though no guest asks for it: if the process dies and
/// nobody takes over, it is not to be missed for long.
const SOON: Duration = Duration::from_secs(5);
/// Writes of one stage that are under way at a time.
const WRITES_MAX: usize = 32;

/// What of an image's metadata is durable.
#[derive(Default)]
pub(super) struct Rounds {
    running: Cell<bool>,
    /// How many have begun and how many have ended.
    begun: Cell<u64>,
    ended: Cell<u64>,
    /// How the last ones ended: number and error, while somebody waits for it.
    failed: RefCell<Vec<(u64, Error)>>,
    waiting: RefCell<Vec<Waker>>,
    /// How many wait for an end.
    waiters: Cell<usize>,
    /// There will be a round without anybody asking.
    is_soon: Cell<bool>,
}

impl Rounds {
    pub(super) fn is_running(&self) -> bool {
        self.running.get()
    }
}

/// Makes sure that there will be a round soon.
pub(super) fn soon(inner: &Rc<Inner>) {
    if inner.rounds.is_soon.replace(true) {
        return;
    }
    let (handle, inner) = (inner.handle.clone(), Rc::downgrade(inner));
    handle.clone().spawn(async move {
        handle.sleep(SOON).await;
        let Some(inner) = inner.upgrade() else { return };
        inner.rounds.is_soon.set(false);
        if inner.is_dirty() {
            // Whoever asks for a flush hears of its error: it is the same one's then, or a later one's.
            match flush(&inner).await {
                // What the ledger could not forget.
                Ok(()) if inner.is_dirty() => soon(&inner),
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!(%error, "changes of an image's map cannot be written: they are kept");
                    if !error.is_lasting() {
                        soon(&inner);
                    }
                }
            }
        }
    });
}

/// Counts who waits for the end of a round.
struct Waiter<'a>(&'a Rounds);

impl<'a> Waiter<'a> {
    fn new(rounds: &'a Rounds) -> Waiter<'a> {
        rounds.waiters.set(rounds.waiters.get() + 1);
        Waiter(rounds)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiters.set(self.0.waiters.get() - 1);
        if self.0.waiters.get() == 0 {
            self.0.failed.borrow_mut().clear();
        }
    }
}

/// See [`Metadata::flush`](super::Metadata::flush).
pub(super) async fn flush(inner: &Rc<Inner>) -> Result<()> {
    let rounds = &inner.rounds;
    // Where all that a process before this one noted is in the image already, the ledger is still to hear of that.
    let changed =
        inner.blocks.borrow().dirty() > 0 || !inner.retired.borrow().is_empty() || inner.notes.get() > 0;
    if changed {
        // One that begins from now on.
        let needed = rounds.begun.get() + 1;
        return until(inner, needed).await;
    }
    if rounds.running.get() {
        // What was changed is in the one that runs.
        until(inner, rounds.begun.get()).await?;
    }
    inner.sync().await
}

/// Waits for the end of a round, and starts it and those before it where nobody does.
async fn until(inner: &Rc<Inner>, needed: u64) -> Result<()> {
    let rounds = &inner.rounds;
    let _waiter = Waiter::new(rounds);
    loop {
        if rounds.ended.get() >= needed {
            let failed = rounds.failed.borrow();
            let error = failed.iter().find(|(number, _)| *number == needed).map(|(_, error)| error.clone());
            return error.map_or(Ok(()), Err);
        }
        if !rounds.running.get() {
            start(inner);
        }
        let ended = rounds.ended.get();
        poll_fn(|cx| {
            if rounds.ended.get() > ended {
                return Poll::Ready(());
            }
            rounds.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// A round is a task of its own: whoever asked for it may go away.
fn start(inner: &Rc<Inner>) {
    inner.rounds.running.set(true);
    inner.rounds.begun.set(inner.rounds.begun.get() + 1);
    let round = inner.clone();
    inner.handle.spawn(async move {
        let mut running =
            Running { inner: round, copies: Vec::new(), retired: Vec::new(), notes: 0, result: None };
        let result = running.run().await;
        running.result = Some(result);
    });
}

/// A round. However it ends, its waiters hear of it, and what is not stored counts as changed.
struct Running {
    inner: Rc<Inner>,
    copies: Vec<Copy>,
    /// What nothing that is durable points to when it has ended.
    retired: Vec<Span>,
    /// How many changes the ledger is to forget.
    notes: usize,
    result: Option<Result<()>>,
}

impl Running {
    async fn run(&mut self) -> Result<()> {
        let inner = self.inner.clone();
        // Where the ledger could not tell what was noted before the first pass, it can before the second.
        for _ in 0..2 {
            let epoch = self.begin();
            self.store().await?;
            self.written(true);
            if inner.ledger.as_ref().is_none_or(|ledger| ledger.end()) {
                // What could not be noted is in the image, if nothing was changed meanwhile, and there may be room in the
                // ledger again.
                if inner.blocks.borrow().dirty() == 0 {
                    inner.ledger_failed.set(false);
                }
                self.notes = 0;
                reclaim(&inner, std::mem::take(&mut self.retired), epoch);
                return Ok(());
            }
        }
        // All is durable, but a successor would bring some of it back to where it was: what is retired stays so, and what is
        // safe in the image alone is not safe.
        if inner.ledger_failed.get() {
            return Err(Error::new(Errno::EIO, "take what is in the image out of its ledger"));
        }
        Ok(())
    }

    /// What has changed until now, and was retired until now, is this round's; gives the epoch that ends here.
    fn begin(&mut self) -> u64 {
        let inner = &self.inner;
        // What is in the copies is in the ledger too, so that a successor knows whose it is.
        inner.note();
        if let Some(ledger) = &inner.ledger {
            ledger.begin();
        }
        self.notes += inner.notes.replace(0);
        self.copies = inner.blocks.borrow_mut().copy_dirty();
        self.retired.append(&mut inner.retired.borrow_mut());
        inner.pins.turn()
    }

    /// The copies are stored, or given up.
    fn written(&mut self, stored: bool) {
        let mut blocks = self.inner.blocks.borrow_mut();
        self.copies.drain(..).for_each(|copy| blocks.written(copy.number, stored));
    }

    /// Writes the copies: first the data must be durable, then stage after stage.
    async fn store(&self) -> Result<()> {
        let inner = &self.inner;
        for stage in self.copies.chunk_by(|one, other| one.stage == other.stage) {
            // Also what is pointed to is to be durable first; storages know whether there is anything to do.
            if stage[0].stage > 0 {
                inner.sync().await?;
            }
            self.write(stage).await?;
        }
        inner.sync().await
    }

    async fn write(&self, copies: &[Copy]) -> Result<()> {
        let inner = &self.inner;
        let most = (TOGETHER as u64 / inner.block()).max(1) as usize;
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        for neighbours in copies.chunk_by(|one, other| one.number + 1 == other.number) {
            for run in neighbours.chunks(most) {
                runs.push((
                    run[0].number * inner.block(),
                    run.iter().flat_map(|copy| &copy.bytes).copied().collect(),
                ));
            }
        }
        for some in runs.chunks(WRITES_MAX) {
            let writes = some
                .iter()
                .map(|(at, bytes)| -> BoxFuture<'_, Result<()>> { Box::pin(inner.write(*at, bytes)) });
            for result in join_all(writes.collect()).await {
                result.map_err(|error| error.during("write metadata"))?;
            }
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.written(false);
        let inner = &self.inner;
        inner.notes.set(inner.notes.get() + self.notes);
        inner.retired.borrow_mut().splice(0..0, self.retired.drain(..));
        let rounds = &inner.rounds;
        let number = rounds.begun.get();
        let lost = || Err(Error::new(Errno::EIO, "writing metadata was given up before its end"));
        if let Err(error) = self.result.take().unwrap_or_else(lost)
            && rounds.waiters.get() > 0
        {
            rounds.failed.borrow_mut().push((number, error));
        }
        rounds.ended.set(number);
        rounds.running.set(false);
        rounds.waiting.take().into_iter().for_each(Waker::wake);
    }
}

/// Gives back what is retired for good, as soon as nobody uses it.
fn reclaim(inner: &Rc<Inner>, retired: Vec<Span>, epoch: u64) {
    if retired.is_empty() {
        return;
    }
    let inner = inner.clone();
    inner.handle.clone().spawn(async move {
        inner.pins.released(epoch).await;
        for place in retired {
            inner.forget(place);
            let reclaim = inner.reclaim.borrow().as_ref().and_then(std::rc::Weak::upgrade);
            let Some(reclaim) = reclaim else { return };
            if let Err(error) = reclaim.reclaim(place).await {
                let (at, len) = (place.at(), place.len());
                tracing::warn!(%error, at, len, "space that nothing uses any more cannot be given back: a check finds it");
            }
        }
    });
}
