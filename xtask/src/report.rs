//! What passed, what failed, what was skipped, and how long each part took.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// How one part ended.
enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

struct Part {
    name: String,
    outcome: Outcome,
    time: Duration,
}

/// A list of parts that grows as they are run; each is shown as it ends.
#[derive(Default)]
pub(crate) struct Report {
    parts: Vec<Part>,
}

impl Report {
    /// Runs one part. A failure is shown and remembered; the parts that follow still run.
    pub(crate) fn part(&mut self, name: &str, run: impl FnOnce() -> Result<()>) -> bool {
        let start = Instant::now();
        let outcome = match run() {
            Ok(()) => Outcome::Passed,
            Err(error) => Outcome::Failed(format!("{error:#}")),
        };
        self.add(name, outcome, start.elapsed())
    }

    /// Notes a part that something else ran.
    pub(crate) fn note(&mut self, name: &str, time: Duration, failure: Option<String>) {
        self.add(name, failure.map_or(Outcome::Passed, Outcome::Failed), time);
    }

    /// Notes a part that was not run, and why.
    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        self.add(name, Outcome::Skipped(why.to_owned()), Duration::ZERO);
    }

    fn add(&mut self, name: &str, outcome: Outcome, time: Duration) -> bool {
        let part = Part { name: name.to_owned(), outcome, time };
        println!("{}", line(&part, 0));
        let passed = !matches!(part.outcome, Outcome::Failed(_));
        self.parts.push(part);
        passed
    }

    /// All parts once more, one line each.
    pub(crate) fn table(&self) {
        let width = self.parts.iter().map(|part| part.name.chars().count()).max().unwrap_or(0);
        println!();
        for part in &self.parts {
            let all = line(part, width);
            println!("{}", all.lines().next().unwrap_or_default());
        }
    }

    /// `3 passed, 1 failed, 2 skipped`.
    pub(crate) fn total(&self) -> String {
        let count = |wanted: fn(&Outcome) -> bool| self.parts.iter().filter(|p| wanted(&p.outcome)).count();
        let passed = count(|outcome| matches!(outcome, Outcome::Passed));
        let skipped = count(|outcome| matches!(outcome, Outcome::Skipped(_)));
        let total = format!("{passed} passed, {} failed", self.failed());
        if skipped == 0 { total } else { format!("{total}, {skipped} skipped") }
    }

    fn failed(&self) -> usize {
        self.parts.iter().filter(|part| matches!(part.outcome, Outcome::Failed(_))).count()
    }

    /// Fails if any part did, or if there was none.
    pub(crate) fn judge(&self, what: &str) -> Result<()> {
        let failed = self.failed();
        if failed > 0 {
            bail!("{what}: {failed} of {} failed", self.parts.len());
        }
        if self.parts.is_empty() {
            bail!("{what}: nothing was run");
        }
        Ok(())
    }
}

fn line(part: &Part, width: usize) -> String {
    let (mark, why) = match &part.outcome {
        Outcome::Passed => ("ok  ", String::new()),
        Outcome::Failed(why) => ("FAIL", format!(": {why}")),
        Outcome::Skipped(why) => ("skip", format!(": {why}")),
    };
    format!("{mark} {:width$}  {:>7.1} s{why}", part.name, part.time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn a_failed_part_fails_the_whole_and_the_rest_still_runs() {
        let mut report = Report::default();
        assert!(!report.part("first", || Err(anyhow!("broken"))));
        assert!(report.part("second", || Ok(())));
        report.skip("third", "not asked for");
        assert_eq!(report.total(), "1 passed, 1 failed, 1 skipped");
        assert!(report.judge("all").is_err());
    }

    #[test]
    fn nothing_run_is_a_failure() {
        assert!(Report::default().judge("all").is_err());
    }
}
