//! Doing as the host asks: scripts come through a virtio-serial port, what they say and their status goes back.
//! In a domain of Xen's they come through xenstore, from dom0 (`domain.rs`).
//!
//! Host to guest: `LEN\n` and so many bytes of a script. Guest to host: first `ready TEXT\n`, then for each script
//! `STATUS LEN\n` and so many bytes of output. The host has the same in `lab/src/agent.rs`.

use crate::domain::Ear;
use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::process::WaitOptions;
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The port's name on QEMU's command line.
const PORT: &str = "lab";

/// The word of the kernel's command line that has us listen to xenstore.
const DOMAIN: &str = "lab.agent=xenstore";

/// Serves the host until the machine ends.
pub(crate) fn serve() -> Result<Infallible> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let words = fs::read_to_string("/proc/cmdline")?;
    if words.split_whitespace().any(|word| word == DOMAIN) {
        let mut ear = Ear::open(release.trim())?;
        loop {
            let (status, said) = run(&ear.receive()?)?;
            ear.answer(status, &said)?;
        }
    }
    let path = port()?;
    let mut port = File::options().read(true).write(true).open(&path).context("open the port")?;
    port.write_all(format!("ready {}\n", release.trim()).as_bytes())?;
    loop {
        let script = receive(&mut port)?;
        let (status, said) = run(&script)?;
        port.write_all(format!("{status} {}\n", said.len()).as_bytes())?;
        port.write_all(&said).context("answer the host")?;
    }
}

/// The device of our port. There is no udev that would give it a name.
fn port() -> Result<PathBuf> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(60) {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten() {
            let entry = entry?;
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == PORT {
                return Ok(PathBuf::from("/dev").join(entry.file_name()));
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    bail!("no virtio-serial port is called {PORT}")
}

fn receive(port: &mut File) -> Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        match byte(port)? {
            b'\n' => break,
            letter => line.push(letter),
        }
    }
    let len: usize = String::from_utf8(line)?.trim().parse().context("a length")?;
    (0..len).map(|_| byte(port)).collect()
}

/// One byte. While the host is not connected there are none, which is no end.
fn byte(port: &mut File) -> Result<u8> {
    let mut byte = [0];
    loop {
        match port.read(&mut byte) {
            Ok(0) => thread::sleep(Duration::from_millis(20)),
            Ok(_) => return Ok(byte[0]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("hear the host"),
        }
    }
}

/// Runs a script and returns its status, 128 and more for a signal, and what it said.
fn run(script: &[u8]) -> Result<(i32, Vec<u8>)> {
    bury()?;
    fs::write("/run/script", script)?;
    let (mut reader, writer) = std::io::pipe()?;
    let mut command = Command::new("/bin/sh");
    command.arg("/run/script").env_clear().env("PATH", "/sbin:/bin").env("HOME", "/");
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().context("run /bin/sh")?;
    // Ours are the last ends for writing.
    drop(command);
    let mut said = Vec::new();
    reader.read_to_end(&mut said)?;
    let status = child.wait()?;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    Ok((code.context("neither ended nor killed")?, said))
}

/// The first process inherits what scripts left running, and is the one to ask how it ended.
fn bury() -> Result<()> {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) | Err(Errno::CHILD) => return Ok(()),
            Err(error) => return Err(error).context("ask for the ends of processes"),
        }
    }
}
