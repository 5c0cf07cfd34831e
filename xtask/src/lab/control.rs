//! The control run: the same writes with no server between. If this lies, nothing above it can be judged.

use crate::lab::DiskFull;
use crate::lab::disk_full::{FREE, SIZE, allocated, mib};
use crate::lab::ground::Ground;
use crate::lab::writer::{LEN, Written, check_file, places};
use crate::model::{BLOCK, Model};
use crate::work::Work;
use anyhow::{Context, Result, ensure};
use nbd_client::Errno;
use rustix::fs::OFlags;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

pub(crate) fn run(work: &Work, _: &DiskFull) -> Result<()> {
    let ground = Ground::with_free(work, "control", FREE)?;
    let image = ground.path("disk.raw");
    File::create(&image)?.set_len(SIZE)?;
    let direct = i32::try_from(OFlags::DIRECT.bits())?;
    let file = OpenOptions::new().write(true).custom_flags(direct).open(&image)?;
    let mut model = Model::new(SIZE);
    let mut written = Written::default();
    // O_DIRECT wants aligned memory: take the aligned part of a larger piece.
    let mut memory = vec![0; LEN + BLOCK];
    let start = memory.as_ptr().align_offset(BLOCK);
    for at in places(SIZE) {
        let bytes = &mut memory[start..start + LEN];
        bytes.copy_from_slice(&model.contents(at, LEN, 1));
        model.sent(at, LEN, 1);
        match file.write_at(bytes, at) {
            Ok(LEN) => {
                model.settled(at, LEN, 1);
                written.acknowledged += 1;
            }
            // A short write promises nothing about the rest; what follows it would be ENOSPC.
            Ok(_) => *written.failed.entry(Errno::NOSPC).or_default() += 1,
            Err(error) => {
                let errno = error.raw_os_error().and_then(|number| u32::try_from(number).ok());
                *written.failed.entry(Errno(errno.context("an error without a number")?)).or_default() += 1;
            }
        }
    }
    file.sync_data().context("sync the image")?;
    println!("     {} MiB written, then {:?}", mib(written.acknowledged_bytes()), written.failed);
    written.require_only(Errno::NOSPC)?;
    ensure!(!written.failed.is_empty(), "the file system took 1 GiB");
    ensure!(written.acknowledged_bytes() <= allocated(&image)?, "more acknowledged than allocated");
    let cut = ground.after_a_power_cut(work, "control-cut")?;
    check_file(&cut.path("disk.raw"), &model)?.require("after a power cut")?;
    drop(cut);
    drop(file);
    ground.remount()?;
    let found = check_file(&image, &model)?.require("after a remount")?;
    println!("     read back: {found}");
    Ok(())
}
