//! `tapdisk check`: looks for what makes no sense in an image.

use std::process::ExitCode;

use runtime::Handle;
use storage::file::Cache;

use super::disk::{self, Access};
use crate::cli::tool::Check;

/// An exit status, as that of qemu-img.
const NOTHING_TO_CHECK: u8 = 63;

pub(super) async fn run(handle: &Handle, arguments: &Check) -> anyhow::Result<ExitCode> {
    let path = &arguments.source.file;
    let access = if arguments.repair.is_some() { Access::Write } else { Access::Read };
    let disk = disk::open(handle, path, arguments.source.format, access, Cache::Buffered).await?;
    let format = disk.top().format;
    eprintln!("tapdisk: {}: there is nothing to check in a {format} image", path.display());
    Ok(ExitCode::from(NOTHING_TO_CHECK))
}
