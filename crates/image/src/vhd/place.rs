//! Places for what is written: sectors of a block, or a new block.

use block::{Errno, Error, Result, Span};
use storage::Zeroing;

use super::SECTOR;
use super::blocks::{ALIGN, Blocks, Place};
use super::header::UNUSED;
use crate::Placement;
use crate::metadata::{Loaded, UnitLock};

/// The file grows by so many blocks more than are needed, until it is closed.
pub(super) const STRIDES: u64 = 7;

/// What is to be said once the bytes of a placement are written.
struct Pending {
    block: u64,
    place: Place,
    is_new: bool,
    /// The first of the block's sectors to be shown, and the one after the last.
    sectors: (u64, u64),
    _lock: UnitLock,
    _table: Loaded,
    _bitmap: Option<Loaded>,
}

impl Blocks {
    /// The place of bytes that have theirs, if that is known from what is in memory.
    pub(super) fn shown(&self, span: Span) -> Option<Placement> {
        match self.look(span)? {
            // A file that ends before what its table points to is not written there.
            crate::Extent::Data { at, len, .. } if at + len > self.metadata.file().size() => None,
            crate::Extent::Data { at, len, pin } => Some(Placement::shown(at, len, pin)),
            crate::Extent::Zero { .. } | crate::Extent::Below { .. } | crate::Extent::Packed { .. } => None,
        }
    }

    /// See [`Image::place`](crate::Image::place).
    ///
    /// # Errors
    /// Those of reading the map and of making room.
    pub(super) async fn place(&self, span: Span) -> Result<Placement> {
        self.metadata.admit().await?;
        let (block, skip) = self.find(span.at());
        let len = span.len().min(self.block() - skip);
        loop {
            let table = self.load_entry(block).await?;
            let Some(place) = self.placed(block)? else {
                let lock = self.lock(block, 0, self.block() / SECTOR).await;
                if self.placed(block)?.is_some() {
                    continue;
                }
                return self.place_new(block, skip, len, lock, table).await;
            };
            let bitmap = self.load_bitmap(block, place).await?;
            if let Some(placement) = self.shown(span) {
                return Ok(placement);
            }
            let sectors = (skip / SECTOR, (skip + len).div_ceil(SECTOR));
            let lock = self.lock(block, sectors.0, sectors.1).await;
            // Another may have written to them meanwhile.
            if let Some(placement) = self.shown(span) {
                return Ok(placement);
            }
            let is_set = |sector| self.run(place, sector, sector + 1) == Some((true, 1));
            let before = if is_set(sectors.0) { 0 } else { skip % SECTOR };
            let after = if is_set(sectors.1 - 1) { 0 } else { sectors.1 * SECTOR - (skip + len) };
            let pending = Pending {
                block,
                place,
                is_new: false,
                sectors,
                _lock: lock,
                _table: table,
                _bitmap: Some(bitmap),
            };
            let at = place.0 + self.bitmap + skip;
            let (end, size) = (at + len + after, self.metadata.file().size());
            if end > size {
                let doing = format!(
                    "write to block {block}, which ends at {end} in a file of {size} bytes: `tapdisk check` says more"
                );
                return Err(Error::new(Errno::EIO, doing));
            }
            return Ok(Placement {
                at,
                len,
                before,
                after,
                blank: false,
                pin: None,
                keep: Some(Box::new(pending)),
            });
        }
    }

    async fn lock(&self, block: u64, from: u64, to: u64) -> UnitLock {
        let first = block * (self.block() / SECTOR);
        self.units.lock(first + from..first + to).await
    }

    async fn place_new(
        &self,
        block: u64,
        skip: u64,
        len: u64,
        lock: UnitLock,
        table: Loaded,
    ) -> Result<Placement> {
        let place =
            self.make_room().await.map_err(|error| error.during(format!("make room for block {block}")))?;
        let sectors = (skip / SECTOR, (skip + len).div_ceil(SECTOR));
        let (before, after, bitmap) = if self.is_differencing {
            match self.load_bitmap(block, place).await {
                Ok(loaded) => (skip % SECTOR, sectors.1 * SECTOR - (skip + len), Some(loaded)),
                Err(error) => {
                    self.spare.borrow_mut().push(place.0);
                    return Err(error);
                }
            }
        } else {
            // All of it shows at once: it is zero around what is written.
            (0, 0, None)
        };
        let pending =
            Pending { block, place, is_new: true, sectors, _lock: lock, _table: table, _bitmap: bitmap };
        let at = place.0 + self.bitmap + skip;
        Ok(Placement { at, len, before, after, blank: true, pin: None, keep: Some(Box::new(pending)) })
    }

