//! fio, which writes, trims and verifies with many requests of many sizes in flight.

use super::{Check, MIB, Stage};
use crate::command::{command, within};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

pub(crate) const CHECKS: &[Check] = &[
    ("fio verifies random writes of 512 bytes to 256 KiB", |stage| {
        fio(stage, &["--rw=randwrite", "--bsrange=512-256k"], &["write", "read"])
    }),
    ("fio verifies reads and writes, mixed", |stage| fio(stage, &["--rw=randrw", SIZES], &["write", "read"])),
    // Not with trim_backlog, with which fio 3.33 does not come to its end here.
    ("fio verifies places that it trims and writes", |stage| {
        fio(stage, &["--rw=randtrimwrite", SIZES], &["write", "read", "trim"])
    }),
];

const SIZES: &str = "--bssplit=512/20:4k/40:12k/20:64k/10:256k/10";

fn fio(stage: &Stage<'_>, how: &[&str], must_have_done: &[&str]) -> Result<()> {
    let image = stage.image(64 * MIB)?;
    let server = stage.serve(&image)?;
    let mut fio = command("fio", ["--name=verify", "--ioengine=nbd", "--output-format=json"]);
    fio.arg(format!("--uri={}", server.uri()));
    // Overlapping writes in flight have no order, which fio's verification would need.
    fio.args(["--size=64M", "--iodepth=16", "--serialize_overlap=1", "--randseed=2006"]);
    fio.args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--fsync=200"]).args(how);
    fio.arg("--verify_state_save=0").current_dir(stage.work.folder());
    let ended = within(Duration::from_secs(60), &mut fio)?;
    ensure!(ended.status.success(), "fio: {}\n{}", ended.status, ended.said());
    // Some versions say a line before the JSON.
    let json = ended.stdout.find('{').map(|start| &ended.stdout[start..]).context("fio said nothing")?;
    let report: Value = serde_json::from_str(json)?;
    let job = &report["jobs"][0];
    ensure!(job["error"].as_u64() == Some(0), "fio's error is {}", job["error"]);
    for direction in must_have_done {
        let count = job[*direction]["total_ios"].as_u64().unwrap_or_default();
        ensure!(count > 100, "fio did only {count} requests of kind {direction}");
    }
    stage.end(server)
}
