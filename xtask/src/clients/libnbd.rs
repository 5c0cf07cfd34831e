//! libnbd's tools: nbdinfo, nbdcopy.

use super::{Check, MIB, Stage, fill, same};
use crate::command::{command, output, within};
use crate::server::Kind;
use anyhow::{Context, Result, ensure};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

pub(crate) const CHECKS: &[Check] = &[
    ("nbdinfo tells what the server can", capabilities),
    ("nbdinfo --list names the one export", list),
    ("nbdinfo --map is what SEEK_DATA says", map),
    ("nbdinfo of a read-only disk", read_only),
    ("nbdinfo of a disk with an odd tail", odd_tail),
    ("nbdcopy to the server", copy_to),
    ("nbdcopy from the server", copy_from),
    ("nbdsh starts with a URI", shell),
];

fn nbdinfo(arguments: &[&str], uri: &str) -> Command {
    let mut nbdinfo = command("nbdinfo", arguments);
    nbdinfo.arg(uri);
    nbdinfo
}

fn capabilities(stage: &Stage<'_>) -> Result<()> {
    let image = stage.image(64 * MIB)?;
    let server = stage.serve(&image)?;
    let uri = server.uri();
    let size = output(&mut nbdinfo(&["--size"], &uri))?;
    ensure!(size.trim() == (64 * MIB).to_string(), "the size is {size}");
    let mut can = vec!["connect", "read", "write", "trim", "zero", "flush", "fua", "multi-conn"];
    can.extend(["df", "structured-reply"]);
    if stage.is_tapdisk() {
        can.extend(["cache", "fast-zero"]);
    }
    for what in can {
        let yes = within(LIMIT, &mut nbdinfo(&["--can", what], &uri))?.status.success();
        ensure!(yes, "nbdinfo --can {what} says no");
    }
    for what in ["read-only", "rotational", "tls"] {
        let yes = within(LIMIT, &mut nbdinfo(&["--is", what], &uri))?.status.success();
        ensure!(!yes, "nbdinfo --is {what} says yes");
    }
    let all = output(&mut nbdinfo(&[], &uri))?;
    ensure!(all.contains("base:allocation"), "no base:allocation in\n{all}");
    if stage.is_tapdisk() {
        for line in ["block_size_minimum: 1", "block_size_preferred: 4096", "block_size_maximum: 33554432"] {
            ensure!(all.lines().any(|found| found.trim() == line), "no `{line}` in\n{all}");
        }
    }
    stage.end(server)
}

const LIMIT: Duration = Duration::from_secs(20);

fn list(stage: &Stage<'_>) -> Result<()> {
    let image = stage.image(MIB)?;
    let server = stage.serve(&image)?;
    let all = output(&mut nbdinfo(&["--list"], &server.uri()))?;
    let exports: Vec<&str> = all.lines().filter(|line| line.starts_with("export=")).collect();
    ensure!(exports == ["export=\"\":"], "{exports:?} in\n{all}");
    stage.end(server)
}

fn map(stage: &Stage<'_>) -> Result<()> {
    let image = stage.image(64 * MIB + 4096)?;
    let file = OpenOptions::new().write(true).open(&image)?;
    for (at, len) in [(0, 4096), (MIB, MIB), (9 * MIB + 12288, 65536), (64 * MIB, 4096)] {
        file.write_all_at(&vec![7; len as usize], at)?;
    }
    file.sync_all()?;
    let wanted = extents(&image)?;
    ensure!(wanted.len() == 7, "the file system made {wanted:?} of it");
    let server = stage.serve(&image)?;
    let said = output(&mut nbdinfo(&["--map"], &server.uri()))?;
    let found = said.lines().map(mapped).collect::<Result<Vec<_>>>()?;
    ensure!(merged(&found) == wanted, "{found:?} instead of {wanted:?}");
    stage.end(server)
}

/// Where data and holes lie: offset, length, whether there is data.
type Extent = (u64, u64, bool);

/// A line of `nbdinfo --map`: offset, length, number of the state, its words.
fn mapped(line: &str) -> Result<Extent> {
    let mut fields = line.split_whitespace();
    let mut number = || fields.next().context("a short line")?.parse::<u64>().context("a number");
    let (at, len, state) = (number()?, number()?, number()?);
    ensure!(state == 0 || state == 3, "what is `{line}`?");
    Ok((at, len, state == 0))
}

fn merged(extents: &[Extent]) -> Vec<Extent> {
    let mut result: Vec<Extent> = Vec::new();
    for &(at, len, is_data) in extents {
        match result.last_mut() {
            Some(last) if last.2 == is_data && last.0 + last.1 == at => last.1 += len,
            _ => result.push((at, len, is_data)),
        }
    }
    result
}

