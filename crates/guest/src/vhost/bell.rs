//! Eventfds that the front end hands over: kicks to us, calls and errors to the guest.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use block::Errno;
use runtime::{Fd, Handle};
use rustix::io::ReadWriteFlags;

/// Why a descriptor is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoBell {
    #[error("a descriptor of {0:?}: an eventfd is expected")]
    Other(String),
    #[error("what a descriptor is cannot be found out from /proc: {0}")]
    Unknown(Errno),
}

fn errno(errno: rustix::io::Errno) -> Errno {
    Errno::new(errno.raw_os_error()).unwrap_or(Errno::EIO)
}

/// Takes in an eventfd, and nothing else: waiting for a file of a strange kind could hold up the disk's thread.
///
/// It stays blocking where the front end made it so, though the kernel then uses a thread of its own (io-wq) for each
/// signal: the flag is one with the front end's, which may wait in read(2), as users of libblkio may.
pub(crate) fn take_in(handle: &Handle, fd: OwnedFd) -> Result<Rc<Fd>, NoBell> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let kind = rustix::fs::readlink(link, Vec::new()).map_err(|error| NoBell::Unknown(errno(error)))?;
    if kind.as_bytes() != b"anon_inode:[eventfd]" {
        return Err(NoBell::Other(kind.to_string_lossy().into_owned()));
    }
    Ok(handle.register(fd))
}

/// Consumes what was rung, without waiting, whether or not the front end made the eventfd non-blocking.
pub(crate) fn silence(fd: &Fd) -> Result<(), Errno> {
    let mut count = [0; 8];
    // No offset: an eventfd has no position.
    match rustix::io::preadv2(
        fd.as_fd(),
        &mut [IoSliceMut::new(&mut count)],
        u64::MAX,
        ReadWriteFlags::NOWAIT,
    ) {
        Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
        Err(error) => Err(errno(error)),
    }
}
