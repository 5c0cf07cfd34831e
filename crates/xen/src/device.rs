//! Opening a device of Xen's, and saying in words why there is none.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use block::Errno;

/// Why a device of Xen's cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file is not there.
    #[error("there is no {}: load it with \"modprobe {module}\"; it exists only where Linux runs on Xen", path.display())]
    Missing {
        /// The device.
        path: PathBuf,
        /// The kernel's module that makes it.
        module: &'static str,
    },
    /// The kernel has the device, and Xen is not there.
    #[error("{} cannot be used: this machine does not run on Xen", path.display())]
    NotXen {
        /// The device.
        path: PathBuf,
    },
    /// This user may not.
    #[error("no permission to open {}: it needs root, or an owner of that file", path.display())]
    Permission {
        /// The device.
        path: PathBuf,
    },
    /// Anything else.
    #[error("cannot open {}: {source}", path.display())]
    Other {
        /// The device.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
}

/// Opens a device, without waiting in reads of it.
pub(crate) fn open(path: &Path, module: &'static str) -> Result<File, OpenError> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
    opened.map_err(|source| {
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::ENOENT) => OpenError::Missing { path, module },
            Some(libc::ENODEV | libc::ENXIO) => OpenError::NotXen { path },
            Some(libc::EACCES | libc::EPERM) => OpenError::Permission { path },
            _ => OpenError::Other { path, source },
        }
    })
}

/// `_IOC(_IOC_NONE, kind, number, size)` of asm-generic/ioctl.h.
pub(crate) const fn request(kind: u8, number: u8, size: usize) -> libc::c_ulong {
    (size as libc::c_ulong) << 16 | (kind as libc::c_ulong) << 8 | number as libc::c_ulong
}

/// One ioctl; what it returns.
///
/// # Safety
/// `argument` is what the device takes for this request: it reads and writes nothing beyond what the caller has the
/// right to.
pub(crate) unsafe fn ioctl<T>(
    device: impl AsFd,
    request: libc::c_ulong,
    argument: *mut T,
) -> Result<u64, Errno> {
    let fd = device.as_fd().as_raw_fd();
    // SAFETY: the caller's promise; the descriptor is open while it is borrowed.
    let result = unsafe { libc::ioctl(fd, request, argument) };
    match result {
        -1 => Err(Errno::from_std(&io::Error::last_os_error())),
        result => Errno::from_kernel(i64::from(result)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_said_to_be_missing_and_how_to_get_it() {
        let error = open(Path::new("/dev/xen/none-such"), "xen-gntdev").unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no /dev/xen/none-such: load it with \"modprobe xen-gntdev\"; it exists only where Linux runs on Xen"
        );
    }

    #[test]
    fn another_failure_is_told_as_the_kernel_tells_it() {
        let folder = tempfile::tempdir().unwrap();
        let error = open(folder.path(), "xen-gntdev").unwrap_err();
        let expected = format!("cannot open {}: Is a directory (os error 21)", folder.path().display());
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn an_ioctl_that_a_file_does_not_know_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        // SAFETY: a regular file takes no such request, and nothing is read or written.
        let result = unsafe { ioctl(&file, request(b'G', 0, 0), std::ptr::null_mut::<u8>()) };
        assert_eq!(result, Err(Errno::ENOTTY));
    }
}
