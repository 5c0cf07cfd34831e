//! A queue that any thread fills and one thread empties, sleeping when there is nothing in it.

use std::collections::VecDeque;

#[cfg(loom)]
use loom::sync::Mutex;
#[cfg(not(loom))]
use std::sync::Mutex;
use std::sync::PoisonError;

/// Things to do for one thread, its owner.
///
/// The owner says under the lock that it goes to sleep, and whoever puts something in sees that under the same
/// lock: no wake-up is lost, and none costs a system call while the owner is awake.
pub struct Inbox<T> {
    state: Mutex<State<T>>,
    unpark: Box<dyn Fn() + Send + Sync>,
}

struct State<T> {
    queue: VecDeque<T>,
    asleep: bool,
}

impl<T> Inbox<T> {
    /// An empty inbox; `unpark` ends the owner's sleep, also one that is only about to begin.
    pub fn new(unpark: impl Fn() + Send + Sync + 'static) -> Inbox<T> {
        let state = State { queue: VecDeque::new(), asleep: false };
        Inbox { state: Mutex::new(state), unpark: Box::new(unpark) }
    }

    /// Puts something in, from any thread.
    pub fn put(&self, item: T) {
        let wake = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.queue.push_back(item);
            std::mem::take(&mut state.asleep)
        };
        if wake {
            (self.unpark)();
        }
    }

    /// Moves everything to the end of `into`; for the owner.
    pub fn take_all(&self, into: &mut VecDeque<T>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.asleep = false;
        if into.is_empty() {
            std::mem::swap(into, &mut state.queue);
        } else {
            into.append(&mut state.queue);
        }
    }

    /// The owner is awake again, whatever woke it: it needs no unpark from now on.
    pub fn wake_up(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).asleep = false;
    }

    /// Whether there is nothing in.
    pub fn is_empty(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).queue.is_empty()
    }

    /// Whether the owner may sleep now: nothing is in. From then on whoever puts something in unparks it.
    pub fn may_sleep(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.asleep = state.queue.is_empty();
        state.asleep
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::{Arc, Condvar, Mutex};

    /// An unpark that is remembered, as an eventfd's count is.
    #[derive(Default)]
    struct Bell {
        rung: Mutex<bool>,
        sound: Condvar,
    }

    #[test]
    fn loom_no_item_is_left_with_a_sleeping_owner() {
        loom::model(|| {
            let bell = Arc::new(Bell::default());
            let ring = bell.clone();
            let inbox = Arc::new(Inbox::new(move || {
                *ring.rung.lock().unwrap() = true;
                ring.sound.notify_one();
            }));
            let others: Vec<_> = (0..2)
                .map(|item| {
                    let inbox = inbox.clone();
                    loom::thread::spawn(move || inbox.put(item))
                })
                .collect();
            let mut got = VecDeque::new();
            while got.len() < 2 {
                inbox.take_all(&mut got);
                if got.len() < 2 && inbox.may_sleep() {
                    let mut rung = bell.rung.lock().unwrap();
                    while !*rung {
                        rung = bell.sound.wait(rung).unwrap();
                    }
                    *rung = false;
                    inbox.wake_up();
                }
            }
            for other in others {
                other.join().unwrap();
            }
        });
    }
}
