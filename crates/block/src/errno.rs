//! An errno that cannot be mistaken for success, and the error that carries it up with what was being done.

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU16;

/// A Linux error number: never zero, never negative, so there is no sign to get wrong and no success in it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Errno(NonZeroU16);

/// Linux's `MAX_ERRNO` (include/linux/err.h): the kernel returns errors as -1 to -4095.
const MAX_ERRNO: i64 = 4095;

macro_rules! errnos {
    ($($name:ident)*) => {
        #[allow(missing_docs)] // each is the errno of that name; errno(3) describes them
        impl Errno {
            $(pub const $name: Errno = Errno::known(libc::$name);)*
            const NAMES: &'static [(Errno, &'static str)] = &[$((Errno::$name, stringify!($name)),)*];
        }
    };
}

errnos! {
    EPERM ENOENT ESRCH EINTR EIO ENXIO E2BIG EBADF EAGAIN ENOMEM EACCES EFAULT ENOTBLK EBUSY EEXIST EXDEV ENODEV
    ENOTDIR EISDIR EINVAL ENFILE EMFILE ENOTTY ETXTBSY EFBIG ENOSPC ESPIPE EROFS EMLINK EPIPE EDOM ERANGE
    EDEADLK ENAMETOOLONG ENOLCK ENOSYS ENOTEMPTY ELOOP ENODATA ETIME ENOLINK EPROTO EBADMSG EOVERFLOW EILSEQ
    EUSERS ENOTSOCK EDESTADDRREQ EMSGSIZE EOPNOTSUPP EADDRINUSE EADDRNOTAVAIL ENETDOWN ENETUNREACH
    ECONNABORTED ECONNRESET ENOBUFS EISCONN ENOTCONN ESHUTDOWN ETIMEDOUT ECONNREFUSED EHOSTDOWN EHOSTUNREACH
    EALREADY EINPROGRESS ESTALE EUCLEAN EREMOTEIO EDQUOT ENOMEDIUM EMEDIUMTYPE ECANCELED ENOKEY EHWPOISON
}

impl Errno {
    const fn known(code: i32) -> Errno {
        match Errno::new(code) {
            Some(errno) => errno,
            None => panic!("not an errno"),
        }
    }

    /// The errno of this number; `None` for zero, a negative number, or one that Linux cannot return.
    pub const fn new(code: i32) -> Option<Errno> {
        if code <= 0 || code as i64 > MAX_ERRNO {
            return None;
        }
        match NonZeroU16::new(code as u16) {
            Some(code) => Some(Errno(code)),
            None => None,
        }
    }

    /// The errno of this name, as `errno(3)` spells it.
    pub fn from_name(name: &str) -> Option<Errno> {
        Errno::NAMES.iter().find(|(_, known)| *known == name).map(|(errno, _)| *errno)
    }

    /// Turns what the kernel returned into a count or an errno.
    ///
    /// This is the only place where a sign is turned. A negative value that is no errno is answered as EIO: an
    /// error stays one even when we cannot name it.
    pub fn from_kernel(res: i64) -> std::result::Result<u64, Errno> {
        match u64::try_from(res) {
            Ok(count) => Ok(count),
            Err(_negative) => {
                Err(i32::try_from(-i128::from(res)).ok().and_then(Errno::new).unwrap_or(Errno::EIO))
            }
        }
    }

    /// The errno of a failed call of the standard library; EIO where it carries none.
    pub fn from_std(error: &std::io::Error) -> Errno {
        error.raw_os_error().and_then(Errno::new).unwrap_or(Errno::EIO)
    }

    /// The number, greater than zero, as in `errno.h`.
    pub const fn code(self) -> i32 {
        self.0.get() as i32
    }

