//! What is known of an image before its table is read: from its footers, its second header, its batmap's header and its
//! parent locators, all judged.

use std::rc::Rc;

use block::{Buf, Span};
use storage::Storage;
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::batmap::Batmap;
use super::footer::{self, DISABLED, Flaw, Footer, Subformat};
use super::locators::{self, NAME_MAX, Platform};
use super::{SECTOR, SECTORS_MAX};
use crate::{Backing, Format, ImageError};

/// Bytes of the second header.
pub(super) const SECOND: u64 = 1024;
/// Blocks of a disk, which bounds the memory for its table: 2040 GiB in blocks of 512 KiB. Real images have these, or
/// blocks of 2 MiB.
const BLOCKS_MAX: u64 = 1 << 22;
/// Bytes of the table that are read at a time.
pub(super) const TABLE_STEP: u64 = 64 << 10;
/// An entry of the table without a block.
pub(super) const UNUSED: u32 = u32::MAX;

/// A parent locator's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Locator {
    pub(super) platform: U32,
    pub(super) room: U32,
    pub(super) len: U32,
    pub(super) reserved: U32,
    pub(super) at: U64,
}

impl Locator {
    /// An entry without a locator.
    pub(super) const NONE: Locator =
        Locator { platform: U32::ZERO, room: U32::ZERO, len: U32::ZERO, reserved: U32::ZERO, at: U64::ZERO };
}

/// The second header as it is stored (specification, "Dynamic Disk Header Format").
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Second {
    pub(super) cookie: [u8; 8],
    pub(super) next_at: U64,
    pub(super) table_at: U64,
    pub(super) version: U32,
    pub(super) entries: U32,
    pub(super) block: U32,
    pub(super) checksum: U32,
    pub(super) parent_id: [u8; 16],
    pub(super) parent_changed: U32,
    pub(super) reserved: U32,
    pub(super) parent_name: [u8; 512],
    pub(super) locators: [Locator; 8],
    pub(super) reserved_too: [u8; 256],
}

pub(super) const SECOND_COOKIE: [u8; 8] = *b"cxsparse";
const SECOND_CHECKSUM_AT: usize = 36;

impl Second {
    pub(super) fn sum(&self) -> u32 {
        footer::checksum(self.as_bytes(), SECOND_CHECKSUM_AT)
    }

    pub(super) fn seal(&mut self) {
        self.checksum = U32::new(self.sum());
    }

    /// Bytes of the table, whole sectors.
    pub(super) fn table_len(&self) -> u64 {
        (u64::from(self.entries.get()) * 4).next_multiple_of(SECTOR)
    }
}

/// What dynamic and differencing images have besides a footer.
#[derive(Clone, Debug)]
pub(super) struct Sparse {
    pub(super) second: Second,
    /// Where the second header is.
    pub(super) at: u64,
    /// Blocks that the disk has; the table may have room for more.
    pub(super) blocks: u32,
    /// Its header, and where that is.
    pub(super) batmap: Option<(u64, Batmap)>,
    /// Where its header is or would be, in an image of blktap's.
    pub(super) batmap_at: Option<u64>,
    /// Numbers of parent locators that are beyond the end of the file.
    pub(super) beyond: Vec<usize>,
    /// There is a header, and it makes no sense. It must not begin to when the file has more bytes.
    pub(super) is_stray: bool,
    /// Names of the image below, best first.
    names: Vec<String>,
    /// Where metadata is, other than the last footer.
    pub(super) taken: Vec<Span>,
}

impl Sparse {
    /// Bytes of a block of the disk, a power of two.
    pub(super) fn block(&self) -> u64 {
        u64::from(self.second.block.get())
    }

    /// Entries of the table that may have blocks. Those behind the disk's have some where another program takes the disk for
    /// larger, by its size and not by its geometry. What a hostile image has beyond the largest disk's is left out.
    pub(super) fn listed(&self) -> u32 {
        self.second.entries.get().min(BLOCKS_MAX as u32)
    }

    /// Bytes of a block's bitmap, whole sectors.
    pub(super) fn bitmap(&self) -> u64 {
        bitmap_len(self.block())
    }

    /// Refuses to change a file that ends before a parent locator: what is written behind its end, by a guest at last, would be
    /// the name of the image below.
    pub(super) fn check_whole(&self) -> Result<(), ImageError> {
        match self.beyond.first().and_then(|number| self.second.locators.get(*number)) {
            None => Ok(()),
            Some(locator) => Err(invalid(format!(
                "a parent locator is at {}, beyond the end of the file: that was cut off. The image can be opened to be read, \
                 and a check that repairs all takes the locator out",
                locator.at
            ))),
        }
    }

