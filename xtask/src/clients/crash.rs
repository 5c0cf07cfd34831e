//! A server that is killed in the middle of writes: what was flushed before is there afterwards.
//!
//! The page cache survives the process, so this proves nothing about the disk's own cache; the lab's power
//! cut does. It proves that nothing lives only in the server, and that a successor can take over at once.

use super::{Check, MIB, Stage};
use crate::command::start;
use crate::model::{BLOCK, Generation, Model, Numbers};
use crate::work::drop_caches;
use anyhow::{Context, Result, bail, ensure};
use nbd_client::{Client, Request, Style};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

pub(crate) const CHECKS: &[Check] =
    &[("what was flushed is there after kill -9, three times over", killed), ("FUA is as good", killed_fua)];

const SIZE: u64 = 64 * MIB;
const DEPTH: usize = 16;
const LIFE: Duration = Duration::from_millis(700);

fn killed(stage: &Stage<'_>) -> Result<()> {
    crash(stage, false)
}

fn killed_fua(stage: &Stage<'_>) -> Result<()> {
    crash(stage, true)
}

fn crash(stage: &Stage<'_>, fua: bool) -> Result<()> {
    let image = stage.image(SIZE)?;
    let mut model = Model::new(SIZE);
    let mut generation = 0;
    let mut numbers = Numbers::new(if fua { 1 } else { 2 });
    for _ in 0..3 {
        let server = stage.serve(&image)?;
        let mut client = Client::connect(server.socket(), Style::Simple)?;
        client.set_patience(Duration::from_secs(10))?;
        // Something else kills it, at a moment that the writer does not choose.
        let seconds = LIFE.as_secs_f64() + (numbers.below(300) as f64) / 1000.0;
        let kill = format!("sleep {seconds}; kill -9 {}", server.pid());
        let mut killer = start(Command::new("sh").args(["-c", &kill]))?;
        let settled = write_until_it_dies(&mut client, &mut model, &mut generation, &mut numbers, fua)?;
        killer.wait()?;
        drop(client);
        server.kill()?;
        ensure!(settled > 100, "only {settled} writes were made durable before the server died");

        drop_caches()?;
        check_image(&image, &model).context("in the image")?;
        let server = stage.serve(&image).context("start again after kill -9")?;
        let mut client = Client::connect(server.socket(), Style::Simple)?;
        check_served(&mut client, &model).context("after a restart")?;
        drop(client);
        stage.end(server)?;
    }
    Ok(())
}

/// Writes random blocks, and flushes now and then, until the connection breaks. Only what the server called
/// durable is settled in the model; returns how many writes that were.
fn write_until_it_dies(
    client: &mut Client,
    model: &mut Model,
    generation: &mut Generation,
    numbers: &mut Numbers,
    fua: bool,
) -> Result<u64> {
    let deadline = Instant::now() + 10 * LIFE;
    let mut open: HashMap<u64, (u64, usize, Generation)> = HashMap::new();
    let mut answered = Vec::new();
    let mut covered = Vec::new();
    let mut flush = None;
    let mut settled = 0;
    while Instant::now() < deadline {
        let sent: Result<()> = (|| {
            while open.len() < DEPTH {
                let blocks = 1 + numbers.below(8);
                let at = numbers.below(SIZE / BLOCK as u64 - blocks) * BLOCK as u64;
                let len = BLOCK * usize::try_from(blocks)?;
                // Two writes of one block in flight have no order: the model could not say who is last.
                if open
                    .values()
                    .any(|(other, count, _)| at < other + *count as u64 && *other < at + len as u64)
                {
                    continue;
                }
                *generation += 1;
                model.sent(at, len, *generation);
                let bytes = model.contents(at, len, *generation);
                let request = Request::write(at, &bytes);
                let cookie = client.send(&if fua { request.fua() } else { request })?;
                open.insert(cookie, (at, len, *generation));
            }
            if flush.is_none() && answered.len() > 64 && !fua {
                // It covers what was answered before it was sent.
                covered = std::mem::take(&mut answered);
                flush = Some(client.send(&Request::flush())?);
            }
            Ok(())
        })();
        let received = if sent.is_ok() { client.receive().ok() } else { None };
        let Some((cookie, answer)) = received else { return Ok(settled) };
        if let Err(errno) = answer {
            bail!("request {cookie} failed with {errno:?}");
        }
        if flush == Some(cookie) {
            flush = None;
            for (at, len, generation) in covered.drain(..) {
                model.settled(at, len, generation);
                settled += 1;
            }
            continue;
        }
        let write = open.remove(&cookie).context("an answer to nothing of ours")?;
        if fua {
            model.settled(write.0, write.1, write.2);
            settled += 1;
        } else {
            answered.push(write);
        }
    }
    bail!("nobody killed the server")
}

fn check_image(image: &Path, model: &Model) -> Result<()> {
    let file = File::open(image)?;
    let mut bytes = vec![0; usize::try_from(SIZE)?];
    file.read_exact_at(&mut bytes, 0)?;
    model.check(0, &bytes).require("read directly").map(drop)
}

/// Reads all through the server.
fn check_served(client: &mut Client, model: &Model) -> Result<()> {
    let step = MIB;
    for at in (0..SIZE).step_by(usize::try_from(step)?) {
        let bytes = match client.ask(&Request::read(at, step))? {
            Ok(payload) => payload.bytes,
            Err(errno) => bail!("a read at {at} failed with {errno:?}"),
        };
        model.check(at, &bytes).require("read through the server")?;
    }
    Ok(())
}
