//! Sectors that fail by order: the guest's kernel names exactly these.

use crate::lab::guest_disk::names_the_faulty;
use crate::lab::qemu::boot::Boot;
use anyhow::{Context, Result};
use std::ops::Range;

/// The kernel logs no more than ten errors in five seconds: together these are ten.
const READS: Range<u64> = 2000..2005;
const WRITES: Range<u64> = 4000..4005;
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

fn run(boot: &mut Boot<'_>, faulty: Range<u64>, operation: &str) -> Result<()> {
    names_the_faulty(boot.machine()?, "vde", faulty, operation)?;
    boot.server("faulty")?.must_live().context("after faults")
}
