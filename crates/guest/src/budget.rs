//! Memory that all clients of a server share, so that none can take so much that another goes without.
//!
//! Nobody is given a fixed share: that would waste the memory of those who are idle. Instead a client may take
//! more only while what it then uses is no more than what would still be free (a "dynamic threshold"). One greedy
//! client gets half of the memory, two get a third each, and so on: there is always as much left for a newcomer as
//! each of them has. An eighth is set aside for clients that use little, so that these go on while the greedy
//! share the rest.
//!
//! Who cannot have what it needs waits in line, first come, first served. A client that waits for the greed of
//! others (it uses nothing yet) holds up those behind it until it is served: else small takers could keep a large
//! one waiting for ever. One that waits because of what it uses itself holds up nobody.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// One part in so many of the memory is for clients that use little.
const RESERVE: usize = 8;
/// What is little: bytes in use by one client.
const LITTLE: usize = 256 << 10;

/// An amount of memory, in bytes, that clients share. A clone is the same.
#[derive(Clone)]
pub struct Budget(Rc<Shared>);

struct Shared {
    total: usize,
    used: Cell<usize>,
    line: RefCell<VecDeque<Rc<Waiter>>>,
}

struct Waiter {
    account: Rc<Account>,
    need: usize,
    granted: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// What one client uses.
pub struct Account {
    budget: Rc<Shared>,
    used: Cell<usize>,
}

/// An amount of memory that a client may use until this is dropped.
#[must_use]
pub struct Taken {
    account: Rc<Account>,
    len: usize,
}

impl Budget {
    /// The least amount of memory, in bytes, with which a server works: the longest NBD payload and what is set
    /// aside fit it.
    pub const MIN: usize = 64 << 20;

    /// Memory of this many bytes, or [`Budget::MIN`] where that is more.
    pub fn new(total: usize) -> Budget {
        Budget(Rc::new(Shared {
            total: total.max(Budget::MIN),
            used: Cell::new(0),
            line: RefCell::default(),
        }))
    }

    /// Bytes that are in use.
    pub fn used(&self) -> usize {
        self.0.used.get()
    }

    /// Whether somebody waits who uses nothing: only others can give it what it needs.
    pub fn is_contended(&self) -> bool {
        self.0.line.borrow().iter().any(|waiter| waiter.account.used.get() == 0)
    }

    /// For another client.
    pub fn account(&self) -> Rc<Account> {
        Rc::new(Account { budget: self.0.clone(), used: Cell::new(0) })
    }
}

impl Account {
    /// Bytes in use by this client.
    pub fn used(&self) -> usize {
        self.used.get()
    }

    /// Takes `len` bytes if they are to be had at once.
    pub fn try_take(self: &Rc<Self>, len: usize) -> Option<Taken> {
        let waits = !self.budget.line.borrow().is_empty();
        (self.budget.grants(self, len, waits)).then(|| self.take_granted(len))
    }

    /// Takes `len` bytes, no more than the budget's [`Budget::MIN`] leaves beside its reserve; waits for them.
    pub async fn take(self: &Rc<Self>, len: usize) -> Taken {
        match self.try_take(len) {
            Some(taken) => taken,
            None => Line::join(self, len).await,
        }
    }

    fn take_granted(self: &Rc<Self>, len: usize) -> Taken {
        self.used.set(self.used.get() + len);
        self.budget.used.set(self.budget.used.get() + len);
        Taken { account: self.clone(), len }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let account = &self.account;
        account.used.set(account.used.get() - self.len);
        account.budget.used.set(account.budget.used.get() - self.len);
        account.budget.serve();
    }
}

impl Shared {
    /// Whether this account may have `len` bytes more, where `behind` says that it is not its turn.
    fn grants(&self, account: &Account, len: usize, behind: bool) -> bool {
        let would_use = account.used.get() + len;
        let free = self.total - self.used.get();
        if would_use <= LITTLE {
            return len <= free;
        }
        !behind && would_use <= free.saturating_sub(self.total / RESERVE)
    }

