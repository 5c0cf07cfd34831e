//! What serves one disk of a guest, by vhost-user: tapdisk, or the peer that proves the scenarios.

use crate::command::{start, target, until, wait, words};
use crate::sweep;
use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use lab::machine::tied_to_us;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Which program serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Kind {
    Tapdisk,
    QemuStorageDaemon,
}

/// A disk and how it is served.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Names its log and its sockets.
    pub(crate) name: &'static str,
    pub(crate) image: PathBuf,
    pub(crate) queues: u16,
    pub(crate) block_size: u32,
    pub(crate) read_only: bool,
    /// More arguments, for tapdisk only.
    pub(crate) more: Vec<String>,
}

impl Plan {
    /// One queue, blocks of 512 bytes, writable.
    pub(crate) fn new(name: &'static str, image: PathBuf) -> Plan {
        Plan { name, image, queues: 1, block_size: 512, read_only: false, more: Vec::new() }
    }

    pub(crate) fn with(mut self, more: &[&str]) -> Plan {
        self.more.extend(more.iter().map(|word| (*word).to_owned()));
        self
    }
}

/// Where a server finds and leaves things.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) kind: Kind,
    pub(crate) program: Option<PathBuf>,
    pub(crate) sockets: PathBuf,
    pub(crate) logs: PathBuf,
    /// Where processes are noted that a later sweep has to end.
    pub(crate) sweep: PathBuf,
}

/// A running server. Dropped, it is killed.
pub(crate) struct Server {
    plan: Plan,
    place: Place,
    child: Child,
    /// So many times it was started.
    starts: usize,
}

impl Server {
    /// Starts it, and waits until it listens.
    pub(crate) fn start(plan: Plan, place: Place) -> Result<Server> {
        let socket = socket(&place, plan.name);
        if socket.exists() {
            fs::remove_file(&socket)?;
        }
        let child = spawn(&plan, &place)?;
        let mut server = Server { plan, place, child, starts: 1 };
        until(Duration::from_secs(60), "the server listens", || {
            server.must_live()?;
            Ok(socket.exists())
        })?;
        Ok(server)
    }

    /// Starts it again after its end. What was left behind at its socket's path is for it to clear away.
    pub(crate) fn start_again(&mut self) -> Result<()> {
        ensure!(self.child.try_wait()?.is_some(), "it still runs");
        self.child = spawn(&self.plan, &self.place)?;
        self.starts += 1;
        Ok(())
    }

    /// Waits until it says that it serves. A signal before that would end it as it ends any process.
    pub(crate) fn wait_until_it_serves(&mut self) -> Result<()> {
        until(Duration::from_secs(60), "tapdisk says what it serves", || {
            self.must_live()?;
            Ok(self.said()?.lines().filter(|line| line.starts_with("Serving ")).count() >= self.starts)
        })
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Where QEMU finds it.
    pub(crate) fn socket(&self) -> PathBuf {
        socket(&self.place, self.plan.name)
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop).context("wait for the server")
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).context("signal the server")
    }

    /// Asks it to end; it must say that all went well.
    pub(crate) fn stop(&mut self) -> Result<()> {
        self.must_live()?;
        self.signal(Signal::TERM)?;
        let status = wait(&mut self.child, Duration::from_secs(60))?;
        ensure!(
            status.is_some_and(|status| status.success()),
            "it did not end well: {status:?}\n{}",
            self.about()
        );
        Ok(())
    }

    /// Fails if it has ended.
    pub(crate) fn must_live(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => bail!("the server has ended: {status}\n{}", self.about()),
        }
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().context("ask for the server's end")
    }

    /// What it has said so far.
    pub(crate) fn said(&self) -> Result<String> {
        let log = log(&self.place, self.plan.name);
        fs::read_to_string(&log).with_context(|| format!("read {}", log.display()))
    }

    /// What whoever looks for a failure's cause wants to see.
    pub(crate) fn about(&self) -> String {
        let command =
            command(&self.plan, &self.place).map_or_else(|error| error.to_string(), |it| words(&it));
        let said = self.said().unwrap_or_else(|error| format!("{error:#}"));
        let lines: Vec<&str> = said.lines().collect();
        let tail = lines[lines.len().saturating_sub(30)..].join("\n");
        format!("{}: {command}\n{tail}", self.plan.name)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("xtask: could not end the server of {}: {error}", self.plan.name);
        }
    }
}

fn socket(place: &Place, name: &str) -> PathBuf {
    place.sockets.join(name)
}

fn log(place: &Place, name: &str) -> PathBuf {
    place.logs.join(format!("{name}.log"))
}

fn spawn(plan: &Plan, place: &Place) -> Result<Child> {
    let log = OpenOptions::new().create(true).append(true).open(log(place, plan.name))?;
    let mut command = tied_to_us(&command(plan, place)?);
    let child = start(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log))?;
    sweep::record(&place.sweep, child.id())?;
    Ok(child)
}

fn command(plan: &Plan, place: &Place) -> Result<Command> {
    let program = match (&place.program, place.kind) {
        (Some(program), _) => program.clone(),
        (None, Kind::Tapdisk) => target()?.join("release/tapdisk"),
        (None, Kind::QemuStorageDaemon) => "qemu-storage-daemon".into(),
    };
    let mut command = Command::new(program);
    let socket = socket(place, plan.name);
    match place.kind {
        Kind::Tapdisk => tapdisk(&mut command, plan, &socket),
        Kind::QemuStorageDaemon => {
            ensure!(plan.more.is_empty(), "the peer does not know {:?}", plan.more);
            qemu_storage_daemon(&mut command, plan, &socket);
        }
    }
    Ok(command)
}

fn tapdisk(command: &mut Command, plan: &Plan, socket: &Path) {
    command.args(["serve", "--vhost-user"]).arg(socket).args(["--queues", &plan.queues.to_string()]);
    if plan.block_size != 512 {
        command.args(["--block-size", &plan.block_size.to_string()]);
    }
    if plan.read_only {
        command.arg("--read-only");
    }
    command.args(&plan.more).arg(&plan.image);
}

fn qemu_storage_daemon(command: &mut Command, plan: &Plan, socket: &Path) {
    let (mode, writable) = if plan.read_only { (",read-only=on", "off") } else { ("", "on") };
    let image = plan.image.display();
    command.arg("--blockdev").arg(format!("driver=file,node-name=file,filename={image},discard=unmap{mode}"));
    command.arg("--blockdev").arg(format!("driver=raw,file=file,node-name=disk,discard=unmap{mode}"));
    let (queues, block_size) = (plan.queues, plan.block_size);
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable={writable},\
         num-queues={queues},logical-block-size={block_size}",
        socket.display()
    ));
}
