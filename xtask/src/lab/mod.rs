//! Scenarios on real file systems and in real guests: `cargo xtask lab disk-full`, `qemu`, `xen`.

pub(crate) mod control;
pub(crate) mod disk_full;
pub(crate) mod ground;
pub(crate) mod guest_disk;
pub(crate) mod guest_log;
pub(crate) mod hold;
pub(crate) mod kernel;
pub(crate) mod kernel_log;
pub(crate) mod qemu;
pub(crate) mod shell;
pub(crate) mod verifier;
pub(crate) mod writer;
pub(crate) mod xen;

use crate::install::{self, Need};
use crate::report::Report;
use crate::server::{self, Cache, Kind, Plan};
use crate::work::Work;
use anyhow::{Result, ensure};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// What can go wrong below a server.
#[derive(Subcommand)]
pub(crate) enum Scenario {
    /// A 1 GiB image on a file system with 200 MB free: 2006, when the guest was told that all went well.
    DiskFull(DiskFull),
    /// Linux in QEMU on disks served by vhost-user: 2006, `kill -9`, faults, trim, growth and more.
    Qemu(qemu::Qemu),
    /// Domains of a real Xen, emulated, on disks served with `--xen`: 2006, `kill -9`, negotiation, faults and more.
    Xen(xen::Xen),
}

#[derive(Args, Clone)]
pub(crate) struct DiskFull {
    /// What serves the image.
    #[arg(long, value_enum, default_value = "tapdisk")]
    pub(crate) server: Kind,
    /// The server's program, if not the one built here or found in the PATH.
    #[arg(long, value_name = "PATH")]
    pub(crate) program: Option<PathBuf>,
    /// Only the parts whose name contains this.
    #[arg(long, value_name = "WORD")]
    pub(crate) only: Option<String>,
}

impl DiskFull {
    /// The scenario as `ci` runs it.
    pub(crate) fn of_tapdisk() -> DiskFull {
        DiskFull { server: Kind::Tapdisk, program: None, only: None }
    }

    /// The server, on this image.
    pub(crate) fn plan(&self, image: PathBuf, cache: Cache) -> Plan {
        let (kind, program) = (self.server, self.program.clone());
        Plan { kind, program, cache, image, read_only: false, more: Vec::new() }
    }
}

pub(crate) fn run(scenario: &Scenario) -> Result<()> {
    match scenario {
        Scenario::DiskFull(arguments) => disk_full(arguments),
        Scenario::Qemu(arguments) => qemu::run(arguments),
        Scenario::Xen(arguments) => xen::run(arguments),
    }
}

type Part = fn(&Work, &DiskFull) -> Result<()>;

/// All parts of the scenario, each on ground of its own.
pub(crate) fn disk_full(arguments: &DiskFull) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "the lab mounts file systems: run it as root");
    install::require(&[Need::Loop, Need::Ext4, Need::Partitions, Need::Nbdfuse])?;
    install::require(install::server(arguments.server))?;
    server::build(arguments.server, arguments.program.as_ref())?;
    let work = Work::open()?;
    work.require_room()?;
    let parts: [(&str, Part); 6] = [
        ("control: no server, the ground itself is honest", control::run),
        (
            "client, direct: what is acknowledged and flushed is there, the rest is ENOSPC",
            |work, arguments| disk_full::run(work, arguments, Cache::Direct),
        ),
        ("client, buffered: the same through the page cache", |work, arguments| {
            disk_full::run(work, arguments, Cache::Buffered)
        }),
        ("kernel: ext3 over the export sees I/O errors, and recovers", kernel::run),
        ("hold: the writer waits for space and then completes", hold::completes),
        ("hold: SIGTERM answers what is held with its error", hold::ends),
    ];
    let mut report = Report::default();
    for (name, part) in parts {
        if arguments.only.as_ref().is_some_and(|word| !name.contains(word.as_str())) {
            continue;
        }
        if name.starts_with("hold") && arguments.server != Kind::Tapdisk {
            report.skip(name, "only tapdisk holds");
            continue;
        }
        report.part(name, || part(&work, arguments));
    }
    report.table();
    report.judge("lab disk-full")
}
