//! The limit: fio on the same file with io_uring, without a protocol between.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cell::{Cell, Direction, Figures, Order};
use crate::cpu::Meter;
use crate::image;
use crate::load::Span;
use crate::server::{end, spawn};

/// fio forks and maps for so long before its load begins.
const START: Duration = Duration::from_millis(500);

/// The same for every cell, for those who repeat it by hand.
pub(crate) const COMMAND: &str = "fio --name=limit --filename={image} --size=1G --ioengine=io_uring --fixedbufs \
    --registerfiles --thread --norandommap --invalidate=0 --time_based --lat_percentiles=1 --clat_percentiles=0 \
    --direct={0|1} --rw={rw} --bs={len} --iodepth={depth}";

/// What fio says about its version, or none if it is not installed.
pub(crate) fn version() -> Option<String> {
    let output = Command::new("fio").arg("--version").output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

pub(crate) fn run(cell: &Cell, image: &Path, direct: bool, span: Span, dir: &Path) -> Result<Figures> {
    let report = dir.join("fio.json");
    let mut fio = Fio { child: spawn(command(cell, image, direct, span, &report), &dir.join("fio.log"))? };

    // Its own count of CPU time leaves out the kernel's workers (a buffered write is theirs), so we look from outside
    // while it runs. `--thread` keeps all of it in one process.
    sleep(START + span.warm);
    let meter = Meter::of(fio.child.id())?;
    let (cpu, start) = (meter.read().context("fio ended early")?, Instant::now());
    sleep(span.counted);
    let (cpu, took) = (meter.read().context("fio ended early")?.since(&cpu), start.elapsed());

    let status = fio.child.wait()?;
    ensure!(
        status.success(),
        "fio: {status}: {}",
        std::fs::read_to_string(dir.join("fio.log")).unwrap_or_default()
    );
    let text = std::fs::read_to_string(&report)?;
    let json = text.find('{').map_or("", |start| &text[start..]); // warnings come first
    let report: Value = serde_json::from_str(json).with_context(|| format!("fio said {text:?}"))?;
    let side = match cell.direction {
        Direction::Read => &report["jobs"][0]["read"],
        Direction::Write => &report["jobs"][0]["write"],
    };
    let number = |value: &Value| value.as_f64().context("fio's report lacks a number");
    let iops = number(&side["iops"])?;
    Ok(Figures {
        iops,
        cpu_us: cpu.as_secs_f64() * 1e6 / (iops * took.as_secs_f64()),
        p50_us: number(&side["lat_ns"]["percentile"]["50.000000"])? / 1000.0,
        p99_us: number(&side["lat_ns"]["percentile"]["99.000000"])? / 1000.0,
        client_busy: None,
    })
}

fn command(cell: &Cell, image: &Path, direct: bool, span: Span, report: &Path) -> Command {
    let rw = match (cell.order, cell.direction) {
        (Order::Random, Direction::Read) => "randread",
        (Order::Random, Direction::Write) => "randwrite",
        (Order::Sequential, Direction::Read) => "read",
        (Order::Sequential, Direction::Write) => "write",
    };
    let output: PathBuf = report.to_owned();
    let counted = span.counted + START + Duration::from_millis(300);
    let mut command = Command::new("fio");
    command.args(["--name=limit", "--ioengine=io_uring", "--fixedbufs", "--registerfiles", "--thread"]);
    command.args([
        "--norandommap",
        "--invalidate=0",
        "--time_based",
        "--lat_percentiles=1",
        "--clat_percentiles=0",
    ]);
    command.arg(format!("--filename={}", image.display()));
    command.arg(format!("--size={}", image::SIZE));
    command.arg(format!("--direct={}", u8::from(direct)));
    command.arg(format!("--rw={rw}"));
    command.arg(format!("--bs={}", cell.len));
    command.arg(format!("--iodepth={}", cell.depth));
    command.arg(format!("--ramp_time={}ms", span.warm.as_millis()));
    command.arg(format!("--runtime={}ms", counted.as_millis()));
    command.arg("--output-format=json").arg(format!("--output={}", output.display()));
    command
}

/// A running fio, ended when we give up on it.
struct Fio {
    child: Child,
}

impl Drop for Fio {
    fn drop(&mut self) {
        if let Err(error) = end(&mut self.child) {
            eprintln!("could not end fio: {error:#}");
        }
    }
}
