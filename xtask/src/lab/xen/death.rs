//! tapdisk is killed and started again while a domain writes, syncs and verifies, domains are destroyed, disks come and
//! go: nobody else must notice, and nothing may be left behind.

use crate::command::until;
use crate::lab::ground::MIB;
use crate::lab::guest_disk::{require_no_fault, write_noise};
use crate::lab::verifier::Verifier;
use crate::lab::xen::Scenario;
use crate::lab::xen::boot::Boot;
use crate::lab::xen::domain;
use crate::lab::xen::ground::Ground;
use crate::lab::xen::nodes;
use crate::lab::xen::server::{PATIENCE, Plan, Server};
use crate::lab::xen::stage::Stage;
use crate::model::Numbers;
use anyhow::{Context, Result, ensure};
use lab::shell::Shell;
use std::thread;
use std::time::Duration;

const KILLS: u32 = 6;
const RESTARTS: u32 = 3;
const ATTACHMENTS: u32 = 20;
/// What the verifier writes to.
const LEN: u64 = 64 * MIB;
const THREADS: u32 = 8;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "death: kill -9 under load, and the domain does not notice", run: killed, peer: false },
    Scenario { name: "death: orderly restarts, and the domain does not notice", run: restarted, peer: false },
    Scenario { name: "attach: twenty times, and nothing is left behind", run: attached, peer: true },
    Scenario {
        name: "detach: with requests held, and the domain goes on",
        run: detached_while_held,
        peer: false,
    },
    Scenario { name: "attach: before the domain starts", run: attached_early, peer: true },
    Scenario { name: "attach: to nodes that a toolstack wrote", run: attached_to_nodes, peer: false },
    Scenario { name: "reboot: a domain ends by itself, and its disk with it", run: rebooted, peer: true },
    Scenario { name: "destroy: a domain under load, and nothing is left behind", run: destroyed, peer: true },
    Scenario {
        name: "destroy: a domain whose tapdisk is dead, and nothing is left behind",
        run: destroyed_dead,
        peer: false,
    },
];

const DOMAIN: domain::Plan = domain::Plan { memory_mib: 256, ..domain::Plan::new("mortal") };
const DISK: &str = "xvdb";

pub(crate) fn boot(stage: &Stage) -> Result<Boot<'_>> {
    let mut boot = Boot::new(stage, "death", vec![stage.work.sparse("death.disk", 1024 * MIB)?])?;
    Ground::make(&mut boot, "vdb", None)?;
    Ok(boot)
}

fn image(boot: &mut Boot<'_>) -> Result<String> {
    Ground::on("vdb").sparse(boot, "mortal.raw", 2 * LEN)
}

fn plan(boot: &mut Boot<'_>) -> Result<Plan> {
    Ok(Plan::new(DOMAIN.name, DISK, &image(boot)?))
}

/// Some requests take longer than others, so that they are not answered in their order.
const SLOW: &str = "--fault write:delay=30:every=7 --fault read:delay=20:every=5";

/// Something happens to the server while the domain verifies, so many times.
fn under_load(
    boot: &mut Boot<'_>,
    more: &str,
    strike: impl Fn(&mut Boot<'_>, &mut Server, &mut Numbers) -> Result<()>,
    times: u32,
) -> Result<()> {
    let seed = boot.stage.arguments.seed;
    println!("     --seed {seed}");
    let mut dice = Numbers::new(seed);
    boot.need(DOMAIN)?;
    let plan = plan(boot)?.with(SLOW).with(more);
    let mut server = Server::attach(boot, plan)?;
    let verifier = Verifier::start(&mut boot.guest(DOMAIN.name)?, DISK, LEN, THREADS, seed)?;
    for _ in 0..times {
        verifier.wait_for_progress(&mut boot.guest(DOMAIN.name)?)?;
        thread::sleep(Duration::from_millis(dice.below(400)));
        strike(boot, &mut server, &mut dice)?;
    }
    verifier.wait_for_progress(&mut boot.guest(DOMAIN.name)?)?;
    verifier.must_verify(&mut boot.guest(DOMAIN.name)?)?;
    server.detach(boot)
}

fn killed(boot: &mut Boot<'_>) -> Result<()> {
    let strike = |boot: &mut Boot<'_>, server: &mut Server, dice: &mut Numbers| {
        server.kill(boot)?;
        thread::sleep(Duration::from_millis(dice.below(300)));
        server.start_again(boot)
    };
    under_load(boot, "", strike, KILLS)
}

