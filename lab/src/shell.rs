//! Something that runs scripts: a machine, or a domain in one.

use crate::agent::Answer;
use crate::command::until;
use anyhow::{Context, Result, ensure};
use std::thread;
use std::time::Duration;

/// Emulation on a busy computer is slow, and that is no failure.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// What has a shell.
pub trait Shell {
    /// Runs a script in its shell, and says how that went.
    fn run(&mut self, script: &str) -> Result<Answer>;

    /// Runs a script that must succeed, and returns what it said.
    fn sh(&mut self, script: &str) -> Result<String> {
        let Answer { status, said } = self.run(script)?;
        ensure!(status == 0, "in the guest, status {status}: {script}\n{said}");
        Ok(said)
    }

    /// Starts a script and does not wait for it.
    fn background(&mut self, name: &str, script: &str) -> Result<Job> {
        self.sh(&format!(
            "rm -rf /run/{name}; mkdir -p /run/{name}; cd /run/{name}\n\
             cat > script <<'END OF THE SCRIPT'\n{script}\nEND OF THE SCRIPT\n\
             (sh script > said 2>&1; echo $? > status.new; mv status.new status) > /dev/null 2>&1 &"
        ))?;
        Ok(Job { folder: format!("/run/{name}") })
    }
}

/// A script that runs while others do.
pub struct Job {
    /// Where its words are, in the guest; a script finds itself there.
    folder: String,
}

impl Job {
    /// What it said so far.
    pub fn said(&self, shell: &mut dyn Shell) -> Result<String> {
        shell.sh(&format!("cat {}/said", self.folder))
    }

    /// What it said last.
    pub fn last_line(&self, shell: &mut dyn Shell) -> Result<String> {
        shell.sh(&format!("tail -n 1 {}/said", self.folder))
    }

    /// How it ended, if it has.
    pub fn ended(&self, shell: &mut dyn Shell) -> Result<Option<Answer>> {
        let status = shell.sh(&format!("cat {}/status 2> /dev/null || echo -", self.folder))?;
        if status == "-" {
            return Ok(None);
        }
        let said = self.said(shell)?;
        Ok(Some(Answer { status: status.parse().with_context(|| format!("a status of {status}"))?, said }))
    }

    /// Waits for its end, patiently.
    pub fn wait(&self, shell: &mut dyn Shell) -> Result<Answer> {
        let mut answer = None;
        until(PATIENCE, &format!("{} has ended", self.folder), || {
            answer = self.ended(shell)?;
            if answer.is_none() {
                // To ask costs the guest a process, and its CPU is slow.
                thread::sleep(Duration::from_millis(250));
            }
            Ok(answer.is_some())
        })?;
        answer.context("it has just ended")
    }

    /// Where it runs, in the guest.
    pub fn folder(&self) -> &str {
        &self.folder
    }
}
