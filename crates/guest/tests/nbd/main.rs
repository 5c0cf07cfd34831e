//! The NBD server over real sockets and a real ring, with a disk that does as it is told.

mod client;
mod disk;
mod server;

mod hostile;
mod lifecycle;
mod listen;
mod transmission;
