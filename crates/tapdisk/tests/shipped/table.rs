//! The table of errors, docs/errors.md: what it names as proof is there.

use std::path::Path;

#[test]
fn every_test_that_the_table_of_errors_names_exists() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let table = std::fs::read_to_string(crates.with_file_name("docs/errors.md")).unwrap();
    let mut named = 0;
    for words in table.split('`').skip(1).step_by(2) {
        let Some((file, test)) = words.split_once("::").filter(|(_, test)| !test.is_empty()) else {
            continue;
        };
        let file = match file.split_once('/') {
            Some(("crates", file)) => crates.join(file),
            Some(("vhost" | "conformance" | "xen", _)) => crates.join(format!("guest/tests/{file}.rs")),
            Some(("tools", _)) => crates.join(format!("tapdisk/tests/{file}.rs")),
            Some(("unit", file)) => crates.join(format!("guest/src/vhost/tests/{file}.rs")),
            Some(("blkif", file)) => crates.join(format!("guest/src/xen/tests/{file}.rs")),
            Some(_) => panic!("{words}: where is that?"),
            None => crates.join(format!("tapdisk/tests/shipped/{file}.rs")),
        };
        let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{words}: {error}"));
        assert!(text.contains(&format!("fn {test}(")), "{words} does not exist");
        named += 1;
    }
    assert!(named > 120, "only {named} tests are named");
}
