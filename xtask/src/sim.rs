//! `cargo xtask sim`: the simulation, built with optimisations.

use crate::command::{cargo, run as run_command};
use anyhow::Result;
use clap::Args;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The first seed; a failure names the one that repeats it.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many seeds in a row.
    #[arg(long, default_value_t = 1000)]
    runs: u64,
    /// Images on storage that fails and dies, instead of disks on a kernel that fails.
    #[arg(long)]
    images: bool,
    /// Prove that the simulation bites: each known mistake must be caught.
    #[arg(long)]
    mutants: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match arguments {
        Arguments { mutants: true, .. } => mutants(),
        Arguments { images: true, seed, runs, .. } => images(*seed, *runs),
        Arguments { seed, runs, .. } => seeds(*seed, *runs),
    }
}

pub(crate) fn seeds(seed: u64, runs: u64) -> Result<()> {
    run_command(&mut sim(["--seed", &seed.to_string(), "--runs", &runs.to_string()]))
}

pub(crate) fn images(seed: u64, runs: u64) -> Result<()> {
    let (seed, runs) = (seed.to_string(), runs.to_string());
    run_command(&mut sim(["--images", "--matrix", "--qemu", "--seed", &seed, "--runs", &runs]))
}

pub(crate) fn mutants() -> Result<()> {
    run_command(&mut sim(["--mutants"]))
}

fn sim<const COUNT: usize>(arguments: [&str; COUNT]) -> std::process::Command {
    let mut sim = cargo(["run", "--quiet", "--release", "--package", "sim", "--"]);
    sim.args(arguments);
    sim
}
