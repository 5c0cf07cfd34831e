//! A load on one connection: it keeps a number of requests in flight, checks each answer, and times them.
//!
//! It must cost little, so that it is the server that is measured.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::time::{ClockId, clock_gettime};

use crate::cell::{Cell, Figures};
use crate::cpu::Meter;
use crate::histogram::Histogram;
use crate::image::Contents;
use crate::peer::Client;

mod nbd;
mod vhost;

/// How long to run: first a while that does not count.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) warm: Duration,
    pub(crate) counted: Duration,
}

/// Requests in flight on a connection.
trait Load {
    /// Sends the first requests, as many as are to be in flight.
    fn start(&mut self) -> Result<()>;

    /// Takes the answers that are there, waiting for the first, and sends as many new requests. Says what time it is.
    fn turn(&mut self) -> Result<Instant>;

    /// Takes the answers that are still to come, and leaves.
    fn finish(self) -> Result<()>;

    fn tally(&mut self) -> &mut Tally;
}

/// Runs one cell against a server and says what it did. An error is a wrong or missing answer.
pub(crate) fn run(
    client: Client,
    cell: &Cell,
    contents: Contents,
    span: Span,
    meter: &Meter,
) -> Result<Figures> {
    match client {
        Client::Nbd(client) => measure(nbd::Load::new(client, cell, contents), span, meter),
        Client::VhostUser(device) => measure(vhost::Load::new(device, cell, contents)?, span, meter),
    }
}

/// Writes all of an export once, so that a memory back end holds what a reader expects.
pub(crate) fn write_all(client: Client, cell: &Cell) -> Result<()> {
    let requests = client.size() / cell.len as u64;
    match client {
        Client::Nbd(client) => serve(nbd::Load::new(client, cell, Contents::Unknown), requests),
        Client::VhostUser(device) => serve(vhost::Load::new(device, cell, Contents::Unknown)?, requests),
    }
}

fn measure(mut load: impl Load, span: Span, meter: &Meter) -> Result<Figures> {
    load.start()?;

    let warmed = Instant::now() + span.warm;
    while load.turn()? < warmed {}

    let (cpu, own, start) = (meter.read()?, own_cpu(), Instant::now());
    *load.tally() = Tally::new();
    while load.turn()? < start + span.counted {}
    let took = start.elapsed();
    let (own, cpu) = (own_cpu() - own, meter.read()?.since(&cpu));

    let tally = std::mem::replace(load.tally(), Tally::new());
    ensure!(tally.served > 0, "nothing was served in {took:?}");
    load.finish()?;
    Ok(Figures {
        iops: tally.served as f64 / took.as_secs_f64(),
        cpu_us: cpu.as_secs_f64() * 1e6 / tally.served as f64,
        p50_us: tally.latencies.quantile_us(0.50),
        p99_us: tally.latencies.quantile_us(0.99),
        client_busy: Some(own.as_secs_f64() / took.as_secs_f64()),
    })
}

fn serve(mut load: impl Load, requests: u64) -> Result<()> {
    load.start()?;
    while load.tally().served < requests {
        load.turn()?;
    }
    load.finish()
}

struct Tally {
    served: u64,
    latencies: Histogram,
}

impl Tally {
    fn new() -> Tally {
        Tally { served: 0, latencies: Histogram::new() }
    }

    fn count(&mut self, latency: Duration) {
        self.served += 1;
        self.latencies.count(latency);
    }
}

/// The CPU time of this thread so far.
pub(crate) fn own_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}
