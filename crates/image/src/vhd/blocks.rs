//! The blocks of a dynamic or differencing image: which there are, where, and which of their sectors are written.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::{Errno, Error, Result, Span};
use storage::{Permits, Storage};

use super::cut::{self, SLACK};
use super::footer::Footer;
use super::header::{Header, Sparse, TABLE_STEP, UNUSED};
use super::place::STRIDES;
use super::{SECTOR, Subformat, batmap};
use crate::metadata::{Loaded, Metadata, Stage, Units};
use crate::{Extent, ImageError};

/// Tables and bitmaps point to data: they are written when that is durable.
pub(super) const STAGE: Stage = 1;
/// Where data is put so that it is aligned for any storage, in bytes.
pub(super) const ALIGN: u64 = 4096;

/// The blocks of an open image.
pub(super) struct Blocks {
    pub(super) metadata: Metadata,
    pub(super) writable: bool,
    pub(super) is_differencing: bool,
    /// Bytes of a block are this power of two.
    shift: u32,
    /// Bytes of a block's bitmap.
    pub(super) bitmap: u64,
    table_at: Cell<u64>,
    /// A bit for each block that is known to have all its sectors, never unset.
    full: RefCell<Vec<u64>>,
    /// By number of sector: who changes the table's entry of a block has all its sectors.
    pub(super) units: Units,
    /// Taken by who makes room for a block.
    pub(super) growing: Permits,
    /// Byte after the last block.
    pub(super) next: Cell<u64>,
    /// Byte after the last one that a block can have: where the footer is, in an image that is written.
    pub(super) limit: Cell<u64>,
    /// From here on the file holds zeroes, but for the footer.
    pub(super) blank_from: Cell<u64>,
    /// Whether the end was moved, and is to be tidied up at last.
    pub(super) has_grown: Cell<bool>,
    /// Places that were given back, by the byte where the bitmap would be.
    pub(super) spare: RefCell<Vec<u64>>,
    pub(super) footer: RefCell<Footer>,
}

/// Where a block is: the byte at which its bitmap begins.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Place(pub(super) u64);

impl Blocks {
    /// The blocks of an image, read and judged. `metadata` has taken over what a process before this one left.
    ///
    /// # Errors
    /// Those of reading; entries that cannot be.
    pub(super) async fn open(
        metadata: Metadata,
        header: &Header,
        sparse: &Sparse,
        writable: bool,
    ) -> std::result::Result<Blocks, ImageError> {
        let blocks = Blocks {
            metadata,
            writable,
            is_differencing: header.subformat() == Subformat::Differencing,
            shift: sparse.block().trailing_zeros(),
            bitmap: sparse.bitmap(),
            table_at: Cell::new(0),
            full: RefCell::default(),
            units: Units::default(),
            growing: Permits::new(1),
            next: Cell::new(0),
            limit: Cell::new(0),
            blank_from: Cell::new(0),
            has_grown: Cell::new(false),
            spare: RefCell::default(),
            footer: RefCell::new(header.footer),
        };
        blocks.adopt(header, sparse).await?;
        // As much as a process leaves that was killed, and in its steps: nobody has wished for that.
        let left = blocks.limit.get().saturating_sub(blocks.next.get());
        let is_ours =
            left.is_multiple_of(blocks.stride()) && (1..=STRIDES).contains(&(left / blocks.stride()));
        blocks.has_grown.set(writable && is_ours);
        Ok(blocks)
    }

    /// Takes in the layout that the header tells.
    ///
    /// # Errors
    /// As for `open`.
    pub(super) async fn adopt(
        &self,
        header: &Header,
        sparse: &Sparse,
    ) -> std::result::Result<(), ImageError> {
        let file = self.file().clone();
        if self.table_at.replace(sparse.second.table_at.get()) != sparse.second.table_at.get() {
            // A table that has moved may lie over them.
            self.spare.borrow_mut().clear();
        }
        self.full.borrow_mut().resize((sparse.blocks as usize).div_ceil(64), 0);
        *self.footer.borrow_mut() = header.footer;
        let end = header.footer_at.unwrap_or(file.size());
        if self.writable {
            sparse.check_whole()?;
        }
        let last = self.judge(sparse, end).await?;
        if let Some(at) = last {
            if self.writable {
                cut::refuse(&file, sparse, at, end).await?;
            }
            if at + self.bitmap > end && header.footer_at.is_none() {
                tracing::warn!(
                    at,
                    end,
                    "the last block of an image is not in the file: unless it was given its place and nothing else, as blktap \
                     does, it was cut off"
                );
            }
        }
        let next = last.map_or(0, |last| last + self.whole()).max(sparse.taken_until());
        // Places that were given away and are not in the table yet are behind those that are.
        let next = next.max(self.next.get());
        self.next.set(next);
        self.limit.set(end);
        if self.writable {
            if let Some(at) = sparse.batmap_at.filter(|_| sparse.is_stray) {
                self.metadata.write_through(at, &[0; batmap::COOKIE.len()]).await?;
                self.metadata.sync().await?;
            }
            self.put_footer(header, next).await;
        }
        self.blank_from.set(file.size());
        Ok(())
    }

