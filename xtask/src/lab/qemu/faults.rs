//! Sectors that fail by order: the guest's kernel names exactly these.

use crate::lab::guest_log::{self, Line};
use crate::lab::qemu::boot::Boot;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
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
    run(boot, READS, "read")
}

pub(crate) fn writes(boot: &mut Boot<'_>) -> Result<()> {
    run(boot, WRITES, "write")
}

/// Tries each sector for itself, so that the sector of an error is the sector of a request.
fn run(boot: &mut Boot<'_>, faulty: Range<u64>, operation: &str) -> Result<()> {
    let (first, count) = (faulty.start - AROUND, AROUND + faulty.end - faulty.start + AROUND);
    let said = boot.sh(&format!("guest sectors {operation} /dev/vde {first} {count}"))?;
    let log = guest_log::take(boot.machine()?)?;
    let logged = guest_log::failed_sectors(&log, "vde", &operation.to_uppercase())?;
    println!("     the kernel logs a failed {operation} of the sectors {:?}", logged.keys());
    let once: BTreeMap<u64, u32> = faulty.clone().map(|sector| (sector, 1)).collect();
    ensure!(logged == once, "the sectors {faulty:?} should be logged, once each: {logged:?}");
    let wanted: Vec<String> =
        faulty.map(|sector| format!("{sector} Input/output error (os error 5)")).collect();
    ensure!(said == wanted.join("\n"), "the guest's program sees:\n{said}");
    let others: Vec<&Line> = log.iter().filter(|line| !line.text.contains("I/O error, dev vde,")).collect();
    guest_log::require_no_fault(others)?;
    boot.server("faulty")?.must_live().context("after faults")
}
