//! Event channels through the kernel's /dev/xen/evtchn (include/uapi/xen/evtchn.h), one descriptor for each.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use block::Errno;

use crate::Domain;
use crate::device::{self, OpenError, ioctl, request};
use crate::events::{Channel, Events, Port};

const PATH: &str = "/dev/xen/evtchn";
const MODULE: &str = "xen-evtchn";

/// `struct ioctl_evtchn_bind_interdomain`.
#[repr(C)]
struct BindInterdomain {
    remote_domain: libc::c_uint,
    remote_port: libc::c_uint,
}

/// `struct ioctl_evtchn_unbind` and `struct ioctl_evtchn_notify`.
#[repr(C)]
struct OfPort {
    port: libc::c_uint,
}

/// `struct ioctl_evtchn_restrict_domid`.
#[repr(C)]
struct RestrictDomid {
    domid: u16,
}

const BIND_INTERDOMAIN: libc::c_ulong = request(b'E', 1, size_of::<BindInterdomain>());
const UNBIND: libc::c_ulong = request(b'E', 3, size_of::<OfPort>());
const NOTIFY: libc::c_ulong = request(b'E', 4, size_of::<OfPort>());
const RESET: libc::c_ulong = request(b'E', 5, 0);
const RESTRICT_DOMID: libc::c_ulong = request(b'E', 6, size_of::<RestrictDomid>());

// What a C compiler makes of that header.
const _: () = assert!(BIND_INTERDOMAIN == 0x0008_4501 && UNBIND == 0x0004_4503 && NOTIFY == 0x0004_4504);
const _: () = assert!(RESET == 0x0000_4505 && RESTRICT_DOMID == 0x0002_4506);

/// Where ends of event channels come from: the kernel's device, opened once for each.
#[derive(Debug)]
pub struct EventDevice(());

impl EventDevice {
    /// Looks whether the device can be opened.
    ///
    /// # Errors
    /// In words, if there is none or it cannot be used.
    pub fn open() -> Result<EventDevice, OpenError> {
        device::open(Path::new(PATH), MODULE)?;
        Ok(EventDevice(()))
    }
}

impl Events for EventDevice {
    fn bind(&self, domain: Domain, remote: Port) -> Result<Box<dyn Channel>, Errno> {
        let file = device::open(Path::new(PATH), MODULE).map_err(|error| {
            tracing::error!(%error, "no event channel can be bound");
            match error {
                OpenError::Missing { .. } => Errno::ENOENT,
                OpenError::NotXen { .. } => Errno::ENODEV,
                OpenError::Permission { .. } => Errno::EACCES,
                OpenError::Other { source, .. } => Errno::from_std(&source),
            }
        })?;
        restrict(&file, domain)?;
        let mut bind = BindInterdomain { remote_domain: domain.0.into(), remote_port: remote.0 };
        // SAFETY: the kernel reads this struct.
        let port = unsafe { ioctl(&file, BIND_INTERDOMAIN, &raw mut bind) }?;
        let port = Port(u32::try_from(port).map_err(|_too_large| Errno::EOVERFLOW)?);
        Ok(Box::new(End { file, port }))
    }
}

