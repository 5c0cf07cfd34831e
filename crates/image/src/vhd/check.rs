//! Checking an image that nobody uses, and putting it right.

use std::rc::Rc;

use block::Span;
use storage::Storage;
use zerocopy::{FromBytes, IntoBytes};

use super::blocks::ALIGN;
use super::create::{random_id, write};
use super::cut::{self, Cut, SLACK};
use super::footer::{self, Flaw, Footer, Subformat};
use super::header::{Footers, Header, Locator, SECOND, SECOND_COOKIE, Second, Sparse, UNUSED, read};
use super::{SECTOR, batmap};
use crate::{ImageError, Repair, Report};

/// Bytes that are looked through at a time.
const STEP: u64 = 1 << 20;

/// Checks an image, and puts right what it may.
///
/// A footer that is missing is no corruption, since there is its copy: it counts as a leak, and so do blocks' worth of bytes
/// that nothing uses. Corruptions are entries of the table that cannot be, and a batmap that says what is not so.
///
/// # Errors
/// What is no image, or one whose header cannot be read; those of the file.
pub async fn check(file: &Rc<dyn Storage>, repair: Repair) -> Result<Report, ImageError> {
    check_storage(file, repair, false).await
}

/// As [`check`], of an image on a block device: what that has behind the last block is no waste.
///
/// # Errors
/// As for [`check`].
pub async fn check_device(file: &Rc<dyn Storage>, repair: Repair) -> Result<Report, ImageError> {
    check_storage(file, repair, true).await
}

async fn check_storage(
    file: &Rc<dyn Storage>,
    repair: Repair,
    is_device: bool,
) -> Result<Report, ImageError> {
    let mut report = Report::default();
    if repair != Repair::No {
        find_footer(file, &mut report).await?;
    }
    if repair == Repair::All {
        revive_footer(file, &mut report).await?;
        seal_second(file, &mut report).await?;
    }
    let header = Header::read(file).await?;
    header.notes().iter().for_each(|note| report.note(|| note.clone()));
    let mut check = Check { file, header, repair, report };
    check.locators().await?;
    match check.header.sparse.clone() {
        None => check.report.image_end_offset = file.size(),
        Some(sparse) => {
            check.stray(&sparse).await?;
            let entries = check.table(&sparse).await?;
            let entries = check.cut(&sparse, entries).await?;
            check.keep_the_end();
            check.batmap(&sparse, &entries).await?;
            check.end(&sparse, &entries, is_device).await?;
            check.footers().await?;
        }
    }
    if check.report.corruptions_fixed + check.report.leaks_fixed > 0 {
        file.flush().await?;
    }
    Ok(check.report)
}

/// Looks for the footer of a fixed image that was being made larger when something ended that: it is before the zeroes that
/// were added. The file ends behind it then, as it did before.
async fn find_footer(file: &Rc<dyn Storage>, report: &mut Report) -> Result<(), ImageError> {
    let footers = Footers::read(file).await?;
    if footers.judge(&mut Vec::new()).is_ok() {
        return Ok(());
    }
    let mut end = file.size().next_multiple_of(SECTOR);
    while end > 0 {
        let start = end.saturating_sub(STEP);
        let mut bytes = read(file, start, end.min(file.size()) - start).await?;
        bytes.resize((end - start) as usize, 0);
        let Some(sector) =
            bytes.chunks_exact(SECTOR as usize).rposition(|sector| sector.iter().any(|byte| *byte != 0))
        else {
            end = start;
            continue;
        };
        let at = start + sector as u64 * SECTOR;
        let found = bytes[sector * SECTOR as usize..].first_chunk().map(Footer::parse);
        let is_fixed = |footer: &Footer| footer.subformat() == Some(Subformat::Fixed);
        if let Some(Ok(footer)) = found
            && is_fixed(&footer)
            && footer.disk_sectors() <= at / SECTOR
        {
            file.resize(at + SECTOR).await?;
            if file.size() != at + SECTOR {
                write(file, file.size() - SECTOR, &footer.bytes()).await?;
            }
            report.leaks_fixed += 1;
            report.note(|| format!("the footer was found at {at}, with nothing but zeroes behind it: it is the last sector again"));
        }
        return Ok(());
    }
    Ok(())
}

