//! What a request costs dom0, by how its data travels: a measurement, of which nothing is asserted. Xen is emulated here,
//! so that only the order of magnitude and the ranking mean something.

use crate::lab::ground::MIB;
use crate::lab::xen::boot::Boot;
use crate::lab::xen::domain;
use crate::lab::xen::ground::Ground;
use crate::lab::xen::server::{Kind, Plan, Server};
use crate::lab::xen::stage::Stage;
use anyhow::{Context, Result};
use lab::shell::Shell;

const DOMAIN: domain::Plan = domain::Plan { memory_mib: 256, ..domain::Plan::new("load") };
const LEN: u64 = 64 * MIB;
/// Rounds; in each every way has its turn, so that none has the quiet times for itself.
const ROUNDS: u32 = 3;

/// A way for data, and the disk that has it.
const WAYS: &[(&str, &str, Kind, &str)] = &[
    ("copy", "xvdb", Kind::Tapdisk, "--xen-data copy"),
    ("map", "xvdc", Kind::Tapdisk, "--xen-data map"),
    ("map, not persistent", "xvdd", Kind::Tapdisk, "--xen-data map --xen-features flush-cache,indirect"),
    ("blkback", "xvde", Kind::Blkback, ""),
];

/// A load, with DISK for the disk.
const LOADS: &[(&str, &str)] = &[
    ("reads of 512 bytes", "guest sectors read /dev/DISK 0 1000"),
    ("writes of 512 bytes", "guest sectors write /dev/DISK 0 1000"),
    ("reads of 16 MiB", "guest read /dev/DISK 0 16777216 > /dev/null"),
    ("writes of 16 MiB", "head -c 16777216 /dev/zero | guest write /dev/DISK 0"),
];

/// What all rounds took.
#[derive(Default, Clone, Copy)]
struct Sum {
    seconds: f64,
    requests: u64,
}

pub(crate) fn run(stage: &Stage) -> Result<()> {
    let mut boot = Boot::new(stage, "measure", vec![stage.work.sparse("measure.disk", 1024 * MIB)?])?;
    let ground = Ground::make(&mut boot, "vdb", None)?;
    boot.create(DOMAIN)?;
    let mut servers = Vec::new();
    for (way, disk, kind, more) in WAYS {
        let image = ground.sparse(&mut boot, &format!("{disk}.raw"), LEN)?;
        boot.sh(&format!("dd if=/dev/urandom of={image} bs=1M count={} conv=fsync 2> /dev/null", LEN / MIB))?;
        let plan = Plan::new(DOMAIN.name, disk, &image).by(*kind).with(more);
        servers.push(Server::attach(&mut boot, plan).with_context(|| (*way).to_owned())?);
    }
    for (load, script) in LOADS {
        let mut sums = vec![Sum::default(); WAYS.len()];
        for _ in 0..ROUNDS {
            for ((_, disk, _, _), sum) in WAYS.iter().zip(&mut sums) {
                let before = (cpu(&mut boot)?, requests(&mut boot, disk)?);
                boot.guest(DOMAIN.name)?.sh(&script.replace("DISK", disk))?;
                let after = (cpu(&mut boot)?, requests(&mut boot, disk)?);
                sum.seconds += after.0 - before.0;
                sum.requests += after.1 - before.1;
            }
        }
        for ((way, ..), Sum { seconds, requests }) in WAYS.iter().zip(sums) {
            let each = seconds * 1e6 / requests as f64;
            println!("     {load:20} {way:20} {each:8.0} us of dom0's CPU for each of {requests} requests");
        }
    }
    for server in servers {
        server.detach(&mut boot)?;
    }
    boot.end()
}

/// The seconds that dom0's CPU has worked, all of it: tapdisk, the kernel, its hypercalls.
fn cpu(boot: &mut Boot<'_>) -> Result<f64> {
    let seconds = boot.sh("xl list 0 | awk 'END { print $NF }'")?;
    seconds.parse().with_context(|| format!("strange seconds: {seconds}"))
}

/// The requests that the domain's kernel has made of a disk.
fn requests(boot: &mut Boot<'_>, disk: &str) -> Result<u64> {
    let count = boot.guest(DOMAIN.name)?.sh(&format!("awk '{{ print $1 + $5 }}' /sys/block/{disk}/stat"))?;
    count.parse().with_context(|| format!("a strange count: {count}"))
}
