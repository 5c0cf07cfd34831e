//! The chores of the project: `cargo xtask check`, `ci`, `sim`, `bench`, `lab`, `clients`.

mod bench;
mod check;
mod ci;
mod clients;
mod install;
mod lab;
mod model;
mod report;
mod server;
mod sim;
mod sweep;
mod tidy;
mod work;

use ::lab::command;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// The chores of the project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// What to run before each commit: format, lints, house rules, and the tests that take a minute.
    Check,
    /// All that continuous integration runs. Installs what is missing (as root on Debian).
    Ci(ci::Arguments),
    /// The real disk, image and filter code on a simulated disk and clock, from a seed.
    Sim(sim::Arguments),
    /// tapdisk and its peers, side by side. What follows goes to the bench as it is.
    Bench(bench::Arguments),
    /// Scenarios on real file systems and loop devices. Needs root.
    Lab {
        #[command(subcommand)]
        scenario: lab::Scenario,
    },
    /// Real NBD clients against the server: libnbd, QEMU, fio.
    Clients(clients::Arguments),
    /// Undo what a broken run of the lab left behind: mounts, loop devices, servers.
    Sweep,
}

fn main() -> ExitCode {
    let chore = Arguments::parse().chore;
    let result = match chore {
        Chore::Check => check::run(),
        Chore::Ci(arguments) => return ci::run(&arguments),
        Chore::Sim(arguments) => sim::run(&arguments),
        Chore::Bench(arguments) => bench::run(&arguments),
        Chore::Lab { scenario } => lab::run(&scenario),
        Chore::Clients(arguments) => clients::run(&arguments),
        Chore::Sweep => work::Work::open().map(drop),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
