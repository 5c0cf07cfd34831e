//! Linux in QEMU on disks of ours, served by vhost-user: `cargo xtask lab qemu`. docs/labs.md tells how to use it.
//!
//! What is expected comes from the guest's kernel, from e2fsck, and from the verifier in the guest.

mod boot;
mod death;
mod disks;
mod durable;
mod faults;
mod full;
mod growth;
mod server;
mod stage;
mod trim;

use crate::command::{cargo, run as run_command};
use crate::install::{self, Need};
use crate::lab::shell;
use crate::report::Report;
use anyhow::{Context, Result, ensure};
use boot::Boot;
use clap::{Args, ValueEnum};
use lab::packages::Suite;
use stage::Stage;
use std::fmt;
use std::path::PathBuf;

/// Which of it, with what.
#[derive(Args, Clone)]
pub(crate) struct Qemu {
    /// Only the scenarios whose name contains this.
    #[arg(long, value_name = "WORD")]
    only: Option<String>,
    /// What serves the disks. The peer is here to prove the scenarios, where it can.
    #[arg(long, value_enum, default_value = "tapdisk")]
    server: server::Kind,
    /// The server's program, if not the one built here or found in the PATH.
    #[arg(long, value_name = "PATH")]
    program: Option<PathBuf>,
    /// The guest's kernel, if not all that a scenario is for.
    #[arg(long, value_enum)]
    kernel: Option<Linux>,
    /// Where the scenarios' dice start: the moments of `kill -9`, and what the guest writes.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// After the scenarios of each boot, ask for commands to run in its guest.
    #[arg(long)]
    shell: bool,
}

/// A kernel of Debian's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Linux {
    #[value(name = "6.1")]
    Of61,
    #[value(name = "6.12")]
    Of612,
}

impl Linux {
    fn suite(self) -> Suite {
        match self {
            Linux::Of61 => Suite::Release,
            Linux::Of612 => Suite::Backports,
        }
    }
}

impl fmt::Display for Linux {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Linux::Of61 => "6.1",
            Linux::Of612 => "6.12",
        })
    }
}

impl Qemu {
    /// The scenarios as `ci` runs them.
    pub(crate) fn of_tapdisk() -> Qemu {
        let server = server::Kind::Tapdisk;
        Qemu { only: None, server, program: None, kernel: None, seed: 1, shell: false }
    }

    /// The kernels that are asked for.
    fn kernels(&self) -> Vec<Linux> {
        self.kernel.map_or_else(|| Linux::value_variants().to_vec(), |kernel| vec![kernel])
    }

    fn wants(&self, scenario: &str) -> bool {
        self.only.as_ref().is_none_or(|word| scenario.contains(word.as_str()))
    }
}

/// What is tried in a guest that was booted for it and others.
pub(crate) struct Scenario {
    name: &'static str,
    run: fn(&mut Boot<'_>) -> Result<()>,
    /// Whether the peer can do it, too.
    peer: bool,
}

/// A machine's disks and what is tried on them, in this order.
struct Group {
    name: &'static str,
    /// The kernels on which it is tried unless another is asked for.
    kernels: &'static [Linux],
    make: fn(&Stage, Linux) -> Result<Boot<'_>>,
    scenarios: &'static [Scenario],
}

const ALL: &[Linux] = &[Linux::Of612, Linux::Of61];
/// For what takes long.
const MAIN: &[Linux] = &[Linux::Of612];

const GROUPS: &[Group] = &[
    Group { name: "disks", kernels: ALL, make: disks::boot, scenarios: disks::SCENARIOS },
    Group { name: "death", kernels: ALL, make: death::boot, scenarios: death::SCENARIOS },
    Group { name: "full", kernels: MAIN, make: full::boot, scenarios: full::SCENARIOS },
];

/// All scenarios, several a boot.
pub(crate) fn run(arguments: &Qemu) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "the lab mounts file systems: run it as root");
    install::require(&[Need::Apt, Need::Dpkg, Need::Ext4, Need::Loop, Need::Setpriv])?;
    if arguments.server == server::Kind::Tapdisk && arguments.program.is_none() {
        run_command(&mut cargo(["build", "--release", "--quiet", "--package", "tapdisk"]))?;
    }
    let stage = Stage::set(arguments).context("make ready what the machines are made of")?;
    let mut report = Report::default();
    for group in GROUPS {
        let asked_for = arguments.kernel.as_slice();
        for linux in if asked_for.is_empty() { group.kernels } else { asked_for } {
            run_group(&stage, group, *linux, &mut report);
        }
    }
    report.table();
    report.judge("lab qemu")
}

fn run_group(stage: &Stage, group: &Group, linux: Linux, report: &mut Report) {
    let title = |name: &str| format!("{linux} {name}");
    let mut wanted = Vec::new();
    for scenario in group.scenarios {
        if !stage.arguments.wants(scenario.name) {
            continue;
        }
        if stage.arguments.server == server::Kind::Tapdisk || scenario.peer {
            wanted.push(scenario);
        } else {
            report.skip(&title(scenario.name), "only with tapdisk");
        }
    }
    if wanted.is_empty() {
        return;
    }
    let mut made = None;
    report.part(&title(&format!("boot: {}", group.name)), || {
        made = Some((group.make)(stage, linux)?);
        Ok(())
    });
    let Some(mut boot) = made else { return };
    for scenario in wanted {
        report.part(&title(scenario.name), || {
            let result = (scenario.run)(&mut boot);
            result.inspect_err(|_| println!("{}", boot.about()))
        });
    }
    if stage.arguments.shell {
        report.part("shell", || boot.machine().and_then(|machine| shell::ask(machine)));
    }
    if let Err(error) = boot.end() {
        report.part(&title(&format!("end: {}", group.name)), || Err(error));
    }
}
