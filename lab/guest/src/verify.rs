//! `guest verify`: writes to a disk past the page cache from several threads, syncs, and verifies what it reads back.
//!
//! It goes on until a file called `stop` appears in its folder, says every now and then how far it is, and at last
//! reads back every block that it wrote. A request that takes long is waited for; one that fails ends it.

use crate::block;
use crate::worker::{Counts, Worker};
use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::fs::OFlags;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// What is to be done, from the command line.
struct Order {
    device: PathBuf,
    /// Where the file `stop` will appear.
    folder: PathBuf,
    /// Bytes of the disk, from its start, that are ours.
    len: u64,
    threads: u64,
    seed: u64,
}

fn parse(words: &[String]) -> Result<Order> {
    let [device, folder, len, threads, seed] = words else {
        bail!("expected DEVICE FOLDER BYTES THREADS SEED, found {words:?}");
    };
    let number = |word: &String| word.parse::<u64>().with_context(|| format!("`{word}` is no number"));
    Ok(Order {
        device: device.into(),
        folder: folder.into(),
        len: number(len)?,
        threads: number(threads)?,
        seed: number(seed)?,
    })
}

/// Does it. The last line begins with `verified` if all was well.
pub(crate) fn run(words: &[String]) -> Result<ExitCode> {
    let order = parse(words)?;
    let direct = i32::try_from(OFlags::DIRECT.bits())?;
    let disk = File::options().read(true).write(true).custom_flags(direct).open(&order.device);
    let disk = Arc::new(disk.with_context(|| format!("open {}", order.device.display()))?);
    let blocks = order.len / block::LEN as u64 / order.threads;
    ensure!(blocks > 0, "too little for so many threads");
    let counts = Arc::new(Counts::default());
    let is_over = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    for number in 0..order.threads {
        // Each has a stretch of its own, so that what a block must hold is known at any time.
        let mut worker =
            Worker::new(disk.clone(), number * blocks, blocks, order.seed + number, counts.clone());
        let is_over = is_over.clone();
        threads.push(thread::spawn(move || {
            // One who fails ends the others.
            let result = worker.work(&is_over);
            is_over.store(true, Ordering::SeqCst);
            result.and_then(|()| worker.verify_all())
        }));
    }
    report_until_the_end(&order.folder, &counts, &is_over);
    is_over.store(true, Ordering::SeqCst);
    let mut verified = 0;
    for thread in threads {
        verified += thread.join().map_err(|panic| anyhow!("a thread panicked: {panic:?}"))??;
    }
    println!("verified {verified} blocks at the end; {counts}");
    Ok(ExitCode::SUCCESS)
}

/// Says how far all are until the host, or a failure, ends it.
fn report_until_the_end(folder: &Path, counts: &Counts, is_over: &AtomicBool) {
    let stop = folder.join("stop");
    while !is_over.load(Ordering::SeqCst) && !stop.exists() {
        println!("{counts}");
        thread::sleep(Duration::from_millis(100));
    }
}
