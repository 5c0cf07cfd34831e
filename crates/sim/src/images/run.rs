//! One run: an image drawn from a seed, its lives, and all the deaths it may have died.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use block::Errno;
use runtime::Runtime;
use storage::Storage;

use super::bytes::Bytes;
use super::guest::{End, Guests, Habits};
use super::judge::Remains;
use super::model::Model;
use super::recorder::runtime;
use super::states::{Choice, Replay};
use super::subject::{BASE, DATA, FILES, IMAGE, MIDDLE, Subject};
use super::world::{Class, Event, Fault, Notes, Pace, Rule, World};
use crate::dice::Dice;

/// Deaths that are tried of each run, but for those of which all are.
const DEATHS: u64 = 10;
/// Of so many deaths in a run QEMU's programs see the first, if they are to be asked at all.
const ASKED: u64 = 40;
/// One run in so many is short, and all its deaths are tried.
const ALL_DEATHS: u64 = 32;

/// What came of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The image and how it was used.
    pub configuration: String,
    /// Operations that storage was asked for.
    pub operations: u64,
    /// Deaths that were judged.
    pub deaths: u64,
    /// What is wrong, if anything.
    pub failure: Option<String>,
}

/// Runs a seed. Some of what deaths leave is judged by QEMU's programs too, if they are to be asked.
pub fn run(seed: u64, ask_qemu: bool) -> Outcome {
    let mut dice = Dice::new(seed);
    let subject = Subject::draw(&mut dice);
    let mut plan = Plan::draw(&mut dice, &subject, seed.is_multiple_of(ALL_DEATHS));
    plan.ask_qemu = ask_qemu;
    let mut trial = Trial { subject, plan, files: None, operations: 0, deaths: 0 };
    let configuration = format!("{:?}\n{:?}", trial.subject, trial.plan);
    let failure = caught(|| trial.run(&mut dice)).err();
    Outcome { configuration, operations: trial.operations, deaths: trial.deaths, failure }
}

thread_local! {
    /// A run is under way.
    static RUNNING: Cell<bool> = const { Cell::new(false) };
    /// What the first panic of a run said.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps panics from the terminal: a run that fails tells of its own.
pub fn catch_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !RUNNING.get() {
            return before(info);
        }
        PANIC.with_borrow_mut(|first| {
            first.get_or_insert_with(|| info.to_string());
        });
    }));
}

/// Takes a panic for what it is: a failure.
pub(crate) fn caught<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    PANIC.take();
    RUNNING.set(true);
    let result = catch_unwind(AssertUnwindSafe(run));
    RUNNING.set(false);
    match (result, PANIC.take()) {
        (Ok(result), None) => result,
        (Ok(Ok(_)), Some(panic)) => Err(format!("a task has panicked: {panic}")),
        (Ok(Err(what)), Some(panic)) => Err(format!("{what}; before that a task has panicked: {panic}")),
        (Err(_), panic) => Err(panic.unwrap_or_else(|| "a panic".into())),
    }
}

/// How an image is used.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) lives: Vec<Life>,
    pub(crate) all_deaths: bool,
    /// Deaths that are tried, where not all are.
    pub(crate) deaths: u64,
    /// Some of them are judged by QEMU's programs too.
    pub(crate) ask_qemu: bool,
}

/// From opening to the end.
#[derive(Clone, Debug)]
pub(crate) struct Life {
    pub(crate) habits: Habits,
    pub(crate) rules: Vec<Rule>,
    /// It is killed after so many events, or else closed.
    pub(crate) killed_after: Option<u64>,
}

impl Plan {
    fn draw(dice: &mut Dice, subject: &Subject, all_deaths: bool) -> Plan {
        let lives = if all_deaths { 1 } else { dice.pick(&[1, 1, 2, 3]) };
        let quiet = dice.percent(40);
        let life = |_| {
            let rules = if quiet { 0 } else { dice.pick(&[0, 1, 1, 2, 3]) };
            let mut habits = Habits::draw(dice, subject.unit);
            if all_deaths {
                (habits.steps, habits.flushes) = (dice.between(1, 4), 25);
            }
            Life {
                habits,
                rules: (0..rules).map(|_| Rule::draw(dice)).collect(),
                killed_after: dice.percent(40).then(|| dice.below(200)),
            }
        };
        Plan { lives: (0..lives).map(life).collect(), all_deaths, deaths: DEATHS, ask_qemu: false }
    }
}

