//! Serves disks to NBD clients: fixed newstyle negotiation; simple, structured and extended replies.
//!
//! A connection has two tasks. One receives requests and hands them to the disk (`session`); the other sends the
//! answers that have gathered meanwhile, many in one call (`connection`). Neither waits for the other, so that
//! requests are taken while answers are sent; what keeps a client within bounds is a limit on the requests that it
//! has out and the memory that it shares with all others (`crate::budget`).

mod connection;
mod export;
mod negotiation;
mod outbox;
mod peer;
mod reply;
mod request;
mod server;
mod session;
mod status;
mod stream;
mod wire;

pub use export::{BadName, Export, Exports};
pub use peer::Patience;
pub use server::{Server, Settings, Stats};

/// The handshake without a connection, for `crate::fuzzing`.
#[doc(hidden)]
pub(crate) mod fuzzing {
    use std::rc::Rc;

    use super::Exports;
    use super::negotiation::{Negotiation, Progress};
    use crate::Disk;

    /// What the client has heard when the handshake ends, or the bytes do.
    #[derive(Debug, PartialEq, Eq)]
    pub(crate) struct Heard {
        pub(crate) bytes: Vec<u8>,
        /// Transmission begins.
        pub(crate) is_agreed: bool,
        /// The client has broken a rule, or has taken its leave.
        pub(crate) is_over: bool,
    }

    pub(crate) struct Negotiator {
        negotiation: Negotiation,
        heard: Heard,
    }

    impl Negotiator {
        pub(crate) fn new(disk: Rc<dyn Disk>) -> Negotiator {
            let exports = Exports::one("disk", "a disk", disk).expect("the name is a name");
            let heard = Heard { bytes: Vec::new(), is_agreed: false, is_over: false };
            Negotiator { negotiation: Negotiation::new(Rc::new(exports)), heard }
        }

        /// Says this; false where nothing more will be heard.
        pub(crate) fn say(&mut self, mut bytes: &[u8]) -> bool {
            loop {
                match self.negotiation.feed(&mut bytes, &mut self.heard.bytes) {
                    Ok(Progress::Starved) => return true,
                    Ok(Progress::Answered) => {}
                    Ok(Progress::Transmit(_)) => {
                        self.heard.is_agreed = true;
                        return false;
                    }
                    Ok(Progress::Abort) | Err(_) => {
                        self.heard.is_over = true;
                        return false;
                    }
                }
            }
        }

        /// Bytes that the server keeps of what was said.
        pub(crate) fn stored(&self) -> usize {
            self.negotiation.stored()
        }

        pub(crate) fn heard(self) -> Heard {
            self.heard
        }
    }
}
