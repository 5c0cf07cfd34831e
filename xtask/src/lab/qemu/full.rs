//! 2006: a guest writes 1 GB to a sparse disk of 1 GiB on a file system of the host that has 200 MB free.

use crate::command::{until, wait_while};
use crate::lab::disk_full::{FREE, SIZE, allocated, mib};
use crate::lab::ground::Ground;
use crate::lab::guest_log;
use crate::lab::qemu::boot::{Boot, Settings};
use crate::lab::qemu::disks::MIB;
use crate::lab::qemu::server::{Kind, Plan, Server};
use crate::lab::qemu::stage::Stage;
use crate::lab::qemu::{Linux, Scenario};
use anyhow::{Context, Error, Result, ensure};
use lab::shell::{Job, Shell as _};
use rustix::process::Signal;
use std::fs::File;
use std::thread;
use std::time::Duration;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "2006: the guest is told that the host is full, and recovers", run: report, peer: true },
    Scenario {
        name: "2006: with hold the guest waits for room, over restarts too, and sees no error",
        run: hold,
        peer: false,
    },
];

/// /dev/vdb is told that there is no room, /dev/vdc waits for it.
pub(crate) fn boot(stage: &Stage, linux: Linux) -> Result<Boot<'_>> {
    let root = stage.work.fresh("root.raw")?;
    stage.root.disk(&root, 256 * MIB, &stage.tools)?;
    let grounds =
        vec![Ground::with_free(&stage.work, "host", FREE)?, Ground::with_free(&stage.work, "hold", FREE)?];
    let image = |ground: &Ground| {
        let path = ground.path("disk.raw");
        File::create(&path)?.set_len(SIZE)?;
        anyhow::Ok(path)
    };
    let mut holding = Plan::new("holding", image(&grounds[1])?);
    if stage.arguments.server == Kind::Tapdisk {
        holding = holding.with(&["--on-enospc", "hold"]);
    }
    let disks = vec![Plan::new("root", root), Plan::new("full", image(&grounds[0])?), holding];
    Boot::new(stage, "full", Settings { linux, cpus: 1, words: "lab.root=/dev/vda" }, grounds, disks)
}

/// A partition with an ext3 and, in it, files that are synced; returns what they hold.
fn prepare(boot: &mut Boot<'_>, disk: &str) -> Result<String> {
    // What another scenario left in the log is its own business.
    guest_log::take(boot.machine()?)?;
    let start = format!(
        "set -e; echo 'start=2048, type=83' | /sbin/sfdisk -q /dev/{disk}; test -b /dev/{disk}1\n\
         /sbin/mke2fs -q -F -t ext3 /dev/{disk}1; mount -t ext3 /dev/{disk}1 /mnt; cd /mnt\n\
         for n in $(seq 20); do dd if=/dev/urandom of=safe$n bs=256k count=1 conv=fsync 2> /run/dd; done\n\
         sync; sha256sum safe*"
    );
    let sums = boot.sh(&start)?;
    guest_log::require_no_fault(&guest_log::take(boot.machine()?)?)?;
    Ok(sums)
}

/// 1 GB, in the background. All of it would fit into the guest's file system.
fn write_a_gigabyte(boot: &mut Boot<'_>) -> Result<Job> {
    boot.machine()?.background("dd", "dd if=/dev/zero of=/mnt/big bs=1000000 count=1000 conv=fsync")
}

