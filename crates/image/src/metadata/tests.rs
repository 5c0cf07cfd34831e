//! Rounds against a storage that tells the order of what is done to it.

use std::io;

use block::{Errno, Error, Limits, Run};
use runtime::{RingFlags, Runtime, Uring};
use storage::{Ram, Zeroing};

use super::*;
use crate::{ImageError, Report};

/// What reached the file, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// The first byte's place, and the first word.
    Write(u64, u64),
    Sync,
}

/// Memory that tells what is done to it, and fails when told to.
struct Spy {
    ram: Ram,
    steps: RefCell<Vec<Step>>,
    fails: Cell<Option<Errno>>,
}

impl Storage for Spy {
    fn size(&self) -> u64 {
        self.ram.size()
    }

    fn limits(&self) -> Limits {
        self.ram.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        self.ram.read(at, buf)
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        if let Some(errno) = self.fails.get() {
            return Box::pin(std::future::ready(Err(Error::new(errno, "write"))));
        }
        let word = u64::from_be_bytes(buf.to_vec()[..8].try_into().unwrap());
        self.steps.borrow_mut().push(Step::Write(at, word));
        self.ram.write(at, buf)
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        self.ram.zero(span, how)
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.ram.discard(span)
    }

    fn flush(&self) -> Io<'_> {
        self.steps.borrow_mut().push(Step::Sync);
        self.ram.flush()
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        self.ram.extents(span)
    }

    fn prefetch(&self, span: Span) -> Io<'_> {
        self.ram.prefetch(span)
    }

    fn grow(&self) -> Io<'_, u64> {
        self.ram.grow()
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        self.ram.resize(bytes)
    }

    fn poison(&self) -> Option<Error> {
        None
    }
}

/// A ledger in memory, which outlives the metadata that notes there: what was noted and how much of it the round writes;
/// whether noting fails; whether that has failed; at how many begins of rounds it can not tell what was noted before.
#[derive(Clone, Default)]
struct Notes(Rc<RefCell<(Vec<Change>, usize)>>, Rc<Cell<bool>>, Rc<Cell<bool>>, Rc<Cell<u32>>);

impl Ledger for Notes {
    fn changes(&self) -> io::Result<Vec<Change>> {
        Ok(self.0.borrow().0.clone())
    }

    fn is_whole(&self) -> io::Result<bool> {
        Ok(!self.2.get())
    }

    fn note(&self, group: &[Change]) -> io::Result<()> {
        if self.1.get() {
            self.2.set(true);
            return Err(io::Error::other("full"));
        }
        self.0.borrow_mut().0.extend(group);
        Ok(())
    }

    fn begin(&self) {
        let notes = &mut *self.0.borrow_mut();
        notes.1 = if self.3.get() == 0 { notes.0.len() } else { 0 };
    }

    fn end(&self) -> bool {
        let notes = &mut *self.0.borrow_mut();
        notes.0.drain(..notes.1);
        self.3.replace(self.3.get().saturating_sub(1)) == 0
    }
}

struct Subject {
    runtime: Runtime,
    spy: Rc<Spy>,
    notes: Notes,
}

impl Subject {
    fn new() -> Subject {
        let pool = block::Pool::new(1 << 16);
        let runtime = Runtime::new(Box::new(Uring::open(RingFlags::Auto, &pool).unwrap()), pool);
        let spy = Spy { ram: Ram::new(1 << 20), steps: RefCell::default(), fails: Cell::default() };
        Subject { runtime, spy: Rc::new(spy), notes: Notes::default() }
    }

    fn open(&self) -> Metadata {
        let settings = Settings { block: 512, budget: 1 << 14, stages: 3, lasting: true };
        let ledger = Some(Box::new(self.notes.clone()) as Box<dyn Ledger>);
        Metadata::new(self.runtime.handle(), self.spy.clone(), Vec::new(), settings, ledger)
    }

    fn steps(&self) -> Vec<Step> {
        self.spy.steps.take()
    }
}

/// A check that finds nothing.
async fn sound(_file: Rc<dyn Storage>) -> std::result::Result<Report, ImageError> {
    Ok(Report::default())
}

/// The first words of two blocks are places, and lead to different ones.
async fn distinct(file: Rc<dyn Storage>) -> std::result::Result<Report, ImageError> {
    let mut words = Vec::new();
    for at in [0, 512] {
        let buf = Buf::zeroed(8);
        file.read(at, buf.clone()).await?;
        words.push(u64::from_be_bytes(buf.to_vec().try_into().unwrap()));
    }
    let mut report = Report::default();
    if words[0] == words[1] && words[0] != 0 {
        report.corruptions = 1;
        report.note(|| format!("two lead to {}", words[0]));
    }
    Ok(report)
}

