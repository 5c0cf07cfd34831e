//! Damages images of qcow2 and uses them; see `image::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| image::fuzzing::qcow2(bytes));
