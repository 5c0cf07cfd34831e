//! The metadata of an image: what says where the disk's bytes are, cached, changed in memory, and written in an order that a
//! power cut at any time leaves whole.

mod ledger;
mod ledger_file;

pub use ledger::{Change, Ledger};
pub use ledger_file::LedgerFile;
