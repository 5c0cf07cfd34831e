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
use std::process::Command;

/// The packages that all this, and QEMU, come from.
pub const PACKAGES: &[&str] =
    &["busybox-static", "e2fsprogs", "fdisk", "qemu-system-x86", "util-linux", "xz-utils", "zstd"];

/// Programs of Debian's that busybox has not, or has weaker ones of.
const TOOLS: &[&str] =
    &["sbin/mke2fs", "sbin/e2fsck", "sbin/sfdisk", "sbin/fstrim", "sbin/blkdiscard", "sbin/blockdev"];

/// What a guest with virtio disks needs of its kernel.
pub const VIRTIO_MODULES: &[&str] = &["virtio_pci", "virtio_console", "virtio_blk", "crc32c_generic", "ext4"];

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
        let applets = output(Command::new(tools.path("bin/busybox")).arg("--list"))?;
        for applet in applets.lines().filter(|applet| *applet != "busybox") {
            symlink("busybox", root.folder.join("bin").join(applet))?;
        }
        root.put(&tools.linker_file(), "lib64/ld-linux-x86-64.so.2")?;
        root.add_programs(tools, TOOLS)?;
        root.put(&tools.path("etc/mke2fs.conf"), "etc/mke2fs.conf")?;
        Ok(root)
    }

    /// Programs of a tree, where they lie in it, and the libraries they need.
    pub fn add_programs(&self, tree: &Tree, programs: &[&str]) -> Result<()> {
        for program in programs {
            self.put(&tree.path(program), program)?;
            for library in tree.libraries_of(program)? {
                let name = library.file_name().context("a library without a name")?;
                self.put(&library, &format!("lib/x86_64-linux-gnu/{}", name.to_string_lossy()))?;
            }
        }
        Ok(())
    }

    /// A program of this computer's, as `bin/NAME`, with its own libraries and their own linker: it need not be of the
    /// same release as the rest.
    pub fn add_foreign(&self, program: &Path) -> Result<()> {
        let name = program.file_name().context("a program without a name")?.to_string_lossy().into_owned();
        let folder = format!("foreign/{name}");
        self.put(program, &format!("{folder}/{name}"))?;
        let list = output(Command::new("ldd").arg(program))?;
        // `libc.so.6 => /lib/libc.so.6 (0x…)`, and the linker by its path alone.
        let paths = list.split_whitespace().filter(|word| word.starts_with('/'));
        let mut linker = None;
        for path in paths.map(Path::new) {
            let file = path.file_name().context("a library without a name")?.to_string_lossy().into_owned();
            if file.starts_with("ld-linux") {
                linker = Some(file.clone());
            }
            self.put(path, &format!("{folder}/{file}"))?;
        }
        let linker = linker.with_context(|| format!("{} names no dynamic linker", program.display()))?;
        let start =
            format!("#!/bin/sh\nexec /{folder}/{linker} --library-path /{folder} /{folder}/{name} \"$@\"\n");
        self.write(&format!("bin/{name}"), start.as_bytes())
    }

    /// A file with these contents.
    pub fn write(&self, inside: &str, bytes: &[u8]) -> Result<()> {
        let path = self.folder.join(inside);
        fs::create_dir_all(path.parent().context("a file without a folder")?)?;
        fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// A file of the host, at this place.
    pub fn put(&self, file: &Path, inside: &str) -> Result<()> {
        let path = self.folder.join(inside);
        fs::create_dir_all(path.parent().context("a file without a folder")?)?;
        fs::copy(file, &path).with_context(|| format!("copy {}", file.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// The archive that the kernel unpacks into memory at its start, with modules of these names.
    pub fn initramfs(&self, name: &str, kernel: &Kernel, names: &[&str], tools: &Tree) -> Result<PathBuf> {
        let modules = self.scratch.join("initramfs");
        if modules.exists() {
            fs::remove_dir_all(&modules)?;
        }
        fs::create_dir_all(modules.join("modules"))?;
        for (number, (name, bytes)) in kernel.modules(names, tools, &self.scratch)?.iter().enumerate() {
            fs::write(modules.join(format!("modules/{number:02}-{name}.ko")), bytes)?;
        }
        let path = self.scratch.join(format!("initramfs-{name}-{}", kernel.release));
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
