//! A prompt for commands that are run in the guest.

use crate::lab::qemu::boot::Boot;
use anyhow::{Context, Result};
use std::io::{BufRead, Write};

/// Asks until the end of the input.
pub(crate) fn ask(boot: &mut Boot<'_>) -> Result<()> {
    println!("     A command for the guest, or Ctrl-D to go on:");
    let mut out = std::io::stdout();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        write!(out, "guest> ")?;
        out.flush()?;
        let Some(line) = lines.next() else { return Ok(()) };
        let answer = boot.machine()?.run(&line.context("read a command")?)?;
        writeln!(
            out,
            "{}{}[{}]",
            answer.said,
            if answer.said.is_empty() { "" } else { "\n" },
            answer.status
        )?;
    }
}
