//! Making an image larger, where nobody uses it. At any time the file is a whole image: the old one, or the new one.

use std::rc::Rc;

use block::{Buf, Span};
use storage::{Storage, Zeroing};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::SECTOR;
use super::batmap::{self, Batmap};
use super::blocks::ALIGN;
use super::create::{check_size, lengthen, write};
use super::cut;
use super::footer::{Footer, Subformat};
use super::geometry::Geometry;
use super::header::{Footers, Header, Sparse, UNUSED, check_blocks, read};
use crate::{ImageError, qcow, qcow2};

/// Bytes that are copied at a time.
const STEP: u64 = 1 << 20;

/// Whether the disk can have so many bytes without a larger table.
///
/// # Errors
/// Those of reading the image.
pub(super) async fn has_room(file: &Rc<dyn Storage>, bytes: u64) -> Result<bool, ImageError> {
    let header = Header::read(file).await?;
    let Some(sparse) = &header.sparse else { return Ok(true) };
    let (old, new) = (u64::from(sparse.blocks), bytes.div_ceil(sparse.block()));
    if new > u64::from(sparse.second.entries.get()) {
        return Ok(false);
    }
    if new <= old {
        return Ok(true);
    }
    let more = read(file, sparse.second.table_at.get() + old * 4, (new - old) * 4).await?;
    Ok(more.iter().all(|byte| *byte == 0xff))
}

/// Makes the disk of an image larger; what is added reads as zero, whatever the file has there. In a differencing image it is
/// what the image below has there: nothing, unless that is larger than the one above it. No tool of blktap's or Microsoft's
/// makes such an image, and [`Chain`](crate::Chain) does not let one grow.
///
/// # Errors
/// Less than it has, or more than a VHD can have; those of the image and its file.
pub async fn resize(file: &Rc<dyn Storage>, bytes: u64) -> Result<(), ImageError> {
    let header = Header::read(file).await?;
    let bytes = check_size(bytes)?;
    if bytes < header.size() {
        return Err(ImageError::Refused(format!(
            "the disk has {} bytes, and a VHD cannot be made smaller: convert it to a smaller image",
            header.size()
        )));
    }
    if bytes == header.size() {
        return Ok(());
    }
    let footer = larger(&header, bytes)?;
    if let Some(sparse) = &header.sparse {
        check_blocks(bytes, sparse.second.block.get())?;
        sparse.check_whole()?;
        let table = Table::read(file, sparse).await?;
        if let Some(last) = table.last() {
            cut::refuse(file, sparse, last, header.footer_at.unwrap_or(file.size())).await?;
        }
        forget_blocks(file, &header, sparse).await?;
    }
    let header = Header::read(file).await?;
    match &header.sparse {
        None => grow_fixed(file, &header, &footer, bytes).await,
        Some(sparse) => {
            let blocks = check_blocks(bytes, sparse.second.block.get())?;
            if blocks > sparse.second.entries.get() {
                Table::read(file, sparse).await?.grow(&header, bytes, blocks).await?;
            } else {
                clear_entries(file, sparse, blocks).await?;
            }
            let header = Header::read(file).await?;
            if let Some(sparse) = &header.sparse {
                clear_beyond(file, &header, sparse).await?;
            }
            // The old copy counts until the last step.
            let at = header.footer_at.unwrap_or(file.size());
            write(file, at, &footer.bytes()).await?;
            file.flush().await?;
            write(file, 0, &footer.bytes()).await?;
            Ok(file.flush().await?)
        }
    }
}

/// The footer of a larger disk.
fn larger(header: &Header, bytes: u64) -> Result<Footer, ImageError> {
    let mut footer = header.footer;
    let covered = Geometry::of(bytes / SECTOR).capacity() * SECTOR;
    if footer.goes_by_geometry() && covered != bytes && Geometry::of(bytes / SECTOR) != Geometry::MAX {
        if footer.creator != *b"qemu" {
            return Err(ImageError::Refused(format!(
                "this image is as large as its geometry says (it is one of Virtual PC), and no geometry has {bytes} bytes: \
                 {} would do",
                Geometry::round_up(bytes)
            )));
        }
        // QEMU's own word for an image that goes by its size.
        footer.creator = *b"qem2";
    }
    footer.set_size(bytes);
    Ok(footer)
}

