//! The verifier in a guest (`lab/guest`): it writes, syncs and reads back until it is told to stop.

use crate::command::until;
use crate::lab::guest_log;
use anyhow::{Result, bail, ensure};
use lab::agent::Answer;
use lab::shell::{Job, Shell};
use std::time::Duration;

/// Writes that show that the guest goes on.
const PROGRESS: u64 = 40;

/// A verifier that runs.
pub(crate) struct Verifier {
    job: Job,
}

impl Verifier {
    /// On the first `len` bytes of a disk, from so many threads.
    pub(crate) fn start(
        guest: &mut dyn Shell,
        disk: &str,
        len: u64,
        threads: u32,
        seed: u64,
    ) -> Result<Verifier> {
        let script = format!("guest verify /dev/{disk} . {len} {threads} {seed}");
        Ok(Verifier { job: guest.background(&format!("verify-{disk}"), &script)? })
    }

    /// Waits until the guest has written more than now. Its kernel must have nothing to complain of meanwhile.
    pub(crate) fn wait_for_progress(&self, guest: &mut dyn Shell) -> Result<()> {
        let mut first = None;
        until(Duration::from_secs(180), "the guest writes", || {
            if let Some(end) = self.job.ended(guest)? {
                bail!("the verifier has ended: status {}\n{}", end.status, tail(&end.said));
            }
            guest_log::require_no_fault(&guest_log::take(guest)?)?;
            let Some(writes) = writes(&self.job.last_line(guest)?) else { return Ok(false) };
            Ok(writes >= *first.get_or_insert(writes) + PROGRESS)
        })
    }

    /// Lets it come to its end.
    pub(crate) fn stop(&self, guest: &mut dyn Shell) -> Result<Answer> {
        guest.sh(&format!("touch {}/stop", self.job.folder()))?;
        self.job.wait(guest)
    }

    /// Lets it come to its end, which must be a good one.
    pub(crate) fn must_verify(&self, guest: &mut dyn Shell) -> Result<()> {
        let end = self.stop(guest)?;
        let verdict = end.said.lines().last().unwrap_or_default();
        println!("     {verdict}");
        let is_well = end.status == 0 && verdict.starts_with("verified");
        ensure!(is_well, "the verifier: status {}\n{}", end.status, tail(&end.said));
        guest_log::require_no_fault(&guest_log::take(guest)?)
    }
}

/// `writes 12 reads 4 syncs 1`; a line that is being written may be cut short.
fn writes(line: &str) -> Option<u64> {
    let (writes, rest) = line.strip_prefix("writes ")?.split_once(' ')?;
    rest.starts_with("reads").then(|| writes.parse().ok())?
}

/// The last lines, for the eye.
pub(crate) fn tail(said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}
