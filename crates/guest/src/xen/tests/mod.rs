//! The front end's side, written by blkif.h and ring.h and not with our own layout: a driver over a fake guest's memory,
//! and a disk whose answers the test decides on.

mod churn;
mod death;
mod device;
mod disk;
mod front;
mod host;
mod hostile;
mod order;
mod parts;
mod request;
