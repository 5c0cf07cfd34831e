//! A client that writes much, with many requests in flight, and believes only what it is told.

use crate::lab::ground::MIB;
use crate::model::{BLOCK, Found, Generation, Model};
use anyhow::{Context, Result, bail, ensure};
use nbd_client::{Answer, Client, Errno, Request};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

pub(crate) const DEPTH: usize = 16;
pub(crate) const LEN: usize = 128 << 10;

/// What became of many writes.
#[derive(Default, Debug)]
pub(crate) struct Written {
    pub(crate) acknowledged: u64,
    pub(crate) failed: BTreeMap<Errno, u64>,
    /// How many were acknowledged before the first failed.
    pub(crate) before_first_failure: u64,
}

impl Written {
    pub(crate) fn acknowledged_bytes(&self) -> u64 {
        self.acknowledged * LEN as u64
    }

    /// Fails if a write failed with something else than this.
    pub(crate) fn require_only(&self, errno: Errno) -> Result<()> {
        let others = self.failed.keys().any(|other| *other != errno);
        ensure!(!others, "writes failed with {:?} where only {errno:?} is true", self.failed);
        Ok(())
    }

    fn count(&mut self, answer: &Answer) {
        match answer {
            Ok(_) => {
                self.acknowledged += 1;
                if self.failed.is_empty() {
                    self.before_first_failure += 1;
                }
            }
            Err(errno) => *self.failed.entry(*errno).or_default() += 1,
        }
    }
}

/// Writes in flight on one connection, and the model that learns from the answers.
pub(crate) struct Writer<'a> {
    client: &'a mut Client,
    model: &'a mut Model,
    generation: Generation,
    places: HashMap<u64, u64>,
    pub(crate) written: Written,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(client: &'a mut Client, model: &'a mut Model, generation: Generation) -> Writer<'a> {
        Writer { client, model, generation, places: HashMap::new(), written: Written::default() }
    }

    /// Writes at all these places, `DEPTH` at a time, whatever fails.
    pub(crate) fn write(mut self, places: impl IntoIterator<Item = u64>) -> Result<Written> {
        let ended = self.write_while_connected(places);
        ended.with_context(|| format!("after {:?}", self.written))?;
        Ok(self.written)
    }

    /// The same, to see how far it came when the connection ends. A server that takes no more may still have
    /// answers for what it took.
    pub(crate) fn write_while_connected(&mut self, places: impl IntoIterator<Item = u64>) -> Result<()> {
        let mut sent = Ok(());
        for at in places {
            if self.places.len() == DEPTH {
                self.take_answer()?;
            }
            sent = self.send(at);
            if sent.is_err() {
                break;
            }
        }
        while !self.places.is_empty() {
            self.take_answer()?;
        }
        sent
    }

    fn send(&mut self, at: u64) -> Result<()> {
        let bytes = self.model.contents(at, LEN, self.generation);
        self.model.sent(at, LEN, self.generation);
        let cookie = self.client.send(&Request::write(at, &bytes))?;
        self.places.insert(cookie, at);
        Ok(())
    }

    fn take_answer(&mut self) -> Result<()> {
        let (cookie, answer) = self.client.receive()?;
        let at = self.places.remove(&cookie).context("an answer to nothing of ours")?;
        if answer.is_ok() {
            self.model.settled(at, LEN, self.generation);
        }
        self.written.count(&answer);
        Ok(())
    }
}

/// The places of all requests of a disk, in order.
pub(crate) fn places(size: u64) -> impl Iterator<Item = u64> {
    (0..size).step_by(LEN)
}

/// A flush that must succeed.
pub(crate) fn flush(client: &mut Client) -> Result<()> {
    match client.ask(&Request::flush())? {
        Ok(_) => Ok(()),
        Err(errno) => bail!("a flush failed with {errno:?}"),
    }
}

/// Reads the whole disk through the server and compares it.
pub(crate) fn check_through(client: &mut Client, model: &Model) -> Result<Found> {
    let size = (model.blocks() * BLOCK) as u64;
    ensure!(client.size() == size, "the export has {} bytes instead of {size}", client.size());
    let mut found = Found::default();
    let mut todo = places(size);
    let mut open = HashMap::new();
    loop {
        while open.len() < DEPTH
            && let Some(at) = todo.next()
        {
            open.insert(client.send(&Request::read(at, LEN as u64))?, at);
        }
        if open.is_empty() {
            return Ok(found);
        }
        let (cookie, answer) = client.receive()?;
        let at = open.remove(&cookie).context("an answer to nothing of ours")?;
        match answer {
            Ok(payload) => found.add(model.check(at, &payload.bytes)),
            Err(errno) => bail!("a read at {at} failed with {errno:?}"),
        }
    }
}

/// Reads the image without any server and compares it.
pub(crate) fn check_file(image: &Path, model: &Model) -> Result<Found> {
    let file = File::open(image)?;
    let size = (model.blocks() * BLOCK) as u64;
    ensure!(file.metadata()?.len() == size, "the image is not {size} bytes long");
    let mut found = Found::default();
    let mut bytes = vec![0; usize::try_from(MIB)?];
    for at in (0..size).step_by(bytes.len()) {
        file.read_exact_at(&mut bytes, at)?;
        found.add(model.check(at, &bytes));
    }
    Ok(found)
}
