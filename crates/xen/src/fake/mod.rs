//! A hypervisor within the process, for tests.

pub mod store;
mod tree;
