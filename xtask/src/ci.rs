//! `cargo xtask ci`: all of it, in the order in which a failure is cheapest to find.

use crate::command::{cargo, command, root, run as run_command, target, test, words};
use crate::install::{self, Need};
use crate::report::Report;
use crate::{bench, check, clients, lab, sim};
use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum};
use std::process::{Command, ExitCode};

/// What to leave out.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Parts to leave out, say because a container has no loop devices: `--without lab,bench`.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PART,…")]
    without: Vec<Part>,
    /// Only these parts.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PART,…")]
    only: Vec<Part>,
}

/// The parts, in their order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Part {
    Install,
    Check,
    Build,
    Loom,
    Memory,
    Sim,
    Mutants,
    Faults,
    Fuzz,
    Clients,
    Lab,
    LabQemu,
    LabXen,
    Bench,
}

impl Part {
    fn title(self) -> &'static str {
        match self {
            Part::Install => "install what is missing",
            Part::Check => "check: format, house rules, lints, tests",
            Part::Build => "build for release",
            Part::Loom => "loom: every interleaving of a wake",
            Part::Memory => "memory: Miri, AddressSanitizer",
            Part::Sim => "sim: ten thousand seeds",
            Part::Mutants => "mutants: each known mistake is caught",
            Part::Faults => "faults: the binary on a file system that fails",
            Part::Fuzz => "fuzz: regressions, then new inputs for a while",
            Part::Clients => "clients: libnbd, QEMU, fio, kill -9",
            Part::Lab => "lab: the disk of 2006 is full",
            Part::LabQemu => "lab-qemu: Linux guests on our disks",
            Part::LabXen => "lab-xen: domains of Xen's on our disks",
            Part::Bench => "bench: it runs, against all peers",
        }
    }

    fn run(self) -> Result<()> {
        match self {
            Part::Install => install(),
            Part::Check => check::run(),
            Part::Build => {
                run_command(&mut cargo(["build", "--release", "--workspace", "--exclude", "xtask"]))
            }
            Part::Loom => loom(),
            Part::Memory => memory(),
            Part::Sim => sim::seeds(0, 10_000),
            Part::Mutants => sim::mutants(),
            Part::Faults => {
                test(&mut cargo(["test", "--release", "--package", "faultfs", "--package", "tapdisk"]))
            }
            Part::Fuzz => fuzz(),
            Part::Clients => clients::run(&clients::Arguments::of_tapdisk()),
            Part::Lab => lab::disk_full(&lab::DiskFull::of_tapdisk()),
            Part::LabQemu => lab::qemu::run(&lab::qemu::Qemu::of_tapdisk()),
            Part::LabXen => lab::xen::run(&lab::xen::Xen::of_tapdisk()),
            Part::Bench => bench::with(&["--quick"]),
        }
    }
}

/// Runs the parts. The last line is the count, alone: what reads the output of many projects looks for that.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let mut report = Report::default();
    for part in Part::value_variants() {
        let is_wanted = arguments.only.is_empty() || arguments.only.contains(part);
        if arguments.without.contains(part) || !is_wanted {
            report.skip(part.title(), "left out by the command line");
            continue;
        }
        println!("\n==== {}", part.title());
        report.part(part.title(), || part.run());
    }
    report.table();
    let verdict = report.judge("ci");
    match &verdict {
        Ok(()) => println!(),
        Err(error) => println!("\n{error}"),
    }
    println!("{}", report.total());
    if verdict.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// All at once, so that a machine where nothing may be installed says so before an hour has gone.
fn install() -> Result<()> {
    install::require(&[
        Need::Apt,
        Need::Dpkg,
        Need::Ext4,
        Need::Fio,
        Need::Loop,
        Need::NbdServer,
        Need::Nbdcopy,
        Need::Nbdfuse,
        Need::Nbdinfo,
        Need::Nbdkit,
        Need::Nbdsh,
        Need::Partitions,
        Need::QemuImg,
        Need::QemuIo,
        Need::QemuNbd,
        Need::QemuStorageDaemon,
        Need::Setpriv,
    ])
}

