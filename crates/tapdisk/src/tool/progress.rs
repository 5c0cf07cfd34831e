//! How far long work is, shown on a terminal, and the order to stop it.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use image::tool::Watch;
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};

/// Watches work on so many bytes of a disk.
pub(super) struct Progress {
    bar: ProgressBar,
    stopped: Arc<AtomicBool>,
}

impl Progress {
    /// Watches; shown only if asked to, and only to people. From now on Ctrl-C and SIGTERM stop the work in order, and a
    /// second one ends the process at once.
    pub(super) fn new(bytes: u64, shown: bool) -> anyhow::Result<Progress> {
        let stopped = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds that nobody has asked to stop yet.
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, stopped.clone())
                .and_then(|_| signal_hook::flag::register(signal, stopped.clone()))
                .context("signals cannot be waited for")?;
        }
        let bar = if shown && std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template(
                "{wide_bar} {percent:>3}% {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
            )
            .context("the progress bar's template")?;
            ProgressBar::new(bytes).with_style(style)
        } else {
            ProgressBar::hidden()
        };
        Ok(Progress { bar, stopped })
    }
}

impl Watch for Progress {
    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
