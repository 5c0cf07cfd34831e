//! The formats of images: their names, and what the header of one says that no other part of it does.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// A format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk's bytes as they are.
    Raw,
    /// Version 1 of QEMU's copy-on-write format, as of 2006.
    Qcow,
    /// Versions 2 and 3 of it.
    Qcow2,
    /// Microsoft's Virtual Hard Disk, which QEMU calls vpc.
    Vhd,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 4] = [Format::Raw, Format::Qcow, Format::Qcow2, Format::Vhd];

    /// Its name, as on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow => "qcow",
            Format::Qcow2 => "qcow2",
            Format::Vhd => "vhd",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is none of a format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no format that tapdisk knows: there are raw, qcow, qcow2 and vhd")]
pub struct UnknownFormat(String);

impl FromStr for Format {
    type Err = UnknownFormat;

    /// Takes its name; also `vpc`, as QEMU calls vhd, and `aio`, as blktap calls raw.
    fn from_str(name: &str) -> Result<Format, UnknownFormat> {
        match name {
            "raw" | "aio" => Ok(Format::Raw),
            "qcow" => Ok(Format::Qcow),
            "qcow2" => Ok(Format::Qcow2),
            "vhd" | "vpc" => Ok(Format::Vhd),
            _ => Err(UnknownFormat(name.to_owned())),
        }
    }
}

/// What an image says of the one below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its name as the image has it: a path, absolute or from the image's folder on.
    pub name: String,
    /// Its format, where the image says that.
    pub format: Option<Format>,
    /// Further names for the same, to be tried in this order.
    pub others: Vec<String>,
    /// The unique identifier that it must have (VHD).
    pub unique_id: Option<[u8; 16]>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_known_by_their_names() {
        for format in Format::ALL {
            assert_eq!(format.name().parse(), Ok(format));
        }
        assert_eq!("vpc".parse(), Ok(Format::Vhd));
        assert!("vmdk".parse::<Format>().unwrap_err().to_string().contains("qcow2"));
    }
}
