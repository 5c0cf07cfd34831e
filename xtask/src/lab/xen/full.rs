//! 2006, where it happened: a domain writes 1 GB to a sparse disk of 1 GiB on a file system of dom0 that has 200 MB free.

use crate::command::{until, wait_while};
use crate::lab::disk_full::{FREE, SIZE, mib};
use crate::lab::ground::MIB;
use crate::lab::guest_log;
use crate::lab::xen::Scenario;
use crate::lab::xen::boot::Boot;
use crate::lab::xen::domain;
use crate::lab::xen::ground::{Ground, allocated};
use crate::lab::xen::server::{Kind, Plan, Server};
use crate::lab::xen::stage::Stage;
use anyhow::{Context, Result, ensure};
use lab::shell::{Job, Shell};
use std::thread;
use std::time::Duration;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "2006: the domain is told that dom0 is full, and recovers",
        run: by_tapdisk,
        peer: false,
    },
    Scenario {
        name: "2006: the same through the kernel's blkback, as the reference",
        run: by_blkback,
        peer: true,
    },
    Scenario { name: "2006: with hold the domain waits for room, and sees no error", run: hold, peer: false },
];

const DOMAIN: domain::Plan = domain::Plan::new("full");
const DISK: &str = "xvdb";

/// dom0 has a disk for each scenario, to be made into a file system that is almost full.
pub(crate) fn boot(stage: &Stage) -> Result<Boot<'_>> {
    let disks =
        ["tapdisk", "blkback", "hold"].map(|name| stage.work.sparse(&format!("{name}.disk"), 1536 * MIB));
    Boot::new(stage, "full", disks.into_iter().collect::<Result<_>>()?)
}

/// A partition with an ext3 and, in it, files that are synced; returns what they hold.
fn prepare(boot: &mut Boot<'_>) -> Result<String> {
    let mut guest = boot.guest(DOMAIN.name)?;
    // What another scenario left in the log is its own business.
    guest_log::take(&mut guest)?;
    let sums = guest.sh(&format!(
        "set -e; echo 'start=2048, type=83' | /sbin/sfdisk -q /dev/{DISK}; test -b /dev/{DISK}1\n\
         /sbin/mke2fs -q -F -t ext3 /dev/{DISK}1; mount -t ext3 /dev/{DISK}1 /mnt; cd /mnt\n\
         for n in $(seq 20); do dd if=/dev/urandom of=safe$n bs=256k count=1 conv=fsync 2> /run/dd; done\n\
         sync; sha256sum safe*"
    ))?;
    guest_log::require_no_fault(&guest_log::take(&mut guest)?)?;
    Ok(sums)
}

/// 1 GB, in the background. All of it would fit into the guest's file system.
fn write_a_gigabyte(boot: &mut Boot<'_>) -> Result<Job> {
    boot.guest(DOMAIN.name)?.background("dd", "dd if=/dev/zero of=/mnt/big bs=1000000 count=1000 conv=fsync")
}

/// What the domain sees of a full dom0 must not depend on who serves it.
fn is_told(boot: &mut Boot<'_>, image: &str) -> Result<()> {
    let job = write_a_gigabyte(boot)?;
    let dd = job.wait(&mut boot.guest(DOMAIN.name)?)?;
    println!("     dd: {}", dd.said.lines().next().unwrap_or("nothing"));
    ensure!(dd.status != 0, "dd wrote and synced 1 GB where {FREE} bytes fit\n{}", dd.said);
    println!("     {} MiB of the image are allocated", mib(allocated(boot, image)?));
    let log = guest_log::take(&mut boot.guest(DOMAIN.name)?)?;
    let error = log.iter().find(|line| line.text.contains(&format!("I/O error, dev {DISK}, sector ")));
    println!("     kernel: {}", error.context("the domain's kernel logged no I/O error")?.text);
    Ok(())
}

/// In the domain that comes after, once there is room.
fn recovers(boot: &mut Boot<'_>, sums: &str) -> Result<()> {
    let mut guest = boot.guest(DOMAIN.name)?;
    guest.sh(&format!("mount -t ext3 /dev/{DISK}1 /mnt")).context("after space was added")?;
    let log = guest_log::take(&mut guest)?;
    let recovery =
        log.iter().find(|line| line.text.contains(&format!("EXT4-fs ({DISK}1): recovery complete")));
    println!("     kernel: {}", recovery.context("the domain's kernel did not recover the journal")?.text);
    let found = guest.sh("cd /mnt; sha256sum safe*")?;
    ensure!(found == sums, "what was synced is not there:\n{found}\nshould be\n{sums}");
    check(&mut guest)?;
    // The file system that recovered is a working one.
    guest.sh(&format!(
        "set -e; mount -t ext3 /dev/{DISK}1 /mnt; rm -f /mnt/big; dd if=/dev/zero of=/mnt/more bs=1M count=64 conv=fsync 2>&1"
    ))?;
    check(&mut guest)?;
    guest_log::require_no_error(&guest_log::take(&mut guest)?)
}