fn report(boot: &mut Boot<'_>) -> Result<()> {
    let sums = prepare(boot, "vdb")?;
    let dd = write_a_gigabyte(boot)?.wait(boot.machine()?)?;
    println!("     dd: {}", dd.said.lines().next().unwrap_or("nothing"));
    ensure!(dd.status != 0, "dd wrote and synced 1 GB where {FREE} bytes fit\n{}", dd.said);
    let image = boot.server("full")?.plan().image.clone();
    println!("     {} MiB of the image are allocated", mib(allocated(&image)?));
    let log = guest_log::take(boot.machine()?)?;
    let error = log.iter().find(|line| line.text.contains("I/O error, dev vdb, sector "));
    println!("     kernel: {}", error.context("the guest's kernel logged no I/O error of vdb")?.text);
    // No look at the safe files yet: the kernel has dropped metadata that it could not write in its place, and has it
    // only in the journal until that is replayed.
    boot.cut_the_power()?;
    boot.server("full")?.must_live()?;

    boot.grounds[0].enlarge()?;
    boot.start()?;
    boot.sh("mount -t ext3 /dev/vdb1 /mnt").context("after space was added")?;
    let log = guest_log::take(boot.machine()?)?;
    let recovery = log.iter().find(|line| line.text.contains("EXT4-fs (vdb1): recovery complete"));
    println!("     kernel: {}", recovery.context("the guest's kernel did not recover the journal")?.text);
    let found = boot.sh("cd /mnt; sha256sum safe*")?;
    ensure!(found == sums, "what was synced is not there:\n{found}\nshould be\n{sums}");
    check(boot, "vdb")?;
    // The file system that recovered is a working one.
    boot.sh(
        "set -e; mount -t ext3 /dev/vdb1 /mnt; rm -f /mnt/big; dd if=/dev/zero of=/mnt/more bs=1M count=64 conv=fsync 2>&1",
    )?;
    check(boot, "vdb")?;
    guest_log::require_no_error(&guest_log::take(boot.machine()?)?)
}

/// The file system is unmounted, and whole.
fn check(boot: &mut Boot<'_>, disk: &str) -> Result<()> {
    let said = boot.sh(&format!("umount /mnt && /sbin/e2fsck -f -n /dev/{disk}1 2>&1"))?;
    println!("     e2fsck: {}", said.lines().last().unwrap_or("nothing"));
    Ok(())
}

fn hold(boot: &mut Boot<'_>) -> Result<()> {
    let sums = prepare(boot, "vdc")?;
    let job = write_a_gigabyte(boot)?;
    // Full is when no more space is taken for a while, although there is a writer.
    let mut free = boot.grounds[1].free()?;
    wait_while(Duration::from_secs(240), Duration::from_secs(4), "space is being taken", || {
        let before = std::mem::replace(&mut free, boot.grounds[1].free()?);
        Ok(before != free || free > FREE / 10)
    })?;
    wait_until_held(boot.server("holding")?)?;
    // Who needs no space has nothing to wait for.
    boot.sh("guest read /dev/vdc 0 4194304 > /dev/null")?;
    // What is held is nobody's loss: whoever serves the disk next holds it, too.
    let server = boot.server("holding")?;
    server.stop().context("SIGTERM with held requests")?;
    server.start_again()?;
    wait_until_held(server).context("after an orderly restart")?;
    server.kill()?;
    server.start_again()?;
    wait_until_held(server).context("after kill -9")?;
    let early = job.ended(boot.machine()?)?;
    ensure!(early.is_none(), "dd did not wait: {early:?}");
    guest_log::require_no_fault(&guest_log::take(boot.machine()?)?).context("while writes are held")?;

    boot.grounds[1].enlarge()?;
    let dd = job.wait(boot.machine()?)?;
    println!("     dd, after space was added: {}", dd.said.lines().last().unwrap_or("nothing"));
    ensure!(dd.status == 0, "dd was not spared an error:\n{}", dd.said);
    let image = boot.server("holding")?.plan().image.clone();
    ensure!(
        allocated(&image)? >= 1_000_000_000,
        "only {} MiB of the image are allocated",
        mib(allocated(&image)?)
    );
    let found = boot.sh("set -e; cd /mnt; test $(stat -c %s big) = 1000000000; sha256sum safe*")?;
    ensure!(found == sums, "what was synced is not there:\n{found}\nshould be\n{sums}");
    check(boot, "vdc")?;
    guest_log::require_no_fault(&guest_log::take(boot.machine()?)?)
}

/// SIGUSR1 makes tapdisk say whether it holds requests.
fn wait_until_held(server: &mut Server) -> Result<()> {
    let count = |server: &Server| Ok::<_, Error>(server.said()?.matches("requests are held").count());
    server.wait_until_it_serves()?;
    let before = count(server)?;
    until(Duration::from_secs(120), "tapdisk holds requests", || {
        server.must_live()?;
        server.signal(Signal::USR1)?;
        thread::sleep(Duration::from_millis(200));
        Ok(count(server)? > before)
    })
}