/// Lets this descriptor reach one domain only, where the kernel can do that (4.8 and later): the port is the guest's word,
/// and it shall be able to name none but its own.
fn restrict(file: &File, domain: Domain) -> Result<(), Errno> {
    // The kernel does not restrict anybody to dom0, which may have a disk of its own like any other.
    if domain == Domain(0) {
        return Ok(());
    }
    let mut restrict = RestrictDomid { domid: domain.0 };
    // SAFETY: the kernel reads this struct.
    match unsafe { ioctl(file, RESTRICT_DOMID, &raw mut restrict) } {
        // Binding names the domain as well, so without this nothing is lost.
        Ok(_) | Err(Errno::ENOSYS | Errno::ENOTTY) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// One end. Closing the file unbinds the port.
struct End {
    file: File,
    port: Port,
}

impl Channel for End {
    fn port(&self) -> Port {
        self.port
    }

    fn descriptor(&self) -> Result<OwnedFd, Errno> {
        let copy = self.file.try_clone().map_err(|error| Errno::from_std(&error))?;
        Ok(copy.into())
    }

    fn take(&self) -> Result<(), Errno> {
        take(self)
    }

    fn notify(&self) -> Result<(), Errno> {
        let mut notify = OfPort { port: self.port.0 };
        // SAFETY: the kernel reads this struct.
        unsafe { ioctl(&self.file, NOTIFY, &raw mut notify) }.map(|_zero| ())
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // Closing the file does it as well, but a descriptor that is being waited for may be a copy that lives on.
        let mut unbind = OfPort { port: self.port.0 };
        // SAFETY: the kernel reads this struct.
        if let Err(errno) = unsafe { ioctl(&self.file, UNBIND, &raw mut unbind) } {
            tracing::error!(%errno, port = self.port.0, "an event channel cannot be unbound");
        }
    }
}

/// The device's stream of ports that have been rung.
trait Stream {
    /// Ports that have been rung and are masked since, as bytes; EAGAIN if there is none, EFBIG if some were lost.
    fn read(&self, ports: &mut [u8]) -> Result<usize, Errno>;
    /// Lets these ring again.
    fn write(&self, ports: &[u8]) -> Result<usize, Errno>;
    /// Empties it and lifts EFBIG.
    fn reset(&self) -> Result<(), Errno>;
    /// The one port that is bound.
    fn own(&self) -> Port;
}

impl Stream for End {
    fn read(&self, ports: &mut [u8]) -> Result<usize, Errno> {
        rustix::io::read(&self.file, ports).map_err(from_rustix)
    }

    fn write(&self, ports: &[u8]) -> Result<usize, Errno> {
        rustix::io::write(&self.file, ports).map_err(from_rustix)
    }

    fn reset(&self) -> Result<(), Errno> {
        // SAFETY: takes no argument.
        unsafe { ioctl(&self.file, RESET, std::ptr::null_mut::<u8>()) }.map(|_zero| ())
    }

    fn own(&self) -> Port {
        self.port
    }
}

fn from_rustix(errno: rustix::io::Errno) -> Errno {
    Errno::new(errno.raw_os_error()).unwrap_or(Errno::EIO)
}

/// Reads what has rung and unmasks it. One port is masked until then, so there is one word to read; were there more, or
/// had they been lost, unmasking our own port is all the same: who took note looks at the ring after this.
fn take(stream: &impl Stream) -> Result<(), Errno> {
    let mut ports = [0; 64];
    loop {
        match stream.read(&mut ports) {
            Ok(0) | Err(Errno::EAGAIN) => return Ok(()),
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(Errno::EFBIG) => break stream.reset()?,
            Err(errno) => return Err(errno),
        }
    }
    loop {
        match stream.write(&stream.own().0.to_ne_bytes()) {
            Ok(4) => return Ok(()),
            Ok(_) => return Err(Errno::EIO),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// The kernel's side of one descriptor with port 9, as drivers/xen/evtchn.c has it.
    #[derive(Default)]
    struct Kernel {
        /// What reads will say, in order; then EAGAIN.
        reads: RefCell<Vec<Result<Vec<u32>, Errno>>>,
        writes: RefCell<Vec<Result<usize, Errno>>>,
        unmasked: RefCell<Vec<Vec<u8>>>,
        resets: RefCell<usize>,
    }

    impl Stream for Kernel {
        fn read(&self, ports: &mut [u8]) -> Result<usize, Errno> {
            let mut reads = self.reads.borrow_mut();
            if reads.is_empty() {
                return Err(Errno::EAGAIN);
            }
            let bytes: Vec<u8> = reads.remove(0)?.iter().flat_map(|port| port.to_ne_bytes()).collect();
            ports[..bytes.len()].copy_from_slice(&bytes);
            Ok(bytes.len())
        }

        fn write(&self, ports: &[u8]) -> Result<usize, Errno> {
            let mut writes = self.writes.borrow_mut();
            let result = if writes.is_empty() { Ok(ports.len()) } else { writes.remove(0) };
            if result.is_ok() {
                self.unmasked.borrow_mut().push(ports.to_vec());
            }
            result
        }

        fn reset(&self) -> Result<(), Errno> {
            *self.resets.borrow_mut() += 1;
            Ok(())
        }

        fn own(&self) -> Port {
            Port(9)
        }
    }

    fn of(reads: Vec<Result<Vec<u32>, Errno>>) -> Kernel {
        Kernel { reads: RefCell::new(reads), ..Kernel::default() }
    }

    const UNMASKED: [u8; 4] = 9_u32.to_ne_bytes();

    #[test]
    fn what_has_rung_can_ring_again() {
        let kernel = of(vec![Ok(vec![9])]);
        assert_eq!(take(&kernel), Ok(()));
        assert_eq!(*kernel.unmasked.borrow(), [UNMASKED]);
    }

    #[test]
    fn where_nothing_has_rung_nothing_is_done() {
        let kernel = of(vec![]);
        assert_eq!(take(&kernel), Ok(()));
        assert!(kernel.unmasked.borrow().is_empty());
    }

    #[test]
    fn lost_events_are_as_good_as_one() {
        let kernel = of(vec![Err(Errno::EFBIG)]);
        assert_eq!(take(&kernel), Ok(()));
        assert_eq!(
            (*kernel.resets.borrow(), kernel.unmasked.borrow().as_slice()),
            (1, &[UNMASKED.to_vec()][..])
        );
    }

    #[test]
    fn interruptions_are_nothing_and_failures_are_failures() {
        let kernel = of(vec![Err(Errno::EINTR), Ok(vec![9])]);
        kernel.writes.borrow_mut().push(Err(Errno::EINTR));
        assert_eq!(take(&kernel), Ok(()));
        assert_eq!(kernel.unmasked.borrow().len(), 1);
        assert_eq!(take(&of(vec![Err(Errno::ENOMEM)])), Err(Errno::ENOMEM));
        let kernel = of(vec![Ok(vec![9])]);
        kernel.writes.borrow_mut().push(Err(Errno::ENOMEM));
        assert_eq!(take(&kernel), Err(Errno::ENOMEM));
        let kernel = of(vec![Ok(vec![9])]);
        kernel.writes.borrow_mut().push(Ok(0));
        assert_eq!(take(&kernel), Err(Errno::EIO));
    }
}
