//! How much of our address space one front end may take with the memory that it shares.

use std::cell::Cell;
use std::rc::Rc;

/// Bytes of address space for all mappings of one device: 4 TiB. A process has 128 TiB of it on most machines, for all
/// front ends and for itself, and ends when it gets no more. The largest guests have some TiB, and a change of
/// their layout may map them twice.
pub(crate) const BYTES_MAX: u64 = 4 << 40;
/// Mappings of one device: all regions that it may have, as many that are only kept by I/O under way, and the in-flight
/// regions. All front ends of a process share the places of [`crate::fault`].
pub(crate) const MAPPINGS_MAX: usize = 2 * crate::vhost::MEMORY_REGIONS_MAX + 8;

/// Why there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoRoom {
    #[error(
        "{wanted} bytes more of guest memory: {taken} of the {BYTES_MAX} that a front end may have mapped are taken \
         already (by old memory too, while requests use it)"
    )]
    Bytes { wanted: u64, taken: u64 },
    #[error(
        "one more region of guest memory: {MAPPINGS_MAX} are mapped already (old ones too, while requests use them)"
    )]
    Mappings,
}

/// What the mappings of one device take.
#[derive(Default)]
pub(crate) struct Room {
    bytes: Cell<u64>,
    mappings: Cell<usize>,
}

/// A mapping's part of the room, until it is dropped.
pub(crate) struct Taken {
    room: Rc<Room>,
    bytes: u64,
}

impl Room {
    /// Takes room for a mapping of so many bytes.
    pub(crate) fn take(self: &Rc<Self>, bytes: u64) -> Result<Taken, NoRoom> {
        let taken = self.bytes.get();
        if self.mappings.get() >= MAPPINGS_MAX {
            return Err(NoRoom::Mappings);
        }
        let sum = taken.checked_add(bytes).filter(|sum| *sum <= BYTES_MAX);
        self.bytes.set(sum.ok_or(NoRoom::Bytes { wanted: bytes, taken })?);
        self.mappings.set(self.mappings.get() + 1);
        Ok(Taken { room: self.clone(), bytes })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.room.bytes.set(self.room.bytes.get() - self.bytes);
        self.room.mappings.set(self.room.mappings.get() - 1);
    }
}