    /// Byte after the metadata before the blocks.
    pub(super) fn taken_until(&self) -> u64 {
        // Where blktap looks for a header a guest has no say, whether there is one or not.
        let batmap = self.batmap_at.map(|at| at + SECTOR);
        self.taken.iter().map(|span| span.end()).chain(batmap).max().unwrap_or(0).next_multiple_of(SECTOR)
    }
}

/// Bytes of the bitmap of a block: a bit for each sector, whole sectors.
pub(super) const fn bitmap_len(block: u64) -> u64 {
    (block / SECTOR).div_ceil(8).next_multiple_of(SECTOR)
}

/// What an image says of itself.
#[derive(Clone, Debug)]
pub struct Header {
    pub(super) footer: Footer,
    subformat: Subformat,
    /// Where a sound footer stands at the end, if one does.
    pub(super) footer_at: Option<u64>,
    pub(super) sparse: Option<Sparse>,
    notes: Vec<String>,
}

fn invalid(message: String) -> ImageError {
    ImageError::Invalid(message)
}

/// Reads bytes that are known to lie within the file.
pub(super) async fn read(file: &Rc<dyn Storage>, at: u64, len: u64) -> block::Result<Vec<u8>> {
    let buf = Buf::zeroed(len as usize);
    file.read(at, buf.clone()).await?;
    Ok(buf.to_vec())
}

/// The footer in up to a sector's bytes: the first ones wrote 511 of them, without the last zero.
fn parse(bytes: &[u8]) -> Result<Footer, Flaw> {
    let mut sector = [0; SECTOR as usize];
    sector[..bytes.len()].copy_from_slice(bytes);
    Footer::parse(&sector)
}

/// The two footers of an image as they were found.
pub(super) struct Footers {
    /// The last one, and where.
    pub(super) last: (u64, Result<Footer, Flaw>),
    pub(super) copy: Result<Footer, Flaw>,
}

impl Footers {
    pub(super) async fn read(file: &Rc<dyn Storage>) -> Result<Footers, ImageError> {
        let size = file.size();
        if size < SECTOR - 1 {
            return Err(invalid(format!(
                "this is no VHD: it has {size} bytes, and the footer alone has {SECTOR}"
            )));
        }
        let head = read(file, 0, SECTOR.min(size)).await?;
        // Virtual PC before 2004 wrote footers of 511 bytes; such a file has no whole number of sectors.
        let len = if size % SECTOR == SECTOR - 1 { SECTOR - 1 } else { SECTOR };
        let at = size - len;
        let last = (at, parse(&read(file, at, len).await?));
        Ok(Footers { last, copy: parse(&head) })
    }

    /// Which of them counts, and what is to be said of the other one.
    ///
    /// The last one decides for fixed images, whose first sector is the guest's: it may hold anything. For others the copy
    /// does, since nothing that a guest writes comes there, while the last sector of a file that was cut off is a guest's.
    pub(super) fn judge(&self, notes: &mut Vec<String>) -> Result<Footer, ImageError> {
        let is_fixed = |footer: &Footer| footer.subformat() == Some(Subformat::Fixed);
        let (at, last) = &self.last;
        match (last, &self.copy) {
            (Ok(last), _) if is_fixed(last) => Ok(*last),
            (Ok(last), Ok(copy)) if !is_fixed(copy) => {
                if last != copy {
                    notes.push(format!(
                        "the footer at {at} is not the same as its copy at 0: the copy counts"
                    ));
                }
                Ok(*copy)
            }
            (Err(flaw), Ok(copy)) if !is_fixed(copy) => {
                notes.push(format!("there is no footer at {at}: {flaw}. Its copy at 0 counts"));
                Ok(*copy)
            }
            (Ok(last), Err(flaw)) => {
                notes.push(format!("there is no copy of the footer at 0: {flaw}. The footer at {at} counts"));
                Ok(*last)
            }
            (Ok(_), Ok(_)) => Err(invalid(format!(
                "the footer at {at} is one of a dynamic image, its copy at 0 one of a fixed image: one of them is not this \
                 image's"
            ))),
            (Err(flaw), _) => Err(invalid(format!(
                "this is no VHD, or a damaged one: a footer was expected at {at}, where {flaw}; and a copy of it at 0, \
                 where {}. If it is a fixed one, and something ended its growth or blktap while that had it open, \
                 `tapdisk check -f vhd --repair all` puts its footer back",
                match &self.copy {
                    Ok(_) => "there is one of a fixed image, which has none there".to_owned(),
                    Err(flaw) => flaw.to_string(),
                }
            ))),
        }
    }

