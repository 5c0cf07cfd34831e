//! What tests of qcow share: images in memory and on disk, disks of them, and QEMU's programs to make and judge them.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use block::{Buf, Pool, Result};
use image::qcow::{Create, Header, Qcow, create};
use image::{Chain, Image, ImageError, Raw, Settings};
use runtime::{Handle, RingFlags, Runtime, Uring};
use storage::{Ram, Storage};

/// Runs a test on a thread of its own kind.
pub(crate) fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Handle) -> F) {
    let pool = Pool::new(1 << 20);
    let uring = Uring::open(RingFlags::Auto, &pool).unwrap();
    let runtime = Runtime::new(Box::new(uring), pool);
    runtime.block_on(test(runtime.handle().clone()));
}

/// A file of these bytes.
pub(crate) async fn ram(bytes: &[u8]) -> Rc<dyn Storage> {
    let ram = Ram::new(bytes.len() as u64);
    ram.write(0, Buf::from_bytes(bytes)).await.unwrap();
    Rc::new(ram)
}

/// An empty image.
pub(crate) async fn made(options: Create) -> Rc<dyn Storage> {
    let file: Rc<dyn Storage> = Rc::new(Ram::new(0));
    create(&file, &options).await.unwrap();
    file
}

/// All bytes of a storage.
pub(crate) async fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    read(storage, 0, storage.size() as usize).await.unwrap()
}

/// Bytes of a storage.
pub(crate) async fn read(storage: &dyn Storage, at: u64, len: usize) -> Result<Vec<u8>> {
    let buf = Buf::zeroed(len);
    buf.fill(0xa5);
    if len > 0 {
        storage.read(at, buf.clone()).await?;
    }
    Ok(buf.to_vec())
}

/// Writes one byte many times.
pub(crate) async fn fill(storage: &dyn Storage, at: u64, len: usize, byte: u8) -> Result<()> {
    let buf = Buf::zeroed(len);
    buf.fill(byte);
    storage.write(at, buf).await
}

/// The disk in an image, to be written.
pub(crate) async fn disk(handle: &Handle, file: &Rc<dyn Storage>) -> Chain {
    disk_over(handle, file, None).await
}

/// The disk in an image, over plain bytes if there are any.
pub(crate) async fn disk_over(handle: &Handle, file: &Rc<dyn Storage>, below: Option<&[u8]>) -> Chain {
    let settings = Settings { writable: true, ..Settings::default() };
    let top = open(handle, file, settings).await.unwrap();
    let below = match below {
        Some(bytes) => vec![Rc::new(Raw::new(ram(bytes).await)) as Rc<dyn Image>],
        None => Vec::new(),
    };
    Chain::over(handle, Rc::new(top), below)
}

/// Opens an image.
pub(crate) async fn open(
    handle: &Handle,
    file: &Rc<dyn Storage>,
    settings: Settings,
) -> std::result::Result<Qcow, ImageError> {
    let header = Header::read(file).await?;
    Qcow::open(handle, header, file.clone(), settings).await
}

/// A folder that is gone afterwards.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a program of QEMU's, which has to succeed; gives what it printed.
pub(crate) fn qemu(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("qemu-utils is installed");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// What QEMU reads from an image of this format.
pub(crate) fn qemu_reads(path: &Path, format: &str) -> Vec<u8> {
    let raw = path.with_extension("as-raw");
    qemu("qemu-img", &["convert", "-f", format, "-O", "raw", text(path), text(&raw)]);
    std::fs::read(raw).unwrap()
}

/// Bytes that do not repeat soon and compress well.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = storage::conformance::Random(seed);
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let (byte, count) = (random.draw() as u8, 1 + random.below(200) as usize);
        bytes.extend(std::iter::repeat_n(byte, count.min(len - bytes.len())));
    }
    bytes
}
