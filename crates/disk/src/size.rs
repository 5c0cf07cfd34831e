//! How large a disk is, and who waits for that to change.

use std::cell::Cell;
use std::rc::Rc;

use crate::waiters::Waiters;

/// The size of one disk; a clone is the same disk's.
#[derive(Clone)]
pub(crate) struct Size(Rc<Known>);

struct Known {
    bytes: Cell<u64>,
    /// How often it has changed.
    changes: Cell<u64>,
    waiters: Waiters,
}

impl Size {
    pub(crate) fn new(bytes: u64) -> Size {
        Size(Rc::new(Known { bytes: Cell::new(bytes), changes: Cell::new(0), waiters: Waiters::default() }))
    }

    /// Bytes.
    pub(crate) fn get(&self) -> u64 {
        self.0.bytes.get()
    }

    /// Notes that the disk has this many bytes; it never shrinks.
    pub(crate) fn grow(&self, bytes: u64) {
        if bytes > self.get() {
            self.0.bytes.set(bytes);
            self.0.changes.set(self.0.changes.get() + 1);
            self.0.waiters.look();
        }
    }

    /// Ends when it has changed since this call.
    pub(crate) fn changed(&self) -> impl Future<Output = ()> + 'static {
        let known = self.0.clone();
        let seen = known.changes.get();
        async move { known.waiters.until(|| known.changes.get() != seen).await }
    }
}
