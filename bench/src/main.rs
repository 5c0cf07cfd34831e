//! Load generators that put tapdisk and its peers side by side.
fn main() {}