    /// See [`Image::commit`](crate::Image::commit).
    ///
    /// # Errors
    /// Those of telling a successor.
    pub(super) async fn commit(&self, placement: Placement) -> Result<()> {
        let Some(pending) = placement.keep.and_then(|keep| keep.downcast::<Pending>().ok()) else {
            // Another request may have published it, whose answer still waits.
            return self.metadata.saved().await;
        };
        let Pending { block, place, is_new, sectors: (from, to), .. } = *pending;
        let word = |at| self.metadata.word(at).expect("loaded while the placement lives");
        let mut words = Vec::new();
        if is_new {
            let (at, shift) = self.entry_word(block);
            let entry = place.0 / SECTOR;
            words.push((at, word(at) & !(u64::from(UNUSED) << shift) | entry << shift));
        }
        if self.is_differencing || !is_new {
            let mut sector = from;
            while sector < to {
                let next = (sector / 64 + 1) * 64;
                let mut mask = u64::MAX >> (sector % 64);
                if to < next {
                    mask &= !(u64::MAX >> (to % 64));
                }
                let at = place.0 + sector / 64 * 8;
                words.push((at, word(at) | mask));
                sector = next;
            }
        } else {
            self.set_full(block);
        }
        self.metadata.set(&words);
        drop(pending);
        self.metadata.saved().await
    }

    /// See [`Image::give_up`](crate::Image::give_up).
    pub(super) fn give_up(&self, placement: Placement) {
        if let Some(pending) = placement.keep.and_then(|keep| keep.downcast::<Pending>().ok())
            && pending.is_new
        {
            self.spare.borrow_mut().push(pending.place.0);
        }
    }

    /// Gives back places behind the last block; gives where that ends.
    pub(super) fn give_back(&self) -> u64 {
        let mut spare = self.spare.borrow_mut();
        while let Some(last) = spare.iter().position(|at| at + self.whole() == self.next.get()) {
            self.next.set(spare.swap_remove(last));
        }
        self.next.get()
    }

    /// Makes room for a block: zeroes, and before them a bitmap that says that all of it is written or, if the image is
    /// differencing, nothing.
    async fn make_room(&self) -> Result<Place> {
        let permit = self.growing.take().await;
        let spare = self.spare.borrow_mut().pop();
        let (start, dirty, place) = match spare {
            Some(at) => (at, at + self.whole(), Place(at)),
            None => self.append().await?,
        };
        // Others may have the next places meanwhile.
        drop(permit);
        let result = self.blank(start, dirty, place.0).await;
        if result.is_err() {
            self.spare.borrow_mut().push(place.0);
        }
        result.map(|()| place)
    }

    /// Takes the place behind the last block, and moves the footer behind it if that is in the way. Gives also the bytes
    /// that may hold anything: from one to another.
    async fn append(&self) -> Result<(u64, u64, Place)> {
        let start = self.next.get();
        let data = (start + self.bitmap).next_multiple_of(ALIGN);
        let (place, end) = (data - self.bitmap, data + self.block());
        if place / SECTOR >= u64::from(UNUSED) {
            let doing =
                "address more than 2 TiB of the file: the table of a VHD cannot. Convert the image to qcow2";
            return Err(Error::new(Errno::ENOSPC, doing));
        }
        if end > self.limit.get() {
            // Behind more blocks than this one, so that not each has to move it.
            match self.move_footer(end.saturating_add(STRIDES * self.stride())).await {
                // It need not be so much.
                Err(error) if error.errno().is_no_space() || error.errno() == Errno::EFBIG => {
                    self.move_footer(end).await?;
                }
                result => result?,
            }
        }
        self.next.set(end);
        Ok((start, self.blank_from.get().min(end), Place(place)))
    }

    /// Writes a footer at byte `at`, where the file is to end then. The one before it stays until it is there.
    async fn move_footer(&self, at: u64) -> Result<()> {
        self.has_grown.set(true);
        // What is there, the old footer too, may be in a block soon.
        self.blank_from.set(self.file().size());
        let before = self.metadata.extend(at + SECTOR).await?;
        let footer = self.footer.borrow().bytes();
        if let Err(error) = self.metadata.write_through(at, &footer).await {
            // With the old end there is the old footer.
            if before < self.file().size()
                && let Err(other) = self.file().resize(before).await
            {
                tracing::warn!(error = %other, "the end of an image cannot be put back; a copy of its footer is at 0");
            }
            self.blank_from.set(self.file().size());
            return Err(error.during("write the footer"));
        }
        self.limit.set(at);
        Ok(())
    }

    /// Makes the bytes from `start` to `end` zero, but for a new bitmap at `place`; what is behind `end` is zero.
    async fn blank(&self, start: u64, end: u64, place: u64) -> Result<()> {
        let data = place + self.bitmap;
        if end > data {
            let how = Zeroing { unmap: true, fast: false };
            self.file().zero(Span::new(data, end - data).expect("within the file"), how).await?;
        }
        let mut bytes = vec![0; (data - start) as usize];
        if !self.is_differencing {
            bytes[(place - start) as usize..].fill(0xff);
        }
        self.metadata
            .write_through(start, &bytes)
            .await
            .map_err(|error| error.during("write a block's bitmap"))
    }
}
