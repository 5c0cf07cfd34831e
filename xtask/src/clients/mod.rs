//! Real clients against the server.

use crate::server::Kind;
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;

#[derive(Args, Clone)]
pub(crate) struct Arguments {
    /// What serves the image.
    #[arg(long, value_enum, default_value = "tapdisk")]
    pub(crate) server: Kind,
    /// The server's program, if not the one built here or found in the PATH.
    #[arg(long, value_name = "PATH")]
    pub(crate) program: Option<PathBuf>,
}

pub(crate) fn run(_: &Arguments) -> Result<()> {
    Ok(())
}
