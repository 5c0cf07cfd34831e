//! One guest with a disk of each kind; what a guest does with a disk in its ordinary life.

use crate::command::{command, output};
use crate::lab::ground::Ground;
use crate::lab::guest_disk::{self, write_and_check};
use crate::lab::qemu::boot::{Boot, Settings};
use crate::lab::qemu::server::{Kind, Plan};
use crate::lab::qemu::stage::Stage;
use crate::lab::qemu::{Linux, Scenario};
use crate::lab::qemu::{durable, faults, growth, trim};
use anyhow::{Context, Result, ensure};
use lab::shell::Shell as _;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "queues: two, one for each CPU, and both are used", run: queues, peer: true },
    Scenario { name: "trim: fstrim gives room back to the host", run: trim::fstrim, peer: true },
    Scenario { name: "trim: what is zeroed reads as zeroes", run: trim::zeroes, peer: true },
    Scenario { name: "read-only: reads are true and writes are refused", run: read_only, peer: true },
    Scenario { name: "blocks: a disk of 4096-byte blocks", run: large_blocks, peer: true },
    Scenario {
        name: "faults: reads fail at the sectors that fail and nowhere else",
        run: faults::reads,
        peer: false,
    },
    Scenario {
        name: "faults: writes fail at the sectors that fail and nowhere else",
        run: faults::writes,
        peer: false,
    },
    Scenario {
        name: "durable: a power cut of the host, with the guest's write cache on and off",
        run: durable::run,
        peer: false,
    },
    Scenario { name: "root: the guest lives on our disk, and survives a power cut", run: root, peer: true },
    Scenario { name: "growth: a disk grows while the guest runs", run: growth::run, peer: false },
];

/// /dev/vda is the root, and the guest has two CPUs.
pub(crate) fn boot(stage: &Stage, linux: Linux) -> Result<Boot<'_>> {
    let work = &stage.work;
    let root = work.fresh("root.raw")?;
    stage.root.disk(&root, 256 * MIB, &stage.tools)?;
    let still = work.fresh("still.raw")?;
    fill(&still, 16 * MIB)?;
    let mut faulty = Plan::new("faulty", work.sparse("faulty.raw", 16 * MIB)?);
    if stage.arguments.server == Kind::Tapdisk {
        faulty = faulty.with(&faults::arguments());
    }
    let ground = Ground::with_free(work, "host", 64 * MIB)?;
    let durable = ground.path(durable::IMAGE);
    File::create(&durable)?.set_len(32 * MIB)?;
    let mut durable = Plan::new("durable", durable);
    if stage.arguments.server == Kind::Tapdisk {
        durable = durable.with(&["--cache", "buffered"]);
    }
    let disks = vec![
        Plan::new("root", root),
        Plan { queues: 2, ..Plan::new("plain", work.sparse("plain.raw", 256 * MIB)?) },
        Plan { read_only: true, ..Plan::new("still", still) },
        Plan { block_size: 4096, ..Plan::new("large-blocks", work.sparse("large-blocks.raw", 128 * MIB)?) },
        faulty,
        Plan::new("growing", work.sparse("growing.raw", growth::BEFORE)?),
        durable,
    ];
    Boot::new(stage, "disks", Settings { linux, cpus: 2, words: "lab.root=/dev/vda" }, vec![ground], disks)
}

/// Bytes that nobody expects by chance.
fn fill(path: &Path, len: u64) -> Result<()> {
    let mut noise = File::open("/dev/urandom")?.take(len);
    let mut file = File::create(path)?;
    std::io::copy(&mut noise, &mut file)?;
    file.flush().context("fill an image")
}

/// The digest of a file of the host, as the guest's `sha256sum` prints it.
pub(crate) fn digest(path: &Path) -> Result<String> {
    let line = output(command("sha256sum", ["--"]).arg(path))?;
    Ok(line.split(' ').next().unwrap_or_default().to_owned())
}

fn require_no_fault(boot: &mut Boot<'_>) -> Result<()> {
    guest_disk::require_no_fault(boot.machine()?)
}

