//! A disk that grows while the guest runs: the image is made longer, SIGHUP has tapdisk look.

use crate::command::{command, output, until};
use crate::lab::qemu::boot::Boot;
use crate::lab::qemu::disks::{MIB, digest_in_guest};
use crate::lab::qemu::guest_log;
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::fs::File;
use std::time::Duration;

pub(crate) const BEFORE: u64 = 64 * MIB;
const AFTER: u64 = 96 * MIB;

pub(crate) fn run(boot: &mut Boot<'_>) -> Result<()> {
    boot.sh("dd if=/dev/urandom of=/dev/vdf bs=1M count=4 oflag=direct 2> /run/dd")?;
    let old = digest_in_guest(boot, "vdf", 0, 4)?;
    let server = boot.server("growing")?;
    let image = server.plan().image.clone();
    File::options().write(true).open(&image)?.set_len(AFTER)?;
    server.signal(Signal::HUP)?;
    let sectors = AFTER / 512;
    let mut found = String::new();
    let is_seen = until(Duration::from_secs(60), "the guest has seen the new size", || {
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

    let last = AFTER / MIB - 1;
    boot.sh(&format!(
        "dd if=/dev/urandom of=/dev/vdf bs=1M seek={last} count=1 oflag=direct conv=fsync 2> /run/dd"
    ))?;
    let new = digest_in_guest(boot, "vdf", last, 1)?;
    let tail = format!("tail -c {MIB} {} | sha256sum", image.display());
    let on_the_host = output(&mut command("sh", ["-c", &tail]))?;
    ensure!(on_the_host.starts_with(&new), "the image's last MiB is not what the guest wrote");
    ensure!(digest_in_guest(boot, "vdf", 0, 4)? == old, "what was there before has changed");
    guest_log::require_no_fault(&guest_log::take(boot.machine()?)?)
}
