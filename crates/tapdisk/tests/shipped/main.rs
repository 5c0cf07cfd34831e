//! The shipped binary, run as a user runs it, over storage that fails on command.

mod client;
mod error;
mod flush;
mod guest;
mod hang;
mod life;
mod log;
mod open;
mod policy;
mod power_cut;
mod protocol;
mod server;
mod table;
mod takeover;
mod xen;
