//! A disk that grows while the guest runs: the image is made longer, SIGHUP has tapdisk look.

use crate::command::{command, output, until};
use crate::lab::guest_disk::{self, write_noise};
use crate::lab::guest_log;
use crate::lab::qemu::boot::Boot;
use crate::lab::qemu::disks::MIB;
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::fs::File;
use std::time::Duration;

pub(crate) const BEFORE: u64 = 64 * MIB;
const AFTER: u64 = 96 * MIB;

pub(crate) fn run(boot: &mut Boot<'_>) -> Result<()> {
    write_noise(boot.machine()?, "vdf", 0, 4 * MIB)?;
    let old = guest_disk::digest(boot.machine()?, "vdf", 0, 4 * MIB)?;
    let server = boot.server("growing")?;
    let image = server.plan().image.clone();
    File::options().write(true).open(&image)?.set_len(AFTER)?;
    server.signal(Signal::HUP)?;
    let sectors = AFTER / 512;
    let mut found = String::new();
    let is_seen = until(Duration::from_secs(60), "the guest has seen the new size", || {
        boot.server("growing")?.must_live()?;
        found = boot.sh("cat /sys/block/vdf/size")?;
        Ok(found == sectors.to_string())
    });
    is_seen.with_context(|| format!("it has {found} sectors"))?;
    let log = guest_log::take(boot.machine()?)?;
    let wanted = format!("detected capacity change from {} to {sectors}", BEFORE / 512);
    let line = log.iter().find(|line| line.text.starts_with("vdf: ") && line.text.contains(&wanted));
    println!(
        "     kernel: {}",
        line.with_context(|| format!("the guest's kernel did not log `{wanted}`"))?.text
    );
    guest_log::require_no_fault(&log)?;

    let last = AFTER - MIB;
    write_noise(boot.machine()?, "vdf", last, MIB)?;
    boot.sh("sync /dev/vdf")?;
    let new = guest_disk::digest(boot.machine()?, "vdf", last, MIB)?;
    let tail = format!("tail -c {MIB} {} | sha256sum", image.display());
    let on_the_host = output(&mut command("sh", ["-c", &tail]))?;
    ensure!(on_the_host.starts_with(&new), "the image's last MiB is not what the guest wrote");
    ensure!(
        guest_disk::digest(boot.machine()?, "vdf", 0, 4 * MIB)? == old,
        "what was there before has changed"
    );
    guest_log::require_no_fault(&guest_log::take(boot.machine()?)?)
}
