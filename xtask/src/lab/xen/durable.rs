//! What a domain may believe durable is there after dom0's power is cut, whatever it is told of flushes and barriers, and
//! each of its syncs is one of dom0's disk.

use crate::command::{command, output};
use crate::lab::ground::MIB;
use crate::lab::guest_disk::{self, require_no_fault, write_noise};
use crate::lab::guest_log;
use crate::lab::xen::boot::Boot;
use crate::lab::xen::disks::{DISK, DOMAIN, DURABLE};
use crate::lab::xen::ground::Ground;
use crate::lab::xen::server::{Plan, Server};
use anyhow::{Context, Result, ensure};
use lab::shell::Shell;
use std::path::Path;

/// The file on the host behind dom0's disk with the image.
pub(crate) const BACKING: &str = "durable.disk";
const IMAGE: &str = "durable.raw";
const LEN: u64 = 48 * MIB;
const SYNCS: u64 = 10;

/// What the domain is told, and what its kernel makes of it.
struct Case {
    features: &'static str,
    log: &'static str,
    cache: &'static str,
    fua: &'static str,
}

const CASES: &[Case] = &[
    Case { features: "flush-cache", log: "flush diskcache: enabled", cache: "write back", fua: "0" },
    Case { features: "barrier", log: "barrier: enabled", cache: "write back", fua: "1" },
    Case { features: "flush-cache,barrier", log: "flush diskcache: enabled", cache: "write back", fua: "0" },
    Case { features: "none", log: "barrier or flush: disabled", cache: "write through", fua: "0" },
];

pub(crate) fn run(boot: &mut Boot<'_>) -> Result<()> {
    CASES.iter().try_for_each(|case| run_case(boot, case).with_context(|| case.features.to_owned()))
}

fn run_case(boot: &mut Boot<'_>, case: &Case) -> Result<()> {
    boot.need(DOMAIN)?;
    // The image is written through dom0's page cache: without a sync little of it is on dom0's disk.
    let image = Ground::on(DURABLE).sparse(boot, IMAGE, LEN)?;
    let plan = Plan::new(DOMAIN.name, DISK, &image);
    guest_log::take(&mut boot.guest(DOMAIN.name)?)?;
    let server =
        Server::attach(boot, plan.with(&format!("--cache buffered --xen-features {}", case.features)))?;
    let mut guest = boot.guest(DOMAIN.name)?;
    let log = guest_log::take(&mut guest)?;
    let line = log.iter().find(|line| line.text.contains(&format!("blkfront: {DISK}: ")));
    let line = &line.context("the front end said nothing of its disk")?.text;
    let queue = guest.sh(&format!("cd /sys/block/{DISK}/queue; cat write_cache fua"))?;
    println!("     {}: {line} ({})", case.features, queue.replace('\n', ", fua "));
    ensure!(line.contains(case.log), "the kernel should say `{}`", case.log);
    ensure!(
        queue == format!("{}\n{}", case.cache, case.fua),
        "it should be {}, fua {}",
        case.cache,
        case.fua
    );

    // The disk alone.
    write_noise(&mut guest, DISK, 40 * MIB, MIB)?;
    if case.cache == "write back" {
        guest.sh(&format!("sync /dev/{DISK}"))?;
    }
    let wanted = guest_disk::digest(&mut guest, DISK, 40 * MIB, MIB)?;
    let cut = after_a_power_cut(boot)?;
    let part = format!("tail -c +{} {} | head -c {MIB} | sha256sum", 40 * MIB + 1, cut.path(IMAGE).display());
    ensure!(output(&mut command("sh", ["-c", &part]))?.starts_with(&wanted), "what was written is lost");
    drop(cut);

    // A file system on it, which orders its journal by flushes, by barriers, or not at all.
    boot.guest(DOMAIN.name)?.sh(&format!(
        "set -e; /sbin/mke2fs -q -F -t ext4 /dev/{DISK} 32M; mount -t ext4 /dev/{DISK} /mnt; sync"
    ))?;
    let before = flushes(boot)?;
    let sums = boot.guest(DOMAIN.name)?.sh(&format!(
        "set -e; cd /mnt; for n in $(seq {SYNCS}); do\n\
         dd if=/dev/urandom of=file$n bs=64k count=1 conv=fsync 2> /run/dd; done; sha256sum file*"
    ))?;
    let after = flushes(boot)?;
    let [domain, dom0] = [0, 1].map(|index| after[index] - before[index]);
    println!(
        "     for {SYNCS} fsyncs the domain's kernel flushed {domain} times, dom0's disk was flushed {dom0} times"
    );
    let promised = if case.cache == "write back" { SYNCS } else { 0 };
    ensure!(domain >= promised, "its fsyncs were no flushes");
    ensure!(dom0 >= SYNCS.max(domain), "not each of them reached dom0's disk");
    let cut = after_a_power_cut(boot)?;
    let found = read_file_system(&cut.path(IMAGE))?;
    drop(cut);
    ensure!(found == sums, "what was synced is not there:\n{found}\nshould be\n{sums}");
    let mut guest = boot.guest(DOMAIN.name)?;
    guest.sh("umount /mnt")?;
    require_no_fault(&mut guest)?;
    server.detach(boot)
}

/// How often the domain's kernel flushed its disk, and dom0's the disk with the image: the sixteenth number of `stat`
/// (Documentation/admin-guide/iostats.rst).
fn flushes(boot: &mut Boot<'_>) -> Result<[u64; 2]> {
    let count = |disk: &str| format!("awk '{{print $16}}' /sys/block/{disk}/stat");
    let domain = boot.guest(DOMAIN.name)?.sh(&count(DISK))?;
    let dom0 = boot.sh(&count(DURABLE))?;
    Ok([domain.parse()?, dom0.parse()?])
}

/// dom0's disk as it would be found: what its kernel has in memory is lost.
fn after_a_power_cut(boot: &Boot<'_>) -> Result<crate::lab::ground::Ground> {
    let work = &boot.stage.work;
    crate::lab::ground::Ground::copy_of(work, "cut", &work.folder().join(BACKING))
}

/// What the domain's own file system holds, once its journal is replayed.
fn read_file_system(image: &Path) -> Result<String> {
    let folder = image.with_extension("mount");
    std::fs::create_dir_all(&folder)?;
    output(command("mount", ["-t", "ext4", "-o", "loop"]).arg(image).arg(&folder))?;
    let sums = output(&mut command("sh", ["-c", &format!("cd {}; sha256sum file*", folder.display())]));
    output(command("umount", ["--"]).arg(&folder))?;
    Ok(sums?.trim_end().to_owned())
}