    /// Where the last one is, if it is that of the image with this footer. In a file that lost its end the last sector is a
    /// guest's, which may write there what it likes; but it does not know the image's unique identifier.
    pub(super) fn own(&self, footer: &Footer) -> Option<u64> {
        let (at, last) = &self.last;
        last.as_ref().is_ok_and(|last| last.unique_id == footer.unique_id).then_some(*at)
    }
}

impl Header {
    /// Reads what an image says of itself, and judges it.
    ///
    /// # Errors
    /// What makes no sense, or cannot be served.
    pub async fn read(file: &Rc<dyn Storage>) -> Result<Header, ImageError> {
        let mut notes = Vec::new();
        let footers = Footers::read(file).await?;
        let footer = footers.judge(&mut notes)?;
        let footer_at = footers.own(&footer);
        let subformat = footer.subformat().ok_or_else(|| {
            invalid(format!(
                "the footer says that this is a disk of type {}: 2 (fixed), 3 (dynamic) and 4 (differencing) are known",
                footer.kind.get()
            ))
        })?;
        if footer.version.get() != 0x0001_0000 {
            return Err(ImageError::Unsupported(format!(
                "the footer is of version {:#010x}: 0x00010000 is known",
                footer.version.get()
            )));
        }
        let tap = footer.creator_version.get();
        if footer.is_of_blktap() && (tap == Footer::tap_version(0, 1) || tap > Footer::tap_version(1, 3)) {
            return Err(ImageError::Unsupported(format!(
                "this image was made by version {}.{} of blktap's VHD: 1.1 to 1.3 are known. blktap itself refuses 0.1",
                tap >> 16,
                tap & 0xffff
            )));
        }
        let sectors = footer.disk_sectors();
        if sectors > SECTORS_MAX {
            return Err(ImageError::Unsupported(format!(
                "the footer says that the disk has {sectors} sectors: a VHD has at most {SECTORS_MAX}, which are 2040 GiB"
            )));
        }
        if footer.saved != 0 {
            notes.push("the footer says that a machine was suspended which uses this disk".to_owned());
        }
        if footer.hidden != 0 {
            notes.push("blktap has marked it as hidden: only the images above it are for use".to_owned());
        }
        let mut header = Header { footer, subformat, footer_at, sparse: None, notes };
        if subformat == Subformat::Fixed {
            refuse_two(file, &footers).await?;
            let room = footers.last.0;
            if header.size() > room {
                return Err(invalid(format!(
                    "the footer says that the disk has {} bytes, but before it there are only {room}: the file was cut off",
                    header.size()
                )));
            }
        } else {
            header.sparse = Some(header.read_sparse(file).await?);
        }
        Ok(header)
    }

    async fn read_sparse(&mut self, file: &Rc<dyn Storage>) -> Result<Sparse, ImageError> {
        let at = self.footer.header_at.get();
        let is_there = at >= SECTOR && at.is_multiple_of(SECTOR);
        let span = Span::new(at, SECOND).filter(|span| is_there && span.is_within(file.size())).ok_or_else(|| {
            invalid(format!(
                "the footer says that the second header is at {at}: expected a multiple of {SECTOR} from {SECTOR} on, \
                 within the file's {} bytes",
                file.size()
            ))
        })?;
        let bytes = read(file, at, SECOND).await?;
        let second = Second::read_from_bytes(&bytes).map_err(|_size| invalid("half a header".to_owned()))?;
        let (blocks, table) = judge_second(&second, span, self.size(), file.size())?;
        let mut taken = vec![Span::new(0, SECTOR).expect("small"), span, table];
        let batmap_at = self.footer.has_batmap().then_some(table.end());
        let found = match batmap_at {
            Some(at) => self.read_batmap(file, at).await?.map(|batmap| (at, batmap)),
            None => None,
        };
        let batmap = found.filter(|(at, batmap)| self.is_batmap_sound(*at, batmap, file.size()));
        let is_stray = found.is_some() && batmap.is_none();
        taken.extend(found.and_then(|(at, _)| Span::new(at, SECTOR)));
        taken.extend(batmap.and_then(|(_, batmap)| Span::new(batmap.at.get(), batmap.len())));
        let (mut names, mut beyond) = (Vec::new(), Vec::new());
        for (number, locator) in second.locators.iter().enumerate() {
            if locator.platform.get() != 0
                && !self.read_locator(file, locator, &mut names, &mut taken).await?
            {
                beyond.push(number);
            }
        }
        if self.subformat == Subformat::Differencing {
            names.extend(locators::decode_name(&second.parent_name));
            if names.is_empty() {
                return Err(invalid(
                    "this is a differencing image, but none of its parent locators has a name that can be read here: \
                     expected one for W2ku, W2ru or MacX"
                        .to_owned(),
                ));
            }
        }
        Ok(Sparse { second, at, blocks, batmap, batmap_at, beyond, is_stray, names, taken })
    }

