//! What becomes of an error, by FAILURES C.4 and C.2: written down a second time, not taken from the code under test.

use std::time::Duration;

use block::{Errno, OpKind};
use disk::{OnError, Policy};

use crate::kernel::{Fault, Kind};

/// A lack of memory and the like is waited out this long.
const PATIENCE: u64 = 30_000_000_000;

/// What becomes of a request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Answered,
    TriedAgain,
    Held,
}

pub(crate) fn fate(errno: Errno, lasting: bool, kind: OpKind, age: u64, policy: &Policy) -> Fate {
    let by = |wish: OnError| match wish {
        OnError::Report => Fate::Answered,
        OnError::Hold => Fate::Held,
        OnError::Retry(patience) if age < nanoseconds(patience) => Fate::TriedAgain,
        OnError::Retry(_) => Fate::Answered,
    };
    if lasting || matches!(kind, OpKind::Flush | OpKind::Status | OpKind::Prefetch) {
        return Fate::Answered;
    }
    match errno.name() {
        Some("EINTR") => Fate::TriedAgain,
        Some("EAGAIN" | "EBUSY" | "ENOMEM" | "ENOBUFS") if age < PATIENCE => Fate::TriedAgain,
        Some("ENOSPC" | "EDQUOT") => by(policy.on_enospc.unwrap_or(policy.on_error)),
        Some("EFBIG" | "EROFS" | "EPERM" | "EACCES" | "EINVAL" | "EOPNOTSUPP") => Fate::Answered,
        Some(_) | None => by(policy.on_error),
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

/// The errno that a fault must end a call with; `None` for those that are to be dealt with on the way.
pub(crate) fn hard(fault: &Fault) -> Option<Errno> {
    let unsupported = |errno: &Errno| {
        matches!(*errno, Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV | Errno::ESPIPE)
    };
    match fault {
        Fault::Errno(_, Errno::EINTR) | Fault::Short => None,
        Fault::Errno(Kind::Punch | Kind::Zero, errno) if unsupported(errno) && *errno != Errno::ESPIPE => {
            None
        }
        Fault::Errno(Kind::SeekData, errno)
            if *errno == Errno::ENXIO || (unsupported(errno) && *errno != Errno::ENODEV) =>
        {
            None
        }
        Fault::Errno(Kind::WillNeed, _) => None,
        Fault::Errno(
            Kind::Read
            | Kind::Write
            | Kind::Sync
            | Kind::Punch
            | Kind::Zero
            | Kind::SeekData
            | Kind::SeekHole
            | Kind::SeekEnd
            | Kind::Other,
            errno,
        )
        | Fault::Injected(errno) => Some(*errno),
        Fault::Nothing | Fault::Shrunk => Some(Errno::EIO),
    }
}
