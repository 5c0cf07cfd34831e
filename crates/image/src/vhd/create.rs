//! Making a new image.

use std::io::Read;
use std::rc::Rc;
use std::time::SystemTime;

use block::{Buf, Errno, Error, Span};
use storage::{Storage, Zeroing};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::batmap::Batmap;
use super::blocks::ALIGN;
use super::footer::{self, Footer, Subformat};
use super::geometry::Geometry;
use super::header::{Locator, SECOND, SECOND_COOKIE, Second, UNUSED, bitmap_len, check_blocks};
use super::locators::{self, Platform};
use super::{SECTOR, SECTORS_MAX};
use crate::ImageError;

/// Bytes of a block, if nobody says.
const BLOCK: u32 = 2 << 20;
/// The smallest blocks that are made: programs differ in what they make of less than a page.
const BLOCK_MIN: u32 = 4096;
/// The largest: a larger one is more than any program is known to read.
const BLOCK_MAX: u32 = 1 << 28;
/// Bytes that are written at a time.
const STEP: usize = 1 << 20;

/// What is made beforehand of the space that the disk needs when it is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: a fixed image is sparse, others have no blocks.
    #[default]
    Off,
    /// Every block has its place, and no space.
    Metadata,
    /// Space, too, as far as the file system can reserve it without writing.
    Falloc,
    /// Space that zeroes were written to.
    Full,
}

/// The image below a new one.
#[derive(Clone, Debug)]
pub struct Parent {
    /// Its path, as it is to be written: absolute, or from the new image's folder on.
    pub name: String,
    /// Its unique identifier; none if it is a raw disk, as blktap allows.
    pub unique_id: Option<[u8; 16]>,
    /// When its file was changed last.
    pub changed: SystemTime,
}

/// What is to be made.
#[derive(Clone, Debug)]
pub struct Create {
    /// Bytes of the disk; rounded up to whole sectors.
    pub size: u64,
    /// What kind.
    pub subformat: Subformat,
    /// Bytes of a block, a power of two; a fixed image has none.
    pub block: u32,
    /// Round the size up to one that cylinders, heads and sectors cover exactly, for programs that go by these.
    pub geometry: bool,
    /// What is below; differencing images have it and no others.
    pub parent: Option<Parent>,
    /// Space that is made beforehand.
    pub preallocation: Preallocation,
    /// What tells it from all others; a random one if nobody says.
    pub unique_id: Option<[u8; 16]>,
    /// When it was made.
    pub created: SystemTime,
}

impl Default for Create {
    fn default() -> Create {
        Create {
            size: 0,
            subformat: Subformat::Dynamic,
            block: BLOCK,
            geometry: false,
            parent: None,
            preallocation: Preallocation::Off,
            unique_id: None,
            created: SystemTime::now(),
        }
    }
}

impl Create {
    /// Bytes that the disk will have.
    ///
    /// # Errors
    /// More than a VHD can have.
    pub fn disk_size(&self) -> Result<u64, ImageError> {
        let size = if self.geometry { Geometry::round_up(self.size) } else { self.size };
        check_size(size)
    }

    fn judge(&self) -> Result<(), ImageError> {
        let is_differencing = self.subformat == Subformat::Differencing;
        if is_differencing != self.parent.is_some() {
            return Err(ImageError::Refused(format!(
                "a {} VHD {} an image below it",
                self.subformat.name(),
                if is_differencing { "needs" } else { "cannot have" }
            )));
        }
        if is_differencing && self.preallocation != Preallocation::Off {
            return Err(ImageError::Refused(
                "a differencing VHD cannot be preallocated: it has what the image below it has not"
                    .to_owned(),
            ));
        }
        let is_right = self.block.is_power_of_two() && (BLOCK_MIN..=BLOCK_MAX).contains(&self.block);
        if self.subformat != Subformat::Fixed && !is_right {
            return Err(ImageError::Refused(format!(
                "blocks of {} bytes: expected a power of two from {BLOCK_MIN} to {BLOCK_MAX}. Most programs know only {BLOCK}",
                self.block
            )));
        }
        if let Some(parent) = &self.parent {
            let is_long = parent.name.encode_utf16().count() * 2 > locators::NAME_MAX as usize;
            if parent.name.is_empty() || parent.name.contains('\0') || is_long {
                return Err(ImageError::Refused(
                    "the name of the image below is empty or too long".to_owned(),
                ));
            }
            if parent.unique_id == Some([0; 16]) {
                return Err(ImageError::Refused(
                    "the image below has no unique identifier by which the new one could know it".to_owned(),
                ));
            }
        }
        Ok(())
    }
}

