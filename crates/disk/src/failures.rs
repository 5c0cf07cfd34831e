//! The log of failed requests: the first of a kind one by one, the rest counted and summed up, never a flood.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use block::{Errno, Error, OpKind, Span};
use runtime::{Handle, Instant};

/// This many failures of one kind and errno are logged one by one in a window.
const ONE_BY_ONE: u64 = 5;
/// How long a window is.
const WINDOW: Duration = Duration::from_secs(10);

/// The failures of one disk that were told lately.
#[derive(Default)]
pub(crate) struct Failures {
    recent: RefCell<BTreeMap<(usize, Errno), Recent>>,
}

struct Recent {
    since: Instant,
    told: u64,
    untold: u64,
    /// From the first untold failure's first byte to the last byte of any.
    range: (u64, u64),
}

impl Failures {
    /// Logs a request that is answered with this error, now or in a later summary.
    pub(crate) fn log(
        self: &Rc<Self>,
        handle: &Handle,
        disk: &Rc<str>,
        kind: OpKind,
        span: Span,
        error: &Error,
    ) {
        let now = handle.now();
        let mut recent = self.recent.borrow_mut();
        let entry = recent.entry((kind as usize, error.errno())).or_insert(Recent {
            since: now,
            told: 0,
            untold: 0,
            range: (0, 0),
        });
        if entry.untold == 0 && now.since(entry.since) >= WINDOW {
            (entry.since, entry.told) = (now, 0);
        }
        if entry.told < ONE_BY_ONE {
            entry.told += 1;
            let (disk, operation, errno, doing) = (&**disk, kind.name(), error.errno(), error.doing());
            tracing::error!(disk, operation, offset = span.at(), length = span.len(), %errno, doing, "request failed");
            return;
        }
        entry.untold += 1;
        if entry.untold == 1 {
            entry.range = (span.at(), span.end());
            let (failures, handle_, disk, errno) =
                (self.clone(), handle.clone(), disk.clone(), error.errno());
            let left = WINDOW.saturating_sub(now.since(entry.since));
            handle.spawn(async move {
                handle_.sleep(left).await;
                failures.sum_up(&handle_, &disk, kind, errno);
            });
        } else {
            entry.range = (entry.range.0.min(span.at()), entry.range.1.max(span.end()));
        }
    }

    fn sum_up(&self, handle: &Handle, disk: &str, kind: OpKind, errno: Errno) {
        let mut recent = self.recent.borrow_mut();
        let Some(entry) = recent.get_mut(&(kind as usize, errno)) else { return };
        let (from, to) = entry.range;
        let (operation, count) = (kind.name(), entry.untold);
        let seconds = WINDOW.as_secs();
        tracing::error!(disk, operation, %errno, count, from, to, "more requests failed in {seconds} s");
        *entry = Recent { since: handle.now(), told: 0, untold: 0, range: (0, 0) };
    }

    /// Tells what has not been told, at the end.
    pub(crate) fn finish(&self, handle: &Handle, disk: &str) {
        let untold: Vec<_> = self
            .recent
            .borrow()
            .iter()
            .filter(|(_, recent)| recent.untold > 0)
            .map(|((kind, errno), _)| (OpKind::ALL[*kind], *errno))
            .collect();
        for (kind, errno) in untold {
            self.sum_up(handle, disk, kind, errno);
        }
    }
}
