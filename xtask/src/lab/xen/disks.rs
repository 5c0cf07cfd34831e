//! Domains with a disk of each kind; what a domain does with a disk in its ordinary life.

use crate::command::until;
use crate::lab::disk_full::mib;
use crate::lab::ground::MIB;
use crate::lab::guest_disk::{self, names_the_faulty, require_no_fault, write_and_check, write_noise};
use crate::lab::guest_log;
use crate::lab::xen::Scenario;
use crate::lab::xen::boot::Boot;
use crate::lab::xen::domain;
use crate::lab::xen::ground::{Ground, allocated};
use crate::lab::xen::server::{Kind, PATIENCE, Plan, Server};
use crate::lab::xen::stage::Stage;
use crate::lab::xen::{durable, negotiation, sync};
use anyhow::{Context, Result, ensure};
use lab::shell::Shell;
use std::ops::Range;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "negotiation: two queues with rings of sixteen pages",
        run: negotiation::wide,
        peer: false,
    },
    Scenario { name: "negotiation: requests of 256 segments", run: negotiation::indirect, peer: false },
    Scenario { name: "durable: flush and barrier, each, both and none", run: durable::run, peer: false },
    Scenario { name: "sync: one that fails is told by the writes after it", run: sync::told, peer: false },
    Scenario {
        name: "sync: one that fails takes the disk away, if asked to",
        run: sync::disconnects,
        peer: false,
    },
    Scenario { name: "trim: fstrim gives room back to dom0", run: trim, peer: true },
    Scenario { name: "read-only: reads are true and writes are refused", run: read_only, peer: false },
    Scenario { name: "blocks: a disk of 4096-byte blocks", run: large_blocks, peer: false },
    Scenario {
        name: "faults: reads fail at the sectors that fail and nowhere else",
        run: reads,
        peer: false,
    },
    Scenario {
        name: "faults: writes fail at the sectors that fail and nowhere else",
        run: writes,
        peer: false,
    },
    Scenario { name: "growth: a disk grows while the domain runs", run: growth, peer: false },
    Scenario { name: "tools: what xl and xentop show", run: tools, peer: true },
];

/// The domain of most scenarios.
pub(crate) const DOMAIN: domain::Plan = domain::Plan::new("plain");
pub(crate) const DISK: &str = "xvdb";
/// dom0's disk with images, and the one whose copy tells what is durable.
pub(crate) const IMAGES: &str = "vdb";
pub(crate) const DURABLE: &str = "vdc";

pub(crate) fn boot(stage: &Stage) -> Result<Boot<'_>> {
    let images = stage.work.sparse("images.disk", 1024 * MIB)?;
    let durable = stage.work.sparse(durable::BACKING, 128 * MIB)?;
    let mut boot = Boot::new(stage, "disks", vec![images, durable])?;
    for disk in [IMAGES, DURABLE] {
        Ground::make(&mut boot, disk, None)?;
    }
    Ok(boot)
}

/// A disk for the domain, new and sparse.
pub(crate) fn plan(boot: &mut Boot<'_>, len: u64) -> Result<Plan> {
    boot.need(DOMAIN)?;
    let image = Ground::on(IMAGES).sparse(boot, "disk.raw", len)?;
    Ok(Plan::new(DOMAIN.name, DISK, &image))
}

