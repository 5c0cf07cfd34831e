//! A number of permits that are given out in order of arrival: a bound on what is done side by side.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// Permits to take and to give back.
#[derive(Clone)]
pub(crate) struct Permits(Rc<RefCell<State>>);

struct State {
    free: usize,
    next: u64,
    /// Who waits, in order of arrival.
    waiting: VecDeque<(u64, Option<Waker>)>,
}

/// One permit; given back when dropped.
#[must_use]
pub(crate) struct Permit(Permits);

impl Permits {
    /// As many permits.
    pub(crate) fn new(count: usize) -> Permits {
        Permits(Rc::new(RefCell::new(State { free: count, next: 0, waiting: VecDeque::new() })))
    }

    /// Waits for a permit.
    pub(crate) async fn take(&self) -> Permit {
        let number = {
            let mut state = self.0.borrow_mut();
            let number = state.next;
            state.next += 1;
            state.waiting.push_back((number, None));
            number
        };
        // Leaves the queue also when the wait is given up.
        let _place = Place { permits: self, number };
        poll_fn(|cx| {
            let mut state = self.0.borrow_mut();
            let is_first = state.waiting.front().is_some_and(|(first, _)| *first == number);
            if is_first && state.free > 0 {
                state.free -= 1;
                return Poll::Ready(());
            }
            if let Some((_, waker)) = state.waiting.iter_mut().find(|(waiting, _)| *waiting == number) {
                *waker = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
        Permit(self.clone())
    }

    /// Wakes the first who waits, if there is a permit for it.
    fn call(&self) {
        let mut state = self.0.borrow_mut();
        let free = state.free > 0;
        let waker = state.waiting.front_mut().filter(|_| free).and_then(|(_, waker)| waker.take());
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

struct Place<'a> {
    permits: &'a Permits,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.permits.0.borrow_mut().waiting.retain(|(number, _)| *number != self.number);
        self.permits.call();
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.0.borrow_mut().free += 1;
        self.0.call();
    }
}

#[cfg(test)]
mod tests {
    use std::pin::{Pin, pin};
    use std::task::Context;

    use super::*;

    fn poll<T>(future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    #[test]
    fn permits_come_back_and_go_to_the_first_who_waits() {
        let permits = Permits::new(1);
        let held = poll(pin!(permits.take())).unwrap();
        let mut first = pin!(permits.take());
        let mut second = pin!(permits.take());
        assert!(poll(first.as_mut()).is_none() && poll(second.as_mut()).is_none());
        drop(held);
        assert!(poll(second.as_mut()).is_none(), "not its turn");
        let held = poll(first.as_mut()).unwrap();
        assert!(poll(second.as_mut()).is_none());
        drop(held);
        assert!(poll(second.as_mut()).is_some());
    }

    #[test]
    fn who_gives_up_makes_way() {
        let permits = Permits::new(1);
        let held = poll(pin!(permits.take())).unwrap();
        {
            let mut given_up = pin!(permits.take());
            assert!(poll(given_up.as_mut()).is_none());
        }
        drop(held);
        assert!(poll(pin!(permits.take())).is_some());
    }
}
