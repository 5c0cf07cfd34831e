//! The command line of tapdisk.
fn main() {}
