//! Feeds arbitrary values of a Xen front end's nodes to the negotiation; see `guest::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| guest::fuzzing::xen_nodes(bytes));
