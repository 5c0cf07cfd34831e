//! The log: to standard error, from a thread of its own, so that a reader who stops reading stops no I/O.

use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

use crate::cli::Log;

/// Lines kept for a slow reader; beyond them lines are dropped.
const LINES_MAX: usize = 10_000;

/// Starts the log. Dropping what is returned writes out what is left.
pub(crate) fn start(format: Log) -> anyhow::Result<WorkerGuard> {
    let (writer, guard): (NonBlocking, WorkerGuard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(LINES_MAX)
        .thread_name("tapdisk-log")
        .finish(std::io::stderr());
    let filter = EnvFilter::builder()
        .with_default_directive(tracing::level_filters::LevelFilter::INFO.into())
        .from_env()
        .map_err(|error| anyhow::anyhow!("RUST_LOG is not understood: {error}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_target(false);
    let started = match format {
        Log::Text => builder.with_ansi(rustix::termios::isatty(std::io::stderr())).try_init(),
        Log::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("the log does not start: {error}"))?;
    Ok(guard)
}
