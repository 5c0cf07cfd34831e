//! What happened in a run, in order: a hash to compare runs by, and the tail to read after a failure.

use std::fmt;

use block::OpKind;

use crate::dice::mix;
use crate::kernel::Kind;

/// One thing that happened.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// A guest asked.
    Asked { disk: usize, request: u64, kind: OpKind, at: u64, len: u64 },
    /// It was answered: 0 or an errno.
    Answered { request: u64, code: i32 },
    /// It was left to a successor.
    Left { request: u64 },
    /// The disk called its storage.
    Called { call: u64, request: Option<u64>, kind: OpKind },
    /// The storage was done: 0 or an errno.
    Returned { call: u64, code: i32 },
    /// The kernel was given an operation.
    Submitted { operation: u64, call: Option<u64>, file: usize, kind: Kind, at: u64, len: u64 },
    /// Some of its bytes moved.
    Moved { operation: u64, from: u64, len: u64 },
    /// It completed.
    Completed { operation: u64, result: i64 },
    /// The script of the run did something.
    Script { what: &'static str, number: u64 },
}

impl Event {
    /// Numbers that differ where events do.
    fn digest(&self) -> u64 {
        let fields: [u64; 6] = match *self {
            Event::Asked { disk, request, kind, at, len } => [1, disk as u64, request, kind as u64, at, len],
            Event::Answered { request, code } => [2, request, code as u64, 0, 0, 0],
            Event::Called { call, request, kind } => {
                [3, call, request.unwrap_or(u64::MAX), kind as u64, 0, 0]
            }
            Event::Returned { call, code } => [4, call, code as u64, 0, 0, 0],
            Event::Submitted { operation, call, file, kind, at, len } => [
                5 + ((file as u64) << 8) + ((kind as u64) << 16),
                operation,
                call.unwrap_or(u64::MAX),
                at,
                len,
                0,
            ],
            Event::Moved { operation, from, len } => [6, operation, from, len, 0, 0],
            Event::Completed { operation, result } => [7, operation, result as u64, 0, 0, 0],
            Event::Left { request } => [9, request, 0, 0, 0, 0],
            Event::Script { what, number } => [8, what.len() as u64, number, 0, 0, 0],
        };
        fields.iter().fold(0, |hash, field| mix(hash ^ field).wrapping_add(0x9e37_79b9_7f4a_7c15))
    }
}

/// The events of a run.
#[derive(Default)]
pub(crate) struct Trace {
    events: Vec<(u64, Event)>,
    hash: u64,
}

impl Trace {
    pub(crate) fn add(&mut self, now: u64, event: Event) {
        self.hash = mix(self.hash ^ now ^ event.digest());
        self.events.push((now, event));
    }

    /// Equal for equal runs.
    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    /// The last events, one a line.
    pub(crate) fn tail(&self, count: usize) -> String {
        let skip = self.events.len().saturating_sub(count);
        let lines: Vec<String> = self.events[skip..].iter().map(|(at, event)| line(*at, event)).collect();
        lines.join("\n")
    }
}

fn line(at: u64, event: &Event) -> String {
    struct Line<'a>(u64, &'a Event);
    impl fmt::Display for Line<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let Line(at, event) = self;
            write!(f, "{:>12.6} ", *at as f64 / 1e9)?;
            let of = |call: Option<u64>| call.map_or_else(|| "-".to_owned(), |call| call.to_string());
            match event {
                Event::Asked { disk, request, kind, at, len } => {
                    write!(f, "disk {disk}: request {request}: {} {at}+{len}", kind.name())
                }
                Event::Answered { request, code } => write!(f, "        request {request} answered {code}"),
                Event::Left { request } => write!(f, "        request {request} left"),
                Event::Called { call, request, kind } => {
                    write!(f, "        call {call} for request {}: {}", of(*request), kind.name())
                }
                Event::Returned { call, code } => write!(f, "        call {call} returned {code}"),
                Event::Submitted { operation, call, file, kind, at, len } => write!(
                    f,
                    "            operation {operation} of call {}: {kind:?} file {file} {at}+{len}",
                    of(*call)
                ),
                Event::Moved { operation, from, len } => {
                    write!(f, "            operation {operation} moved {from}+{len}")
                }
                Event::Completed { operation, result } => {
                    write!(f, "            operation {operation} completed {result}")
                }
                Event::Script { what, number } => write!(f, "{what} {number}"),
            }
        }
    }
    Line(at, event).to_string()
}
