//! `sim`: runs seeds one after the other until one fails.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use sim::run::{Report, catch_panics, run};

/// The real disk, storage and executor on a simulated kernel and clock.
#[derive(Parser)]
struct Arguments {
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many seeds in a row.
    #[arg(long, default_value_t = 1000)]
    runs: u64,
    /// Print all that happens.
    #[arg(long)]
    trace: bool,
    /// Stop after this many seconds.
    #[arg(long)]
    seconds: Option<u64>,
    /// Prove that the simulation bites: each known mistake must be caught.
    #[arg(long)]
    mutants: bool,
    /// Only the mistakes whose name contains this.
    #[arg(long, default_value = "", requires = "mutants")]
    only: String,
}

/// One seed in so many is run twice, to see that it gives the same run.
const TWICE: u64 = 50;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.mutants {
        return match sim::mutants::run(&arguments.only) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                println!("sim: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    catch_panics();
    let started = Instant::now();
    let (mut requests, mut runs) = (0, 0);
    for seed in arguments.seed..arguments.seed.saturating_add(arguments.runs) {
        if arguments.seconds.is_some_and(|seconds| started.elapsed() >= Duration::from_secs(seconds)) {
            break;
        }
        let outcome = run(seed, arguments.trace);
        if let Some(trace) = &outcome.trace {
            println!("{trace}");
        }
        if let Some(report) = &outcome.failure {
            tell(seed, report);
            return ExitCode::FAILURE;
        }
        if seed.is_multiple_of(TWICE) && run(seed, false).hash != outcome.hash {
            println!("seed {seed}: sim: the same seed gave another run\n{}", again(seed));
            return ExitCode::FAILURE;
        }
        requests += outcome.requests;
        runs += 1;
    }
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{runs} runs, {requests} requests, {seconds:.1} s, {:.0} runs a second: all is well",
        runs as f64 / seconds
    );
    ExitCode::SUCCESS
}

fn tell(seed: u64, report: &Report) {
    let Report { oracle, what, configuration, tail } = report;
    println!("{configuration}\n\n{tail}\n");
    println!("seed {seed}: {oracle}: {what}");
    println!("{}", again(seed));
}

fn again(seed: u64) -> String {
    format!("repeat it with: cargo xtask sim --seed {seed} --runs 1")
}
