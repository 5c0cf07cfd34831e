//! A cpio archive as the kernel unpacks it into its first file system: the format "newc".
//!
//! Documentation/driver-api/early-userspace/buffer-format.rst has the format.

use anyhow::{Context, Result};
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// Writes all that is under `folder`, as root's, into one archive.
pub(crate) fn write(folder: &Path, into: &mut impl Write) -> Result<()> {
    let mut archive = Archive { into, number: 0 };
    archive.add_folder(folder, Path::new(""))?;
    archive.entry(Path::new("TRAILER!!!"), 0, &[])?;
    archive.into.flush().context("write an archive")
}

struct Archive<'a, W> {
    into: &'a mut W,
    /// The number of the last entry; two of one number would be taken for the same file.
    number: u32,
}

impl<W: Write> Archive<'_, W> {
    fn add_folder(&mut self, folder: &Path, name: &Path) -> Result<()> {
        let mut names = Vec::new();
        for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
            names.push(entry?.file_name());
        }
        names.sort();
        for file in names {
            let path = folder.join(&file);
            let name = name.join(&file);
            let about = fs::symlink_metadata(&path)?;
            let permissions = about.permissions().mode() & 0o7777;
            if about.is_dir() {
                self.entry(&name, FOLDER | permissions, &[])?;
                self.add_folder(&path, &name)?;
            } else if about.is_symlink() {
                self.entry(&name, LINK | 0o777, fs::read_link(&path)?.as_os_str().as_bytes())?;
            } else {
                let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
                self.entry(&name, FILE | permissions, &bytes)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, name: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
        let name = name.as_os_str().as_bytes();
        self.number += 1;
        let len = u32::try_from(bytes.len()).context("a file too large for the format")?;
        let name_len = u32::try_from(name.len() + 1)?;
        // Number, mode, user, group, links, time, length, device (2), device it is (2), length of the name, check.
        let fields = [self.number, mode, 0, 0, 1, 0, len, 0, 0, 0, 0, name_len, 0];
        let mut head = b"070701".to_vec();
        for field in fields {
            head.extend(format!("{field:08x}").bytes());
        }
        head.extend(name);
        head.push(0);
        // Names and contents end at a multiple of four bytes.
        head.resize(head.len().next_multiple_of(4), 0);
        self.into.write_all(&head)?;
        self.into.write_all(bytes)?;
        let padding = bytes.len().next_multiple_of(4) - bytes.len();
        self.into.write_all(&[0; 3][..padding]).context("write an archive")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What GNU cpio writes (`find . | cpio -o -H newc`) for one file `a` that holds `hello` and is not executable:
    /// the same but for number, time and device, which are set to ours.
    const HELLO: &str = "07070100000001000081a4000000000000000000000001000000000000000500000000000000000000000000000000\
                         0000000200000000a\0hello\0\0\0";

    #[test]
    fn a_file_is_written_as_cpio_writes_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "hello").unwrap();
        fs::set_permissions(folder.path().join("a"), fs::Permissions::from_mode(0o644)).unwrap();
        let mut archive = Vec::new();
        write(folder.path(), &mut archive).unwrap();
        assert_eq!(String::from_utf8_lossy(&archive[..HELLO.len()]), HELLO);
        assert_eq!(archive.len() % 4, 0);
        assert!(archive.ends_with(b"TRAILER!!!\0\0\0\0"));
    }
}
