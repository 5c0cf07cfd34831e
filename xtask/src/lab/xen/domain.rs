//! A domain: made by xl from a kernel and a first file system, without a disk until one is attached.

use crate::lab::xen::boot::Boot;
use crate::lab::xen::stage::{DOMAIN_INITRAMFS, DOMAIN_KERNEL};
use anyhow::{Context, Result, ensure};
use lab::agent::Answer;
use lab::shell::Shell;

/// What a domain is like.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) name: &'static str,
    pub(crate) cpus: u16,
    pub(crate) memory_mib: u32,
    /// For the kernel's command line.
    pub(crate) words: &'static str,
}

impl Plan {
    /// With one CPU.
    pub(crate) const fn new(name: &'static str) -> Plan {
        Plan { name, cpus: 1, memory_mib: 192, words: "" }
    }

    /// As xl reads it (xl.cfg(5)).
    fn text(&self) -> String {
        let Plan { name, cpus, memory_mib, words } = self;
        format!(
            "name = \"{name}\"\ntype = \"pv\"\nkernel = \"/{DOMAIN_KERNEL}\"\nramdisk = \"/{DOMAIN_INITRAMFS}\"\n\
             memory = {memory_mib}\nvcpus = {cpus}\n\
             extra = \"console=hvc0 lab.agent=xenstore quiet loglevel=5 log_buf_len=4M mitigations=off nokaslr {words}\"\n\
             on_poweroff = \"destroy\"\non_reboot = \"destroy\"\non_crash = \"preserve\"\n"
        )
    }
}

/// A running domain.
pub(crate) struct Domain {
    pub(crate) plan: Plan,
    pub(crate) id: u32,
}

impl Domain {
    /// Has xl make it, paused or running. What it says on its console appears on the machine's.
    pub(crate) fn create(boot: &mut Boot<'_>, plan: Plan, is_paused: bool) -> Result<Domain> {
        let how = if is_paused { "-p" } else { "" };
        let name = plan.name;
        let log = format!("/var/log/xen/guest-{name}.log");
        boot.sh(&format!(
            "cat > /run/{name}.cfg <<'END'\n{}END\n\
             xl create {how} /run/{name}.cfg > /run/logs/xl-{name}.log 2>&1 || {{ cat /run/logs/xl-{name}.log; exit 1; }}\n\
             test -e /run/{name}.heard || (tail -n +1 -F {log} | sed 's/^/{name}: /') > /dev/console 2> /dev/null &\n\
             touch /run/{name}.heard",
            plan.text()
        ))?;
        let id = boot.sh(&format!("xl domid {name}"))?;
        let id = id.parse().with_context(|| format!("a strange number of a domain: {id}"))?;
        Ok(Domain { plan, id })
    }
}

/// A domain and the dom0 it is reached through.
pub(crate) struct Guest<'b, 'a> {
    pub(crate) boot: &'b mut Boot<'a>,
    pub(crate) id: u32,
}

impl Shell for Guest<'_, '_> {
    fn run(&mut self, script: &str) -> Result<Answer> {
        const END: &str = "END OF WHAT THE DOMAIN DOES";
        ensure!(!script.contains(END), "a script within a script");
        self.boot.run(&format!("guest in {} <<'{END}'\n{script}\n{END}", self.id))
    }
}
