//! Undoing whatever the lab has set up, found by asking the kernel and not by remembering.
//!
//! The same sweep runs before a run, after it, and at Ctrl-C, so a run that was killed leaves nothing that
//! the next one does not clear.

use anyhow::{Context, Result, ensure};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const PIDS: &str = "pids";

/// Unmounts, detaches and ends all that was set up under this folder, and removes its files.
pub(crate) fn sweep(folder: &Path) -> Result<()> {
    // Gently first: the guest's file system, then its loop device, then FUSE, then the host's file system.
    for _ in 0..4 {
        release(folder, &[])?;
        if is_released(folder)? {
            break;
        }
        // A server that holds its requests keeps the guest's file system from being unmounted.
        end_recorded(folder)?;
    }
    end_recorded(folder)?;
    if !is_released(folder)? {
        release(folder, &["--lazy"])?;
    }
    let left = || format!("{:?} and {:?}", mounts(folder), loops(folder));
    ensure!(is_released(folder)?, "could not release {}", left());
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let keep = path.file_name().is_some_and(|name| name == "lock");
        if !keep {
            remove_elsewhere(&path)?;
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }
                .with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// What folders for sockets are called: they lie where paths are short, and a link in the lab's folder leads to each.
pub(crate) const SOCKETS: &str = "tapdisk-lab-";

/// Removes the folder for sockets that this link leads to, if it is one.
fn remove_elsewhere(link: &Path) -> Result<()> {
    let Ok(elsewhere) = fs::read_link(link) else { return Ok(()) };
    let is_ours = elsewhere.file_name().is_some_and(|name| name.to_string_lossy().starts_with(SOCKETS));
    if is_ours && elsewhere.is_dir() {
        fs::remove_dir_all(&elsewhere).with_context(|| format!("remove {}", elsewhere.display()))?;
    }
    Ok(())
}

fn is_released(folder: &Path) -> Result<bool> {
    Ok(mounts(folder)?.is_empty() && loops(folder)?.is_empty())
}

fn release(folder: &Path, how: &[&str]) -> Result<()> {
    for mount in mounts(folder)?.iter().rev() {
        briefly(Command::new("umount").args(how).arg(mount))?;
        detach_loops(folder)?;
    }
    detach_loops(folder)
}

fn detach_loops(folder: &Path) -> Result<()> {
    for device in loops(folder)? {
        // A device that is mounted is only marked, and goes with its last user.
        briefly(Command::new("losetup").arg("--detach").arg(device))?;
    }
    Ok(())
}

/// Runs it for at most ten seconds. Whether it succeeded is seen afterwards, by asking the kernel again.
fn briefly(command: &mut Command) -> Result<()> {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > Duration::from_secs(10) {
            child.kill()?;
            break;
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The mount points under this folder, oldest first.
fn mounts(folder: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(plain);
    Ok(points.map(PathBuf::from).filter(|point| point.starts_with(folder)).collect())
}

/// mountinfo writes blanks and backslashes in octal.
fn plain(escaped: &str) -> String {
    escaped.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// The loop devices whose backing file is, or was, under this folder.
pub(crate) fn loops(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut devices = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        if let Ok(file) = fs::read_to_string(entry.path().join("loop/backing_file"))
            && Path::new(file.trim_end()).starts_with(folder)
        {
            devices.push(Path::new("/dev").join(entry.file_name()));
        }
    }
    Ok(devices)
}

/// Notes a process of ours, so that a later sweep can end it.
pub(crate) fn record(folder: &Path, pid: u32) -> Result<()> {
    let born = born(pid).context("it ended at once")?;
    let mut pids = OpenOptions::new().append(true).create(true).open(folder.join(PIDS))?;
    writeln!(pids, "{pid} {born}").context("note a process")
}

/// Kills the processes noted here that still live. The time of birth tells ours from a newcomer that was
/// given the same number.
fn end_recorded(folder: &Path) -> Result<()> {
    let Ok(list) = fs::read_to_string(folder.join(PIDS)) else { return Ok(()) };
    for line in list.lines() {
        let Some((pid, noted)) = line.split_once(' ') else { continue };
        let pid: u32 = pid.parse()?;
        let is_ours = || born(pid).is_some_and(|born| born == noted);
        if is_ours() {
            kill(pid)?;
            // Not with `until`, which stands still once Ctrl-C was pressed.
            let start = Instant::now();
            while is_ours() {
                ensure!(start.elapsed() < Duration::from_secs(10), "process {pid} was killed and lives");
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
    Ok(())
}

fn kill(pid: u32) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).context("a process id")?;
    match rustix::process::kill_process(pid, rustix::process::Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error).context("kill a server of an earlier run"),
    }
}

/// When a process was started, in the kernel's ticks; none once it is dead, even if nobody waited for it.
fn born(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may itself contain anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    let born = fields.nth(18)?;
    (state != "Z").then(|| born.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_living_process_has_a_time_of_birth() {
        let born = born(std::process::id()).expect("we live");
        assert!(born.parse::<u64>().is_ok());
    }

    #[test]
    fn a_folder_for_sockets_goes_with_its_link() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in [SOCKETS, "another"] {
            let folder = there.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("socket"), "").unwrap();
            std::os::unix::fs::symlink(folder, here.path().join(name)).unwrap();
        }
        sweep(here.path()).unwrap();
        assert_eq!(fs::read_dir(here.path()).unwrap().count(), 0);
        assert!(!there.path().join(SOCKETS).exists());
        assert!(there.path().join("another/socket").exists());
    }

    #[test]
    fn a_blank_in_a_mount_point_is_read_back() {
        assert_eq!(plain("/a\\040b\\134c"), "/a b\\c");
    }
}
