//! A small format for trying the trial itself: a header, a flat map, clusters; right, or with a mistake made on purpose.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use block::{Buf, Error, Result, Span};
use image::metadata::{Change, Ledger};
use image::{Extent, Image, ImageError, Placement, Repair, Report, Zeroed};
use storage::{Io, Storage, Zeroing};

/// Bytes of a cluster.
pub(crate) const CLUSTER: u64 = 1024;
/// The map's word for a cluster that reads as zero.
const ZERO: u64 = 1;
/// No cluster: who writes the map.
const SAVING: u64 = u64::MAX;
/// No cluster: who makes the file longer.
const GROWING: u64 = u64::MAX - 1;

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    None,
    /// A flush writes the map before the data is durable.
    MapBeforeData,
    /// A flush syncs nothing.
    NoSync,
    /// The map's change is noted after the answer.
    LateNote,
    /// Opening it takes the last cluster for free (FAILURES 70).
    OneTooFew,
    /// A failed write leaves its place in the map (FAILURES 66).
    KeptMapping,
    /// Zeroing forgets what is below.
    ShowsBelow,
}

impl Flaw {
    #[cfg(test)]
    pub(crate) const ALL: [Flaw; 6] = [
        Flaw::MapBeforeData,
        Flaw::NoSync,
        Flaw::LateNote,
        Flaw::OneTooFew,
        Flaw::KeptMapping,
        Flaw::ShowsBelow,
    ];
}

/// An open image.
pub(crate) struct Toy {
    size: u64,
    flaw: Flaw,
    file: Rc<dyn Storage>,
    ledger: Option<Box<dyn Ledger>>,
    map: RefCell<Vec<u64>>,
    /// Clusters whose word in the file is another.
    dirty: RefCell<BTreeMap<u64, u64>>,
    /// Clusters that a placement holds.
    busy: RefCell<BTreeSet<u64>>,
    next: Cell<u64>,
}

fn word_at(cluster: u64) -> u64 {
    512 + cluster * 8
}

fn data_at(size: u64) -> u64 {
    word_at(size.div_ceil(CLUSTER)).next_multiple_of(CLUSTER)
}

/// Makes an image of so many bytes.
pub(crate) async fn create(file: &Rc<dyn Storage>, size: u64) -> Result<(), ImageError> {
    file.resize(data_at(size)).await?;
    let mut header = b"toy image".to_vec();
    header.resize(16, 0);
    header.extend(size.to_be_bytes());
    file.write(0, Buf::from_bytes(&header)).await?;
    Ok(())
}

async fn load(file: &Rc<dyn Storage>) -> Result<(u64, Vec<u64>), ImageError> {
    let invalid = || ImageError::Invalid("no toy".into());
    if file.size() < 512 {
        return Err(invalid());
    }
    let header = Buf::zeroed(24);
    file.read(0, header.clone()).await?;
    let header = header.to_vec();
    if !header.starts_with(b"toy image") {
        return Err(invalid());
    }
    let size = header[16..].try_into().map_or(0, u64::from_be_bytes);
    let map = Buf::zeroed(size.div_ceil(CLUSTER) as usize * 8);
    file.read(512, map.clone()).await?;
    let words = map.to_vec();
    Ok((size, words.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_be_bytes)).collect()))
}

/// Looks for clusters that are used twice or lie outside.
pub(crate) async fn check(file: &Rc<dyn Storage>, _repair: Repair) -> Result<Report, ImageError> {
    let (size, map) = load(file).await?;
    let mut report = Report::default();
    let mut seen = BTreeSet::new();
    for word in map.into_iter().filter(|word| *word > ZERO) {
        let is_within = word % CLUSTER == 0 && word >= data_at(size) && word + CLUSTER <= file.size();
        if !is_within || !seen.insert(word) {
            report.corruptions += 1;
            report.note(|| format!("cluster at {word}"));
        }
    }
    Ok(report)
}

impl Toy {
    pub(crate) async fn open(
        file: Rc<dyn Storage>,
        ledger: Option<Box<dyn Ledger>>,
        flaw: Flaw,
    ) -> Result<Toy, ImageError> {
        let (size, map) = load(&file).await?;
        let toy = Toy {
            size,
            flaw,
            file,
            ledger,
            map: RefCell::new(map),
            dirty: RefCell::default(),
            busy: RefCell::default(),
            next: Cell::new(0),
        };
        let noted = toy.ledger.as_ref().map_or(Ok(Vec::new()), |ledger| ledger.changes());
        for change in noted.map_err(|error| ImageError::Refused(error.to_string()))? {
            let cluster = (change.at - 512) / 8;
            toy.map.borrow_mut()[cluster as usize] = change.new;
            toy.dirty.borrow_mut().insert(cluster, change.new);
        }
        let last = toy.map.borrow().iter().copied().filter(|word| *word > ZERO).max();
        let after = if flaw == Flaw::OneTooFew { 0 } else { CLUSTER };
        toy.next.set(last.map_or(data_at(size), |last| last + after));
        Ok(toy)
    }

    async fn set(&self, cluster: u64, word: u64) -> Result<()> {
        let old = std::mem::replace(&mut self.map.borrow_mut()[cluster as usize], word);
        self.dirty.borrow_mut().insert(cluster, word);
        if self.flaw == Flaw::LateNote {
            return Ok(());
        }
        let change = Change { at: word_at(cluster), old, new: word, stage: 0 };
        let noted = self.ledger.as_ref().is_some_and(|ledger| ledger.note(&[change]).is_ok());
        // A round, which empties the ledger: what it has must not be taken for newer than this.
        if noted { Ok(()) } else { self.flush().await }
    }

