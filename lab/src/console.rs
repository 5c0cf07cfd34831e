//! What a machine says on its serial line, each line with the time since its start, in memory and in a file.

use anyhow::{Context, Result};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

/// A machine's words so far.
pub struct Console {
    lines: Arc<Mutex<Vec<String>>>,
    file: PathBuf,
}

impl Console {
    /// Listens until the stream ends.
    pub fn listen(stream: impl Read + Send + 'static, file: &Path) -> Result<Console> {
        let mut log = File::create(file).with_context(|| format!("create {}", file.display()))?;
        let lines = Arc::new(Mutex::new(Vec::new()));
        let heard = lines.clone();
        let start = Instant::now();
        thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                let line = format!("{:9.3} {line}", start.elapsed().as_secs_f64());
                if let Err(error) = writeln!(log, "{line}") {
                    eprintln!("lab: the console's log is not complete: {error}");
                }
                heard.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Ok(Console { lines, file: file.to_owned() })
    }

    /// All lines, oldest first.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The last lines, for the eye.
    pub fn tail(&self, count: usize) -> String {
        let lines = self.lines();
        let tail = &lines[lines.len().saturating_sub(count)..];
        format!(
            "console, the last {} of {} lines, all in {}:\n{}",
            tail.len(),
            lines.len(),
            self.file.display(),
            tail.join("\n")
        )
    }
}
