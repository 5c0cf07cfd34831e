//! A guest's request: an operation, and a claim to exactly one truthful answer.

use std::fmt;
use std::rc::Rc;

use crate::{Buf, Errno, Span};

/// What a guest asks for. Offsets and lengths are bytes.
#[derive(Clone, Debug)]
pub enum Op {
    /// Fill `buf` with the bytes from `at` on.
    Read {
        /// First byte on the disk.
        at: u64,
        /// Where they go; its length is the request's.
        buf: Buf,
    },
    /// Store the bytes of `buf` from `at` on.
    Write {
        /// First byte on the disk.
        at: u64,
        /// Where they come from; its length is the request's.
        buf: Buf,
        /// Durable before the answer (force unit access).
        fua: bool,
    },
    /// Make every write that was answered before durable.
    Flush,
    /// The guest no longer needs these bytes; what they read as afterwards is not promised.
    Discard {
        /// Which bytes.
        span: Span,
        /// Durable before the answer.
        fua: bool,
    },
    /// Make these bytes read as zero.
    WriteZeroes {
        /// Which bytes.
        span: Span,
        /// The space behind them may be given back.
        unmap: bool,
        /// Durable before the answer.
        fua: bool,
        /// Fail with EOPNOTSUPP rather than be as slow as writing zeroes.
        fast: bool,
    },
    /// Tell which bytes are data and which are holes.
    Status {
        /// Which bytes.
        span: Span,
    },
    /// The guest will read these bytes soon.
    Prefetch {
        /// Which bytes.
        span: Span,
    },
}

/// The kind of an operation, for counting, for policy and for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // see `Op`
pub enum OpKind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    Status,
    Prefetch,
}

impl OpKind {
    /// All of them, in the order of their discriminants.
    pub const ALL: [OpKind; 7] = [
        OpKind::Read,
        OpKind::Write,
        OpKind::Flush,
        OpKind::Discard,
        OpKind::WriteZeroes,
        OpKind::Status,
        OpKind::Prefetch,
    ];

    /// As the log spells it.
    pub const fn name(self) -> &'static str {
        match self {
            OpKind::Read => "read",
            OpKind::Write => "write",
            OpKind::Flush => "flush",
            OpKind::Discard => "discard",
            OpKind::WriteZeroes => "write zeroes",
            OpKind::Status => "block status",
            OpKind::Prefetch => "prefetch",
        }
    }

    /// Whether it changes the disk, so that a read-only disk refuses it.
    pub const fn changes(self) -> bool {
        matches!(self, OpKind::Write | OpKind::Discard | OpKind::WriteZeroes)
    }
}

impl Op {
    /// Its kind.
    pub fn kind(&self) -> OpKind {
        match self {
            Op::Read { .. } => OpKind::Read,
            Op::Write { .. } => OpKind::Write,
            Op::Flush => OpKind::Flush,
            Op::Discard { .. } => OpKind::Discard,
            Op::WriteZeroes { .. } => OpKind::WriteZeroes,
            Op::Status { .. } => OpKind::Status,
            Op::Prefetch { .. } => OpKind::Prefetch,
        }
    }

    /// The bytes of the disk that it touches: empty for a flush, `None` where the end would wrap around.
    pub fn span(&self) -> Option<Span> {
        match self {
            Op::Read { at, buf } | Op::Write { at, buf, .. } => Span::new(*at, buf.len() as u64),
            Op::Flush => Span::new(0, 0),
            Op::Discard { span, .. }
            | Op::WriteZeroes { span, .. }
            | Op::Status { span }
            | Op::Prefetch { span } => Some(*span),
        }
    }

    /// Whether it must be durable before its answer.
    pub fn fua(&self) -> bool {
        match self {
            Op::Write { fua, .. } | Op::Discard { fua, .. } | Op::WriteZeroes { fua, .. } => *fua,
            Op::Read { .. } | Op::Flush | Op::Status { .. } | Op::Prefetch { .. } => false,
        }
    }
}

/// Names a request to the interface that it came from: a ring slot, a descriptor head, an entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// A run of bytes with one allocation status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Bytes.
    pub len: u64,
    /// Space is allocated for it.
    pub allocated: bool,
    /// It reads as zeroes.
    pub zero: bool,
}

/// What an answer carries besides success. The bytes of a read are in the request's own buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// Nothing.
    None,
    /// The runs that a status request asked for, from its first byte on; together no longer than the request,
    /// at least one.
    Runs(Vec<Run>),
}

