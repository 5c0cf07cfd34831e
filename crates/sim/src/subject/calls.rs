//! What passes between the disk and its storage: each call, whose it is, and whether its result is true.

use block::{Errno, Error, OpKind, Span};

use super::{PROMPT, State, Subject, Told};
use crate::fate::{Fate, fate, hard};
use crate::kernel::{Call, Fault};
use crate::trace::Event;

/// A short count without a step forward is repeated, but not for ever.
const SHORTS_MAX: usize = 16;

impl Subject {
    /// The disk calls its storage; names the call.
    pub(crate) fn called(&self, kind: OpKind, span: Span, memory: usize) -> u64 {
        let now = self.now();
        let state = &mut *self.state.borrow_mut();
        state.order += 1;
        if kind == OpKind::Flush {
            state.flush_calls += 1;
            return self.begin(None, kind);
        }
        // Nobody asks the same twice at once (`is_asked`), so that this names one request.
        let found = state.asked.iter_mut().find(|(_, asked)| {
            asked.kind == kind && asked.span == Some(span) && asked.memory == memory && !asked.calling
        });
        let Some((&request, asked)) = found else {
            if !self.is_over() && !state.exiting {
                self.fail("O2", format!("a {} of {span:?} that no guest asked for", kind.name()));
            }
            return self.begin(None, kind);
        };
        asked.calling = true;
        asked.calls += 1;
        if asked.calls == 1 && now - asked.at > PROMPT {
            let late = (now - asked.at) / 1_000_000;
            self.fail("O4", format!("request {request} was looked at only after {late} ms"));
        }
        if let (Some((Told::Err { errno, lasting }, at)), Some(closed)) = (asked.told, state.closing_since)
            && at + PROMPT < closed
            && closed + PROMPT < now
            && fate(errno, lasting, kind, at - asked.at, &self.setup.policy) == Fate::Held
        {
            self.fail(
                "O4",
                format!("request {request} was held when the disk was closed, and is tried again"),
            );
        }
        if let (Some((Told::Err { errno, .. }, _)), Some((_, since))) = (asked.told, state.stops.of(request))
            && since + PROMPT < now
        {
            let what =
                format!("request {request} failed with {errno} and is tried again for a session that stops");
            self.fail("O4", what);
        }
        if let Some((told, at)) = asked.told {
            let policy = if state.closing {
                None // it may have been told to try again before
            } else {
                Some(self.setup.policy)
            };
            let age = at - asked.at;
            match (told, policy) {
                (Told::Ok, _) => self.fail("O2", format!("request {request} was done, and is done again")),
                (Told::Err { errno, lasting }, Some(policy)) => {
                    if fate(errno, lasting, kind, age, &policy) == Fate::Answered {
                        let what = format!("request {request} failed with {errno} and was tried again");
                        self.fail("O4", what);
                    }
                }
                (Told::Err { errno, lasting }, None) => {
                    if lasting {
                        self.fail("O4", format!("request {request}: {errno} lasts, but was tried again"));
                    }
                }
            }
        }
        self.begin(Some(request), kind)
    }

    fn begin(&self, request: Option<u64>, kind: OpKind) -> u64 {
        let mut kernel = self.kernel.borrow_mut();
        let call = kernel.call(request);
        kernel.note(Event::Called { call, request, kind });
        call
    }

    /// Where in the order of things a call begins.
    pub(crate) fn order(&self) -> u64 {
        self.state.borrow().order
    }

    /// A call has returned.
    pub(crate) fn returned(
        &self,
        call: u64,
        kind: OpKind,
        begun: u64,
        poison_before: Option<Errno>,
        result: Result<(), &Error>,
    ) {
        let now = self.now();
        let code = result.map_or_else(|error| error.errno().code(), |()| 0);
        let call_state = {
            let mut kernel = self.kernel.borrow_mut();
            kernel.note(Event::Returned { call, code });
            kernel.calls.remove(&call).unwrap_or_default()
        };
        if self.is_over() {
            return;
        }
        let state = &mut *self.state.borrow_mut();
        state.order += 1;
        let judged = self.judge_call(state, &call_state, kind, poison_before, result);
        if let Err((oracle, what)) = judged {
            let request =
                call_state.request.map_or_else(|| "a flush".into(), |request| format!("request {request}"));
            self.fail(
                oracle,
                format!(
                    "{request} ({}): its storage gave {result:?}: {what} (its operations: {:?})",
                    kind.name(),
                    call_state.faults
                ),
            );
        }
        let told = match result {
            Ok(()) => Told::Ok,
            Err(error) => Told::Err { errno: error.errno(), lasting: error.is_lasting() },
        };
        if kind == OpKind::Flush {
            match told {
                Told::Ok => state.flushed = state.flushed.max(begun),
                Told::Err { errno, .. } => {
                    state.poison = state.poison.or(Some(errno));
                    state.flush_errors.insert(errno);
                }
            }
        }
        if let Told::Err { errno, lasting: true } = told {
            state.poison = state.poison.or(Some(errno));
        }
        let order = state.order;
        if let Some(asked) = call_state.request.and_then(|request| state.asked.get_mut(&request)) {
            asked.calling = false;
            asked.told = Some((told, now));
            asked.told_order = order;
            state.flushes_due += u64::from(asked.fua && told == Told::Ok);
        }
    }

