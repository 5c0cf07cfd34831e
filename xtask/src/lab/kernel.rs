//! A real kernel file system over the export: it must see the I/O errors of 2006, and recover from them.

use crate::command::{command, output, output_within, start, until, within};
use crate::lab::DiskFull;
use crate::lab::disk_full::{FREE, allocated, mib};
use crate::lab::ground::{Ground, MIB, attach_loop};
use crate::lab::kernel_log::KernelLog;
use crate::model::Model;
use crate::server::{Cache, Server};
use crate::sweep;
use crate::work::{Work, drop_caches};
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

/// A little more than what `dd` writes, so that it is the host that has no room and not the guest.
const SIZE: u64 = 1280 * MIB;
const PARTITION_AT: u64 = MIB;
/// The files that are safe before the disk fills up.
const FILES: u64 = 20;
const FILE_LEN: usize = 1 << 20;

pub(crate) fn run(work: &Work, arguments: &DiskFull) -> Result<()> {
    let ground = Ground::with_free(work, "host", FREE)?;
    let image = ground.path("disk.raw");
    File::create(&image)?.set_len(SIZE)?;
    let mut server = arguments.plan(image.clone(), Cache::Direct).start(work.folder())?;
    let mut log = KernelLog::from_now()?;
    let safe = Model::new(FILES * FILE_LEN as u64);

    let guest = Guest::attach(work, &server)?;
    output_within(LONG, &mut command("mkfs.ext3", ["-q", "-F", &guest.partition]))?;
    guest.mount()?;
    write_safe_files(&guest.mount, &safe)?;
    let dd = within(
        LONG,
        command("dd", ["if=/dev/zero", "bs=1M", "count=1024", "conv=fsync"])
            .arg(format!("of={}", guest.mount.join("big").display())),
    )?;
    println!("     dd: {}", dd.stderr.lines().next().unwrap_or("nothing"));
    ensure!(!dd.status.success(), "dd wrote and synced 1 GiB where {FREE} bytes fit\n{}", dd.said());
    println!("     {} MiB of the image are allocated", mib(allocated(&image)?));
    let error = until_logged(&mut log, &format!("error, dev {}, sector", name(&guest.disk)))?;
    println!("     kernel: {error}");
    // No look at the safe files yet: the kernel has dropped metadata that it could not write in its place,
    // and has it only in the journal until that is replayed.
    guest.unmount()?;
    guest.detach()?;
    server.must_live()?;

    ground.enlarge()?;
    let guest = Guest::attach(work, &server)?;
    let must_recover = output(&mut command("dumpe2fs", ["-h", &guest.partition]))?.contains("needs_recovery");
    guest.mount()?;
    if must_recover {
        let recovered = format!("EXT4-fs ({}): recovery complete", name(&guest.partition));
        let recovery = until_logged(&mut log, &recovered)?;
        println!("     kernel: {recovery}");
    }
    drop_caches()?;
    check_safe_files(&guest.mount, &safe).context("after space was added")?;
    // The file system that recovered is a working one.
    let more = guest.mount.join("more");
    fs::write(&more, [1; 1 << 20])?;
    File::open(&more)?.sync_all().context("sync after space was added")?;
    guest.unmount()?;
    let check = within(LONG, &mut command("e2fsck", ["-f", "-n", &guest.partition]))?;
    ensure!(check.status.success(), "e2fsck -fn found errors: {}\n{}", check.status, check.said());
    println!("     e2fsck: {}", check.stdout.lines().last().unwrap_or("nothing"));
    guest.detach()?;
    server.stop()
}

const LONG: Duration = Duration::from_secs(240);

fn name(device: &str) -> &str {
    device.trim_start_matches("/dev/")
}

fn until_logged(log: &mut KernelLog, what: &str) -> Result<String> {
    let mut found = None;
    until(Duration::from_secs(10), &format!("the kernel logs `{what}`"), || {
        found = log.lines()?.iter().find(|line| line.contains(what)).cloned();
        Ok(found.is_some())
    })?;
    found.context("it was just found")
}

