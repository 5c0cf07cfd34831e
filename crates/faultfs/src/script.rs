//! The script: the rules in force, and how often each has been asked and has struck.

use std::ops::Range;

use crate::rule::{Hold, Op, Outcome, Rule};

/// Names a rule that was added, until it is cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleId(pub u64);

#[derive(Debug)]
struct Line {
    id: RuleId,
    rule: Rule,
    matched: u64,
    struck: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Script {
    lines: Vec<Line>,
    last_id: u64,
}

impl Script {
    pub(crate) fn add(&mut self, rule: Rule) -> RuleId {
        self.last_id += 1;
        let id = RuleId(self.last_id);
        self.lines.push(Line { id, rule, matched: 0, struck: 0 });
        id
    }

    pub(crate) fn remove(&mut self, id: RuleId) -> bool {
        let before = self.lines.len();
        self.lines.retain(|line| line.id != id);
        self.lines.len() < before
    }

    pub(crate) fn clear(&mut self) {
        self.lines.clear();
    }

    /// How often the rule has struck, or nothing if there is no such rule.
    pub(crate) fn struck(&self, id: RuleId) -> Option<u64> {
        self.lines.iter().find(|line| line.id == id).map(|line| line.struck)
    }

    pub(crate) fn list(&self) -> Vec<(RuleId, String, u64)> {
        self.lines.iter().map(|line| (line.id, line.rule.to_string(), line.struck)).collect()
    }

    /// What becomes of this request.
    pub(crate) fn judge(&mut self, op: Op, file: &str, bytes: Option<&Range<u64>>) -> (Hold, Outcome) {
        for line in &mut self.lines {
            if line.rule.is_about(op, file, bytes) {
                line.matched += 1;
                if line.rule.strikes(line.matched, line.struck) {
                    line.struck += 1;
                    return (line.rule.hold, line.rule.outcome);
                }
            }
        }
        (Hold::No, Outcome::Serve)
    }
}
