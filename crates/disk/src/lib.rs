//! The virtual disk: takes requests, has them done, and sees to it that each gets one truthful answer.

mod failures;
mod hold;
pub mod policy;
mod serve;
mod session;
mod size;
mod stats;
mod waiters;

pub use policy::{OnError, Policy};
pub use serve::{Config, Disk};
pub use session::{GiveUp, Session};
pub use stats::{Counts, Stats};