    pub(super) fn file(&self) -> &Rc<dyn Storage> {
        self.metadata.file()
    }

    /// Bytes of a block of the disk.
    pub(super) fn block(&self) -> u64 {
        1 << self.shift
    }

    /// Bytes of a block in the file, with its bitmap.
    pub(super) fn whole(&self) -> u64 {
        self.bitmap + self.block()
    }

    /// Bytes from one new block to the next.
    pub(super) fn stride(&self) -> u64 {
        self.block() + self.bitmap.next_multiple_of(ALIGN)
    }

    /// Reads the whole table and judges it, for a file whose blocks end at `end`. Gives the byte where the last block
    /// begins.
    async fn judge(&self, sparse: &Sparse, end: u64) -> std::result::Result<Option<u64>, ImageError> {
        // Who only reads looks at the disk's blocks alone.
        let count = if self.writable { sparse.listed() } else { sparse.blocks };
        let len = u64::from(count) * 4;
        let mut places: Vec<u32> = Vec::new();
        let mut problem = None;
        for from in (0..len).step_by(TABLE_STEP as usize) {
            let part =
                Span::new(self.table_at.get() + from, TABLE_STEP.min(len - from)).expect("within the file");
            let _loaded = self.metadata.load(part, STAGE).await?;
            for block in from / 4..(from + part.len()) / 4 {
                let entry = self.entry(block).expect("just loaded");
                if entry == UNUSED {
                    continue;
                }
                let place = Span::new(u64::from(entry) * SECTOR, self.whole()).expect("below 2^42");
                match sparse.taken.iter().find(|taken| taken.overlaps(place)) {
                    Some(taken) => {
                        problem = Some(format!("block {block} is at {place:?}, over metadata at {taken:?}"));
                    }
                    None => places.push(entry),
                }
            }
        }
        places.sort_unstable();
        let is_over = |pair: &&[u32]| u64::from(pair[1] - pair[0]) * SECTOR < self.whole();
        if let Some(pair) = places.windows(2).find(is_over) {
            let [one, other] = [pair[0], pair[1]].map(|entry| u64::from(entry) * SECTOR);
            problem = Some(format!("a block at {other} lies over one at {one}"));
        }
        if let Some(problem) = problem {
            if self.writable {
                return Err(ImageError::Invalid(format!(
                    "the table makes no sense: {problem}. A check finds out more; the image can be opened to be read"
                )));
            }
            tracing::warn!("the table of an image makes no sense: {problem}");
        }
        let places = places.into_iter().map(|entry| u64::from(entry) * SECTOR);
        let last = places.clone().next_back();
        // Only the last block may be one that was given a place and nothing else.
        let is_beyond =
            |at: &u64| if Some(*at) == last { *at > end + SLACK } else { at + self.whole() > end };
        if let Some(at) = places.into_iter().find(is_beyond) {
            return Err(ImageError::Invalid(format!(
                "a block is at {at}, with {} bytes, but the file's blocks end at {end}: the file was cut off. A check that \
                 repairs all drops what is lost",
                self.whole()
            )));
        }
        Ok(last)
    }

    /// Sees to it that there is a footer behind the last block. It is no error if there cannot be: the copy at 0 is there.
    async fn put_footer(&self, header: &Header, next: u64) {
        let size = self.file().size();
        let at = match header.footer_at {
            Some(at) if at >= next => return,
            // Its place may only have lost its bytes.
            None if size.is_multiple_of(SECTOR) && size >= next + SECTOR => size - SECTOR,
            Some(_) | None => next,
        };
        let footer = self.footer.borrow().bytes();
        let result = match self.metadata.write_through(at, &footer).await {
            Ok(()) => self.clear(header.footer_at).await,
            Err(error) => Err(error),
        };
        match result {
            Ok(()) => self.limit.set(at),
            Err(error) => {
                // Blocks may only be where a footer can follow.
                self.limit.set(self.limit.get().max(next));
                tracing::warn!(%error, at, "the footer of an image cannot be put back; its copy at 0 is there");
            }
        }
    }

    /// Clears what was a footer and is in a block now.
    async fn clear(&self, footer_at: Option<u64>) -> Result<()> {
        match footer_at {
            Some(at) => self.metadata.write_through(at, &[0; SECTOR as usize]).await,
            None => Ok(()),
        }
    }

    /// Where the table's entry of a block is: the word, and how far its bits are to be shifted.
    pub(super) fn entry_word(&self, block: u64) -> (u64, u32) {
        let at = self.table_at.get() + block * 4;
        (at & !7, if at & 4 == 0 { 32 } else { 0 })
    }

    /// The table's entry of a block, if it is in memory.
    pub(super) fn entry(&self, block: u64) -> Option<u32> {
        let (at, shift) = self.entry_word(block);
        Some((self.metadata.word(at)? >> shift) as u32)
    }