    /// The header of the batmap at this byte, if there is one.
    async fn read_batmap(&mut self, file: &Rc<dyn Storage>, at: u64) -> Result<Option<Batmap>, ImageError> {
        // What a file that was cut off has not is zero once it is longer.
        let mut bytes = match file.size().saturating_sub(at).min(SECTOR) {
            0 => Vec::new(),
            there => read(file, at, there).await?,
        };
        bytes.resize(SECTOR as usize, 0);
        let found = Batmap::parse(&bytes);
        if found.is_none() && self.footer.creator_version.get() > Footer::tap_version(1, 1) {
            self.notes.push(format!("there is no batmap at {at}: it is done without"));
        }
        if found.is_some_and(|batmap| batmap.is_encrypted != 0) {
            return Err(ImageError::Unsupported(
                "this image is encrypted (the batmap's header has the hash of a key), which is not supported: decrypt it \
                 with the tools that made it"
                    .to_owned(),
            ));
        }
        Ok(found)
    }

    /// Whether the batmap whose header is at this byte can be where that says, in a file of so many bytes.
    fn is_batmap_sound(&mut self, at: u64, batmap: &Batmap, file: u64) -> bool {
        let map = Span::new(batmap.at.get(), batmap.len());
        let is_sound = map.is_some_and(|map| {
            map.at() >= at + SECTOR
                && map.is_aligned(SECTOR)
                && map.is_within(file)
                && map.len() <= BLOCKS_MAX / 8
        });
        if !is_sound {
            self.notes.push(format!(
                "the batmap's header at {at} says that the map is at {}, with {} sectors: it is done without",
                batmap.at, batmap.sectors
            ));
        }
        is_sound
    }