fn span(at: u64, len: u64) -> Span {
    Span::new(at, len).unwrap()
}

#[test]
fn a_round_writes_stage_after_stage_with_syncs_between() {
    let subject = Subject::new();
    let metadata = subject.open();
    let spy = subject.spy.clone();
    subject.runtime.block_on(async move {
        let _pointers = metadata.load(span(8192, 8), 2).await.unwrap();
        let _counts = metadata.load(span(0, 1024), 0).await.unwrap();
        metadata.set(&[(8192, 7), (0, 1), (512, 2)]);
        assert_eq!(*spy.steps.borrow(), [], "changes stay in memory");
        metadata.flush().await.unwrap();
        let expected = [Step::Write(0, 1), Step::Sync, Step::Write(8192, 7), Step::Sync];
        assert_eq!(spy.steps.take(), expected);
        // Nothing is changed: a plain sync.
        metadata.flush().await.unwrap();
        assert_eq!(spy.steps.take(), [Step::Sync]);
        // Data is durable before what points to it.
        metadata.set(&[(8192, 9)]);
        metadata.flush().await.unwrap();
        assert_eq!(spy.steps.take(), [Step::Sync, Step::Write(8192, 9), Step::Sync]);
    });
}

#[test]
fn what_cannot_be_written_stays_changed_and_the_next_flush_writes_it() {
    let subject = Subject::new();
    let metadata = subject.open();
    let spy = subject.spy.clone();
    subject.runtime.block_on(async move {
        let _held = metadata.load(span(0, 8), 0).await.unwrap();
        metadata.set(&[(0, 1)]);
        spy.fails.set(Some(Errno::ENOSPC));
        assert_eq!(metadata.flush().await.unwrap_err().errno(), Errno::ENOSPC);
        assert_eq!(metadata.word(0), Some(1));
        spy.fails.set(None);
        metadata.flush().await.unwrap();
        assert_eq!(spy.steps.take(), [Step::Write(0, 1), Step::Sync]);
    });
}

#[test]
fn a_successor_finds_what_was_saved_and_only_that() {
    let subject = Subject::new();
    let (first, second, third) = (subject.open(), subject.open(), subject.open());
    let (notes, spy) = (subject.notes.clone(), subject.spy.clone());
    subject.runtime.block_on(async move {
        let held = first.load(span(0, 1024), 1).await.unwrap();
        first.set(&[(0, 1), (512, 2)]);
        first.saved().await.unwrap();
        first.set(&[(0, 3)]);
        assert_eq!(second.take_over(sound, |_, noted| noted).await.unwrap(), 2);
        assert_eq!((second.word(0), second.word(512)), (Some(1), Some(2)));
        second.flush().await.unwrap();
        assert_eq!(notes.0.borrow().0, [], "what a round has written need not be noted");
        drop(held);
        // Somebody else has changed a word since it was noted.
        first.saved().await.unwrap();
        spy.ram.write(0, Buf::from_bytes(&99_u64.to_be_bytes())).await.unwrap();
        let error = third.take_over(sound, |_, noted| noted).await.unwrap_err().to_string();
        assert!(error.contains("another program") && error.contains("0x63"), "{error}");
    });
}

#[test]
fn what_another_program_has_made_of_the_space_that_was_noted_is_not_written_over() {
    let subject = Subject::new();
    let (first, second, third) = (subject.open(), subject.open(), subject.open());
    let spy = subject.spy.clone();
    subject.runtime.block_on(async move {
        let _held = first.load(span(0, 1024), 2).await.unwrap();
        first.set(&[(0, 7)]);
        first.saved().await.unwrap();
        // A word that the ledger does not name leads to the same place.
        let put =
            async |at: u64, word: u64| spy.ram.write(at, Buf::from_bytes(&word.to_be_bytes())).await.unwrap();
        put(512, 7).await;
        let error = second.take_over(distinct, |_, noted| noted).await.unwrap_err().to_string();
        assert!(error.contains("another program") && error.contains("two lead to 7"), "{error}");
        assert_eq!(second.word(0), Some(0), "and nothing is changed");
        // What made no sense before makes no less with what was noted.
        put(0, 7).await;
        assert_eq!(third.take_over(distinct, |_, noted| noted).await.unwrap(), 1);
    });
}

