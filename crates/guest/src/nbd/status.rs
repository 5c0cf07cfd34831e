//! What an errno becomes on the wire: one of the numbers that NBD allows ("Error values").

use block::Errno;

pub(crate) const EPERM: u32 = 1;
pub(crate) const EIO: u32 = 5;
pub(crate) const EINVAL: u32 = 22;
pub(crate) const ENOSPC: u32 = 28;
pub(crate) const EOVERFLOW: u32 = 75;
pub(crate) const ENOTSUP: u32 = 95;
pub(crate) const ESHUTDOWN: u32 = 108;

/// The NBD error number to tell for this errno. `fast_zero` says whether the request was a write of zeroes that
/// had to be fast: only then is "not supported" an answer that the specification allows.
///
/// Any errno without a number of its own is told as EIO: an error stays an error. NBD's ENOMEM is never told,
/// since clients are asked not to expect it and cannot do anything about our memory.
pub(crate) fn status(errno: Errno, fast_zero: bool) -> u32 {
    match errno {
        Errno::EPERM | Errno::EROFS | Errno::EACCES => EPERM,
        Errno::EINVAL => EINVAL,
        Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG => ENOSPC,
        Errno::EOVERFLOW => EOVERFLOW,
        Errno::EOPNOTSUPP if fast_zero => ENOTSUP,
        Errno::EOPNOTSUPP => EINVAL,
        Errno::ESHUTDOWN => ESHUTDOWN,
        _ => EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of "Error values", as the specification writes them.
    const ALLOWED: [u32; 8] = [1, 5, 12, 22, 28, 75, 95, 108];

    #[test]
    fn every_errno_is_told_as_a_number_of_the_specification_and_none_as_success() {
        for code in 1..=4095 {
            let errno = Errno::new(code).unwrap();
            for fast_zero in [false, true] {
                let told = status(errno, fast_zero);
                assert!(ALLOWED.contains(&told), "{errno} is told as {told}");
                assert_ne!(told, 12, "{errno} is told as ENOMEM");
            }
            assert_ne!(status(errno, false), 95, "{errno} is told as ENOTSUP though nothing had to be fast");
        }
    }

    #[test]
    fn errors_keep_their_kind() {
        // FAILURES B.3, column NBD; "Error values" for EDQUOT, EFBIG, read-only and ESHUTDOWN.
        let table = [
            ("EIO", 5),
            ("EBADMSG", 5),
            ("EILSEQ", 5),
            ("EREMOTEIO", 5),
            ("ENXIO", 5),
            ("ESTALE", 5),
            ("ETIMEDOUT", 5),
            ("ENOMEM", 5),
            ("EAGAIN", 5),
            ("EBUSY", 5),
            ("EINTR", 5),
            ("ECANCELED", 5),
            ("ENOSPC", 28),
            ("EDQUOT", 28),
            ("EFBIG", 28),
            ("EPERM", 1),
            ("EACCES", 1),
            ("EROFS", 1),
            ("EINVAL", 22),
            ("EOPNOTSUPP", 22),
            ("EOVERFLOW", 75),
            ("ESHUTDOWN", 108),
        ];
        for (name, told) in table {
            assert_eq!(status(Errno::from_name(name).unwrap(), false), told, "{name}");
        }
        assert_eq!(status(Errno::EOPNOTSUPP, true), 95);
        assert_eq!(status(Errno::EIO, true), 5);
    }
}
