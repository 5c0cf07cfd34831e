//! Which operations a filter meddles with: `OPERATION:ACTION[:BYTES][:WHEN]`.

use std::cell::Cell;
use std::str::FromStr;
use std::time::Duration;

use block::{Errno, OpKind, Span};

/// What is done to an operation that the rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It fails with this errno, without being done.
    Fail(Errno),
    /// It is done after a pause.
    Delay(Duration),
}

/// Which of the operations that match are meddled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Always,
    /// Only this one, counted from 1.
    Nth(u64),
    /// The first ones.
    Times(u64),
    /// Each that is a multiple of this.
    Every(u64),
}

/// A rule.
///
/// - OPERATION: `read`, `write`, `flush`, `discard`, `zero`, `status` or `any`;
/// - ACTION: an errno by its name (`EIO`), or `delay=MILLISECONDS`;
/// - BYTES: `FROM..TO`, bytes of the disk with K, M, G, T (powers of 1024) or s (512-byte sectors); left out: all;
/// - WHEN: `nth=N`, `times=N` or `every=N`; left out: always.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    kind: Option<OpKind>,
    action: Action,
    bytes: Option<Span>,
    when: When,
}

impl Rule {
    /// What it does.
    pub fn action(&self) -> Action {
        self.action
    }
}

/// A rule at work: it counts the operations that it matched.
pub(super) struct Counted {
    rule: Rule,
    matched: Cell<u64>,
}

impl Counted {
    pub(super) fn new(rule: Rule) -> Counted {
        Counted { rule, matched: Cell::new(0) }
    }

    /// Whether this operation is to be meddled with; counts it if it matches.
    pub(super) fn hits(&self, kind: OpKind, span: Span) -> bool {
        let of_kind = self.rule.kind.is_none_or(|wanted| wanted == kind);
        // A flush touches no bytes of its own, so no range of bytes keeps it out.
        let in_range = kind == OpKind::Flush || self.rule.bytes.is_none_or(|bytes| bytes.overlaps(span));
        if !of_kind || !in_range {
            return false;
        }
        let number = self.matched.get() + 1;
        self.matched.set(number);
        match self.rule.when {
            When::Always => true,
            When::Nth(nth) => number == nth,
            When::Times(times) => number <= times,
            When::Every(every) => number.is_multiple_of(every),
        }
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Rule, String> {
        let mut words = text.split(':');
        let kind = match words.next().unwrap_or_default() {
            "read" => Some(OpKind::Read),
            "write" => Some(OpKind::Write),
            "flush" => Some(OpKind::Flush),
            "discard" => Some(OpKind::Discard),
            "zero" => Some(OpKind::WriteZeroes),
            "status" => Some(OpKind::Status),
            "any" => None,
            other => {
                return Err(format!(
                    "`{other}` is no operation: expected read, write, flush, discard, zero, status or any"
                ));
            }
        };
        let action = words.next().unwrap_or_default();
        let action = match action.split_once('=') {
            Some(("delay", ms)) => Action::Delay(Duration::from_millis(number(ms)?)),
            Some(_) | None => Action::Fail(Errno::from_name(action).ok_or_else(|| {
                format!("`{action}` is no action: expected the name of an errno, such as EIO, or delay=MILLISECONDS")
            })?),
        };
        let (mut bytes, mut when) = (None, When::Always);
        for word in words {
            if let Some((from, to)) = word.split_once("..") {
                let (from, to) = (offset(from)?, offset(to)?);
                let span =
                    to.checked_sub(from).and_then(|len| Span::new(from, len)).filter(|span| !span.is_empty());
                bytes =
                    Some(span.ok_or_else(|| {
                        format!("`{word}` is no range of bytes: it must end after it begins")
                    })?);
            } else {
                when = match word.split_once('=') {
                    Some(("nth", n)) => When::Nth(positive(n)?),
                    Some(("times", n)) => When::Times(positive(n)?),
                    Some(("every", n)) => When::Every(positive(n)?),
                    Some(_) | None => {
                        return Err(format!("`{word}` is neither FROM..TO nor nth=N, times=N or every=N"));
                    }
                };
            }
        }
        Ok(Rule { kind, action, bytes, when })
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|error| format!("`{text}` is no number: {error}"))
}

fn positive(text: &str) -> Result<u64, String> {
    match number(text)? {
        0 => Err("counting starts at 1".into()),
        number => Ok(number),
    }
}

fn offset(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 's')) => (&text[..at], 512),
        Some((at, 'K')) => (&text[..at], 1 << 10),
        Some((at, 'M')) => (&text[..at], 1 << 20),
        Some((at, 'G')) => (&text[..at], 1 << 30),
        Some((at, 'T')) => (&text[..at], 1 << 40),
        Some(_) | None => (text, 1),
    };
    number(digits)?.checked_mul(unit).ok_or_else(|| format!("`{text}` is larger than any disk"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(at: u64, len: u64) -> Span {
        Span::new(at, len).unwrap()
    }

    fn counted(text: &str) -> Counted {
        Counted::new(text.parse().unwrap())
    }

    #[test]
    fn rules_say_what_where_and_when() {
        let rule = counted("write:ENOSPC:1M..2M:nth=2");
        assert_eq!(rule.rule.action(), Action::Fail(Errno::ENOSPC));
        assert!(!rule.hits(OpKind::Write, span(1 << 20, 1)), "the first");
        assert!(!rule.hits(OpKind::Read, span(1 << 20, 1)));
        assert!(!rule.hits(OpKind::Write, span(2 << 20, 1)));
        assert!(rule.hits(OpKind::Write, span((1 << 20) - 1, 2)), "the second");
        assert!(!rule.hits(OpKind::Write, span(1 << 20, 1)), "the third");
        let sectors = counted("read:EIO:8s..9s");
        assert!(sectors.hits(OpKind::Read, span(4096, 1)) && !sectors.hits(OpKind::Read, span(4608, 1)));
        let slow = counted("any:delay=20:every=2");
        assert_eq!(slow.rule.action(), Action::Delay(Duration::from_millis(20)));
        assert!(!slow.hits(OpKind::Flush, span(0, 0)) && slow.hits(OpKind::Flush, span(0, 0)));
        let first = counted("flush:EIO:times=1");
        assert!(first.hits(OpKind::Flush, span(0, 0)) && !first.hits(OpKind::Flush, span(0, 0)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            ("", "`` is no operation"),
            ("write", "`` is no action"),
            ("write:EWHAT", "`EWHAT` is no action"),
            ("write:EIO:5..5", "must end after it begins"),
            ("write:EIO:5..x", "`x` is no number"),
            ("write:EIO:0..99999999999T", "larger than any disk"),
            ("write:EIO:nth=0", "counting starts at 1"),
            ("write:EIO:sometimes", "`sometimes` is neither"),
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