fn trim(boot: &mut Boot<'_>) -> Result<()> {
    // Nothing is left for later in the new file system, which would write tables while we look at what is allocated.
    const LEN_MIB: u64 = 48;
    let plan = plan(boot, 128 * MIB)?;
    let image = plan.image.clone();
    let server = Server::attach(boot, plan)?;
    boot.guest(DOMAIN.name)?.sh(&format!(
        "set -e; /sbin/mke2fs -q -F -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/{DISK}\n\
         mount -t ext4 /dev/{DISK} /mnt\n\
         dd if=/dev/urandom of=/mnt/keep bs=1M count=4 2> /run/dd; sha256sum /mnt/keep > /run/sum\n\
         dd if=/dev/zero of=/mnt/file bs=1M count={LEN_MIB} conv=fsync 2> /run/dd"
    ))?;
    let before = allocated(boot, &image)?;
    ensure!(
        before >= LEN_MIB * MIB,
        "a file of {LEN_MIB} MiB was synced, and the image has {} MiB",
        mib(before)
    );
    let said = boot.guest(DOMAIN.name)?.sh("set -e; rm /mnt/file; sync; /sbin/fstrim -v /mnt")?;
    let mut after = before;
    // ext4 in dom0 gives blocks back when its journal's transaction is over.
    until(PATIENCE, "the image has become smaller in dom0", || {
        after = allocated(boot, &image)?;
        Ok(after + LEN_MIB * MIB <= before + MIB)
    })?;
    println!("     {said}; the image had {} MiB and has {}", mib(before), mib(after));
    let mut guest = boot.guest(DOMAIN.name)?;
    let check = guest.sh(&format!(
        "set -e; umount /mnt; echo 3 > /proc/sys/vm/drop_caches; mount -t ext4 /dev/{DISK} /mnt; sha256sum -c /run/sum\n\
         umount /mnt; /sbin/e2fsck -f -n /dev/{DISK} 2>&1"
    ))?;
    println!("     e2fsck: {}", check.lines().last().unwrap_or_default());
    require_no_fault(&mut guest)?;
    server.detach(boot)
}

fn read_only(boot: &mut Boot<'_>) -> Result<()> {
    let plan = plan(boot, 16 * MIB)?.with("--read-only");
    let image = plan.image.clone();
    boot.sh(&format!("dd if=/dev/urandom of={image} bs=1M count=16 conv=notrunc,fsync 2> /dev/null"))?;
    let sum = |boot: &mut Boot<'_>| boot.sh(&format!("sha256sum < {image}"));
    let before = sum(boot)?;
    let mut server = Server::attach(boot, plan)?;
    let mut guest = boot.guest(DOMAIN.name)?;
    let ro = guest.sh(&format!("cat /sys/block/{DISK}/ro"))?;
    ensure!(ro == "1", "the domain takes it for writable: ro is {ro}");
    let read = guest_disk::digest(&mut guest, DISK, 0, 16 * MIB)?;
    ensure!(before.starts_with(&read), "the domain reads other bytes than the image has");
    let write = guest.run(&format!("dd if=/dev/zero of=/dev/{DISK} bs=4k count=1 conv=fsync 2>&1"))?;
    ensure!(write.status != 0, "a write went well:\n{}", write.said);
    println!("     the domain says: {}", write.said.lines().next().unwrap_or_default());
    require_no_fault(&mut guest)?;
    ensure!(sum(boot)? == before, "the image has changed");
    server.must_live(boot)?;
    server.detach(boot)
}

fn large_blocks(boot: &mut Boot<'_>) -> Result<()> {
    let plan = plan(boot, 64 * MIB)?.with("--block-size 4096");
    let server = Server::attach(boot, plan)?;
    let mut guest = boot.guest(DOMAIN.name)?;
    let sizes =
        guest.sh(&format!("cd /sys/block/{DISK}/queue; cat logical_block_size physical_block_size"))?;
    ensure!(sizes == "4096\n4096", "logical and physical blocks of {}", sizes.replace('\n', ", "));
    // The protocol counts in 512 bytes whatever the disk's blocks are.
    let sectors = guest.sh(&format!("cat /sys/block/{DISK}/size"))?;
    ensure!(sectors == (64 * MIB / 512).to_string(), "a disk of {sectors} sectors");
    write_and_check(&mut guest, &format!("/dev/{DISK}"), "ext4")?;
    require_no_fault(&mut guest)?;
    server.detach(boot)
}

fn reads(boot: &mut Boot<'_>) -> Result<()> {
    faults(boot, 2000..2005, "read")
}

fn writes(boot: &mut Boot<'_>) -> Result<()> {
    faults(boot, 4000..4005, "write")
}

/// The kernel logs no more than ten errors in five seconds: the scenarios have five each.
fn faults(boot: &mut Boot<'_>, faulty: Range<u64>, operation: &str) -> Result<()> {
    let rule = format!("--fault {operation}:EIO:{}s..{}s", faulty.start, faulty.end);
    let plan = plan(boot, 16 * MIB)?.with(&rule);
    let mut server = Server::attach(boot, plan)?;
    names_the_faulty(&mut boot.guest(DOMAIN.name)?, DISK, faulty, operation)?;
    server.must_live(boot).context("after faults")?;
    server.detach(boot)
}