/// The same, asked of the file system.
fn extents(image: &Path) -> Result<Vec<Extent>> {
    let file = File::open(image)?;
    let end = file.metadata()?.len();
    let mut result = Vec::new();
    let mut at = 0;
    while at < end {
        let data = match seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => end,
            Err(error) => return Err(error).context("SEEK_DATA"),
        };
        if data > at {
            result.push((at, data - at, false));
        }
        at = data;
        if data < end {
            at = seek(&file, SeekFrom::Hole(data)).context("SEEK_HOLE")?;
            result.push((data, at - data, true));
        }
    }
    Ok(result)
}

fn read_only(stage: &Stage<'_>) -> Result<()> {
    let image = stage.path("disk.raw");
    fill(&image, 4 * MIB, 1)?;
    let before = fs::read(&image)?;
    let mut plan = stage.plan(&image);
    plan.read_only = true;
    let server = plan.start(stage.work.folder())?;
    let uri = server.uri();
    let yes = within(LIMIT, &mut nbdinfo(&["--is", "read-only"], &uri))?.status.success();
    ensure!(yes, "nbdinfo --is read-only says no");
    // Past the client's own check, to the server's. QEMU does not say EPERM.
    let errno = if stage.arguments.server == Kind::QemuNbd { "EINVAL" } else { "EPERM" };
    let script = "import nbd, errno\n\
        h.set_strict_mode(0)\n\
        calls = (lambda: h.pwrite(bytes(512), 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0))\n\
        for call in calls:\n\
        \x20   try: call(); raise SystemExit('a read-only disk was written')\n\
        \x20   except nbd.Error as error: assert error.errnum == errno.EPERM, error\n\
        h.flush()\n"
        .replace("EPERM", errno);
    output(&mut nbdsh(&["-u", &uri, "-c", &script]))?;
    stage.end(server)?;
    ensure!(fs::read(&image)? == before, "the image was changed");
    Ok(())
}

fn odd_tail(stage: &Stage<'_>) -> Result<()> {
    if stage.arguments.server == Kind::QemuNbd {
        return Ok(()); // It counts in sectors.
    }
    let len = 4 * MIB + 777;
    let image = stage.path("disk.raw");
    fill(&image, len, 2)?;
    let mut wanted = fs::read(&image)?;
    let server = stage.serve(&image)?;
    let uri = server.uri();
    let size = output(&mut nbdinfo(&["--size"], &uri))?;
    ensure!(size.trim() == len.to_string(), "the size is {size}");
    let script = format!(
        "h.pwrite(b'x' * 500, {})\nh.zero(3, {})\nh.flush()\nassert h.pread(1, {}) == b'x'",
        len - 600,
        len - 2000,
        len - 101
    );
    output(&mut nbdsh(&["-u", &uri, "-c", &script]))?;
    let end = wanted.len();
    wanted[end - 600..end - 100].fill(b'x');
    wanted[end - 2000..end - 1997].fill(0);
    stage.end(server)?;
    ensure!(fs::read(&image)? == wanted, "the image is not what was written");
    Ok(())
}

fn nbdsh(arguments: &[&str]) -> Command {
    // nbdsh takes the first Python in the PATH, and only Debian's has the bindings.
    let mut nbdsh = command("/usr/bin/python3", ["-m", "nbd"]);
    nbdsh.args(arguments);
    nbdsh
}

fn shell(stage: &Stage<'_>) -> Result<()> {
    let image = stage.image(MIB)?;
    let server = stage.serve(&image)?;
    let said = output(&mut nbdsh(&["-u", &server.uri(), "-c", "print(h.get_size())"]))?;
    ensure!(said.trim() == MIB.to_string(), "nbdsh says {said}");
    stage.end(server)
}

fn copy_to(stage: &Stage<'_>) -> Result<()> {
    let source = stage.path("source.raw");
    fill(&source, 200 * MIB, 3)?;
    for how in [&[] as &[&str], &["--synchronous"], &["--connections=4", "--requests=64", "--flush"]] {
        let image = stage.path("disk.raw");
        // Old contents: where the source has holes, the server must make zeroes.
        fill(&image, 200 * MIB, 4)?;
        let server = stage.serve(&image)?;
        output(command("nbdcopy", how).arg(&source).arg(server.uri()))?;
        stage.end(server)?;
        same(&source, &image).with_context(|| format!("nbdcopy {how:?}"))?;
    }
    Ok(())
}

fn copy_from(stage: &Stage<'_>) -> Result<()> {
    let image = stage.path("disk.raw");
    fill(&image, 200 * MIB, 5)?;
    let server = stage.serve(&image)?;
    for how in [&[] as &[&str], &["--synchronous"], &["--connections=4", "--requests=64"]] {
        let copy = stage.path("copy.raw");
        output(command("nbdcopy", how).arg(server.uri()).arg(&copy))?;
        same(&image, &copy).with_context(|| format!("nbdcopy {how:?}"))?;
        fs::remove_file(copy)?;
    }
    stage.end(server)
}
