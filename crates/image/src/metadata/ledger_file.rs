//! A ledger in files, in the directory where this process keeps what a successor must know.
//!
//! There is a file for each round that is not over, named after what the image is; the highest generation is the one that
//! is written. Only whole writes count, and they end where the file ends: a process that dies leaves its last group short.
//! Nothing is synced, for nothing here need outlive the boot.
//!
//! ```text
//! file    magic (16) | generation (8) | boot, padded (40) | zero (4) | CRC-32 of these (4) | group ...
//!         the last byte of the zero is 1 once a note has failed that belongs behind this file's last group
//! group   sequence (8) | changes (4) | CRC-32 of them (4) | zero (4) | CRC-32 of these and the generation (4) | change ...
//! change  at (8) | old (8) | new (8) | stage (1)
//! ```
//!
//! All numbers are big-endian.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use flate2::Crc;
use rustix::fs::OFlags;
use storage::file::Record;

use super::{Change, Ledger};

/// How many rounds may fail one after the other until what they were to forget is kept for longer than it need be.
const FILES: usize = 4;
/// Bytes that a file may have: some 670,000 changes. Nobody lets as many wait for a round.
const FILE_MAX: u64 = 16 << 20;
const MAGIC: &[u8; 16] = b"tapdisk ledger 1";
/// Bytes before the first group.
const HEADER: usize = 72;
/// The byte of the header that says that something is missing; it needs no room, and the checksum is without it.
const GAP: usize = 67;
/// Bytes of a group before its changes.
const HEAD: usize = 24;
/// Bytes of a change.
const CHANGE: usize = 25;

/// A ledger in files.
pub struct LedgerFile {
    boot: String,
    image: PathBuf,
    state: RefCell<State>,
}

struct State {
    files: Vec<Generation>,
    /// Which of them is written.
    current: usize,
    /// Those of lower generations are forgotten when the round ends.
    begun: u64,
    /// Whether these have all that was noted before the round.
    is_divided: bool,
    /// For what is written next.
    bytes: Vec<u8>,
    /// It was said that it cannot be emptied.
    said: bool,
}

/// What was noted from the begin of one round to that of another. Without a byte it is free.
struct Generation {
    path: PathBuf,
    file: Option<File>,
    /// From 1 on.
    number: u64,
    /// Bytes that are whole.
    end: u64,
    /// Groups in them.
    groups: u64,
    /// Whether a part of a group follows.
    is_torn: bool,
}

/// What was found in a file.
struct Found {
    number: u64,
    end: u64,
    groups: u64,
    is_torn: bool,
    has_gap: bool,
    changes: Vec<Change>,
}

impl LedgerFile {
    /// The ledger of the image with this record; that of an earlier boot is removed. Whoever calls has the image alone.
    ///
    /// # Errors
    /// It cannot be read, or makes no sense: it may hold changes all the same, without which the image must not be used.
    pub fn open(record: &Record) -> io::Result<LedgerFile> {
        let mut files = Vec::new();
        for path in paths(record) {
            let file = match options().open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    files.push(Generation::free(path));
                    continue;
                }
                Err(error) => return Err(named(&path, &error)),
            };
            let found =
                load(&file, record.boot()).map_err(|error| explained(&path, record.image(), &error))?;
            match found {
                Some(Found { number, end, groups, is_torn, has_gap: _, changes: _ }) => {
                    files.push(Generation { path, file: Some(file), number, end, groups, is_torn });
                }
                None => {
                    remove(&path)?;
                    files.push(Generation::free(path));
                }
            }
        }
        let newest = files.iter().enumerate().rev().max_by_key(|(_, file)| file.number);
        let current = newest.map_or(0, |(place, _)| place);
        let mut state = State { files, current, begun: 0, is_divided: false, bytes: Vec::new(), said: false };
        let newest = state.current();
        newest.number = newest.number.max(1);
        Ok(LedgerFile {
            boot: record.boot().into(),
            image: record.image().into(),
            state: RefCell::new(state),
        })
    }

    /// The first of its files, for messages.
    pub fn path(record: &Record) -> PathBuf {
        record.beside(&kind(0))
    }

    /// Removes the ledger of the image with this record. Whatever it says is in the image, or is of no interest any more.
    ///
    /// # Errors
    /// A part of it is left.
    pub fn remove(record: &Record) -> io::Result<()> {
        paths(record).try_for_each(|path| remove(&path))
    }
}

impl Ledger for LedgerFile {
    fn changes(&self) -> io::Result<Vec<Change>> {
        Ok(self.found()?.into_iter().flat_map(|found| found.changes).collect())
    }

    fn is_whole(&self) -> io::Result<bool> {
        Ok(self.found()?.iter().all(|found| !found.has_gap))
    }

