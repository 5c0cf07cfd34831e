//! What is left after a death, judged: the image opens, what was promised is there, and it can go on being used.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use image::{Repair, Report};

use super::bytes::Bytes;
use super::guest::{Guests, Habits};
use super::model::{Model, View};
use super::qemu;
use super::recorder::runtime;
use super::states::{Choice, Replay};
use super::subject::{Subject, read_all};
use super::world::{Notes, Pace, World};
use crate::dice::Dice;

/// What was left, and what may be in it.
pub(crate) struct Remains<'a> {
    pub(crate) subject: &'a Subject,
    pub(crate) model: &'a Model,
    pub(crate) view: View,
    pub(crate) files: Vec<Bytes>,
    /// What the ledger has; nothing, after a power cut.
    pub(crate) notes: Notes,
}

impl Remains<'_> {
    /// Judges it all; `closely` costs more.
    pub(crate) fn judge(&self, dice: &mut Dice, closely: bool) -> Result<(), String> {
        self.check(&self.files)?;
        if closely && self.notes.is_empty() {
            self.repair(dice)?;
            self.go_back()?;
        }
        self.go_on(&self.files, &self.notes, dice, closely)
    }

    fn world(&self, files: &[Bytes], notes: &Notes) -> Rc<World> {
        World::new(files.to_vec(), notes.clone(), Pace::Instant, Dice::new(0))
    }

    /// A snapshot has what the disk had when it was taken, whatever was written since.
    fn go_back(&self) -> Result<(), String> {
        let world = self.world(&self.files, &Notes::default());
        let (subject, of) = (self.subject.clone(), world.clone());
        let told = |error| format!("go back to the snapshot: {error}");
        if !runtime(&world).block_on(async move { subject.go_back(&of).await }).map_err(told)? {
            return Ok(());
        }
        let files = world.files();
        self.check(&files).map_err(|what| format!("after going back to the snapshot: {what}"))?;
        let model = Model::new(self.subject.size, self.subject.below);
        let view = View { from: u64::MAX, until: u64::MAX };
        let before = Remains { model: &model, view, files, notes: Notes::default(), subject: self.subject };
        before
            .go_on(&before.files, &before.notes, &mut Dice::new(0), false)
            .map_err(|what| format!("the snapshot: {what}"))
    }

    /// QEMU's check finds no more than wasted space, and QEMU reads what may be there.
    pub(crate) fn ask_qemu(&self) -> Result<(), String> {
        let converted = qemu::ask(self.subject, &self.files)?;
        match converted {
            // What only the ledger has QEMU cannot know.
            Some(bytes) if self.notes.is_empty() => {
                let len = bytes.len().min(self.subject.size as usize) / super::model::GRAIN as usize;
                let grains = len * super::model::GRAIN as usize;
                self.model
                    .judge(0, &bytes[..grains], self.view)
                    .map_err(|what| format!("as QEMU reads it: {what}"))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// It is whole, or wastes space at most: what there is to be said of that.
    fn check(&self, files: &[Bytes]) -> Result<Option<Report>, String> {
        let world = self.world(files, &Notes::default());
        let report = self.run_check(&world, Repair::No)?;
        if world.files().iter().zip(files).any(|(now, before)| now != before) {
            return Err("a check has changed the image".into());
        }
        Ok(report)
    }

    fn run_check(&self, world: &Rc<World>, repair: Repair) -> Result<Option<Report>, String> {
        let (subject, of) = (self.subject.clone(), world.clone());
        let report = runtime(world).block_on(async move { subject.check(&of, repair).await });
        match report.map_err(|error| format!("check ({repair:?}): {error}"))? {
            Some(report) if !report.is_safe() => Err(format!("check ({repair:?}): {report:?}")),
            report => Ok(report.filter(|report| !report.is_clean())),
        }
    }

    /// A repair leaves nothing to repair, changes nothing that the disk shows, and may be interrupted too.
    fn repair(&self, dice: &mut Dice) -> Result<(), String> {
        let repair = dice.pick(&[Repair::Leaks, Repair::All]);
        let world = self.world(&self.files, &Notes::default());
        self.run_check(&world, repair)?;
        let repaired = world.files();
        if let Some(report) = self.check(&repaired)?.filter(|_| self.subject.gives_back_leaks()) {
            return Err(format!("after a repair ({repair:?}) there is something to repair: {report:?}"));
        }
        let again = self.world(&repaired, &Notes::default());
        self.run_check(&again, repair)?;
        let differences = again.files();
        for (number, (now, before)) in differences.iter().zip(&repaired).enumerate() {
            if let Some(byte) = before.difference(now) {
                return Err(format!("a second repair ({repair:?}) changes byte {byte} of file {number}"));
            }
        }
        self.go_on(&repaired, &Notes::default(), dice, false)
            .map_err(|what| format!("after a repair: {what}"))?;
        world
            .log(|log, operations| {
                let mut replay = Replay::new(log, operations, self.files.clone(), Notes::default());
                replay.advance(dice.below(log.len() as u64 + 1) as usize);
                let choice = Choice::Random { percent: dice.pick(&[30, 70]), by_sector: dice.percent(50) };
                let files = replay.power_cut(choice, dice);
                self.check(&files)?;
                self.go_on(&files, &Notes::default(), dice, false)
            })
            .map_err(|what| format!("after a power cut in a repair ({repair:?}): {what}"))
    }

    /// Opened anew it shows what it may show, and new writes harm nothing.
    fn go_on(&self, files: &[Bytes], notes: &Notes, dice: &mut Dice, closely: bool) -> Result<(), String> {
        let world = self.world(files, notes);
        let runtime = runtime(&world);
        let opened = {
            let (subject, world, handle) = (self.subject.clone(), world.clone(), runtime.handle().clone());
            runtime.block_on(async move { subject.open(&handle, &world).await })
        };
        let chain = opened.map_err(|error| format!("open: {error}"))?;
        let size = self.subject.size;
        let (chain, shown) = runtime.block_on(async move {
            let shown = read_all(&chain, size).await;
            (chain, shown)
        });
        let shown = shown.map_err(|error| format!("read all: {error}"))?;
        let grains = shown.len() - shown.len() % super::model::GRAIN as usize;
        self.model.judge(0, &shown[..grains], self.view)?;
        if !closely {
            return Ok(());
        }
        let model = Rc::new(RefCell::new(Model::seen(&shown, self.subject.below)));
        let habits = Habits { depth: 1, steps: dice.between(1, 8), ..Habits::draw(dice, self.subject.unit) };
        let guests = Guests {
            handle: runtime.handle().clone(),
            world: world.clone(),
            chain,
            model: model.clone(),
            habits,
            dice: RefCell::new(dice.fork()),
            numbers: Rc::new(Cell::new(1 << 30)),
            all_is_well: true,
        };
        runtime
            .block_on(async move {
                guests.play(u64::MAX).await?;
                guests.chain.close().await.map_err(|error| format!("close: {error}"))
            })
            .map_err(|what| format!("going on: {what}"))?;
        drop(runtime);
        self.check(&world.files()).map_err(|what| format!("going on, then {what}"))?;
        if !world.notes().is_empty() {
            return Err("going on: closed, but the ledger is not empty".into());
        }
        let view = View { from: u64::MAX, until: u64::MAX };
        let again =
            Remains { model: &model.borrow(), view, files: world.files(), notes: Notes::default(), ..*self };
        again
            .go_on(&again.files, &again.notes, dice, false)
            .map_err(|what| format!("going on, then again: {what}"))
    }
}
