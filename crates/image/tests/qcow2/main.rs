//! qcow2 against QEMU's own tools.

mod header;
mod tools;
