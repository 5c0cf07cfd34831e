//! A storage over a storage: what changes, delays or refuses I/O, written once for any place in a chain.

mod delay;
mod fault;
mod rule;

use std::rc::Rc;

use runtime::Handle;

use crate::Storage;
pub use delay::Delay;
pub use fault::Fault;
pub use rule::{Action, Rule};

/// Puts rules over a storage, the first one outermost.
pub fn inject(handle: &Handle, storage: Rc<dyn Storage>, rules: Vec<Rule>) -> Rc<dyn Storage> {
    rules.into_iter().rev().fold(storage, |below, rule| match rule.action() {
        Action::Fail(errno) => Rc::new(Fault::new(below, rule, errno)) as Rc<dyn Storage>,
        Action::Delay(delay) => Rc::new(Delay::new(handle, below, rule, delay)),
    })
}
