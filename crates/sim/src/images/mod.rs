//! Images on storage that fails and dies, from a seed: what was promised of them is there.
//!
//! A run makes an image, lets guests use it in one life or several, with or without faults, and writes down all that
//! storage was asked for. From that log come the states that a death at any time may leave (`states`); each is opened by the
//! code that ships, and judged (`judge`) by what guests were told (`model`).

mod bytes;
mod guest;
mod judge;
mod matrix;
mod model;
mod qemu;
mod recorder;
mod run;
mod states;
mod subject;
#[cfg(test)]
mod toy;
mod world;

pub use matrix::{Row, rows};
pub use run::{Outcome, catch_panics, run};
