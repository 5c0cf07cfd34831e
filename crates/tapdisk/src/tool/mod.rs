//! The commands for images that nobody serves: what they have in common, and what their exit status says.

mod check;
mod commit;
mod convert;
mod create;
mod disk;
mod info;
mod late;
mod map;
mod options;
mod plan;
mod progress;
mod rebase;
mod resize;
mod snapshot;
mod stoppable;
mod target;

use std::process::ExitCode;

use anyhow::Context;
use block::Pool;
use image::tool::ToolError;
use runtime::{Handle, RingFlags, Runtime, Uring};
use signal_hook::consts::SIGXFSZ;

use crate::cli::tool::Tool;
use crate::screen::harmless;

/// Memory that the kernel is told of once: enough for all pieces that are under way.
const ARENA: usize = 48 << 20;
/// The exit status of a command that was told to stop: as that of one that SIGINT has killed.
const STOPPED: u8 = 130;

/// Does what is asked for; the exit status.
pub(crate) fn run(tool: Tool) -> ExitCode {
    match attempt(tool) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("tapdisk: {}", harmless(&whole(&error)));
            match error.downcast_ref::<ToolError>() {
                Some(ToolError::Stopped) => ExitCode::from(STOPPED),
                Some(ToolError::Source(_) | ToolError::Target(_) | ToolError::Panicked) | None => {
                    ExitCode::FAILURE
                }
            }
        }
    }
}

/// All that led to an error, each cause once: some say their cause themselves.
fn whole(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(|cause| cause.to_string()) {
        match text.as_str() {
            "" => text = cause,
            said if said.ends_with(&cause) => {}
            _ => text = format!("{text}: {cause}"),
        }
    }
    text
}

fn attempt(tool: Tool) -> anyhow::Result<ExitCode> {
    // SIGXFSZ kills by default; caught, writes beyond the limit fail with EFBIG and are told.
    signal_hook::flag::register(SIGXFSZ, std::sync::Arc::default()).context("signals cannot be caught")?;
    let pool = Pool::new(ARENA);
    let uring = Uring::open(RingFlags::Auto, &pool)?;
    let runtime = Runtime::new(Box::new(uring), pool);
    let handle = runtime.handle().clone();
    runtime.block_on(dispatch(handle, tool))
}

async fn dispatch(handle: Handle, tool: Tool) -> anyhow::Result<ExitCode> {
    let done = |()| ExitCode::SUCCESS;
    match tool {
        Tool::Create(arguments) => create::run(&handle, &arguments).await.map(done),
        Tool::Info(arguments) => info::run(&handle, &arguments).await.map(done),
        Tool::Check(arguments) => check::run(&handle, &arguments).await,
        Tool::Convert(arguments) => convert::run(&handle, &arguments).await.map(done),
        Tool::Resize(arguments) => resize::run(&handle, &arguments).await.map(done),
        Tool::Map(arguments) => map::run(&handle, &arguments).await.map(done),
        Tool::Commit(arguments) => commit::run(&handle, &arguments).await.map(done),
        Tool::Rebase(arguments) => rebase::run(&handle, &arguments).await.map(done),
        Tool::Snapshot(arguments) => snapshot::run(&handle, &arguments).await.map(done),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let system = std::io::Error::from_raw_os_error(2).to_string();
        let error = anyhow::Error::from(std::io::Error::from_raw_os_error(2));
        let error = error.context(format!("cannot open it: {system}")).context("cannot make x");
        assert_eq!(whole(&error), format!("cannot make x: cannot open it: {system}"));
    }
}
