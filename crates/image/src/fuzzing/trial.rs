//! A trial of an image: what must be true whatever is in it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use block::{Buf, Error, Limits, Span};
use runtime::{BoxFuture, Handle, join_all};
use storage::{Io, Storage, Zeroing};

use super::RUNTIME;
use super::fence::{Fence, LEN_MAX};
use super::program::{Program, Record, damage, step, value};
use super::subject::{POISON, Subject};
use crate::{Chain, Image, ImageError, Raw, Repair, Settings};

/// How often an operation may be asked whether it is ready. All is in memory, so none needs many.
const POLLS_MAX: u64 = 300_000;
/// A request has no more bytes.
const REQUEST_MAX: u64 = 96 << 10;
/// A disk is compared as a whole if it has no more bytes.
const MODEL_MAX: u64 = 512 << 10;
/// What the guest writes, again and again: no image has it.
const MARK: &[u8; 16] = b"of-the-guest's!\x99";
/// Bytes of the image below.
const BELOW: u64 = 200_000;

/// Puts the program in these bytes to a format.
pub(super) fn run(subject: &'static dyn Subject, bytes: &[u8]) {
    let program = Program::decode(bytes);
    let (image, len) = damaged(subject, &program);
    RUNTIME.with(|runtime| {
        let panics = runtime.handle().panics();
        let handle = runtime.handle().clone();
        runtime.block_on(async move {
            let refused = RefCell::default();
            let trial = Trial { subject, handle, program, image, len, refused };
            trial.look().await;
            trial.use_as_it_is().await;
            trial.repair().await;
        });
        assert_eq!(runtime.handle().panics(), panics, "a task panicked");
    });
}

thread_local! {
    /// Sound images, which take a while to be made.
    static BASES: RefCell<HashMap<(&'static str, u8), Rc<Base>>> = RefCell::default();
}

/// A sound image.
struct Base {
    bytes: Vec<u8>,
    /// See [`Subject::words`].
    words: Vec<usize>,
}

/// The image that the program begins with, and how long its file is: there may be nothing but zeroes behind it.
fn damaged(subject: &'static dyn Subject, program: &Program) -> (Vec<u8>, u64) {
    let key = (subject.name(), program.options);
    let base = BASES.with(|bases| bases.borrow().get(&key).cloned());
    let base = base.unwrap_or_else(|| {
        let bytes = subject.base(program.options);
        let words = subject.words(&bytes);
        let base = Rc::new(Base { bytes, words });
        BASES.with(|bases| bases.borrow_mut().insert(key, base.clone()));
        base
    });
    let (mut bytes, words) = (base.bytes.clone(), &base.words);
    let mut len = bytes.len() as u64;
    for record in &program.damages {
        apply(record, &mut bytes, words, &mut len);
    }
    if bytes.contains(&POISON) {
        bytes.iter_mut().filter(|byte| **byte == POISON).for_each(|byte| *byte = POISON - 1);
    }
    if program.flags & 1 == 0 {
        subject.seal(&mut bytes);
    }
    (bytes, len)
}

fn apply(record: &Record, bytes: &mut Vec<u8>, words: &[usize], len: &mut u64) {
    let nth = |place: u16| words.get(usize::from(place) % words.len().max(1)).copied().unwrap_or(0);
    let at = nth(record.place);
    let get = |bytes: &[u8], at: usize| {
        bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |word| u64::from_be_bytes(*word))
    };
    let old = get(bytes, at);
    let new = value(record.value, record.param, old, *len);
    let (at, new): (usize, &[u8]) = match record.code {
        damage::WORD => (at, &new.to_be_bytes()),
        damage::HALF => {
            let skip = usize::from(record.param % 2) * 4;
            let half = value(record.value, record.param / 2, old >> (32 - 8 * skip) & 0xffff_ffff, *len);
            (at + skip, &(half as u32).to_be_bytes())
        }
        damage::BYTE => (at + usize::from(record.param % 8), &[(record.param >> 8) as u8]),
        damage::ANYWHERE => (usize::from(record.place) * 8 % bytes.len().max(1), &new.to_be_bytes()),
        damage::LENGTH => {
            *len = value(record.value, record.param, *len, *len).min(LEN_MAX / 2);
            bytes.truncate(*len as usize);
            return;
        }
        _ => (at, &get(bytes, nth(record.param)).to_be_bytes()),
    };
    let there = bytes.len().saturating_sub(at).min(new.len());
    if there > 0 {
        bytes[at..at + there].copy_from_slice(&new[..there]);
    }
}

