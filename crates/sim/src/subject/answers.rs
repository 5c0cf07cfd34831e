//! What the disk answers or leaves, and whether it may.

use block::{Errno, OpKind, Payload, Span};
use disk::{GiveUp, OnError, Policy};

use super::{Asked, PROMPT, State, Subject, Told};
use crate::fate::{Fate, fate};
use crate::trace::Event;

impl Subject {
    /// The disk answers a request; `bytes` are those of its read.
    pub(crate) fn answered(
        &self,
        request: u64,
        result: &Result<Payload, Errno>,
        bytes: impl FnOnce() -> Vec<u8>,
    ) {
        let code = result.as_ref().map_or_else(|errno| errno.code(), |_| 0);
        if self.is_over() {
            return;
        }
        self.kernel.borrow_mut().note(Event::Answered { request, code });
        let state = &mut *self.state.borrow_mut();
        let Some(asked) = state.asked.remove(&request) else {
            return self.fail("O1", format!("request {request} was answered twice, or never made"));
        };
        state.answered += 1;
        let busy = self.kernel.borrow().busy_with(request);
        if busy > 0 {
            self.fail(
                "O1",
                format!("request {request} was answered while {busy} of its operations are in flight"),
            );
        }
        if let Err((oracle, what)) = self.judge(state, request, &asked, result) {
            let kind = asked.kind.name();
            self.fail(
                oracle,
                format!(
                    "request {request} ({kind} {:?}) was answered {result:?}: {what} (its storage told {:?})",
                    asked.span, asked.told
                ),
            );
        }
        let ok = result.is_ok();
        let truth = match asked.kind {
            OpKind::Read => state.model.read_answered(request, ok.then(bytes).as_deref()),
            OpKind::Status => self.check_runs(state, request, asked.span, result),
            OpKind::Flush => {
                state.model.flush_answered(request, ok);
                if ok { self.check_durable(state) } else { Ok(()) }
            }
            OpKind::Write | OpKind::Discard | OpKind::WriteZeroes => {
                if let Some(write) = asked.write {
                    let settles = ok && asked.kind != OpKind::Discard;
                    state.model.write_answered(write, settles, asked.fua);
                }
                if ok && asked.fua && asked.refusal.is_none() { self.check_durable(state) } else { Ok(()) }
            }
            OpKind::Prefetch => Ok(()),
        };
        if let Err(what) = truth {
            self.fail("O2", format!("request {request} ({} {:?}): {what}", asked.kind.name(), asked.span));
        }
        self.check_counts(state);
    }

    /// The disk leaves a request to a successor.
    pub(crate) fn left(&self, request: u64) {
        if self.is_over() {
            return;
        }
        self.kernel.borrow_mut().note(Event::Left { request });
        let state = &mut *self.state.borrow_mut();
        let Some(asked) = state.asked.remove(&request) else {
            return self.fail("O1", format!("request {request} was left after its end, or never made"));
        };
        state.left += 1;
        let busy = self.kernel.borrow().busy_with(request);
        if busy > 0 {
            self.fail(
                "O1",
                format!("request {request} was left while {busy} of its operations are in flight"),
            );
        }
        let may_wait = match asked.told {
            Some((Told::Err { errno, lasting }, at)) => {
                fate(errno, lasting, asked.kind, at - asked.at, &self.setup.policy) != Fate::Answered
            }
            Some((Told::Ok, _)) | None => false,
        };
        if !may_wait || !matches!(state.stops.of(request), Some((GiveUp::Leave, _))) {
            let kind = asked.kind.name();
            self.fail(
                "O4",
                format!("request {request} ({kind}) was left, its storage told {:?}", asked.told),
            );
        }
        if let Some((_, at)) = asked.told
            && let Err((oracle, what)) = self.check_prompt_end(state, request, at)
        {
            self.fail(oracle, format!("request {request} was left {what}"));
        }
        if let Some(write) = asked.write {
            state.model.write_answered(write, false, false);
        }
        if asked.kind == OpKind::Read
            && let Err(what) = state.model.read_answered(request, None)
        {
            self.fail("sim", what);
        }
        self.check_counts(state);
    }

