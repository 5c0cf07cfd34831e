//! Locks on units of a disk, such as clusters: whoever gives one its place does so alone.

use std::cell::RefCell;
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Poll, Waker};

use slab::Slab;

/// The locks of one image.
///
/// Units are had in rising order: who waits for one has all before it, and none behind it. Each by itself is first come,
/// first served. So whoever asks for higher units than those it has never waits for one that waits for it, not even if both
/// have asked for whole ranges that overlap.
#[derive(Clone, Default)]
pub struct Units(Rc<RefCell<State>>);

#[derive(Default)]
struct State {
    claims: Slab<Claim>,
    next: u64,
}

struct Claim {
    /// All units that it wants.
    units: Range<u64>,
    /// The first one that it has not got.
    waits_for: u64,
    /// The order in which it came to that one.
    number: u64,
    waker: Option<Waker>,
}

/// Units that somebody has, or waits for; let go of when dropped.
#[must_use = "dropping it lets the units go"]
pub struct Lock {
    units: Units,
    key: usize,
}

impl Units {
    /// Waits until nobody else has any of these units, which are numbered from 0.
    ///
    /// # Panics
    /// If there is none: an empty range locks nothing.
    pub async fn lock(&self, units: Range<u64>) -> Lock {
        assert!(units.start < units.end, "at least one unit");
        let lock = {
            let mut state = self.0.borrow_mut();
            let number = state.number();
            let waits_for = units.start;
            let key = state.claims.insert(Claim { units, waits_for, number, waker: None });
            Lock { units: self.clone(), key }
        };
        poll_fn(|cx| {
            let mut state = self.0.borrow_mut();
            if state.advance(lock.key) {
                return Poll::Ready(());
            }
            state.claims[lock.key].waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
        lock
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The wakers of those who wait for one of these.
    fn waiting_for(&mut self, units: &Range<u64>) -> Vec<Waker> {
        let claims = self.claims.iter_mut().filter(|(_, claim)| units.contains(&claim.waits_for));
        claims.filter_map(|(_, claim)| claim.waker.take()).collect()
    }

    /// Takes as many units as there are to be had; whether it has all.
    fn advance(&mut self, key: usize) -> bool {
        let claim = &self.claims[key];
        let (from, number) = (claim.waits_for, claim.number);
        let mut to = claim.units.end;
        for (other_key, other) in &self.claims {
            if other_key == key {
                continue;
            }
            let has = other.units.start.max(from)..other.waits_for;
            if has.start < has.end {
                to = to.min(has.start);
            }
            // At the unit where the other waits it is served first if it came there first. Whoever is on its way there comes
            // later.
            let is_waiting = other.waits_for < other.units.end;
            let came_first = other.waits_for > from || other.number < number;
            if is_waiting && came_first && other.waits_for >= from {
                to = to.min(other.waits_for);
            }
        }
        if to > from {
            let number = self.number();
            let claim = &mut self.claims[key];
            (claim.waits_for, claim.number) = (to, number);
        }
        let claim = &self.claims[key];
        claim.waits_for == claim.units.end
    }
}

impl Lock {
    /// Lets those from this unit on go. Some before it are left.
    pub fn shorten(&mut self, end: u64) {
        let mut state = self.units.0.borrow_mut();
        let claim = &mut state.claims[self.key];
        let end = end.clamp(claim.units.start + 1, claim.units.end);
        let free = end..claim.units.end;
        (claim.units.end, claim.waits_for) = (end, end);
        let wakers = state.waiting_for(&free);
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let mut state = self.units.0.borrow_mut();
        let gone = state.claims.remove(self.key);
        let wakers = state.waiting_for(&gone.units);
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::Context;

    use super::*;

    /// Claims that are made one after the other and polled by hand.
    #[derive(Default)]
    struct Claims(Units, Vec<Option<Pin<Box<dyn Future<Output = Lock>>>>>, Vec<Option<Lock>>);

    impl Claims {
        fn claim(&mut self, units: Range<u64>) -> usize {
            let all = self.0.clone();
            self.1.push(Some(Box::pin(async move { all.lock(units).await })));
            self.2.push(None);
            self.poll(self.1.len() - 1);
            self.1.len() - 1
        }

        fn poll(&mut self, number: usize) {
            let Some(future) = &mut self.1[number] else { return };
            if let Poll::Ready(lock) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                self.1[number] = None;
                self.2[number] = Some(lock);
            }
        }

        fn has(&mut self, number: usize) -> bool {
            self.poll(number);
            self.2[number].is_some()
        }

        fn let_go(&mut self, number: usize) {
            (self.1[number], self.2[number]) = (None, None);
        }
    }

    #[test]
    fn a_unit_is_had_by_one_at_a_time_first_come_first_served() {
        let mut claims = Claims::default();
        let (first, second, third) = (claims.claim(3..5), claims.claim(4..6), claims.claim(4..5));
        let apart = claims.claim(8..9);
        assert!(claims.has(first) && claims.has(apart));
        assert!(!claims.has(third) && !claims.has(second));
        claims.let_go(first);
        assert!(!claims.has(third) && claims.has(second));
        claims.let_go(second);
        assert!(claims.has(third));
    }

    #[test]
    fn who_has_lower_units_gets_higher_ones_before_those_who_wait_for_the_lower() {
        let mut claims = Claims::default();
        let lower = claims.claim(3..4);
        let both = claims.claim(3..6);
        let higher = claims.claim(4..6);
        assert!(claims.has(lower) && !claims.has(both) && claims.has(higher));
        claims.let_go(lower);
        assert!(!claims.has(both));
        claims.let_go(higher);
        assert!(claims.has(both));
    }

    #[test]
    fn who_needs_less_lets_the_rest_go() {
        let mut claims = Claims::default();
        let (first, second) = (claims.claim(0..9), claims.claim(4..5));
        assert!(claims.has(first) && !claims.has(second));
        claims.2[first].as_mut().unwrap().shorten(4);
        assert!(claims.has(second));
        let third = claims.claim(3..4);
        assert!(!claims.has(third));
        claims.let_go(first);
        assert!(claims.has(third));
    }

    #[test]
    fn who_gives_up_waiting_lets_others_pass() {
        let mut claims = Claims::default();
        let (first, second, third) = (claims.claim(0..1), claims.claim(0..9), claims.claim(0..1));
        claims.let_go(second);
        claims.let_go(first);
        assert!(claims.has(third));
    }

    #[test]
    fn claims_of_rising_ranges_never_wait_for_each_other() {
        let mut random = storage::conformance::Random(5);
        for _ in 0..300 {
            let mut claims = Claims::default();
            // Each worker asks for some ranges, one behind the other, and lets all go when it has had them.
            let mut workers: Vec<(Vec<usize>, u64, u32)> = (0..6).map(|_| (Vec::new(), 0, 0)).collect();
            for _ in 0..3000 {
                for (held, next, asked) in &mut workers {
                    let has_last = held.last().is_none_or(|last| claims.has(*last));
                    if has_last && *asked < 4 {
                        let start = *next + random.below(3);
                        *next = start + 1 + random.below(4);
                        held.push(claims.claim(start..*next));
                        *asked += 1;
                    } else if has_last && *asked == 4 {
                        held.drain(..).for_each(|number| claims.let_go(number));
                        *asked = 5;
                    }
                    let all: Vec<_> = claims.2.iter().flatten().map(|lock| lock.key).collect();
                    let state = claims.0.0.borrow();
                    for (index, one) in all.iter().enumerate() {
                        for other in &all[..index] {
                            let (one, other) = (&state.claims[*one].units, &state.claims[*other].units);
                            assert!(one.end <= other.start || other.end <= one.start);
                        }
                    }
                }
            }
            assert!(workers.iter().all(|(_, _, asked)| *asked == 5), "somebody waits for ever");
        }
    }
}