    /// The error that the next change must fail with.
    pub(crate) fn poison(&self) -> Option<Errno> {
        self.state.borrow().poison
    }

    fn judge_call(
        &self,
        state: &State,
        call: &Call,
        kind: OpKind,
        poison_before: Option<Errno>,
        result: Result<(), &Error>,
    ) -> Result<(), (&'static str, String)> {
        let kernel = self.kernel.borrow();
        let sync = &kernel.syncs[self.setup.file];
        let Call { request, faults, passed } = call;
        let hard: Vec<Errno> = faults.iter().filter_map(hard).collect();
        let poisons = kind == OpKind::Flush || kind.changes() || (kind == OpKind::Read && !self.setup.direct);
        match result {
            Ok(()) if !passed => Err(("O2", "success without its image being called".into())),
            Ok(()) if poisons && poison_before.is_some() && !self.setup.read_only => {
                Err(("O3", format!("success after a sync had failed with {poison_before:?}")))
            }
            Ok(()) if kind == OpKind::Read && !self.setup.direct && state.poison.is_some() => {
                Err(("O3", format!("success although a sync has failed meanwhile with {:?}", state.poison)))
            }
            Ok(()) if kind == OpKind::Flush => {
                if faults.contains(&Fault::Shrunk) && !self.setup.read_only {
                    Err(("O2", "success although the file has shrunk".into()))
                } else if sync.failed && !self.setup.read_only {
                    Err(("O2", format!("success after a sync failed: {:?}", sync.errors)))
                } else {
                    Ok(())
                }
            }
            Ok(()) if hard.is_empty() => Ok(()),
            Ok(()) => Err(("O3", "success although an operation of its own failed".into())),
            Err(error) if error.is_lasting() => {
                let errno = error.errno();
                let justified = match poison_before {
                    Some(poison) => poison == errno,
                    None => {
                        (!passed && self.setup.filters.contains(&errno))
                            || sync.errors.contains(&errno)
                            || (errno == Errno::EIO && (sync.shrunk || sync.given_up))
                    }
                };
                if poisons && justified {
                    Ok(())
                } else {
                    let known = &sync.errors;
                    Err(("O3", format!("poison is {poison_before:?}, syncs failed with {known:?}")))
                }
            }
            Err(_) if kind == OpKind::Flush => Err(("O3", "a failed sync must last".into())),
            Err(error) => {
                let errno = error.errno();
                let shorts = faults.iter().filter(|fault| **fault == Fault::Short).count();
                let fast =
                    request.and_then(|request| state.asked.get(&request)).is_some_and(|asked| asked.fast);
                let derived = (!passed && self.setup.filters.contains(&errno))
                    || (errno == Errno::EIO && shorts >= SHORTS_MAX)
                    || (errno == Errno::EOPNOTSUPP && fast)
                    || (errno == Errno::EROFS && self.setup.read_only);
                // Of several the gravest, and of equals the first.
                let gravest = hard.iter().map(|errno| errno.severity()).max();
                let right = hard.contains(&errno) && Some(errno.severity()) == gravest;
                if right || derived {
                    Ok(())
                } else {
                    Err(("O3", "no operation of its own failed so".into()))
                }
            }
        }
    }

    /// The future of a call was dropped before its end.
    pub(crate) fn given_up(&self, call: u64, kind: OpKind) {
        let request = {
            let mut kernel = self.kernel.borrow_mut();
            if kind == OpKind::Flush {
                let file = self.setup.file;
                kernel.syncs[file].given_up = true;
            }
            kernel.calls.get(&call).and_then(|call| call.request)
        };
        let mut state = self.state.borrow_mut();
        if let Some(asked) = request.and_then(|request| state.asked.get_mut(&request)) {
            asked.calling = false;
        }
    }
}