    fn note(&self, group: &[Change]) -> io::Result<()> {
        let State { files, current, bytes, .. } = &mut *self.state.borrow_mut();
        bytes.clear();
        let result = files[*current].append(group, &self.boot, bytes);
        if result.is_err() {
            for generation in files.iter().filter(|generation| generation.end > 0) {
                if let Err(error) = generation.tell_gap() {
                    let path = generation.path.display();
                    tracing::error!(
                        %path, %error,
                        "the ledger cannot be told either that it is not complete: a successor of this process may refuse the \
                         image, and take it for changed by another program"
                    );
                }
            }
        }
        result
    }

    fn begin(&self) {
        let state = &mut *self.state.borrow_mut();
        let number = state.current().number;
        (state.begun, state.is_divided) = (number, true);
        if state.current().end == 0 {
            return;
        }
        match state.files.iter().position(|file| file.end == 0) {
            Some(free) => {
                state.current = free;
                state.begun = number + 1;
                state.current().number = state.begun;
            }
            // What is noted from now on is not to be told from what was noted before; the end of this round frees others.
            None => state.is_divided = false,
        }
    }

    fn end(&self) -> bool {
        let state = &mut *self.state.borrow_mut();
        let begun = state.begun;
        let mut old: Vec<&mut Generation> =
            state.files.iter_mut().filter(|file| file.end > 0 && file.number < begun).collect();
        // The oldest first: what is left of a history is its end, wherever the process dies or this fails.
        old.sort_unstable_by_key(|file| file.number);
        for file in old {
            if let Err(error) = file.empty() {
                if !std::mem::replace(&mut state.said, true) {
                    let path = file.path.display();
                    tracing::warn!(%path, %error, "what is in the image cannot be taken out of its ledger; tried again");
                }
                return false;
            }
        }
        state.said = false;
        state.is_divided
    }
}

impl LedgerFile {
    /// What is in its files, from the oldest on.
    fn found(&self) -> io::Result<Vec<Found>> {
        let state = self.state.borrow();
        let mut all = Vec::new();
        for generation in state.files.iter().filter(|generation| generation.end > 0) {
            let Some(file) = &generation.file else { continue };
            let found =
                load(file, &self.boot).map_err(|error| explained(&generation.path, &self.image, &error))?;
            all.extend(found);
        }
        all.sort_unstable_by_key(|found| found.number);
        Ok(all)
    }
}

impl State {
    fn current(&mut self) -> &mut Generation {
        &mut self.files[self.current]
    }
}

impl Generation {
    fn free(path: PathBuf) -> Generation {
        Generation { path, file: None, number: 0, end: 0, groups: 0, is_torn: false }
    }

    /// Writes a group behind the others; `bytes` is empty memory for it.
    fn append(&mut self, group: &[Change], boot: &str, bytes: &mut Vec<u8>) -> io::Result<()> {
        let header = if self.end == 0 { HEADER } else { 0 };
        let end = self.end + (header + HEAD + group.len() * CHANGE) as u64;
        if end > FILE_MAX {
            let text = format!("{} would have {end} bytes: at most {FILE_MAX} are read", self.path.display());
            return Err(io::Error::new(ErrorKind::FileTooLarge, text));
        }
        if header > 0 {
            push_header(bytes, self.number, boot);
        }
        push_group(bytes, self.number, self.groups, group);
        let file = match &self.file {
            Some(file) => file,
            None => {
                let made = options().create(true).truncate(true).open(&self.path);
                self.file.insert(made.map_err(|error| named(&self.path, &error))?)
            }
        };
        // What has no name is found by nobody.
        if file.metadata()?.nlink() == 0 {
            if self.end == 0 {
                // Nothing was lost with it.
                self.file = None;
                bytes.clear();
                return self.append(group, boot, bytes);
            }
            let text = format!("{} was removed while it was in use", self.path.display());
            return Err(io::Error::new(ErrorKind::NotFound, text));
        }
        if self.is_torn {
            file.set_len(self.end)?;
            self.is_torn = false;
        }
        if let Err(error) = file.write_all_at(bytes, self.end) {
            // A part of it may be there, and another may not follow that.
            self.is_torn = true;
            return Err(named(&self.path, &error));
        }
        self.end = end;
        self.groups += 1;
        Ok(())
    }

    /// Says that what was changed next is not noted. There is room for this where there is none for anything else.
    fn tell_gap(&self) -> io::Result<()> {
        match &self.file {
            Some(file) => file.write_all_at(&[1], GAP as u64),
            None => Ok(()),
        }
    }

    /// Forgets all of it.
    fn empty(&mut self) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.set_len(0)?;
        }
        (self.end, self.groups, self.is_torn) = (0, 0, false);
        Ok(())
    }
}

fn paths(record: &Record) -> impl Iterator<Item = PathBuf> {
    (0..FILES).map(|number| record.beside(&kind(number)))
}

