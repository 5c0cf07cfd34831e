//! The order around barriers: all that changes the disk before one is over before it begins, and nothing is taken from
//! any ring of the device until it is over.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Context, Poll, Waker};

/// What all rings of a device share.
#[derive(Default)]
pub(crate) struct Barrier {
    /// Requests that change the disk, with the disk.
    changing: Cell<usize>,
    /// Rings that have not taken again all that a predecessor had taken: before any barrier that one of them comes to.
    behind: Cell<usize>,
    /// A ring has come to a barrier.
    is_up: Cell<bool>,
    waiting: RefCell<Vec<Waker>>,
}

/// A barrier that is up until this is dropped.
#[must_use]
pub(crate) struct Raised<'a>(&'a Barrier);

impl Barrier {
    /// A request that changes the disk goes there.
    pub(crate) fn began(&self) {
        self.changing.set(self.changing.get() + 1);
    }

    /// It is over, in whatever way.
    pub(crate) fn ended(&self) {
        self.changing.set(self.changing.get() - 1);
        if self.changing.get() == 0 {
            self.tell();
        }
    }

    /// The same, until the result is dropped.
    pub(crate) fn change(&self) -> Changing<'_> {
        self.began();
        Changing(self)
    }

    /// A ring has something to take again.
    pub(crate) fn fall_behind(&self) {
        self.behind.set(self.behind.get() + 1);
    }

    /// It has taken all of that, up to a barrier.
    pub(crate) fn catch_up(&self) {
        self.behind.set(self.behind.get() - 1);
        self.tell();
    }

    /// Whether no request may be taken.
    #[inline]
    pub(crate) fn is_up(&self) -> bool {
        self.is_up.get()
    }

    /// The same; then whoever asks is woken when it is down.
    pub(crate) fn keeps_out(&self, cx: &Context<'_>) -> bool {
        if self.is_up() {
            self.wait(cx);
        }
        self.is_up()
    }

    /// Waits until no other barrier is up and all rings have caught up, lets nothing more be taken, and waits until no request changes the disk.
    pub(crate) async fn raise(&self) -> Raised<'_> {
        self.until(|| !self.is_up.get() && self.behind.get() == 0).await;
        self.is_up.set(true);
        let raised = Raised(self);
        self.until(|| self.changing.get() == 0).await;
        raised
    }

    async fn until(&self, is_so: impl Fn() -> bool) {
        poll_fn(|cx| {
            if is_so() {
                return Poll::Ready(());
            }
            self.wait(cx);
            Poll::Pending
        })
        .await;
    }

    fn wait(&self, cx: &Context<'_>) {
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
    }

    fn tell(&self) {
        for waker in self.waiting.take() {
            waker.wake();
        }
    }
}

/// A request that changes the disk.
#[must_use]
pub(crate) struct Changing<'a>(&'a Barrier);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.ended();
    }
}

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.is_up.set(false);
        self.0.tell();
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;

    use super::*;

    #[test]
    fn a_barrier_waits_for_what_changes_the_disk_and_the_next_one_for_it() {
        let barrier = Barrier::default();
        let mut cx = Context::from_waker(Waker::noop());
        barrier.began();
        barrier.began();
        let (mut first, mut second) = (pin!(barrier.raise()), pin!(barrier.raise()));
        assert!(first.as_mut().poll(&mut cx).is_pending() && barrier.is_up());
        barrier.ended();
        assert!(first.as_mut().poll(&mut cx).is_pending());
        barrier.ended();
        let Poll::Ready(raised) = first.as_mut().poll(&mut cx) else { panic!("nothing is changing") };
        assert!(second.as_mut().poll(&mut cx).is_pending());
        drop(raised);
        assert!(!barrier.is_up());
        assert!(second.as_mut().poll(&mut cx).is_ready());
    }

    #[test]
    fn a_barrier_that_is_given_up_stops_nobody() {
        let barrier = Barrier::default();
        barrier.began();
        {
            let mut given_up = pin!(barrier.raise());
            assert!(given_up.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        assert!(!barrier.is_up());
    }
}