    /// Gives those in line what they may have.
    fn serve(&self) {
        let mut line = self.line.borrow_mut();
        let mut behind = false;
        line.retain(|waiter| {
            if !self.grants(&waiter.account, waiter.need, behind) {
                behind |= waiter.account.used.get() == 0;
                return true;
            }
            // Counted at once, so that the next in line sees it; whoever waits makes a `Taken` of it.
            waiter.account.used.set(waiter.account.used.get() + waiter.need);
            self.used.set(self.used.get() + waiter.need);
            waiter.granted.set(true);
            if let Some(waker) = waiter.waker.take() {
                waker.wake();
            }
            false
        });
    }
}

/// Waiting in line. Dropping it leaves the line, and gives back what was granted meanwhile.
struct Line {
    waiter: Option<Rc<Waiter>>,
}

impl Line {
    fn join(account: &Rc<Account>, need: usize) -> Line {
        let waiter = Rc::new(Waiter {
            account: account.clone(),
            need,
            granted: Cell::new(false),
            waker: RefCell::default(),
        });
        account.budget.line.borrow_mut().push_back(waiter.clone());
        // Those before it may all be waiting for themselves.
        account.budget.serve();
        Line { waiter: Some(waiter) }
    }
}

impl Future for Line {
    type Output = Taken;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Taken> {
        let waiter = self.waiter.as_ref().expect("not polled after its end");
        if !waiter.granted.get() {
            *waiter.waker.borrow_mut() = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let taken = Taken { account: waiter.account.clone(), len: waiter.need };
        self.waiter = None;
        Poll::Ready(taken)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let Some(waiter) = self.waiter.take() else { return };
        if waiter.granted.get() {
            drop(Taken { account: waiter.account.clone(), len: waiter.need });
        } else {
            let budget = &waiter.account.budget;
            budget.line.borrow_mut().retain(|other| !Rc::ptr_eq(other, &waiter));
            budget.serve();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn poll<T>(future: &mut Pin<Box<impl Future<Output = T>>>) -> Option<T> {
        match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    /// Takes memory a MiB at a time until there is no more to be had.
    fn grab(account: &Rc<Account>) -> Vec<Taken> {
        std::iter::from_fn(|| account.try_take(MIB)).collect()
    }

    #[test]
    fn one_client_gets_half_and_leaves_as_much() {
        let budget = Budget::new(256 * MIB);
        let greedy = grab(&budget.account());
        assert_eq!(greedy.len(), 112, "half of 256 MiB without the eighth that is set aside");
        assert!(budget.account().try_take(32 * MIB).is_some(), "a newcomer has its largest request");
    }

    #[test]
    fn the_greedy_get_equal_shares_whoever_came_first() {
        let budget = Budget::new(256 * MIB);
        let accounts: Vec<_> = (0..3).map(|_| budget.account()).collect();
        let mut taken: Vec<Vec<Taken>> = accounts.iter().map(grab).collect();
        assert_eq!(accounts[0].used(), 112 * MIB);
        // Everybody returns what was taken first and grabs again, as requests do when they are answered.
        for _ in 0..1000 {
            for (account, taken) in accounts.iter().zip(&mut taken) {
                if !taken.is_empty() {
                    drop(taken.remove(0));
                }
                taken.extend(grab(account));
            }
        }
        for account in &accounts {
            assert!((54..=58).contains(&(account.used() / MIB)), "{} MiB", account.used() / MIB);
        }
    }

    #[test]
    fn whoever_uses_little_goes_on_while_the_greedy_share_the_rest() {
        let budget = Budget::new(256 * MIB);
        let accounts: Vec<_> = (0..500).map(|_| budget.account()).collect();
        let _greedy: Vec<_> = accounts.iter().map(grab).collect();
        for _ in 0..100 {
            let account = budget.account();
            assert!(account.try_take(4096).is_some());
            assert!(account.try_take(128 << 10).is_some());
        }
        assert!(budget.used() <= 256 * MIB);
    }

    #[test]
    fn memory_never_exceeds_the_budget() {
        let budget = Budget::new(64 * MIB);
        let accounts: Vec<_> = (0..2000).map(|_| budget.account()).collect();
        let _taken: Vec<_> = accounts.iter().filter_map(|account| account.try_take(200 << 10)).collect();
        assert!(budget.used() <= 64 * MIB && budget.used() > 63 * MIB);
    }

    #[test]
    fn a_large_request_is_not_starved_by_smaller_ones() {
        let budget = Budget::new(64 * MIB);
        let (greedy, large) = (budget.account(), budget.account());
        let mut taken: VecDeque<_> = (0..6).map_while(|_| greedy.try_take(5 * MIB)).collect();
        let mut waiting = Box::pin(large.take(32 * MIB));
        assert!(poll(&mut waiting).is_none() && budget.is_contended());
        for round in 0.. {
            drop(taken.pop_front());
            if poll(&mut waiting).is_some() {
                break;
            }
            assert!(greedy.try_take(5 * MIB).is_none(), "it is not its turn");
            assert!(round < 6, "served once the memory is back");
        }
        assert!(!budget.is_contended());
    }

    #[test]
    fn who_waits_for_itself_holds_up_nobody() {
        let budget = Budget::new(64 * MIB);
        let (greedy, other) = (budget.account(), budget.account());
        let _taken = grab(&greedy);
        let mut waiting = Box::pin(greedy.take(20 * MIB));
        assert!(poll(&mut waiting).is_none() && !budget.is_contended());
        let mut others = Box::pin(other.take(20 * MIB));
        assert!(poll(&mut others).is_some());
    }

    #[test]
    fn leaving_the_line_lets_the_next_one_in() {
        let budget = Budget::new(64 * MIB);
        let (greedy, first, second) = (budget.account(), budget.account(), budget.account());
        let taken = greedy.try_take(28 * MIB);
        let mut waiting = Box::pin(first.take(32 * MIB));
        let mut behind = Box::pin(second.take(10 * MIB));
        assert!(poll(&mut waiting).is_none() && poll(&mut behind).is_none());
        drop(waiting);
        assert!(poll(&mut behind).is_some());
        drop(taken);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn what_is_granted_to_one_that_left_is_given_back() {
        let budget = Budget::new(64 * MIB);
        let (greedy, other) = (budget.account(), budget.account());
        let taken = greedy.try_take(28 * MIB);
        let mut waiting = Box::pin(other.take(32 * MIB));
        assert!(poll(&mut waiting).is_none());
        drop(taken);
        assert_eq!(budget.used(), 32 * MIB, "granted, not yet noticed");
        drop(waiting);
        assert_eq!((budget.used(), other.used()), (0, 0));
    }
}