/// Other flags mean other artefacts: in a folder of their own, they don't push out the usual ones.
fn apart(command: &mut Command, folder: &str) -> Result<()> {
    command.env("CARGO_TARGET_DIR", target()?.join(folder));
    Ok(())
}

fn loom() -> Result<()> {
    let mut loom = cargo(["test", "--package", "runtime", "--release", "--lib", "loom"]);
    apart(loom.env("RUSTFLAGS", "--cfg loom"), "loom")?;
    test(&mut loom)
}

/// Cargo of the nightly toolchain. Through rustup, not through the cargo that called us, which is stable.
fn nightly(arguments: &[&str]) -> Command {
    let mut cargo = command("cargo", ["+nightly"]);
    cargo.args(arguments).env("RUSTUP_AUTO_INSTALL", "0");
    cargo
}

/// Miri where there is no system call, AddressSanitizer where there are: the rings, ours
/// and the guests', and what stands on them.
fn memory() -> Result<()> {
    let mut miri = nightly(&["miri", "test", "--package", "block"]);
    // Some errnos are asked of the kernel, through files.
    apart(miri.env("MIRIFLAGS", MIRIFLAGS), "miri")?;
    let mut asan = nightly(&["test", "--target", TARGET, "--lib", "--tests"]);
    asan.args(["--package", "block", "--package", "runtime", "--package", "storage"]);
    apart(asan.env("RUSTFLAGS", "-Zsanitizer=address"), "asan")?;
    let mut rings = nightly(&["test", "--target", TARGET, "--package", "guest", "--lib", "vhost"]);
    // Memory that is gone (SIGBUS) is for our own handler, and its tests see to what becomes of the rest.
    rings.env("ASAN_OPTIONS", "handle_sigbus=0");
    apart(rings.env("RUSTFLAGS", "-Zsanitizer=address"), "asan")?;
    if install::has_nightly_tool(&["miri", "setup"]) {
        test(&mut miri)?;
    } else {
        println!("     Miri is not available here; by hand: MIRIFLAGS={MIRIFLAGS} {}", words(&miri));
    }
    if install::has_nightly() {
        test(&mut asan)?;
        test(&mut rings)?;
    } else {
        println!("     AddressSanitizer is not available here (it needs a nightly toolchain);");
        println!("     by hand: ASAN_OPTIONS=handle_sigbus=0 RUSTFLAGS=-Zsanitizer=address {}", words(&asan));
        println!("         and: RUSTFLAGS=-Zsanitizer=address {}", words(&rings));
    }
    Ok(())
}

const TARGET: &str = "x86_64-unknown-linux-gnu";
const MIRIFLAGS: &str = "-Zmiri-disable-isolation";
const FUZZ_SECONDS: u32 = 20;

/// Regressions are ordinary tests, and have run with `check`; they run again from the fuzz targets' own folder.
fn fuzz() -> Result<()> {
    ensure!(root().join("fuzz/Cargo.toml").exists(), "there are no fuzz targets");
    if !install::has_nightly_tool(&["fuzz", "--version"]) {
        println!("     cargo-fuzz or a nightly toolchain is not available here: no new inputs were tried;");
        println!("     by hand: cargo install cargo-fuzz; cargo +nightly fuzz run TARGET");
        return Ok(());
    }
    let targets = crate::command::output(&mut nightly(&["fuzz", "list"]))?;
    if targets.trim().is_empty() {
        bail!("there are no fuzz targets");
    }
    for name in targets.lines() {
        let limit = format!("-max_total_time={FUZZ_SECONDS}");
        run_command(&mut nightly(&["fuzz", "run", name, "--", &limit]))?;
    }
    Ok(())
}
