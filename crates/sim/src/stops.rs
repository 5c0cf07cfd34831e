//! Sessions that are being stopped: whose, how, and since when.

use std::collections::BTreeMap;

use disk::GiveUp;

/// The stops of one disk's sessions; each guest has one session.
#[derive(Default)]
pub(crate) struct Stops(BTreeMap<u64, (GiveUp, u64)>);

/// The number of the guest that made a request.
fn guest_of(request: u64) -> u64 {
    request >> 32
}

/// Names a guest's request: guests from 1 on, requests from 1 on.
pub(crate) fn request_of(guest: u64, number: u64) -> u64 {
    guest << 32 | number
}

impl Stops {
    /// A guest stops its session.
    pub(crate) fn begin(&mut self, guest: u64, how: GiveUp, now: u64) {
        self.0.insert(guest, (how, now));
    }

    /// It has stopped.
    pub(crate) fn end(&mut self, guest: u64) {
        self.0.remove(&guest);
    }

    /// How a request that cannot be done now is to end, if it is, and since when.
    pub(crate) fn of(&self, request: u64) -> Option<(GiveUp, u64)> {
        self.0.get(&guest_of(request)).copied()
    }

    /// Whether a request is one of this guest's.
    pub(crate) fn is_of(request: u64, guest: u64) -> bool {
        guest_of(request) == guest
    }
}