/// Makes a new footer for a fixed image whose own blktap has filled with 0xc7: all before it is the disk.
async fn revive_footer(file: &Rc<dyn Storage>, report: &mut Report) -> Result<(), ImageError> {
    let Footers { last: (at, last), copy } = Footers::read(file).await?;
    // A dynamic one that has lost its copy is another thing.
    if last != Err(Flaw::Killed) || copy != Err(Flaw::Cookie) || at == 0 || !at.is_multiple_of(SECTOR) {
        return Ok(());
    }
    let second = SECTOR + SECOND_COOKIE.len() as u64;
    if second <= at && read(file, SECTOR, SECOND_COOKIE.len() as u64).await? == SECOND_COOKIE {
        return Ok(());
    }
    let created = footer::timestamp(std::time::SystemTime::now());
    let footer = Footer::new(Subformat::Fixed, at, created, random_id()?);
    write(file, at, &footer.bytes()).await?;
    report.corruptions_fixed += 1;
    report.note(|| {
        format!("the footer at {at} was filled with 0xc7: a new one says that all before it is a fixed disk")
    });
    Ok(())
}

/// Seals a second header whose checksum is wrong and which makes sense otherwise.
async fn seal_second(file: &Rc<dyn Storage>, report: &mut Report) -> Result<(), ImageError> {
    let footer = Footers::read(file).await?.judge(&mut Vec::new())?;
    let at = footer.header_at.get();
    if Span::new(at, SECOND).is_none_or(|span| !span.is_within(file.size())) {
        return Ok(());
    }
    let Ok(mut second) = Second::read_from_bytes(&read(file, at, SECOND).await?) else { return Ok(()) };
    if second.cookie != SECOND_COOKIE || second.checksum.get() == second.sum() {
        return Ok(());
    }
    let before = second;
    second.seal();
    write(file, at, second.as_bytes()).await?;
    if let Err(error) = Header::read(file).await {
        // It is damaged, and not only its seal.
        write(file, at, before.as_bytes()).await?;
        return Err(error);
    }
    report.corruptions_fixed += 1;
    report.note(|| format!("the second header at {at} had a wrong checksum: it was sealed anew"));
    Ok(())
}

struct Check<'a> {
    file: &'a Rc<dyn Storage>,
    header: Header,
    repair: Repair,
    report: Report,
}

