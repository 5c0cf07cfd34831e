//! What the guest may believe durable is there after the host's power is cut: with its write cache on, what it synced;
//! with the cache off, all that it wrote.

use crate::command::{command, output};
use crate::lab::ground::Ground;
use crate::lab::guest_disk::{self, write_noise};
use crate::lab::guest_log;
use crate::lab::qemu::boot::Boot;
use crate::lab::qemu::disks::MIB;
use anyhow::{Result, ensure};

/// The image's name on the ground.
pub(crate) const IMAGE: &str = "durable.raw";

pub(crate) fn run(boot: &mut Boot<'_>) -> Result<()> {
    let cache = boot.sh("cat /sys/block/vdg/cache_type")?;
    ensure!(cache == "write back", "the guest is told of a cache `{cache}`: it would not sync");
    write_noise(boot.machine()?, "vdg", 0, MIB)?;
    // The image is written through the host's page cache: without a sync little of it is on the host's disk.
    println!("     before the sync it is {}", word(is_there(boot, 0)?));
    boot.sh("sync /dev/vdg")?;
    ensure!(is_there(boot, 0)?, "what the guest synced is lost");

    boot.sh("echo write through > /sys/block/vdg/cache_type")?;
    let cache = boot.sh("cat /sys/block/vdg/cache_type")?;
    ensure!(cache == "write through", "the guest turned the cache off, and it is `{cache}`");
    for at in [MIB, 0] {
        write_noise(boot.machine()?, "vdg", at, MIB)?;
        ensure!(is_there(boot, at)?, "what the guest wrote at {at} with the cache off is lost");
    }

    boot.sh("echo write back > /sys/block/vdg/cache_type")?;
    write_noise(boot.machine()?, "vdg", 2 * MIB, MIB)?;
    boot.sh("sync /dev/vdg")?;
    ensure!(is_there(boot, 2 * MIB)?, "with the cache on again, what the guest synced is lost");
    guest_log::require_no_fault(&guest_log::take(boot.machine()?)?)
}

fn word(is_there: bool) -> &'static str {
    if is_there { "there" } else { "not there" }
}

/// Whether a MiB as the guest reads it would be in the image after a power cut.
fn is_there(boot: &mut Boot<'_>, at: u64) -> Result<bool> {
    let wanted = guest_disk::digest(boot.machine()?, "vdg", at, MIB)?;
    let cut: Ground = boot.grounds[0].after_a_power_cut(&boot.stage.work, "cut")?;
    let image = cut.path(IMAGE);
    let part = format!("tail -c +{} {} | head -c {MIB} | sha256sum", at + 1, image.display());
    Ok(output(&mut command("sh", ["-c", &part]))?.starts_with(&wanted))
}
