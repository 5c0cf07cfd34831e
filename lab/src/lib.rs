//! Virtual machines to test in: Debian's kernel and QEMU, unpacked and never installed, and a guest that obeys.
//!
//! [`packages`] brings what is needed into a folder, [`kernel`] and [`initramfs`] make of it what a machine boots,
//! [`machine`] runs one, be it [`linux`] alone or [`xen`] with its domains, [`agent`] has scripts run in it ([`shell`]),
//! [`console`] keeps what its kernel said.

pub mod agent;
mod archive;
pub mod command;
pub mod console;
pub mod guest;
pub mod initramfs;
pub mod kernel;
pub mod linux;
pub mod machine;
mod mirror;
pub mod packages;
pub mod shell;
pub mod xen;
