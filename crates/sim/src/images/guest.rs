//! Guests of an image: what they ask side by side, and whether the answers are true.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use block::{Buf, Error, Span};
use image::Chain;
use runtime::{BoxFuture, Handle, join_all};
use storage::{Storage, Zeroing};

use super::model::{Change, GRAIN, Model, View, pattern};
use super::world::World;
use crate::dice::Dice;

/// How guests behave.
#[derive(Clone, Debug)]
pub(crate) struct Habits {
    /// Requests at a time.
    pub(crate) depth: u64,
    /// Requests in all.
    pub(crate) steps: u64,
    /// Bytes of the longest request.
    pub(crate) longest: u64,
    /// The unit of the image, in bytes: many requests begin or end at one.
    pub(crate) unit: u64,
    /// How many of a hundred begin in the first few units.
    pub(crate) crowded: u64,
    /// Of a hundred requests so many are writes, and so on; the rest are reads.
    pub(crate) writes: u64,
    pub(crate) zeroes: u64,
    pub(crate) discards: u64,
    pub(crate) flushes: u64,
    /// Asked one after the other, instead of what is drawn.
    pub(crate) script: Option<Rc<[Request]>>,
}

impl Habits {
    pub(crate) fn draw(dice: &mut Dice, unit: u64) -> Habits {
        Habits {
            depth: dice.pick(&[1, 1, 2, 4, 8]),
            steps: dice.pick(&[4, 10, 20, 40]),
            longest: dice.pick(&[512, unit, 2 * unit + 512]).clamp(512, 96 << 10),
            unit,
            crowded: dice.pick(&[0, 50, 100]),
            writes: dice.pick(&[30, 50, 70]),
            zeroes: dice.pick(&[0, 5, 10]),
            discards: dice.pick(&[0, 5, 10]),
            flushes: dice.pick(&[0, 5, 10]),
            script: None,
        }
    }
}

/// A disk in use.
pub(crate) struct Guests {
    pub(crate) handle: Handle,
    pub(crate) world: Rc<World>,
    pub(crate) chain: Chain,
    pub(crate) model: Rc<RefCell<Model>>,
    pub(crate) habits: Habits,
    pub(crate) dice: RefCell<Dice>,
    /// The number of the next write.
    pub(crate) numbers: Rc<Cell<u32>>,
    /// Nothing goes wrong: each request must succeed.
    pub(crate) all_is_well: bool,
}

/// One request.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    Read(Range<u64>),
    Write(Range<u64>),
    Zero(Range<u64>, bool),
    Discard(Range<u64>),
    Flush,
}

/// Why guests have stopped.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// All was asked.
    Done,
    /// So much has happened.
    Cut,
}

