//! What serves a disk of a domain, in dom0: tapdisk, or the kernel's own back end as the reference.

use crate::command::until;
use crate::lab::xen::boot::Boot;
use crate::lab::xen::nodes;
use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use lab::shell::Shell;
use std::time::Duration;

pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Who serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Kind {
    Tapdisk,
    Blkback,
}

/// A disk and how it is served.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Names its log.
    pub(crate) name: String,
    /// The name of the domain.
    pub(crate) domain: &'static str,
    /// The disk's name there: `xvdb`.
    pub(crate) disk: &'static str,
    /// Its path in dom0.
    pub(crate) image: String,
    /// If it must be this one, whoever is asked for.
    pub(crate) kind: Option<Kind>,
    /// Whether tapdisk finds nodes that a toolstack wrote.
    pub(crate) has_nodes: bool,
    /// More of tapdisk's arguments.
    pub(crate) more: String,
}

impl Plan {
    /// The disk is called by its domain and its name there.
    pub(crate) fn new(domain: &'static str, disk: &'static str, image: &str) -> Plan {
        let name = format!("{domain}-{disk}");
        Plan {
            name,
            domain,
            disk,
            image: image.to_owned(),
            kind: None,
            has_nodes: false,
            more: String::new(),
        }
    }

    pub(crate) fn by(self, kind: Kind) -> Plan {
        Plan { kind: Some(kind), ..self }
    }

    pub(crate) fn with(mut self, more: &str) -> Plan {
        self.more = format!("{} {more}", self.more);
        self
    }
}

/// What serves a disk, running or ended.
pub(crate) struct Server {
    pub(crate) plan: Plan,
    pub(crate) domain: u32,
    process: Process,
}

enum Process {
    Tapdisk {
        pid: u32,
        /// So many times it was started.
        starts: usize,
    },
    /// Through this loop device.
    Blkback { device: String },
}

impl Server {
    /// Starts it, and waits until the domain has the disk.
    pub(crate) fn attach(boot: &mut Boot<'_>, plan: Plan) -> Result<Server> {
        let mut server = Server::start(boot, plan)?;
        server.wait_for_the_disk(boot)?;
        Ok(server)
    }

    /// Starts it, and does not wait.
    pub(crate) fn start(boot: &mut Boot<'_>, plan: Plan) -> Result<Server> {
        let domain = boot.domain(plan.domain)?.id;
        let process = match plan.kind.unwrap_or(boot.stage.arguments.server) {
            Kind::Tapdisk => Process::Tapdisk { pid: spawn(boot, &plan, domain)?, starts: 1 },
            Kind::Blkback => Process::Blkback { device: through_a_loop(boot, &plan, domain)? },
        };
        Ok(Server { plan, domain, process })
    }

    /// Waits until the domain has the disk.
    pub(crate) fn wait_for_the_disk(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let device = format!("test -b /dev/{}", self.plan.disk);
        until(PATIENCE, "the domain has the disk", || {
            self.must_live(boot)?;
            Ok(boot.guest(self.plan.domain)?.run(&device)?.status == 0)
        })
    }

    /// Starts it again after its end.
    pub(crate) fn start_again(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        ensure!(self.ended(boot)?.is_some(), "it still runs");
        let fresh = spawn(boot, &self.plan, self.domain)?;
        if let Process::Tapdisk { pid, starts } = &mut self.process {
            *pid = fresh;
            *starts += 1;
        }
        Ok(())
    }

    /// Waits until it says that it serves. A signal before that would end it as it ends any process.
    pub(crate) fn wait_until_it_serves(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let Process::Tapdisk { starts, .. } = self.process else { return Ok(()) };
        until(PATIENCE, "tapdisk says what it serves", || {
            self.must_live(boot)?;
            Ok(self.said(boot)?.lines().filter(|line| line.starts_with("Serving ")).count() >= starts)
        })
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        self.must_live(boot)?;
        self.signal(boot, "KILL")?;
        let status = self.wait(boot)?;
        ensure!(status == 128 + 9, "killed, and it ended with {status}");
        Ok(())
    }

    pub(crate) fn signal(&self, boot: &mut Boot<'_>, name: &str) -> Result<()> {
        match &self.process {
            Process::Tapdisk { pid, .. } => boot.sh(&format!("kill -{name} {pid}")).map(drop),
            Process::Blkback { .. } => bail!("the kernel takes no signals"),
        }
    }

    /// Asks it to end; it must say that all went well.
    pub(crate) fn stop(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        self.must_live(boot)?;
        self.signal(boot, "TERM")?;
        self.must_end_well(boot)
    }

