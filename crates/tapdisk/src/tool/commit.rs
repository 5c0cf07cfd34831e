//! `tapdisk commit`: copies what an image holds into the one below it.

use anyhow::bail;
use runtime::Handle;
use storage::file::Cache;

use super::disk::{self, Access};
use crate::cli::tool::Commit;

pub(super) async fn run(handle: &Handle, arguments: &Commit) -> anyhow::Result<()> {
    let path = &arguments.file;
    let disk = disk::open(handle, path, arguments.format, Access::Read, Cache::Buffered).await?;
    bail!(
        "{} is a {} image with none below it: there is nowhere to copy it to",
        path.display(),
        disk.top().format
    );
}
