//! What an image tells of itself, by the keys that `qemu-img info` has for it.

use serde_json::{Value, json};

use super::bitmap::Bitmap;
use super::header::Header;
use super::snapshot::Snapshot;

/// What qcow2 alone has: QEMU's `format-specific` data, without the bitmaps.
pub fn info(header: &Header) -> Vec<(String, Value)> {
    let mut facts = vec![("compat", json!(if header.version == 2 { "0.10" } else { "1.1" }))];
    facts.push(("compression-type", json!(header.compression.name())));
    if header.version > 2 {
        facts.push(("lazy-refcounts", json!(header.is_lazy())));
        facts.push(("corrupt", json!(header.is_corrupt())));
        facts.push(("extended-l2", json!(header.has_extended_l2())));
    }
    facts.push(("refcount-bits", json!(header.refcount_bits())));
    if let Some(name) = header.data_file() {
        facts.push(("data-file", json!(name)));
    }
    if header.has_data_file() {
        facts.push(("data-file-raw", json!(header.is_data_raw())));
    }
    facts.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

impl Snapshot {
    /// What it tells of itself.
    pub fn info(&self) -> Value {
        json!({
            "id": self.id,
            "name": self.name,
            "vm-state-size": self.vm_state,
            "date-sec": self.seconds,
            "date-nsec": self.nanoseconds,
            "vm-clock-sec": self.guest_nanoseconds / 1_000_000_000,
            "vm-clock-nsec": self.guest_nanoseconds % 1_000_000_000,
        })
    }
}

impl Bitmap {
    /// What it tells of itself.
    pub fn info(&self) -> Value {
        let flags = [("in-use", self.in_use), ("auto", self.auto)];
        let flags: Vec<&str> = flags.into_iter().filter(|(_, is)| *is).map(|(flag, _)| flag).collect();
        json!({ "name": self.name, "granularity": self.granularity, "flags": flags })
    }
}
