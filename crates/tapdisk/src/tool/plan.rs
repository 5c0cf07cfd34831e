//! What is asked of a new image, and making it.

use std::rc::Rc;
use std::time::SystemTime;

use anyhow::{Context, bail};
use block::{Buf, Errno, Error, Span};
use image::{Backing, Format, qcow, qcow2, vhd};
use storage::{Storage, Zeroing};

use super::options::{self, SWITCH, Wishes};
use crate::cli::tool::Pairs;

/// Bytes of zeroes written at a time where all of a file is to be written.
const ZEROES: u64 = 1 << 20;

/// What is asked of a new image.
pub(super) struct Plan {
    format: Format,
    wishes: Wishes,
}

/// An image that is to be below.
pub(super) struct Below {
    /// As the image above is to call it.
    pub(super) name: String,
    pub(super) format: Option<Format>,
    /// Bytes of its disk, where somebody has looked.
    pub(super) size: Option<u64>,
    /// Of a VHD.
    pub(super) unique_id: Option<[u8; 16]>,
    pub(super) changed: Option<SystemTime>,
}

/// A file of its own for the disk's bytes (qcow2).
pub(super) struct Apart {
    /// Its name, as the image is to have it.
    pub(super) name: String,
    pub(super) storage: Rc<dyn Storage>,
}

/// What is reserved beforehand.
#[derive(Clone, Copy)]
enum Preallocation {
    Off,
    Metadata,
    Falloc,
    Full,
}

impl Plan {
    /// As the command line says; `None` where it asks for help with the options, which is printed.
    ///
    /// # Errors
    /// An option makes no sense.
    pub(super) fn new(format: Format, given: &[Pairs]) -> anyhow::Result<Option<Plan>> {
        match Wishes::new(format, given)? {
            Some(wishes) => Ok(Some(Plan { format, wishes })),
            None => crate::print(options::help(format).as_bytes()).map(|()| None),
        }
    }

    /// The format of the image.
    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// The size, where an option says it.
    ///
    /// # Errors
    /// It is none.
    pub(super) fn size(&mut self) -> anyhow::Result<Option<u64>> {
        self.wishes.size("size")
    }

    /// The name and format of the image below, from the options of the command or else of the format.
    ///
    /// # Errors
    /// They are said twice, or the format knows none.
    pub(super) fn backing(
        &mut self,
        name: Option<&str>,
        format: Option<Format>,
    ) -> anyhow::Result<(Option<String>, Option<Format>)> {
        if self.format == Format::Raw {
            if let Some(name) = name {
                bail!(
                    "a raw image has all its bytes itself: {name} cannot be below it. qcow2 and vhd images can have one"
                );
            }
            return Ok((None, None));
        }
        let (by_key, format_by_key) = (self.wishes.take("backing_file"), self.wishes.take("backing_fmt"));
        if name.is_some() && by_key.is_some() || format.is_some() && format_by_key.is_some() {
            bail!("the image below is given twice: by --backing and by -o");
        }
        let format_by_key = format_by_key.map(|format| format.parse::<Format>()).transpose()?;
        let format = format.or(format_by_key);
        let name = name.map(str::to_owned).or(by_key);
        if let (None, Some(format)) = (&name, format) {
            bail!(
                "there is a format of an image below ({format}), but no such image: name it with --backing"
            );
        }
        Ok((name, format))
    }

    /// The name of the file for the disk's bytes, where that is to be another one.
    pub(super) fn data_file(&mut self) -> Option<String> {
        match self.format {
            Format::Qcow2 => self.wishes.take("data_file"),
            Format::Raw | Format::Qcow | Format::Vhd => None,
        }
    }

    /// Makes a disk of so many bytes in this file, whatever is there. Nothing of it is durable before a flush.
    ///
    /// # Errors
    /// An option makes no sense, or the file fails.
    pub(super) async fn make(
        mut self,
        file: &Rc<dyn Storage>,
        bytes: u64,
        below: Option<Below>,
        apart: Option<Apart>,
    ) -> anyhow::Result<()> {
        match self.format {
            Format::Raw => self.make_raw(file, bytes).await,
            Format::Qcow => self.make_qcow(file, bytes, below).await,
            Format::Qcow2 => self.make_qcow2(file, bytes, below, apart).await,
            Format::Vhd => self.make_vhd(file, bytes, below).await,
        }
    }

    fn preallocation(&mut self) -> anyhow::Result<Preallocation> {
        let words = [
            ("off", Preallocation::Off),
            ("metadata", Preallocation::Metadata),
            ("falloc", Preallocation::Falloc),
            ("full", Preallocation::Full),
        ];
        Ok(self.wishes.choice("preallocation", &words)?.unwrap_or(Preallocation::Off))
    }

    async fn make_raw(&mut self, file: &Rc<dyn Storage>, bytes: u64) -> anyhow::Result<()> {
        let preallocation = self.preallocation()?;
        file.resize(0).await?;
        file.resize(bytes).await?;
        let whole = Span::new(0, bytes).context("a disk is smaller than 8 EiB")?;
        match preallocation {
            Preallocation::Off => Ok(()),
            Preallocation::Metadata => bail!("-o preallocation: a raw image has no metadata to allocate"),
            Preallocation::Falloc => allocate(file, whole).await,
            Preallocation::Full => write_zeroes(file, whole).await,
        }
    }

