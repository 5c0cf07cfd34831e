//! What the files may hold after a death at any time of a log: of the power, or of the process alone.
//!
//! A sync that has succeeded covers what had ended when it began. Of the rest any sectors may be there and any not; so may
//! what was cleared be cleared. Only changes of one file's length come in their order.

use std::collections::{BTreeSet, VecDeque};

use super::bytes::Bytes;
use super::world::{Act, Event, Notes, Operation, apply, sectors};
use crate::dice::Dice;

/// A log, followed up to some time.
#[derive(Clone)]
pub(crate) struct Replay<'a> {
    log: &'a [Event],
    operations: &'a [Operation],
    time: usize,
    files: Vec<File>,
    /// By number of operation: when it began and when it ended.
    begun: Vec<usize>,
    ended: Vec<Option<usize>>,
    notes: Notes,
}

#[derive(Clone)]
struct File {
    /// What no death takes away.
    base: Bytes,
    /// Operations that have had their effect since, in the order of effects, and whether a sync covers them.
    tail: VecDeque<(usize, bool)>,
    /// Those under way.
    flying: Vec<usize>,
}

/// What is there of what no sync covers. Numbers count such operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    All,
    None,
    /// All but this one.
    Without(usize),
    /// Only this one.
    Only(usize),
    /// All, but this one only in part.
    Torn(usize),
    /// Each operation, or each sector of them, so often out of a hundred.
    Random {
        percent: u64,
        by_sector: bool,
    },
}

impl<'a> Replay<'a> {
    /// At the begin of a log, when the files hold this and all of it is durable.
    pub(crate) fn new(
        log: &'a [Event],
        operations: &'a [Operation],
        files: Vec<Bytes>,
        notes: Notes,
    ) -> Replay<'a> {
        let file = |base| File { base, tail: VecDeque::new(), flying: Vec::new() };
        Replay {
            log,
            operations,
            time: 0,
            files: files.into_iter().map(file).collect(),
            begun: vec![0; operations.len()],
            ended: vec![None; operations.len()],
            notes,
        }
    }

    /// Goes on, to just before the event at `time`.
    pub(crate) fn advance(&mut self, time: usize) {
        while self.time < time {
            let now = self.time;
            self.time += 1;
            match &self.log[now] {
                Event::Begun(number) => {
                    self.begun[*number] = now;
                    if self.operations[*number].act.changes() {
                        self.files[self.operations[*number].file].flying.push(*number);
                    }
                }
                Event::Done(number) => {
                    if self.operations[*number].act.changes() {
                        let file = &mut self.files[self.operations[*number].file];
                        file.flying.retain(|flying| flying != number);
                        file.tail.push_back((*number, false));
                    }
                }
                Event::Ended(number, result) => {
                    self.ended[*number] = Some(now);
                    if result.is_ok() && matches!(self.operations[*number].act, Act::Sync) {
                        self.cover(*number);
                    }
                }
                Event::Noted(group) => self.notes.note(group.clone()),
                Event::NotNoted => self.notes.miss(),
                Event::RoundBegun => self.notes.begin(),
                Event::RoundEnded => drop(self.notes.end()),
                Event::Guest => {}
            }
        }
    }

    /// A sync has succeeded.
    fn cover(&mut self, sync: usize) {
        let since = self.begun[sync];
        let file = &mut self.files[self.operations[sync].file];
        for (number, is_covered) in &mut file.tail {
            *is_covered |= self.ended[*number].is_some_and(|ended| ended < since);
        }
        while let Some((number, true)) = file.tail.front() {
            let Operation { act, span, landed, .. } = &self.operations[*number];
            apply(&mut file.base, act, *span, landed.as_ref());
            file.tail.pop_front();
        }
    }

    /// How many operations no sync covers.
    pub(crate) fn loose(&self) -> usize {
        let loose =
            |file: &File| file.tail.iter().filter(|(_, covered)| !covered).count() + file.flying.len();
        self.files.iter().map(loose).sum()
    }

    /// The files after the power was cut.
    pub(crate) fn power_cut(&self, choice: Choice, dice: &mut Dice) -> Vec<Bytes> {
        let mut number_of_loose = 0;
        self.files
            .iter()
            .map(|file| {
                let mut bytes = file.base.clone();
                // Lengths change in their order: once one change is lost, all later ones are.
                let mut lengths_last = true;
                let flying = file.flying.iter().map(|number| (*number, false));
                for (number, is_covered) in file.tail.iter().copied().chain(flying) {
                    let Operation { act, span, landed, .. } = &self.operations[number];
                    if is_covered {
                        apply(&mut bytes, act, *span, landed.as_ref());
                        continue;
                    }
                    let only = choose(choice, number_of_loose, &self.operations[number], dice);
                    number_of_loose += 1;
                    if matches!(act, Act::Resize(_)) {
                        lengths_last &= only.is_none() && landed.is_none();
                        if lengths_last {
                            apply(&mut bytes, act, *span, None);
                        }
                    } else {
                        apply(&mut bytes, act, *span, only.as_ref().or(landed.as_ref()));
                    }
                }
                bytes
            })
            .collect()
    }

    /// The files and the ledger after the process was killed: what was answered is there, what was under way may be.
    pub(crate) fn killed(&self, dice: &mut Dice) -> (Vec<Bytes>, Notes) {
        let files = self
            .files
            .iter()
            .map(|file| {
                let mut bytes = file.base.clone();
                for (number, _) in &file.tail {
                    let Operation { act, span, landed, .. } = &self.operations[*number];
                    apply(&mut bytes, act, *span, landed.as_ref());
                }
                for number in &file.flying {
                    let operation = &self.operations[*number];
                    let choice = dice.pick(&[Choice::All, Choice::None, Choice::Torn(0)]);
                    let only = choose(choice, 0, operation, dice);
                    if !matches!(operation.act, Act::Resize(_))
                        || (only.is_none() && operation.landed.is_none())
                    {
                        apply(&mut bytes, &operation.act, operation.span, only.as_ref());
                    }
                }
                bytes
            })
            .collect();
        (files, self.notes.clone())
    }
}

