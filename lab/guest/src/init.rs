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
    let words = fs::read_to_string("/proc/cmdline")?;
    load_modules(Path::new("/modules"), &words).context("load modules")?;
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
fn load_modules(folder: &Path, words: &str) -> Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        files.push(entry?.path());
    }
    files.sort();
    for file in files {
        let name =
            file.file_stem().and_then(|name| name.to_str()?.split_once('-')).context("a strange name")?.1;
        let options = CString::new(options(name, words))?;
        init_module(&fs::read(&file)?, &options).with_context(|| file.display().to_string())?;
    }
    Ok(())
}

/// What the kernel's command line has for a module, `MODULE.OPTION=VALUE`: the kernel leaves it to whoever loads that.
fn options(module: &str, words: &str) -> String {
    let options = words.split_whitespace().filter_map(|word| word.strip_prefix(module)?.strip_prefix('.'));
    options.collect::<Vec<_>>().join(" ")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_given_its_words() {
        let words = "quiet xen_blkfront.max_ring_page_order=4 xen_blkfront.max=8 xen.a=1";
        assert_eq!(options("xen_blkfront", words), "max_ring_page_order=4 max=8");
        assert_eq!(options("ext4", words), "");
    }
}
