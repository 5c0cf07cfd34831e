//! Time on one thread: instants that an engine tells, and futures that wait for one.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::Handle;

/// Nanoseconds since a start that only the engine knows; never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Instant(pub u64);

impl Instant {
    /// The instant this much later; the end of time where that is beyond it.
    #[must_use]
    pub fn after(self, delay: Duration) -> Instant {
        Instant(self.0.saturating_add(u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long ago `earlier` was; zero where it was not.
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// Who wants to be woken when.
#[derive(Default)]
pub(crate) struct Timers {
    waiting: RefCell<BTreeMap<(Instant, u64), Waker>>,
}

impl Timers {
    /// When the first one wants to be woken.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.waiting.borrow().keys().next().map(|(at, _)| *at)
    }

    /// Wakes those whose time has come.
    pub(crate) fn fire(&self, now: Instant) {
        loop {
            let waker = {
                let mut waiting = self.waiting.borrow_mut();
                match waiting.first_entry() {
                    Some(first) if first.key().0 <= now => first.remove(),
                    Some(_) | None => return,
                }
            };
            waker.wake();
        }
    }
}

/// A future that is ready at an instant; see [`Handle::sleep`].
pub struct Sleep {
    handle: Handle,
    key: (Instant, u64),
}

impl Sleep {
    pub(crate) fn new(handle: Handle, until: Instant, id: u64) -> Sleep {
        Sleep { handle, key: (until, id) }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.handle.now() >= self.key.0 {
            return Poll::Ready(());
        }
        self.handle.timers().waiting.borrow_mut().insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.handle.timers().waiting.borrow_mut().remove(&self.key);
    }
}
