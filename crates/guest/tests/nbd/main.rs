//! The NBD server over real sockets and a real ring, with a disk that does as it is told.

mod client;
#[path = "../common/disk.rs"]
mod disk;
mod server;

mod hostile;
mod lifecycle;
mod listen;
mod transmission;