/// Bytes of a disk, rounded up to whole sectors.
///
/// # Errors
/// More than a VHD can have.
pub(super) fn check_size(bytes: u64) -> Result<u64, ImageError> {
    if bytes.div_ceil(SECTOR) > SECTORS_MAX {
        return Err(ImageError::Refused(format!(
            "a disk of {bytes} bytes: a VHD has at most {} (2040 GiB). A qcow2 image can be larger",
            SECTORS_MAX * SECTOR
        )));
    }
    Ok(bytes.next_multiple_of(SECTOR))
}

/// Sixteen random bytes, as a UUID of version 4.
pub(super) fn random_id() -> Result<[u8; 16], ImageError> {
    let mut id = [0; 16];
    let result = std::fs::File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut id));
    if let Err(error) = result {
        let errno = error.raw_os_error().and_then(Errno::new).unwrap_or(Errno::EIO);
        return Err(Error::new(errno, "read /dev/urandom").into());
    }
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id)
}

/// Writes bytes, making the file long enough first.
pub(super) async fn write(file: &Rc<dyn Storage>, at: u64, bytes: &[u8]) -> block::Result<()> {
    lengthen(file, at + bytes.len() as u64).await?;
    file.write(at, Buf::from_bytes(bytes)).await
}

/// Makes the file at least so long.
pub(super) async fn lengthen(file: &Rc<dyn Storage>, to: u64) -> block::Result<()> {
    if file.size() < to { file.resize(to).await } else { Ok(()) }
}

/// Makes an image in a file, whose bytes are lost.
///
/// # Errors
/// Options that make no sense, and those of writing.
pub async fn create(file: &Rc<dyn Storage>, options: &Create) -> Result<(), ImageError> {
    options.judge()?;
    let size = options.disk_size()?;
    let id = match options.unique_id {
        Some(id) => id,
        None => random_id()?,
    };
    let footer = Footer::new(options.subformat, size, footer::timestamp(options.created), id);
    // What was there must not be taken for the new image's.
    file.resize(0).await?;
    if file.size() > 0 {
        let head = Span::new(0, file.size().min(ALIGN)).expect("small");
        file.zero(head, Zeroing { unmap: true, fast: false }).await?;
    }
    match options.subformat {
        Subformat::Fixed => create_fixed(file, options, &footer, size).await?,
        Subformat::Dynamic | Subformat::Differencing => create_sparse(file, options, &footer, size).await?,
    }
    file.flush().await?;
    Ok(())
}

/// The disk, then a footer in the last sector. On a block device that is its last one: bytes between are nobody's.
async fn create_fixed(
    file: &Rc<dyn Storage>,
    options: &Create,
    footer: &Footer,
    size: u64,
) -> Result<(), ImageError> {
    let is_device = file.size() > 0;
    lengthen(file, size + SECTOR).await?;
    reserve(file, options.preallocation, Span::new(0, size).expect("at most 2040 GiB"), is_device).await?;
    Ok(write(file, file.size() - SECTOR, &footer.bytes()).await?)
}

/// Makes bytes zero, which are that already unless this is a block device, and reserves space for them.
async fn reserve(
    file: &Rc<dyn Storage>,
    how: Preallocation,
    span: Span,
    is_device: bool,
) -> Result<(), ImageError> {
    if span.is_empty() {
        return Ok(());
    }
    match how {
        Preallocation::Off | Preallocation::Metadata if is_device => {
            file.zero(span, Zeroing { unmap: true, fast: false }).await?
        }
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => file.zero(span, Zeroing { unmap: false, fast: false }).await?,
        Preallocation::Full => {
            let zeroes = Buf::zeroed(STEP);
            for at in (span.at()..span.end()).step_by(STEP) {
                let len = (span.end() - at).min(STEP as u64) as usize;
                file.write(at, zeroes.slice(0, len)).await?;
            }
        }
    }
    Ok(())
}

