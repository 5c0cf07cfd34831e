//! Locks on ranges of bytes: many writers side by side, or one read-modify-write alone.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use block::Span;
use slab::Slab;

/// What a holder does to its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Changes it as a whole, without having read it: many may do so at once.
    Write,
    /// Reads bytes and writes them back: nobody else may change them meanwhile.
    Exclusive,
}

/// The ranges of one storage that are locked or waited for.
///
/// First come, first served where ranges conflict: a waiting holder of an exclusive lock is not overtaken by later
/// writers of its range, so it gets its turn.
#[derive(Clone, Default)]
pub struct RangeLocks(Rc<RefCell<State>>);

#[derive(Default)]
struct State {
    claims: Slab<Claim>,
    /// How many claims are exclusive: while none is, nobody waits.
    exclusive: usize,
    next: u64,
}

struct Claim {
    span: Span,
    access: Access,
    /// The order of arrival.
    number: u64,
    waker: Option<Waker>,
}

/// A lock on a range, or the wait for it; let go of when dropped.
#[must_use]
pub struct RangeGuard {
    locks: RangeLocks,
    key: usize,
}

impl RangeLocks {
    /// Waits until this access to this range is allowed.
    pub async fn lock(&self, span: Span, access: Access) -> RangeGuard {
        let guard = {
            let mut state = self.0.borrow_mut();
            let number = state.next;
            state.next += 1;
            state.exclusive += usize::from(access == Access::Exclusive);
            let key = state.claims.insert(Claim { span, access, number, waker: None });
            RangeGuard { locks: self.clone(), key }
        };
        poll_fn(|cx| {
            let mut state = self.0.borrow_mut();
            if state.exclusive == 0 || !state.is_blocked(guard.key) {
                return Poll::Ready(());
            }
            state.claims[guard.key].waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
        guard
    }
}

impl State {
    fn is_blocked(&self, key: usize) -> bool {
        let claim = &self.claims[key];
        self.claims.iter().any(|(_, other)| {
            other.number < claim.number
                && (other.access == Access::Exclusive || claim.access == Access::Exclusive)
                && other.span.overlaps(claim.span)
        })
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut state = self.locks.0.borrow_mut();
        let gone = state.claims.remove(self.key);
        if state.exclusive == 0 {
            return;
        }
        state.exclusive -= usize::from(gone.access == Access::Exclusive);
        let wakers: Vec<Waker> = state
            .claims
            .iter_mut()
            .filter(|(_, claim)| claim.span.overlaps(gone.span))
            .filter_map(|(_, claim)| claim.waker.take())
            .collect();
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::task::Context;

    use super::*;

    fn poll<T>(future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    fn span(at: u64, len: u64) -> Span {
        Span::new(at, len).unwrap()
    }

    #[test]
    fn writers_share_and_an_exclusive_lock_does_not() {
        let locks = RangeLocks::default();
        let first = poll(pin!(locks.lock(span(0, 10), Access::Write))).unwrap();
        let second = poll(pin!(locks.lock(span(5, 10), Access::Write))).unwrap();
        let mut alone = pin!(locks.lock(span(9, 2), Access::Exclusive));
        assert!(poll(alone.as_mut()).is_none());
        drop(first);
        assert!(poll(alone.as_mut()).is_none());
        drop(second);
        let alone = poll(alone.as_mut()).unwrap();
        assert!(poll(pin!(locks.lock(span(0, 10), Access::Write))).is_none());
        assert!(poll(pin!(locks.lock(span(0, 9), Access::Exclusive))).is_some());
        drop(alone);
        assert!(poll(pin!(locks.lock(span(0, 10), Access::Write))).is_some());
    }

    #[test]
    fn a_waiting_exclusive_lock_is_not_overtaken() {
        let locks = RangeLocks::default();
        let writer = poll(pin!(locks.lock(span(0, 10), Access::Write))).unwrap();
        let mut alone = pin!(locks.lock(span(0, 4), Access::Exclusive));
        assert!(poll(alone.as_mut()).is_none());
        let mut late = pin!(locks.lock(span(2, 4), Access::Write));
        assert!(poll(late.as_mut()).is_none());
        drop(writer);
        assert!(poll(late.as_mut()).is_none());
        drop(poll(alone.as_mut()).unwrap());
        assert!(poll(late.as_mut()).is_some());
    }

    #[test]
    fn giving_up_the_wait_lets_the_next_one_in() {
        let locks = RangeLocks::default();
        let _writer = poll(pin!(locks.lock(span(0, 4), Access::Write))).unwrap();
        {
            let mut given_up = pin!(locks.lock(span(0, 10), Access::Exclusive));
            assert!(poll(given_up.as_mut()).is_none());
        }
        assert!(poll(pin!(locks.lock(span(5, 5), Access::Write))).is_some());
    }
}
