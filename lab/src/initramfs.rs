//! The first file system of a machine: our program, busybox, some tools of Debian's, and modules of the kernel.

use crate::archive;
use crate::command::output;
use crate::kernel::Kernel;
use crate::packages::Tree;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// The packages that all this, and QEMU, come from.
pub const PACKAGES: &[&str] =
    &["busybox-static", "e2fsprogs", "fdisk", "qemu-system-x86", "util-linux", "xz-utils", "zstd"];

/// Programs of Debian's that busybox has not, or has weaker ones of.
const TOOLS: &[&str] =
    &["sbin/mke2fs", "sbin/e2fsck", "sbin/sfdisk", "sbin/fstrim", "sbin/blkdiscard", "sbin/blockdev"];

/// What a guest with virtio disks needs of its kernel.
const MODULES: &[&str] = &["virtio_pci", "virtio_console", "virtio_blk", "crc32c_generic", "ext4"];

/// The files of a machine's root, in a folder of the host.
pub struct Root {
    folder: PathBuf,
    scratch: PathBuf,
}

impl Root {
    /// Puts them together under `folder`, anew.
    pub fn make(folder: &Path, tools: &Tree, guest: &Path) -> Result<Root> {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("remove {}", folder.display()))?;
        }
        let root = Root { folder: folder.join("root"), scratch: folder.join("scratch") };
        let inside =
            ["bin", "dev", "disk", "etc", "lib/x86_64-linux-gnu", "lib64", "mnt", "proc", "run", "sbin"];
        for name in inside.into_iter().chain(["sys", "tmp"]) {
            fs::create_dir_all(root.folder.join(name))?;
        }
        fs::create_dir_all(&root.scratch)?;
        root.put(guest, "init")?;
        symlink("../init", root.folder.join("bin/guest"))?;
        root.put(&tools.path("bin/busybox"), "bin/busybox")?;
        let applets = output(std::process::Command::new(tools.path("bin/busybox")).arg("--list"))?;
        for applet in applets.lines().filter(|applet| *applet != "busybox") {
            symlink("busybox", root.folder.join("bin").join(applet))?;
        }
        root.put(&tools.linker_file(), "lib64/ld-linux-x86-64.so.2")?;
        for tool in TOOLS {
            root.put(&tools.path(tool), tool)?;
            for library in tools.libraries_of(tool)? {
                let name = library.file_name().context("a library without a name")?;
                root.put(&library, &format!("lib/x86_64-linux-gnu/{}", name.to_string_lossy()))?;
            }
        }
        root.put(&tools.path("etc/mke2fs.conf"), "etc/mke2fs.conf")?;
        Ok(root)
    }

    fn put(&self, file: &Path, inside: &str) -> Result<()> {
        let path = self.folder.join(inside);
        fs::copy(file, &path).with_context(|| format!("copy {}", file.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// The archive that the kernel unpacks into memory at its start.
    pub fn initramfs(&self, kernel: &Kernel, tools: &Tree) -> Result<PathBuf> {
        let modules = self.scratch.join("initramfs");
        if modules.exists() {
            fs::remove_dir_all(&modules)?;
        }
        fs::create_dir_all(modules.join("modules"))?;
        for (number, (name, bytes)) in kernel.modules(MODULES, tools, &self.scratch)?.iter().enumerate() {
            fs::write(modules.join(format!("modules/{number:02}-{name}.ko")), bytes)?;
        }
        let path = self.scratch.join(format!("initramfs-{}", kernel.release));
        let mut file = BufWriter::new(File::create(&path)?);
        // One archive may follow another.
        archive::write(&self.folder, &mut file)?;
        archive::write(&modules, &mut file)?;
        Ok(path)
    }

    /// The same on an ext4 of a disk that a machine can have as its root.
    pub fn disk(&self, image: &Path, len: u64, tools: &Tree) -> Result<()> {
        File::create(image)?.set_len(len)?;
        let mut mke2fs = tools.command("sbin/mke2fs");
        mke2fs.env("MKE2FS_CONFIG", tools.path("etc/mke2fs.conf"));
        mke2fs.args(["-q", "-t", "ext4", "-d"]).arg(&self.folder).arg(image);
        output(&mut mke2fs).map(drop).context("make a root file system")
    }
}
