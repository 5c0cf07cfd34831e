//! The driver's side, written by the specification and not with our own ring: memory that both share, a driver that
//! builds chains by hand, and a disk whose answers the test decides on.

mod death;
mod desk;
mod device;
mod disk;
mod driver;
mod inflight;
mod memory;
mod ram;
mod request;
mod ring;
mod server;
