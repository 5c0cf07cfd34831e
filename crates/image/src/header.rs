//! The header of an image, of whatever format.

use std::rc::Rc;

use storage::Storage;

use crate::{Backing, Format, ImageError, qcow, qcow2, vhd};

/// What an image says of itself.
#[derive(Clone, Debug)]
pub enum Header {
    /// Nothing: it is raw.
    Raw {
        /// Bytes of the disk.
        size: u64,
    },
    /// As version 1 of the format has it.
    Qcow(Box<qcow::Header>),
    /// As versions 2 and 3 have it.
    Qcow2(Box<qcow2::Header>),
    /// As footer and second header have it.
    Vhd(Box<vhd::Header>),
}

impl Header {
    /// Reads the header of an image of this format and finds it sound; changes nothing.
    ///
    /// # Errors
    /// What makes no sense or is not known here, or the storage's.
    pub async fn read(file: &Rc<dyn Storage>, format: Format) -> Result<Header, ImageError> {
        match format {
            Format::Raw => Ok(Header::Raw { size: file.size() }),
            Format::Qcow => Ok(Header::Qcow(Box::new(qcow::Header::read(file).await?))),
            Format::Vhd => Ok(Header::Vhd(Box::new(vhd::Header::read(file).await?))),
            Format::Qcow2 => Ok(Header::Qcow2(Box::new(qcow2::Header::read(file).await?))),
        }
    }

    /// The format.
    pub fn format(&self) -> Format {
        match self {
            Header::Raw { .. } => Format::Raw,
            Header::Qcow(_) => Format::Qcow,
            Header::Qcow2(_) => Format::Qcow2,
            Header::Vhd(_) => Format::Vhd,
        }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        match self {
            Header::Raw { size } => *size,
            Header::Qcow(header) => header.size(),
            Header::Qcow2(header) => header.size(),
            Header::Vhd(header) => header.size(),
        }
    }

    /// What it says of the image below it.
    pub fn backing(&self) -> Option<Backing> {
        match self {
            Header::Raw { .. } => None,
            Header::Qcow(header) => header.backing(),
            Header::Qcow2(header) => header.backing(),
            Header::Vhd(header) => header.backing(),
        }
    }

    /// The format of the image below as it has it, where that is none that is known here.
    pub(crate) fn foreign_backing(&self) -> Option<&str> {
        match self {
            Header::Raw { .. } | Header::Qcow(_) | Header::Vhd(_) => None,
            Header::Qcow2(header) => {
                let name = header.extensions.backing_format.as_deref();
                name.filter(|name| name.parse::<Format>().is_err())
            }
        }
    }

    /// Whether the disk's bytes are in a file of their own; if so, its name, where the image says one.
    pub(crate) fn data_file(&self) -> Option<Option<&str>> {
        match self {
            Header::Raw { .. } | Header::Qcow(_) | Header::Vhd(_) => None,
            Header::Qcow2(header) => header.has_data_file().then(|| header.data_file()),
        }
    }

    /// The identifier by which images above know it (VHD).
    pub(crate) fn unique_id(&self) -> Option<[u8; 16]> {
        match self {
            Header::Raw { .. } | Header::Qcow(_) | Header::Qcow2(_) => None,
            Header::Vhd(header) => Some(header.unique_id()),
        }
    }
}