    async fn make_qcow(
        &mut self,
        file: &Rc<dyn Storage>,
        bytes: u64,
        below: Option<Below>,
    ) -> anyhow::Result<()> {
        let cluster_size = self.wishes.size("cluster_size")?.map(u32::try_from).transpose();
        let options = qcow::Create {
            size: bytes,
            backing: below.map(|below| below.name),
            cluster_size: cluster_size.context("-o cluster_size is too large")?,
        };
        Ok(qcow::create(file, &options).await?)
    }

    async fn make_qcow2(
        &mut self,
        file: &Rc<dyn Storage>,
        bytes: u64,
        below: Option<Below>,
        apart: Option<Apart>,
    ) -> anyhow::Result<()> {
        let raw = self.wishes.choice("data_file_raw", &SWITCH)?.unwrap_or(false);
        if raw && apart.is_none() {
            bail!("-o data_file_raw: there is no data file; -o data_file names one");
        }
        let plain = qcow2::Create::default();
        let versions = [("1.1", 3), ("v3", 3), ("0.10", 2), ("v2", 2)];
        let compressions = [("zlib", qcow2::Compression::Zlib), ("zstd", qcow2::Compression::Zstd)];
        let below = below.map(|below| Backing {
            name: below.name,
            format: below.format,
            others: Vec::new(),
            unique_id: None,
        });
        let options = qcow2::Create {
            size: bytes,
            cluster_size: self.wishes.size("cluster_size")?.unwrap_or(plain.cluster_size),
            version: self.wishes.choice("compat", &versions)?.unwrap_or(plain.version),
            refcount_bits: self.wishes.number("refcount_bits")?.unwrap_or(plain.refcount_bits),
            extended_l2: self.wishes.choice("extended_l2", &SWITCH)?.unwrap_or(plain.extended_l2),
            lazy_refcounts: self.wishes.choice("lazy_refcounts", &SWITCH)?.unwrap_or(plain.lazy_refcounts),
            compression: self.wishes.choice("compression_type", &compressions)?.unwrap_or(plain.compression),
            backing: below,
            data_file: apart.map(|apart| qcow2::DataFile { name: apart.name, storage: apart.storage, raw }),
            preallocation: match self.preallocation()? {
                Preallocation::Off => qcow2::Preallocation::Off,
                Preallocation::Metadata => qcow2::Preallocation::Metadata,
                Preallocation::Falloc => qcow2::Preallocation::Falloc,
                Preallocation::Full => qcow2::Preallocation::Full,
            },
        };
        Ok(qcow2::create(file, &options).await?)
    }

    async fn make_vhd(
        &mut self,
        file: &Rc<dyn Storage>,
        bytes: u64,
        below: Option<Below>,
    ) -> anyhow::Result<()> {
        let plain = vhd::Create::default();
        let kinds = [("dynamic", vhd::Subformat::Dynamic), ("fixed", vhd::Subformat::Fixed)];
        let subformat = match (self.wishes.choice("subformat", &kinds)?, &below) {
            (None | Some(vhd::Subformat::Dynamic), Some(_)) => vhd::Subformat::Differencing,
            (Some(subformat), _) => subformat,
            (None, None) => plain.subformat,
        };
        let block = self.wishes.size("block_size")?.map(u32::try_from).transpose();
        let options = vhd::Create {
            size: bytes,
            subformat,
            block: block.context("-o block_size is too large")?.unwrap_or(plain.block),
            geometry: !self.wishes.choice("force_size", &SWITCH)?.unwrap_or(true),
            parent: below.map(|below| vhd::Parent {
                name: below.name,
                unique_id: below.unique_id,
                changed: below.changed.unwrap_or(plain.created),
            }),
            preallocation: match self.preallocation()? {
                Preallocation::Off => vhd::Preallocation::Off,
                Preallocation::Metadata => vhd::Preallocation::Metadata,
                Preallocation::Falloc => vhd::Preallocation::Falloc,
                Preallocation::Full => vhd::Preallocation::Full,
            },
            ..plain
        };
        Ok(vhd::create(file, &options).await?)
    }
}

/// Gives an empty file space, as posix_fallocate(3) does: by writing where the file system has no other way.
async fn allocate(file: &Rc<dyn Storage>, whole: Span) -> anyhow::Result<()> {
    let has_not = |error: &Error| error.errno() == Errno::EOPNOTSUPP;
    match file.zero(whole, Zeroing { unmap: false, fast: true }).await {
        Err(error) if has_not(&error) => {}
        done => return Ok(done?),
    }
    match file.reserve(whole).await {
        Err(error) if has_not(&error) => write_zeroes(file, whole).await,
        done => Ok(done?),
    }
}

async fn write_zeroes(file: &Rc<dyn Storage>, whole: Span) -> anyhow::Result<()> {
    let zeroes = Buf::zeroed(ZEROES as usize);
    let mut rest = whole;
    while !rest.is_empty() {
        let (piece, others) = rest.split_at(rest.at() + ZEROES);
        file.write(piece.at(), zeroes.slice(0, piece.len() as usize)).await?;
        rest = others;
    }
    Ok(())
}
