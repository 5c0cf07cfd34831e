//! The chores of the project: `cargo xtask check`, `ci`, `sim`, `bench`, `lab`.
fn main() {}
