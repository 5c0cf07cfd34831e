//! The shipped binary, run as a user runs it, over storage that fails on command.

mod client;
mod error;
mod flush;
mod formats;
mod guest;
mod hang;
mod image_death;
mod life;
mod log;
mod memory;
mod open;
mod policy;
mod power_cut;
mod protocol;
mod server;
mod table;
mod takeover;
mod xen;
