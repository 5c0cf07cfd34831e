//! Memory of other domains through the kernel's /dev/xen/gntdev (include/uapi/xen/gntdev.h).

use std::cell::RefCell;
use std::ffi::c_void;
use std::fs::File;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::rc::Rc;

use block::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::copy::{Copier, Segment};
use crate::device::{self, OpenError, ioctl, request};
use crate::events::Port;
use crate::grants::{Access, Farewell, GrantRef, Grants, Mapping, Transfer};
use crate::{Domain, PAGE};

const PATH: &str = "/dev/xen/gntdev";
const MODULE: &str = "xen-gntdev";

/// More pages than this in one mapping are not asked for: a request has 256 at most, a ring 16.
const PAGES_MAX: usize = 1024;

/// `struct ioctl_gntdev_map_grant_ref`, without the array at its end.
#[repr(C)]
struct MapHeader {
    count: u32,
    pad: u32,
    index: u64,
}

/// `struct ioctl_gntdev_grant_ref`.
#[repr(C)]
#[derive(Clone, Copy)]
struct MapRef {
    domid: u32,
    gref: u32,
}

/// `struct ioctl_gntdev_unmap_grant_ref`.
#[repr(C)]
struct Unmap {
    index: u64,
    count: u32,
    pad: u32,
}

/// `struct ioctl_gntdev_unmap_notify`.
#[repr(C)]
#[derive(Debug, PartialEq, Eq)]
struct UnmapNotify {
    index: u64,
    action: u32,
    event_channel_port: u32,
}

/// `struct ioctl_gntdev_grant_copy`.
#[repr(C)]
struct GrantCopy {
    count: libc::c_uint,
    segments: *mut Segment,
}

/// The struct's own size, with one element, is what the number of the request is made of.
const MAP_GRANT_REF: libc::c_ulong = request(b'G', 0, size_of::<MapHeader>() + size_of::<MapRef>());
const UNMAP_GRANT_REF: libc::c_ulong = request(b'G', 1, size_of::<Unmap>());
const SET_UNMAP_NOTIFY: libc::c_ulong = request(b'G', 7, size_of::<UnmapNotify>());
const GRANT_COPY: libc::c_ulong = request(b'G', 8, size_of::<GrantCopy>());

// What a C compiler makes of that header on a machine of 64 bits.
const _: () = assert!(MAP_GRANT_REF == 0x0018_4700 && UNMAP_GRANT_REF == 0x0010_4701);
const _: () = assert!(SET_UNMAP_NOTIFY == 0x0010_4707 && GRANT_COPY == 0x0010_4708);

const UNMAP_NOTIFY_CLEAR_BYTE: u32 = 1;
const UNMAP_NOTIFY_SEND_EVENT: u32 = 2;

/// The device, opened. What is mapped through it stays until it is unmapped, also without it.
#[derive(Debug)]
pub struct GrantDevice {
    file: Rc<File>,
    copier: RefCell<Copier>,
}

impl GrantDevice {
    /// Opens /dev/xen/gntdev.
    ///
    /// # Errors
    /// In words, if there is none or it cannot be used.
    pub fn open() -> Result<GrantDevice, OpenError> {
        let file = device::open(Path::new(PATH), MODULE)?;
        Ok(GrantDevice { file: Rc::new(file), copier: RefCell::default() })
    }
}

impl Grants for GrantDevice {
    fn map(&self, domain: Domain, refs: &[GrantRef], access: Access) -> Result<Mapping, Errno> {
        self.map_telling(domain, refs, access, Farewell::default())
    }

    fn map_telling(
        &self,
        domain: Domain,
        refs: &[GrantRef],
        access: Access,
        farewell: Farewell,
    ) -> Result<Mapping, Errno> {
        // Dropped on the way, it takes back what was asked for.
        let mut mapped = Mapped::ask(&self.file, domain, refs)?;
        mapped.map(access)?;
        if let Some(mut notify) = notify(mapped.index, mapped.pages, farewell)? {
            // SAFETY: the kernel reads this struct, and from it a place in our own mapping.
            unsafe { ioctl(&*self.file, SET_UNMAP_NOTIFY, &raw mut notify) }?;
        }
        let start = mapped.start.ok_or(Errno::EFAULT)?;
        // SAFETY: the pages are mapped from there on until `mapped` is dropped, and only their address is shared.
        Ok(unsafe { Mapping::new(start.cast(), mapped.pages, Box::new(mapped)) })
    }

    fn copy(&self, domain: Domain, transfers: &mut [Transfer]) {
        self.copier.borrow_mut().copy(domain, transfers, &mut |segments| {
            let count = segments.len() as libc::c_uint;
            let mut copy = GrantCopy { count, segments: segments.as_mut_ptr() };
            // SAFETY: `count` segments, whose local sides lie within the buffers of `transfers`, which keep them.
            unsafe { ioctl(&*self.file, GRANT_COPY, &raw mut copy) }.map(|_zero| ())
        });
    }
}

