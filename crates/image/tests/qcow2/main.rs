//! qcow2 against QEMU's own tools.

mod check;
mod create;
mod disk;
mod header;
mod info;
mod snapshot;
mod tools;
