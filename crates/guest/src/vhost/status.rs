//! What an errno becomes in a request's last byte: one of the three statuses of a virtio block device (5.2.6).

use block::{Errno, OpKind};

/// VIRTIO_BLK_S_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupp = 2,
}

/// The status to tell for a request of this kind that ended with this errno.
///
/// There is no number for a lack of space, for a read-only disk or for anything else: an error stays an error.
/// "Unsupported" makes a guest stop asking, so it is told only where a request of that kind can be unsupported: a
/// guest that hears it for a write has lost that write all the same.
pub(crate) fn status(errno: Errno, kind: OpKind) -> Status {
    match kind {
        OpKind::Discard | OpKind::WriteZeroes if errno == Errno::EOPNOTSUPP => Status::Unsupp,
        OpKind::Discard
        | OpKind::WriteZeroes
        | OpKind::Read
        | OpKind::Write
        | OpKind::Flush
        | OpKind::Status
        | OpKind::Prefetch => Status::IoErr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_errno_is_told_as_success() {
        for kind in OpKind::ALL {
            for code in 1..=4095 {
                let errno = Errno::new(code).unwrap();
                // The numbers of 5.2.6: 0 is success, 1 an error, 2 unsupported.
                let told = status(errno, kind) as u8;
                let may_be_unsupported = matches!(kind, OpKind::Discard | OpKind::WriteZeroes);
                let expected = if errno == Errno::EOPNOTSUPP && may_be_unsupported { 2 } else { 1 };
                assert_eq!(told, expected, "{errno} for a {}", kind.name());
            }
        }
    }
}
