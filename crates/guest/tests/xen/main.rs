//! A disk of a Xen guest: the server before a front end in a guest of a fake hypervisor, with a disk that does as it is
//! told.

#[path = "../common/disk.rs"]
mod disk;
mod serve;

mod data;
mod hostile;
mod life;
mod takeover;
