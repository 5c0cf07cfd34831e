//! The commands for images that nobody serves, run as a user runs them, next to qemu-img.

mod check;
mod convert;
mod death;
mod device;
mod fail;
mod folder;
mod layers;
mod odd;
mod tell;