impl Rule {
    fn draw(dice: &mut Dice) -> Rule {
        let class = dice.pick(&[
            Class::Read,
            Class::Read,
            Class::Write,
            Class::Write,
            Class::Write,
            Class::Zero,
            Class::Discard,
            Class::Resize,
            Class::Resize,
            Class::Sync,
            Class::Note,
        ]);
        let errnos: &[Errno] = match class {
            Class::Read | Class::Zero | Class::Discard => &[Errno::EIO],
            Class::Write | Class::Sync => &[Errno::EIO, Errno::ENOSPC],
            Class::Resize | Class::Note => &[Errno::ENOSPC],
        };
        let file = match class {
            Class::Read => dice.pick(&[Some(IMAGE), Some(IMAGE), Some(DATA), Some(BASE), Some(MIDDLE), None]),
            Class::Note => None,
            Class::Write | Class::Zero | Class::Discard | Class::Resize | Class::Sync => {
                dice.pick(&[Some(IMAGE), Some(DATA), None])
            }
        };
        let draw = dice.below(100);
        let errno = dice.pick(errnos);
        let fault = if class == Class::Resize && draw < 40 {
            Fault::Full(dice.below(1 << 20))
        } else if class == Class::Write && draw < 20 {
            Fault::Short(errno)
        } else if class != Class::Note && draw < 45 {
            Fault::Delay
        } else {
            Fault::Fail(errno)
        };
        Rule {
            file,
            classes: vec![class],
            within: None,
            skip: dice.below(30),
            times: dice.pick(&[1, 1, 3, u64::MAX]),
            fault,
        }
    }
}

/// A run under way.
pub(crate) struct Trial {
    pub(crate) subject: Subject,
    pub(crate) plan: Plan,
    /// The image, if it is made already.
    pub(crate) files: Option<Vec<Bytes>>,
    pub(crate) operations: u64,
    pub(crate) deaths: u64,
}

impl Trial {
    pub(crate) fn run(&mut self, dice: &mut Dice) -> Result<(), String> {
        let made = self.files.take().map_or_else(|| self.subject.create(), Ok);
        let files = made?;
        let world = World::new(files.clone(), Notes::default(), Pace::Random, dice.fork());
        let model = Rc::new(RefCell::new(Model::new(self.subject.size, self.subject.below)));
        let numbers = Rc::new(Cell::new(1));
        let lives = self.plan.lives.clone();
        for (number, life) in lives.iter().enumerate() {
            let told = |what| format!("in life {number}: {what}");
            let goes_on = self.live(life, &world, &model, &numbers, dice).map_err(told)?;
            if !goes_on {
                break;
            }
        }
        self.operations = world.log(|_, operations| operations.len() as u64);
        self.die(&world, files, &model.borrow(), dice)
    }

    /// One life; whether there can be another.
    pub(crate) fn live(
        &self,
        life: &Life,
        world: &Rc<World>,
        model: &Rc<RefCell<Model>>,
        numbers: &Rc<Cell<u32>>,
        dice: &mut Dice,
    ) -> Result<bool, String> {
        world.set_rules(life.rules.clone());
        let runtime = runtime(world);
        let chain = match self.open(&runtime, world) {
            Ok(chain) => chain,
            Err(error) if world.has_given(error.errno()) => {
                world.set_rules(Vec::new());
                if is_poisoned(world) {
                    return Ok(false);
                }
                let told = |error| format!("open, after a first try that failed ({error}): {error}");
                self.open(&runtime, world).map_err(told)?
            }
            Err(error) => return Err(format!("open: {error}")),
        };
        let guests = Rc::new(Guests {
            handle: runtime.handle().clone(),
            world: world.clone(),
            chain,
            model: model.clone(),
            habits: life.habits.clone(),
            dice: RefCell::new(dice.fork()),
            numbers: numbers.clone(),
            all_is_well: life.rules.is_empty(),
        });
        let events = life.killed_after.map_or(u64::MAX, |after| world.events() + after);
        let playing = guests.clone();
        let end = runtime.block_on(async move { playing.play(events).await })?;
        if end == End::Done && life.killed_after.is_none() {
            world.set_rules(Vec::new());
            let recovering = guests.clone();
            runtime.block_on(async move { recovering.recover().await })?;
            let begun = world.tick();
            let closing = guests.clone();
            let closed = runtime.block_on(async move { closing.chain.close().await });
            match (closed, guests.chain.poison()) {
                (Ok(()), None) => model.borrow_mut().flushed(begun, world.tick()),
                (Ok(()), Some(poison)) => {
                    return Err(format!("closing succeeds on what is poisoned: {poison}"));
                }
                (Err(_), Some(_)) => {}
                (Err(error), None) => return Err(format!("closing fails: {error}")),
            }
        }
        let panics = runtime.handle().panics();
        drop(guests);
        drop(runtime);
        if panics > 0 {
            return Err("a task has panicked".into());
        }
        world.settle();
        model.borrow_mut().end_all(world.tick());
        if !self.subject.outlives_its_process() {
            model.borrow_mut().lose(world.tick());
        }
        world.set_rules(Vec::new());
        Ok(!is_poisoned(world))
    }

    fn open(&self, runtime: &Runtime, world: &Rc<World>) -> Result<image::Chain, image::ImageError> {
        let (subject, world, handle) = (self.subject.clone(), world.clone(), runtime.handle().clone());
        runtime.block_on(async move { subject.open(&handle, &world).await })
    }