    /// Waits for its end, which must be a good one.
    pub(crate) fn must_end_well(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let status = self.wait(boot)?;
        ensure!(status == 0, "{} did not end well: {status}\n{}", self.plan.name, self.said(boot)?);
        Ok(())
    }

    /// Waits for its end, and returns its status.
    pub(crate) fn wait(&mut self, boot: &mut Boot<'_>) -> Result<i32> {
        let mut status = None;
        until(PATIENCE, &format!("{} has ended", self.plan.name), || {
            status = self.ended(boot)?;
            Ok(status.is_some())
        })?;
        status.context("it has just ended")
    }

    /// Fails if it has ended.
    pub(crate) fn must_live(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        match self.ended(boot)? {
            None => Ok(()),
            Some(status) => bail!("{} has ended: {status}\n{}", self.plan.name, self.said(boot)?),
        }
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&self, boot: &mut Boot<'_>) -> Result<Option<i32>> {
        let Process::Tapdisk { .. } = self.process else { return Ok(None) };
        let status = boot.sh(&format!("cat /run/serve/{}/status 2> /dev/null || true", self.plan.name))?;
        if status.is_empty() {
            return Ok(None);
        }
        Ok(Some(status.parse().with_context(|| format!("a status of {status}"))?))
    }

    /// What it has said so far.
    pub(crate) fn said(&self, boot: &mut Boot<'_>) -> Result<String> {
        boot.sh(&format!("cat /run/logs/{}.log", self.plan.name))
    }

    /// Takes the disk from a domain that uses it no more.
    pub(crate) fn detach(mut self, boot: &mut Boot<'_>) -> Result<()> {
        let Plan { disk, domain, .. } = self.plan;
        match &self.process {
            Process::Tapdisk { .. } => {
                boot.sh(&format!("tapdisk detach {}:{disk} 2>&1", self.domain))?;
                self.must_end_well(boot)?;
            }
            Process::Blkback { device } => {
                boot.sh(&nodes::close(self.domain, disk, "vbd")?)?;
                free(boot, device)?;
            }
        }
        let is_there = boot.guest(domain)?.run(&format!("test -e /sys/block/{disk}"))?.status == 0;
        ensure!(!is_there, "the domain still has {disk}");
        Ok(())
    }

    /// Its domain is gone: so must it be.
    pub(crate) fn follow(mut self, boot: &mut Boot<'_>) -> Result<()> {
        match &self.process {
            Process::Tapdisk { .. } => self.must_end_well(boot).context("its domain is gone"),
            Process::Blkback { device } => {
                boot.sh(&format!("xenstore-rm /local/domain/0/backend/vbd/{} 2>&1", self.domain))?;
                free(boot, device)
            }
        }
    }
}

fn spawn(boot: &mut Boot<'_>, plan: &Plan, domain: u32) -> Result<u32> {
    let Plan { name, disk, image, more, .. } = plan;
    let nodes = if plan.has_nodes { "" } else { "--create-nodes" };
    let command = format!("tapdisk serve --xen {domain}:{disk} {nodes}{more} {image}");
    let pid = boot.sh(&format!(
        "mkdir -p /run/serve/{name}; cd /run/serve/{name}; rm -f pid status; echo '$ {command}' >> /run/logs/{name}.log\n\
         ({command} >> /run/logs/{name}.log 2>&1 & echo $! > pid.new; mv pid.new pid\n\
         wait $!; echo $? > status.new; mv status.new status) > /dev/null 2>&1 &\n\
         until test -e pid; do sleep 0.05; done; cat pid"
    ))?;
    pid.parse().with_context(|| format!("a strange number of a process: {pid}"))
}

/// Has the kernel serve the disk.
fn through_a_loop(boot: &mut Boot<'_>, plan: &Plan, domain: u32) -> Result<String> {
    let Plan { disk, image, .. } = plan;
    let number = boot.sh(&format!(
        "set -e; losetup -f {image}; device=$(losetup -a | grep {image} | cut -d: -f1); echo ${{device#/dev/loop}}"
    ))?;
    let physical = format!("7:{number}");
    boot.sh(&nodes::write(domain, disk, "vbd", &[("physical-device", &physical)])?)?;
    Ok(format!("/dev/loop{number}"))
}

/// The kernel's back end lets go of the device in its own time.
fn free(boot: &mut Boot<'_>, device: &str) -> Result<()> {
    until(PATIENCE, "the loop device is free", || {
        Ok(boot.run(&format!("losetup -d {device} 2> /dev/null; ! losetup -a | grep -q {device}:"))?.status
            == 0)
    })
}
