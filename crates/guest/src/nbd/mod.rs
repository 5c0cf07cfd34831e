//! Serves disks to NBD clients.

mod export;
mod negotiation;
mod outbox;
mod reply;
mod request;
mod status;
mod wire;

pub use export::{BadName, Export, Exports};
