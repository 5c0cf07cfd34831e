//! What there is to be told of a qcow image that other formats have not.

use serde_json::{Value, json};

use super::Header;

/// Facts by name, as `tapdisk info` shows them.
pub fn info(header: &Header) -> Vec<(String, Value)> {
    let mut facts = vec![
        ("l2-entries".to_owned(), json!(header.l2_entries())),
        ("l1-table-offset".to_owned(), json!(header.geometry.l1_at)),
        ("encrypted".to_owned(), json!(header.is_encrypted())),
    ];
    if let Some(xen) = header.xen() {
        facts.push((
            "xen".to_owned(),
            json!({
                "l1-checksum": format!("{:08x}", xen.checksum),
                "clusters-at-a-time": xen.clusters_at_a_time,
                "sparse": xen.sparse,
                "l1-endianness": if xen.big_endian { "big" } else { "little" },
            }),
        ));
    }
    facts
}
