//! A client writes 1 GiB where 200 MB fit: what it is told is true, then and after a restart.

use crate::lab::DiskFull;
use crate::lab::ground::{Ground, MIB};
use crate::lab::writer::{Writer, check_file, check_through, flush, places};
use crate::model::{BLOCK, Model};
use crate::server::Cache;
use crate::work::{Work, drop_caches};
use anyhow::{Result, ensure};
use nbd_client::{Client, Errno, Style};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

pub(crate) const SIZE: u64 = 1 << 30;
pub(crate) const FREE: u64 = 200_000_000;

pub(crate) fn run(work: &Work, arguments: &DiskFull, cache: Cache) -> Result<()> {
    let ground = Ground::with_free(work, "host", FREE)?;
    let image = ground.path("disk.raw");
    File::create(&image)?.set_len(SIZE)?;
    let plan = arguments.plan(image.clone(), cache);
    let mut server = plan.start(work.folder())?;
    let mut model = Model::new(SIZE);
    let mut client = Client::connect(server.socket(), Style::Simple)?;

    let written = Writer::new(&mut client, &mut model, 1).write(places(SIZE))?;
    println!(
        "     {} MiB acknowledged ({} before the first failure), then {:?}",
        mib(written.acknowledged_bytes()),
        mib(written.before_first_failure * crate::lab::writer::LEN as u64),
        written.failed
    );
    written.require_only(Errno::NOSPC)?;
    ensure!(!written.failed.is_empty(), "1 GiB was acknowledged where {FREE} bytes fit");
    let acknowledged = written.acknowledged_bytes();
    ensure!(acknowledged >= FREE / 10 * 9, "only {acknowledged} bytes were taken although {FREE} were free");

    flush(&mut client)?;
    ensure!(
        acknowledged <= allocated(&image)?,
        "{acknowledged} bytes are acknowledged and flushed, the image has only {} allocated",
        allocated(&image)?
    );
    let cut = ground.after_a_power_cut(work, "cut")?;
    let found = check_file(&cut.path("disk.raw"), &model)?.require("after a power cut")?;
    println!("     after a power cut: {found}");
    drop(cut);
    check_through(&mut client, &model)?.require("through the same server")?;

    // What is allocated can still be written, and a full disk has poisoned nothing.
    let again: Vec<u64> = places(SIZE).filter(|at| is_settled(&model, *at)).step_by(7).collect();
    let rewritten = Writer::new(&mut client, &mut model, 2).write(again)?;
    ensure!(rewritten.failed.is_empty(), "over allocated blocks: {:?}", rewritten.failed);
    flush(&mut client)?;
    server.must_live()?;
    drop(client);
    server.stop()?;

    ground.remount()?;
    let found = check_file(&image, &model)?.require("in the image, read from the disk")?;
    println!("     in the image: {found}");
    drop_caches()?;
    let server = plan.start(work.folder())?;
    let mut client = Client::connect(server.socket(), Style::Simple)?;
    check_through(&mut client, &model)?.require("after a restart of the server")?;

    // With room, the same server takes what it refused.
    ground.enlarge()?;
    let rest: Vec<u64> = places(SIZE).filter(|at| !is_settled(&model, *at)).collect();
    let rest = Writer::new(&mut client, &mut model, 3).write(rest)?;
    ensure!(rest.failed.is_empty(), "with room again: {:?}", rest.failed);
    flush(&mut client)?;
    drop(client);
    server.stop()?;
    ground.remount()?;
    let found = check_file(&image, &model)?.require("after space was added")?;
    println!("     with room again: {found}");
    ensure!(found.acknowledged == model.blocks() as u64, "not all is there: {found}");
    Ok(())
}

/// Whether the whole request at this place was acknowledged; a request never straddles two of them.
pub(crate) fn is_settled(model: &Model, at: u64) -> bool {
    model.is_settled(usize::try_from(at).expect("64 bits") / BLOCK)
}

/// The bytes that the file system has set aside for a file.
pub(crate) fn allocated(file: &Path) -> Result<u64> {
    Ok(fs::metadata(file)?.blocks() * 512)
}

pub(crate) fn mib(bytes: u64) -> u64 {
    bytes / MIB
}
