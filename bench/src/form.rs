//! The form of an image that is not raw: its format, what it holds at first, and what lies below it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cell::{Cell, Direction};
use crate::image;

/// Bytes of the disk of a thin image: so many that first writes do not run out of places.
const THIN_SIZE: u64 = 64 << 30;

/// How an image is made for a measurement, with `qemu-img`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    /// As QEMU calls the format.
    pub(crate) driver: &'static str,
    /// Nothing is in it: each write is the first to its place, or nearly each.
    pub(crate) thin: bool,
    /// How many empty images lie over the one that holds the bytes.
    pub(crate) overlays: usize,
}

impl Form {
    /// Bytes of the disk.
    pub(crate) fn size(self) -> u64 {
        if self.thin { THIN_SIZE } else { image::SIZE }
    }

    /// The path of the image that is served.
    pub(crate) fn path(self, raw: &Path) -> PathBuf {
        let base = self.base(raw);
        if self.overlays == 0 { base } else { overlay(&base, self.overlays) }
    }

    fn base(self, raw: &Path) -> PathBuf {
        raw.with_file_name(format!(
            "{}{}.{}",
            if self.thin { "thin" } else { "full" },
            self.overlays,
            self.driver
        ))
    }

    /// Whether a cell can be measured: from a thin image there is nothing to read.
    pub(crate) fn has(self, cell: &Cell) -> bool {
        !self.thin || cell.direction == Direction::Write
    }

    /// Makes the images from the raw one, which is stamped; what a measurement has changed is made anew. It ends with a
    /// quiet disk and an empty page cache.
    pub(crate) fn prepare(self, raw: &Path) -> Result<()> {
        let base = self.base(raw);
        let size = self.size().to_string();
        if self.thin {
            // CHS geometry would round the size of a VHD.
            let options: &[&str] = if self.driver == "vpc" { &["-o", "force_size=on"] } else { &[] };
            qemu_img(
                Command::new("qemu-img")
                    .args(["create", "-q", "-f", self.driver])
                    .args(options)
                    .arg(&base)
                    .arg(size),
            )?;
        } else if !base.exists() {
            let options: &[&str] = if self.driver == "vpc" { &["-o", "force_size=on"] } else { &[] };
            let mut command = Command::new("qemu-img");
            command.args(["convert", "-f", "raw", "-O", self.driver]).args(options).arg(raw).arg(&base);
            qemu_img(&mut command)?;
        }
        let mut below = base.clone();
        for number in 1..=self.overlays {
            let path = overlay(&base, number);
            if number == self.overlays || !path.exists() {
                let mut command = Command::new("qemu-img");
                command
                    .args(["create", "-q", "-f", self.driver, "-F", self.driver, "-b"])
                    .arg(&below)
                    .arg(&path);
                qemu_img(&mut command)?;
            }
            below = path;
        }
        for path in self.paths(raw) {
            image::settle(&path, false)?;
        }
        Ok(())
    }

    fn paths(self, raw: &Path) -> Vec<PathBuf> {
        let base = self.base(raw);
        let overlays = (1..=self.overlays).map(|number| overlay(&base, number));
        std::iter::once(base.clone()).chain(overlays).collect()
    }

    /// Removes the images.
    pub(crate) fn remove(self, raw: &Path) -> Result<()> {
        for path in self.paths(raw).iter().filter(|path| path.exists()) {
            std::fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
        }
        Ok(())
    }
}

fn overlay(base: &Path, number: usize) -> PathBuf {
    base.with_extension(format!("over{number}"))
}

fn qemu_img(command: &mut Command) -> Result<()> {
    let output = command.output().context("start qemu-img")?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
