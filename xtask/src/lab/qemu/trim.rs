//! What the guest no longer needs: freed on the host, or zeroed.

use crate::command::until;
use crate::lab::disk_full::{allocated, mib};
use crate::lab::guest_log;
use crate::lab::qemu::boot::Boot;
use crate::lab::qemu::disks::MIB;
use anyhow::{Result, ensure};
use std::time::Duration;

const LEN_MIB: u64 = 64;

pub(crate) fn fstrim(boot: &mut Boot<'_>) -> Result<()> {
    let image = boot.server("plain")?.plan().image.clone();
    boot.sh(&format!(
        "set -e; /sbin/mke2fs -q -F -t ext4 /dev/vdb; mount -t ext4 /dev/vdb /mnt\n\
         dd if=/dev/urandom of=/mnt/keep bs=1M count=4 2> /run/dd; sha256sum /mnt/keep > /run/sum\n\
         dd if=/dev/zero of=/mnt/file bs=1M count={LEN_MIB} conv=fsync 2> /run/dd"
    ))?;
    let before = allocated(&image)?;
    ensure!(
        before >= LEN_MIB * MIB,
        "a file of {LEN_MIB} MiB was synced, and the image has {} MiB",
        mib(before)
    );
    let said = boot.sh("set -e; rm /mnt/file; sync; /sbin/fstrim -v /mnt")?;
    let mut after = before;
    // ext4 on the host gives blocks back when its journal's transaction is over.
    until(Duration::from_secs(60), "the image has become smaller on the host", || {
        after = allocated(&image)?;
        Ok(after + LEN_MIB * MIB <= before + MIB)
    })?;
    println!("     {said}; the image had {} MiB and has {}", mib(before), mib(after));
    let check = boot.sh(
        "set -e; umount /mnt; echo 3 > /proc/sys/vm/drop_caches; mount -t ext4 /dev/vdb /mnt; sha256sum -c /run/sum\n\
         umount /mnt; /sbin/e2fsck -f -n /dev/vdb 2>&1",
    )?;
    println!("     e2fsck: {}", check.lines().last().unwrap_or_default());
    guest_log::require_no_fault(&guest_log::take(boot.machine()?)?)
}

pub(crate) fn zeroes(boot: &mut Boot<'_>) -> Result<()> {
    // Not at the edges of anything: from 512 bytes in, to 512 bytes short of 3 MiB, in 4 MiB of noise.
    let script = "set -e; set -o pipefail\n\
        count() { guest read /dev/vdb $1 $2 | tr -d '\\0' | wc -c; }\n\
        at=$((128 * 1048576)); end=$(($at + 3 * 1048576))\n\
        head -c 4194304 /dev/urandom | tr '\\0' x | guest write /dev/vdb $at\n\
        /sbin/blkdiscard -f -z -o $(($at + 512)) -l $(($end - $at - 1024)) /dev/vdb 2> /run/said\n\
        count $at 512; count $(($at + 512)) $(($end - $at - 1024)); count $(($end - 512)) 1049088";
    let counts = boot.sh(script)?;
    let found: Vec<&str> = counts.lines().collect();
    println!("     bytes that are not zero before, in and behind it: {}", found.join(", "));
    ensure!(found == ["512", "0", "1049088"], "512, 0 and 1049088 should be");
    guest_log::require_no_fault(&guest_log::take(boot.machine()?)?)
}