/// The footer moves up first, with the old size: there is no copy of it.
async fn grow_fixed(
    file: &Rc<dyn Storage>,
    header: &Header,
    footer: &Footer,
    bytes: u64,
) -> Result<(), ImageError> {
    let old = header.footer_at.expect("a fixed image has no other footer");
    let at = old.max(bytes);
    if at > old {
        // Between the next two steps there is no footer. Then a guest's would count.
        let head = read(file, 0, SECTOR.min(old)).await?;
        let is_dynamic =
            Footers::read(file).await?.copy.is_ok_and(|copy| copy.subformat() != Some(Subformat::Fixed));
        if is_dynamic || qcow::is(&head) || qcow2::is(&head) {
            return Err(ImageError::Refused(
                "this fixed image has a disk that begins like a dynamic one, or like one of qcow2. If something interrupted \
                 its growth, it could be taken for that, and what a guest has written for its header: convert it to a larger \
                 image"
                    .to_owned(),
            ));
        }
        let before = file.size();
        if let Err(error) = move_footer(file, at, &header.footer).await {
            // The old one is where it was, but it has to be the last sector.
            if before < file.size()
                && let Err(other) = file.resize(before).await
            {
                tracing::warn!(
                    error = %other,
                    "the end of a fixed image cannot be put back: a check that repairs all does that"
                );
            }
            return Err(error.into());
        }
    }
    let end = (old + SECTOR).min(bytes);
    if let Some(span) = end.checked_sub(header.size()).and_then(|len| Span::new(header.size(), len)) {
        file.zero(span, Zeroing { unmap: true, fast: false }).await?;
        file.flush().await?;
    }
    write(file, at, &footer.bytes()).await?;
    Ok(file.flush().await?)
}

async fn move_footer(file: &Rc<dyn Storage>, at: u64, footer: &Footer) -> block::Result<()> {
    lengthen(file, at + SECTOR).await?;
    write(file, at, &footer.bytes()).await?;
    file.flush().await
}

/// Makes zero what the last block has beyond the end of a disk that is to grow: nobody has looked at it so far. All of it,
/// whatever its bitmap says, for QEMU looks at none.
async fn clear_beyond(file: &Rc<dyn Storage>, header: &Header, sparse: &Sparse) -> Result<(), ImageError> {
    let (last, used) = (header.size() / sparse.block(), header.size() % sparse.block());
    if used == 0 {
        return Ok(());
    }
    let entry = read(file, sparse.second.table_at.get() + last * 4, 4).await?;
    let entry = entry.first_chunk().map_or(UNUSED, |bytes| u32::from_be_bytes(*bytes));
    if entry == UNUSED {
        return Ok(());
    }
    let place = u64::from(entry) * SECTOR;
    let block = Span::new(place, sparse.bitmap() + sparse.block()).expect("below 2^42");
    if let Some(taken) = sparse.taken.iter().find(|taken| taken.overlaps(block)) {
        return Err(ImageError::Invalid(format!(
            "block {last} is at {block:?}, over metadata at {taken:?}: a check says more"
        )));
    }
    // A block that was given a place and nothing else may end behind the file's blocks.
    let end = header.footer_at.unwrap_or(file.size());
    let beyond = block.split_at(end).0.split_at(place + sparse.bitmap() + used).1;
    if !beyond.is_empty() {
        file.zero(beyond, Zeroing { unmap: true, fast: false }).await?;
        file.flush().await?;
    }
    Ok(())
}

