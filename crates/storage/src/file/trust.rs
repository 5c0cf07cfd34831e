//! Whether the ring can be trusted with this file: that what follows a short count lands where it belongs.
//!
//! The ring may go on by itself after a short count. Where the layers below it disagree about where that is, bytes would
//! be misplaced and called a success, which nobody above can see. So on file systems whose answers come from a process
//! (FUSE), where a short count is nothing unusual, we look once, when the image is opened.

use runtime::Handle;

use super::{OpenError, Opened};

/// `FUSE_SUPER_MAGIC` of statfs(2).
const FUSE: u64 = 0x6573_5546;

/// Makes sure that short transfers go on where they stopped.
///
/// # Errors
/// If they do not: such a file cannot be served truthfully.
pub async fn check_short_transfers(handle: &Handle, opened: &Opened) -> Result<(), OpenError> {
    if !is_fuse(&opened.file) || goes_on_rightly(handle, opened).await {
        return Ok(());
    }
    Err(OpenError::Misplaced(opened.path.clone()))
}

fn is_fuse(file: &std::fs::File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|found| found.f_type as u64 == FUSE)
}

/// Reads over the end of the file, which is a short count: whoever goes on rightly finds nothing more there.
async fn goes_on_rightly(handle: &Handle, opened: &Opened) -> bool {
    let align = u64::from(opened.align);
    let end = opened.size - opened.size % align;
    // A file of less than a block has no direct I/O, and what cannot be read fails later as it does now.
    let (Some(at), Ok(file)) = (end.checked_sub(align), opened.file.try_clone()) else { return true };
    let fd = handle.register(file.into());
    let buf = handle.pool().take(2 * align as usize);
    handle.read(&fd, at, &buf).await.map_or(true, |count| count <= opened.size - at)
}
