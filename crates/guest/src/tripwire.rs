//! Stops the world after so many stores into shared memory, as the death of the process would: for tests.

use std::cell::Cell;

thread_local! {
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
}

/// Lets `stores` more stores take place on this thread, and none after those.
pub(crate) fn set(stores: u64) {
    LEFT.set(stores);
}

/// Whether no store takes place any more.
pub(crate) fn is_dead() -> bool {
    LEFT.get() == 0
}

/// Whether the next store takes place.
pub(crate) fn may_store() -> bool {
    match LEFT.get() {
        0 => false,
        u64::MAX => true,
        left => {
            LEFT.set(left - 1);
            true
        }
    }
}
