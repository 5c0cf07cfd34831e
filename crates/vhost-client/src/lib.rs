//! A vhost-user-blk front end for tests: a driver that says exactly what a test wants.

mod memory;

pub use memory::Memory;
