#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| guest::fuzzing::transmission(bytes));