/// Where answers go: an interface that gives each its way to the guest.
pub trait Answer {
    /// Tells the guest. Called exactly once for each ticket, and cannot fail: a guest that is gone is the
    /// interface's affair. Runs at the top level of the disk's thread or at the end of a request, so it must not
    /// submit a new request before it returns.
    fn answer(&self, ticket: Ticket, result: Result<Payload, Errno>);

    /// The request is not done and will not be answered by this process. An interface whose own record of requests
    /// outlives the process leaves it there for a successor; one that has no such record tells the guest ESHUTDOWN.
    /// Called instead of `answer`, under the same terms.
    fn leave(&self, ticket: Ticket) {
        self.answer(ticket, Err(Errno::ESHUTDOWN));
    }
}

/// The right and the duty to answer one request once.
///
/// It cannot be copied, sending consumes it, and dropping it answers EIO: however a request ends, its guest
/// hears of it. Only one that its interface keeps for a successor may be left unanswered, and that is said.
///
/// ```compile_fail
/// fn twice(reply: block::Reply) {
///     reply.send(Ok(block::Payload::None));
///     reply.send(Ok(block::Payload::None)); // used after move
/// }
/// ```
#[must_use = "dropping it answers EIO"]
pub struct Reply {
    to: Option<Rc<dyn Answer>>,
    ticket: Ticket,
}

impl Reply {
    /// A claim on an answer to this ticket.
    pub fn new(to: Rc<dyn Answer>, ticket: Ticket) -> Reply {
        Reply { to: Some(to), ticket }
    }

    /// Gives the answer.
    pub fn send(mut self, result: Result<Payload, Errno>) {
        if let Some(to) = self.to.take() {
            to.answer(self.ticket, result);
        }
    }

    /// Gives no answer: the request stays with its interface, for whoever serves the guest next.
    pub fn leave(mut self) {
        if let Some(to) = self.to.take() {
            to.leave(self.ticket);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(to) = self.to.take() {
            tracing::error!(
                ticket = self.ticket.0,
                "a request was dropped unanswered: answered EIO (a bug in tapdisk)"
            );
            to.answer(self.ticket, Err(Errno::EIO));
        }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reply({})", self.ticket.0)
    }
}

/// An operation and the claim to its answer.
#[must_use]
#[derive(Debug)]
pub struct Request {
    /// What is asked.
    pub op: Op,
    /// Where the answer goes.
    pub reply: Reply,
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[derive(Default)]
    struct Guest(RefCell<Vec<(u64, Result<Payload, Errno>)>>);

    impl Answer for Guest {
        fn answer(&self, ticket: Ticket, result: Result<Payload, Errno>) {
            self.0.borrow_mut().push((ticket.0, result));
        }
    }

    #[test]
    fn a_sent_answer_arrives_once() {
        let guest = Rc::new(Guest::default());
        Reply::new(guest.clone(), Ticket(7)).send(Ok(Payload::None));
        assert_eq!(*guest.0.borrow(), [(7, Ok(Payload::None))]);
    }

    #[test]
    fn a_dropped_request_is_answered_eio() {
        let guest = Rc::new(Guest::default());
        drop(Request { op: Op::Flush, reply: Reply::new(guest.clone(), Ticket(1)) });
        assert_eq!(*guest.0.borrow(), [(1, Err(Errno::EIO))]);
    }

    #[test]
    fn a_request_that_is_left_is_not_answered() {
        /// A guest whose requests outlive the process.
        #[derive(Default)]
        struct Lasting(Guest, RefCell<Vec<u64>>);

        impl Answer for Lasting {
            fn answer(&self, ticket: Ticket, result: Result<Payload, Errno>) {
                self.0.answer(ticket, result);
            }

            fn leave(&self, ticket: Ticket) {
                self.1.borrow_mut().push(ticket.0);
            }
        }

        let guest = Rc::new(Lasting::default());
        Reply::new(guest.clone(), Ticket(3)).leave();
        assert_eq!(*guest.1.borrow(), [3]);
        assert_eq!(*guest.0.0.borrow(), []);
    }

    #[test]
    fn a_guest_whose_requests_do_not_outlive_the_process_hears_of_its_end() {
        let guest = Rc::new(Guest::default());
        Reply::new(guest.clone(), Ticket(4)).leave();
        assert_eq!(*guest.0.borrow(), [(4, Err(Errno::ESHUTDOWN))]);
    }

    #[test]
    fn a_panic_answers_eio() {
        let guest = Rc::new(Guest::default());
        let reply = Reply::new(guest.clone(), Ticket(2));
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _reply = reply;
            panic!("in a driver");
        }));
        assert!(caught.is_err());
        assert_eq!(*guest.0.borrow(), [(2, Err(Errno::EIO))]);
    }
}
