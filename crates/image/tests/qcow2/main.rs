//! qcow2 against QEMU's own tools.

mod check;
mod crash;
mod create;
mod disk;
mod faults;
mod header;
mod info;
mod snapshot;
mod space;
mod tools;
