//! Version 1 of qcow against `qemu-img` and `qemu-io`, plain bytes, and the defects of 2006.

mod check;
mod create;
mod cut;
mod defects;
mod header;
mod model;
mod peers;
mod resize;
mod tools;