/// Pages that the device was asked for, and where they are mapped; dropping it gives them back.
struct Mapped {
    file: Rc<File>,
    /// What the device knows them by, and where they are in its file.
    index: u64,
    pages: usize,
    start: Option<NonNull<c_void>>,
}

impl Mapped {
    /// Tells the device which pages are to be mapped.
    fn ask(file: &Rc<File>, domain: Domain, refs: &[GrantRef]) -> Result<Mapped, Errno> {
        let mut words = map_argument(domain, refs)?;
        // SAFETY: the kernel reads a header and as many references as it says, and writes the index into the header.
        unsafe { ioctl(&**file, MAP_GRANT_REF, words.as_mut_ptr()) }?;
        Ok(Mapped { file: file.clone(), index: words[1], pages: refs.len(), start: None })
    }

    /// Maps them; the kernel maps all or fails (EINVAL), and without PROT_WRITE it asks Xen for reading only.
    fn map(&mut self, access: Access) -> Result<(), Errno> {
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::Write => ProtFlags::READ | ProtFlags::WRITE,
        };
        let len = self.pages * PAGE;
        // SAFETY: the kernel chooses the place, so this replaces no mapping.
        let start =
            unsafe { mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, &*self.file, self.index) };
        let start = start.map_err(|errno| Errno::new(errno.raw_os_error()).unwrap_or(Errno::EIO))?;
        self.start = NonNull::new(start);
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Some(start) = self.start {
            // SAFETY: mapped by `map`; who has a pointer into it has promised not to use it any more (`Mapping`).
            if let Err(errno) = unsafe { munmap(start.as_ptr(), self.pages * PAGE) } {
                tracing::error!(%errno, pages = self.pages, "pages of a guest cannot be unmapped");
            }
        }
        let mut unmap = Unmap { index: self.index, count: self.pages as u32, pad: 0 };
        // SAFETY: the kernel reads this struct.
        if let Err(errno) = unsafe { ioctl(&*self.file, UNMAP_GRANT_REF, &raw mut unmap) } {
            tracing::error!(%errno, pages = self.pages, "pages of a guest cannot be given back");
        }
    }
}

/// `struct ioctl_gntdev_map_grant_ref` with all its references, in words of 8 bytes as it is aligned: count and padding,
/// room for the index, then domain and reference of each.
fn map_argument(domain: Domain, refs: &[GrantRef]) -> Result<Vec<u64>, Errno> {
    if refs.is_empty() || refs.len() > PAGES_MAX {
        return Err(Errno::EINVAL);
    }
    let mut words = vec![pair(refs.len() as u32, 0), 0];
    words.extend(refs.iter().map(|gref| pair(u32::from(domain.0), gref.0)));
    Ok(words)
}

/// Two words of four bytes, one after the other in memory.
fn pair(first: u32, second: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// What the device is told of the end of a mapping, if anything is to happen then.
fn notify(index: u64, pages: usize, farewell: Farewell) -> Result<Option<UnmapNotify>, Errno> {
    let at = farewell.clear.unwrap_or(0);
    if at >= pages * PAGE {
        return Err(Errno::EINVAL);
    }
    let clear = if farewell.clear.is_some() { UNMAP_NOTIFY_CLEAR_BYTE } else { 0 };
    let ring = if farewell.ring.is_some() { UNMAP_NOTIFY_SEND_EVENT } else { 0 };
    let Port(port) = farewell.ring.unwrap_or(Port(0));
    let notify = UnmapNotify { index: index + at as u64, action: clear | ring, event_channel_port: port };
    Ok((notify.action != 0).then_some(notify))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_asked_for_as_the_header_of_the_kernel_lays_it_out() {
        let words = map_argument(Domain(0x1234), &[GrantRef(8), GrantRef(0xdead_beef)]).unwrap();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut expected = Vec::new();
        for word in [2_u32, 0, 0, 0, 0x1234, 8, 0x1234, 0xdead_beef] {
            expected.extend(word.to_ne_bytes());
        }
        assert_eq!(bytes, expected);
    }

    #[test]
    fn no_page_and_too_many_are_not_asked_for() {
        assert_eq!(map_argument(Domain(1), &[]).unwrap_err(), Errno::EINVAL);
        assert_eq!(map_argument(Domain(1), &[GrantRef(8); PAGES_MAX + 1]).unwrap_err(), Errno::EINVAL);
        assert_eq!(map_argument(Domain(1), &[GrantRef(8); PAGES_MAX]).unwrap().len(), PAGES_MAX + 2);
    }

    #[test]
    fn a_farewell_is_left_where_there_is_something_to_say() {
        let said = |clear, ring| notify(0x5000, 2, Farewell { clear, ring });
        let told =
            |index, action, event_channel_port| Ok(Some(UnmapNotify { index, action, event_channel_port }));
        assert_eq!(said(None, None), Ok(None));
        assert_eq!(said(Some(0), None), told(0x5000, 1, 0));
        assert_eq!(said(Some(8191), Some(Port(7))), told(0x6fff, 3, 7));
        assert_eq!(said(None, Some(Port(7))), told(0x5000, 2, 7));
        assert_eq!(said(Some(8192), None), Err(Errno::EINVAL));
    }
}
