//! Pins: what still reads or writes a place keeps it from being used for something else.
//!
//! A pin is of an epoch, and does not say of which place: cheap to take for each request. Who gives a place up ends the
//! epoch, and has to wait until no pin of it or of an earlier one is left.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};

/// The epochs of one image.
pub(super) struct Pins {
    current: RefCell<Rc<Epoch>>,
    number: Cell<u64>,
    /// Those that have ended and still had pins when somebody looked, from the oldest on.
    ended: RefCell<VecDeque<(u64, Weak<Epoch>)>>,
    waiting: Rc<RefCell<Vec<Waker>>>,
}

/// A pin is a share of its epoch.
pub(super) struct Epoch {
    waiting: Rc<RefCell<Vec<Waker>>>,
}

impl Drop for Epoch {
    fn drop(&mut self) {
        self.waiting.take().into_iter().for_each(Waker::wake);
    }
}

impl Default for Pins {
    fn default() -> Pins {
        let waiting = Rc::default();
        let current = RefCell::new(Rc::new(Epoch { waiting: Rc::clone(&waiting) }));
        Pins { current, number: Cell::new(0), ended: RefCell::default(), waiting }
    }
}

impl Pins {
    /// A pin of the current epoch.
    pub(super) fn pin(&self) -> Rc<Epoch> {
        self.current.borrow().clone()
    }

    /// Ends the current epoch; gives its number.
    pub(super) fn turn(&self) -> u64 {
        let number = self.number.get();
        self.number.set(number + 1);
        let next = Rc::new(Epoch { waiting: self.waiting.clone() });
        let last = self.current.replace(next);
        let mut ended = self.ended.borrow_mut();
        // There is one of these for each round, and seldom anybody who waits.
        ended.retain(|(_, epoch)| epoch.strong_count() > 0);
        ended.push_back((number, Rc::downgrade(&last)));
        number
    }

    /// Waits until no pin of this epoch, which has ended, or of an earlier one is left.
    pub(super) async fn released(&self, number: u64) {
        poll_fn(|cx| {
            let mut ended = self.ended.borrow_mut();
            ended.retain(|(_, epoch)| epoch.strong_count() > 0);
            if ended.front().is_none_or(|(oldest, _)| *oldest > number) {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use std::pin::{Pin, pin};
    use std::task::Context;

    use super::*;

    fn is_ready(future: Pin<&mut impl Future<Output = ()>>) -> bool {
        future.poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn an_epoch_is_released_when_its_pins_and_all_earlier_ones_are_gone() {
        let pins = Pins::default();
        let first = pins.pin();
        let one = pins.turn();
        let second = pins.pin();
        let two = pins.turn();
        let third = pins.pin();
        let (mut until_one, mut until_two) = (pin!(pins.released(one)), pin!(pins.released(two)));
        assert!(!is_ready(until_one.as_mut()) && !is_ready(until_two.as_mut()));
        drop(second);
        assert!(!is_ready(until_two.as_mut()), "an earlier one is left");
        drop(first);
        assert!(is_ready(until_one.as_mut()) && is_ready(until_two.as_mut()));
        drop(third);
    }

    #[test]
    fn epochs_without_pins_are_not_kept() {
        let pins = Pins::default();
        let first = pins.pin();
        for _ in 0..1000 {
            pins.turn();
        }
        assert!(pins.ended.borrow().len() <= 2, "{}", pins.ended.borrow().len());
        let number = pins.turn();
        let mut until = pin!(pins.released(number));
        assert!(!is_ready(until.as_mut()), "the first one is still there");
        drop(first);
        assert!(is_ready(until.as_mut()));
    }

    #[test]
    fn without_pins_nobody_waits() {
        let pins = Pins::default();
        let number = pins.turn();
        assert!(is_ready(pin!(pins.released(number))));
    }
}