#[test]
fn where_notes_have_failed_a_successor_goes_on_with_the_newer_of_ledger_and_file() {
    let subject = Subject::new();
    let (first, second, third) = (subject.open(), subject.open(), subject.open());
    let (notes, spy) = (subject.notes.clone(), subject.spy.clone());
    subject.runtime.block_on(async move {
        let _held = first.load(span(0, 1024), 2).await.unwrap();
        first.set(&[(0, 1), (512, 2)]);
        first.saved().await.unwrap();
        // What comes now is noted by nobody, and the process dies in the middle of the round that writes it.
        notes.1.set(true);
        first.set(&[(0, 3), (512, 4)]);
        let before = notes.0.borrow().clone();
        first.saved().await.unwrap();
        *notes.0.borrow_mut() = before;
        spy.ram.write(512, Buf::from_bytes(&0_u64.to_be_bytes())).await.unwrap();
        notes.1.set(false);
        assert_eq!(second.take_over(sound, |_, noted| noted).await.unwrap(), 2);
        assert_eq!((second.word(0), second.word(512)), (Some(3), Some(2)));
        // Without such a mark somebody else must have written it.
        notes.2.set(false);
        assert!(third.take_over(sound, |_, noted| noted).await.is_err());
    });
}

#[test]
fn a_count_that_may_be_older_or_newer_than_what_was_noted_is_never_too_small() {
    let subject = Subject::new();
    let (first, second) = (subject.open(), subject.open());
    let (notes, spy) = (subject.notes.clone(), subject.spy.clone());
    subject.runtime.block_on(async move {
        let _held = first.load(span(0, 1536), 0).await.unwrap();
        first.set(&[(0, 1), (512, 1), (1024, 0)]);
        first.flush().await.unwrap();
        // Two are lowered, one is raised; of the first one it is not noted that it is raised again.
        first.set(&[(0, 0), (512, 0), (1024, 1)]);
        first.saved().await.unwrap();
        notes.1.set(true);
        first.set(&[(0, 1)]);
        let before = notes.0.borrow().clone();
        first.saved().await.unwrap();
        *notes.0.borrow_mut() = before;
        spy.ram.write(1024, Buf::from_bytes(&0_u64.to_be_bytes())).await.unwrap();
        notes.1.set(false);
        assert_eq!(second.take_over(sound, u64::max).await.unwrap(), 3);
        let found: Vec<_> = [0, 512, 1024].map(|at| second.word(at)).to_vec();
        assert_eq!(found, [Some(1), Some(0), Some(1)]);
    });
}

#[test]
fn without_a_ledger_that_works_what_is_saved_is_in_the_image() {
    let subject = Subject::new();
    let metadata = subject.open();
    let (notes, spy) = (subject.notes.clone(), subject.spy.clone());
    subject.runtime.block_on(async move {
        let _held = metadata.load(span(0, 8), 0).await.unwrap();
        notes.1.set(true);
        metadata.set(&[(0, 1)]);
        metadata.saved().await.unwrap();
        assert_eq!(spy.steps.take(), [Step::Write(0, 1), Step::Sync]);
        notes.1.set(false);
        metadata.set(&[(0, 2)]);
        metadata.saved().await.unwrap();
        assert_eq!((spy.steps.take(), notes.0.borrow().0.len()), (Vec::new(), 1));
    });
}

/// Who takes back what was retired.
#[derive(Default)]
struct Taken(RefCell<Vec<Span>>);

impl Reclaim for Taken {
    fn reclaim(&self, place: Span) -> Io<'_> {
        self.0.borrow_mut().push(place);
        Box::pin(std::future::ready(Ok(())))
    }
}

async fn a_while(handle: &Handle) {
    for _ in 0..16 {
        handle.yield_now().await;
    }
}

#[test]
fn a_retired_place_comes_back_after_a_whole_round_and_the_last_pin() {
    let subject = Subject::new();
    let metadata = subject.open();
    let handle = subject.runtime.handle().clone();
    subject.runtime.block_on(async move {
        let taken = Rc::new(Taken::default());
        let weak: Weak<Taken> = Rc::downgrade(&taken);
        metadata.on_reclaim(weak);
        let _held = metadata.load(span(0, 8), 2).await.unwrap();
        let reader = metadata.pin();
        metadata.set(&[(0, 1)]);
        metadata.retire(span(4096, 512));
        metadata.flush().await.unwrap();
        a_while(&handle).await;
        assert_eq!(*taken.0.borrow(), [], "somebody still reads there");
        let late = metadata.pin();
        drop(reader);
        while taken.0.borrow().is_empty() {
            handle.yield_now().await;
        }
        assert_eq!(*taken.0.borrow(), [span(4096, 512)]);
        drop(late);
    });
}

