//! A sync that fails: the guest's fsync must fail, and the writes after it, or the disk must go. (Of the errors that blkif.h
//! has numbers for, Linux's front end makes a success there: docs/decisions/0013-failed-flush.md.)

use crate::command::until;
use crate::lab::ground::MIB;
use crate::lab::guest_disk::write_noise;
use crate::lab::guest_log;
use crate::lab::xen::boot::Boot;
use crate::lab::xen::disks::{DISK, DOMAIN, plan};
use crate::lab::xen::server::{PATIENCE, Server};
use anyhow::{Context, Result, ensure};
use lab::shell::Shell;

const FAULT: &str = "--fault flush:EIO:times=1";

pub(crate) fn told(boot: &mut Boot<'_>) -> Result<()> {
    let plan = plan(boot, 32 * MIB)?.with(FAULT);
    let mut server = Server::attach(boot, plan)?;
    let mut guest = boot.guest(DOMAIN.name)?;
    write_noise(&mut guest, DISK, 0, MIB)?;
    guest_log::take(&mut guest)?;
    let sync = guest.run(&format!("sync /dev/{DISK}"))?;
    let log = guest_log::take(&mut guest)?;
    log.iter().for_each(|line| println!("     kernel: {}", line.text));
    println!("     the sync ends with {}: {}", sync.status, sync.said);
    ensure!(sync.status != 0, "the domain takes a failed sync for a good one");
    let write = guest.run(&format!("head -c 4096 /dev/urandom | guest write /dev/{DISK} 0"))?;
    println!("     the write after it: {}", write.said.lines().last().unwrap_or_default());
    ensure!(
        write.status != 0 && write.said.contains("Input/output error"),
        "a write went well: {}",
        write.said
    );
    guest.sh(&format!("guest read /dev/{DISK} 0 {MIB} > /dev/null")).context("reads go on")?;
    server.must_live(boot)?;
    boot.destroy(DOMAIN.name)?;
    server.wait(boot).map(drop)
}

pub(crate) fn disconnects(boot: &mut Boot<'_>) -> Result<()> {
    let plan = plan(boot, 32 * MIB)?.with(FAULT).with("--xen-on-failed-sync disconnect");
    let mut server = Server::attach(boot, plan)?;
    let mut guest = boot.guest(DOMAIN.name)?;
    write_noise(&mut guest, DISK, 0, MIB)?;
    let sync = guest.run(&format!("sync /dev/{DISK}"))?;
    println!("     the sync ends with {}", sync.status);
    ensure!(sync.status != 0, "the domain takes a failed sync for a good one");
    until(PATIENCE, "the domain has lost the disk", || {
        let read = boot.guest(DOMAIN.name)?.run(&format!("guest sectors read /dev/{DISK} 0 1"))?;
        Ok(read.status != 0 || !read.said.is_empty())
    })?;
    // Nobody else is served by it.
    let status = server.wait(boot)?;
    println!("     tapdisk ends with {status}: {}", server.said(boot)?.lines().last().unwrap_or_default());
    ensure!(status != 0, "a disk whose sync failed ended well");
    boot.destroy(DOMAIN.name)
}
