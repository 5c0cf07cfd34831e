//! Feeds arbitrary bytes to the rings of a vhost-user disk; see `guest::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| guest::fuzzing::rings(bytes));
