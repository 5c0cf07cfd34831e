//! What is looked at rather than waited for: memory that a peer writes, such as the ring of a guest.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use slab::Slab;

/// Something that gets news without the kernel's help.
///
/// None of these may start I/O or wait; they may wake tasks. What is to be done goes into a task.
pub trait Source {
    /// Called after the tasks that were ready have run and before the ring gets its turn: the time to publish in one go
    /// what they gathered. I/O may be started here.
    fn settle(&self);

    /// Whether there is news. Called often, also while the thread looks before it sleeps, so it is to be cheap; it wakes
    /// the task that takes the news.
    fn look(&self) -> bool;

    /// Called before the thread sleeps: ask the peer to ring from now on, then look once more. True if there is news
    /// after all; then the task that takes it was woken.
    fn arm(&self) -> bool;
}

/// All sources of a thread.
#[derive(Default)]
pub(crate) struct Sources {
    watched: RefCell<Slab<Rc<dyn Source>>>,
    /// A copy to walk over while sources come and go.
    round: RefCell<Rc<[Rc<dyn Source>]>>,
    stale: Cell<bool>,
}

/// Keeps a source watched until it is dropped.
#[must_use = "dropping it ends the watching"]
pub struct Watch {
    sources: Rc<Sources>,
    key: usize,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.sources.stale.set(true);
        // Let go of at once, and with nothing borrowed: its end may be that of other sources too.
        let gone = self.sources.watched.borrow_mut().remove(self.key);
        let round = self.sources.round.take();
        drop((gone, round));
    }
}

impl Sources {
    pub(crate) fn watch(self: &Rc<Self>, source: Rc<dyn Source>) -> Watch {
        self.stale.set(true);
        Watch { key: self.watched.borrow_mut().insert(source), sources: self.clone() }
    }

    fn round(&self) -> Rc<[Rc<dyn Source>]> {
        if self.stale.replace(false) {
            *self.round.borrow_mut() =
                self.watched.borrow().iter().map(|(_, source)| source.clone()).collect();
        }
        self.round.borrow().clone()
    }

    pub(crate) fn settle(&self) {
        self.round().iter().for_each(|source| source.settle());
    }

    /// Looks at all of them: each wakes its own task.
    pub(crate) fn look(&self) -> bool {
        self.round().iter().filter(|source| source.look()).count() > 0
    }

    /// Arms all of them.
    pub(crate) fn arm(&self) -> bool {
        self.round().iter().filter(|source| source.arm()).count() > 0
    }
}
