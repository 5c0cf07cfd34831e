//! What a guest does with a disk of its own, whatever interface it is on.

use crate::lab::guest_log::{self, Line};
use anyhow::{Result, ensure};
use lab::shell::Shell;
use std::collections::BTreeMap;
use std::ops::Range;

/// The digest of a part of a disk, in bytes, as the guest reads it past its page cache.
pub(crate) fn digest(guest: &mut dyn Shell, disk: &str, at: u64, len: u64) -> Result<String> {
    let line = guest.sh(&format!("set -o pipefail; guest read /dev/{disk} {at} {len} | sha256sum"))?;
    Ok(line.split(' ').next().unwrap_or_default().to_owned())
}

/// Has the guest write so many bytes that nobody expects by chance, past its page cache.
pub(crate) fn write_noise(guest: &mut dyn Shell, disk: &str, at: u64, len: u64) -> Result<()> {
    guest.sh(&format!("set -o pipefail; head -c {len} /dev/urandom | guest write /dev/{disk} {at}")).map(drop)
}

/// A file system on this device keeps a file over a remount, and e2fsck finds nothing wrong.
pub(crate) fn write_and_check(guest: &mut dyn Shell, device: &str, kind: &str) -> Result<()> {
    let check = guest.sh(&format!(
        "set -e; /sbin/mke2fs -q -F -t {kind} {device}; mount -t {kind} {device} /mnt\n\
         dd if=/dev/urandom of=/mnt/file bs=1M count=8 conv=fsync 2> /run/dd; sha256sum /mnt/file > /run/sum\n\
         umount /mnt; echo 3 > /proc/sys/vm/drop_caches; mount -t {kind} {device} /mnt\n\
         sha256sum -c /run/sum; umount /mnt; /sbin/e2fsck -f -n {device} 2>&1"
    ))?;
    println!("     e2fsck: {}", check.lines().last().unwrap_or_default());
    Ok(())
}

/// The kernel has found no fault since it was last asked.
pub(crate) fn require_no_fault(guest: &mut dyn Shell) -> Result<()> {
    guest_log::require_no_fault(&guest_log::take(guest)?)
}

/// Neighbours of faulty sectors that are tried, too.
const AROUND: u64 = 6;

/// The guest's kernel names exactly the sectors that fail, and its programs see exactly these fail. Each is tried for
/// itself, so that the sector of an error is the sector of a request.
pub(crate) fn names_the_faulty(
    guest: &mut dyn Shell,
    disk: &str,
    faulty: Range<u64>,
    operation: &str,
) -> Result<()> {
    let (first, count) = (faulty.start - AROUND, AROUND + faulty.end - faulty.start + AROUND);
    let said = guest.sh(&format!("guest sectors {operation} /dev/{disk} {first} {count}"))?;
    let log = guest_log::take(guest)?;
    let logged = guest_log::failed_sectors(&log, disk, &operation.to_uppercase())?;
    println!("     the kernel logs a failed {operation} of the sectors {:?}", logged.keys());
    let once: BTreeMap<u64, u32> = faulty.clone().map(|sector| (sector, 1)).collect();
    ensure!(logged == once, "the sectors {faulty:?} should be logged, once each: {logged:?}");
    let wanted: Vec<String> =
        faulty.map(|sector| format!("{sector} Input/output error (os error 5)")).collect();
    ensure!(said == wanted.join("\n"), "the guest's program sees:\n{said}");
    let error = format!("I/O error, dev {disk},");
    let others: Vec<&Line> = log.iter().filter(|line| !line.text.contains(&error)).collect();
    guest_log::require_no_fault(others)
}
