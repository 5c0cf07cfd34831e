//! Tasks that wait for something to become so.

use std::cell::RefCell;
use std::future::poll_fn;
use std::task::{Poll, Waker};

use slab::Slab;

/// Who waits.
#[derive(Default)]
pub(crate) struct Waiters(RefCell<Slab<Waker>>);

/// One that waits, until it is dropped.
struct Place<'a> {
    waiters: &'a Waiters,
    key: usize,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.waiters.0.borrow_mut().remove(self.key);
    }
}

impl Waiters {
    /// Waits until this is so. It is looked at when the wait begins and at each [`Waiters::look`].
    pub(crate) async fn until(&self, is_so: impl Fn() -> bool) {
        let mut place = None;
        poll_fn(|cx| {
            if is_so() {
                return Poll::Ready(());
            }
            match &place {
                Some(Place { key, .. }) => self.0.borrow_mut()[*key].clone_from(cx.waker()),
                None => {
                    let key = self.0.borrow_mut().insert(cx.waker().clone());
                    place = Some(Place { waiters: self, key });
                }
            }
            Poll::Pending
        })
        .await;
    }

    /// What is waited for may be so now.
    pub(crate) fn look(&self) {
        let wakers: Vec<Waker> = self.0.borrow().iter().map(|(_, waker)| waker.clone()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::Future;
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Wake};

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn each_is_woken_at_every_look_and_nobody_is_kept_who_has_gone() {
        let (waiters, so) = (Waiters::default(), Cell::new(false));
        let count = Arc::new(Count::default());
        let waker = Waker::from(count.clone());
        let cx = &mut Context::from_waker(&waker);
        {
            let mut first = pin!(waiters.until(|| so.get()));
            let mut second = pin!(waiters.until(|| so.get()));
            for _ in 0..3 {
                assert!(first.as_mut().poll(cx).is_pending() && second.as_mut().poll(cx).is_pending());
            }
            waiters.look();
            assert_eq!(count.0.load(Ordering::Relaxed), 2);
            so.set(true);
            assert!(first.as_mut().poll(cx).is_ready());
        }
        assert!(waiters.0.borrow().is_empty());
    }
}
