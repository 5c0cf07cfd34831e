//! What serves a disk of a domain, in dom0: tapdisk, or the kernel's own back end as the reference.

use crate::command::until;
use crate::lab::xen::boot::Boot;
use anyhow::{Context, Result, bail, ensure};
use lab::shell::Shell;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(120);

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
    /// More of tapdisk's arguments.
    pub(crate) more: String,
}

impl Plan {
    /// The disk is called by its domain and its name there.
    pub(crate) fn new(domain: &'static str, disk: &'static str, image: &str) -> Plan {
        let name = format!("{domain}-{disk}");
        Plan { name, domain, disk, image: image.to_owned(), more: String::new() }
    }

    pub(crate) fn with(mut self, more: &str) -> Plan {
        self.more = format!("{} {more}", self.more);
        self
    }
}

/// A tapdisk in dom0, running or ended.
pub(crate) struct Server {
    pub(crate) plan: Plan,
    pub(crate) domain: u32,
    pub(crate) pid: u32,
    /// So many times it was started.
    starts: usize,
}

impl Server {
    /// Starts it, and waits until the domain has the disk.
    pub(crate) fn attach(boot: &mut Boot<'_>, plan: Plan) -> Result<Server> {
        let disk = plan.disk;
        let mut server = Server::start(boot, plan)?;
        let device = format!("test -b /dev/{disk}");
        until(PATIENCE, "the domain has the disk", || {
            server.must_live(boot)?;
            Ok(boot.guest(server.plan.domain)?.run(&device)?.status == 0)
        })?;
        Ok(server)
    }

    /// Starts it, and does not wait.
    pub(crate) fn start(boot: &mut Boot<'_>, plan: Plan) -> Result<Server> {
        let domain = boot.domain(plan.domain)?.id;
        let pid = spawn(boot, &plan, domain)?;
        Ok(Server { plan, domain, pid, starts: 1 })
    }

    /// Starts it again after its end.
    pub(crate) fn start_again(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        ensure!(self.ended(boot)?.is_some(), "it still runs");
        self.pid = spawn(boot, &self.plan, self.domain)?;
        self.starts += 1;
        Ok(())
    }

    /// Waits until it says that it serves. A signal before that would end it as it ends any process.
    pub(crate) fn wait_until_it_serves(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        until(PATIENCE, "tapdisk says what it serves", || {
            self.must_live(boot)?;
            Ok(self.said(boot)?.lines().filter(|line| line.starts_with("Serving ")).count() >= self.starts)
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
        boot.sh(&format!("kill -{name} {}", self.pid)).map(drop)
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

    fn wait(&mut self, boot: &mut Boot<'_>) -> Result<i32> {
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

    /// Has tapdisk's own subcommand detach the disk, and waits for the server's good end.
    pub(crate) fn detach(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let command = format!("tapdisk detach {}:{}", self.domain, self.plan.disk);
        boot.sh(&format!("{command} 2>&1"))?;
        self.must_end_well(boot)
    }
}

fn spawn(boot: &mut Boot<'_>, plan: &Plan, domain: u32) -> Result<u32> {
    let Plan { name, disk, image, more, .. } = plan;
    let command = format!("tapdisk serve --xen {domain}:{disk} --create-nodes {more} {image}");
    let pid = boot.sh(&format!(
        "mkdir -p /run/serve/{name}; cd /run/serve/{name}; rm -f pid status; echo '$ {command}' >> /run/logs/{name}.log\n\
         ({command} >> /run/logs/{name}.log 2>&1 & echo $! > pid.new; mv pid.new pid\n\
         wait $!; echo $? > status.new; mv status.new status) > /dev/null 2>&1 &\n\
         until test -e pid; do sleep 0.05; done; cat pid"
    ))?;
    pid.parse().with_context(|| format!("a strange number of a process: {pid}"))
}

/// A disk that dom0's kernel serves, through a loop device.
pub(crate) struct Blkback {
    domain: u32,
    device: String,
}

impl Blkback {
    /// Attaches `image` to the domain as this disk.
    pub(crate) fn attach(
        boot: &mut Boot<'_>,
        domain: &'static str,
        disk: &str,
        image: &str,
    ) -> Result<Blkback> {
        let id = boot.domain(domain)?.id;
        let device = boot.sh(&format!(
            "set -e; losetup -f {image}; device=$(losetup -a | grep {image} | cut -d: -f1); echo ${{device#/dev/loop}}"
        ))?;
        let nodes = nodes(id, disk, "vbd", &[("physical-device", &format!("7:{device}"))])?;
        boot.sh(&nodes)?;
        until(PATIENCE, "the domain has the disk", || {
            Ok(boot.guest(domain)?.run(&format!("test -b /dev/{disk}"))?.status == 0)
        })?;
        Ok(Blkback { domain: id, device: format!("/dev/loop{device}") })
    }

    /// Once its domain is gone.
    pub(crate) fn release(self, boot: &mut Boot<'_>) -> Result<()> {
        boot.sh(&format!("set -e; xenstore-rm /local/domain/0/backend/vbd/{}", self.domain))?;
        // The kernel's back end lets go of the device in its own time.
        until(PATIENCE, "the loop device is free", || {
            Ok(boot.run(&format!("losetup -d {0} 2>&1; ! losetup -a | grep -q {0}:", self.device))?.status
                == 0)
        })
    }
}

/// The number that xenstore knows a disk by: major 202, 16 minors each (docs/misc/vbd-interface.txt).
pub(crate) fn number(disk: &str) -> Result<u32> {
    match disk.strip_prefix("xvd").map(str::as_bytes) {
        Some([letter @ b'a'..=b'p']) => Ok((202 << 8) | (u32::from(letter - b'a') << 4)),
        _ => bail!("`{disk}` is not between xvda and xvdp"),
    }
}

/// A script that writes both ends' nodes as a toolstack does: all at once, since a back end that meets a front end
/// without a state takes it for dead.
pub(crate) fn nodes(domain: u32, disk: &str, kind: &str, more: &[(&str, &str)]) -> Result<String> {
    let device = number(disk)?;
    let back = format!("/local/domain/0/backend/{kind}/{domain}/{device}");
    let front = format!("/local/domain/{domain}/device/vbd/{device}");
    let more: String = more.iter().map(|(name, value)| format!(" {back}/{name} '{value}'")).collect();
    Ok(format!(
        "set -e; back={back}; front={front}\n\
         xenstore-write $back ''; xenstore-chmod $back n0 r{domain}\n\
         xenstore-write $front ''; xenstore-chmod $front n{domain} r0\n\
         xenstore-write $back/frontend $front $back/frontend-id {domain} $back/online 1 $back/mode w \\\n\
         $back/device-type disk $back/dev {disk}{more} $back/state 1 \\\n\
         $front/backend $back $front/backend-id 0 $front/virtual-device {device} $front/device-type disk $front/state 1"
    ))
}
