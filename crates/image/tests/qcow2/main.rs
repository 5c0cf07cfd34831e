//! qcow2 against QEMU's own tools.

mod check;
mod create;
mod header;
mod tools;
