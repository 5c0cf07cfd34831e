//! The vhost-user-blk server over real sockets and a real ring, with a disk that does as it is told.

#[path = "../common/disk.rs"]
mod disk;
#[path = "../common/serve.rs"]
mod serve;

mod config;
mod hostile;
mod libblkio;
mod life;
mod memory;
mod request;
mod ring;