/// An operation that must come to an end.
struct Soon<F>(Pin<Box<F>>, u64);

impl<F: Future> Future for Soon<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if let Poll::Ready(output) = self.0.as_mut().poll(cx) {
            return Poll::Ready(output);
        }
        self.1 += 1;
        assert!(self.1 < POLLS_MAX, "this waits for ever");
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

fn soon<F: Future>(future: F) -> Soon<F> {
    Soon(Box::pin(future), 0)
}

/// An image below: nobody may change it.
struct Below;

fn never<'a, T: 'a>() -> Io<'a, T> {
    panic!("the image below is changed");
}

impl Storage for Below {
    fn size(&self) -> u64 {
        BELOW
    }

    fn limits(&self) -> Limits {
        Limits { align: 1, preferred: 4096, read_only: true, fast_zero: false }
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        assert!(Span::of(at, &buf).is_within(BELOW));
        buf.fill(0x42);
        Box::pin(std::future::ready(Ok(())))
    }

    fn write(&self, _at: u64, _buf: Buf) -> Io<'_> {
        never()
    }

    fn zero(&self, _span: Span, _how: Zeroing) -> Io<'_> {
        never()
    }

    fn discard(&self, _span: Span) -> Io<'_> {
        never()
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<block::Run>> {
        Box::pin(std::future::ready(Ok(vec![block::Run { len: span.len(), allocated: true, zero: false }])))
    }

    fn prefetch(&self, _span: Span) -> Io<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn grow(&self) -> Io<'_, u64> {
        never()
    }

    fn resize(&self, _bytes: u64) -> Io<'_> {
        never()
    }

    fn poison(&self) -> Option<Error> {
        None
    }
}

struct Trial {
    subject: &'static dyn Subject,
    handle: Handle,
    program: Program,
    image: Vec<u8>,
    len: u64,
    /// Why it could not be opened, the last time.
    refused: RefCell<String>,
}

impl Trial {
    fn file(&self) -> (Rc<Fence>, Rc<dyn Storage>) {
        let fence = Fence::new(&self.image, self.len);
        (fence.clone(), fence)
    }

    /// What refuses an image says so in words, and not in too many.
    fn refusal(error: &ImageError) {
        let told = error.to_string();
        assert!(!told.is_empty() && told.len() < 2000 && !told.contains('\n'), "{told}");
    }

    async fn open(&self, file: &Rc<dyn Storage>, writable: bool) -> Option<Chain> {
        let has_backing = match soon(self.subject.has_backing(file)).await {
            Ok(has_backing) => has_backing,
            Err(error) => {
                Self::refusal(&error);
                return None;
            }
        };
        let settings = Settings {
            writable,
            cache: if self.program.flags & 4 == 0 { 0 } else { 1 },
            ledger: None,
            lasting: self.program.flags & 2 != 0,
        };
        match soon(self.subject.open(&self.handle, file, settings)).await {
            Ok(top) => {
                let below: Vec<Rc<dyn Image>> =
                    if has_backing { vec![Rc::new(Raw::new(Rc::new(Below)))] } else { Vec::new() };
                Some(Chain::over(&self.handle, top, below))
            }
            Err(error) => {
                Self::refusal(&error);
                *self.refused.borrow_mut() = error.to_string();
                None
            }
        }
    }

    /// Looks at the image without the right to change it.
    async fn look(&self) {
        let (fence, file) = self.file();
        if let Err(error) = soon(self.subject.check(&file, Repair::No)).await {
            Self::refusal(&error);
        }
        assert_eq!(fence.changes(), 0, "a check changes the image");
        let Some(disk) = self.open(&file, false).await else {
            assert_eq!(fence.changes(), 0, "what is refused is changed");
            return;
        };
        for place in [0, 0x4000, 0x8000, 0xfff0] {
            self.read(&disk, &Record { code: step::READ, value: 0, place, param: 0xffff }).await;
            self.extents(&disk, place).await;
        }
        for record in &self.program.steps {
            match record.code {
                step::READ => self.read(&disk, record).await,
                step::EXTENTS => self.extents(&disk, record.place).await,
                _ => {}
            }
        }
        if let Err(error) = soon(disk.close()).await {
            assert!(!error.to_string().is_empty());
        }
        assert_eq!(fence.changes(), 0, "an image that was opened to be read is changed");
    }

