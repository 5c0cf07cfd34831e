//! A kernel of Debian's: its image as QEMU starts it fastest, and its modules in the order they can be loaded.

use crate::command;
use crate::packages::Tree;
use anyhow::{Context, Result, bail, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// A kernel, unpacked.
pub struct Kernel {
    /// The kernel as an ELF file: software emulation need not unpack it at each boot.
    pub vmlinux: PathBuf,
    /// As `uname -r` says it.
    pub release: String,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Kernel {
    /// From a tree that holds one kernel's package; `tools` has the programs that unpack it.
    pub fn open(tree: &Tree, tools: &Tree) -> Result<Kernel> {
        let folder = tree.path("lib/modules");
        let mut releases = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
        let release = releases.next().context("a kernel's package without modules")??.file_name();
        let release = release.into_string().ok().context("a release with strange letters")?;
        let vmlinux = tree.path("vmlinux");
        if !vmlinux.exists() {
            let image = fs::read(tree.path(&format!("boot/vmlinuz-{release}"))).context("read the kernel")?;
            unpack(payload(&image)?, tools, &vmlinux).context("unpack the kernel")?;
        }
        let mut files = BTreeMap::new();
        gather(&folder.join(&release), &mut files)?;
        let builtin = fs::read_to_string(folder.join(&release).join("modules.builtin"))?;
        let builtin = builtin.lines().filter_map(|path| Some(module_name(Path::new(path))?.0)).collect();
        Ok(Kernel { vmlinux, release, files, builtin })
    }

    /// The modules of these names and all that they need, each after those it needs.
    pub fn modules(&self, names: &[&str], tools: &Tree, scratch: &Path) -> Result<Vec<(String, Vec<u8>)>> {
        let mut modules = Vec::new();
        for name in names {
            self.add(name, tools, scratch, &mut modules)?;
        }
        Ok(modules)
    }

    fn add(
        &self,
        name: &str,
        tools: &Tree,
        scratch: &Path,
        modules: &mut Vec<(String, Vec<u8>)>,
    ) -> Result<()> {
        let is_there = modules.iter().any(|(there, _)| there == name);
        if is_there || self.builtin.contains(name) {
            return Ok(());
        }
        let file =
            self.files.get(name).with_context(|| format!("kernel {} has no module {name}", self.release))?;
        let mut bytes = fs::read(file)?;
        if file.extension().is_some_and(|extension| extension != "ko") {
            let plain = scratch.join("module.ko");
            unpack(&bytes, tools, &plain).with_context(|| format!("unpack {}", file.display()))?;
            bytes = fs::read(&plain)?;
        }
        for needed in needs(&bytes) {
            self.add(&needed, tools, scratch, modules)?;
        }
        modules.push((name.to_owned(), bytes));
        Ok(())
    }
}

/// All modules under a folder, by name.
fn gather(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            gather(&path, files)?;
        } else if let Some((name, _)) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// The name of a module by its file, and how the file is packed: `virtio_blk.ko.xz`. The kernel makes no difference
/// between `-` and `_`.
fn module_name(path: &Path) -> Option<(String, String)> {
    let (name, packing) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some((name.replace('-', "_"), packing.to_owned()))
}

/// What a module says it needs: `depends=a,b` among the strings of its section .modinfo.
fn needs(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|window| window == key) else { return Vec::new() };
    let value = module[at + key.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// The packed kernel within a bzImage: Documentation/arch/x86/boot.rst, `payload_offset` and `payload_length`.
fn payload(image: &[u8]) -> Result<&[u8]> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("the kernel's file is cut short")?;
        Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
    };
    ensure!(image.get(0x202..0x206) == Some(b"HdrS"), "no bzImage: the magic of its header is missing");
    let setup_sectors = match image[0x1f1] {
        0 => 4,
        count => usize::from(count),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    // The last four bytes are the unpacked size, which is no part of the packed stream.
    let end = start + word(0x24c)?.checked_sub(4).context("an empty kernel")?;
    image.get(start..end).context("the kernel's payload lies outside of its file")
}

/// Unpacks with the program that its first bytes call for.
fn unpack(packed: &[u8], tools: &Tree, into: &Path) -> Result<()> {
    let program = match packed {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => "usr/bin/xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "usr/bin/zstd",
        _ => bail!("neither xz nor zstd: it starts with {:02x?}", &packed[..packed.len().min(8)]),
    };
    let source = into.with_extension("packed");
    let fresh = into.with_extension("new");
    fs::write(&source, packed)?;
    let mut command = tools.command(program);
    command.arg("-dc").stdin(File::open(&source)?).stdout(File::create(&fresh)?).stderr(Stdio::inherit());
    let status = command::start(&mut command)?.wait()?;
    ensure!(status.success(), "`{}` failed: {status}", command::words(&command));
    fs::remove_file(&source)?;
    fs::rename(&fresh, into).context("put what was unpacked in its place")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_needs() {
        let module = b"\x7fELF\0license=GPL\0depends=virtio-ring,crc16\0name=ext4\0";
        assert_eq!(needs(module), ["virtio_ring", "crc16"]);
        assert!(needs(b"license=GPL\0depends=\0name=virtio\0").is_empty());
    }

    #[test]
    fn a_modules_file_may_be_packed() {
        let name = |path: &str| module_name(Path::new(path)).map(|(name, _)| name);
        assert_eq!(name("/a/b/virtio-blk.ko.xz").as_deref(), Some("virtio_blk"));
        assert_eq!(name("kernel/fs/ext4/ext4.ko").as_deref(), Some("ext4"));
        assert_eq!(name("modules.dep"), None);
    }

    #[test]
    fn the_payload_is_found_by_the_header() {
        let mut image = vec![0; 8192];
        image[0x1f1] = 3;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&9u32.to_le_bytes());
        image[2064..2069].copy_from_slice(b"zImag");
        assert_eq!(payload(&image).unwrap(), b"zImag");
        image[0x24c..0x250].copy_from_slice(&90_000u32.to_le_bytes());
        assert!(payload(&image).is_err());
    }
}
