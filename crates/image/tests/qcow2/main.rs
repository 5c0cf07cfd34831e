//! qcow2 against QEMU's own tools.

mod check;
mod crash;
mod create;
mod header;
mod info;
mod snapshot;
mod tools;