    /// The name, as in `errno.h`; `None` for a number that this program has no name for.
    pub fn name(self) -> Option<&'static str> {
        Errno::NAMES.iter().find(|(known, _)| *known == self).map(|(_, name)| *name)
    }

    /// Storage is full: no space, no quota. More space cures it, so it has a policy of its own.
    pub const fn is_no_space(self) -> bool {
        matches!(self, Errno::ENOSPC | Errno::EDQUOT)
    }

    /// How much a guest should worry, for choosing which of several errors of one request to tell.
    ///
    /// Losing data (anything not listed) outweighs a lack of space, which outweighs a refusal, which outweighs
    /// something that will pass.
    pub const fn severity(self) -> u8 {
        match self {
            Errno::EINTR | Errno::EAGAIN | Errno::EBUSY | Errno::ENOMEM | Errno::ENOBUFS => 0,
            Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EPERM | Errno::EACCES | Errno::EROFS => 1,
            Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG => 2,
            _ => 3,
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why an operation failed: the errno as it was found, and what was being done, from the outside in.
#[derive(Clone, PartialEq, Eq)]
pub struct Error {
    errno: Errno,
    doing: Cow<'static, str>,
    lasting: bool,
}

impl Error {
    /// An error met while doing this.
    pub fn new(errno: Errno, doing: impl Into<Cow<'static, str>>) -> Error {
        Error { errno, doing: doing.into(), lasting: false }
    }

    /// Adds what was being done around it. The errno stays.
    pub fn during(mut self, outer: impl fmt::Display) -> Error {
        self.doing = if self.doing.is_empty() {
            outer.to_string().into()
        } else {
            format!("{outer}: {}", self.doing).into()
        };
        self
    }

    /// Marks an error that trying again cannot cure and must not hide: a failed sync, and whatever is refused
    /// because a sync failed before. It is neither retried nor held.
    pub fn lasting(mut self) -> Error {
        self.lasting = true;
        self
    }

    /// Whether trying again is forbidden; see [`Error::lasting`].
    pub fn is_lasting(&self) -> bool {
        self.lasting
    }

    /// The errno, as it was found.
    pub fn errno(&self) -> Errno {
        self.errno
    }

    /// What was being done, outermost first.
    pub fn doing(&self) -> &str {
        &self.doing
    }

    /// Of two errors of one request, the one to tell: the first by severity. A lasting one outweighs all.
    pub fn worse(self, other: Error) -> Error {
        let weight = |error: &Error| (error.lasting, error.errno.severity());
        if weight(&other) > weight(&self) { other } else { self }
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Error {
        Error::new(errno, "")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.doing.is_empty() {
            write!(f, "{}", self.errno)
        } else {
            write!(f, "{}: {}", self.doing, self.errno)
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_is_turned_and_nothing_negative_is_success() {
        assert_eq!(Errno::from_kernel(0), Ok(0));
        assert_eq!(Errno::from_kernel(4096), Ok(4096));
        assert_eq!(Errno::from_kernel(-5), Err(Errno::EIO));
        assert_eq!(Errno::from_kernel(-28), Err(Errno::ENOSPC));
        assert_eq!(Errno::from_kernel(-4096), Err(Errno::EIO));
        assert_eq!(Errno::from_kernel(i64::MIN), Err(Errno::EIO));
        assert_eq!(Errno::from_kernel(i64::from(i32::MIN)), Err(Errno::EIO));
    }

    #[test]
    fn zero_and_negative_numbers_are_no_errno() {
        for code in [0, -1, -28, i32::MIN, 4096, i32::MAX] {
            assert_eq!(Errno::new(code), None, "{code}");
        }
    }

    #[test]
    fn names_are_those_of_the_kernel() {
        // The values of asm-generic/errno-base.h.
        assert_eq!((Errno::EIO.code(), Errno::EIO.name()), (5, Some("EIO")));
        assert_eq!((Errno::ENOSPC.code(), Errno::ENOSPC.name()), (28, Some("ENOSPC")));
        assert_eq!(Errno::from_name("EDQUOT").map(Errno::code), Some(122));
        assert_eq!(Errno::from_name("EWHAT"), None);
        let real = std::fs::File::open("/nonexistent").unwrap_err();
        assert_eq!(Errno::from_std(&real), Errno::ENOENT);
    }

    #[test]
    fn context_is_added_and_the_errno_stays() {
        let error = Error::new(Errno::ENOSPC, "write 4096 bytes at 0").during("update the BAT");
        assert_eq!(error.to_string(), "update the BAT: write 4096 bytes at 0: ENOSPC");
        assert_eq!(error.errno(), Errno::ENOSPC);
    }

    #[test]
    fn the_worst_error_is_told_and_of_equals_the_first() {
        let io = || Error::new(Errno::EIO, "first");
        let space = || Error::new(Errno::ENOSPC, "second");
        assert_eq!(io().worse(space()).errno(), Errno::EIO);
        assert_eq!(space().worse(io()).errno(), Errno::EIO);
        assert_eq!(io().worse(Error::new(Errno::ESTALE, "later")).doing(), "first");
        assert!(io().worse(space().lasting()).is_lasting());
    }
}
