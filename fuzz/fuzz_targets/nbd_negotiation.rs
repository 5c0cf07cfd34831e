//! Feeds arbitrary bytes to the negotiation of an NBD server; see `guest::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| guest::fuzzing::negotiation(bytes));