/// Sees to it that the batmap says nothing of blocks that the disk is to have: nobody has looked at their bits so far. One with
/// a wrong checksum is left as it is: nobody believes it.
async fn forget_blocks(file: &Rc<dyn Storage>, header: &Header, sparse: &Sparse) -> Result<(), ImageError> {
    let Some((at, mut batmap)) = sparse.batmap else {
        if let Some(at) = sparse.batmap_at.filter(|_| sparse.is_stray) {
            write(file, at, &[0; batmap::COOKIE.len()]).await?;
            file.flush().await?;
        }
        return Ok(());
    };
    let mut map = read(file, batmap.at.get(), batmap.len()).await?;
    if batmap.fits(&map, header.size()) && Batmap::forget(&mut map, sparse.blocks) {
        batmap.seal(&map, header.size());
        write(file, batmap.at.get(), &map).await?;
        write(file, at, &batmap.bytes()).await?;
        file.flush().await?;
    }
    Ok(())
}

/// Sees to it that the entries of blocks that the disk is to have are unused: nobody has looked at them so far.
async fn clear_entries(file: &Rc<dyn Storage>, sparse: &Sparse, blocks: u32) -> Result<(), ImageError> {
    let (from, to) = (u64::from(sparse.blocks) * 4, u64::from(blocks) * 4);
    if from < to {
        write(file, sparse.second.table_at.get() + from, &vec![0xff; (to - from) as usize]).await?;
        file.flush().await?;
    }
    Ok(())
}

/// The table of an image, to be made larger.
struct Table<'a> {
    file: &'a Rc<dyn Storage>,
    sparse: &'a Sparse,
    entries: Vec<u32>,
}

