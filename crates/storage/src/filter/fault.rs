//! Makes operations fail as a rule says, for tests of what is above and for drills.

use std::cell::RefCell;
use std::rc::Rc;

use block::{Buf, Errno, Error, Limits, OpKind, Result, Run, Span};

use super::Rule;
use super::rule::Counted;
use crate::{Io, Storage, Zeroing};

/// A storage whose operations fail where a rule says so. A flush that fails poisons it, as the contract demands.
pub struct Fault {
    below: Rc<dyn Storage>,
    rule: Counted,
    errno: Errno,
    poison: RefCell<Option<Error>>,
}

impl Fault {
    pub(super) fn new(below: Rc<dyn Storage>, rule: Rule, errno: Errno) -> Fault {
        Fault { below, rule: Counted::new(rule), errno, poison: RefCell::default() }
    }

    fn check(&self, kind: OpKind, span: Span) -> Result<()> {
        // The first poison stays the one that is told, also where it is that of the storage below.
        if let Some(error) = self.poison().filter(|_| kind.changes() || kind == OpKind::Flush) {
            return Err(error);
        }
        if !self.rule.hits(kind, span) {
            return Ok(());
        }
        let error = Error::new(self.errno, "an injected fault");
        if kind == OpKind::Flush {
            *self.poison.borrow_mut() = Some(error.clone().lasting());
            return Err(error.lasting());
        }
        Err(error)
    }

    fn unless<'a, T: 'a>(&self, kind: OpKind, span: Span, go_on: impl FnOnce() -> Io<'a, T>) -> Io<'a, T> {
        match self.check(kind, span) {
            Ok(()) => go_on(),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
}

impl Storage for Fault {
    fn size(&self) -> u64 {
        self.below.size()
    }

    fn limits(&self) -> Limits {
        self.below.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        self.unless(OpKind::Read, Span::of(at, &buf), || self.below.read(at, buf))
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        self.unless(OpKind::Write, Span::of(at, &buf), || self.below.write(at, buf))
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        self.unless(OpKind::WriteZeroes, span, || self.below.zero(span, how))
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.unless(OpKind::Discard, span, || self.below.discard(span))
    }

    fn flush(&self) -> Io<'_> {
        let nothing = Span::new(0, 0).expect("an empty span");
        self.unless(OpKind::Flush, nothing, || self.below.flush())
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        self.unless(OpKind::Status, span, || self.below.extents(span))
    }

    fn prefetch(&self, span: Span) -> Io<'_> {
        self.below.prefetch(span)
    }

    fn grow(&self) -> Io<'_, u64> {
        self.below.grow()
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        self.below.resize(bytes)
    }

    fn reserve(&self, span: Span) -> Io<'_> {
        self.below.reserve(span)
    }

    fn poison(&self) -> Option<Error> {
        self.poison.borrow().clone().or_else(|| self.below.poison())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ram;
    use crate::filter::Action;

    fn now<T>(io: Io<'_, T>) -> Result<T> {
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::pin!(io).as_mut().poll(&mut cx) {
            std::task::Poll::Ready(result) => result,
            std::task::Poll::Pending => panic!("memory never waits"),
        }
    }

    fn fault(rule: &str) -> Fault {
        let rule: Rule = rule.parse().unwrap();
        let Action::Fail(errno) = rule.action() else { panic!("not a fault") };
        Fault::new(Rc::new(Ram::new(1 << 20)), rule, errno)
    }

    #[test]
    fn only_what_the_rule_names_fails_and_changes_nothing() {
        let storage = fault("write:EIO:4096..8192");
        assert_eq!(now(storage.write(0, Buf::from_bytes(&[1; 4096]))), Ok(()));
        let failed = now(storage.write(4000, Buf::from_bytes(&[2; 200]))).unwrap_err();
        assert_eq!((failed.errno(), failed.is_lasting()), (Errno::EIO, false));
        let buf = Buf::zeroed(200);
        now(storage.read(4000, buf.clone())).unwrap();
        assert_eq!(buf.to_vec(), [[1u8; 96].as_slice(), &[0; 104]].concat());
        assert_eq!(now(storage.flush()), Ok(()));
    }

    #[test]
    fn a_failed_flush_is_for_good() {
        let storage = fault("flush:ENOSPC:times=1");
        assert!(now(storage.flush()).unwrap_err().is_lasting());
        for result in [now(storage.flush()), now(storage.write(0, Buf::zeroed(1)))] {
            let error = result.unwrap_err();
            assert_eq!((error.errno(), error.is_lasting()), (Errno::ENOSPC, true));
        }
        assert_eq!(now(storage.read(0, Buf::zeroed(1))), Ok(()));
        assert!(storage.poison().is_some());
    }
}