    /// Reads a parent locator; false if it is beyond the end of the file.
    async fn read_locator(
        &mut self,
        file: &Rc<dyn Storage>,
        locator: &Locator,
        names: &mut Vec<String>,
        taken: &mut Vec<Span>,
    ) -> Result<bool, ImageError> {
        let (at, len) = (locator.at.get(), locator.len.get());
        let room = locators::room(locator.room.get()).map(|room| room.max(u64::from(len)));
        let span = room.and_then(|room| Span::new(at, room));
        let Some(found) = span.filter(|span| span.is_within(file.size())) else {
            self.notes.push(format!(
                "a parent locator says that it has {len} bytes at {at}, which makes no sense: it is left out"
            ));
            return Ok(span.is_none());
        };
        taken.push(found);
        let Some(platform) = Platform::of(locator.platform.get()) else { return Ok(true) };
        if self.subformat == Subformat::Differencing && (1..=NAME_MAX).contains(&len) {
            for name in platform.decode(&read(file, at, u64::from(len)).await?) {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        Ok(true)
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.footer.disk_sectors() * SECTOR
    }

    /// What kind it is.
    pub fn subformat(&self) -> Subformat {
        self.subformat
    }

    /// What tells it from all others; those over it name it.
    pub fn unique_id(&self) -> [u8; 16] {
        self.footer.unique_id
    }

    /// Bytes of a block, if it has blocks.
    pub fn block(&self) -> Option<u64> {
        self.sparse.as_ref().map(Sparse::block)
    }

    /// What is odd about it, in words for people.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Whether blktap's tools have disabled it.
    pub fn is_disabled(&self) -> bool {
        self.footer.cookie == DISABLED
    }

    /// What it says of the image below it.
    pub fn backing(&self) -> Option<Backing> {
        let sparse = self.sparse.as_ref().filter(|_| self.subformat == Subformat::Differencing)?;
        let (name, others) = sparse.names.split_first()?;
        // blktap's mark of a parent that is a raw disk.
        let id = Some(sparse.second.parent_id).filter(|id| *id != [0; 16]);
        let format = Some(if id.is_some() { Format::Vhd } else { Format::Raw });
        Some(Backing { name: name.clone(), format, others: others.to_vec(), unique_id: id })
    }
}

/// Refuses a file that is a fixed image by its last sector and by its first ones a dynamic one, of which that sector is a
/// block's: in a fixed image the first ones are the guest's, in a dynamic one that lost its footer the last one is. Whoever
/// believed the wrong one would give the guest the header of its own image to write.
async fn refuse_two(file: &Rc<dyn Storage>, footers: &Footers) -> Result<(), ImageError> {
    let Ok(copy) = footers.copy else { return Ok(()) };
    let Some(subformat) = copy.subformat().filter(|subformat| *subformat != Subformat::Fixed) else {
        return Ok(());
    };
    let mut other = Header { footer: copy, subformat, footer_at: None, sparse: None, notes: Vec::new() };
    if copy.disk_sectors() > SECTORS_MAX {
        return Ok(());
    }
    let sparse = match other.read_sparse(file).await {
        Ok(sparse) => sparse,
        Err(error @ ImageError::Io(_)) => return Err(error),
        // Nobody would take it for a dynamic image.
        Err(ImageError::Invalid(_) | ImageError::Unsupported(_) | ImageError::Refused(_)) => return Ok(()),
    };
    let (at, table_at) = (footers.last.0, sparse.second.table_at.get());
    let whole = sparse.bitmap() + sparse.block();
    let len = u64::from(sparse.listed()) * 4;
    for from in (0..len).step_by(TABLE_STEP as usize) {
        let entries = read(file, table_at + from, TABLE_STEP.min(len - from)).await?;
        let (entries, _) = entries.as_chunks();
        for entry in entries.iter().map(|entry| u32::from_be_bytes(*entry)).filter(|entry| *entry != UNUSED) {
            let place = u64::from(entry) * SECTOR;
            if place <= at && at < place + whole {
                return Err(invalid(format!(
                    "its last sector, at {at}, is the footer of a fixed image, and by its first ones it is a {} image with a \
                     block in that place: one of the two was written by a guest. If it is {0}, put a sector of zeroes behind \
                     the file's end; if it is fixed, convert it as a raw one",
                    subformat.name()
                )));
            }
        }
    }
    Ok(())
}

/// Judges a second header, which is at `span`, of a disk of `size` bytes in a file of so many. Gives the disk's blocks and
/// where the table is.
fn judge_second(second: &Second, span: Span, size: u64, file: u64) -> Result<(u32, Span), ImageError> {
    let at = span.at();
    if second.cookie != SECOND_COOKIE {
        return Err(invalid(format!("the second header at {at} does not begin with `cxsparse`")));
    }
    if second.checksum.get() != second.sum() {
        return Err(invalid(format!(
            "the second header at {at} is damaged: its checksum is {:#010x}, its bytes add up to {:#010x}. If it looks \
             sound otherwise, a check that repairs all seals it anew",
            second.checksum.get(),
            second.sum()
        )));
    }
    if second.version.get() != 0x0001_0000 {
        return Err(ImageError::Unsupported(format!(
            "the second header is of version {:#010x}: 0x00010000 is known",
            second.version.get()
        )));
    }
    let block = second.block.get();
    if !block.is_power_of_two() || u64::from(block) < SECTOR {
        return Err(invalid(format!(
            "the second header says that blocks have {block} bytes: expected a power of two from {SECTOR} on"
        )));
    }
    let blocks = size.div_ceil(u64::from(block));
    if blocks > u64::from(second.entries.get()) {
        return Err(invalid(format!(
            "the table has room for {} blocks, but the disk has {blocks}: {size} bytes in blocks of {block}",
            second.entries.get()
        )));
    }
    let blocks = check_blocks(size, block)?;
    let table_at = second.table_at.get();
    let table = Span::new(table_at, second.table_len()).filter(|table| {
        table_at >= SECTOR
            && table_at.is_multiple_of(SECTOR)
            && table.is_within(file)
            && !table.overlaps(span)
    });
    let table = table.ok_or_else(|| {
        invalid(format!(
            "the second header says that the table is at {table_at}, with {} entries: expected a multiple of {SECTOR} \
             behind the headers, and the table within the file's {file} bytes",
            second.entries.get()
        ))
    })?;
    Ok((blocks, table))
}

/// How many blocks a disk of so many bytes has.
///
/// # Errors
/// More than are supported.
pub(super) fn check_blocks(size: u64, block: u32) -> Result<u32, ImageError> {
    let blocks = size.div_ceil(u64::from(block));
    if blocks > BLOCKS_MAX {
        return Err(ImageError::Unsupported(format!(
            "a disk of {size} bytes has {blocks} blocks of {block} bytes: at most {BLOCKS_MAX} are supported. An image with \
             larger blocks can have it"
        )));
    }
    // At most 2^22.
    Ok(blocks as u32)
}