impl Check<'_> {
    /// Notes a corruption; whether it is to be put right.
    fn corruption(&mut self, what: impl FnOnce() -> String) -> bool {
        let fixes = self.repair == Repair::All;
        if fixes {
            self.report.corruptions_fixed += 1;
        } else {
            self.report.corruptions += 1;
        }
        self.report.note(what);
        fixes
    }

    /// Notes wasted space, in blocks; whether it is to be given back.
    fn leak(&mut self, blocks: u64, what: impl FnOnce() -> String) -> bool {
        let fixes = self.repair != Repair::No;
        if fixes {
            self.report.leaks_fixed += blocks;
        } else {
            self.report.leaks += blocks;
        }
        self.report.note(what);
        fixes
    }

    /// Takes out parent locators that are beyond the end of the file.
    async fn locators(&mut self) -> Result<(), ImageError> {
        let Some(sparse) = self.header.sparse.clone() else { return Ok(()) };
        let mut second = sparse.second;
        for number in &sparse.beyond {
            if self.corruption(|| format!("parent locator {number} is beyond the end of the file")) {
                second.locators[*number] = Locator::NONE;
            }
        }
        if second == sparse.second {
            if !sparse.beyond.is_empty() {
                // Nothing is written behind the end, not even a footer.
                self.repair = Repair::No;
            }
            return Ok(());
        }
        second.seal();
        write(self.file, sparse.at, second.as_bytes()).await?;
        self.header = Header::read(self.file).await?;
        Ok(())
    }

    /// Takes out the header of a batmap that cannot be.
    async fn stray(&mut self, sparse: &Sparse) -> Result<(), ImageError> {
        if let Some(at) = sparse.batmap_at.filter(|_| sparse.is_stray)
            && self.leak(1, || format!("the batmap's header at {at} makes no sense"))
        {
            write(self.file, at, &[0; batmap::COOKIE.len()]).await?;
        }
        Ok(())
    }

    /// Nothing is put behind the end of a file, or given back there, while it may have lost something: that would be taken
    /// for what is lost.
    fn keep_the_end(&mut self) {
        if self.report.corruptions > 0 && self.repair != Repair::No {
            self.repair = Repair::No;
            self.report.note(|| {
                "leaks are left as they are until the faults are put right: `--repair all` does both"
                    .to_owned()
            });
        }
    }

    /// Checks each entry of the table; gives those that make sense.
    async fn table(&mut self, sparse: &Sparse) -> Result<Vec<u32>, ImageError> {
        let whole = sparse.bitmap() + sparse.block();
        let end = self.header.footer_at.unwrap_or(self.file.size());
        let bytes = read(self.file, sparse.second.table_at.get(), u64::from(sparse.listed()) * 4).await?;
        let mut entries: Vec<u32> = bytes
            .chunks_exact(4)
            .map(|entry| u32::from_be_bytes([entry[0], entry[1], entry[2], entry[3]]))
            .collect();
        let mut places: Vec<(u32, usize)> = entries
            .iter()
            .enumerate()
            .filter(|(_, entry)| **entry != UNUSED)
            .map(|(block, entry)| (*entry, block))
            .collect();
        places.sort_unstable();
        self.report.total_clusters = u64::from(sparse.blocks);
        let is_shown = |(_, block): &&(u32, usize)| *block < sparse.blocks as usize;
        self.report.allocated_clusters = places.iter().filter(is_shown).count() as u64;
        let last = places.last().map(|(entry, _)| *entry);
        let mut free_from = 0;
        let mut dropped = Vec::new();
        for (entry, block) in places {
            let at = u64::from(entry) * SECTOR;
            let place = Span::new(at, whole).expect("below 2^42");
            let problem = if let Some(taken) = sparse.taken.iter().find(|taken| taken.overlaps(place)) {
                Some(format!("block {block} is at {place:?}, over metadata at {taken:?}"))
            } else if at < free_from {
                Some(format!("block {block} is at {place:?}, over another block that ends at {free_from}"))
            } else if place.end() > end && (Some(entry) != last || at > end + SLACK) {
                Some(format!("block {block} is at {place:?}, beyond the end of the file's blocks at {end}"))
            } else {
                None
            };
            match problem {
                None => free_from = place.end(),
                Some(problem) => {
                    if self.corruption(|| problem) {
                        dropped.push(block);
                    }
                }
            }
        }
        for block in dropped {
            entries[block] = UNUSED;
            self.drop_block(sparse, block).await?;
        }
        let used: Vec<u64> = entries
            .iter()
            .take(sparse.blocks as usize)
            .filter(|entry| **entry != UNUSED)
            .map(|entry| u64::from(*entry) * SECTOR)
            .collect();
        let is_behind = |pair: &&[u64]| pair[1] >= pair[0] + whole && pair[1] < pair[0] + whole + ALIGN;
        self.report.fragmented_clusters =
            (used.len().saturating_sub(1) - used.windows(2).filter(is_behind).count()) as u64;
        Ok(entries)
    }

    /// Takes the entry of a block out of the table.
    async fn drop_block(&mut self, sparse: &Sparse, block: usize) -> Result<(), ImageError> {
        let at = sparse.second.table_at.get() + block as u64 * 4;
        write(self.file, at, &UNUSED.to_be_bytes()).await?;
        self.report.note(|| format!("block {block} was dropped: it reads as if it had never been written"));
        Ok(())
    }

    /// Looks for sectors of the last block that are marked as written and are not in the file: it was cut off. Gives the
    /// entries that are left.
    async fn cut(&mut self, sparse: &Sparse, mut entries: Vec<u32>) -> Result<Vec<u32>, ImageError> {
        let end = self.header.footer_at.unwrap_or(self.file.size());
        let last = entries
            .iter_mut()
            .enumerate()
            .filter(|(_, entry)| **entry != UNUSED)
            .max_by_key(|(_, entry)| **entry);
        let Some((block, entry)) = last else { return Ok(entries) };
        let at = u64::from(*entry) * SECTOR;
        let Cut { bitmap, lost } = cut::cut(self.file, sparse, at, end).await?;
        if lost > 0 {
            if self.corruption(|| {
                format!(
                    "{lost} sectors of block {block} are marked as written, but the file ends before them, at {end}: it was \
                     cut off"
                )
            }) {
                write(self.file, at, &bitmap).await?;
                self.report.note(|| format!("in block {block} they read as if they had never been written"));
            }
        } else if at + sparse.bitmap() > end && at <= end + SLACK {
            // blktap leaves one that was given a place and nothing else behind a footer, or behind what it makes of that while
            // it has the image open. Where there is neither the file was cut off.
            let is_killed = Footers::read(self.file).await?.last.1 == Err(Flaw::Killed);
            let what = || {
                format!(
                    "block {block} is at {at}, and the file's blocks end at {end}: it was cut off, or was given that place and \
                     nothing else"
                )
            };
            if self.header.footer_at.is_some() || is_killed {
                self.report.note(what);
            } else if self.corruption(what) {
                *entry = UNUSED;
                self.drop_block(sparse, block).await?;
            }
        }
        Ok(entries)
    }

    /// Checks that blocks are full of which the batmap says so.
    async fn batmap(&mut self, sparse: &Sparse, entries: &[u32]) -> Result<(), ImageError> {
        let Some((at, mut batmap)) = sparse.batmap else { return Ok(()) };
        let mut map = read(self.file, batmap.at.get(), batmap.len()).await?;
        let mut changed = false;
        if !batmap.fits(&map, self.header.size()) {
            changed |= self.corruption(|| {
                format!("the batmap's checksum at {at} is not that of the map: blktap refuses it")
            });
            if changed {
                map.fill(0);
            }
        }
        for (block, entry) in entries.iter().take(sparse.blocks as usize).enumerate() {
            let (byte, bit) = (block / 8, 0x80u8 >> (block % 8));
            if map.get(byte).is_none_or(|byte| byte & bit == 0) {
                continue;
            }
            let is_full = *entry != UNUSED && self.is_full(sparse, *entry).await?;
            if !is_full
                && self.corruption(|| format!("the batmap says that block {block} is full, which it is not"))
            {
                map[byte] &= !bit;
                changed = true;
            }
        }
        if changed {
            batmap.seal(&map, self.header.size());
            write(self.file, batmap.at.get(), &map).await?;
            write(self.file, at, &batmap.bytes()).await?;
        }
        Ok(())
    }

    async fn is_full(&self, sparse: &Sparse, entry: u32) -> Result<bool, ImageError> {
        let sectors = sparse.block() / SECTOR;
        let at = u64::from(entry) * SECTOR;
        let len = sectors.div_ceil(8);
        if at + len > self.file.size() {
            return Ok(false);
        }
        let bitmap = read(self.file, at, len).await?;
        let is_set = |sector: u64| bitmap[(sector / 8) as usize] & (0x80 >> (sector % 8)) != 0;
        Ok((0..sectors).all(is_set))
    }

    /// Looks for space that nothing uses, between blocks and behind the last one.
    async fn end(&mut self, sparse: &Sparse, entries: &[u32], is_device: bool) -> Result<(), ImageError> {
        let whole = sparse.bitmap() + sparse.block();
        let mut places: Vec<u64> = entries
            .iter()
            .filter(|entry| **entry != UNUSED)
            .map(|entry| u64::from(*entry) * SECTOR)
            .collect();
        places.sort_unstable();
        let mut until = sparse.taken_until();
        let mut holes = 0;
        for at in places {
            holes += at.saturating_sub(until) / whole;
            until = until.max(at + whole);
        }
        if holes > 0 {
            // Only moving blocks would give it back.
            self.report.leaks += holes;
            self.report.note(|| {
                format!("between blocks there is space for {holes} more: converting the image gives it back")
            });
        }
        self.report.image_end_offset = until + SECTOR;
        let end = self.header.footer_at.unwrap_or(self.file.size());
        let behind = end.saturating_sub(until);
        if is_device || behind < ALIGN.max(SECTOR + 1) {
            return Ok(());
        }
        let what = || {
            format!(
                "behind the last block, which ends at {until}, there are {behind} bytes that nothing uses"
            )
        };
        if self.leak(behind.div_ceil(whole), what) {
            self.file.resize(until + SECTOR).await?;
            if self.file.size() == until + SECTOR {
                write(self.file, until, &self.header.footer.bytes()).await?;
            }
        }
        Ok(())
    }

    /// Sees to it that footer and copy are there and the same.
    async fn footers(&mut self) -> Result<(), ImageError> {
        let footers = Footers::read(self.file).await?;
        let (at, last) = footers.last;
        let wanted = self.header.footer;
        let is_own = footers.own(&wanted).is_some();
        let end = self.report.image_end_offset - SECTOR;
        if last != Ok(wanted) || at < end {
            let place = if at < end || !at.is_multiple_of(SECTOR) { end } else { at };
            if self.leak(1, || format!("the footer at {at} is missing or is not what its copy says")) {
                write(self.file, place, &wanted.bytes()).await?;
                if place > at && is_own {
                    // The last block had only a part of its room, and the footer was in the rest of it.
                    write(self.file, at, &vec![0; SECTOR.min(place - at) as usize]).await?;
                }
            }
        }
        if footers.copy != Ok(wanted)
            && self.leak(1, || "the copy of the footer at 0 is missing or another one".to_owned())
        {
            write(self.file, 0, &wanted.bytes()).await?;
        }
        Ok(())
    }
}
