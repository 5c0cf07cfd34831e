//! Many pieces of work side by side, of which none is forgotten: the first that fails ends all.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use runtime::Handle;
use storage::Permits;

use super::{PIECES_MAX, ToolError, Watch};

/// What runs pieces of work.
pub(super) struct Pump {
    handle: Handle,
    watch: Rc<dyn Watch>,
    permits: Permits,
    shared: Rc<Shared>,
    started: Cell<u64>,
}

#[derive(Default)]
struct Shared {
    /// The first failure.
    failed: RefCell<Option<ToolError>>,
    /// Pieces that ended with a result.
    ended: Cell<u64>,
}

impl Pump {
    /// Nothing is under way.
    pub(super) fn new(handle: &Handle, watch: &Rc<dyn Watch>) -> Pump {
        let permits = Permits::new(PIECES_MAX);
        Pump {
            handle: handle.clone(),
            watch: watch.clone(),
            permits,
            shared: Rc::default(),
            started: Cell::new(0),
        }
    }

    /// The executor that the pieces run on.
    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Starts a piece that moves past `bytes` of the disk, as soon as there is room for it.
    pub(super) async fn start(
        &self,
        bytes: u64,
        piece: impl Future<Output = Result<(), ToolError>> + 'static,
    ) -> Result<(), ToolError> {
        let permit = self.permits.take().await;
        self.check()?;
        self.started.set(self.started.get() + 1);
        let (shared, watch) = (self.shared.clone(), self.watch.clone());
        self.handle.spawn(async move {
            match piece.await {
                Ok(()) => watch.advance(bytes),
                Err(error) => {
                    shared.failed.borrow_mut().get_or_insert(error);
                }
            }
            shared.ended.set(shared.ended.get() + 1);
            drop(permit);
        });
        Ok(())
    }

    /// Moves past bytes with which there is nothing to do.
    pub(super) fn skip(&self, bytes: u64) -> Result<(), ToolError> {
        self.watch.advance(bytes);
        self.check()
    }

    fn check(&self) -> Result<(), ToolError> {
        match &*self.shared.failed.borrow() {
            Some(error) => Err(error.clone()),
            None if self.watch.is_stopped() => Err(ToolError::Stopped),
            None => Ok(()),
        }
    }

    /// Waits for all that was started, also if `result`, of starting it, is an error; that is told then.
    pub(super) async fn end(self, result: Result<(), ToolError>) -> Result<(), ToolError> {
        let mut permits = Vec::new();
        for _ in 0..PIECES_MAX {
            permits.push(self.permits.take().await);
        }
        result?;
        self.check()?;
        if self.shared.ended.get() == self.started.get() { Ok(()) } else { Err(ToolError::Panicked) }
    }
}
