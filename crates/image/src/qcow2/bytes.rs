//! Numbers and runs of bytes of an image's file.

use std::rc::Rc;

use block::{Buf, Errno, Error, Result};
use storage::Storage;

/// The big-endian number of 4 bytes at byte `at`, if they are there.
pub(super) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let part = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(part.try_into().expect("four bytes")))
}

/// The big-endian number of 8 bytes at byte `at`, if they are there.
pub(super) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    let part = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(part.try_into().expect("eight bytes")))
}

/// Reads `len` bytes from byte `at` on. What lies beyond the end of the file reads as zero, as with QEMU: the last cluster of
/// an image need not be there as a whole.
pub(super) async fn read(file: &Rc<dyn Storage>, at: u64, len: usize) -> Result<Vec<u8>> {
    let there = file.size().saturating_sub(at).min(len as u64) as usize;
    let mut bytes = vec![0; len];
    if there > 0 {
        let buf = Buf::zeroed(there);
        file.read(at, buf.clone()).await?;
        buf.get(0, &mut bytes[..there]);
    }
    Ok(bytes)
}

/// Writes bytes from byte `at` on. A file that ends before their end is made larger.
pub(super) async fn write(file: &Rc<dyn Storage>, at: u64, bytes: &[u8]) -> Result<()> {
    extend(file, end(at, bytes.len() as u64)?).await?;
    file.write(at, Buf::from_bytes(bytes)).await
}

/// Makes the file at least this many bytes large.
pub(super) async fn extend(file: &Rc<dyn Storage>, bytes: u64) -> Result<()> {
    if file.size() < bytes { file.resize(bytes).await } else { Ok(()) }
}

/// The byte after `len` bytes from `at` on; EFBIG where no file reaches so far.
pub(super) fn end(at: u64, len: u64) -> Result<u64> {
    match block::Span::new(at, len) {
        Some(span) => Ok(span.end()),
        None => Err(Error::new(Errno::EFBIG, format!("reach byte {at}+{len} of a file"))),
    }
}
