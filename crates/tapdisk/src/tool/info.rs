//! `tapdisk info`: says what an image is.

use std::os::unix::fs::MetadataExt;

use anyhow::Context;
use image::probe::{self, Look};
use image::{Header, Layer, qcow, qcow2, vhd};
use runtime::Handle;
use serde_json::{Map, Value, json};

use super::disk::{Access, Asked, from_image};
use crate::cli::tool::Info;
use crate::size;

/// What there is to say of an image, in this order, by the names that qemu-img has for it.
type Facts = Vec<(&'static str, Value)>;

pub(super) async fn run(handle: &Handle, arguments: &Info) -> anyhow::Result<()> {
    let access = if arguments.chain { Access::Read } else { Access::ReadAlone };
    let source = &arguments.source;
    let layers = Asked::new(&source.file, source.format, access, &source.places).walk(handle).await?;
    if let (None, Some(Layer { file, header: Header::Raw { .. }, .. })) = (source.format, layers.first())
        && let Ok(Look::Of(format) | Look::Unclear(format)) =
            probe::look(&file.storage, &file.path, file.is_block_device).await
    {
        let path = file.path.display();
        eprintln!(
            "tapdisk: {path} is taken for raw, as its name or kind says, but it begins like {format}: `-f {format}` takes it so"
        );
    }
    let mut facts: Vec<Facts> = Vec::new();
    for layer in &layers {
        facts.push(gather(layer).await?);
    }
    if arguments.output.is_json() {
        let mut objects: Vec<Value> = facts.into_iter().map(object).collect();
        let whole = if arguments.chain { objects.into() } else { objects.swap_remove(0) };
        return crate::print(format!("{whole:#}\n").as_bytes());
    }
    let texts: Vec<String> = facts.iter().map(describe).collect();
    crate::print(texts.join("\n").as_bytes())
}

fn object(facts: Facts) -> Value {
    facts.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>().into()
}

async fn gather(layer: &Layer) -> anyhow::Result<Facts> {
    let (file, path) = (&layer.file, layer.file.path.display());
    let found = std::fs::metadata(&file.path).with_context(|| format!("cannot look at {path}"))?;
    let mut facts: Facts = vec![
        ("filename", path.to_string().into()),
        ("format", layer.header.format().name().into()),
        ("virtual-size", layer.header.size().into()),
        // stat(2) counts in units of 512 bytes, whatever the file system's are.
        ("actual-size", (found.blocks() * 512).into()),
    ];
    let is_dirty = match &layer.header {
        Header::Qcow2(header) => header.is_dirty(),
        Header::Raw { .. } | Header::Qcow(_) | Header::Vhd(_) => false,
    };
    facts.push(("dirty-flag", is_dirty.into()));
    let specific = |data: Vec<(String, Value)>| json!({ "type": layer.header.format().name(), "data": data.into_iter().collect::<Map<_, _>>() });
    let own = match &layer.header {
        Header::Raw { .. } => None,
        Header::Qcow(header) => {
            facts.push(("cluster-size", header.cluster_size().into()));
            facts.push(("encrypted", header.is_encrypted().into()));
            Some(specific(qcow::info(header)))
        }
        Header::Qcow2(header) => {
            facts.push(("cluster-size", header.cluster_size().into()));
            let snapshots = qcow2::snapshots(&file.storage, header).await;
            let snapshots = snapshots.with_context(|| format!("cannot read the snapshots of {path}"))?;
            if !snapshots.is_empty() {
                facts.push(("snapshots", snapshots.iter().map(qcow2::Snapshot::info).collect()));
            }
            let mut data = qcow2::info(header);
            let bitmaps = qcow2::bitmaps(&file.storage, header).await;
            let bitmaps = bitmaps.with_context(|| format!("cannot read the bitmaps of {path}"))?;
            if !bitmaps.is_empty() {
                data.push(("bitmaps".into(), bitmaps.iter().map(qcow2::Bitmap::info).collect()));
            }
            Some(specific(data))
        }
        Header::Vhd(header) => {
            if let Some(block) = header.block() {
                facts.push(("cluster-size", block.into()));
            }
            Some(specific(vhd::info(header)))
        }
    };
    if let Some(backing) = layer.header.backing() {
        let full = from_image(&file.path, &backing.name);
        facts.push(("backing-filename", backing.name.into()));
        facts.push(("full-backing-filename", full.display().to_string().into()));
        if let Some(format) = backing.format {
            facts.push(("backing-filename-format", format.name().into()));
        }
    }
    facts.extend(own.map(|own| ("format-specific", own)));
    Ok(facts)
}

/// The same for people.
fn describe(facts: &Facts) -> String {
    let mut text = String::new();
    for (key, value) in facts {
        let shown = match (*key, value) {
            ("virtual-size" | "actual-size" | "cluster-size", Value::Number(number)) => {
                number.as_u64().map_or_else(|| number.to_string(), show)
            }
            ("format-specific", Value::Object(specific)) => {
                text.push_str(&list("of its format", specific.get("data")));
                continue;
            }
            ("snapshots", snapshots) => {
                text.push_str(&list("snapshots", Some(snapshots)));
                continue;
            }
            (_, value) => plain(value),
        };
        text.push_str(&format!("{}: {shown}\n", key.replace('-', " ")));
    }
    text
}

/// In the largest unit that divides it, and where that is not bytes, in bytes too.
fn show(bytes: u64) -> String {
    let shown = size::show(bytes);
    if shown.ends_with("bytes") { shown } else { format!("{shown} ({bytes} bytes)") }
}

fn list(name: &str, values: Option<&Value>) -> String {
    let mut text = format!("{name}:\n");
    match values {
        Some(Value::Object(values)) => {
            for (key, value) in values {
                text.push_str(&format!("    {}: {}\n", key.replace('-', " "), plain(value)));
            }
        }
        Some(Value::Array(values)) => {
            for value in values {
                text.push_str(&format!("    {}\n", plain(value)));
            }
        }
        Some(value @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_))) => {
            text.push_str(&format!("    {}\n", plain(value)));
        }
        None => {}
    }
    text
}

/// A value without the marks that JSON needs, where it has one.
fn plain(value: &Value) -> String {
    match value {
        // Names in an image may be anything, also what a terminal obeys.
        Value::String(text) => text.escape_debug().to_string(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            value.to_string()
        }
    }
}
