//! `tapdisk resize`: gives a disk another size.

use anyhow::{Context, bail};
use runtime::Handle;
use storage::Storage;

use super::disk::{Access, Asked, failed};
use crate::cli::tool::{NewSize, Resize};
use crate::size;

pub(super) async fn run(handle: &Handle, arguments: &Resize) -> anyhow::Result<()> {
    let path = &arguments.file;
    let disk = Asked::new(path, arguments.format, Access::Write, &arguments.places).open(handle).await?;
    let old = disk.chain.size();
    let new = match arguments.size {
        NewSize::Exactly(bytes) => bytes,
        NewSize::More(bytes) => old
            .checked_add(bytes)
            .filter(|sum| i64::try_from(*sum).is_ok())
            .with_context(|| format!("{} would be larger than any disk (8 EiB)", path.display()))?,
    };
    if new < old && !arguments.shrink {
        bail!(
            "{} has {}: making it smaller loses what is beyond its new end. `--shrink` does it all the same",
            path.display(),
            size::show(old)
        );
    }
    disk.chain.resize(new).await.map_err(failed(path, "resize"))?;
    disk.close().await?;
    let (old, new) = (size::show(old), size::show(disk.chain.size()));
    crate::print(format!("Resized {}: from {old} to {new}\n", path.display()).as_bytes())
}
