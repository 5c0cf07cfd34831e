//! Words in memory that others share: each is read or written in one go, and a test may stop the world after any store.

use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use ::xen::Domain;
use ::xen::grants::{Access, GrantRef, Grants, Mapping};
use block::Errno;

/// Words in shared memory, at offsets of bytes; `M` keeps the memory. The numbers are little-endian there.
///
/// # Panics
/// Its methods, where a word does not lie within it: offsets are ours, never a guest's.
pub(crate) struct Words<M> {
    ptr: NonNull<u8>,
    len: usize,
    mapping: Rc<M>,
}

impl<M> Clone for Words<M> {
    fn clone(&self) -> Words<M> {
        Words { ptr: self.ptr, len: self.len, mapping: self.mapping.clone() }
    }
}

macro_rules! words {
    ($($read:ident $write:ident $number:ident $atomic:ident)*) => {
        $(
            #[inline]
            pub(crate) fn $read(&self, at: usize, order: Ordering) -> $number {
                let ptr = self.at(at, size_of::<$number>()).cast::<$number>();
                // SAFETY: within the mapping and aligned (`at` has checked both), and never named by a reference that
                // is not to an atomic.
                $number::from_le(unsafe { $atomic::from_ptr(ptr) }.load(order))
            }

            #[inline]
            pub(crate) fn $write(&self, at: usize, number: $number, order: Ordering) {
                let ptr = self.at(at, size_of::<$number>()).cast::<$number>();
                if !may_store() {
                    return;
                }
                // SAFETY: as above.
                unsafe { $atomic::from_ptr(ptr) }.store(number.to_le(), order);
            }
        )*
    };
}

impl<M> Words<M> {
    /// The words of `len` bytes of memory.
    ///
    /// # Safety
    /// They can be read and written for as long as `mapping` lives, and nobody names them by a Rust reference that is
    /// not to an atomic.
    pub(crate) unsafe fn new(ptr: NonNull<u8>, len: usize, mapping: Rc<M>) -> Words<M> {
        Words { ptr, len, mapping }
    }

    words! {
        u8 put_u8 u8 AtomicU8
        u16 put_u16 u16 AtomicU16
        u32 put_u32 u32 AtomicU32
        u64 put_u64 u64 AtomicU64
    }

    #[inline]
    fn at(&self, at: usize, size: usize) -> *mut u8 {
        assert!(at < self.len && size <= self.len - at, "a word at {at} of {} bytes", self.len);
        // SAFETY: within the mapping, as was just checked.
        let ptr = unsafe { self.ptr.as_ptr().add(at) };
        debug_assert!(ptr.addr().is_multiple_of(size), "a word at {at} is not aligned");
        ptr
    }

    /// Whether it starts at a multiple of `align` bytes.
    pub(crate) fn is_aligned(&self, align: usize) -> bool {
        self.ptr.as_ptr().addr().is_multiple_of(align)
    }

    /// What keeps the memory.
    #[inline]
    pub(crate) fn mapping(&self) -> &M {
        &self.mapping
    }
}

impl Words<Mapping> {
    /// Pages that another domain has granted, one after the other.
    ///
    /// # Errors
    /// If one of them cannot be mapped for reading and writing.
    pub(crate) fn granted(
        grants: &dyn Grants,
        domain: Domain,
        refs: &[GrantRef],
    ) -> Result<Words<Mapping>, Errno> {
        let mapping = grants.map(domain, refs, Access::Write)?;
        let (ptr, len) = (mapping.start(), mapping.len());
        // SAFETY: mapped for both a line above, and a mapping lives as long as it is kept. Nobody else names it.
        Ok(unsafe { Words::new(ptr, len, Rc::new(mapping)) })
    }
}

/// Whether a store into shared memory takes place: a test may stop the world after any of them.
#[inline]
pub(crate) fn may_store() -> bool {
    #[cfg(test)]
    return crate::tripwire::may_store();
    #[cfg(not(test))]
    true
}
