//! `tapdisk resize`: gives a disk another size.

use std::rc::Rc;

use anyhow::{Context, bail};
use block::Span;
use image::{Header, qcow2};
use runtime::Handle;
use storage::{Storage, Zeroing};

use super::disk::{Access, Asked, failed};
use crate::cli::tool::{NewSize, Resize};
use crate::size;

pub(super) async fn run(handle: &Handle, arguments: &Resize) -> anyhow::Result<()> {
    let path = &arguments.file;
    let asked = Asked::new(path, arguments.format, Access::Write, &arguments.places);
    let wanted = arguments.size;
    let (old, new) = resize(handle, asked, arguments.shrink, |old| match wanted {
        NewSize::Exactly(bytes) => Some(bytes),
        NewSize::More(bytes) => old.checked_add(bytes).filter(|sum| i64::try_from(*sum).is_ok()),
    })
    .await?;
    let (old, new) = (size::show(old), size::show(new));
    crate::print(format!("Resized {}: from {old} to {new}\n", path.display()).as_bytes())
}

/// Gives a disk the size that `wanted` makes of the old one; both, as they are in the end.
pub(super) async fn resize(
    handle: &Handle,
    asked: Asked<'_>,
    shrink: bool,
    wanted: impl FnOnce(u64) -> Option<u64>,
) -> anyhow::Result<(u64, u64)> {
    let path = asked.path;
    let disk = asked.open(handle).await?;
    let old = disk.chain.size();
    let new =
        wanted(old).with_context(|| format!("{} would be larger than any disk (8 EiB)", path.display()))?;
    if new < old && !shrink {
        bail!(
            "{} has {}: making it smaller loses what is beyond its new end. `--shrink` does it all the same",
            path.display(),
            size::show(old)
        );
    }
    if !matches!(disk.top().header, Header::Qcow2(_)) {
        disk.chain.resize(new).await.map_err(failed(path, "resize"))?;
        disk.close().await?;
        return Ok((old, disk.chain.size()));
    }
    // Its tables may have to move, which is done while nobody has it open as a disk.
    disk.close().await?;
    let layer = disk.top();
    let data: Option<Rc<dyn Storage>> = match &layer.data {
        Some(data) => Some(data.storage.clone()),
        None => None,
    };
    let new = new.checked_next_multiple_of(512).context("a disk is smaller than 8 EiB")?;
    qcow2::resize(&layer.file.storage, data.as_ref(), new)
        .await
        .with_context(|| format!("cannot resize {}", path.display()))?;
    let below = disk.layers.get(1).map_or(0, |below| below.header.size()).min(new);
    let hidden = below.checked_sub(old).and_then(|len| Span::new(old, len)).filter(|span| !span.is_empty());
    drop((disk, data));
    if let Some(hidden) = hidden {
        hide(handle, asked, hidden).await?;
    }
    Ok((old, new))
}

/// Makes bytes of a disk zero that a longer image below would show.
async fn hide(handle: &Handle, asked: Asked<'_>, span: Span) -> anyhow::Result<()> {
    // Its files are free once the ring has had a turn.
    handle.turn().await;
    let disk = asked.open(handle).await?;
    let how = Zeroing { unmap: true, fast: false };
    disk.chain.zero(span, how).await.map_err(failed(asked.path, "zero what was added to"))?;
    disk.close().await
}