fn restarted(boot: &mut Boot<'_>) -> Result<()> {
    let strike = |boot: &mut Boot<'_>, server: &mut Server, _: &mut Numbers| {
        server.wait_until_it_serves(boot)?;
        server.stop(boot)?;
        server.start_again(boot)
    };
    // All that is under way is answered before each stop, so that pages may be mapped.
    under_load(boot, "--xen-data map", strike, RESTARTS)
}

/// What Xen counts of a domain: its event channels, and pages that others have mapped of it.
fn holdings(boot: &mut Boot<'_>) -> Result<[usize; 2]> {
    let id = boot.domain(DOMAIN.name)?.id;
    // `grant-table for remote d1 (v1)`, then a line `[0x008]      0 0x000001 …` for each entry in use.
    let said = boot.sh(&format!(
        "xl dmesg -c > /dev/null; xl debug-keys g; xl dmesg -c > /run/grants\n\
         lsevtchn {id} | wc -l; sed -n '/grant-table for remote d{id} /,/grant-table for remote/p' /run/grants | grep -c '\\['"
    ))?;
    let mut counts = said.lines().map(|line| line.trim().parse::<usize>());
    let mut next = || counts.next().with_context(|| format!("strange counts: {said}"))?.context("no number");
    Ok([next()?, next()?])
}

fn attached(boot: &mut Boot<'_>) -> Result<()> {
    boot.need(DOMAIN)?;
    let plan = plan(boot)?;
    let (mut counts, mut busiest) = (Vec::new(), [0; 2]);
    for _ in 0..ATTACHMENTS {
        let server = Server::attach(boot, plan.clone())?;
        let mut guest = boot.guest(DOMAIN.name)?;
        write_noise(&mut guest, DISK, 0, MIB)?;
        if counts.is_empty() {
            busiest = holdings(boot)?;
        }
        server.detach(boot)?;
        counts.push(holdings(boot)?);
    }
    let (first, last) = (counts[0], counts[counts.len() - 1]);
    println!("     event channels and grants while attached {busiest:?}, then {first:?}, at last {last:?}");
    let is_more =
        |found: &[usize; 2], than: &[usize; 2]| found.iter().zip(than).any(|(found, than)| found > than);
    ensure!(is_more(&busiest, &first), "an attached disk is not seen");
    ensure!(!counts.iter().any(|found| is_more(found, &first)), "they become more: {counts:?}");
    let left = boot.run(&format!("xenstore-ls -f | grep {}", nodes::number(DISK)?))?.said;
    ensure!(left.is_empty(), "nodes are left:\n{left}");
    require_no_fault(&mut boot.guest(DOMAIN.name)?)
}

/// Linux closes its end at once and then waits for each answer, with the thread that attends to all its devices: if one
/// never came, that domain could not attach or detach a disk any more.
fn detached_while_held(boot: &mut Boot<'_>) -> Result<()> {
    boot.need(DOMAIN)?;
    let plan = plan(boot)?;
    let server = Server::attach(boot, plan.clone().with("--on-error hold --fault write:EIO"))?;
    boot.guest(DOMAIN.name)?.sh(&format!(
        "rm -f /run/held; (head -c 4096 /dev/zero | guest write /dev/{DISK} 0; echo $? > /run/held) \
         < /dev/null > /dev/null 2>&1 &"
    ))?;
    until(PATIENCE, "the write is held", || Ok(server.said(boot)?.contains("requests that fail are held")))?;
    server.detach(boot)?;
    let mut status = String::new();
    until(PATIENCE, "the write has ended", || {
        status = boot.guest(DOMAIN.name)?.sh("cat /run/held 2> /dev/null || true")?;
        Ok(!status.is_empty())
    })?;
    ensure!(status != "0", "a write that was held went well");
    let server = Server::attach(boot, plan)?;
    write_noise(&mut boot.guest(DOMAIN.name)?, DISK, 0, MIB)?;
    server.detach(boot)
}

