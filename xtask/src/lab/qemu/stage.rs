//! All that is the same for each boot: QEMU, the kernel, the first file system, folders for images, sockets and logs.

use crate::command::target;
use crate::lab::qemu::{Linux, Qemu};
use crate::sweep;
use crate::work::Work;
use anyhow::{Context, Result};
use lab::initramfs::{PACKAGES, Root, VIRTIO_MODULES};
use lab::kernel::Kernel;
use lab::packages::{Packages, Suite, Tree};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// What boots are made from.
pub(crate) struct Stage {
    pub(crate) arguments: Qemu,
    pub(crate) tools: Tree,
    kernels: Vec<(Linux, Bootable)>,
    pub(crate) root: Root,
    pub(crate) work: Work,
    sockets: TempDir,
    logs: PathBuf,
}

/// A kernel and the first file system for it.
pub(crate) struct Bootable {
    pub(crate) kernel: Kernel,
    pub(crate) initramfs: PathBuf,
}

impl Stage {
    pub(crate) fn set(arguments: &Qemu) -> Result<Stage> {
        let packages = Packages::new(&target()?.join("lab-packages"));
        let tools = packages.with_dependencies("tools", Suite::Backports, PACKAGES)?;
        let guest = lab::guest::build().context("build the program of the guest")?;
        let work = Work::open()?;
        work.require_room()?;
        let root = Root::make(&work.folder().join("guest"), &tools, &guest)?;
        let mut kernels = Vec::new();
        for linux in arguments.kernels() {
            let suite = linux.suite();
            let tree = packages.kernel(&format!("linux-of-{}", suite.name()), suite)?;
            let kernel = Kernel::open(&tree, &tools)?;
            let initramfs = root.initramfs("linux", &kernel, VIRTIO_MODULES, &tools)?;
            kernels.push((linux, Bootable { kernel, initramfs }));
        }
        let logs = target()?.join("lab-logs/qemu");
        if logs.exists() {
            fs::remove_dir_all(&logs).with_context(|| format!("remove {}", logs.display()))?;
        }
        // A socket's path has 107 bytes at most, and the target folder's may be longer than that.
        let sockets = tempfile::Builder::new().prefix(sweep::SOCKETS).tempdir();
        let sockets = sockets.context("make a folder for sockets")?;
        symlink(sockets.path(), work.folder().join("sockets"))?;
        println!("     logs are kept in {}", logs.display());
        Ok(Stage { arguments: arguments.clone(), tools, kernels, root, work, sockets, logs })
    }

    /// What boots this kernel.
    pub(crate) fn bootable(&self, wanted: Linux) -> Result<&Bootable> {
        let found = self.kernels.iter().find(|(linux, _)| *linux == wanted);
        Ok(&found.with_context(|| format!("{wanted:?} was not made ready"))?.1)
    }

    /// The folder for sockets.
    pub(crate) fn sockets(&self) -> &Path {
        self.sockets.path()
    }

    /// A folder for a boot's logs, which outlives the run.
    pub(crate) fn logs(&self, boot: &str) -> Result<PathBuf> {
        let folder = self.logs.join(boot);
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        Ok(folder)
    }
}
