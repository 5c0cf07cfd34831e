//! Requests that are held: each waits for the sign to try again or to give up.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::task::{Poll, Waker};

use block::Error;

use crate::session::GiveUp;

/// What a held request is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sign {
    /// The cause may be gone.
    TryAgain,
    /// End.
    GiveUp(GiveUp),
}

struct Held {
    /// The number of the session that it belongs to.
    session: u64,
    error: Error,
    sign: Option<Sign>,
    waker: Option<Waker>,
}

/// The requests of one disk that are held, in the order in which they began to wait: a probe that fails again goes to
/// the end, so that each gets its turn.
#[derive(Default)]
pub(crate) struct Holds {
    waiting: RefCell<BTreeMap<u64, Held>>,
    next: std::cell::Cell<u64>,
}

impl Holds {
    /// How many are held.
    pub(crate) fn count(&self) -> usize {
        self.waiting.borrow().len()
    }

    /// Why the first of them is held.
    pub(crate) fn cause(&self) -> Option<Error> {
        self.waiting.borrow().values().next().map(|held| held.error.clone())
    }

    /// Waits for a sign, as a request of this session. Dropping the future ends the wait.
    pub(crate) async fn wait(&self, session: u64, error: Error) -> Sign {
        struct Place<'a>(&'a Holds, u64);
        impl Drop for Place<'_> {
            fn drop(&mut self) {
                self.0.waiting.borrow_mut().remove(&self.1);
            }
        }
        let number = self.next.get();
        self.next.set(number + 1);
        self.waiting.borrow_mut().insert(number, Held { session, error, sign: None, waker: None });
        let _place = Place(self, number);
        poll_fn(|cx| {
            let mut waiting = self.waiting.borrow_mut();
            let held = waiting.get_mut(&number).expect("a held request leaves only by its own end");
            match held.sign {
                Some(sign) => Poll::Ready(sign),
                None => {
                    held.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Lets the first one try.
    pub(crate) fn probe(&self) {
        self.sign(Sign::TryAgain, 1, |_| true);
    }

    /// Gives all the same sign.
    pub(crate) fn all(&self, sign: Sign) {
        self.sign(sign, usize::MAX, |_| true);
    }

    /// Lets those of one session give up; how many.
    pub(crate) fn give_up(&self, session: u64, how: GiveUp) -> usize {
        self.sign(Sign::GiveUp(how), usize::MAX, |held| held.session == session)
    }

    fn sign(&self, sign: Sign, most: usize, concerns: impl Fn(&Held) -> bool) -> usize {
        let mut wakers = Vec::new();
        let mut count = 0;
        let mut waiting = self.waiting.borrow_mut();
        for held in waiting.values_mut().filter(|held| held.sign.is_none() && concerns(held)).take(most) {
            held.sign = Some(sign);
            wakers.extend(held.waker.take());
            count += 1;
        }
        drop(waiting);
        wakers.into_iter().for_each(Waker::wake);
        count
    }
}