/// The file system is unmounted, and whole.
fn check(guest: &mut dyn Shell) -> Result<()> {
    let said = guest.sh(&format!("umount /mnt && /sbin/e2fsck -f -n /dev/{DISK}1 2>&1"))?;
    println!("     e2fsck: {}", said.lines().last().unwrap_or("nothing"));
    Ok(())
}

fn by_tapdisk(boot: &mut Boot<'_>) -> Result<()> {
    run(boot, "vdb", Kind::Tapdisk)
}

fn by_blkback(boot: &mut Boot<'_>) -> Result<()> {
    run(boot, "vdc", Kind::Blkback)
}

fn run(boot: &mut Boot<'_>, disk: &str, kind: Kind) -> Result<()> {
    let ground = Ground::make(boot, disk, Some(FREE))?;
    let image = ground.sparse(boot, "disk.raw", SIZE)?;
    let plan = Plan::new(DOMAIN.name, DISK, &image).by(kind);
    boot.need(DOMAIN)?;
    let mut server = Server::attach(boot, plan.clone())?;
    let sums = prepare(boot)?;
    is_told(boot, &image)?;
    server.must_live(boot)?;
    // No look at the safe files yet: the kernel has dropped metadata that it could not write in its place, and has it
    // only in the journal until that is replayed.
    boot.destroy(DOMAIN.name)?;
    server.follow(boot)?;

    ground.enlarge(boot)?;
    boot.create(DOMAIN)?;
    let server = Server::attach(boot, plan)?;
    recovers(boot, &sums)?;
    server.detach(boot)
}

fn hold(boot: &mut Boot<'_>) -> Result<()> {
    let ground = Ground::make(boot, "vdd", Some(FREE))?;
    let image = ground.sparse(boot, "disk.raw", SIZE)?;
    boot.need(DOMAIN)?;
    let mut server = Server::attach(boot, Plan::new(DOMAIN.name, DISK, &image).with("--on-enospc hold"))?;
    let sums = prepare(boot)?;
    let job = write_a_gigabyte(boot)?;
    // Full is when no more space is taken for a while, although there is a writer.
    let mut free = ground.free(boot)?;
    wait_while(Duration::from_secs(300), Duration::from_secs(4), "space is being taken", || {
        let before = std::mem::replace(&mut free, ground.free(boot)?);
        Ok(before != free || free > FREE / 10)
    })?;
    wait_until_held(boot, &mut server)?;
    // What is held is nobody's loss: whoever serves the disk next holds it, too.
    server.stop(boot).context("SIGTERM with held requests")?;
    server.start_again(boot)?;
    wait_until_held(boot, &mut server).context("after an orderly restart")?;
    server.kill(boot)?;
    server.start_again(boot)?;
    wait_until_held(boot, &mut server).context("after kill -9")?;
    let mut guest = boot.guest(DOMAIN.name)?;
    let early = job.ended(&mut guest)?;
    ensure!(early.is_none(), "dd did not wait: {early:?}");
    guest_log::require_no_fault(&guest_log::take(&mut guest)?).context("while writes are held")?;

    ground.enlarge(boot)?;
    let dd = job.wait(&mut boot.guest(DOMAIN.name)?)?;
    println!("     dd, after space was added: {}", dd.said.lines().last().unwrap_or("nothing"));
    ensure!(dd.status == 0, "dd was not spared an error:\n{}", dd.said);
    let written = allocated(boot, &image)?;
    ensure!(written >= 1_000_000_000, "only {} MiB of the image are allocated", mib(written));
    let mut guest = boot.guest(DOMAIN.name)?;
    let found = guest.sh("set -e; cd /mnt; test $(stat -c %s big) = 1000000000; sha256sum safe*")?;
    ensure!(found == sums, "what was synced is not there:\n{found}\nshould be\n{sums}");
    check(&mut guest)?;
    guest_log::require_no_fault(&guest_log::take(&mut guest)?)?;
    server.detach(boot)
}

/// SIGUSR1 makes tapdisk say whether it holds requests.
fn wait_until_held(boot: &mut Boot<'_>, server: &mut Server) -> Result<()> {
    server.wait_until_it_serves(boot)?;
    let count = |boot: &mut Boot<'_>, server: &Server| {
        Ok::<_, anyhow::Error>(server.said(boot)?.matches("requests are held").count())
    };
    let before = count(boot, server)?;
    until(Duration::from_secs(180), "tapdisk holds requests", || {
        server.must_live(boot)?;
        server.signal(boot, "USR1")?;
        thread::sleep(Duration::from_millis(200));
        Ok(count(boot, server)? > before)
    })
}
