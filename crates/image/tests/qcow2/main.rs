//! qcow2 against QEMU's own tools.

mod create;
mod header;
mod tools;
