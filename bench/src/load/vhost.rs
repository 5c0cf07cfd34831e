//! A load on one queue of a vhost-user-blk device.
//!
//! All requests that can be made are made with one kick at most; all answers that are there are taken at once. As a
//! guest of Linux does, it asks for no notification while it is awake, and sleeps when there is nothing to take: it
//! does not poll, so that a server's cost of waking a guest is part of what is measured, for all servers alike.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::cell::{Cell, Direction, Offsets};
use crate::device::Device;
use crate::image::Contents;
use crate::load::{self, Tally};

pub(crate) struct Load<'a> {
    device: Device,
    cell: &'a Cell,
    contents: Contents,
    offsets: Offsets,
    slots: Vec<Slot>,
    /// Slots whose request was answered, to be made again.
    ready: Vec<usize>,
    answers: Vec<(usize, i32)>,
    in_flight: usize,
    tally: Tally,
}

/// A request, and the piece of the device's memory of the same number.
struct Slot {
    at: u64,
    sent: Instant,
}

impl<'a> Load<'a> {
    pub(crate) fn new(mut device: Device, cell: &'a Cell, contents: Contents) -> Result<Load<'a>> {
        device.share(cell.depth * cell.len)?;
        let offsets = cell.offsets(device.size);
        let now = Instant::now();
        Ok(Load {
            device,
            cell,
            contents,
            offsets,
            slots: (0..cell.depth).map(|_| Slot { at: 0, sent: now }).collect(),
            ready: Vec::with_capacity(cell.depth),
            answers: Vec::with_capacity(cell.depth),
            in_flight: 0,
            tally: Tally::new(),
        })
    }

    fn send(&mut self, now: Instant) -> Result<()> {
        for index in self.ready.drain(..) {
            let at = self.offsets.next().context("offsets never end")?;
            self.slots[index] = Slot { at, sent: now };
            match self.cell.direction {
                Direction::Read => self.device.read(index, at, self.cell.len)?,
                Direction::Write => self.device.write(index, at, self.cell.len)?,
            }
            self.in_flight += 1;
        }
        self.device.kick()
    }

    fn receive(&mut self) -> Result<Instant> {
        loop {
            self.answers.extend(self.device.answers());
            if !self.answers.is_empty() {
                break;
            }
            self.device.sleep()?;
        }
        let now = Instant::now();
        for (index, result) in self.answers.drain(..) {
            let Some(slot) = self.slots.get(index) else { bail!("an answer to no request of ours") };
            ensure!(result == 0, "a request was answered with error {}", -result);
            if self.contents == Contents::Stamped && self.cell.direction == Direction::Read {
                let is_right = self.device.is_right(index, slot.at, self.cell.len);
                ensure!(is_right, "wrong data was read at {}", slot.at);
            }
            self.tally.count(now.saturating_duration_since(slot.sent));
            self.in_flight -= 1;
            self.ready.push(index);
        }
        Ok(now)
    }
}

impl load::Load for Load<'_> {
    fn start(&mut self) -> Result<()> {
        self.ready.extend(0..self.cell.depth);
        self.send(Instant::now())
    }

    fn turn(&mut self) -> Result<Instant> {
        let now = self.receive()?;
        self.send(now)?;
        Ok(now)
    }

    fn finish(mut self) -> Result<()> {
        while self.in_flight > 0 {
            self.receive()?;
        }
        Ok(())
    }

    fn tally(&mut self) -> &mut Tally {
        &mut self.tally
    }
}
