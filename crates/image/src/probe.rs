//! What a file says of its format: its name, and its first and last bytes.
//!
//! A guest writes what it likes into its disk, a header of another format too, and whoever believed that would open the files
//! that it names. So a file is never taken for what it looks like where its name says that it is raw, and never for
//! raw where nothing says so: a raw disk is one that is called so, and it stays one whatever it holds.
//!
//! The first bytes of a fixed VHD are its guest's too, and the last ones of a qcow2 image may be: where the two ends are of
//! different formats, neither is believed. What is called .vhd is a VHD, then, or nothing.

use std::fmt;
use std::path::Path;
use std::rc::Rc;

use block::{Buf, Result, Span};
use storage::Storage;

use crate::{Format, qcow, qcow2, vhd};

/// Bytes at the beginning of a file that tell its format.
const HEAD: u64 = 1024;
/// Bytes at its end that do.
const TAIL: u64 = 512;

/// What a file looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// An image of this format.
    Of(Format),
    /// An image of one that is not known here, but has a name.
    Foreign(&'static str),
    /// No image of any kind: a raw disk, or something else.
    Nothing,
    /// It begins like an image of this format, and by its end or its name it is a VHD: a guest may have written one of them.
    Unclear(Format),
}

/// To be read after the name of a file.
impl fmt::Display for Look {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Look::Of(format) => write!(formatter, "begins like an image of the format {format}"),
            Look::Foreign(name) => {
                write!(formatter, "begins like an image of the format {name}, which is not known here")
            }
            Look::Unclear(format) => write!(
                formatter,
                "begins like an image of the format {format}, but by its end or its name it is a VHD, and a guest may have \
                 written one of them"
            ),
            Look::Nothing => {
                formatter.write_str("begins like no image of a known format (raw, qcow, qcow2, vhd)")
            }
        }
    }
}

/// Whether it is raw by its name or kind: called .raw or .img, or a block device.
pub fn is_raw_by_name(path: &Path, is_block_device: bool) -> bool {
    let extension = path.extension().unwrap_or_default();
    is_block_device || extension.eq_ignore_ascii_case("raw") || extension.eq_ignore_ascii_case("img")
}

/// Whether it is a VHD by its name: called .vhd.
fn is_vhd_by_name(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("vhd"))
}

/// Looks at the first and the last bytes of a file, and at its name.
///
/// # Errors
/// Those of reading.
pub async fn look(file: &Rc<dyn Storage>, path: &Path, is_block_device: bool) -> Result<Look> {
    let size = file.size();
    let read = async |span: Span| {
        let buf = Buf::zeroed(span.len() as usize);
        let result = file.read(span.at(), buf.clone()).await;
        result.map(|()| buf.to_vec()).map_err(|error| error.during("look at its format"))
    };
    let head = Span::new(0, size.min(HEAD)).expect("within the file");
    let head = if head.is_empty() { Vec::new() } else { read(head).await? };
    let begins = by_head(&head);
    let tail = match size.checked_sub(TAIL) {
        Some(at) => read(Span::new(at, TAIL).expect("within the file")).await?,
        None => Vec::new(),
    };
    let is_called_vhd = !is_block_device && is_vhd_by_name(path);
    Ok(match begins {
        // Nobody's guest writes there, but for that of a fixed one: the header tells the two apart.
        Look::Of(Format::Vhd) => begins,
        Look::Of(format @ (Format::Raw | Format::Qcow | Format::Qcow2)) | Look::Unclear(format) => {
            match (vhd::ends_fixed(&tail), is_called_vhd) {
                (true, true) => Look::Of(Format::Vhd),
                (true, false) | (false, true) => Look::Unclear(format),
                (false, false) => begins,
            }
        }
        // The header says what is missing.
        Look::Foreign(_) | Look::Nothing
            if is_called_vhd || vhd::is_fixed(&tail) || vhd::ends_fixed(&tail) =>
        {
            Look::Of(Format::Vhd)
        }
        Look::Foreign(_) | Look::Nothing => begins,
    })
}

