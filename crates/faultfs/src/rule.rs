//! A rule: which requests it is about, when it strikes, and what becomes of a request that it strikes.
//!
//! ```text
//! rule    := ops ":" part { (":" | ",") part }
//! ops     := op { "+" op }
//! op      := read | write | fsync | fallocate | truncate | any | open | seek | syncdir
//! part    := which | when | hold | outcome
//!
//! which   := FROM ".." TO      only requests that touch these bytes; either end may be left out
//!          | file=NAME         only this file
//!
//! when    := nth=N             only the Nth matching request
//!          | once              the same as count=1
//!          | count=N           the first N times, then never again
//!          | after=N           not the first N matching requests
//!          | every=N           each Nth matching request
//!
//! hold    := delay=MS          served only after MS milliseconds
//!          | hang              served only when `release` is called
//!
//! outcome := ERRNO             EIO, ENOSPC, EDQUOT, …: fails, and nothing of it has happened
//!          | ERRNO,lose        fsync only: fails, and the writes that it should have made durable never will be
//!          | short=K           read and write only: at most K bytes of it are done, K may be 0
//!          | drop              not for read: answered as done, but not done
//! ```
//!
//! A byte count may end in K, M or G or begin with 0x. `fsync` is both fsync(2) and fdatasync(2); `any` is read,
//! write, fsync, fallocate and truncate. A part may be given once. A hold goes with any outcome, and without one
//! the request is then served as usual. Without a *when* the rule strikes each time.
//!
//! Rules are asked in the order in which they were added; the first that strikes decides, and the rules behind it
//! neither see nor count the request.
//!
//! What `drop` leaves: a dropped write is in neither copy of the file, as from a disk that loses it; a dropped fsync
//! leaves the writes to the next fsync, as from a disk that lies about its cache.
//!
//! `ENOSYS` is refused: to FUSE it means "never ask again", after which the kernel answers fsync with success itself.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

use rustix::io::Errno;

/// What a request wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// read(2) and its kin.
    Read,
    /// write(2) and its kin.
    Write,
    /// fsync(2) and fdatasync(2) of a file.
    Fsync,
    /// fallocate(2) in any mode.
    Fallocate,
    /// ftruncate(2).
    Truncate,
    /// open(2) of a file that exists.
    Open,
    /// lseek(2) with SEEK_DATA or SEEK_HOLE.
    Seek,
    /// fsync(2) of the directory.
    Syncdir,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is served as usual.
    Serve,
    /// It fails and has no effect; with `lose`, the file's unsynced writes are forgotten as well.
    Fail {
        /// The error.
        errno: Errno,
        /// Whether the unsynced writes will never be durable.
        lose: bool,
    },
    /// At most this many bytes of it are done.
    Short(usize),
    /// It is answered as done and is not.
    Drop,
}

/// How long a request waits before it is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// It does not wait.
    No,
    /// It waits this long.
    For(Duration),
    /// It waits until it is released.
    UntilReleased,
}

/// Which requests, when, and what becomes of them. Made from text; see the module for the grammar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    text: String,
    ops: Vec<Op>,
    file: Option<String>,
    bytes: Option<Range<u64>>,
    after: u64,
    every: u64,
    count: Option<u64>,
    pub(crate) hold: Hold,
    pub(crate) outcome: Outcome,
}

impl Rule {
    /// Whether the rule is about this request. One without a range of bytes, such as a sync, is about no bytes.
    pub(crate) fn is_about(&self, op: Op, file: &str, bytes: Option<&Range<u64>>) -> bool {
        let overlap = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
        self.ops.contains(&op)
            && self.file.as_deref().is_none_or(|name| name == file)
            && self.bytes.as_ref().is_none_or(|mine| bytes.is_some_and(|its| overlap(mine, its)))
    }