#[test]
fn a_retired_place_does_not_come_back_while_the_ledger_still_speaks_of_it() {
    let subject = Subject::new();
    let metadata = subject.open();
    let (handle, notes) = (subject.runtime.handle().clone(), subject.notes.clone());
    subject.runtime.block_on(async move {
        let taken = Rc::new(Taken::default());
        let weak: Weak<Taken> = Rc::downgrade(&taken);
        metadata.on_reclaim(weak);
        let _held = metadata.load(span(0, 8), 2).await.unwrap();
        metadata.set(&[(0, 1)]);
        metadata.saved().await.unwrap();
        metadata.retire(span(4096, 512));
        // Neither pass of the round empties the ledger; what was flushed is durable all the same.
        notes.3.set(2);
        metadata.flush().await.unwrap();
        a_while(&handle).await;
        assert_eq!((notes.0.borrow().0.len(), taken.0.borrow().len()), (1, 0));
        assert!(metadata.is_dirty() && metadata.has_retired(), "there is something left for the next round");
        // The first pass does not, and the second one does.
        notes.3.set(1);
        metadata.flush().await.unwrap();
        a_while(&handle).await;
        assert_eq!((notes.0.borrow().0.len(), taken.0.take()), (0, vec![span(4096, 512)]));
        assert!(!metadata.is_dirty());
    });
}

#[test]
fn nobody_waits_for_a_ledger_that_cannot_be_emptied() {
    let subject = Subject::new();
    let metadata = subject.open();
    let notes = subject.notes.clone();
    subject.runtime.block_on(async move {
        notes.3.set(u32::MAX);
        let _held = metadata.load(span(0, 8), 2).await.unwrap();
        for number in 1..NOTES_MAX as u64 + 10 {
            metadata.set(&[(0, number)]);
            metadata.saved().await.unwrap();
        }
        metadata.admit().await.unwrap();
        metadata.relieve().await.unwrap();
        assert!(notes.0.borrow().0.len() > NOTES_MAX);
    });
}

#[test]
fn what_nobody_waits_for_is_noted_before_it_is_very_much() {
    let subject = Subject::new();
    let metadata = subject.open();
    let notes = subject.notes.clone();
    subject.runtime.block_on(async move {
        let _held = metadata.load(span(0, 8), 2).await.unwrap();
        for number in 1..=2 * NOTES_MAX as u64 {
            metadata.set(&[(0, number)]);
            metadata.relieve().await.unwrap();
            assert!(
                metadata.0.unnoted.borrow().len() < GROUP && notes.0.borrow().0.len() <= NOTES_MAX + GROUP
            );
        }
    });
}

#[test]
fn what_cannot_be_noted_is_not_saved_while_the_ledger_has_something_older() {
    let subject = Subject::new();
    let metadata = subject.open();
    let notes = subject.notes.clone();
    subject.runtime.block_on(async move {
        let _held = metadata.load(span(0, 8), 2).await.unwrap();
        metadata.set(&[(0, 1)]);
        metadata.saved().await.unwrap();
        notes.1.set(true);
        notes.3.set(2);
        // A successor would find the old 0 in the file, take it for what was there before the note, and write the 1.
        metadata.set(&[(0, 0)]);
        assert_eq!(metadata.saved().await.unwrap_err().errno(), Errno::EIO);
        metadata.saved().await.unwrap();
        assert_eq!(notes.0.borrow().0.len(), 0);
    });
}

#[test]
fn more_than_memory_holds_can_be_loaded_and_changed() {
    let subject = Subject::new();
    let metadata = subject.open();
    let (steps, other) = (subject.spy.clone(), metadata.clone());
    subject.runtime.block_on(async move {
        for block in 0..200 {
            metadata.admit().await.unwrap();
            let _held = metadata.load(span(block * 512, 512), 2).await.unwrap();
            metadata.set(&[(block * 512, block + 1)]);
        }
        metadata.flush().await.unwrap();
        let all = metadata.load(span(0, 200 * 512), 2).await.unwrap();
        for block in 0..200 {
            assert_eq!(metadata.word(block * 512), Some(block + 1));
        }
        drop(all);
        assert!(steps.steps.borrow().len() > 4, "it wrote on the way");
        assert!(metadata.memory() < 1 << 18);
    });
    drop(other);
    subject.steps();
}