fn write_safe_files(folder: &Path, safe: &Model) -> Result<()> {
    for number in 0..FILES {
        let mut file = File::create(folder.join(format!("safe{number}")))?;
        file.write_all(&safe.contents(number * FILE_LEN as u64, FILE_LEN, 1))?;
        file.sync_all()?;
    }
    File::open(folder)?.sync_all().context("sync the folder")
}

fn check_safe_files(folder: &Path, safe: &Model) -> Result<()> {
    for number in 0..FILES {
        let path = folder.join(format!("safe{number}"));
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let wanted = safe.contents(number * FILE_LEN as u64, FILE_LEN, 1);
        ensure!(bytes == wanted, "{} was synced and is not what was written", path.display());
    }
    Ok(())
}

/// The export as a local disk: nbdfuse makes it a file, a loop device makes that a disk with a partition.
struct Guest {
    nbdfuse: Child,
    fuse: PathBuf,
    /// Named by the block layer's errors.
    disk: String,
    /// The same, or its first partition.
    partition: String,
    mount: PathBuf,
}

impl Guest {
    fn attach(work: &Work, server: &Server) -> Result<Guest> {
        let fuse = work.folder().join("fuse");
        let mount = work.folder().join("guest");
        fs::create_dir_all(&fuse)?;
        fs::create_dir_all(&mount)?;
        let disk = fuse.join("disk");
        // It has a line to say for each write that fails.
        let words = File::create(work.folder().join("nbdfuse.log"))?;
        let mut nbdfuse = start(
            command("nbdfuse", [] as [&str; 0])
                .arg(&disk)
                .arg(server.uri())
                .process_group(0)
                .stdin(Stdio::null())
                .stdout(words.try_clone()?)
                .stderr(words),
        )?;
        sweep::record(work.folder(), nbdfuse.id())?;
        until(Duration::from_secs(20), "nbdfuse shows the disk", || {
            ensure!(nbdfuse.try_wait()?.is_none(), "nbdfuse ended");
            // Until the mount is there, this is a file that does not exist.
            Ok(fs::metadata(&disk).is_ok_and(|disk| disk.size() == SIZE))
        })?;
        let whole = attach_loop(&disk, &["--partscan"])?;
        if !output(&mut command("sfdisk", ["--dump", &whole])).is_ok_and(|table| table.contains("type=83")) {
            let sfdisk = format!("echo 'start={}, type=83' | sfdisk --quiet {whole}", PARTITION_AT / 512);
            output(&mut command("sh", ["-c", &sfdisk]))?;
        }
        let first = format!("{whole}p1");
        let (disk, partition) = if Path::new("/sys/class/block").join(name(&first)).exists() {
            until(Duration::from_secs(10), &format!("{first} appears"), || Ok(Path::new(&first).exists()))?;
            (whole, first)
        } else {
            // This kernel reads no partition tables: take the same range by hand.
            output(&mut command("losetup", ["--detach", &whole]))?;
            let part = attach_loop(&disk, &["--offset", &PARTITION_AT.to_string()])?;
            (part.clone(), part)
        };
        Ok(Guest { nbdfuse, fuse, disk, partition, mount })
    }

    fn mount(&self) -> Result<()> {
        output_within(LONG, command("mount", ["-t", "ext3", &self.partition]).arg(&self.mount))?;
        Ok(())
    }

    fn unmount(&self) -> Result<()> {
        output_within(LONG, command("umount", [] as [&str; 0]).arg(&self.mount))?;
        Ok(())
    }

    fn detach(mut self) -> Result<()> {
        for device in sweep::loops(&self.fuse)? {
            output(command("losetup", ["--detach"]).arg(device))?;
        }
        until(Duration::from_secs(10), "the loop device is gone", || {
            Ok(sweep::loops(&self.fuse)?.is_empty())
        })?;
        output(command("umount", [] as [&str; 0]).arg(&self.fuse))?;
        let ended = crate::command::wait(&mut self.nbdfuse, Duration::from_secs(10))?;
        ensure!(ended.is_some(), "nbdfuse did not end after its file system was unmounted");
        Ok(())
    }
}