fn queues(boot: &mut Boot<'_>) -> Result<()> {
    let cpus =
        boot.sh("cd /sys/block/vdb/mq; for queue in *; do echo $queue: $(cat $queue/cpu_list); done")?;
    println!("     queues and their CPUs: {}", cpus.replace('\n', ", "));
    ensure!(cpus == "0: 0\n1: 1", "these are the queues and their CPUs:\n{cpus}");
    for cpu in 0..2 {
        let before = interrupts(boot)?;
        boot.sh(&format!("taskset -c {cpu} guest sectors read /dev/vdb 0 200"))?;
        let after = interrupts(boot)?;
        let used: Vec<u64> = before.iter().zip(&after).map(|(before, after)| after - before).collect();
        println!("     interrupts for 200 reads on CPU {cpu}: {used:?}");
        ensure!(used.len() == 2, "{} queues interrupt", used.len());
        let (own, other) = (used[cpu], used[1 - cpu]);
        // A look at the partition table may happen at any time, on any CPU.
        ensure!(own >= 100 && other < 100, "reads on CPU {cpu} used the queues so often: {used:?}");
    }
    require_no_fault(boot)
}

/// How often each queue of /dev/vdb interrupted the guest.
fn interrupts(boot: &mut Boot<'_>) -> Result<Vec<u64>> {
    // ` 30:   12   34   PCI-MSIX-0000:00:11.0   1-edge   virtio2-req.0`, with a column for each CPU.
    let table = boot.sh("grep \"$(basename $(readlink -f /sys/block/vdb/device))-req\" /proc/interrupts")?;
    let count = |line: &str| line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()).sum();
    Ok(table.lines().map(count).collect())
}

fn read_only(boot: &mut Boot<'_>) -> Result<()> {
    let image = boot.server("still")?.plan().image.clone();
    let before = digest(&image)?;
    let ro = boot.sh("cat /sys/block/vdc/ro")?;
    ensure!(ro == "1", "the guest takes it for writable: ro is {ro}");
    let read = guest_disk::digest(boot.machine()?, "vdc", 0, 16 * MIB)?;
    ensure!(read == before, "the guest reads other bytes than the image has");
    let write = boot.machine()?.run("dd if=/dev/zero of=/dev/vdc bs=4k count=1 conv=fsync 2>&1")?;
    ensure!(write.status != 0, "a write went well:\n{}", write.said);
    let trim = boot.machine()?.run("/sbin/blkdiscard /dev/vdc")?;
    ensure!(trim.status != 0, "a discard went well:\n{}", trim.said);
    ensure!(digest(&image)? == before, "the image has changed");
    println!("     the guest says: {}", write.said.lines().next().unwrap_or_default());
    boot.server("still")?.must_live()?;
    require_no_fault(boot)
}

fn large_blocks(boot: &mut Boot<'_>) -> Result<()> {
    let sizes = boot.sh("cd /sys/block/vdd/queue; cat logical_block_size physical_block_size")?;
    ensure!(sizes == "4096\n4096", "logical and physical blocks of {}", sizes.replace('\n', ", "));
    let half = boot.sh("guest sectors read /dev/vdd 1 1")?;
    ensure!(
        half.contains("Invalid argument"),
        "a part of a block was asked for, and the guest says `{half}`"
    );
    write_and_check(boot.machine()?, "/dev/vdd", "ext4")?;
    require_no_fault(boot)
}

fn root(boot: &mut Boot<'_>) -> Result<()> {
    let mounts = boot.sh("grep ' / ' /proc/mounts")?;
    ensure!(
        mounts.lines().last().is_some_and(|line| line.starts_with("/dev/vda / ext4 rw")),
        "the root is {mounts}"
    );
    boot.sh("dd if=/dev/urandom of=/kept bs=1M count=8 2> /run/dd; sha256sum /kept > /sum; sync")?;
    require_no_fault(boot)?;
    boot.cut_the_power()?;
    boot.start()?;
    println!("     after a power cut: {}", boot.sh("sha256sum -c /sum")?);
    require_no_fault(boot)
}
