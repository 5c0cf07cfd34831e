//! Feeds arbitrary bytes to the rings of a Xen guest's disk; see `guest::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| guest::fuzzing::xen_rings(bytes));
