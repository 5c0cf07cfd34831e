//! Sectors that fail by order: the guest's kernel names exactly these.

use crate::lab::qemu::boot::Boot;
use crate::lab::qemu::guest_log;
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// The kernel logs no more than ten errors in five seconds: together these are ten.
const READS: Range<u64> = 2000..2005;
const WRITES: Range<u64> = 4000..4005;
/// Neighbours on either side that are tried, too.
const AROUND: u64 = 6;

/// What tapdisk is told.
pub(crate) fn arguments() -> [&'static str; 4] {
    ["--fault", "read:EIO:2000s..2005s", "--fault", "write:EIO:4000s..4005s"]
}

pub(crate) fn reads(boot: &mut Boot<'_>) -> Result<()> {
    run(boot, READS, "READ", "dd if=/dev/vde of=/dev/null iflag=direct bs=512 count=1 skip=$sector")
}

pub(crate) fn writes(boot: &mut Boot<'_>) -> Result<()> {
    run(
        boot,
        WRITES,
        "WRITE",
        "dd if=/dev/zero of=/dev/vde oflag=direct bs=512 count=1 seek=$sector conv=notrunc",
    )?;
    // The neighbours of failed writes are what they were.
    let script = "dd if=/dev/vde bs=512 skip=3990 count=30 iflag=direct 2> /run/dd | tr -d '\\0' | wc -c";
    let count = boot.sh(script)?;
    ensure!(count == "0", "{count} bytes are no longer zero");
    Ok(())
}

/// Tries each sector for itself, so that the sector of an error is the sector of a request.
fn run(boot: &mut Boot<'_>, faulty: Range<u64>, operation: &str, try_one: &str) -> Result<()> {
    let (first, last) = (faulty.start - AROUND, faulty.end + AROUND - 1);
    let failed = boot.sh(&format!(
        "for sector in $(seq {first} {last}); do {try_one} 2> /run/dd || echo $sector; done; cat /run/dd >&2"
    ))?;
    let log = guest_log::take(boot.machine()?)?;
    let logged = guest_log::failed_sectors(&log, "vde", operation)?;
    println!("     the kernel logs {operation} errors at {logged:?}");
    let wanted: BTreeSet<u64> = faulty.clone().collect();
    let once: BTreeMap<u64, u32> = wanted.iter().map(|sector| (*sector, 1)).collect();
    ensure!(logged == once, "the sectors {faulty:?} should be logged, once each");
    let numbers = failed.lines().map_while(|line| line.parse::<u64>().ok());
    ensure!(numbers.collect::<BTreeSet<u64>>() == wanted, "{try_one}\nfailed at:\n{failed}");
    let others: Vec<&str> = log
        .iter()
        .filter(|line| line.level <= 3)
        .map(|line| line.text.as_str())
        .filter(|text| !text.contains("dev vde,"))
        .collect();
    ensure!(others.is_empty(), "the guest's kernel also complains: {others:?}");
    boot.server("faulty")?.must_live().context("after faults")
}
