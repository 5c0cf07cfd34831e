//! Who asks a disk: the requests of one ring or one connection, which come to an end together.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use block::Request;

use crate::serve::{Disk, Inner};
use crate::waiters::Waiters;

/// What becomes of requests that cannot be done now, when their session is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GiveUp {
    /// Each is answered with its own error.
    Tell,
    /// Each is left to whoever serves its guest next ([`block::Reply::leave`]).
    Leave,
}

/// One that asks a disk: a ring, a connection. What is submitted through it belongs to it.
///
/// Dropping it changes nothing for its requests: they are done and answered as they come.
pub struct Session(pub(crate) Rc<Asker>);

/// A session as its requests know it.
pub(crate) struct Asker {
    pub(crate) disk: Rc<Inner>,
    /// Tells it from the others of its disk.
    number: u64,
    /// Its requests that are neither answered nor left.
    active: Cell<usize>,
    /// How many stop it at the moment, and how the last of them wants it.
    stops: Cell<usize>,
    how: Cell<GiveUp>,
    /// Those that stop it, and its requests that pause before they try again.
    waiters: Waiters,
}

impl Session {
    pub(crate) fn new(disk: Rc<Inner>, number: u64) -> Session {
        Session(Rc::new(Asker {
            disk,
            number,
            active: Cell::new(0),
            stops: Cell::new(0),
            how: Cell::new(GiveUp::Tell),
            waiters: Waiters::default(),
        }))
    }

    /// Takes a request. It is answered once, later or before this returns, unless it is left.
    ///
    /// What a guest may not ask is answered here: EINVAL beyond the end, EPERM for a write to a read-only disk.
    /// Interfaces check first, since their protocols have their own words for these.
    pub fn submit(&self, request: Request) {
        Disk::take(&self.0, request);
    }

    /// Waits until every request of this session is answered or left, and the kernel done with it. It waits for what
    /// is being done, however long that takes, but for no cause of an error to go away: requests that are held or
    /// pause before they try again end now, and those that would have to meanwhile. Other sessions notice nothing.
    ///
    /// What is submitted while it is being stopped is treated alike. Afterwards, or if the future is dropped, all is
    /// as before.
    pub async fn stop(&self, how: GiveUp) {
        let asker = &*self.0;
        let _stopping = Stopping::begin(asker, how);
        let held = asker.disk.holds.give_up(asker.number, how);
        if held > 0 {
            let disk = &*asker.disk.name;
            match how {
                GiveUp::Tell => tracing::warn!(
                    disk,
                    held,
                    "held requests are answered with their error, since whoever asked goes away"
                ),
                GiveUp::Leave => {
                    tracing::info!(disk, held, "held requests are left to whoever serves the disk next");
                }
            }
        }
        asker.waiters.look();
        asker.waiters.until(|| asker.active.get() == 0).await;
    }
}

/// Holds while a session is being stopped.
struct Stopping<'a>(&'a Asker);

impl<'a> Stopping<'a> {
    fn begin(asker: &'a Asker, how: GiveUp) -> Stopping<'a> {
        asker.stops.set(asker.stops.get() + 1);
        asker.how.set(how);
        Stopping(asker)
    }
}

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.stops.set(self.0.stops.get() - 1);
    }
}

impl Asker {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// A request of it was accepted.
    pub(crate) fn began(&self) {
        self.active.set(self.active.get() + 1);
    }

    /// A request of it was answered or left.
    pub(crate) fn ended(&self) {
        self.active.set(self.active.get() - 1);
        if self.active.get() == 0 && self.stops.get() > 0 {
            self.waiters.look();
        }
    }

    /// How its requests that cannot be done now are to end, while it is being stopped.
    pub(crate) fn gives_up(&self) -> Option<GiveUp> {
        (self.stops.get() > 0).then(|| self.how.get())
    }

    /// Waits this long, or until the session is being stopped: then it says how to give up.
    pub(crate) async fn pause(&self, delay: Duration) -> Option<GiveUp> {
        let mut sleep = pin!(self.disk.handle.sleep(delay));
        let mut stopped = pin!(self.waiters.until(|| self.gives_up().is_some()));
        poll_fn(|cx| match sleep.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(()),
            Poll::Pending => stopped.as_mut().poll(cx),
        })
        .await;
        self.gives_up()
    }
}
