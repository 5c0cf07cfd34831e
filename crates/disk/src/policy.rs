//! What becomes of a request that failed: answer it with its error, try again, or hold it. A pure table.

use std::time::Duration;

use block::{Errno, Error, OpKind};

/// How long a lack of memory or the like is waited out before it counts as an error.
pub const TRANSIENT_MAX: Duration = Duration::from_secs(30);
const BACKOFF_MIN: Duration = Duration::from_millis(1);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// The first pause of `retry:SECONDS`.
const RETRY_MIN: Duration = Duration::from_millis(100);

/// What the operator wants done about errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnError {
    /// Tell the guest at once.
    #[default]
    Report,
    /// Keep the request until the cause is gone.
    Hold,
    /// Try again for this long, then tell the guest.
    Retry(Duration),
}

/// The operator's wishes for one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Policy {
    /// For errors of the storage.
    pub on_error: OnError,
    /// For ENOSPC and EDQUOT, where it differs.
    pub on_enospc: Option<OnError>,
}

/// What to do with a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Give the guest the error.
    Answer,
    /// Do it again after a pause.
    Retry {
        /// How long to wait first.
        after: Duration,
    },
    /// Keep it until somebody says that the cause may be gone.
    Hold,
}

/// Judges a request of this kind that failed for the `tries`-th time (from 1 on), `age` after it was accepted.
///
/// It can never make a success of an error. FAILURES C.4 is the table behind it.
pub fn judge(error: &Error, kind: OpKind, tries: u32, age: Duration, policy: &Policy) -> Verdict {
    // A sync that failed has lost data; trying again would only hide that.
    if error.is_lasting() {
        return Verdict::Answer;
    }
    match kind {
        OpKind::Flush | OpKind::Status | OpKind::Prefetch => return Verdict::Answer,
        OpKind::Read | OpKind::Write | OpKind::Discard | OpKind::WriteZeroes => {}
    }
    match error.errno() {
        Errno::EINTR => Verdict::Retry { after: Duration::ZERO },
        // Ours to wait out, whatever the policy: the guest has nothing to do with our lack of memory.
        Errno::EAGAIN | Errno::EBUSY | Errno::ENOMEM | Errno::ENOBUFS if age < TRANSIENT_MAX => {
            Verdict::Retry { after: backoff(BACKOFF_MIN, tries) }
        }
        Errno::ENOSPC | Errno::EDQUOT => apply(policy.on_enospc.unwrap_or(policy.on_error), tries, age),
        // Waiting changes nothing about these: the request, the image or its limits are wrong.
        Errno::EFBIG | Errno::EROFS | Errno::EPERM | Errno::EACCES | Errno::EINVAL | Errno::EOPNOTSUPP => {
            Verdict::Answer
        }
        // The set of errnos is open: what is not listed is an error of the storage.
        _ => apply(policy.on_error, tries, age),
    }
}

fn apply(wish: OnError, tries: u32, age: Duration) -> Verdict {
    match wish {
        OnError::Report => Verdict::Answer,
        OnError::Hold => Verdict::Hold,
        OnError::Retry(patience) if age < patience => {
            Verdict::Retry { after: backoff(RETRY_MIN, tries).min(patience - age) }
        }
        OnError::Retry(_) => Verdict::Answer,
    }
}