impl Guests {
    /// Asks all, or until the world has seen so many events.
    pub(crate) async fn play(&self, events: u64) -> Result<End, String> {
        let steps = Cell::new(self.habits.steps);
        let guest = || -> BoxFuture<'_, Result<(), String>> {
            Box::pin(async {
                while steps.get() > 0 {
                    let step = self.habits.steps - steps.get();
                    steps.set(steps.get() - 1);
                    let request = match &self.habits.script {
                        Some(script) => script[step as usize].clone(),
                        None => self.draw(),
                    };
                    self.ask(request).await?;
                }
                Ok(())
            })
        };
        let mut all = Box::pin(join_all((0..self.habits.depth).map(|_| guest()).collect()));
        poll_fn(|cx| match all.as_mut().poll(cx) {
            Poll::Ready(results) => {
                Poll::Ready(results.into_iter().collect::<Result<Vec<()>, String>>().map(|_| End::Done))
            }
            Poll::Pending if self.world.events() >= events => Poll::Ready(Ok(End::Cut)),
            Poll::Pending => Poll::Pending,
        })
        .await
    }

    fn draw(&self) -> Request {
        let dice = &mut *self.dice.borrow_mut();
        let Habits { longest, unit, crowded, writes, zeroes, discards, flushes, .. } = self.habits.clone();
        let size = self.model.borrow().size();
        let within = if dice.percent(crowded) { size.min(3 * unit) } else { size };
        let grain = dice.pick(&[GRAIN, 512, 512, 4096, unit, unit]);
        let at = dice.below(within) / grain * grain;
        let len = dice.between(1, longest).next_multiple_of(grain.min(longest)).min(size - at);
        let len = (len / GRAIN * GRAIN).max(GRAIN);
        let bytes = at..at + len;
        let draw = dice.below(100);
        if draw < writes {
            Request::Write(bytes)
        } else if draw < writes + zeroes {
            Request::Zero(bytes, dice.percent(70))
        } else if draw < writes + zeroes + discards {
            Request::Discard(bytes)
        } else if draw < writes + zeroes + discards + flushes {
            Request::Flush
        } else {
            Request::Read(bytes)
        }
    }

    async fn ask(&self, request: Request) -> Result<(), String> {
        if let Request::Read(bytes) = request {
            return self.read(bytes).await;
        }
        let result = self.make(&request).await;
        self.judge(&request, result)
    }

    /// Makes a request that is no read, and tells the model.
    async fn make(&self, request: &Request) -> Result<(), Error> {
        let begun = self.world.tick();
        let change = |bytes: &Range<u64>, change| self.model.borrow_mut().begin(begun, bytes.clone(), change);
        let (result, action) = match request {
            Request::Write(bytes) => {
                let number = self.numbers.get();
                self.numbers.set(number + 1);
                let action = change(bytes, Change::Write(number));
                let data = Buf::from_bytes(&pattern(bytes.start, bytes.end - bytes.start, number));
                (self.chain.write(bytes.start, data).await, Some(action))
            }
            Request::Zero(bytes, unmap) => {
                let action = change(bytes, Change::Zero);
                let how = Zeroing { unmap: *unmap, fast: false };
                (self.chain.zero(span(bytes), how).await, Some(action))
            }
            Request::Discard(bytes) => {
                let action = change(bytes, Change::Discard);
                (self.chain.discard(span(bytes)).await, Some(action))
            }
            Request::Flush => (self.chain.flush().await, None),
            Request::Read(_) => (Ok(()), None),
        };
        let ended = self.world.tick();
        match (action, request) {
            (Some(action), _) => self.model.borrow_mut().end(ended, action, result.is_ok()),
            (None, Request::Flush) if result.is_ok() => self.model.borrow_mut().flushed(begun, ended),
            (None, _) => {}
        }
        result
    }

    async fn read(&self, bytes: Range<u64>) -> Result<(), String> {
        let begun = self.world.tick();
        let buf = Buf::zeroed((bytes.end - bytes.start) as usize);
        buf.fill(0xa5);
        let result = self.chain.read(bytes.start, buf.clone()).await;
        if result.is_ok() {
            let view = View { from: begun, until: self.world.tick() };
            let judged = self.model.borrow().judge(bytes.start, &buf.to_vec(), view);
            judged.map_err(|what| format!("a read of {bytes:?} at {begun}: {what}"))?;
        }
        self.judge(&Request::Read(bytes), result)
    }

    /// An error must be one that storage has given.
    fn judge(&self, request: &Request, result: Result<(), Error>) -> Result<(), String> {
        match result {
            Err(error) if self.all_is_well => {
                Err(format!("{request:?} fails, but nothing goes wrong: {error}"))
            }
            Err(error) if !self.world.has_given(error.errno()) => {
                Err(format!("{request:?} fails with an error that nothing gave: {error}"))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// After the faults have ceased: requests succeed, or fail for good.
    pub(crate) async fn recover(&self) -> Result<(), String> {
        while self.world.is_failing() {
            self.handle.sleep(Duration::from_micros(10)).await;
        }
        let size = self.model.borrow().size();
        let units = self.dice.borrow_mut().between(2, 6);
        for _ in 0..units {
            let at = self.dice.borrow_mut().below(size) / self.habits.unit * self.habits.unit;
            let end = size.min(at + self.habits.unit.min(64 << 10));
            let request = match self.dice.borrow_mut().below(6) {
                0 => Request::Zero(at..end, true),
                1 => Request::Discard(at..end),
                2.. => Request::Write(at..end),
            };
            self.ask_after_faults(request).await?;
        }
        self.ask_after_faults(Request::Flush).await?;
        self.read(0..size).await
    }

    async fn ask_after_faults(&self, request: Request) -> Result<(), String> {
        let poison = self.chain.poison();
        let result = self.make(&request).await;
        tell(&format!("{request:?}"), &poison, &self.chain.poison(), &result)
    }
}

/// Judges a request that has met no new fault; a sync that was under way before may still fail.
fn tell(
    what: &str,
    before: &Option<Error>,
    after: &Option<Error>,
    result: &Result<(), Error>,
) -> Result<(), String> {
    match (before, after, result) {
        (_, None, Err(error)) => Err(format!("{what} fails after all faults have ceased: {error}")),
        (Some(poison), _, Ok(())) => Err(format!("{what} succeeds on what is poisoned: {poison}")),
        (None, _, Ok(())) | (_, Some(_), Err(_)) => Ok(()),
    }
}

fn span(bytes: &Range<u64>) -> Span {
    Span::new(bytes.start, bytes.end - bytes.start).expect("within the disk")
}
