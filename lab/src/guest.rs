//! The program that runs in the machine, `lab/guest`, linked so that it needs nothing else there.

use crate::command::{self, cargo, target};
use anyhow::Result;
use std::path::PathBuf;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds it, and says where it is.
pub fn build() -> Result<PathBuf> {
    // Other flags mean other artefacts: in a folder of their own, they don't push out the usual ones.
    let folder = target()?.join("lab-guest");
    let mut build = cargo(["build", "--quiet", "--release", "--package", "lab-guest", "--target", TARGET]);
    build.env("CARGO_TARGET_DIR", &folder).env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
    command::run(&mut build)?;
    Ok(folder.join(TARGET).join("release/lab-guest"))
}
