//! `cargo xtask bench`: tapdisk and its peers, which are installed first.

use crate::command::{cargo, run as run_command};
use crate::install::{self, Need};
use crate::server::{self, Kind};
use anyhow::Result;
use clap::Args;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Passed on; `cargo xtask bench -- --help` shows what there is.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let rest: Vec<&str> = arguments.rest.iter().map(String::as_str).collect();
    with(&rest)
}

pub(crate) fn with(arguments: &[&str]) -> Result<()> {
    install::require(&[Need::Fio, Need::NbdServer, Need::Nbdkit, Need::QemuNbd, Need::QemuStorageDaemon])?;
    server::build(Kind::Tapdisk, None)?;
    run_command(cargo(["run", "--quiet", "--release", "--package", "bench", "--"]).args(arguments))
}