    /// Whether it strikes the `nth` request (from 1) that it is about, having struck `struck` times.
    pub(crate) fn strikes(&self, nth: u64, struck: u64) -> bool {
        nth > self.after
            && (nth - self.after).is_multiple_of(self.every)
            && self.count.is_none_or(|count| struck < count)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Why a text is not a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotARule(String);

impl fmt::Display for NotARule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NotARule {}

impl FromStr for Rule {
    type Err = NotARule;

    fn from_str(text: &str) -> Result<Rule, NotARule> {
        parse(text.trim()).map_err(|why| NotARule(format!("'{}' is not a rule: {why}", text.trim())))
    }
}

fn parse(text: &str) -> Result<Rule, String> {
    let (ops, parts) = text.split_once(':').ok_or("it has no ':' after the operation")?;
    let mut rule = Rule {
        text: text.to_owned(),
        ops: parse_ops(ops)?,
        file: None,
        bytes: None,
        after: 0,
        every: 1,
        count: None,
        hold: Hold::No,
        outcome: Outcome::Serve,
    };
    let mut kinds_seen = Vec::new();
    let mut lose = false;
    for part in parts.split([':', ',']) {
        let (key, value) = part.split_once('=').map_or((part, None), |(key, value)| (key, Some(value)));
        let kind = match (key, value) {
            ("file", Some(name)) => {
                rule.file = Some(name.to_owned());
                "file"
            }
            ("nth", Some(n)) => {
                rule.after = positive(n)? - 1;
                rule.count = Some(1);
                "when"
            }
            ("once", None) => {
                rule.count = Some(1);
                "count"
            }
            ("count", Some(n)) => {
                rule.count = Some(positive(n)?);
                "count"
            }
            ("after", Some(n)) => {
                rule.after = bytes(n)?;
                "after"
            }
            ("every", Some(n)) => {
                rule.every = positive(n)?;
                "every"
            }
            ("delay", Some(ms)) => {
                rule.hold = Hold::For(Duration::from_millis(bytes(ms)?));
                "hold"
            }
            ("hang", None) => {
                rule.hold = Hold::UntilReleased;
                "hold"
            }
            ("short", Some(k)) => {
                let k = usize::try_from(bytes(k)?).map_err(|error| error.to_string())?;
                rule.outcome = Outcome::Short(k);
                "outcome"
            }
            ("drop", None) => {
                rule.outcome = Outcome::Drop;
                "outcome"
            }
            ("lose", None) => {
                lose = true;
                "lose"
            }
            (range, None) if range.contains("..") => {
                rule.bytes = Some(parse_range(range)?);
                "range"
            }
            (name, None) => {
                let errno =
                    errno(name).ok_or_else(|| format!("'{name}' is neither an errno nor a word it knows"))?;
                rule.outcome = Outcome::Fail { errno, lose: false };
                "outcome"
            }
            (key, Some(_)) => return Err(format!("'{key}=' is not a word it knows")),
        };
        if kinds_seen.contains(&kind) {
            return Err(format!("'{part}' is a second {kind}"));
        }
        kinds_seen.push(kind);
    }
    if kinds_seen.contains(&"when")
        && ["count", "after", "every"].iter().any(|kind| kinds_seen.contains(kind))
    {
        return Err("nth stands alone: it is after=N-1,count=1".into());
    }
    check(&mut rule, lose)?;
    Ok(rule)
}

/// Refuses what could never happen, since a rule that never strikes makes a test that proves nothing.
fn check(rule: &mut Rule, asked_to_lose: bool) -> Result<(), String> {
    let only = |allowed: &[Op]| rule.ops.iter().all(|op| allowed.contains(op));
    match &mut rule.outcome {
        Outcome::Serve if asked_to_lose => return Err("lose needs an errno".into()),
        Outcome::Serve if rule.hold == Hold::No => return Err("it does not say what should happen".into()),
        Outcome::Serve => {}
        Outcome::Fail { lose, .. } if asked_to_lose => {
            if rule.ops != [Op::Fsync] {
                return Err("lose is for fsync".into());
            }
            *lose = true;
        }
        Outcome::Fail { .. } => {}
        Outcome::Short(_) | Outcome::Drop if asked_to_lose => return Err("lose needs an errno".into()),
        Outcome::Short(_) if !only(&[Op::Read, Op::Write]) => {
            return Err("short is for read and write".into());
        }
        Outcome::Drop if !only(&[Op::Write, Op::Fsync, Op::Fallocate, Op::Truncate, Op::Syncdir]) => {
            return Err("drop is for what changes or syncs a file".into());
        }
        Outcome::Short(_) | Outcome::Drop => {}
    }
    let ranged = [Op::Read, Op::Write, Op::Fallocate, Op::Truncate];
    if rule.bytes.is_some() && !rule.ops.iter().any(|op| ranged.contains(op)) {
        return Err("a range of bytes is for read, write, fallocate and truncate".into());
    }
    Ok(())
}

fn parse_ops(text: &str) -> Result<Vec<Op>, String> {
    let mut ops = Vec::new();
    for name in text.split('+') {
        ops.extend_from_slice(match name {
            "read" => &[Op::Read],
            "write" => &[Op::Write],
            "fsync" => &[Op::Fsync],
            "fallocate" => &[Op::Fallocate],
            "truncate" => &[Op::Truncate],
            "open" => &[Op::Open],
            "seek" => &[Op::Seek],
            "syncdir" => &[Op::Syncdir],
            "any" => &[Op::Read, Op::Write, Op::Fsync, Op::Fallocate, Op::Truncate],
            _ => return Err(format!("'{name}' is not an operation")),
        });
    }
    Ok(ops)
}

fn parse_range(text: &str) -> Result<Range<u64>, String> {
    let (from, to) = text.split_once("..").ok_or("a range has two dots")?;
    let from = if from.is_empty() { 0 } else { bytes(from)? };
    let to = if to.is_empty() { u64::MAX } else { bytes(to)? };
    if from >= to {
        return Err(format!("the range {text} is empty"));
    }
    Ok(from..to)
}

fn positive(text: &str) -> Result<u64, String> {
    match bytes(text)? {
        0 => Err("counting begins with 1".into()),
        n => Ok(n),
    }
}

/// A number, perhaps with K, M or G behind it or 0x before it.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let why = |error: std::num::ParseIntError| format!("'{text}' is not a number: {error}");
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).map_err(why);
    }
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 'K')) => (&text[..at], 1 << 10),
        Some((at, 'M')) => (&text[..at], 1 << 20),
        Some((at, 'G')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    digits.parse::<u64>().map_err(why)?.checked_mul(unit).ok_or_else(|| format!("'{text}' is too large"))
}

