//! What the fuzz targets and the replay of their corpora call. Not for anybody else.
//!
//! Each takes bytes that a client sends, puts them to the server, and panics where what comes back is not what the
//! protocol demands.

mod messages;
mod moody;
mod negotiation;
mod rings;
mod transmission;
mod xen_nodes;
#[cfg(feature = "fuzzing")]
mod xen_rings;

use block::Pool;
use runtime::{RingFlags, Runtime, Uring};

pub use messages::messages;
pub use negotiation::negotiation;
pub use rings::rings;
pub use transmission::transmission;
pub use xen_nodes::xen_nodes;
#[cfg(feature = "fuzzing")]
pub use xen_rings::xen_rings;

thread_local! {
    /// What the targets run on, set up once: an io_uring costs more than most inputs.
    static RUNTIME: Runtime = {
        let pool = Pool::new(1 << 20);
        let uring = Uring::open(RingFlags::Auto, &pool).expect("fuzzing needs io_uring");
        Runtime::new(Box::new(uring), pool)
    };
}

/// Takes numbers off the front of bytes.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    /// A number of this many bytes, at most 8.
    fn number(&mut self, len: usize) -> Option<u64> {
        Some(self.take(len)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }
}