    /// Writes to the image as it is. Requests may fail, but nothing else may happen.
    async fn use_as_it_is(&self) {
        let (fence, file) = self.file();
        let breached = self.subject.is_breached(&fence.head(4096), &fence.tail(1024), MARK);
        let Some(mut disk) = self.open(&file, true).await else { return };
        for record in &self.program.steps {
            match record.code {
                step::REOPEN | step::DIE => {
                    if record.code == step::REOPEN
                        && let Err(error) = soon(disk.close()).await
                    {
                        assert!(!error.to_string().is_empty());
                    }
                    drop(disk);
                    let Some(again) = self.open(&file, true).await else { return };
                    disk = again;
                }
                _ => self.step(&disk, record, None).await,
            }
        }
        // An image that was good enough to be opened still is.
        if let Ok(()) = soon(disk.close()).await {
            drop(disk);
            assert!(
                self.open(&file, false).await.is_some(),
                "after it was used it cannot be opened any more"
            );
        }
        let head = (fence.head(4096), fence.tail(1024));
        assert!(
            breached || !self.subject.is_breached(&head.0, &head.1, MARK),
            "the guest writes to the header of its image"
        );
    }

    /// Repairs the image, and then it must behave as a disk does.
    async fn repair(&self) {
        let (_, file) = self.file();
        let report = match soon(self.subject.check(&file, Repair::All)).await {
            Ok(report) => report,
            Err(error) => return Self::refusal(&error),
        };
        if !report.is_safe() {
            return;
        }
        let again = soon(self.subject.check(&file, Repair::No)).await;
        let again = again.unwrap_or_else(|error| {
            panic!("what was repaired cannot be checked: {error}; there was {report:?}")
        });
        assert!(again.is_safe(), "after a repair: {again:?}, which had found {report:?}");
        let Some(mut disk) = self.open(&file, true).await else { return };
        if disk.size() > MODEL_MAX {
            return;
        }
        let Some(mut model) = self.all(&disk).await else { return };
        for record in &self.program.steps {
            match record.code {
                step::REOPEN | step::DIE => {
                    // What was flushed is there after a death.
                    let left = if record.code == step::REOPEN {
                        soon(disk.close()).await
                    } else {
                        soon(disk.flush()).await
                    };
                    drop(disk);
                    if left.is_err() {
                        return;
                    }
                    let Some(again) = self.open(&file, true).await else {
                        let why = self.refused.borrow();
                        panic!("a sound image cannot be opened any more: {why}");
                    };
                    disk = again;
                    if disk.size() > MODEL_MAX {
                        return;
                    }
                    let Some(now) = self.all(&disk).await else { return };
                    assert!(now == model, "after it was opened anew: other bytes");
                }
                _ => self.step(&disk, record, Some(&mut model)).await,
            }
            if disk.size() > MODEL_MAX {
                return;
            }
        }
        let Some(now) = self.all(&disk).await else { return };
        assert!(now == model, "at the end: other bytes");
        if soon(disk.close()).await.is_err() {
            return;
        }
        drop(disk);
        let last = soon(self.subject.check(&file, Repair::No)).await;
        let last = last.unwrap_or_else(|error| panic!("what was sound cannot be checked: {error}"));
        assert!(last.is_safe(), "after use: {last:?}");
    }

    /// All bytes of a disk. A part of it may not be readable, such as a compressed cluster: checks do not look at data.
    async fn all(&self, disk: &Chain) -> Option<Vec<u8>> {
        let buf = Buf::zeroed(disk.size() as usize);
        buf.fill(POISON);
        if !buf.is_empty() {
            soon(disk.read(0, buf.clone())).await.ok()?;
        }
        let bytes = buf.to_vec();
        assert_clean(&bytes);
        Some(bytes)
    }

    fn span(&self, disk: &Chain, record: &Record) -> Option<Span> {
        let size = disk.size();
        let align = [1, 512, 4096, 1][usize::from(record.value) % 4];
        let at = ((u128::from(record.place) * u128::from(size)) >> 16) as u64 / align * align;
        let len = (1 + u64::from(record.param)).next_multiple_of(align)
            * [1, 2, 8, 1][usize::from(record.value) / 4 % 4];
        Span::new(at, len.min(REQUEST_MAX).min(size - at)).filter(|span| !span.is_empty())
    }

    async fn read(&self, disk: &Chain, record: &Record) {
        let Some(span) = self.span(disk, record) else { return };
        let buf = Buf::zeroed(span.len() as usize);
        buf.fill(POISON);
        if soon(disk.read(span.at(), buf.clone())).await.is_ok() {
            assert_clean(&buf.to_vec());
        }
    }