fn errno(name: &str) -> Option<Errno> {
    ERRNOS.iter().find(|(known, _)| *known == name).map(|(_, errno)| *errno)
}

const ERRNOS: &[(&str, Errno)] = &[
    ("EACCES", Errno::ACCESS),
    ("EAGAIN", Errno::AGAIN),
    ("EBADF", Errno::BADF),
    ("EBADMSG", Errno::BADMSG),
    ("EBUSY", Errno::BUSY),
    ("ECANCELED", Errno::CANCELED),
    ("ECONNRESET", Errno::CONNRESET),
    ("EDQUOT", Errno::DQUOT),
    ("EFAULT", Errno::FAULT),
    ("EFBIG", Errno::FBIG),
    ("EHOSTDOWN", Errno::HOSTDOWN),
    ("EILSEQ", Errno::ILSEQ),
    ("EINTR", Errno::INTR),
    ("EINVAL", Errno::INVAL),
    ("EIO", Errno::IO),
    ("EISDIR", Errno::ISDIR),
    ("EMFILE", Errno::MFILE),
    ("ENFILE", Errno::NFILE),
    ("ENODATA", Errno::NODATA),
    ("ENODEV", Errno::NODEV),
    ("ENOENT", Errno::NOENT),
    ("ENOLINK", Errno::NOLINK),
    ("ENOMEM", Errno::NOMEM),
    ("ENOSPC", Errno::NOSPC),
    ("ENOTCONN", Errno::NOTCONN),
    ("ENXIO", Errno::NXIO),
    ("EOPNOTSUPP", Errno::OPNOTSUPP),
    ("EOVERFLOW", Errno::OVERFLOW),
    ("EPERM", Errno::PERM),
    ("EPROTO", Errno::PROTO),
    ("ERANGE", Errno::RANGE),
    ("EREMOTEIO", Errno::REMOTEIO),
    ("EROFS", Errno::ROFS),
    ("ESHUTDOWN", Errno::SHUTDOWN),
    ("ESTALE", Errno::STALE),
    ("ETIMEDOUT", Errno::TIMEDOUT),
    ("ETXTBSY", Errno::TXTBSY),
    ("EUCLEAN", Errno::UCLEAN),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        text.parse().unwrap()
    }

    /// Which of the first ten matching requests the rule strikes.
    fn struck(text: &str) -> Vec<u64> {
        let rule = rule(text);
        let mut struck = Vec::new();
        for nth in 1..=10 {
            if rule.strikes(nth, struck.len() as u64) {
                struck.push(nth);
            }
        }
        struck
    }

    #[test]
    fn a_rule_strikes_when_it_says() {
        assert_eq!(struck("write:EIO"), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(struck("write:EIO:nth=3"), [3]);
        assert_eq!(struck("write:EIO,once"), [1]);
        assert_eq!(struck("write:EIO:count=2"), [1, 2]);
        assert_eq!(struck("write:EIO:after=7"), [8, 9, 10]);
        assert_eq!(struck("write:EIO:every=3"), [3, 6, 9]);
        assert_eq!(struck("write:EIO:after=1,every=4,count=1"), [5]);
    }

    #[test]
    fn a_rule_is_about_the_requests_it_names() {
        let ranged = rule("read+write:4K..0x2000:EIO:file=a.img");
        assert!(ranged.is_about(Op::Write, "a.img", Some(&(8191..8192))));
        assert!(!ranged.is_about(Op::Write, "a.img", Some(&(8192..8193))));
        assert!(!ranged.is_about(Op::Write, "a.img", Some(&(0..4096))));
        assert!(!ranged.is_about(Op::Write, "b.img", Some(&(4096..8192))));
        assert!(!ranged.is_about(Op::Fallocate, "a.img", Some(&(4096..8192))));
        assert!(rule("any:1G..:EIO").is_about(Op::Fallocate, "x", Some(&(0..u64::MAX))));
        assert!(!rule("any:0..:EIO").is_about(Op::Fsync, "x", None));
        assert!(rule("any:EIO").is_about(Op::Fsync, "x", None));
        assert!(!rule("any:EIO").is_about(Op::Open, "x", None));
    }

    #[test]
    fn parts_may_come_in_any_order_and_a_hold_goes_with_an_outcome() {
        assert_eq!(rule("write:delay=20:EIO").hold, Hold::For(Duration::from_millis(20)));
        let lose = Outcome::Fail { errno: Errno::IO, lose: true };
        assert_eq!(rule("fsync:lose,once,EIO").outcome, lose);
        assert_eq!(rule("write:hang,short=511").outcome, Outcome::Short(511));
    }

    #[test]
    fn what_could_never_happen_is_refused() {
        for text in [
            "",
            "write",
            "write:",
            "write:once",
            "write:ENOSYS",
            "write:EWHAT",
            "write:EIO,lose",
            "any:EIO:lose",
            "fsync:lose",
            "fsync:short=1",
            "fsync:0..10:EIO",
            "read:drop",
            "read:EIO:EIO",
            "read:8..8:EIO",
            "read:EIO:nth=0",
            "read:EIO:nth=2,count=3",
            "read:EIO:every=-1",
            "read:EIO:size=3",
            "flush:EIO",
        ] {
            assert!(text.parse::<Rule>().is_err(), "{text}");
        }
    }
}
