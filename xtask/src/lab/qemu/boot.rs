//! A booted machine and the servers of its disks.

use crate::lab::ground::Ground;
use crate::lab::qemu::Linux;
use crate::lab::qemu::server::{Place, Plan, Server};
use crate::lab::qemu::stage::Stage;
use crate::sweep;
use anyhow::{Context, Result, ensure};
use lab::linux;
use lab::machine::Machine;
use lab::shell::Shell as _;
use std::path::PathBuf;

/// How a machine is booted.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) linux: Linux,
    pub(crate) cpus: u16,
    /// For the kernel's command line.
    pub(crate) words: &'static str,
}

/// A machine that runs. Dropped, all of it is ended, in this order.
pub(crate) struct Boot<'a> {
    /// None only between a power cut and the next start.
    machine: Option<Machine>,
    servers: Vec<Server>,
    /// The small file systems on which images lie.
    pub(crate) grounds: Vec<Ground>,
    settings: Settings,
    pub(crate) stage: &'a Stage,
    logs: PathBuf,
    /// So many machines were started.
    starts: u32,
}

impl<'a> Boot<'a> {
    /// Starts the servers, then the machine: the first disk is /dev/vda, and so on.
    pub(crate) fn new(
        stage: &'a Stage,
        name: &str,
        settings: Settings,
        grounds: Vec<Ground>,
        disks: Vec<Plan>,
    ) -> Result<Boot<'a>> {
        let logs = stage.logs(&format!("{name}-{}", settings.linux))?;
        let place = Place {
            kind: stage.arguments.server,
            program: stage.arguments.program.clone(),
            sockets: stage.sockets().to_owned(),
            logs: logs.clone(),
            sweep: stage.work.folder().to_owned(),
        };
        let mut boot = Boot { machine: None, servers: Vec::new(), grounds, settings, stage, logs, starts: 0 };
        for plan in disks {
            boot.servers.push(Server::start(plan, place.clone())?);
        }
        boot.start()?;
        Ok(boot)
    }

    /// Starts the machine. What its kernel said at the start is of no interest to scenarios.
    pub(crate) fn start(&mut self) -> Result<()> {
        ensure!(self.machine.is_none(), "the machine runs");
        self.servers.iter_mut().try_for_each(Server::must_live)?;
        self.starts += 1;
        let bootable = self.stage.bootable(self.settings.linux)?;
        let disk = |server: &Server| linux::Disk { socket: server.socket(), queues: server.plan().queues };
        let plan = linux::Plan {
            tools: &self.stage.tools,
            kernel: &bootable.kernel,
            initramfs: &bootable.initramfs,
            cpus: self.settings.cpus,
            memory_mib: 512,
            words: self.settings.words,
            disks: self.servers.iter().map(disk).collect(),
            sockets: self.stage.sockets(),
            console: self.logs.join(format!("console-{}.log", self.starts)),
        };
        let machine = plan.start().with_context(|| self.about_servers())?;
        sweep::record(self.stage.work.folder(), machine.pid())?;
        self.machine.insert(machine).sh("dmesg -c > /run/boot.log")?;
        Ok(())
    }

    /// Cuts the power.
    pub(crate) fn cut_the_power(&mut self) -> Result<()> {
        self.machine.take().context("the machine does not run")?.kill()
    }

    pub(crate) fn machine(&mut self) -> Result<&mut Machine> {
        self.machine.as_mut().context("the machine does not run")
    }

    /// The server of the disk of that name.
    pub(crate) fn server(&mut self, name: &str) -> Result<&mut Server> {
        let server = self.servers.iter_mut().find(|server| server.plan().name == name);
        server.with_context(|| format!("no disk is called {name}"))
    }

    /// Runs a script in the guest that must succeed, and returns what it said.
    pub(crate) fn sh(&mut self, script: &str) -> Result<String> {
        self.machine()?.sh(script)
    }

    /// What whoever looks for a failure's cause wants to see.
    pub(crate) fn about(&self) -> String {
        let machine = self.machine.as_ref().map_or_else(|| "no machine runs".to_owned(), Machine::about);
        format!("{}\n{machine}", self.about_servers())
    }

    fn about_servers(&self) -> String {
        self.servers.iter().map(Server::about).collect::<Vec<_>>().join("\n\n")
    }

    /// Ends all of it; each server must say that all went well.
    pub(crate) fn end(mut self) -> Result<()> {
        if self.machine.is_some() {
            self.cut_the_power()?;
        }
        self.servers.iter_mut().try_for_each(Server::stop)
    }
}
