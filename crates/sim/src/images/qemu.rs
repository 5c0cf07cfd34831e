//! QEMU's programs, asked about an image that a death has left, on real files.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};

use super::bytes::Bytes;
use super::subject::{Kind, Past, Subject};

/// What files are called, by their numbers: the images name each other so.
const NAMES: [&str; 4] = ["image", "data", "below", "middle"];

/// A folder that goes with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Folder, String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tapdisk-sim-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).map_err(|error| format!("make {}: {error}", path.display()))?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("sim: {} stays behind: {error}", self.0.display());
        }
    }
}

/// Lets QEMU check the image, if it knows how for its format, and read it. Gives the disk, if it is one that QEMU can read.
///
/// # Errors
/// The check finds more than wasted space; the image cannot be read.
pub(crate) fn ask(subject: &Subject, files: &[Bytes]) -> Result<Option<Vec<u8>>, String> {
    let Some(format) = format_of(subject) else { return Ok(None) };
    let folder = Folder::new()?;
    for (name, bytes) in NAMES.iter().zip(files) {
        let path = folder.0.join(name);
        std::fs::write(&path, bytes.to_vec())
            .map_err(|error| format!("write {}: {error}", path.display()))?;
    }
    if format == "qcow2" {
        let output = qemu_img(&folder.0, &["check", "-f", format, "image"])?;
        // Sound, or with leaks.
        if !matches!(output.status.code(), Some(0 | 3)) {
            return Err(format!("qemu-img check: {}", said(&output)));
        }
    }
    let output = qemu_img(&folder.0, &["convert", "-f", format, "-O", "raw", "image", "disk"])?;
    if !output.status.success() {
        return Err(format!("qemu-img convert: {}", said(&output)));
    }
    let disk = folder.0.join("disk");
    std::fs::read(&disk).map(Some).map_err(|error| format!("read {}: {error}", disk.display()))
}

/// QEMU's name for a format that it can read; it knows no VHD over another.
fn format_of(subject: &Subject) -> Option<&'static str> {
    let is_over_vhd = subject.below > 0 && subject.past == Past::Between(image::Format::Vhd);
    match &subject.kind {
        _ if is_over_vhd => None,
        Kind::Qcow2 { .. } => Some("qcow2"),
        Kind::Qcow { .. } => Some("qcow"),
        Kind::Vhd { .. } if subject.below == 0 => Some("vpc"),
        Kind::Vhd { .. } | Kind::Raw => None,
        #[cfg(test)]
        Kind::Toy(_) => None,
    }
}

fn qemu_img(folder: &Path, arguments: &[&str]) -> Result<Output, String> {
    let output = Command::new("qemu-img").current_dir(folder).args(arguments).output();
    output.map_err(|error| format!("qemu-img (of Debian's qemu-utils): {error}"))
}

fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    format!("{}: {}", output.status, String::from_utf8_lossy(&text))
}
