//! `tapdisk snapshot`: the snapshots within an image.

use anyhow::bail;
use runtime::Handle;
use storage::file::Cache;

use super::disk::{self, Access};
use crate::cli::tool::Snapshot;

pub(super) async fn run(handle: &Handle, arguments: &Snapshot) -> anyhow::Result<()> {
    let path = &arguments.file;
    let disk = disk::open(handle, path, arguments.format, Access::Read, Cache::Buffered).await?;
    bail!("{} is a {} image, which has no snapshots within", path.display(), disk.top().format);
}
