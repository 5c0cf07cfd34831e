//! `tapdisk snapshot`: the snapshots within an image.

use std::rc::Rc;
use std::time::SystemTime;

use anyhow::{Context, bail};
use image::{Header, qcow2};
use runtime::Handle;
use serde_json::Value;
use storage::Storage;

use super::disk::{Access, Asked};
use crate::cli::tool::{Snapshot, SnapshotAction};

pub(super) async fn run(handle: &Handle, arguments: &Snapshot) -> anyhow::Result<()> {
    let SnapshotAction { create, apply, delete, .. } = &arguments.action;
    let changes = create.is_some() || apply.is_some() || delete.is_some();
    let (path, places) = (&arguments.file, &arguments.places);
    let access = if changes { Access::Write } else { Access::ReadAlone };
    let asked = Asked::new(path, arguments.format, access, places);
    // Opened and closed as an image first: what a server that died has noted gets into it.
    let layers = if changes {
        let disk = asked.open(handle).await?;
        disk.close().await?;
        disk.layers
    } else {
        asked.walk(handle).await?
    };
    let layer = layers.first().context("a disk has an image")?;
    let Header::Qcow2(_) = &layer.header else {
        bail!("{} is a {} image, which has no snapshots within", path.display(), layer.header.format());
    };
    let file = &layer.file.storage;
    if let Some(name) = create {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let done = qcow2::take_snapshot(file, name, now).await;
        return done.with_context(|| format!("cannot make the snapshot {name} of {}", path.display()));
    }
    if let Some(wanted) = apply {
        let done = qcow2::apply_snapshot(file, wanted).await;
        return done.with_context(|| format!("{} does not go back to the snapshot {wanted}", path.display()));
    }
    if let Some(wanted) = delete {
        let done = qcow2::delete_snapshot(file, wanted).await;
        return done.with_context(|| format!("cannot delete the snapshot {wanted} of {}", path.display()));
    }
    list(file, arguments).await
}

async fn list(file: &Rc<dyn Storage>, arguments: &Snapshot) -> anyhow::Result<()> {
    let failed = || format!("cannot read the snapshots of {}", arguments.file.display());
    let header = qcow2::Header::read(file).await.with_context(failed)?;
    let snapshots = qcow2::snapshots(file, &header).await.with_context(failed)?;
    if arguments.output.is_json() {
        let all: Value = snapshots.iter().map(qcow2::Snapshot::info).collect();
        return crate::print(format!("{all:#}\n").as_bytes());
    }
    let mut text = String::from("ID        Size of the disk    Seconds since 1970    Name\n");
    for snapshot in &snapshots {
        let size = snapshot.size.unwrap_or(header.size);
        let (id, name) = (snapshot.id.escape_debug().to_string(), snapshot.name.escape_debug());
        text.push_str(&format!("{id:<10}{size:<20}{:<22}{name}\n", snapshot.seconds));
    }
    crate::print(text.as_bytes())
}
