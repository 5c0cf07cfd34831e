//! What a disk has done: counts that are cheap enough to keep always.

use std::fmt;

use block::OpKind;

/// Counts of one kind of operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Answered with success.
    pub done: u64,
    /// Answered with an error.
    pub failed: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
}

/// Counts of one disk. `accepted = answered + left + in_flight + held`, always.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests taken.
    pub accepted: u64,
    /// Requests answered, each once.
    pub answered: u64,
    /// Requests left unanswered, each once, for whoever serves their guest next.
    pub left: u64,
    /// Requests that are being worked on.
    pub in_flight: u64,
    /// Requests that wait for the cause of their failure to go away.
    pub held: u64,
    /// Requests that nothing answered but their end, with EIO: bugs of ours.
    pub lost: u64,
    /// Attempts beyond the first.
    pub retries: u64,
    /// By kind of operation, in the order of [`OpKind::ALL`].
    pub by_kind: [Counts; OpKind::ALL.len()],
}

impl Stats {
    /// The counts of one kind.
    pub fn of(&self, kind: OpKind) -> Counts {
        self.by_kind[kind as usize]
    }

    pub(crate) fn count(&mut self, kind: OpKind, ok: bool, bytes: u64) {
        let counts = &mut self.by_kind[kind as usize];
        if ok {
            counts.done += 1;
            counts.bytes += bytes;
        } else {
            counts.failed += 1;
        }
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stats { accepted, answered, left, in_flight, held, lost, retries, .. } = self;
        write!(
            f,
            "{accepted} accepted, {answered} answered, {in_flight} in flight, {held} held, {retries} retries"
        )?;
        if *left > 0 {
            write!(f, ", {left} left to a successor")?;
        }
        if *lost > 0 {
            write!(f, ", {lost} LOST (a bug in tapdisk)")?;
        }
        for kind in OpKind::ALL {
            let Counts { done, failed, bytes } = self.of(kind);
            if done + failed > 0 {
                write!(f, "; {}: {done} done, {failed} failed, {bytes} bytes", kind.name())?;
            }
        }
        Ok(())
    }
}