    /// Whether a request that waited, after it failed at this time, ends as soon as its session is being stopped.
    fn check_prompt_end(
        &self,
        state: &State,
        request: u64,
        failed: u64,
    ) -> Result<(), (&'static str, String)> {
        match state.stops.of(request) {
            Some((_, since)) if !self.setup.impatient && self.now() > since.max(failed) + PROMPT => {
                let late = (self.now() - since.max(failed)) / 1_000_000;
                Err(("O4", format!("{late} ms after its session was to stop")))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn judge(
        &self,
        state: &State,
        request: u64,
        asked: &Asked,
        result: &Result<Payload, Errno>,
    ) -> Result<(), (&'static str, String)> {
        let now = self.now();
        let wrong = |oracle, what: &str| Err((oracle, what.to_owned()));
        if let Some(refusal) = asked.refusal {
            return match result {
                Err(errno) if *errno == refusal && asked.calls == 0 => Ok(()),
                Err(_) | Ok(_) => wrong("O3", &format!("it should have been refused with {refusal}")),
            };
        }
        let late = now - asked.at;
        if self.setup.bound > 0 && late > self.setup.bound {
            return wrong(
                "O4",
                &format!("after {} ms, on a disk that nothing is wrong with", late / 1_000_000),
            );
        }
        match result {
            Ok(_) if asked.is_empty() => Ok(()),
            Ok(_) if asked.kind == OpKind::Flush => {
                if state.flushed > asked.order {
                    Ok(())
                } else {
                    wrong("O2", "no flush of its storage has begun and succeeded since it was asked")
                }
            }
            Ok(_) => match asked.told {
                None => wrong("O2", "its storage was never called"),
                Some((Told::Err { errno, .. }, _)) => wrong("O3", &format!("the error {errno} was lost")),
                Some((Told::Ok, _)) if asked.fua => {
                    if state.flushed > asked.told_order {
                        Ok(())
                    } else {
                        wrong("O2", "it should be durable, but no flush followed")
                    }
                }
                Some((Told::Ok, at)) if now - at > PROMPT && !self.setup.impatient => {
                    wrong("O4", &format!("{} ms after it was done", (now - at) / 1_000_000))
                }
                Some((Told::Ok, _)) => Ok(()),
            },
            Err(Errno::EIO) if state.panics > 0 || state.exiting => Ok(()),
            Err(errno) => {
                let flushed =
                    asked.kind == OpKind::Flush || (asked.fua && matches!(asked.told, Some((Told::Ok, _))));
                if flushed {
                    return if state.flush_errors.contains(errno) {
                        Ok(())
                    } else {
                        wrong("O3", &format!("no flush failed so, only with {:?}", state.flush_errors))
                    };
                }
                match asked.told {
                    None => wrong("O3", "its storage was never called"),
                    Some((Told::Ok, _)) => wrong("O3", "its storage had done it"),
                    Some((Told::Err { errno: told, .. }, _)) if told != *errno => {
                        wrong("O3", &format!("the error was {told}"))
                    }
                    Some((Told::Err { errno, lasting }, at)) => {
                        let policy = self.policy(state);
                        match fate(errno, lasting, asked.kind, at - asked.at, &policy) {
                            Fate::Answered
                                if now - at > PROMPT && !self.setup.impatient && !state.closing =>
                            {
                                wrong("O4", &format!("{} ms after it failed", (now - at) / 1_000_000))
                            }
                            Fate::Answered => Ok(()),
                            // What is held is let go of when the disk is closed or fenced.
                            Fate::TriedAgain | Fate::Held if state.closing || state.panics > 0 => Ok(()),
                            Fate::TriedAgain | Fate::Held
                                if matches!(state.stops.of(request), Some((GiveUp::Tell, _))) =>
                            {
                                self.check_prompt_end(state, request, at)
                            }
                            fate @ (Fate::TriedAgain | Fate::Held) => {
                                wrong("O4", &format!("policy {policy:?} wants it {fate:?}"))
                            }
                        }
                    }
                }
            }
        }
    }

    /// A disk that is being closed reports.
    fn policy(&self, state: &State) -> Policy {
        if state.closing { Policy { on_error: OnError::Report, on_enospc: None } } else { self.setup.policy }
    }

    fn check_runs(
        &self,
        state: &mut State,
        request: u64,
        span: Option<Span>,
        result: &Result<Payload, Errno>,
    ) -> Result<(), String> {
        let (Ok(Payload::Runs(runs)), Some(span)) = (result, span) else {
            return match result {
                Ok(_) if !span.is_some_and(Span::is_empty) => Err("it tells no runs".into()),
                Ok(_) | Err(_) => state.model.zeroes_told(request, &[]),
            };
        };
        let mut zeroes = Vec::new();
        let mut at = span.at();
        for run in runs {
            let told = Span::new(at, run.len).filter(|run| run.end() <= span.end() && !run.is_empty());
            let Some(told) = told else { return Err(format!("runs {runs:?} do not fit")) };
            if run.zero {
                zeroes.push(told);
            }
            at = told.end();
        }
        if at == span.at() {
            return Err("it tells no runs".into());
        }
        state.model.zeroes_told(request, &zeroes)
    }

    /// A guest was told that something is durable: look at once whether the guests' truth is.
    fn check_durable(&self, state: &State) -> Result<(), String> {
        let kernel = self.kernel.borrow();
        let file = &kernel.files[self.setup.file];
        // Looking at all of a large disk each time would take most of the time.
        let often = if file.len() <= 256 << 10 { 1 } else { 3 };
        if self.dice.borrow_mut().below(often) > 0 {
            return Ok(());
        }
        let disk = self.setup.layout.disk_of(file.durable());
        state
            .model
            .check_durable(&disk)
            .map_err(|what| format!("told durable, but a power cut now would leave: {what}"))
    }

    pub(super) fn check_counts(&self, state: &State) {
        let Some(disk) = &state.disk else { return };
        let stats = disk.stats();
        let in_flight = stats.in_flight + stats.held;
        let State { made, answered, left, .. } = state;
        if (stats.accepted, stats.answered, stats.left) != (*made, *answered, *left)
            || in_flight != made - answered - left
        {
            self.fail(
                "O1",
                format!("{made} made, {answered} answered, {left} left, but the disk counts {stats}"),
            );
        }
        let failing = state
            .asked
            .values()
            .filter(|asked| !asked.calling && matches!(asked.told, Some((Told::Err { .. }, _))))
            .count() as u64;
        if stats.held > failing {
            self.fail("O4", format!("{} requests are held, only {failing} of them fail", stats.held));
        }
        if stats.lost > state.panics && !state.exiting {
            self.fail("O1", format!("{} requests were lost", stats.lost));
        }
    }
}
