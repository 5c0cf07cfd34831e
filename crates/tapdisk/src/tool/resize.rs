//! `tapdisk resize`: gives a disk another size.

use std::rc::Rc;

use anyhow::{Context, bail};
use block::Span;
use image::{Chain, Header, Settings, qcow2};
use runtime::Handle;
use storage::{Storage, Zeroing};

use super::disk::{Access, Asked, Disk, failed};
use crate::cli::tool::{NewSize, Resize};
use crate::size;

pub(super) async fn run(handle: &Handle, arguments: &Resize) -> anyhow::Result<()> {
    let path = &arguments.file;
    let asked = Asked::new(path, arguments.format, Access::Write, &arguments.places);
    let wanted = arguments.size;
    let (old, new) = resize(handle, asked, arguments.shrink, |old| match wanted {
        NewSize::Exactly(bytes) => Some(bytes),
        NewSize::More(bytes) => old.checked_add(bytes).filter(|sum| i64::try_from(*sum).is_ok()),
        NewSize::Less(bytes) => Some(old.saturating_sub(bytes)),
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
    if new == 0 {
        bail!("nothing would be left of {}, which has {}", path.display(), size::show(old));
    }
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
    let failed = || format!("cannot resize {}", path.display());
    let new = new.checked_next_multiple_of(512).context("a disk is smaller than 8 EiB")?;
    let file = &layer.file.storage;
    let below = disk.layers.get(1).map_or(0, |below| below.header.size()).min(new);
    let hidden = below.checked_sub(old).and_then(|len| Span::new(old, len)).filter(|span| !span.is_empty());
    match hidden {
        None => qcow2::resize(file, data.as_ref(), new).await.with_context(failed)?,
        Some(hidden) => {
            qcow2::reserve(file, data.as_ref(), new).await.with_context(failed)?;
            hide(handle, &disk, data, new, hidden).await.with_context(failed)?;
            qcow2::set_size(file, new).await.with_context(failed)?;
        }
    }
    Ok((old, new))
}

/// Makes bytes beyond the end of a disk zero that a longer image below would show, if the disk had so many bytes.
async fn hide(
    handle: &Handle,
    disk: &Disk,
    data: Option<Rc<dyn Storage>>,
    bytes: u64,
    hidden: Span,
) -> anyhow::Result<()> {
    let file = &disk.top().file.storage;
    let mut header = qcow2::Header::read(file).await?;
    header.size = bytes;
    let settings = Settings { writable: true, ..Settings::default() };
    let image = qcow2::Qcow2::open(handle, header, file.clone(), data, settings).await?;
    let chain = Chain::over(handle, Rc::new(image), disk.chain.below().to_vec());
    chain.zero(hidden, Zeroing { unmap: true, fast: false }).await?;
    Ok(chain.close().await?)
}
