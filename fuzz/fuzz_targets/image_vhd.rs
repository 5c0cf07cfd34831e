//! Damages images of VHD and uses them; see `image::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| image::fuzzing::vhd(bytes));