fn by_head(head: &[u8]) -> Look {
    if qcow::is(head) {
        return Look::Of(Format::Qcow);
    }
    if qcow2::is(head) {
        return Look::Of(Format::Qcow2);
    }
    if vhd::is(head) {
        return Look::Of(Format::Vhd);
    }
    // By their specifications, or where QEMU looks for them.
    let foreign: [(usize, &[u8], &str); 9] = [
        (0, b"KDMV", "VMDK"),
        (0, b"COWD", "VMDK"),
        (0, b"# Disk DescriptorFile", "VMDK"),
        (0, b"vhdxfile", "VHDX"),
        (0, b"QED\0", "QED"),
        (0, b"LUKS\xba\xbe", "LUKS"),
        (64, &[0x7f, 0x10, 0xda, 0xbe], "VDI"),
        (0, b"WithoutFreeSpace", "Parallels"),
        (0, b"WithouFreSpacExt", "Parallels"),
    ];
    let known =
        foreign.iter().find(|(at, magic, _)| head.get(*at..).is_some_and(|from| from.starts_with(magic)));
    known.map_or(Look::Nothing, |(_, _, name)| Look::Foreign(name))
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn looks(bytes: &[u8]) -> Look {
        looks_as("disk", bytes)
    }

    fn looks_as(name: &str, bytes: &[u8]) -> Look {
        let file: Rc<dyn Storage> = Rc::new(storage::Ram::new(bytes.len() as u64));
        let looked = std::pin::pin!(async {
            file.write(0, Buf::from_bytes(bytes)).await?;
            look(&file, Path::new(name), name.starts_with("/dev/")).await
        });
        match looked.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(look) => look.unwrap(),
            Poll::Pending => panic!("memory never waits"),
        }
    }

    /// What qemu-img makes.
    fn made(format: &str, options: &str) -> Vec<u8> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", format]);
        if !options.is_empty() {
            command.args(["-o", options]);
        }
        assert!(command.arg(&path).arg("1M").status().unwrap().success(), "{format} {options}");
        std::fs::read(path).unwrap()
    }

    #[test]
    fn images_of_qemu_are_known_by_their_bytes() {
        for (format, options, expected) in [
            ("qcow", "", Look::Of(Format::Qcow)),
            ("qcow2", "compat=0.10", Look::Of(Format::Qcow2)),
            ("qcow2", "compat=1.1", Look::Of(Format::Qcow2)),
            ("vpc", "subformat=dynamic", Look::Of(Format::Vhd)),
            ("vpc", "subformat=fixed", Look::Of(Format::Vhd)),
            ("vmdk", "", Look::Foreign("VMDK")),
            ("vmdk", "subformat=monolithicFlat", Look::Foreign("VMDK")),
            ("vhdx", "", Look::Foreign("VHDX")),
            ("vdi", "", Look::Foreign("VDI")),
            ("qed", "", Look::Foreign("QED")),
            ("parallels", "", Look::Foreign("Parallels")),
            ("raw", "", Look::Nothing),
        ] {
            assert_eq!(looks(&made(format, options)), expected, "{format} {options}");
        }
    }

    #[test]
    fn files_of_any_length_are_looked_at() {
        for len in [1, 4, 7, 8, 511, 512, 513, 1024, 4096] {
            assert_eq!(looks(&vec![0; len]), Look::Nothing, "{len}");
        }
        assert_eq!(looks(b"QFI\xfb\0\0\0"), Look::Nothing);
        assert_eq!(looks(b"QFI\xfb\0\0\0\x02"), Look::Of(Format::Qcow2));
        assert_eq!(looks(b"conectix"), Look::Of(Format::Vhd));
        let mut bytes = vec![0; 2000];
        bytes[2000 - 512..][..8].copy_from_slice(b"conectix");
        assert_eq!(looks(&bytes), Look::Of(Format::Vhd));
        bytes.push(0);
        assert_eq!(looks(&bytes), Look::Nothing);
    }

    #[test]
    fn neither_end_is_believed_where_the_other_says_otherwise() {
        let fixed = made("vpc", "subformat=fixed");
        let begun = |head: &[u8]| {
            let mut bytes = fixed.clone();
            bytes[..head.len()].copy_from_slice(head);
            bytes
        };
        let qcow2 = begun(&made("qcow2", "")[..512]);
        let qcow = begun(&made("qcow", "")[..64]);
        for (bytes, format) in [(&qcow2, Format::Qcow2), (&qcow, Format::Qcow)] {
            assert_eq!(looks(bytes), Look::Unclear(format));
            assert_eq!(looks_as("disk.vhd", bytes), Look::Of(Format::Vhd));
            assert_eq!(
                looks_as("/dev/disk.vhd", bytes),
                Look::Unclear(format),
                "of devices the name says nothing"
            );
            // A footer that is damaged, or in use by blktap, or was cut off.
            let last = bytes.len() - 512;
            let mut damaged = bytes.clone();
            damaged[last + 40] ^= 1;
            assert_eq!(looks(&damaged), Look::Unclear(format));
            damaged[last..].fill(0xc7);
            assert_eq!(looks(&damaged), Look::Unclear(format));
            assert_eq!(looks(&bytes[..last]), Look::Of(format), "nothing says otherwise");
            assert_eq!(looks_as("disk.VHD", &bytes[..last]), Look::Unclear(format));
            // A footer of 511 bytes.
            assert_eq!(looks(&bytes[..bytes.len() - 1]), Look::Unclear(format));
        }
        // What is not served here is no danger: a guest that encrypts its disk keeps it.
        for magic in [&b"LUKS\xba\xbe\0\x02"[..], b"KDMV", b"QED\0", b"vhdxfile"] {
            assert_eq!(looks(&begun(magic)), Look::Of(Format::Vhd), "{magic:?}");
        }
        assert_eq!(looks(&begun(&made("vdi", "")[..512])), Look::Of(Format::Vhd));
        // Without its footer it is a VHD as far as its name says so, and the header says what is missing.
        let last = fixed.len() - 512;
        assert_eq!(looks_as("disk.vhd", &begun(b"LUKS\xba\xbe\0\x02")[..last]), Look::Of(Format::Vhd));
        assert_eq!(looks_as("disk.vhd", &fixed[..last]), Look::Of(Format::Vhd));
        // The last sector of a qcow2 image may have the footer of a dynamic one, which tells nothing.
        let dynamic = made("vpc", "subformat=dynamic");
        let mut image = made("qcow2", "");
        image.extend(&dynamic[dynamic.len() - 512..]);
        assert_eq!(looks(&image), Look::Of(Format::Qcow2));
    }

    #[test]
    fn names_that_say_so_and_block_devices_are_raw() {
        for name in ["disk.raw", "disk.img", "/a/disk.IMG", "a.qcow2.raw"] {
            assert!(is_raw_by_name(Path::new(name), false), "{name}");
        }
        for name in ["disk", "raw", "disk.qcow2", "/a.raw/disk", "disk.img.bak", "disk.vhd"] {
            assert!(!is_raw_by_name(Path::new(name), false), "{name}");
        }
        assert!(is_raw_by_name(Path::new("/dev/vg/disk"), true));
    }
}
