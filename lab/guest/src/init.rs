//! The start of the machine: file systems, modules, and the root file system on a disk if one is asked for.

use crate::agent;
use anyhow::{Context, Result, anyhow, ensure};
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::system::init_module;
use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// The word that tells a first process that it was started from the disk, with all else done.
pub(crate) const SECOND: &str = "on-disk";
/// The word of the kernel's command line that names the disk with the root file system.
const ROOT: &str = "lab.root=";
const DISK: &str = "/disk";

/// Starts the machine and serves the host. There is nothing to return to.
pub(crate) fn run(is_second: bool) -> Result<Infallible> {
    let result = if is_second { Ok(()) } else { start() };
    result.and_then(|()| agent::serve()).inspect_err(|error| println!("guest: {error:#}"))
}

fn start() -> Result<()> {
    for (kind, folder) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount_kind(kind, folder)?;
    }
    load_modules(Path::new("/modules")).context("load modules")?;
    let words = fs::read_to_string("/proc/cmdline")?;
    match words.split_whitespace().find_map(|word| word.strip_prefix(ROOT)) {
        Some(device) => move_to(device).with_context(|| format!("start from {device}")),
        None => mount_scratch(),
    }
}

fn mount_kind(kind: &str, folder: &str) -> Result<()> {
    mount(kind, folder, kind, MountFlags::empty(), None).with_context(|| format!("mount {folder}"))
}

fn mount_scratch() -> Result<()> {
    ["/run", "/tmp"].into_iter().try_for_each(|folder| mount_kind("tmpfs", folder))
}

/// The files are named `00-first.ko`, `01-second.ko`: their order is one in which each finds what it needs.
fn load_modules(folder: &Path) -> Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        files.push(entry?.path());
    }
    files.sort();
    let none = CString::default();
    for file in files {
        init_module(&fs::read(&file)?, &none).with_context(|| file.display().to_string())?;
    }
    Ok(())
}

/// Makes the file system on this disk the root, and goes on as the program that lies there.
fn move_to(device: &str) -> Result<()> {
    let start = Instant::now();
    while !Path::new(device).exists() {
        ensure!(start.elapsed() < Duration::from_secs(60), "it does not appear");
        thread::sleep(Duration::from_millis(20));
    }
    fs::create_dir_all(DISK)?;
    mount(device, DISK, "ext4", MountFlags::empty(), None).context("mount it")?;
    for folder in ["/proc", "/sys", "/dev"] {
        mount_move(folder, format!("{DISK}{folder}")).with_context(|| format!("move {folder}"))?;
    }
    std::env::set_current_dir(DISK)?;
    mount_move(".", "/").context("make it the root")?;
    std::os::unix::fs::chroot(".").context("make it the root")?;
    std::env::set_current_dir("/")?;
    mount_scratch()?;
    Err(anyhow!(Command::new("/init").arg(SECOND).exec()).context("run its /init"))
}