/// The copy of the footer, the second header, the table, the batmap, parent locators, blocks, the footer: in the order in
/// which blktap has them.
async fn create_sparse(
    file: &Rc<dyn Storage>,
    options: &Create,
    footer: &Footer,
    size: u64,
) -> Result<(), ImageError> {
    let block = u64::from(options.block);
    let entries = check_blocks(size, options.block)?;
    let table_at = SECTOR + SECOND;
    let table_end = table_at + (u64::from(entries) * 4).next_multiple_of(SECTOR);
    let batmap = Batmap::new(table_end, entries);
    let mut second = Second {
        cookie: SECOND_COOKIE,
        next_at: U64::new(footer::NOWHERE),
        table_at: U64::new(table_at),
        version: U32::new(0x0001_0000),
        entries: U32::new(entries),
        block: U32::new(options.block),
        checksum: U32::ZERO,
        parent_id: [0; 16],
        parent_changed: U32::ZERO,
        reserved: U32::ZERO,
        parent_name: [0; 512],
        locators: [Locator::NONE; 8],
        reserved_too: [0; 256],
    };
    let mut end = batmap.at.get() + batmap.len();
    let is_device = file.size() > 0;
    lengthen(file, end).await?;
    if is_device {
        let head = Span::new(0, end).expect("small");
        file.zero(head, Zeroing { unmap: true, fast: false }).await?;
    }
    if let Some(parent) = &options.parent {
        end = write_parent(file, &mut second, parent, end).await?;
    }
    second.seal();
    let all = options.preallocation != Preallocation::Off;
    let (places, end) = places(entries, block, end, all)?;
    write(file, table_end, &batmap.bytes()).await?;
    let table: Vec<u8> = places.iter().flat_map(|entry| entry.to_be_bytes()).collect();
    for (number, part) in table.chunks(STEP).enumerate() {
        write(file, table_at + (number * STEP) as u64, part).await?;
    }
    lengthen(file, end + SECTOR).await?;
    if all {
        let bitmap = vec![0xff; bitmap_len(block) as usize];
        for place in places.iter().take(entries as usize) {
            let at = u64::from(*place) * SECTOR;
            write(file, at, &bitmap).await?;
            let data = Span::new(at + bitmap.len() as u64, block).expect("below 2^42");
            reserve(file, options.preallocation, data, is_device).await?;
        }
    }
    write(file, SECTOR, second.as_bytes()).await?;
    write(file, file.size() - SECTOR, &footer.bytes()).await?;
    Ok(write(file, 0, &footer.bytes()).await?)
}

/// The table of an image whose blocks begin at `end`, and where they end. What is left of its last sector is unused too.
fn places(entries: u32, block: u64, mut end: u64, all: bool) -> Result<(Vec<u32>, u64), ImageError> {
    let len = (entries as usize * 4).next_multiple_of(SECTOR as usize) / 4;
    let mut places = vec![UNUSED; len];
    for place in places.iter_mut().take(if all { entries as usize } else { 0 }) {
        let data = (end + bitmap_len(block)).next_multiple_of(ALIGN);
        let sector =
            u32::try_from((data - bitmap_len(block)) / SECTOR).ok().filter(|sector| *sector < UNUSED);
        *place = sector.ok_or_else(|| {
            ImageError::Refused(
                "the blocks of so large a disk cannot be placed beforehand: they end beyond 2 TiB".to_owned(),
            )
        })?;
        end = data + block;
    }
    Ok((places, end))
}

/// Writes what a header says of the image below: three locators, as blktap has them, from `at` on. Gives where they end.
async fn write_parent(
    file: &Rc<dyn Storage>,
    second: &mut Second,
    parent: &Parent,
    mut at: u64,
) -> Result<u64, ImageError> {
    second.parent_id = parent.unique_id.unwrap_or([0; 16]);
    second.parent_changed = U32::new(footer::timestamp(parent.changed));
    second.parent_name = locators::encode_name(&parent.name);
    let platforms = [Platform::Url, Platform::WindowsAbsolute, Platform::WindowsRelative];
    for (locator, platform) in second.locators.iter_mut().zip(platforms) {
        let mut bytes = platform.encode(&parent.name);
        let len = bytes.len();
        bytes.resize(len.next_multiple_of(SECTOR as usize), 0);
        write(file, at, &bytes).await?;
        *locator = Locator {
            platform: U32::new(platform.code()),
            // In bytes, as Windows and blktap write it, though the specification says sectors.
            room: U32::new(bytes.len() as u32),
            len: U32::new(len as u32),
            reserved: U32::ZERO,
            at: U64::new(at),
        };
        at += bytes.len() as u64;
    }
    Ok(at)
}
