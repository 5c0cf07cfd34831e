//! Seeded runs of the real executor, storage and disk on a simulated kernel and clock, judged by oracles.
//!
//! The code under test is the code that ships. What is simulated is below it (`kernel`, `file`, `fault`) and above
//! it (`guest`); `subject` and `model` know what was promised, and `witness` stands between disk and storage.

mod dice;
mod fate;
mod fault;
mod file;
mod guest;
mod kernel;
mod model;
pub mod mutants;
pub mod run;
mod scattered;
mod stops;
mod subject;
mod trace;
mod witness;