fn growth(boot: &mut Boot<'_>) -> Result<()> {
    const BEFORE: u64 = 64 * MIB;
    const AFTER: u64 = 96 * MIB;
    let plan = plan(boot, BEFORE)?;
    let image = plan.image.clone();
    let mut server = Server::attach(boot, plan)?;
    server.wait_until_it_serves(boot)?;
    let mut guest = boot.guest(DOMAIN.name)?;
    write_noise(&mut guest, DISK, 0, 4 * MIB)?;
    let old = guest_disk::digest(&mut guest, DISK, 0, 4 * MIB)?;
    boot.sh(&format!("truncate -s {AFTER} {image}"))?;
    server.signal(boot, "HUP")?;
    let sectors = AFTER / 512;
    let mut found = String::new();
    let is_seen = until(PATIENCE, "the domain has seen the new size", || {
        server.must_live(boot)?;
        found = boot.guest(DOMAIN.name)?.sh(&format!("cat /sys/block/{DISK}/size"))?;
        Ok(found == sectors.to_string())
    });
    is_seen.with_context(|| format!("it has {found} sectors"))?;
    let mut guest = boot.guest(DOMAIN.name)?;
    let log = guest_log::take(&mut guest)?;
    let wanted = format!("detected capacity change from {} to {sectors}", BEFORE / 512);
    let line = log.iter().find(|line| line.text.contains(DISK) && line.text.contains(&wanted));
    println!("     kernel: {}", line.with_context(|| format!("it did not log `{wanted}`"))?.text);
    guest_log::require_no_fault(&log)?;

    let last = AFTER - MIB;
    write_noise(&mut guest, DISK, last, MIB)?;
    guest.sh(&format!("sync /dev/{DISK}"))?;
    let new = guest_disk::digest(&mut guest, DISK, last, MIB)?;
    ensure!(guest_disk::digest(&mut guest, DISK, 0, 4 * MIB)? == old, "what was there before has changed");
    require_no_fault(&mut guest)?;
    let in_dom0 = boot.sh(&format!("tail -c {MIB} {image} | sha256sum"))?;
    ensure!(in_dom0.starts_with(&new), "the image's last MiB is not what the domain wrote");
    server.detach(boot)
}

fn tools(boot: &mut Boot<'_>) -> Result<()> {
    let plan = plan(boot, 64 * MIB)?;
    let server = Server::attach(boot, plan)?;
    write_noise(&mut boot.guest(DOMAIN.name)?, DISK, 0, 4 * MIB)?;
    guest_disk::digest(&mut boot.guest(DOMAIN.name)?, DISK, 0, 4 * MIB)?;
    let list = boot.sh(&format!("xl block-list {} 2>&1", DOMAIN.name))?;
    println!("     xl block-list:\n{list}");
    let top = boot.sh("xentop -b -x -i 1 2>&1")?;
    println!("     xentop:\n{top}");
    if boot.stage.arguments.server == Kind::Blkback {
        ensure!(top.lines().any(|line| line.starts_with("VBD ")), "xentop does not show the disk");
    } else {
        shows_its_counts(boot)?;
    }
    server.detach(boot)
}

/// xentop of 4.20 and later finds a userspace back end by a file (`struct vbd3_stats` of tools/libs/stat/xenstat_priv.h),
/// the one here knows only the kernel's. The file must say what the domain's kernel has counted.
fn shows_its_counts(boot: &mut Boot<'_>) -> Result<()> {
    let script = format!("awk '{{ print $3, $7 }}' /sys/block/{DISK}/stat");
    let counted = boot.guest(DOMAIN.name)?.sh(&script)?;
    let mut shown = String::new();
    let is_same = until(PATIENCE, "the file for xentop has the domain's counts", || {
        let words = boot.sh("od -v -A n -t u8 -w8 /dev/shm/td3-*/vbd-*")?;
        let words: Vec<&str> = words.lines().map(str::trim).collect();
        // Sectors that were read, and that were written, are the fifth and the ninth of its words.
        shown = [4, 8].map(|at| words.get(at).copied().unwrap_or("-")).join(" ");
        Ok(shown == counted)
    });
    println!("     sectors read and written: the kernel counts {counted}, xentop would show {shown}");
    is_same
}