/// Whatever domain there was is gone.
fn without_a_domain(boot: &mut Boot<'_>) -> Result<()> {
    if boot.domain(DOMAIN.name).is_ok() { boot.destroy(DOMAIN.name) } else { Ok(()) }
}

fn attached_early(boot: &mut Boot<'_>) -> Result<()> {
    without_a_domain(boot)?;
    boot.create_paused(DOMAIN)?;
    let plan = plan(boot)?;
    let mut server = Server::start(boot, plan)?;
    boot.unpause(DOMAIN.name)?;
    server.wait_for_the_disk(boot)?;
    let mut guest = boot.guest(DOMAIN.name)?;
    write_noise(&mut guest, DISK, 0, MIB)?;
    require_no_fault(&mut guest)?;
    server.detach(boot)
}

fn attached_to_nodes(boot: &mut Boot<'_>) -> Result<()> {
    boot.need(DOMAIN)?;
    let mut plan = plan(boot)?;
    plan.has_nodes = true;
    let id = boot.domain(DOMAIN.name)?.id;
    boot.sh(&nodes::write(id, DISK, "vbd3", &[("params", &format!("aio:{}", plan.image))])?)?;
    let mut server = Server::attach(boot, plan)?;
    write_noise(&mut boot.guest(DOMAIN.name)?, DISK, 0, MIB)?;
    require_no_fault(&mut boot.guest(DOMAIN.name)?)?;
    // The toolstack closes the disk and removes what it wrote.
    boot.sh(&nodes::close(id, DISK, "vbd3")?)?;
    server.must_end_well(boot)
}

fn rebooted(boot: &mut Boot<'_>) -> Result<()> {
    without_a_domain(boot)?;
    boot.create(DOMAIN)?;
    let plan = plan(boot)?;
    let server = Server::attach(boot, plan.clone())?;
    let mut guest = boot.guest(DOMAIN.name)?;
    write_noise(&mut guest, DISK, 0, MIB)?;
    let before = crate::lab::guest_disk::digest(&mut guest, DISK, 0, MIB)?;
    guest.background("reboot", "sleep 1; reboot -f")?;
    boot.wait_until_gone(DOMAIN.name)?;
    server.follow(boot)?;
    boot.create(DOMAIN)?;
    let server = Server::attach(boot, plan)?;
    let after = crate::lab::guest_disk::digest(&mut boot.guest(DOMAIN.name)?, DISK, 0, MIB)?;
    ensure!(before == after, "the disk has changed");
    require_no_fault(&mut boot.guest(DOMAIN.name)?)?;
    server.detach(boot)
}

fn destroyed(boot: &mut Boot<'_>) -> Result<()> {
    boot.need(DOMAIN)?;
    let plan = plan(boot)?;
    let server = Server::attach(boot, plan)?;
    let verifier = Verifier::start(&mut boot.guest(DOMAIN.name)?, DISK, LEN, THREADS, 1)?;
    verifier.wait_for_progress(&mut boot.guest(DOMAIN.name)?)?;
    // Waits until no shadow of it is left, which mapped grants would keep.
    boot.destroy(DOMAIN.name)?;
    server.follow(boot)
}

fn destroyed_dead(boot: &mut Boot<'_>) -> Result<()> {
    boot.need(DOMAIN)?;
    let plan = plan(boot)?;
    let mut server = Server::attach(boot, plan)?;
    let verifier = Verifier::start(&mut boot.guest(DOMAIN.name)?, DISK, LEN, THREADS, 1)?;
    verifier.wait_for_progress(&mut boot.guest(DOMAIN.name)?)?;
    server.kill(boot)?;
    boot.destroy(DOMAIN.name)?;
    // Whoever starts it again has cleared away what was left.
    server.start_again(boot)?;
    server.must_end_well(boot)?;
    let left = boot.run(&format!("xenstore-ls -f | grep {}; ls /run/tapdisk", nodes::number(DISK)?))?.said;
    ensure!(left.is_empty(), "nodes or a journal are left:\n{left}");
    Ok(())
}
