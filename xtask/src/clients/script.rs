//! nbdsh.py: every command of the protocol through libnbd's Python, each of its checks a part of ours.

use super::{MIB, Stage};
use crate::command::{root, within};
use crate::report::Report;
use crate::server::Kind;
use anyhow::{Context, Result, bail, ensure};
use std::process::Command;
use std::time::Duration;

pub(crate) const NAME: &str = "nbdsh";

/// Enough for 4 MiB for each check, and 32 MiB for the largest request.
const LEN: u64 = 160 * MIB;

pub(crate) fn run(stage: &Stage<'_>, label: &str, report: &mut Report) {
    let mut lines = String::new();
    report.part(&format!("{label}: {NAME} runs to its end"), || {
        lines = say(stage)?;
        Ok(())
    });
    for line in lines.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        if let [verdict, name, seconds, why] = fields[..] {
            let time = seconds.parse().map(Duration::from_secs_f64).unwrap_or_default();
            let failure = (verdict != "pass").then(|| why.to_owned());
            report.note(&format!("{label}: {NAME}: {name}"), time, failure);
        }
    }
}

fn say(stage: &Stage<'_>) -> Result<String> {
    let image = stage.image(LEN)?;
    let server = stage.serve(&image)?;
    let kind = match stage.arguments.server {
        Kind::Tapdisk => "tapdisk",
        Kind::QemuNbd => "qemu-nbd",
        Kind::Nbdkit => "nbdkit",
    };
    // Debian's own Python has the bindings, whatever else the PATH offers.
    let mut python = Command::new("/usr/bin/python3");
    python.arg(root().join("xtask/src/clients/nbdsh.py")).arg(kind).arg(server.uri()).arg(&image);
    let ended = within(Duration::from_secs(120), &mut python)?;
    ensure!(ended.stdout.lines().count() > 20, "it came to an early end:\n{}", ended.said());
    if !ended.status.success() && !ended.stdout.contains("fail\t") {
        bail!("it failed: {}", ended.said());
    }
    stage.end(server).context("after nbdsh")?;
    Ok(ended.stdout)
}
