//! What `-o` says of an image to be made: the options of each format, read and checked.

use std::collections::BTreeMap;

use anyhow::{anyhow, bail};
use image::Format;

use crate::cli::tool::Pairs;
use crate::size;

/// The options of a format and what they mean, for people.
fn known(format: Format) -> &'static [(&'static str, &'static str)] {
    match format {
        Format::Raw => &[
            ("size", "bytes of the disk"),
            (
                "preallocation",
                "off (the file is sparse), falloc (its space is reserved) or full (zeroes are written)",
            ),
        ],
        Format::Qcow2 => &[
            ("size", "bytes of the disk"),
            ("compat", "1.1 (or v3), or 0.10 (v2) for readers that are older than 2012"),
            ("cluster_size", "bytes of a cluster, a power of two from 512 to 2M [64K]"),
            ("preallocation", "off, metadata (all clusters have their place), falloc or full"),
            ("lazy_refcounts", "on: reference counts may be written late; off"),
            ("refcount_bits", "bits of a reference count, a power of two up to 64 [16]"),
            ("extended_l2", "on: clusters have 32 subclusters; off"),
            ("compression_type", "how compressed clusters are compressed: zlib or zstd"),
            ("data_file", "a file of its own for the disk's bytes, or a block device, which FILE then names"),
            ("data_file_raw", "on: that file alone shows the disk, too; off"),
            ("backing_file", "as --backing"),
            ("backing_fmt", "as --backing-format"),
        ],
        Format::Qcow => &[
            ("size", "bytes of the disk"),
            (
                "cluster_size",
                "bytes of a cluster, a power of two from 512 to 64K [4K, or 512 over another image]",
            ),
            ("backing_file", "as --backing"),
            ("backing_fmt", "as --backing-format"),
        ],
        Format::Vhd => &[
            ("size", "bytes of the disk"),
            ("subformat", "dynamic, or fixed: the disk's bytes as they are, then a footer"),
            ("block_size", "bytes of a block, a power of two [2M]"),
            ("preallocation", "off, metadata (all blocks have their place), falloc or full"),
            (
                "force_size",
                "on: exactly as large as asked for; off: what cylinders, heads and sectors cover [on]",
            ),
            ("backing_file", "as --backing"),
            ("backing_fmt", "as --backing-format"),
        ],
    }
}

/// The text for `-o help`.
pub(super) fn help(format: Format) -> String {
    let mut text = format!("Options of {format}:\n");
    for (key, meaning) in known(format) {
        text.push_str(&format!("  {key:<18} {meaning}\n"));
    }
    text
}

/// Options that were given and not yet asked for.
pub(super) struct Wishes {
    format: Format,
    values: BTreeMap<String, String>,
}

impl Wishes {
    /// Those of a command line; `None` where help is asked for.
    ///
    /// # Errors
    /// The format does not have one of them.
    pub(super) fn new(format: Format, given: &[Pairs]) -> anyhow::Result<Option<Wishes>> {
        let mut values = BTreeMap::new();
        for (key, value) in given.iter().flat_map(|pairs| &pairs.0) {
            if key == "help" {
                return Ok(None);
            }
            if !known(format).iter().any(|(known, _)| known == key) {
                let names: Vec<&str> = known(format).iter().map(|(key, _)| *key).collect();
                bail!("{format} has no option `{key}`: it has {}", names.join(", "));
            }
            // The last word counts, as with qemu-img.
            values.insert(key.clone(), value.clone());
        }
        Ok(Some(Wishes { format, values }))
    }

    /// The value of an option as it was given.
    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        debug_assert!(known(self.format).iter().any(|(known, _)| *known == key), "{key} is in the list");
        self.values.remove(key)
    }

    /// One that is a size.
    pub(super) fn size(&mut self, key: &str) -> anyhow::Result<Option<u64>> {
        self.take(key).map(|text| size::parse(&text).map_err(|why| anyhow!("-o {key}: {why}"))).transpose()
    }

    /// One that is a number.
    pub(super) fn number(&mut self, key: &str) -> anyhow::Result<Option<u32>> {
        let parse =
            |text: String| text.parse().map_err(|why| anyhow!("-o {key}: `{text}` is no number: {why}"));
        self.take(key).map(parse).transpose()
    }

    /// One that is one of several words.
    pub(super) fn choice<T: Copy>(&mut self, key: &str, words: &[(&str, T)]) -> anyhow::Result<Option<T>> {
        let Some(text) = self.take(key) else { return Ok(None) };
        match words.iter().find(|(word, _)| *word == text) {
            Some((_, meaning)) => Ok(Some(*meaning)),
            None => {
                let names: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
                bail!("-o {key}: `{text}` is none of {}", names.join(", "))
            }
        }
    }
}

/// What `on` and `off` mean.
pub(super) const SWITCH: [(&str, bool); 2] = [("on", true), ("off", false)];

#[cfg(test)]
mod tests {
    use super::*;

    fn wishes(format: Format, text: &str) -> anyhow::Result<Option<Wishes>> {
        Wishes::new(format, &[text.parse().unwrap()])
    }

    #[test]
    fn options_are_read_and_what_is_none_is_said() {
        let mut raw = wishes(Format::Raw, "size=1M,size=2M,preallocation=lots").unwrap().unwrap();
        assert_eq!(raw.size("size").unwrap(), Some(2 << 20));
        assert_eq!(raw.size("size").unwrap(), None);
        let error = raw.choice("preallocation", &[("off", 0), ("full", 1)]).unwrap_err().to_string();
        assert!(error.contains("`lots` is none of off, full"), "{error}");
        let error = wishes(Format::Raw, "cluster_size=4K").err().unwrap().to_string();
        assert!(error.contains("raw has no option `cluster_size`: it has size, preallocation"), "{error}");
        assert!(wishes(Format::Raw, "help").unwrap().is_none());
    }
}