fn kind(number: usize) -> String {
    format!("ledger{number}")
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(named(path, &error)),
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    // Nobody else writes to that directory; if somebody has, we do not follow, and do not wait for the other end of a pipe.
    let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    options.read(true).write(true).mode(0o600).custom_flags(flags.bits() as i32);
    options
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn explained(path: &Path, image: &Path, error: &io::Error) -> io::Error {
    let (path, image) = (path.display(), image.display());
    let text = format!(
        "the ledger {path} of {image} cannot be used: {error}. It may hold changes that guests were told of and that the \
         image lacks. If they can be done without, remove it and check the image"
    );
    io::Error::new(error.kind(), text)
}

fn garbage(at: usize, what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("what is at byte {at} is {what}"))
}

/// What a file holds; `None` if that is of another boot.
fn load(file: &File, boot: &str) -> io::Result<Option<Found>> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidData, "it is no regular file"));
    }
    if metadata.len() > FILE_MAX {
        let text = format!("it has {} bytes, and no ledger has more than {FILE_MAX}", metadata.len());
        return Err(io::Error::new(ErrorKind::InvalidData, text));
    }
    let mut bytes = vec![0; metadata.len() as usize];
    file.read_exact_at(&mut bytes, 0)?;
    parse(&bytes, boot)
}

fn parse(bytes: &[u8], boot: &str) -> io::Result<Option<Found>> {
    // Whoever wrote less has noted nothing.
    let Some((header, groups)) = bytes.split_at_checked(HEADER) else {
        let is_torn = !bytes.is_empty();
        return Ok(Some(Found {
            number: 0,
            end: 0,
            groups: 0,
            is_torn,
            has_gap: false,
            changes: Vec::new(),
        }));
    };
    let number = long(header, 16);
    let mut header = header.to_vec();
    let has_gap = std::mem::take(&mut header[GAP]);
    if has_gap > 1 {
        return Err(garbage(GAP, "neither of what may be there"));
    }
    let mut expected = Vec::with_capacity(HEADER);
    if !header.starts_with(MAGIC) || short(&header, HEADER - 4) != crc(&[&header[..HEADER - 4]]) {
        return Err(garbage(0, "no header of a ledger"));
    }
    push_header(&mut expected, number, boot);
    if header != expected {
        return Ok(None);
    }
    let mut found = Found {
        number,
        end: HEADER as u64,
        groups: 0,
        is_torn: false,
        has_gap: has_gap == 1,
        changes: Vec::new(),
    };
    let mut rest = groups;
    while !rest.is_empty() {
        let at = found.end as usize;
        let Some((head, others)) = rest.split_at_checked(HEAD) else { break };
        if short(head, 20) != crc(&[&number.to_be_bytes(), &head[..20]]) || long(head, 0) != found.groups {
            return Err(garbage(at, "no head of the group that belongs there"));
        }
        let len = u64::from(short(head, 8)) * CHANGE as u64;
        let Some((changes, others)) = usize::try_from(len).ok().and_then(|len| others.split_at_checked(len))
        else {
            break;
        };
        if short(head, 12) != crc(&[changes]) {
            return Err(garbage(at, "a group with changes that are not those that were written"));
        }
        found.changes.extend(changes.chunks_exact(CHANGE).map(|change| Change {
            at: long(change, 0),
            old: long(change, 8),
            new: long(change, 16),
            stage: change[24],
        }));
        found.groups += 1;
        found.end += (HEAD + changes.len()) as u64;
        rest = others;
    }
    found.is_torn = !rest.is_empty();
    Ok(Some(found))
}

fn push_header(bytes: &mut Vec<u8>, number: u64, boot: &str) {
    let start = bytes.len();
    bytes.extend(MAGIC);
    bytes.extend(number.to_be_bytes());
    bytes.extend(boot.bytes().chain(std::iter::repeat(0)).take(40));
    bytes.extend([0; 4]);
    let sum = crc(&[&bytes[start..]]);
    bytes.extend(sum.to_be_bytes());
}

fn push_group(bytes: &mut Vec<u8>, number: u64, sequence: u64, group: &[Change]) {
    let start = bytes.len();
    bytes.extend(sequence.to_be_bytes());
    bytes.extend((group.len() as u32).to_be_bytes());
    bytes.extend([0; HEAD - 12]);
    for Change { at, old, new, stage } in group {
        bytes.extend([at, old, new].into_iter().flat_map(|word| word.to_be_bytes()));
        bytes.push(*stage);
    }
    let sum = crc(&[&bytes[start + HEAD..]]);
    bytes[start + 12..start + 16].copy_from_slice(&sum.to_be_bytes());
    let sum = crc(&[&number.to_be_bytes(), &bytes[start..start + 20]]);
    bytes[start + 20..start + HEAD].copy_from_slice(&sum.to_be_bytes());
}

/// CRC-32 as in zlib.
fn crc(parts: &[&[u8]]) -> u32 {
    let mut crc = Crc::new();
    parts.iter().for_each(|part| crc.update(part));
    crc.sum()
}

/// The number at a place that is within the bytes.
fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// The same, of half the length.
fn short(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

#[cfg(test)]
mod tests;