    /// Brings the map to the file, and the ledger to its end.
    async fn round(&self) -> Result<()> {
        loop {
            if let Some(ledger) = &self.ledger {
                ledger.begin();
            }
            self.write_dirty().await?;
            if self.flaw != Flaw::NoSync {
                self.file.flush().await?;
            }
            if self.ledger.as_ref().is_none_or(|ledger| ledger.end()) {
                return Ok(());
            }
        }
    }

    /// Writes what has changed, after the data that it points to.
    async fn write_dirty(&self) -> Result<()> {
        let words = self.dirty.take();
        if self.flaw != Flaw::MapBeforeData
            && self.flaw != Flaw::NoSync
            && let Err(error) = self.file.flush().await
        {
            self.dirty.borrow_mut().extend(words);
            return Err(error);
        }
        for (cluster, word) in &words {
            let buf = Buf::from_bytes(&word.to_be_bytes());
            if let Err(error) = self.file.write(word_at(*cluster), buf).await {
                // Those that were changed meanwhile are newer.
                let mut dirty = self.dirty.borrow_mut();
                words.iter().for_each(|(cluster, word)| {
                    dirty.entry(*cluster).or_insert(*word);
                });
                return Err(error);
            }
        }
        Ok(())
    }

    fn claim(&self, cluster: u64) -> impl Future<Output = ()> {
        std::future::poll_fn(move |cx| {
            if self.busy.borrow_mut().insert(cluster) {
                return std::task::Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            std::task::Poll::Pending
        })
    }

    fn word(&self, at: u64) -> u64 {
        self.map.borrow()[(at / CLUSTER) as usize]
    }
}

impl Image for Toy {
    fn size(&self) -> u64 {
        self.size
    }

    fn storage(&self) -> &Rc<dyn Storage> {
        &self.file
    }

    fn map(&self, span: Span) -> Io<'_, Extent> {
        let skip = span.at() % CLUSTER;
        let len = span.len().min(CLUSTER - skip);
        let extent = match self.word(span.at()) {
            0 => Extent::Below { len },
            ZERO => Extent::Zero { len },
            place => Extent::Data { at: place + skip, len, pin: None },
        };
        Box::pin(std::future::ready(Ok(extent)))
    }

    fn place(&self, span: Span) -> Io<'_, Placement> {
        Box::pin(async move {
            let (cluster, skip) = (span.at() / CLUSTER, span.at() % CLUSTER);
            let len = span.len().min(CLUSTER - skip);
            // Who finds a place that is not safe yet waits until it is, or would be answered too early.
            self.claim(cluster).await;
            if self.word(span.at()) > ZERO {
                self.busy.borrow_mut().remove(&cluster);
                return Ok(Placement::shown(self.word(span.at()) + skip, len, None));
            }
            let place = self.next.get();
            self.next.set(place + CLUSTER);
            // What lies within the file may be what somebody wrote before a crash.
            let blank = self.file.size() <= place;
            self.claim(GROWING).await;
            let is_there = self.file.size() >= place + CLUSTER;
            let grown = if is_there { Ok(()) } else { self.file.resize(place + CLUSTER).await };
            self.busy.borrow_mut().remove(&GROWING);
            if let Err(error) = grown {
                self.busy.borrow_mut().remove(&cluster);
                return Err(error);
            }
            if self.flaw == Flaw::KeptMapping {
                self.map.borrow_mut()[cluster as usize] = place;
                self.dirty.borrow_mut().insert(cluster, place);
            }
            let keep = Some(Box::new((cluster, place)) as Box<dyn std::any::Any>);
            let after = CLUSTER - skip - len;
            Ok(Placement { at: place + skip, len, before: skip, after, blank, pin: None, keep })
        })
    }

    fn commit(&self, placement: Placement) -> Io<'_> {
        Box::pin(async move {
            let Some(keep) = placement.keep else { return Ok(()) };
            let (cluster, place) = *keep.downcast::<(u64, u64)>().expect("made by `place`");
            let result = self.set(cluster, place).await;
            self.busy.borrow_mut().remove(&cluster);
            result
        })
    }

    fn give_up(&self, placement: Placement) {
        if let Some(Ok(pending)) = placement.keep.map(|keep| keep.downcast::<(u64, u64)>()) {
            self.busy.borrow_mut().remove(&pending.0);
        }
    }

    fn zero(&self, span: Span, _how: Zeroing) -> Io<'_, Zeroed> {
        Box::pin(async move {
            let skip = span.at() % CLUSTER;
            let len = span.len().min(CLUSTER - skip);
            if skip > 0 || len < CLUSTER || self.word(span.at()) > ZERO {
                return Ok(Zeroed::Write { len });
            }
            let cluster = span.at() / CLUSTER;
            self.claim(cluster).await;
            let word = if self.flaw == Flaw::ShowsBelow { 0 } else { ZERO };
            let result = if self.word(span.at()) > ZERO {
                Ok(Zeroed::Write { len })
            } else {
                self.set(cluster, word).await.map(|()| Zeroed::Done { len })
            };
            self.busy.borrow_mut().remove(&cluster);
            result
        })
    }

    fn discard(&self, _span: Span) -> Io<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            self.claim(SAVING).await;
            let result = self.round().await;
            self.busy.borrow_mut().remove(&SAVING);
            result
        })
    }

    fn grow(&self) -> Io<'_, u64> {
        Box::pin(std::future::ready(Ok(self.size)))
    }

    fn resize(&self, _bytes: u64) -> Io<'_> {
        let error = Error::new(block::Errno::EOPNOTSUPP, "resize a toy");
        Box::pin(std::future::ready(Err(error)))
    }

    fn close(&self) -> Io<'_> {
        self.flush()
    }
}
