//! What the fuzz targets of images and the replay of their corpora call. Not for anybody else.
//!
//! An input is a small program: which image is made, what of its metadata is then damaged, and what is done with it. So a few
//! bytes reach far, checksums are right where they are to be, and an input that found something can be read.

mod fence;
mod mutate;
mod program;
mod qcow;
mod qcow2;
mod shapes;
mod subject;
mod trial;
mod vhd;

pub use mutate::mutate;
pub use shapes::shapes;

use block::Pool;
use runtime::{RingFlags, Runtime, Uring};

thread_local! {
    /// What the targets run on, set up once: an io_uring costs more than most inputs.
    static RUNTIME: Runtime = {
        let pool = Pool::new(1 << 20);
        let uring = Uring::open(RingFlags::Auto, &pool).expect("fuzzing needs io_uring");
        Runtime::new(Box::new(uring), pool)
    };
}

/// Opens, checks, reads, writes and repairs a damaged image of qcow.
pub fn qcow(bytes: &[u8]) {
    trial::run(&qcow::Qcow, bytes);
}

/// Opens, checks, reads, writes and repairs a damaged image of qcow2.
pub fn qcow2(bytes: &[u8]) {
    trial::run(&qcow2::Qcow2, bytes);
}

/// Opens, checks, reads, writes and repairs a damaged image of VHD.
pub fn vhd(bytes: &[u8]) {
    trial::run(&vhd::Vhd, bytes);
}

/// A fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, which its corpus has too.
    pub name: &'static str,
    /// What it does with an input.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "image_qcow", run: qcow },
    Target { name: "image_qcow2", run: qcow2 },
    Target { name: "image_vhd", run: vhd },
];