/// Which sectors of an operation are there: all that it changed, where nothing is said.
fn choose(choice: Choice, number: usize, operation: &Operation, dice: &mut Dice) -> Option<BTreeSet<u64>> {
    // A change of length is there or not.
    let is_whole = matches!(operation.act, Act::Resize(_));
    let some = |percent, dice: &mut Dice| {
        if is_whole && dice.percent(percent) {
            return None;
        }
        Some(sectors(operation.span).filter(|_| dice.percent(percent)).collect::<BTreeSet<u64>>())
    };
    let nothing = Some(BTreeSet::new());
    match choice {
        Choice::All => None,
        Choice::None => nothing,
        Choice::Without(one) if one == number => nothing,
        Choice::Only(one) if one != number => nothing,
        Choice::Torn(one) if one == number => some(50, dice),
        Choice::Without(_) | Choice::Only(_) | Choice::Torn(_) => None,
        Choice::Random { percent, by_sector: true } => some(percent, dice),
        Choice::Random { percent, by_sector: false } => {
            if dice.percent(percent) {
                None
            } else {
                nothing
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use block::{Buf, Span};
    use storage::Storage;

    use super::super::recorder::{Recorder, runtime};
    use super::super::world::{Pace, World};
    use super::*;

    /// What a power cut at the end of these operations may leave of the first bytes of two sectors.
    fn left(work: impl AsyncFnOnce(Recorder) + 'static) -> BTreeSet<(u8, u8)> {
        let world = World::new(vec![Bytes::new(1024)], Notes::default(), Pace::Random, Dice::new(1));
        let recorder = Recorder::new(&world, 0);
        runtime(&world).block_on(work(recorder));
        world.log(|log, operations| {
            let mut replay = Replay::new(log, operations, vec![Bytes::new(1024)], Notes::default());
            replay.advance(log.len());
            let mut dice = Dice::new(2);
            let choice = Choice::Random { percent: 50, by_sector: true };
            let states = (0..200).map(|_| replay.power_cut(choice, &mut dice)[0].clone());
            states
                .map(|mut bytes| {
                    bytes.resize(1024);
                    let bytes = bytes.to_vec();
                    (bytes[0], bytes[512])
                })
                .collect()
        })
    }

    fn bytes(byte: u8) -> Buf {
        Buf::from_bytes(&[byte; 1024])
    }

    #[test]
    fn what_a_sync_covers_is_there_and_of_the_rest_any_part() {
        let one = left(async |file| {
            file.write(0, bytes(1)).await.unwrap();
        });
        assert_eq!(one, [(0, 0), (0, 1), (1, 0), (1, 1)].into());
        let two = left(async |file| {
            file.write(0, bytes(1)).await.unwrap();
            file.flush().await.unwrap();
            file.write(0, bytes(2)).await.unwrap();
        });
        assert_eq!(two, [(1, 1), (1, 2), (2, 1), (2, 2)].into());
        let beside = left(async |file| {
            let (write, flush) = (file.write(0, bytes(1)), file.flush());
            let done = runtime::join_all(vec![write, flush]).await;
            assert!(done.iter().all(Result::is_ok));
        });
        assert_eq!(beside.len(), 4, "a sync covers nothing that had not ended when it began");
    }

    #[test]
    fn a_length_is_as_loose_as_bytes_are() {
        let grown = left(async |file| {
            file.resize(512).await.unwrap();
            file.flush().await.unwrap();
            file.resize(1024).await.unwrap();
            file.write(512, bytes(3).slice(0, 512)).await.unwrap();
        });
        assert_eq!(grown, [(0, 0), (0, 3)].into());
        let cut = left(async |file| {
            file.write(0, bytes(1)).await.unwrap();
            file.flush().await.unwrap();
            file.discard(Span::new(0, 1024).unwrap()).await.unwrap();
        });
        assert!(cut.contains(&(1, 1)), "a hole may not have been punched yet");
    }

    #[test]
    fn a_killed_process_loses_nothing_that_was_answered() {
        let world = World::new(vec![Bytes::new(1024)], Notes::default(), Pace::Random, Dice::new(1));
        let file = Recorder::new(&world, 0);
        let flying = Rc::new(Recorder::new(&world, 0));
        let runtime = runtime(&world);
        let other = flying.clone();
        runtime.handle().spawn(async move {
            assert!(other.write(512, bytes(2).slice(0, 512)).await.is_err(), "it never comes to its end");
        });
        runtime.block_on(async move {
            file.write(0, bytes(1).slice(0, 512)).await.unwrap();
        });
        drop(runtime);
        world.log(|log, operations| {
            let mut replay = Replay::new(log, operations, vec![Bytes::new(1024)], Notes::default());
            replay.advance(log.len());
            let mut dice = Dice::new(2);
            for _ in 0..50 {
                assert_eq!(replay.killed(&mut dice).0[0].to_vec()[0], 1);
            }
        });
    }
}
