//! The disk is full and the policy is to hold: who needs space waits for it, and nobody else does.

use crate::command::{until, wait_while};
use crate::lab::DiskFull;
use crate::lab::disk_full::{FREE, SIZE, is_settled};
use crate::lab::ground::Ground;
use crate::lab::writer::{DEPTH, LEN, Writer, Written, check_file, check_through, flush, places};
use crate::model::Model;
use crate::server::{Cache, Server};
use crate::work::Work;
use anyhow::{Context, Result, anyhow, bail, ensure};
use nbd_client::{Client, Errno, Request, Style};
use rustix::process::Signal;
use std::fs::File;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A disk that is full, with a writer that waits.
struct Held {
    ground: Ground,
    server: Server,
    writer: JoinHandle<End>,
}

/// What a writer of the whole disk leaves: what it knows, what it was told, and whether it came to its end.
struct End {
    model: Model,
    written: Written,
    result: Result<()>,
}

fn write_all(mut client: Client) -> End {
    let mut model = Model::new(SIZE);
    let mut writer = Writer::new(&mut client, &mut model, 1);
    let result = writer.write_while_connected(places(SIZE));
    let written = writer.written;
    End { model, written, result }
}

impl Held {
    fn make(work: &Work, arguments: &DiskFull) -> Result<Held> {
        let ground = Ground::with_free(work, "host", FREE)?;
        let image = ground.path("disk.raw");
        File::create(&image)?.set_len(SIZE)?;
        let mut plan = arguments.plan(image, Cache::Direct);
        plan.more = vec!["--on-enospc".into(), "hold".into()];
        let server = plan.start(work.folder())?;
        let client = Client::connect(server.socket(), Style::Simple)?;
        client.set_patience(Duration::from_secs(120))?;
        let writer = thread::spawn(move || write_all(client));
        // Full is when no more space is taken for a while, although there is a writer.
        let mut free = ground.free()?;
        wait_while(Duration::from_secs(60), Duration::from_secs(3), "space is being taken", || {
            let before = std::mem::replace(&mut free, ground.free()?);
            Ok(before != free)
        })?;
        ensure!(free < FREE / 10, "the writer stopped with {free} bytes still free\n{}", server.said());
        ensure!(!writer.is_finished(), "the writer was not held: {:?}", end(writer)?.written);
        Ok(Held { ground, server, writer })
    }
}

/// Waits for the writer to be answered.
fn end(writer: JoinHandle<End>) -> Result<End> {
    until(Duration::from_secs(60), "the writer has all its answers", || Ok(writer.is_finished()))?;
    writer.join().map_err(|panic| anyhow!("the writer panicked: {panic:?}"))
}

pub(crate) fn completes(work: &Work, arguments: &DiskFull) -> Result<()> {
    let Held { ground, mut server, writer } = Held::make(work, arguments)?;
    let mut other = Client::connect(server.socket(), Style::Simple)?;
    other.set_patience(Duration::from_secs(5))?;
    others_go_on(&mut other).context("beside the held writes")?;
    server.signal(Signal::USR1)?;
    until(Duration::from_secs(5), "SIGUSR1 says that requests are held", || {
        Ok(server.said().contains("requests are held"))
    })?;
    ensure!(!writer.is_finished(), "the writer was answered although there is no space");
    server.must_live()?;

    ground.enlarge()?;
    let End { mut model, written, result } = end(writer)?;
    result?;
    println!("     after space was added: {} writes, failed {:?}", written.acknowledged, written.failed);
    ensure!(written.failed.is_empty(), "a held write failed: {:?}", written.failed);
    model.sent(0, LEN, 2);
    model.settled(0, LEN, 2);
    flush(&mut other)?;
    let cut = ground.after_a_power_cut(work, "cut")?;
    check_file(&cut.path("disk.raw"), &model)?.require("after a power cut")?;
    drop(cut);
    check_through(&mut other, &model)?.require("through the same server")?;
    drop(other);
    server.stop()?;
    ground.remount()?;
    let found = check_file(&ground.path("disk.raw"), &model)?.require("in the image")?;
    ensure!(found.acknowledged == model.blocks() as u64, "not all is there: {found}");
    println!("     in the image: {found}");
    let plan = arguments.plan(ground.path("disk.raw"), Cache::Direct);
    let server = plan.start(work.folder())?;
    check_through(&mut Client::connect(server.socket(), Style::Simple)?, &model)?
        .require("after a restart")?;
    server.stop()
}

/// Reads, flushes and writes that need no space have nothing to wait for.
fn others_go_on(other: &mut Client) -> Result<()> {
    let model = Model::new(SIZE);
    let len = LEN as u64;
    let read = |other: &mut Client, at| -> Result<Vec<u8>> {
        match other.ask(&Request::read(at, len)).context("read")? {
            Ok(payload) => Ok(payload.bytes),
            Err(errno) => bail!("a read at {at} failed with {errno:?}"),
        }
    };
    for _ in 0..20 {
        let bytes = model.contents(0, LEN, 2);
        let write = other.ask(&Request::write(0, &bytes)).context("write")?;
        ensure!(write.is_ok(), "a write over allocated blocks failed with {:?}", write.err());
        ensure!(read(other, 0)? == bytes, "a read is not what was written");
        ensure!(read(other, SIZE - len)? == vec![0; LEN], "a hole does not read as zeroes");
        flush(other).context("flush")?;
    }
    Ok(())
}

pub(crate) fn ends(work: &Work, arguments: &DiskFull) -> Result<()> {
    let Held { ground, server, writer } = Held::make(work, arguments)?;
    server.signal(Signal::TERM)?;
    let End { model, written, result } = end(writer)?;
    let words = server.said();
    let status = server.end()?;
    let end = result.err().map_or("came to its end".to_owned(), |error| format!("{error:#}"));
    println!("     the writer was told {:?}; {end}", written.failed);
    // What was in flight is answered with its cause. What it sent after that may be refused otherwise, or
    // meet a closed connection.
    let held = written.failed.get(&Errno::NOSPC).copied().unwrap_or_default();
    ensure!(held >= DEPTH as u64, "only {held} of {DEPTH} held writes were answered ENOSPC");
    let others = written.failed.keys().any(|errno| ![Errno::NOSPC, Errno::SHUTDOWN].contains(errno));
    ensure!(!others, "held writes were answered {:?}", written.failed);
    for said in ["requests that fail are held", "held requests are answered with their error"] {
        ensure!(words.contains(said), "it did not say that {said}:\n{words}");
    }
    println!("     the server ended with {status}");
    ground.remount()?;
    let found = check_file(&ground.path("disk.raw"), &model)?.require("in the image")?;
    ensure!(is_settled(&model, 0), "not even the first write was acknowledged");
    println!("     in the image: {found}");
    Ok(())
}
