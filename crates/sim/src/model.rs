//! The truth about one disk: for each byte, what reading it may give now, and what a power cut may leave.

use std::collections::BTreeMap;
use std::rc::Rc;

use block::Span;

use crate::dice::mix;

/// What a write puts on the disk.
#[derive(Clone)]
pub(crate) enum Content {
    Zero,
    /// Bytes that only this number gives.
    Pattern(u64),
    /// The bytes of a whole disk.
    Disk(Rc<Vec<u8>>),
}

impl Content {
    /// Its bytes from byte `at` of the disk on.
    pub(crate) fn fill(&self, at: u64, bytes: &mut [u8]) {
        match self {
            Content::Zero => bytes.fill(0),
            Content::Pattern(number) => {
                let seed = mix(*number);
                let (mut word, mut skip, mut done) = (at / 8, (at % 8) as usize, 0);
                while done < bytes.len() {
                    let drawn = mix(seed ^ word).to_le_bytes();
                    let len = (8 - skip).min(bytes.len() - done);
                    bytes[done..done + len].copy_from_slice(&drawn[skip..skip + len]);
                    (word, skip, done) = (word + 1, 0, done + len);
                }
            }
            Content::Disk(all) => bytes.copy_from_slice(&all[at as usize..at as usize + bytes.len()]),
        }
    }

    fn is_zero(&self, at: u64, len: u64) -> bool {
        match self {
            Content::Zero => true,
            Content::Pattern(_) => false,
            Content::Disk(all) => all[at as usize..(at + len) as usize].iter().all(|byte| *byte == 0),
        }
    }
}

/// Names a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WriteId(u32);

struct Write {
    content: Content,
    span: Span,
    asked: u64,
    /// When it was answered, well or badly.
    answered: Option<u64>,
}

/// For the bytes from each key to the next: the writes whose content they may have.
#[derive(Clone, Default)]
pub(crate) struct Allowed(BTreeMap<u64, Vec<WriteId>>);

impl Allowed {
    fn whole(size: u64, first: WriteId) -> Allowed {
        Allowed(BTreeMap::from([(0, vec![first]), (size, Vec::new())]))
    }

    fn cut(&mut self, at: u64) {
        if let Some((start, writes)) = self.0.range(..=at).next_back()
            && *start != at
        {
            let writes = writes.clone();
            self.0.insert(at, writes);
        }
    }

    fn change(&mut self, span: Span, mut change: impl FnMut(&mut Vec<WriteId>)) {
        if span.is_empty() {
            return;
        }
        self.cut(span.at());
        self.cut(span.end());
        self.0.range_mut(span.at()..span.end()).for_each(|(_, writes)| change(writes));
    }

    fn allow(&mut self, span: Span, write: WriteId) {
        self.change(span, |writes| {
            if !writes.contains(&write) {
                writes.push(write);
            }
        });
    }

    fn part(&self, span: Span) -> Allowed {
        let mut part = BTreeMap::new();
        for (run, writes) in self.runs(span) {
            part.insert(run.at(), writes.to_vec());
        }
        part.insert(span.end(), Vec::new());
        Allowed(part)
    }

    /// The runs of bytes within the span that may have the same writes' content.
    fn runs(&self, span: Span) -> impl Iterator<Item = (Span, &[WriteId])> {
        let first = self.0.range(..=span.at()).next_back().map_or(0, |(start, _)| *start);
        let mut starts = self.0.range(first..span.end()).peekable();
        std::iter::from_fn(move || {
            let (start, writes) = starts.next()?;
            let end = starts.peek().map_or(span.end(), |(next, _)| **next);
            let at = (*start).max(span.at());
            Some((Span::new(at, end - at).expect("within the disk"), writes.as_slice()))
        })
    }
}

