//! `cargo xtask check`: what to run before each commit.

use crate::command::{cargo, root, run as run_command};
use crate::report::Report;
use crate::tidy;
use anyhow::Result;

/// Format, house rules, lints, tests; all of them even if the first fails.
pub(crate) fn run() -> Result<()> {
    let mut report = Report::default();
    report.part("format", format);
    report.part("house rules", tidy::run);
    report.part("lints", || {
        let lints = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
        run_command(&mut cargo(lints))
    });
    // Those of the whole binary take minutes: they are a part of ci, which runs them on a file system that fails, too.
    report.part("tests", || {
        run_command(&mut cargo(["test", "--quiet", "--workspace", "--exclude", "tapdisk"]))?;
        run_command(&mut cargo(["test", "--quiet", "--package", "tapdisk", "--bins"]))
    });
    report.table();
    println!("{}", report.total());
    report.judge("check")
}

fn format() -> Result<()> {
    run_command(&mut cargo(["fmt", "--all", "--check"]))?;
    // The fuzz targets are a workspace of their own.
    if root().join("fuzz/Cargo.toml").exists() {
        run_command(&mut cargo(["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]))?;
    }
    Ok(())
}
