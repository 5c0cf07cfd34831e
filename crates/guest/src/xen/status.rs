//! What an errno becomes in a response: one of the three statuses of blkif.

use block::{Errno, OpKind};

/// BLKIF_RSP_*, and one more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i16)]
pub(crate) enum Status {
    /// It is done.
    Okay = 0,
    /// It failed.
    Error = -1,
    /// This back end does not do such things: Linux does not ask again.
    Unsupported = -2,
    /// An empty flush or barrier failed. None of blkif.h's numbers says so to Linux, which makes a success of its two
    /// errors there; any other number is an error to it (docs/decisions/0013-failed-flush.md).
    Failed = -3,
}

/// The status to tell for a request of this kind, with data or without, that ended with this errno.
///
/// There is no number for a lack of space, for a read-only disk or for anything else: an error stays an error.
/// "Unsupported" is for what can be missing without a loss, which is a discard.
pub(crate) fn status(errno: Errno, kind: OpKind, has_data: bool) -> Status {
    match kind {
        OpKind::Discard if errno == Errno::EOPNOTSUPP => Status::Unsupported,
        OpKind::Flush if !has_data => Status::Failed,
        OpKind::Discard
        | OpKind::Read
        | OpKind::Write
        | OpKind::Flush
        | OpKind::WriteZeroes
        | OpKind::Status
        | OpKind::Prefetch => Status::Error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_errno_is_told_as_success_and_only_a_discard_is_unsupported() {
        for kind in OpKind::ALL {
            for code in 1..=4095 {
                let errno = Errno::new(code).unwrap();
                // BLKIF_RSP_OKAY is 0, BLKIF_RSP_ERROR -1, BLKIF_RSP_EOPNOTSUPP -2 (blkif.h).
                let expected = if errno == Errno::EOPNOTSUPP && kind == OpKind::Discard { -2 } else { -1 };
                assert_eq!(status(errno, kind, true) as i16, expected, "{errno} for a {}", kind.name());
                let expected = if kind == OpKind::Flush { -3 } else { expected };
                assert_eq!(
                    status(errno, kind, false) as i16,
                    expected,
                    "{errno} for an empty {}",
                    kind.name()
                );
            }
        }
        assert_eq!(Status::Okay as i16, 0);
    }
}
