//! Serves disks to NBD clients.

mod export;
mod negotiation;
mod status;
mod wire;

pub use export::{BadName, Export, Exports};
