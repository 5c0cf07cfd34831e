//! A booted machine: Xen, dom0, and what runs in them.

use crate::command::until;
use crate::lab::xen::domain::{self, Domain, Guest};
use crate::lab::xen::stage::Stage;
use crate::sweep;
use anyhow::{Context, Result};
use lab::agent::Answer;
use lab::machine::Machine;
use lab::shell::Shell;
use lab::xen;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// Where dom0 has its programs.
const PATH: &str = "/usr/lib/xen-4.17/bin:/usr/bin:/sbin:/bin";

/// A machine that runs. Dropped, it is ended.
pub(crate) struct Boot<'a> {
    machine: Machine,
    pub(crate) stage: &'a Stage,
    logs: PathBuf,
    domains: Vec<Domain>,
}

impl<'a> Boot<'a> {
    /// Starts the machine and Xen's daemons. These raw images are dom0's /dev/vdb, /dev/vdc, and so on.
    pub(crate) fn new(stage: &'a Stage, name: &str, disks: Vec<PathBuf>) -> Result<Boot<'a>> {
        let logs = stage.logs(name)?;
        let disks = [vec![stage.root()?], disks].concat();
        let plan = xen::Plan {
            tools: &stage.tools,
            hypervisor: &stage.hypervisor,
            kernel: &stage.kernel,
            initramfs: &stage.initramfs,
            cpus: 2,
            memory_mib: 1280,
            dom0_mib: 512,
            words: "lab.root=/dev/vda",
            disks,
            sockets: stage.sockets(),
            console: logs.join("console.log"),
        };
        let machine = plan.start()?;
        sweep::record(stage.work.folder(), machine.pid())?;
        let mut boot = Boot { machine, stage, logs, domains: Vec::new() };
        boot.sh("start-xen").context("start Xen's daemons")?;
        Ok(boot)
    }

    /// Makes a domain and waits until it obeys. What its kernel said at the start is of no interest to scenarios.
    pub(crate) fn create(&mut self, plan: domain::Plan) -> Result<()> {
        let domain = Domain::create(self, plan, false)?;
        self.domains.push(domain);
        self.wait_for_the_start(plan.name)
    }

    /// Makes a domain that does not run yet.
    pub(crate) fn create_paused(&mut self, plan: domain::Plan) -> Result<()> {
        let domain = Domain::create(self, plan, true)?;
        self.domains.push(domain);
        Ok(())
    }

    /// Lets it run, and waits until it obeys.
    pub(crate) fn unpause(&mut self, name: &str) -> Result<()> {
        self.sh(&format!("xl unpause {name} 2>&1"))?;
        self.wait_for_the_start(name)
    }

    fn wait_for_the_start(&mut self, name: &str) -> Result<()> {
        self.guest(name)?.sh("dmesg -c > /run/boot.log").map(drop)
    }

    /// Makes it if there is none of that name.
    pub(crate) fn need(&mut self, plan: domain::Plan) -> Result<()> {
        if self.domain(plan.name).is_ok() { Ok(()) } else { self.create(plan) }
    }

    /// Ends a domain as if its power had been cut, and waits until nothing of it is left.
    pub(crate) fn destroy(&mut self, name: &str) -> Result<()> {
        let id = self.domain(name)?.id;
        self.sh(&format!("xl destroy {id} 2>&1"))?;
        self.wait_until_gone(name)
    }

    /// Waits until nothing of a domain is left, which has ended or is about to. One whose memory someone still holds
    /// stays as a shadow of itself.
    pub(crate) fn wait_until_gone(&mut self, name: &str) -> Result<()> {
        let id = self.domain(name)?.id;
        self.domains.retain(|domain| domain.plan.name != name);
        until(Duration::from_secs(120), &format!("domain {id} is gone"), || {
            Ok(self.sh("xl list | awk '{print $2}'")?.lines().all(|found| found.trim() != id.to_string()))
        })
    }

    /// The domain of that name.
    pub(crate) fn domain(&self, name: &str) -> Result<&Domain> {
        let domain = self.domains.iter().find(|domain| domain.plan.name == name);
        domain.with_context(|| format!("no domain is called {name}"))
    }

    /// To have it do something.
    pub(crate) fn guest(&mut self, name: &str) -> Result<Guest<'_, 'a>> {
        let id = self.domain(name)?.id;
        Ok(Guest { boot: self, id })
    }

    /// What whoever looks for a failure's cause wants to see.
    pub(crate) fn about(&mut self) -> String {
        let looks =
            "xl list; for log in /run/logs/*; do echo; echo $log:; tail -n 30 $log; done; dmesg | tail -n 20";
        let dom0 = self.run(looks).map_or_else(|error| format!("{error:#}"), |answer| answer.said);
        format!("{}\n{dom0}", self.machine.about())
    }

    /// Clears away what a scenario that failed has left: what follows is not to fail for that.
    pub(crate) fn clear(&mut self) -> Result<()> {
        let left: Vec<&str> = self.domains.iter().map(|domain| domain.plan.name).collect();
        for name in left {
            self.run(&format!("xl destroy {name} 2>&1"))?;
        }
        // Who let a domain go away has ended, or is not going to.
        self.sh(
            "sleep 2; for folder in /run/serve/*; do\n\
             if test -e $folder/pid -a ! -e $folder/status; then kill -9 $(cat $folder/pid); fi; done 2> /dev/null\n\
             xenstore-rm /local/domain/0/backend/vbd3 2> /dev/null; losetup -D 2> /dev/null; true",
        )?;
        self.domains.clear();
        Ok(())
    }

    /// Keeps what dom0 has of logs.
    fn keep_logs(&mut self) -> Result<()> {
        let files = self.sh("ls /run/logs /var/log/xen | grep '[.]log$' || true")?;
        for file in files.lines() {
            let text = self.sh(&format!("cat /run/logs/{file} /var/log/xen/{file} 2> /dev/null || true"))?;
            fs::write(self.logs.join(file), text)?;
        }
        Ok(())
    }

    /// Ends all of it.
    pub(crate) fn end(mut self) -> Result<()> {
        self.keep_logs()?;
        self.machine.kill()
    }
}

impl Shell for Boot<'_> {
    fn run(&mut self, script: &str) -> Result<Answer> {
        self.machine.run(&format!("export PATH={PATH}\n{script}"))
    }
}