    /// Judges what deaths at any time would have left.
    fn die(
        &mut self,
        world: &Rc<World>,
        files: Vec<Bytes>,
        model: &Model,
        dice: &mut Dice,
    ) -> Result<(), String> {
        let Trial { subject, plan, deaths, .. } = self;
        world.log(|log, operations| {
            let mut replay = Replay::new(log, operations, files, Notes::default());
            for time in times(log, plan, dice) {
                replay.advance(time);
                let choices = choices(&replay, plan.all_deaths, dice);
                for choice in choices {
                    let files = replay.power_cut(choice, dice);
                    let view = model.after_power_cut(time as u64);
                    let notes = Notes::default();
                    let remains = Remains { subject, model, view, files, notes };
                    let closely = dice.percent(20);
                    *deaths += 1;
                    if plan.ask_qemu && *deaths % ASKED == 1 {
                        let told = |what| {
                            format!("after a power cut at {time} of {}, {choice:?}: {what}", log.len())
                        };
                        remains.ask_qemu().map_err(told)?;
                    }
                    remains.judge(dice, closely).map_err(|what| {
                        format!("after a power cut at {time} of {}, {choice:?}: {what}", log.len())
                    })?;
                }
                if dice.percent(40) {
                    let (files, notes) = replay.killed(dice);
                    let view = if subject.outlives_its_process() {
                        model.after_kill(time as u64)
                    } else {
                        model.after_power_cut(time as u64)
                    };
                    let remains = Remains { subject, model, view, files, notes };
                    let closely = dice.percent(20);
                    *deaths += 1;
                    if plan.ask_qemu && *deaths % ASKED == 1 {
                        let told = |what| format!("after a kill at {time} of {}: {what}", log.len());
                        remains.ask_qemu().map_err(told)?;
                    }
                    remains
                        .judge(dice, closely)
                        .map_err(|what| format!("after a kill at {time} of {}: {what}", log.len()))?;
                }
            }
            Ok(())
        })
    }
}

/// Whether nobody can open the image any more, for a sync of one of its files has failed.
fn is_poisoned(world: &World) -> bool {
    (0..FILES).any(|file| world.poison(file).is_some())
}

/// When to die: anywhere, and right before and after what counts.
fn times(log: &[Event], plan: &Plan, dice: &mut Dice) -> Vec<usize> {
    if plan.all_deaths {
        return (0..=log.len()).collect();
    }
    let mut times: Vec<usize> = (0..plan.deaths).map(|_| dice.below(log.len() as u64 + 1) as usize).collect();
    times.push(log.len());
    times.sort_unstable();
    times
}

fn choices(replay: &Replay<'_>, all: bool, dice: &mut Dice) -> Vec<Choice> {
    let loose = replay.loose();
    let one = dice.below(loose as u64) as usize;
    let random = Choice::Random { percent: dice.pick(&[10, 50, 90]), by_sector: dice.percent(50) };
    if !all {
        let choice = dice.pick(&[
            Choice::All,
            Choice::None,
            Choice::Without(one),
            Choice::Only(one),
            Choice::Torn(one),
            random,
            random,
            random,
        ]);
        return vec![choice];
    }
    let mut choices = vec![Choice::All, Choice::None, random];
    choices.extend((0..loose).flat_map(|one| [Choice::Without(one), Choice::Only(one)]));
    if loose > 0 {
        choices.push(Choice::Torn(one));
    }
    choices
}

#[cfg(test)]
mod tests {
    use super::super::subject::Kind;
    use super::super::toy::Flaw;
    use super::*;

    /// The first of these seeds that fails with this kind of image.
    fn first_failure(kind: &Kind, seeds: u64) -> Option<(u64, String)> {
        (0..seeds).find_map(|seed| {
            let mut dice = Dice::new(seed);
            let subject = Subject::of(kind.clone(), &mut dice);
            let plan = Plan::draw(&mut dice, &subject, seed.is_multiple_of(ALL_DEATHS));
            let mut trial = Trial { subject, plan, files: None, operations: 0, deaths: 0 };
            let failure = caught(|| trial.run(&mut dice)).err()?;
            Some((seed, format!("{failure}\n{:?}\n{:?}", trial.subject, trial.plan)))
        })
    }

    #[test]
    fn what_is_right_passes() {
        catch_panics();
        for kind in [Kind::Raw, Kind::Toy(Flaw::None)] {
            if let Some((seed, failure)) = first_failure(&kind, 60) {
                panic!("{kind:?}, seed {seed}: {failure}");
            }
        }
    }

    #[test]
    fn each_flaw_is_caught() {
        catch_panics();
        for flaw in Flaw::ALL {
            let caught = first_failure(&Kind::Toy(flaw), 1000);
            assert!(caught.is_some(), "{flaw:?}");
        }
    }
}
