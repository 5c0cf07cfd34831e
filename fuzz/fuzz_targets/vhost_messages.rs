//! Feeds arbitrary messages to the control side of a vhost-user server; see `guest::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| guest::fuzzing::messages(bytes));
