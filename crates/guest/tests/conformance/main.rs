//! The same questions put to every interface: NBD in its three styles, and a virtio disk and one of Xen in their ways.

#[path = "../common/disk.rs"]
mod disk;
#[path = "../common/serve.rs"]
mod serve;

mod asker;
mod questions;
