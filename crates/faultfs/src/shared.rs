//! What the kernel's requests and the test's commands share: the store, the script, and the requests held back.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::rule::{Hold, Op, Outcome};
use crate::script::Script;
use crate::store::{Inode, Store};

/// What has been asked for so far, counted as the requests arrive; the bytes are those answered as done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads. The kernel cuts what is longer than a request can be (1 MiB), so these may exceed the system calls.
    pub reads: u64,
    /// Bytes answered to reads.
    pub read_bytes: u64,
    /// Writes, cut in the same way.
    pub writes: u64,
    /// Bytes acknowledged to writes.
    pub written_bytes: u64,
    /// Calls of fsync.
    pub fsyncs: u64,
    /// Calls of fdatasync.
    pub fdatasyncs: u64,
    /// Calls of fallocate in any mode.
    pub fallocates: u64,
    /// Calls of ftruncate.
    pub truncates: u64,
    /// Calls of fsync of the directory.
    pub syncdirs: u64,
    /// How many requests a rule has struck.
    pub struck: u64,
}

/// The rest of a request: does what the outcome says and answers.
type Rest = Box<dyn FnOnce(&Shared, Outcome) + Send>;

struct Held {
    rest: Rest,
    outcome: Outcome,
    until_released: bool,
}

pub(crate) struct State {
    pub(crate) store: Store,
    pub(crate) script: Script,
    pub(crate) counters: Counters,
    held: BTreeMap<u64, Held>,
    last_held: u64,
    /// While a power cut goes on, what the kernel's cache still writes back goes nowhere.
    cutting: bool,
}

pub(crate) struct Shared {
    state: Mutex<State>,
    held_changed: Condvar,
}

impl Shared {
    pub(crate) fn new(store: Store) -> Shared {
        let state = State {
            store,
            script: Script::default(),
            counters: Counters::default(),
            held: BTreeMap::new(),
            last_held: 0,
            cutting: false,
        };
        Shared { state: Mutex::new(state), held_changed: Condvar::new() }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the script what becomes of a request, and runs the rest of it now, later or on release. Never blocks.
    pub(crate) fn serve(
        self: &Arc<Self>,
        op: Op,
        inode: Inode,
        bytes: Option<Range<u64>>,
        rest: impl FnOnce(&Shared, Outcome) + Send + 'static,
    ) {
        let mut state = self.lock();
        let (hold, outcome) = state.judge(op, inode, bytes.as_ref());
        match hold {
            Hold::No => {
                drop(state);
                rest(self, outcome);
            }
            Hold::For(delay) => {
                let id = state.hold(Held { rest: Box::new(rest), outcome, until_released: false });
                drop(state);
                let shared = Arc::clone(self);
                thread::spawn(move || {
                    thread::sleep(delay);
                    let held = shared.lock().held.remove(&id);
                    if let Some(held) = held {
                        (held.rest)(&shared, held.outcome);
                    }
                });
            }
            Hold::UntilReleased => {
                state.hold(Held { rest: Box::new(rest), outcome, until_released: true });
                self.held_changed.notify_all();
            }
        }
    }

    /// Lets the hanging requests go on, in the order in which they came, and says how many they were.
    pub(crate) fn release(&self) -> usize {
        let mut state = self.lock();
        let (hanging, delayed) =
            std::mem::take(&mut state.held).into_iter().partition(|(_, held)| held.until_released);
        state.held = delayed;
        drop(state);
        let hanging: BTreeMap<u64, Held> = hanging;
        let count = hanging.len();
        for held in hanging.into_values() {
            (held.rest)(self, held.outcome);
        }
        count
    }

    /// Waits until at least `count` requests hang and says whether they do.
    pub(crate) fn wait_hanging(&self, count: usize, at_most: Duration) -> bool {
        let deadline = Instant::now() + at_most;
        let mut state = self.lock();
        while state.hanging() < count {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            let waited = self.held_changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            state = waited.0;
        }
        true
    }

    /// Answers EIO to whatever is held back, since it must not happen any more.
    pub(crate) fn fail_held(&self) {
        let held = std::mem::take(&mut self.lock().held);
        for held in held.into_values() {
            (held.rest)(self, Outcome::Fail { errno: Errno::IO, lose: false });
        }
    }

    /// Cuts the power; `forget_cache` makes the kernel drop its cache, and what it writes back goes nowhere.
    pub(crate) fn power_cut(&self, seed: Option<u64>, forget_cache: impl FnOnce()) {
        self.lock().cutting = true;
        self.fail_held();
        forget_cache();
        let mut state = self.lock();
        state.store.power_cut(seed);
        state.cutting = false;
    }
}

impl State {
    pub(crate) fn hanging(&self) -> usize {
        self.held.values().filter(|held| held.until_released).count()
    }

    fn hold(&mut self, held: Held) -> u64 {
        self.last_held += 1;
        self.held.insert(self.last_held, held);
        self.last_held
    }

    fn judge(&mut self, op: Op, inode: Inode, bytes: Option<&Range<u64>>) -> (Hold, Outcome) {
        if self.cutting {
            return (Hold::No, Outcome::Drop);
        }
        let file = self.store.name_of(inode).unwrap_or_default();
        let (hold, outcome) = self.script.judge(op, file, bytes);
        if (hold, outcome) != (Hold::No, Outcome::Serve) {
            self.counters.struck += 1;
        }
        (hold, outcome)
    }
}
