//! The virtual disk: takes requests, has them done, and sees to it that each gets one truthful answer.

mod failures;
mod hold;
pub mod policy;
mod serve;
mod stats;

pub use policy::{OnError, Policy};
pub use serve::{Config, Disk};
pub use stats::{Counts, Stats};
