//! A server of ours or of our peers: started on a raw image, waited for, stopped by its own pid.

use crate::command::{self, cargo, start, target, until, wait};
use crate::sweep;
use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, OpenOptions};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Which program serves. The peers are here to prove the tests, not the peers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Kind {
    Tapdisk,
    QemuNbd,
    Nbdkit,
}

/// How the server reaches the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Cache {
    Direct,
    Buffered,
}

/// What is started, again and again.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) kind: Kind,
    /// The program, if not the one that cargo built or the PATH names.
    pub(crate) program: Option<PathBuf>,
    pub(crate) cache: Cache,
    pub(crate) image: PathBuf,
    pub(crate) read_only: bool,
    /// More arguments; only tapdisk has any.
    pub(crate) more: Vec<String>,
}

impl Plan {
    fn program(&self) -> Result<PathBuf> {
        if let Some(program) = &self.program {
            return Ok(program.clone());
        }
        Ok(match self.kind {
            Kind::Tapdisk => target()?.join("release/tapdisk"),
            Kind::QemuNbd => "qemu-nbd".into(),
            Kind::Nbdkit => "nbdkit".into(),
        })
    }

    fn command(&self, socket: &Path) -> Result<Command> {
        let program = self.program()?;
        let mut command = Command::new(&program);
        match self.kind {
            Kind::Tapdisk => {
                let cache = if self.cache == Cache::Direct { "direct" } else { "buffered" };
                command.args(["serve", "--cache", cache, "--nbd"]).arg(format!("unix:{}", socket.display()));
                if self.read_only {
                    command.arg("--read-only");
                }
                command.args(&self.more).arg(&self.image);
            }
            Kind::QemuNbd => {
                let cache = if self.cache == Cache::Direct { "none" } else { "writeback" };
                command.args(["--persistent", "--shared=128", "--format=raw", "--discard=unmap"]);
                command.arg(format!("--cache={cache}"));
                if self.read_only {
                    command.arg("--read-only");
                }
                command.arg(format!("--socket={}", socket.display())).arg(&self.image);
            }
            Kind::Nbdkit => {
                command.args(["--foreground", "--unix"]).arg(socket);
                if self.read_only {
                    command.arg("--readonly");
                }
                command.arg("file").arg(&self.image);
            }
        }
        if self.kind != Kind::Tapdisk {
            ensure!(self.more.is_empty(), "{:?} does not know {:?}", self.kind, self.more);
        }
        Ok(command)
    }

    /// Starts it in a folder for its socket and its log, and waits until it accepts connections.
    pub(crate) fn start(&self, folder: &Path) -> Result<Server> {
        let socket = folder.join("nbd.sock");
        // sun_path has 108 bytes, the final zero included.
        ensure!(
            socket.as_os_str().len() < 108,
            "{} is too long for a socket: set CARGO_TARGET_DIR to something shorter",
            socket.display()
        );
        if self.kind != Kind::Tapdisk && socket.exists() {
            // A peer that was killed leaves its socket and then can't listen; tapdisk must clear its own.
            fs::remove_file(&socket)?;
        }
        let log = folder.join("server.log");
        let words = OpenOptions::new().create(true).append(true).open(&log)?;
        let mut command = self.command(&socket)?;
        // In a group of its own, so that Ctrl-C reaches it only through the sweep, in order.
        command.process_group(0).stdin(Stdio::null()).stdout(words.try_clone()?).stderr(words);
        let child = start(&mut command)?;
        let mut server = Server { child, socket, log, kind: self.kind, is_over: false };
        sweep::record(folder, server.child.id())?;
        until(Duration::from_secs(40), "the server accepts connections", || {
            if let Some(status) = server.child.try_wait()? {
                bail!("`{}` ended at once: {status}\n{}", command::words(&command), server.said());
            }
            Ok(UnixStream::connect(&server.socket).is_ok())
        })?;
        Ok(server)
    }
}

/// Builds tapdisk if that is what will be served with.
pub(crate) fn build(kind: Kind, program: Option<&PathBuf>) -> Result<()> {
    if kind == Kind::Tapdisk && program.is_none() {
        command::run(&mut cargo(["build", "--release", "--quiet", "--package", "tapdisk"]))?;
    }
    Ok(())
}

/// A running server. Dropped, it is killed.
pub(crate) struct Server {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
    kind: Kind,
    /// We know how it ended.
    is_over: bool,
}

impl Server {
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// What it has said so far.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks it to end; it must drain, flush, and say that all went well.
    pub(crate) fn stop(self) -> Result<()> {
        let (kind, log) = (self.kind, self.log.clone());
        let status = self.end()?;
        // qemu-nbd and nbdkit also end with 0 at SIGTERM.
        ensure!(
            status.success(),
            "{kind:?} did not end well: {status}\n{}",
            fs::read_to_string(log).unwrap_or_default()
        );
        Ok(())
    }

    /// Asks it to end, and says how it did.
    pub(crate) fn end(mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.is_over = true;
        wait(&mut self.child, Duration::from_secs(30))?.context("the server did not end in 30 s")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.is_over = true;
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).context("signal the server")
    }

    /// Fails if it has ended by itself.
    pub(crate) fn must_live(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the server is gone: {status}\n{}", self.said()),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Seen here only when a check failed, and then this may well be why.
        if let Ok(Some(status)) = self.child.try_wait()
            && !self.is_over
        {
            eprintln!("xtask: the server had ended by itself: {status}\n{}", self.said());
        }
        let ended = self.child.kill().and_then(|()| self.child.wait());
        if let Err(error) = ended {
            eprintln!("xtask: could not end the server: {error}");
        }
    }
}