/// A pause that doubles with each try.
fn backoff(first: Duration, tries: u32) -> Duration {
    first.saturating_mul(1 << tries.saturating_sub(1).min(20)).min(BACKOFF_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: Policy = Policy { on_error: OnError::Report, on_enospc: None };
    const HOLD: Policy = Policy { on_error: OnError::Hold, on_enospc: None };
    const RETRY: Policy = Policy { on_error: OnError::Retry(Duration::from_secs(5)), on_enospc: None };
    const HOLD_FULL: Policy = Policy { on_error: OnError::Report, on_enospc: Some(OnError::Hold) };
    const REPORT_FULL: Policy = Policy { on_error: OnError::Hold, on_enospc: Some(OnError::Report) };

    fn at(errno: Errno, kind: OpKind, seconds: u64, policy: &Policy) -> Verdict {
        judge(&errno.into(), kind, 1, Duration::from_secs(seconds), policy)
    }

    #[test]
    fn the_table() {
        use Verdict::{Answer, Hold};
        let ms = |after| Verdict::Retry { after: Duration::from_millis(after) };
        let (read, write, flush) = (OpKind::Read, OpKind::Write, OpKind::Flush);
        for (errno, kind, seconds, policy, expected) in [
            (Errno::EIO, read, 0, REPORT, Answer),
            (Errno::EIO, write, 0, REPORT, Answer),
            (Errno::EIO, write, 0, HOLD, Hold),
            (Errno::EIO, read, 1000, HOLD, Hold),
            (Errno::EIO, write, 0, RETRY, ms(100)),
            (Errno::EIO, write, 5, RETRY, Answer),
            (Errno::EIO, write, 0, HOLD_FULL, Answer),
            (Errno::EILSEQ, write, 0, REPORT, Answer),
            (Errno::ENOSPC, write, 0, REPORT, Answer),
            (Errno::ENOSPC, write, 0, HOLD_FULL, Hold),
            (Errno::EDQUOT, write, 0, HOLD_FULL, Hold),
            (Errno::ENOSPC, write, 0, REPORT_FULL, Answer),
            (Errno::ENOSPC, OpKind::WriteZeroes, 0, HOLD, Hold),
            (Errno::ENOSPC, OpKind::Discard, 0, HOLD, Hold),
            (Errno::EFBIG, write, 0, HOLD, Answer),
            (Errno::EROFS, write, 0, HOLD, Answer),
            (Errno::EINVAL, write, 0, RETRY, Answer),
            (Errno::EOPNOTSUPP, OpKind::WriteZeroes, 0, HOLD, Answer),
            (Errno::EINTR, write, 0, REPORT, ms(0)),
            (Errno::EAGAIN, read, 0, REPORT, ms(1)),
            (Errno::ENOMEM, write, 29, REPORT, ms(1)),
            (Errno::ENOMEM, write, 30, REPORT, Answer),
            (Errno::ENOMEM, write, 30, HOLD, Hold),
            // A flush is never tried again and never held.
            (Errno::EIO, flush, 0, HOLD, Answer),
            (Errno::ENOSPC, flush, 0, HOLD_FULL, Answer),
            (Errno::EIO, flush, 0, RETRY, Answer),
            (Errno::EINTR, flush, 0, HOLD, Answer),
        ] {
            assert_eq!(
                at(errno, kind, seconds, &policy),
                expected,
                "{errno} {kind:?} {seconds} s {policy:?}"
            );
        }
    }

    #[test]
    fn a_lasting_error_is_answered_whatever_the_policy() {
        for errno in [Errno::EIO, Errno::ENOSPC, Errno::EAGAIN, Errno::EINTR] {
            let error = Error::from(errno).lasting();
            assert_eq!(judge(&error, OpKind::Write, 1, Duration::ZERO, &HOLD), Verdict::Answer);
        }
    }

    #[test]
    fn pauses_double_up_to_a_second() {
        let pause = |tries| judge(&Errno::EAGAIN.into(), OpKind::Read, tries, Duration::ZERO, &REPORT);
        assert_eq!(pause(4), Verdict::Retry { after: Duration::from_millis(8) });
        assert_eq!(pause(11), Verdict::Retry { after: Duration::from_secs(1) });
        assert_eq!(pause(u32::MAX), Verdict::Retry { after: Duration::from_secs(1) });
    }

    #[test]
    fn no_error_is_retried_past_the_operators_patience() {
        let late = judge(&Errno::EIO.into(), OpKind::Write, 9, Duration::from_millis(4990), &RETRY);
        assert_eq!(late, Verdict::Retry { after: Duration::from_millis(10) });
    }
}