    /// Brings the table's entry of a block into memory.
    pub(super) async fn load_entry(&self, block: u64) -> Result<Loaded> {
        let span = Span::new(self.entry_word(block).0, 8).expect("within the file");
        self.metadata.load(span, STAGE).await
    }

    /// Brings the bitmap of a block into memory.
    pub(super) async fn load_bitmap(&self, block: u64, place: Place) -> Result<Loaded> {
        let span = Span::new(place.0, self.bitmap).expect("below 2^42");
        let loaded = self.metadata.load(span, STAGE).await?;
        if self.run(place, 0, self.block() / SECTOR) == Some((true, self.block() / SECTOR)) {
            self.set_full(block);
        }
        Ok(loaded)
    }

    fn is_full(&self, block: u64) -> bool {
        let word = self.full.borrow().get((block / 64) as usize).copied().unwrap_or(0);
        word >> (block % 64) & 1 == 1
    }

    pub(super) fn set_full(&self, block: u64) {
        if let Some(word) = self.full.borrow_mut().get_mut((block / 64) as usize) {
            *word |= 1 << (block % 64);
        }
    }

    /// Whether the sector of a block is written, and how many from it on, up to sector `end`, are as it is: as many as are
    /// known. `None` if nothing is.
    pub(super) fn run(&self, place: Place, sector: u64, end: u64) -> Option<(bool, u64)> {
        let first = self.metadata.word(place.0 + sector / 64 * 8)?;
        let is_set = first << (sector % 64) >> 63 == 1;
        let mut at = sector;
        while at < end {
            let Some(word) = self.metadata.word(place.0 + at / 64 * 8) else { break };
            let others = if is_set { !word } else { word } << (at % 64);
            let left = 64 - at % 64;
            let same = u64::from(others.leading_zeros()).min(left);
            at += same;
            if same < left {
                break;
            }
        }
        Some((is_set, at.min(end) - sector))
    }

    /// Which block a byte of the disk is in, and which of its bytes it is.
    pub(super) fn find(&self, at: u64) -> (u64, u64) {
        (at >> self.shift, at & (self.block() - 1))
    }

    /// What is where nothing was written.
    fn nothing(&self, len: u64) -> Extent {
        if self.is_differencing { Extent::Below { len } } else { Extent::Zero { len } }
    }

    /// Where the bytes from the span's first on are, as far as is known from what is in memory.
    pub(super) fn look(&self, span: Span) -> Option<Extent> {
        let (block, skip) = self.find(span.at());
        let entry = self.entry(block)?;
        let mut len = span.len().min(self.block() - skip);
        if entry == UNUSED {
            let mut next = block + 1;
            while len < span.len() && self.entry(next) == Some(UNUSED) {
                len = (len + self.block()).min(span.len());
                next += 1;
            }
            return Some(self.nothing(len));
        }
        let place = Place(u64::from(entry) * SECTOR);
        let data = place.0 + self.bitmap;
        let at = data + skip;
        let limit = self.limit.get();
        // Where its footer could not be put back, a file may end before its blocks do.
        let end = limit.min(self.file().size());
        if self.writable && data + self.block() > limit {
            return None;
        }
        if !self.is_full(block) {
            let (is_set, sectors) = self.run(place, skip / SECTOR, (skip + len).div_ceil(SECTOR))?;
            len = len.min((skip / SECTOR + sectors) * SECTOR - skip);
            if !is_set {
                return Some(self.nothing(len));
            }
        }
        // The last block of an image that was not closed may end with the file: what is beyond was never written, and has no
        // bits. Where it has, the file was cut off.
        let there = end.checked_sub(at).filter(|there| *there > 0)?;
        Some(Extent::Data { at, len: len.min(there), pin: None })
    }

    /// As `look`, of what is brought into memory first.
    ///
    /// # Errors
    /// Those of reading; EIO for an entry that cannot be, and for bytes that were cut off the file.
    pub(super) async fn map(&self, span: Span) -> Result<Extent> {
        let (block, _) = self.find(span.at());
        let _table = self.load_entry(block).await?;
        if let Some(extent) = self.look(span) {
            return Ok(extent);
        }
        let place = self.placed(block)?;
        let _bitmap = match place {
            Some(place) => Some(self.load_bitmap(block, place).await?),
            None => None,
        };
        self.look(span).ok_or_else(|| {
            let doing = format!("find byte {} in block {block}: the file was cut off before it", span.at());
            Error::new(Errno::EIO, doing)
        })
    }

    /// Where a block is, whose entry is in memory.
    ///
    /// # Errors
    /// EIO if it cannot be there.
    pub(super) fn placed(&self, block: u64) -> Result<Option<Place>> {
        let entry = self.entry(block).expect("whoever asks has brought it into memory");
        if entry == UNUSED {
            return Ok(None);
        }
        let place = Place(u64::from(entry) * SECTOR);
        if self.writable && place.0 + self.whole() > self.limit.get() {
            let doing = format!("find block {block}: the table says at {}, behind the last one", place.0);
            return Err(Error::new(Errno::EIO, doing));
        }
        Ok(Some(place))
    }
}
