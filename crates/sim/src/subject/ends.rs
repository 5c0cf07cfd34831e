//! How sessions, the disk and the process end, and what must hold then.

use block::{Errno, Error, Span};
use disk::GiveUp;

use super::{State, Subject};
use crate::stops::Stops;
use crate::trace::Event;

impl Subject {
    /// A guest stops its session.
    pub(crate) fn stops(&self, guest: u64, how: GiveUp) {
        let now = self.now();
        let what = match how {
            GiveUp::Tell => "stops its session, guest",
            GiveUp::Leave => "stops its session and leaves, guest",
        };
        self.kernel.borrow_mut().note(Event::Script { what, number: guest });
        self.state.borrow_mut().stops.begin(guest, how, now);
    }

    /// A guest's session has stopped.
    pub(crate) fn stopped(&self, guest: u64) {
        if self.is_over() {
            return;
        }
        self.kernel
            .borrow_mut()
            .note(Event::Script { what: "its session has stopped, guest", number: guest });
        let mut state = self.state.borrow_mut();
        state.stops.end(guest);
        let open = state.asked.keys().filter(|request| Stops::is_of(**request, guest)).count();
        if open > 0 {
            self.fail("O1", format!("the session of guest {guest} has stopped with {open} requests open"));
        }
    }

    /// The disk is about to be closed.
    pub(crate) fn closes(&self) {
        let now = self.now();
        let mut state = self.state.borrow_mut();
        state.closing = true;
        state.closing_since = Some(now);
        state.flushes_due += 1;
    }

    /// The process is about to end without closing its disks.
    pub(crate) fn exits(&self) {
        self.state.borrow_mut().exiting = true;
    }

    /// The file lost its end.
    pub(crate) fn lost(&self, gone: Span) {
        let whole = Span::new(0, self.setup.size).expect("a small disk");
        for (part, at) in self.setup.layout.parts(whole) {
            if Span::new(at, part.len()).is_some_and(|place| place.overlaps(gone)) {
                self.state.borrow_mut().model.lost(part);
            }
        }
    }

    /// The oldest requests that are not answered, for the report.
    pub(crate) fn unanswered(&self) -> String {
        let now = self.now();
        let state = self.state.borrow();
        let mut texts: Vec<String> = state
            .asked
            .iter()
            .take(5)
            .map(|(request, asked)| {
                let age = (now - asked.at) / 1_000_000;
                format!(
                    "request {request} ({} {:?}), {age} ms old, told {:?}",
                    asked.kind.name(),
                    asked.span,
                    asked.told
                )
            })
            .collect();
        if let Some(disk) = &state.disk {
            texts.push(disk.stats().to_string());
        }
        texts.join("; ")
    }

    /// `Disk::close` has returned.
    pub(crate) fn closed(&self, result: Result<(), &Error>) {
        if self.is_over() {
            return;
        }
        let state = &mut *self.state.borrow_mut();
        if !state.asked.is_empty() {
            self.fail("O1", format!("closed with {} requests unanswered", state.asked.len()));
        }
        match (result, state.poison) {
            (Err(error), _) if state.panics > 0 && error.errno() == Errno::EIO => {}
            (result, _) if state.panics > 0 => {
                self.fail("O3", format!("closed with {result:?} after a driver panicked"));
            }
            (Ok(()), Some(poison)) if !self.setup.read_only => {
                self.fail("O2", format!("closed well although a flush had failed with {poison}"));
            }
            (Err(error), poison) if poison != Some(error.errno()) => {
                self.fail("O3", format!("closed with {error}, poison is {poison:?}"));
            }
            (Ok(()), _) => {
                if let Err(what) = self.check_closed(state) {
                    self.fail("O2", format!("closed well, but {what}"));
                }
            }
            (Err(_), _) => {}
        }
        if state.flush_calls != state.flushes_due && state.panics == 0 {
            self.fail(
                "O2",
                format!(
                    "{} flushes of the storage for {} requests that need one",
                    state.flush_calls, state.flushes_due
                ),
            );
        }
    }

    /// All that was answered must be durable after a good close.
    fn check_closed(&self, state: &State) -> Result<(), String> {
        let kernel = self.kernel.borrow();
        if self.setup.read_only {
            return Ok(());
        }
        state.model.check_live(&self.setup.layout.disk_of(kernel.files[self.setup.file].durable()))
    }

    /// What holds when everything is over: no request is left, counts agree.
    pub(crate) fn finish(&self) {
        if self.is_over() {
            return;
        }
        let state = self.state.borrow();
        if !state.asked.is_empty() {
            self.fail("O1", format!("{} requests were never answered", state.asked.len()));
        }
        self.check_counts(&state);
    }

    /// Whether the disk may read so after the process has ended, by power cut or not.
    pub(crate) fn check_content(&self, bytes: &[u8], after_power_cut: bool) -> Result<(), String> {
        let lost = self.kernel.borrow().syncs[self.setup.file].failed;
        let state = self.state.borrow();
        if after_power_cut || lost { state.model.check_durable(bytes) } else { state.model.check_live(bytes) }
    }

    /// Forgets the disk, which keeps the executor alive.
    pub(crate) fn forget_disk(&self) {
        self.state.borrow_mut().disk = None;
    }
}
