//! `tapdisk rebase`: puts an image over another one than before.

use anyhow::bail;
use runtime::Handle;
use storage::file::Cache;

use super::disk::{self, Access};
use crate::cli::tool::Rebase;

pub(super) async fn run(handle: &Handle, arguments: &Rebase) -> anyhow::Result<()> {
    let path = &arguments.file;
    let disk = disk::open(handle, path, arguments.format, Access::Read, Cache::Buffered).await?;
    bail!("{} is a {} image, which can have none below it", path.display(), disk.top().format);
}
