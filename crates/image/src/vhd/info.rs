//! What is told of an image, beside what all images have.

use serde_json::{Value, json};

use super::footer::{Subformat, unix_time};
use super::header::Header;

/// Facts by name, in the order in which they are to be told.
pub fn info(header: &Header) -> Vec<(String, Value)> {
    let footer = &header.footer;
    let mut facts: Vec<(&str, Value)> = vec![("subformat", json!(header.subformat().name()))];
    let geometry = footer.geometry();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches(['\0', ' ']).to_owned();
    let version = footer.creator_version.get();
    facts.extend([
        ("creator", json!(text(&footer.creator))),
        ("creator-version", json!(format!("{}.{}", version >> 16, version & 0xffff))),
        ("created", json!(unix_time(footer.created.get()))),
        ("unique-id", json!(uuid(&header.unique_id()))),
        ("cylinders", json!(geometry.cylinders)),
        ("heads", json!(geometry.heads)),
        ("sectors-per-track", json!(geometry.sectors)),
        ("current-size", json!(footer.size.get())),
        ("size-is-geometry", json!(footer.goes_by_geometry())),
        ("saved-state", json!(footer.saved != 0)),
        ("hidden", json!(footer.hidden != 0)),
        ("disabled", json!(header.is_disabled())),
    ]);
    if let Some(sparse) = &header.sparse {
        facts.push(("blocks-max", json!(sparse.second.entries.get())));
        facts.push(("batmap", json!(sparse.batmap.is_some())));
        if header.subformat() == Subformat::Differencing {
            let is_raw = sparse.second.parent_id == [0; 16];
            facts.push((
                "parent-unique-id",
                if is_raw { Value::Null } else { json!(uuid(&sparse.second.parent_id)) },
            ));
            facts.push(("parent-changed", json!(unix_time(sparse.second.parent_changed.get()))));
        }
    }
    if !header.notes().is_empty() {
        facts.push(("notes", json!(header.notes())));
    }
    facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// A unique identifier as people write it.
pub(super) fn uuid(id: &[u8; 16]) -> String {
    let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    #[test]
    fn identifiers_are_written_as_usual() {
        let id = *b"\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef";
        assert_eq!(super::uuid(&id), "01234567-89ab-cdef-0123-456789abcdef");
    }
}
