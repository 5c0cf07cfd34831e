//! tapdisk is killed and started again while the guest writes, syncs and verifies: the guest must not notice.

use crate::lab::guest_disk::{self, write_noise};
use crate::lab::guest_log;
use crate::lab::qemu::boot::{Boot, Settings};
use crate::lab::qemu::disks::{MIB, digest};
use crate::lab::qemu::server::{Kind, Plan, Server};
use crate::lab::qemu::stage::Stage;
use crate::lab::qemu::{Linux, Scenario};
use crate::lab::verifier::{Verifier, tail};
use crate::model::Numbers;
use anyhow::{Result, anyhow, ensure};
use nbd_client::{Client, Request, Style};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

const KILLS: u32 = 10;
const RESTARTS: u32 = 3;
/// What the verifier writes to.
const LEN_MIB: u64 = 64;
const THREADS: u32 = 8;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "death: the verifier notices what is lost", run: noticed, peer: true },
    Scenario { name: "death: kill -9, ten times, and the guest does not notice", run: killed, peer: false },
    Scenario { name: "death: orderly restarts, and the guest does not notice", run: restarted, peer: false },
    Scenario { name: "death: an NBD client reads what the guest reads", run: by_nbd, peer: false },
];

pub(crate) fn boot(stage: &Stage, linux: Linux) -> Result<Boot<'_>> {
    let nbd = format!("unix:{}", nbd_socket(stage).display());
    let mut plan =
        Plan { queues: 2, ..Plan::new("mortal", stage.work.sparse("mortal.raw", 2 * LEN_MIB * MIB)?) };
    if stage.arguments.server == Kind::Tapdisk {
        // Some requests take longer than others, so that they are not answered in their order.
        let slow = ["--fault", "write:delay=30:every=7", "--fault", "read:delay=20:every=5"];
        plan = plan.with(&slow).with(&["--nbd", &nbd]);
    }
    Boot::new(stage, "death", Settings { linux, cpus: 2, words: "" }, Vec::new(), vec![plan])
}

fn nbd_socket(stage: &Stage) -> PathBuf {
    stage.sockets().join("nbd")
}

/// Starts the verifier, which goes on until it is told to stop.
fn start_verifier(boot: &mut Boot<'_>) -> Result<Verifier> {
    let seed = boot.stage.arguments.seed;
    Verifier::start(boot.machine()?, "vda", LEN_MIB * MIB, THREADS, seed)
}

/// Something happens to the server while the guest verifies, so many times.
fn under_load(
    boot: &mut Boot<'_>,
    strike: impl Fn(&mut Server, &mut Numbers) -> Result<()>,
    times: u32,
) -> Result<()> {
    let seed = boot.stage.arguments.seed;
    println!("     --seed {seed}");
    let mut dice = Numbers::new(seed);
    let verifier = start_verifier(boot)?;
    for _ in 0..times {
        verifier.wait_for_progress(boot.machine()?)?;
        thread::sleep(Duration::from_millis(dice.below(400)));
        strike(boot.server("mortal")?, &mut dice)?;
    }
    verifier.wait_for_progress(boot.machine()?)?;
    verifier.must_verify(boot.machine()?)
}

/// The test of the test: blocks that vanish behind the guest's back are missed.
fn noticed(boot: &mut Boot<'_>) -> Result<()> {
    let image = boot.server("mortal")?.plan().image.clone();
    let verifier = start_verifier(boot)?;
    verifier.wait_for_progress(boot.machine()?)?;
    // What one of its threads writes to. A hole, since writing through the host's page cache while tapdisk writes past it
    // is a fault of its own: the kernel answers the next sync with EIO.
    let lost = LEN_MIB * MIB / u64::from(THREADS);
    let image = File::options().write(true).open(&image)?;
    fallocate(&image, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, lost)?;
    let end = verifier.stop(boot.machine()?)?;
    println!("     {}", end.said.lines().last().unwrap_or_default());
    ensure!(
        end.status != 0 && end.said.contains("and is zeroes"),
        "it noticed nothing:\n{}",
        tail(&end.said)
    );
    guest_log::require_no_fault(&guest_log::take(boot.machine()?)?)
}

fn killed(boot: &mut Boot<'_>) -> Result<()> {
    let strike = |server: &mut Server, dice: &mut Numbers| {
        server.must_live()?;
        server.kill()?;
        thread::sleep(Duration::from_millis(dice.below(300)));
        server.start_again()
    };
    under_load(boot, strike, KILLS)
}

fn restarted(boot: &mut Boot<'_>) -> Result<()> {
    let strike = |server: &mut Server, _: &mut Numbers| {
        server.stop()?;
        server.start_again()
    };
    under_load(boot, strike, RESTARTS)
}

/// Both interfaces show one disk, also what each of them has just written.
fn by_nbd(boot: &mut Boot<'_>) -> Result<()> {
    write_noise(boot.machine()?, "vda", (LEN_MIB - 1) * MIB, MIB)?;
    let mut client = Client::connect(&nbd_socket(boot.stage), Style::Simple)?;
    client.set_patience(Duration::from_secs(60))?;
    let copy = boot.stage.work.fresh("copy.raw")?;
    let mut file = File::create(&copy)?;
    for at in (0..LEN_MIB).map(|number| number * MIB) {
        let read = client.ask(&Request::read(at, MIB))?;
        let read = read.map_err(|errno| anyhow!("NBD cannot read at {at}: {errno:?}"))?;
        file.write_all(&read.bytes)?;
    }
    drop(file);
    let (theirs, ours) = (guest_disk::digest(boot.machine()?, "vda", 0, LEN_MIB * MIB)?, digest(&copy)?);
    ensure!(theirs == ours, "the guest reads {theirs}, an NBD client {ours}");
    println!("     both read {ours}");

    let mut noise = vec![0; 1 << 20];
    let mut numbers = Numbers::new(boot.stage.arguments.seed);
    noise.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&numbers.next().to_le_bytes()));
    let written = client.ask(&Request::write(LEN_MIB * MIB, &noise))?;
    ensure!(written.is_ok(), "NBD cannot write: {written:?}");
    std::fs::write(&copy, &noise)?;
    let (theirs, ours) = (guest_disk::digest(boot.machine()?, "vda", LEN_MIB * MIB, MIB)?, digest(&copy)?);
    ensure!(theirs == ours, "an NBD client wrote {ours}, the guest reads {theirs}");
    guest_log::require_no_fault(&guest_log::take(boot.machine()?)?)
}
