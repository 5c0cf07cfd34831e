//! Domains of a real Xen on disks of ours: `cargo xtask lab xen`. docs/labs.md tells how to use it.
//!
//! What is expected comes from the guest's kernel, from e2fsck, from the verifier in the guest, from Xen's own tools.

mod boot;
mod death;
mod disks;
mod domain;
mod durable;
mod full;
mod ground;
mod measure;
mod negotiation;
mod nodes;
mod server;
mod stage;
mod sync;

use crate::command::{cargo, run as run_command, target};
use crate::install::{self, Need};
use crate::lab::shell;
use crate::report::Report;
use anyhow::{Context, Result, ensure};
use boot::Boot;
use clap::Args;
use stage::Stage;
use std::path::PathBuf;

/// Which of it, with what.
#[derive(Args, Clone)]
pub(crate) struct Xen {
    /// Only the scenarios whose name contains this. May be given several times.
    #[arg(long, value_name = "WORD")]
    only: Vec<String>,
    /// What serves the disks. The kernel's own back end is here to prove the scenarios, where it can.
    #[arg(long, value_enum, default_value = "tapdisk")]
    server: server::Kind,
    /// The tapdisk that serves, if not the one built here.
    #[arg(long, value_name = "PATH")]
    program: Option<PathBuf>,
    /// Where the scenarios' dice start: the moments of `kill -9`, and what the guest writes.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Instead of all scenarios, measure what a request costs dom0 by each way of its data.
    #[arg(long)]
    measure: bool,
    /// After the scenarios of each boot, ask for commands to run in its dom0.
    #[arg(long)]
    shell: bool,
}

impl Xen {
    /// The scenarios as `ci` runs them.
    pub(crate) fn of_tapdisk() -> Xen {
        Xen {
            only: Vec::new(),
            server: server::Kind::Tapdisk,
            program: None,
            seed: 1,
            measure: false,
            shell: false,
        }
    }

    fn program(&self) -> Result<PathBuf> {
        self.program.clone().map_or_else(|| Ok(target()?.join("release/tapdisk")), Ok)
    }

    fn wants(&self, scenario: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|word| scenario.contains(word.as_str()))
    }
}

/// What is tried in a machine that was booted for it and others.
pub(crate) struct Scenario {
    name: &'static str,
    run: fn(&mut Boot<'_>) -> Result<()>,
    /// Whether the kernel's back end can do it, too.
    peer: bool,
}

/// What a machine is booted for, in this order.
struct Group {
    name: &'static str,
    make: fn(&Stage) -> Result<Boot<'_>>,
    scenarios: &'static [Scenario],
}

const GROUPS: &[Group] = &[
    Group { name: "disks", make: disks::boot, scenarios: disks::SCENARIOS },
    Group { name: "death", make: death::boot, scenarios: death::SCENARIOS },
    Group { name: "full", make: full::boot, scenarios: full::SCENARIOS },
];

/// All scenarios, several a boot.
pub(crate) fn run(arguments: &Xen) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "the lab mounts file systems: run it as root");
    install::require(&[Need::Apt, Need::Dpkg, Need::Ext4, Need::Loop, Need::Setpriv])?;
    if arguments.program.is_none() {
        run_command(&mut cargo(["build", "--release", "--quiet", "--package", "tapdisk"]))?;
    }
    let mut report = Report::default();
    let mut stage = None;
    report.part("stage: what the machines are made of", || {
        stage = Some(Stage::set(arguments).context("make ready what the machines are made of")?);
        Ok(())
    });
    if let Some(stage) = &stage
        && arguments.measure
    {
        report.part("measure: what a request costs dom0", || measure::run(stage));
    } else if let Some(stage) = &stage {
        GROUPS.iter().for_each(|group| run_group(stage, group, &mut report));
    }
    report.table();
    report.judge("lab xen")
}

fn run_group(stage: &Stage, group: &Group, report: &mut Report) {
    let mut wanted = Vec::new();
    for scenario in group.scenarios.iter().filter(|scenario| stage.arguments.wants(scenario.name)) {
        if stage.arguments.server == server::Kind::Tapdisk || scenario.peer {
            wanted.push(scenario);
        } else {
            report.skip(scenario.name, "only with tapdisk");
        }
    }
    if wanted.is_empty() {
        return;
    }
    let mut made = None;
    report.part(&format!("boot: {}", group.name), || {
        made = Some((group.make)(stage)?);
        Ok(())
    });
    let Some(mut boot) = made else { return };
    for scenario in wanted {
        let has_passed = report.part(scenario.name, || {
            let result = (scenario.run)(&mut boot);
            result.inspect_err(|_| println!("{}", boot.about()))
        });
        if !has_passed && let Err(error) = boot.clear() {
            report.part(&format!("clear: {}", group.name), || Err(error));
            break;
        }
    }
    if stage.arguments.shell {
        report.part("shell", || shell::ask(&mut boot));
    }
    if let Err(error) = boot.end() {
        report.part(&format!("end: {}", group.name), || Err(error));
    }
}
