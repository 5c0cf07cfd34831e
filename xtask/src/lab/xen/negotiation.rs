//! What the real front end agrees on with us, if it is let to: many queues, large rings, large requests.

use crate::lab::ground::MIB;
use crate::lab::guest_disk::{require_no_fault, write_and_check};
use crate::lab::guest_log;
use crate::lab::verifier::Verifier;
use crate::lab::xen::boot::Boot;
use crate::lab::xen::disks::IMAGES;
use crate::lab::xen::domain;
use crate::lab::xen::ground::Ground;
use crate::lab::xen::nodes;
use crate::lab::xen::server::{Plan, Server};
use anyhow::{Context, Result, ensure};
use lab::shell::Shell;

/// Its front end takes all that it can get.
const WIDE: domain::Plan = domain::Plan {
    cpus: 2,
    memory_mib: 320,
    words: "xen_blkfront.max_ring_page_order=4 xen_blkfront.max_indirect_segments=256",
    ..domain::Plan::new("wide")
};
const DISK: &str = "xvdb";

fn attach(boot: &mut Boot<'_>, options: &str) -> Result<Server> {
    boot.need(WIDE)?;
    let image = Ground::on(IMAGES).sparse(boot, "wide.raw", 128 * MIB)?;
    Server::attach(boot, Plan::new(WIDE.name, DISK, &image).with(options))
}

/// What the front end says of itself in xenstore.
fn front(boot: &mut Boot<'_>, names: &[&str]) -> Result<Vec<String>> {
    let [_, front] = nodes::folders(boot.domain(WIDE.name)?.id, DISK, "vbd3")?;
    let mut values = Vec::new();
    for name in names {
        values.push(boot.sh(&format!("xenstore-read {front}/{name} 2> /dev/null || echo -"))?);
    }
    Ok(values)
}

/// Without indirect requests: a thousand entries of 256 pages each would be more than the domain has.
pub(crate) fn wide(boot: &mut Boot<'_>) -> Result<()> {
    let server = attach(boot, "--xen-features flush-cache,discard,multi-page,multi-queue")?;
    let said = front(boot, &["multi-queue-num-queues", "ring-page-order", "ring-ref", "queue-1/ring-ref15"])?;
    println!("     the front end says: {said:?}");
    ensure!(said[..3] == ["2", "4", "-"] && said[3] != "-", "two queues, an order of 4, a sixteenth page");
    let mut guest = boot.guest(WIDE.name)?;
    let cpus = guest.sh(&format!(
        "cd /sys/block/{DISK}/mq; for queue in *; do echo $queue: $(cat $queue/cpu_list); done"
    ))?;
    ensure!(cpus == "0: 0\n1: 1", "these are the queues and their CPUs:\n{cpus}");
    for cpu in 0..2 {
        let before = interrupts(&mut guest)?;
        guest.sh(&format!("taskset -c {cpu} guest sectors read /dev/{DISK} 0 200"))?;
        let after = interrupts(&mut guest)?;
        let used: Vec<u64> = before.iter().zip(&after).map(|(before, after)| after - before).collect();
        println!("     events for 200 reads on CPU {cpu}: {used:?}");
        ensure!(used.len() == 2, "{} queues have events", used.len());
        let (own, other) = (used[cpu], used[1 - cpu]);
        // A look at the partition table may happen at any time, on any CPU.
        ensure!(own >= 100 && other < 100, "reads on CPU {cpu} used the queues so often: {used:?}");
    }
    let verifier = Verifier::start(&mut guest, DISK, 32 * MIB, 16, 1)?;
    verifier.wait_for_progress(&mut guest)?;
    verifier.must_verify(&mut guest)?;
    server.detach(boot)
}

/// How often each ring's event came: ` 30:   12   34   xen-dyn    -event     blkif`, with a column for each CPU.
fn interrupts(guest: &mut dyn Shell) -> Result<Vec<u64>> {
    let table = guest.sh("grep 'blkif$' /proc/interrupts")?;
    let count = |line: &str| line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()).sum();
    Ok(table.lines().map(count).collect())
}

pub(crate) fn indirect(boot: &mut Boot<'_>) -> Result<()> {
    boot.need(WIDE)?;
    guest_log::take(&mut boot.guest(WIDE.name)?)?;
    let server = attach(boot, "--xen-data map --xen-features flush-cache,discard,persistent,indirect")?;
    let said = front(boot, &["multi-queue-num-queues", "ring-page-order", "ring-ref"])?;
    ensure!(said[..2] == ["-", "-"] && said[2] != "-", "one queue with one page: {said:?}");
    let mut guest = boot.guest(WIDE.name)?;
    let log = guest_log::take(&mut guest)?;
    let line = log.iter().find(|line| line.text.contains("blkfront: xvdb: "));
    let line = &line.context("the front end said nothing of its disk")?.text;
    println!("     kernel: {line}");
    let has = |words: &str| line.contains(words);
    ensure!(
        has("persistent grants: enabled") && has("indirect descriptors: enabled"),
        "not all of it: {line}"
    );
    let segments = guest.sh(&format!("cat /sys/block/{DISK}/queue/max_segments"))?;
    ensure!(segments == "256", "a request has {segments} segments at most");
    write_and_check(&mut guest, &format!("/dev/{DISK}"), "ext4")?;
    // What the guest's kernel counts: the first number of `stat` is that of reads.
    let count = format!("cut -c 1-9 /sys/block/{DISK}/stat");
    let before: u64 = guest.sh(&count)?.trim().parse()?;
    guest.sh(&format!("guest read /dev/{DISK} 0 {} > /dev/null", 16 * MIB))?;
    let after: u64 = guest.sh(&count)?.trim().parse()?;
    println!("     16 MiB were read in {} requests", after - before);
    ensure!(after - before < 32, "so many requests can't have 256 segments");
    require_no_fault(&mut guest)?;
    server.detach(boot)
}
