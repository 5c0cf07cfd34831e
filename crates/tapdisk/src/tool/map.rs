//! `tapdisk map`: says where the bytes of a disk are.

use std::fmt::Write;

use anyhow::Context;
use block::Span;
use image::Format;
use image::tool::{self, Mapped};
use runtime::Handle;
use serde::Serialize;
use storage::Storage;

use super::disk::{Access, Asked, Disk};
use crate::cli::tool::Map;
use crate::screen::harmless;

/// Text is printed in pieces of about so many bytes: a map may be long.
const PIECE: usize = 64 << 10;

pub(super) async fn run(handle: &Handle, arguments: &Map) -> anyhow::Result<()> {
    let (path, source) = (&arguments.source.file, &arguments.source);
    let disk = Asked::new(path, source.format, Access::Read, &source.places).open(handle).await?;
    let size = disk.chain.size();
    let len = arguments.max_length.unwrap_or(u64::MAX).min(size.saturating_sub(arguments.start_offset));
    let span = Span::new(arguments.start_offset.min(size), len).context("a disk is smaller than 8 EiB")?;
    let mut out = Text { text: String::new(), is_first: true };
    let is_json = arguments.output.is_json();
    if !is_json {
        out.text.push_str("Offset          Length          Mapped to       File\n");
    }
    tool::map(&disk.chain, span, &disk.flat(), |mut mapped| -> anyhow::Result<()> {
        // In version 1 of qcow nothing is said to be zero: what reads so is not there.
        let layer = disk.layers.get(mapped.depth);
        if mapped.is_zero && layer.is_some_and(|layer| layer.header.format() == Format::Qcow) {
            mapped.is_present = false;
        }
        if is_json {
            out.object(&mapped)?
        } else {
            out.line(&mapped, &disk)?
        }
        out.print_if_long()
    })
    .await
    .with_context(|| format!("cannot read the map of {}", path.display()))?;
    if is_json {
        out.text.push_str(if out.is_first { "[]\n" } else { "]\n" });
    }
    crate::print(out.text.as_bytes())
}

/// A run, with the names that qemu-img has for what is said of it.
#[derive(Serialize)]
struct Object {
    start: u64,
    length: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

struct Text {
    text: String,
    is_first: bool,
}

impl Text {
    /// A run as an object.
    fn object(&mut self, mapped: &Mapped) -> anyhow::Result<()> {
        let object = Object {
            start: mapped.at,
            length: mapped.len,
            depth: mapped.depth,
            present: mapped.is_present,
            zero: mapped.is_zero,
            data: mapped.is_data,
            compressed: mapped.is_packed,
            offset: mapped.place,
        };
        let object = serde_json::to_string(&object)?;
        self.text.push_str(if self.is_first { "[" } else { ",\n" });
        self.is_first = false;
        self.text.push_str(&object);
        Ok(())
    }

    /// A run of data as a line; of others nothing.
    fn line(&mut self, mapped: &Mapped, disk: &Disk) -> anyhow::Result<()> {
        let file =
            disk.layers.get(mapped.depth).map(|layer| harmless(&layer.file.path.display().to_string()));
        let place = match mapped.place {
            Some(place) => format!("{place:#x}"),
            None if mapped.is_packed => "compressed".into(),
            None => return Ok(()),
        };
        if mapped.is_data && !mapped.is_zero {
            let (at, len) = (format!("{:#x}", mapped.at), format!("{:#x}", mapped.len));
            writeln!(self.text, "{at:<16}{len:<16}{place:<16}{}", file.unwrap_or_default())?;
        }
        Ok(())
    }

    fn print_if_long(&mut self) -> anyhow::Result<()> {
        if self.text.len() < PIECE {
            return Ok(());
        }
        crate::print(std::mem::take(&mut self.text).as_bytes())
    }
}