/// What the guests of one disk have asked for and been told, and what follows from it.
pub(crate) struct Model {
    size: u64,
    writes: Vec<Write>,
    /// Counts what happens, to tell earlier from later.
    clock: u64,
    live: Allowed,
    /// What a power cut may leave.
    durable: Allowed,
    /// When the flush was asked that made that so.
    durable_since: u64,
    /// What each read under way may give.
    reads: BTreeMap<u64, (Span, Allowed)>,
    /// What a power cut may leave once each flush under way is answered, and when that was asked.
    flushes: BTreeMap<u64, (u64, Allowed)>,
}

impl Model {
    /// A disk with this content, all of it durable.
    pub(crate) fn new(content: Vec<u8>) -> Model {
        let size = content.len() as u64;
        let span = Span::new(0, size).expect("a small disk");
        let first = Write { content: Content::Disk(Rc::new(content)), span, asked: 0, answered: Some(0) };
        let live = Allowed::whole(size, WriteId(0));
        let durable = live.clone();
        let (reads, flushes) = (BTreeMap::new(), BTreeMap::new());
        Model { size, writes: vec![first], clock: 1, live, durable, durable_since: 0, reads, flushes }
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write was asked: from now on its bytes may be seen, and may survive.
    pub(crate) fn write_asked(&mut self, span: Span, content: Content) -> WriteId {
        let id = WriteId(self.writes.len() as u32);
        let asked = self.tick();
        self.writes.push(Write { content, span, asked, answered: None });
        self.live.allow(span, id);
        self.durable.allow(span, id);
        for (_, allowed) in self.flushes.values_mut() {
            allowed.allow(span, id);
        }
        for (read, allowed) in self.reads.values_mut() {
            let from = span.at().max(read.at());
            if let Some(len) = span.end().min(read.end()).checked_sub(from) {
                allowed.allow(Span::new(from, len).expect("within the disk"), id);
            }
        }
        id
    }

    /// A write was answered. Where `settles`, what it overwrote is gone; where `durable` too, also for a power cut.
    pub(crate) fn write_answered(&mut self, id: WriteId, settles: bool, durable: bool) {
        let now = self.tick();
        self.writes[id.0 as usize].answered = Some(now);
        let (span, asked) = (self.writes[id.0 as usize].span, self.writes[id.0 as usize].asked);
        let writes = &self.writes;
        let gone =
            |other: &WriteId| *other != id && writes[other.0 as usize].answered.is_some_and(|at| at < asked);
        if settles {
            self.live.change(span, |allowed| allowed.retain(|other| !gone(other)));
        }
        if settles && durable {
            self.durable.change(span, |allowed| allowed.retain(|other| !gone(other)));
            for (_, allowed) in self.flushes.values_mut() {
                allowed.change(span, |allowed| allowed.retain(|other| !gone(other)));
            }
        }
    }

    /// A read was asked.
    pub(crate) fn read_asked(&mut self, read: u64, span: Span) {
        let allowed = self.live.part(span);
        self.reads.insert(read, (span, allowed));
    }

    /// A read was answered; the error says what is wrong with its bytes. `None` where it failed.
    pub(crate) fn read_answered(&mut self, read: u64, bytes: Option<&[u8]>) -> Result<(), String> {
        let Some((span, allowed)) = self.reads.remove(&read) else { return Ok(()) };
        match bytes {
            Some(bytes) => self.check(&allowed, span, bytes),
            None => Ok(()),
        }
    }

    /// Whether bytes that a status request says are zero may be zero; ends what `read_asked` began.
    pub(crate) fn zeroes_told(&mut self, read: u64, zeroes: &[Span]) -> Result<(), String> {
        let Some((_, allowed)) = self.reads.remove(&read) else { return Ok(()) };
        for zero in zeroes {
            for (run, writes) in allowed.runs(*zero) {
                let may_be = |id: &WriteId| self.writes[id.0 as usize].content.is_zero(run.at(), run.len());
                if !writes.iter().any(may_be) && !self.writes_make_zero(writes, run) {
                    return Err(format!("{run:?} is told as zeroes but holds one of {writes:?}"));
                }
            }
        }
        Ok(())
    }

    /// Whether several writes together may leave zeroes: each byte is zero in one of them.
    fn writes_make_zero(&self, writes: &[WriteId], run: Span) -> bool {
        self.explains(writes, run.at(), &vec![0; run.len() as usize]).is_ok()
    }

    /// A flush was asked: what was answered before will be durable.
    pub(crate) fn flush_asked(&mut self, flush: u64) {
        let asked = self.tick();
        self.flushes.insert(flush, (asked, self.live.clone()));
    }

    /// A flush was answered.
    pub(crate) fn flush_answered(&mut self, flush: u64, ok: bool) {
        if let Some((asked, allowed)) = self.flushes.remove(&flush)
            && ok
            && asked > self.durable_since
        {
            (self.durable_since, self.durable) = (asked, allowed);
        }
    }

    /// Somebody else changed bytes behind our back: they may be zero.
    pub(crate) fn lost(&mut self, span: Span) {
        let id = self.write_asked(span, Content::Zero);
        self.write_answered(id, false, false);
    }

    /// Whether the disk may read as this now.
    pub(crate) fn check_live(&self, bytes: &[u8]) -> Result<(), String> {
        self.check(&self.live, Span::new(0, self.size).expect("a small disk"), bytes)
    }

    /// Whether a power cut may leave this.
    pub(crate) fn check_durable(&self, bytes: &[u8]) -> Result<(), String> {
        self.check(&self.durable, Span::new(0, self.size).expect("a small disk"), bytes)
    }

    fn check(&self, allowed: &Allowed, span: Span, bytes: &[u8]) -> Result<(), String> {
        for (run, writes) in allowed.runs(span) {
            let from = (run.at() - span.at()) as usize;
            self.explains(writes, run.at(), &bytes[from..from + run.len() as usize])?;
        }
        Ok(())
    }

    /// Whether each of these bytes is that of one of the writes.
    fn explains(&self, writes: &[WriteId], at: u64, bytes: &[u8]) -> Result<(), String> {
        const PIECE: usize = 512;
        let mut expected = [0; PIECE];
        for (number, piece) in bytes.chunks(PIECE).enumerate() {
            let at = at + (number * PIECE) as u64;
            let expected = &mut expected[..piece.len()];
            // The latest first: mostly it is that.
            let whole = writes.iter().rev().any(|id| {
                self.writes[id.0 as usize].content.fill(at, expected);
                expected == piece
            });
            if whole {
                continue;
            }
            let mut explained = vec![false; piece.len()];
            for id in writes {
                self.writes[id.0 as usize].content.fill(at, expected);
                for (index, byte) in piece.iter().enumerate() {
                    explained[index] |= *byte == expected[index];
                }
            }
            if let Some(index) = explained.iter().position(|explained| !explained) {
                let found = &piece[index..piece.len().min(index + 16)];
                let poison =
                    if found.iter().all(|byte| *byte == 0xa5) { " (memory never written)" } else { "" };
                return Err(format!(
                    "byte {} is of none of the writes {writes:?} that may be there; found {found:02x?}{poison}, {}",
                    at + index as u64,
                    self.whose(at + index as u64, found)
                ));
            }
        }
        Ok(())
    }

    /// Which write these bytes are of.
    fn whose(&self, at: u64, bytes: &[u8]) -> String {
        let mut expected = vec![0; bytes.len()];
        for (number, write) in self.writes.iter().enumerate() {
            if Span::new(at, bytes.len() as u64).is_some_and(|span| span.is_within(self.size)) {
                write.content.fill(at, &mut expected);
                if expected == bytes {
                    let Write { span, asked, answered, .. } = write;
                    return format!("of write {number} ({span:?}, asked {asked}, answered {answered:?})");
                }
            }
        }
        "of no write at that place".into()
    }
}
