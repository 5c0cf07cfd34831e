//! A prompt for commands that are run in the guest.

use anyhow::{Context, Result};
use lab::shell::Shell;
use std::io::{BufRead, Write};

/// Asks until the end of the input.
pub(crate) fn ask(guest: &mut dyn Shell) -> Result<()> {
    println!("     A command for the guest, or Ctrl-D to go on:");
    let mut out = std::io::stdout();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        write!(out, "guest> ")?;
        out.flush()?;
        let Some(line) = lines.next() else { return Ok(()) };
        let answer = guest.run(&line.context("read a command")?)?;
        writeln!(
            out,
            "{}{}[{}]",
            answer.said,
            if answer.said.is_empty() { "" } else { "\n" },
            answer.status
        )?;
    }
}
