//! What tests of qcow2 share: images in memory, and `qemu-img` to make and judge them.

use std::process::Command;
use std::rc::Rc;

use block::Buf;
use storage::{Ram, Storage};

/// The result of what never waits: memory.
pub(crate) fn now<T>(io: impl Future<Output = T>) -> T {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(io).as_mut().poll(&mut cx) {
        std::task::Poll::Ready(result) => result,
        std::task::Poll::Pending => panic!("memory never waits"),
    }
}

/// A file of these bytes.
pub(crate) fn ram(bytes: &[u8]) -> Rc<dyn Storage> {
    let ram = Ram::new(bytes.len() as u64);
    now(ram.write(0, Buf::from_bytes(bytes))).unwrap();
    Rc::new(ram)
}

/// A folder that is gone afterwards.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Runs `qemu-img`, which has to succeed; gives what it printed.
pub(crate) fn qemu_img(arguments: &[&str]) -> String {
    let output =
        Command::new("qemu-img").args(arguments).output().expect("qemu-img is installed (qemu-utils)");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
