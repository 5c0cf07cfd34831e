//! A format under trial.

use std::rc::Rc;

use block::Buf;
use runtime::{BoxFuture, Handle};
use storage::{Ram, Storage};

use crate::{Chain, Image, ImageError, Raw, Repair, Report, Settings};

/// What comes of trying to open an image.
pub(super) type Tried<'a, T> = BoxFuture<'a, Result<T, ImageError>>;

/// A format.
pub(super) trait Subject {
    /// Its name.
    fn name(&self) -> &'static str;

    /// A sound image with some content. The same options give the same bytes, and none of them is [`POISON`].
    fn base(&self, options: u8) -> Vec<u8>;

    /// Where its metadata is: bytes of the file, of words that are worth damaging.
    fn words(&self, base: &[u8]) -> Vec<usize>;

    /// Sets the checksums right.
    fn seal(&self, bytes: &mut [u8]);

    /// Whether what a guest writes is where it must never get to: in what says where other files are.
    fn is_breached(&self, head: &[u8], tail: &[u8], mark: &[u8]) -> bool;

    /// Whether what a damaged image has beyond the end of its disk never shows when the disk grows. In a sound one there is
    /// nothing.
    fn clears_what_is_beyond(&self) -> bool;

    /// Whether there is an image below.
    fn has_backing<'a>(&'a self, file: &'a Rc<dyn Storage>) -> Tried<'a, bool>;

    /// Opens it.
    fn open<'a>(
        &'a self,
        handle: &'a Handle,
        file: &'a Rc<dyn Storage>,
        settings: Settings,
    ) -> Tried<'a, Rc<dyn Image>>;

    /// Checks it.
    fn check<'a>(&'a self, file: &'a Rc<dyn Storage>, repair: Repair) -> Tried<'a, Report>;
}

/// What fresh memory is full of in debug builds (`block::Pool`). No byte of an image is this, so that it can be told.
pub(super) const POISON: u8 = 0xa5;

/// The big-endian number of 4 bytes there; 0 if they are not.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |word| u32::from_be_bytes(*word))
}

/// The big-endian number of 8 bytes there; 0 if they are not.
pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |word| u64::from_be_bytes(*word))
}

/// Writes something to a sound image, which is as large as [`SIZE`], and closes it.
pub(super) async fn fill(handle: &Handle, image: Rc<dyn Image>) {
    let below: Vec<Rc<dyn Image>> = vec![Rc::new(Raw::new(Rc::new(Ram::new(0))))];
    let disk = Chain::over(handle, image, below);
    for (at, len, byte) in
        [(0, 5000, 0x11), (70_000, 9000, 0x22), (200_000, 100, 0x33), (SIZE - 1032, 1032, 0x44)]
    {
        let buf = Buf::zeroed(len);
        buf.fill(byte);
        disk.write(at, buf).await.expect("memory never fails");
    }
    disk.close().await.expect("memory never fails");
}

/// All bytes of a file.
pub(super) async fn whole(file: &dyn Storage) -> Vec<u8> {
    let buf = Buf::zeroed(file.size() as usize);
    file.read(0, buf.clone()).await.expect("memory never fails");
    buf.to_vec()
}

/// Bytes of the disks: no multiple of any usual cluster.
pub(super) const SIZE: u64 = 300_032;