impl<'a> Table<'a> {
    async fn read(file: &'a Rc<dyn Storage>, sparse: &'a Sparse) -> Result<Table<'a>, ImageError> {
        let bytes = read(file, sparse.second.table_at.get(), u64::from(sparse.listed()) * 4).await?;
        let entries =
            bytes.chunks_exact(4).map(|entry| u32::from_be_bytes([entry[0], entry[1], entry[2], entry[3]]));
        Ok(Table { file, sparse, entries: entries.collect() })
    }

    fn whole(&self) -> u64 {
        self.sparse.bitmap() + self.sparse.block()
    }

    /// Where the last block begins.
    fn last(&self) -> Option<u64> {
        let used = self.entries.iter().filter(|entry| **entry != UNUSED);
        used.map(|entry| u64::from(*entry) * SECTOR).max()
    }

    /// Byte after the last block.
    fn end(&self) -> u64 {
        self.last().map_or(0, |last| last + self.whole())
    }

    /// Makes room for so many entries. The new table, and the batmap, come behind the metadata that is there; blocks that
    /// are in the way move to the end.
    async fn grow(mut self, header: &Header, bytes: u64, blocks: u32) -> Result<(), ImageError> {
        let sparse = self.sparse;
        let mut second = sparse.second;
        second.entries = U32::new(blocks);
        let len = second.table_len();
        let fits = len == sparse.second.table_len()
            && sparse.batmap.as_ref().is_none_or(|(_, batmap)| batmap.len() * 8 >= u64::from(blocks));
        if fits {
            clear_entries(self.file, sparse, blocks).await?;
        } else {
            let start = sparse.taken_until();
            // Where there is none and blktap looks for one, there is an empty one then, and not what a guest has written.
            let batmap = sparse.batmap_at.map(|_| match &sparse.batmap {
                Some((_, old)) => old.moved(start + len, blocks),
                None => Batmap::new(start + len, blocks),
            });
            let end = batmap.as_ref().map_or(start + len, |new| new.at.get() + new.len());
            self.make_way(header, start, end).await?;
            // Blocks that the disk is to have are unused: nobody has looked at their entries so far.
            self.entries.truncate(sparse.blocks as usize);
            self.entries.resize((len / 4) as usize, UNUSED);
            let table: Vec<u8> = self.entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            for (number, part) in table.chunks(STEP as usize).enumerate() {
                write(self.file, start + number as u64 * STEP, part).await?;
            }
            if let Some(new) = batmap {
                self.move_batmap(new, start + len, (header.size(), bytes)).await?;
            }
            second.table_at = U64::new(start);
        }
        self.file.flush().await?;
        second.seal();
        // Only its first sector has changed: it is the old one or the new one.
        write(self.file, sparse.at, &second.as_bytes()[..SECTOR as usize]).await?;
        Ok(self.file.flush().await?)
    }

    /// Writes the batmap once more, its header at byte `at`, for a disk that has the second of the sizes instead of the first.
    async fn move_batmap(&self, mut new: Batmap, at: u64, sizes: (u64, u64)) -> Result<(), ImageError> {
        let mut bytes = vec![0; new.len() as usize];
        if let Some((_, old)) = &self.sparse.batmap {
            let map = read(self.file, old.at.get(), old.len()).await?;
            // A damaged one says nothing.
            if old.fits(&map, sizes.0) {
                let len = (self.sparse.blocks as usize).div_ceil(8).min(map.len());
                bytes[..len].copy_from_slice(&map[..len]);
            }
        }
        new.seal(&bytes, sizes.1);
        write(self.file, new.at.get(), &bytes).await?;
        Ok(write(self.file, at, &new.bytes()).await?)
    }

    /// Moves blocks out of the bytes from `start` to `end`, and the footer too.
    async fn make_way(&mut self, header: &Header, start: u64, end: u64) -> Result<(), ImageError> {
        let mut next = self.end().max(end);
        let way = Span::new(start, end - start).expect("below 2^42");
        let is_in_way = |entry: u32| {
            let place = Span::new(u64::from(entry) * SECTOR, self.whole()).expect("below 2^42");
            entry != UNUSED && place.overlaps(way)
        };
        let numbers = (0..self.entries.len()).filter(|number| is_in_way(self.entries[*number]));
        let moved: Vec<usize> = numbers.collect();
        let mut places = Vec::new();
        for _ in &moved {
            let data = (next + self.sparse.bitmap()).next_multiple_of(ALIGN);
            let sector =
                u32::try_from((data - self.sparse.bitmap()) / SECTOR).ok().filter(|sector| *sector < UNUSED);
            places.push(sector.ok_or_else(|| {
                ImageError::Refused(
                    "there is no room behind the last block: the table addresses 2 TiB".to_owned(),
                )
            })?);
            next = data + self.sparse.block();
        }
        let footer_at = header.footer_at.unwrap_or(self.file.size());
        if next > footer_at {
            lengthen(self.file, next + SECTOR).await?;
            write(self.file, next, &header.footer.bytes()).await?;
            if footer_at < next {
                let len = SECTOR.min(next - footer_at) as usize;
                write(self.file, footer_at, &vec![0; len]).await?;
            }
        }
        for (number, place) in moved.iter().zip(&places) {
            self.copy(u64::from(self.entries[*number]) * SECTOR, u64::from(*place) * SECTOR).await?;
        }
        self.file.flush().await?;
        for (number, place) in moved.into_iter().zip(places) {
            self.entries[number] = place;
            write(self.file, self.sparse.second.table_at.get() + number as u64 * 4, &place.to_be_bytes())
                .await?;
        }
        Ok(self.file.flush().await?)
    }

    /// Copies a block with its bitmap.
    async fn copy(&self, from: u64, to: u64) -> Result<(), ImageError> {
        for skip in (0..self.whole()).step_by(STEP as usize) {
            let len = STEP.min(self.whole() - skip);
            let there = len.min(self.file.size().saturating_sub(from + skip));
            let buf = Buf::zeroed(len as usize);
            if there > 0 {
                self.file.read(from + skip, buf.slice(0, there as usize)).await?;
            }
            if buf.to_vec().iter().any(|byte| *byte != 0) {
                self.file.write(to + skip, buf).await?;
            } else {
                let span = Span::new(to + skip, len).expect("below 2^42");
                self.file.zero(span, Zeroing { unmap: true, fast: false }).await?;
            }
        }
        Ok(())
    }
}
