//! Something that happens once, and whom it wakes.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::pin;
use std::task::{Poll, Waker};

#[derive(Default)]
pub(crate) struct Signal {
    happened: Cell<bool>,
    wakers: RefCell<Vec<Waker>>,
}

impl Signal {
    pub(crate) fn happen(&self) {
        self.happened.set(true);
        for waker in self.wakers.take() {
            waker.wake();
        }
    }

    pub(crate) fn has_happened(&self) -> bool {
        self.happened.get()
    }

    /// What `future` gives, or `None` if this happens before; the future is dropped then.
    pub(crate) async fn or<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        std::future::poll_fn(|cx| {
            if self.happened.get() {
                return Poll::Ready(None);
            }
            let polled = future.as_mut().poll(cx).map(Some);
            let mut wakers = self.wakers.borrow_mut();
            if polled.is_pending() && !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
                wakers.push(cx.waker().clone());
            }
            polled
        })
        .await
    }

    pub(crate) async fn wait(&self) {
        if self.or(std::future::pending::<()>()).await.is_some() {
            unreachable!("a pending future is never ready");
        }
    }
}