    async fn extents(&self, disk: &Chain, place: u16) {
        let record = Record { code: step::EXTENTS, value: 10, place, param: 0xffff };
        let Some(span) = self.span(disk, &record) else { return };
        if let Ok(runs) = soon(disk.extents(span)).await {
            let total: u64 = runs.iter().map(|run| run.len).sum();
            assert!(
                total > 0 && total <= span.len() && runs.iter().all(|run| run.len > 0),
                "{runs:?} of {span:?}"
            );
        }
    }

    /// Does one thing. With a model, what is answered must be so.
    async fn step(&self, disk: &Chain, record: &Record, model: Option<&mut Vec<u8>>) {
        if record.code == step::RESIZE {
            return self.resize(disk, record, model).await;
        }
        let Some(span) = self.span(disk, record) else { return };
        let range = span.at() as usize..span.end() as usize;
        let zeroing = Zeroing { unmap: record.value & 1 == 0, fast: false };
        let written: Vec<u8> = MARK.iter().copied().cycle().take(span.len() as usize).collect();
        let result = match record.code {
            step::READ => {
                let buf = Buf::zeroed(span.len() as usize);
                buf.fill(POISON);
                let result = soon(disk.read(span.at(), buf.clone())).await;
                if result.is_ok() {
                    let bytes = buf.to_vec();
                    assert_clean(&bytes);
                    assert!(model.is_none_or(|model| bytes == model[range]), "other bytes at {span:?}");
                }
                return;
            }
            step::EXTENTS => return self.extents(disk, record.place).await,
            step::WRITE => soon(disk.write(span.at(), Buf::from_bytes(&written))).await,
            step::PAIR => {
                let half = span.len() as usize / 2;
                let parts: Vec<BoxFuture<'_, block::Result<()>>> = vec![
                    disk.write(span.at(), Buf::from_bytes(&written)),
                    disk.write(span.at() + half as u64, Buf::from_bytes(&written[half..])),
                ];
                crate::worst(soon(join_all(parts)).await)
            }
            step::ZERO => soon(disk.zero(span, zeroing)).await,
            step::DISCARD => soon(disk.discard(span)).await,
            _ => return drop(soon(disk.flush()).await),
        };
        let Some(model) = model else { return };
        match (record.code, &result) {
            (step::WRITE | step::PAIR, Ok(())) => model[range].copy_from_slice(&written),
            (step::ZERO, Ok(())) => model[range].fill(0),
            // They may be anything now; and what failed may be old or new.
            _ => {
                if let Some(now) = self.all(disk).await {
                    assert!(
                        now[..range.start] == model[..range.start],
                        "{span:?} was changed, and before it"
                    );
                    assert!(now[range.end..] == model[range.end..], "{span:?} was changed, and behind it");
                    *model = now;
                }
            }
        }
    }

    async fn resize(&self, disk: &Chain, record: &Record, model: Option<&mut Vec<u8>>) {
        let old = disk.size();
        let size = match record.value % 4 {
            0 => old.saturating_add(u64::from(record.param)),
            1 => old.saturating_add(u64::from(record.param) << 12),
            2 => u64::from(record.param) << 6,
            _ => value(record.value / 4, record.param, old, old),
        };
        let result = soon(disk.resize(size)).await;
        let Some(model) = model else { return };
        match result {
            Ok(()) => {
                assert!(
                    disk.size() >= size && disk.size() - size < 4096,
                    "{} instead of {size}",
                    disk.size()
                );
            }
            Err(_) => assert!(disk.size() == old || disk.size() >= size, "an error makes it {}", disk.size()),
        }
        if disk.size() <= MODEL_MAX {
            let kept = model.len().min(disk.size() as usize);
            model.resize(disk.size() as usize, 0);
            let must_be_zero = self.subject.clears_what_is_beyond() || self.program.damages.is_empty();
            if !must_be_zero && let Some(now) = self.all(disk).await {
                assert!(now[..kept] == model[..kept], "what was there changes when the disk grows");
                *model = now;
            }
        }
    }
}

/// Bytes that a guest gets are the image's or zero, never those of some memory.
fn assert_clean(bytes: &[u8]) {
    if bytes.contains(&POISON) {
        let runs = bytes.chunk_by(|one, other| one == other).filter(|run| run[0] == POISON);
        let longest = runs.map(<[u8]>::len).max();
        assert!(longest.unwrap_or(0) < 64, "{longest:?} bytes of fresh memory are shown");
    }
}
