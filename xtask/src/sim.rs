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
    /// Prove that the simulation bites: each known mistake must be caught.
    #[arg(long)]
    mutants: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.mutants { mutants() } else { seeds(arguments.seed, arguments.runs) }
}

pub(crate) fn seeds(seed: u64, runs: u64) -> Result<()> {
    run_command(&mut sim(["--seed", &seed.to_string(), "--runs", &runs.to_string()]))
}

pub(crate) fn mutants() -> Result<()> {
    run_command(&mut sim(["--mutants"]))
}

fn sim<const COUNT: usize>(arguments: [&str; COUNT]) -> std::process::Command {
    let mut sim = cargo(["run", "--quiet", "--release", "--package", "sim", "--"]);
    sim.args(arguments);
    sim
}
