//! `sim`: runs seeds one after the other until one fails.

use std::process::ExitCode;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
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
    /// Images on storage that fails and dies, instead of disks on a kernel that fails.
    #[arg(long, conflicts_with_all = ["mutants", "trace"])]
    images: bool,
    /// Each named step of each format's work on storage fails in each way, before any seed.
    #[arg(long, requires = "images")]
    matrix: bool,
    /// QEMU's programs judge some of the images too.
    #[arg(long, requires = "images")]
    qemu: bool,
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
    if arguments.images {
        sim::images::catch_panics();
        if arguments.matrix
            && let Err(what) = matrix(arguments.qemu)
        {
            println!("seed -: matrix: {what}");
            return ExitCode::FAILURE;
        }
        return images(&arguments);
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

/// Tries the fault matrix, and prints which steps each script has reached.
fn matrix(ask_qemu: bool) -> Result<(), String> {
    let started = Instant::now();
    let rows = sim::images::rows(true, ask_qemu)?;
    println!("| image | faults | deaths | steps that failed in each way |\n|---|---|---|---|");
    for row in &rows {
        let steps: Vec<String> = row.steps.iter().map(|(name, count)| format!("{name} {count}")).collect();
        println!("| {} | {} | {} | {} |", row.name, row.trials, row.deaths, steps.join(", "));
    }
    let sum = |of: fn(&sim::images::Row) -> u64| rows.iter().map(of).sum::<u64>();
    println!(
        "{} faults, {} deaths, {:.1} s: all answers were true, all images are whole",
        sum(|row| row.trials),
        sum(|row| row.deaths),
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// As many threads as there are processors take seeds from one counter.
fn images(arguments: &Arguments) -> ExitCode {
    let ask_qemu = arguments.qemu;
    let started = Instant::now();
    let end = arguments.seed.saturating_add(arguments.runs);
    let next = AtomicU64::new(arguments.seed);
    let failed = AtomicBool::new(false);
    let is_over = || {
        let is_late = |seconds| started.elapsed() >= Duration::from_secs(seconds);
        failed.load(Relaxed) || arguments.seconds.is_some_and(is_late)
    };
    let work = || {
        let mut total = Total::default();
        while !is_over() {
            let seed = next.fetch_add(1, Relaxed);
            if seed >= end {
                break;
            }
            let outcome = sim::images::run(seed, ask_qemu);
            if seed.is_multiple_of(TWICE) && sim::images::run(seed, ask_qemu) != outcome {
                failed.store(true, Relaxed);
                println!("seed {seed}: sim: the same seed gave another run\n{}", again_with_images(seed));
            }
            if let Some(what) = &outcome.failure {
                failed.store(true, Relaxed);
                println!(
                    "{}\n\nseed {seed}: images: {what}\n{}",
                    outcome.configuration,
                    again_with_images(seed)
                );
            }
            total.runs += 1;
            total.operations += outcome.operations;
            total.deaths += outcome.deaths;
        }
        total
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let totals: Vec<Total> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    if failed.load(Relaxed) || totals.len() < threads {
        return ExitCode::FAILURE;
    }
    let sum = |of: fn(&Total) -> u64| totals.iter().map(of).sum::<u64>();
    let seconds = started.elapsed().as_secs_f64();
    let runs = sum(|total| total.runs);
    println!(
        "{runs} images, {} operations, {} deaths, {seconds:.1} s, {:.0} images a second: all are whole",
        sum(|total| total.operations),
        sum(|total| total.deaths),
        runs as f64 / seconds
    );
    ExitCode::SUCCESS
}

/// What a thread has done.
#[derive(Default)]
struct Total {
    runs: u64,
    operations: u64,
    deaths: u64,
}

fn again_with_images(seed: u64) -> String {
    format!("repeat it with: cargo xtask sim --images --seed {seed} --runs 1")
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
