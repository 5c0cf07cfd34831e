//! What tests of qcow2 share: images in memory, and `qemu-img` to make and judge them.

use std::collections::BTreeMap;
use std::path::Path;
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

/// One of how many states QEMU is asked about, unless `TESTS_LONG` is set: starting it takes most of a test's time.
pub(crate) fn one_of(seldom: usize, often: usize) -> usize {
    if is_long() { often } else { seldom }
}

/// Whether tests may take their time.
pub(crate) fn is_long() -> bool {
    std::env::var_os("TESTS_LONG").is_some()
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

/// Runs `qemu-img`; gives its exit code and what it printed.
pub(crate) fn qemu_img_says(arguments: &[&str]) -> (i32, String, String) {
    let output =
        Command::new("qemu-img").args(arguments).output().expect("qemu-img is installed (qemu-utils)");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// All bytes of a file.
pub(crate) fn bytes(file: &Rc<dyn Storage>) -> Vec<u8> {
    let buf = Buf::zeroed(file.size() as usize);
    now(file.read(0, buf.clone())).unwrap();
    buf.to_vec()
}

/// Puts a file's bytes where `qemu-img` finds them; zeroes are holes.
pub(crate) fn save(file: &Rc<dyn Storage>, path: &Path) {
    use std::os::unix::fs::FileExt;
    let to = std::fs::File::create(path).unwrap();
    to.set_len(file.size()).unwrap();
    for at in (0..file.size()).step_by(1 << 20) {
        let buf = Buf::zeroed((file.size() - at).min(1 << 20) as usize);
        now(file.read(at, buf.clone())).unwrap();
        let piece = buf.to_vec();
        if piece.iter().any(|byte| *byte != 0) {
            to.write_all_at(&piece, at).unwrap();
        }
    }
}

/// What `qemu-img info` says of an image, without what depends on the file's name.
pub(crate) fn info(path: &Path) -> serde_json::Value {
    let text = qemu_img(&["info", "-f", "qcow2", "--output=json", path.to_str().unwrap()]);
    let mut info: serde_json::Value = serde_json::from_str(&text).unwrap();
    for key in ["filename", "children", "actual-size", "full-backing-filename"] {
        info.as_object_mut().unwrap().remove(key);
    }
    info
}

/// What `qemu-img check` says of an image, by its keys; 0 where it says nothing. The exit code is `"code"`.
pub(crate) fn check(path: &Path) -> BTreeMap<String, u64> {
    let (code, out, error) =
        qemu_img_says(&["check", "-f", "qcow2", "--output=json", path.to_str().unwrap()]);
    let report: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{error}"));
    let numbers = report.as_object().unwrap().iter();
    let mut found: BTreeMap<String, u64> =
        numbers.filter_map(|(key, value)| Some((key.clone(), value.as_u64()?))).collect();
    found.insert("code".to_owned(), code as u64);
    found
}

/// Runs commands of `qemu-io` on an image; all have to succeed.
pub(crate) fn qemu_io(path: &Path, commands: &[&str]) {
    let mut command = Command::new("qemu-io");
    // Nobody cuts the power of this one.
    command.args(["-f", "qcow2", "-t", "unsafe"]);
    for text in commands {
        command.args(["-c", text]);
    }
    let output = command.arg(path).output().expect("qemu-io is installed (qemu-utils)");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !said.contains("failed"), "{commands:?}: {said}");
}

/// A file in memory with the bytes of one of the host's.
pub(crate) fn load(path: &Path) -> Rc<dyn Storage> {
    ram(&std::fs::read(path).unwrap())
}
