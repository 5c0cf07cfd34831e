//! `tapdisk info`: says what an image is.

use std::os::unix::fs::MetadataExt;

use anyhow::Context;
use runtime::Handle;
use serde_json::Value;
use storage::file::Cache;

use super::disk::{self, Access, Disk, Layer};
use crate::cli::tool::Info;
use crate::size;

/// What there is to say of an image, in this order.
type Facts = Vec<(String, Value)>;

pub(super) async fn run(handle: &Handle, arguments: &Info) -> anyhow::Result<()> {
    let path = &arguments.source.file;
    let disk = disk::open(handle, path, arguments.source.format, Access::Read, Cache::Buffered).await?;
    let depths = if arguments.chain { disk.layers.len() } else { 1 };
    let mut facts: Vec<Facts> = Vec::new();
    for (depth, layer) in disk.layers.iter().enumerate().take(depths) {
        facts.push(gather(&disk, depth, layer)?);
    }
    if arguments.output.is_json() {
        let objects = facts.into_iter().map(|facts| Value::Object(facts.into_iter().collect()));
        let mut objects: Vec<Value> = objects.collect();
        let whole = if arguments.chain { objects.into() } else { objects.swap_remove(0) };
        return crate::print(format!("{whole:#}\n").as_bytes());
    }
    let texts: Vec<String> = facts.iter().map(|facts| describe(facts)).collect();
    crate::print(texts.join("\n").as_bytes())
}

/// What there is to say of an image, by the names that qemu-img has for it.
fn gather(disk: &Disk, depth: usize, layer: &Layer) -> anyhow::Result<Facts> {
    let image = if depth == 0 { Some(disk.chain.top()) } else { disk.chain.below().get(depth - 1) };
    let found =
        std::fs::metadata(&layer.path).with_context(|| format!("cannot look at {}", layer.path.display()))?;
    let facts = [
        ("filename", layer.path.display().to_string().into()),
        ("format", layer.format.name().into()),
        ("virtual-size", image.map(|image| image.size()).into()),
        // stat(2) counts in units of 512 bytes, whatever the file system's are.
        ("actual-size", (found.blocks() * 512).into()),
    ];
    Ok(facts.map(|(key, value): (&str, Value)| (key.to_owned(), value)).to_vec())
}

/// The same for people.
fn describe(facts: &[(String, Value)]) -> String {
    let mut text = String::new();
    for (key, value) in facts {
        let shown = match (key.as_str(), value) {
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
        Some(value) => text.push_str(&format!("    {}\n", plain(value))),
        None => {}
    }
    text
}

/// A value without the marks that JSON needs, where it has one.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            value.to_string()
        }
    }
}
