//! Images that a process has left in the middle of its work and that another program has used since, on real files.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;

use block::{Buf, Limits, Pool, Run, Span};
use image::metadata::{Change, Ledger};
use image::qcow::{self, Qcow};
use image::qcow2::{self, Qcow2};
use image::vhd::{self, Vhd};
use image::{Chain, Image, ImageError, Settings};
use runtime::{Handle, RingFlags, Runtime, Uring};
use storage::file::{File, Options, open};
use storage::{Io, Ram, Storage, Zeroing};

const MIB: u64 = 1 << 20;

/// Notes of a process that has died.
#[derive(Clone, Default)]
struct Notes(Rc<RefCell<Vec<Change>>>, Rc<Cell<usize>>);

impl Ledger for Notes {
    fn changes(&self) -> std::io::Result<Vec<Change>> {
        Ok(self.0.borrow().clone())
    }

    fn is_whole(&self) -> std::io::Result<bool> {
        Ok(true)
    }

    fn note(&self, group: &[Change]) -> std::io::Result<()> {
        self.0.borrow_mut().extend(group);
        Ok(())
    }

    fn begin(&self) {
        self.1.set(self.0.borrow().len());
    }

    fn end(&self) -> bool {
        self.0.borrow_mut().drain(..self.1.get());
        true
    }
}

/// Formats by QEMU's names for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Qcow,
    Qcow2,
    Vpc,
}

struct Subject {
    folder: tempfile::TempDir,
    kind: Kind,
    notes: Notes,
}

impl Subject {
    fn new(kind: Kind) -> Subject {
        let subject = Subject { folder: tempfile::tempdir().unwrap(), kind, notes: Notes::default() };
        subject.create();
        subject
    }

    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Qcow => "qcow",
            Kind::Qcow2 => "qcow2",
            Kind::Vpc => "vpc",
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    fn create(&self) {
        qemu("qemu-img", &["create", "-q", "-f", self.name(), self.path().to_str().unwrap(), "64M"]);
    }

    fn qemu_io(&self, command: &str) {
        qemu("qemu-io", &["-f", self.name(), "-c", command, self.path().to_str().unwrap()]);
    }

    /// Brings the image into memory, so that nothing but what a test writes back reaches the file.
    async fn open(&self, handle: &Handle, storage: Rc<dyn Storage>) -> Result<Chain, ImageError> {
        let ledger: Box<dyn Ledger> = Box::new(self.notes.clone());
        let settings = Settings { writable: true, cache: 0, ledger: Some(ledger), lasting: true };
        let top: Rc<dyn Image> = match self.kind {
            Kind::Qcow => {
                let header = qcow::Header::read(&storage).await?;
                Rc::new(Qcow::open(handle, header, storage, settings).await?)
            }
            Kind::Qcow2 => {
                let header = qcow2::Header::read(&storage).await?;
                Rc::new(Qcow2::open(handle, header, storage, None, settings).await?)
            }
            Kind::Vpc => {
                let header = vhd::Header::read(&storage).await?;
                Rc::new(Vhd::open(handle, header, storage, settings).await?)
            }
        };
        Ok(Chain::over(handle, top, vec![]))
    }

    /// The image as the first process finds it.
    async fn in_memory(&self) -> Rc<dyn Storage> {
        let bytes = std::fs::read(self.path()).unwrap();
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(bytes.len() as u64));
        ram.write(0, Buf::from_bytes(&bytes)).await.unwrap();
        ram
    }

    /// A process writes a MiB at 3 MiB and is killed: its map is in the ledger alone.
    async fn killed(&self, handle: &Handle) {
        let storage = self.in_memory().await;
        let chain = self.open(handle, storage.clone()).await.unwrap();
        chain.write(3 * MIB, Buf::from_bytes(&[3; MIB as usize])).await.unwrap();
        assert!(!self.notes.0.borrow().is_empty(), "{:?}: the map was written", self.kind);
        let all = Buf::zeroed(storage.size() as usize);
        storage.read(0, all.clone()).await.unwrap();
        std::fs::write(self.path(), all.to_vec()).unwrap();
    }

    async fn successor(&self, handle: &Handle) -> Result<Chain, ImageError> {
        let file = open(&self.path(), &Options::default()).unwrap();
        self.open(handle, Rc::new(File::new(handle, file))).await
    }
}

/// A storage that counts the bytes that are read.
struct Counting(Rc<dyn Storage>, Cell<u64>);

impl Storage for Counting {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn limits(&self) -> Limits {
        self.0.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        self.1.set(self.1.get() + buf.len() as u64);
        self.0.read(at, buf)
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        self.0.write(at, buf)
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        self.0.zero(span, how)
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.0.discard(span)
    }

    fn flush(&self) -> Io<'_> {
        self.0.flush()
    }

    fn extents(&self, span: Span) -> Io<'_, Vec<Run>> {
        self.0.extents(span)
    }

    fn prefetch(&self, span: Span) -> Io<'_> {
        self.0.prefetch(span)
    }

    fn grow(&self) -> Io<'_, u64> {
        self.0.grow()
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        self.0.resize(bytes)
    }

    fn poison(&self) -> Option<block::Error> {
        self.0.poison()
    }
}

fn qemu(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
}

fn for_each(work: impl AsyncFn(Handle, Subject) + 'static) {
    let pool = Pool::new(1 << 20);
    let uring = Uring::open(RingFlags::Auto, &pool).unwrap();
    let runtime = Runtime::new(Box::new(uring), pool);
    let handle = runtime.handle().clone();
    runtime.block_on(async move {
        for kind in [Kind::Qcow, Kind::Qcow2, Kind::Vpc] {
            work(handle.clone(), Subject::new(kind)).await;
        }
    });
}

async fn read(chain: &Chain, at: u64) -> u8 {
    let buf = Buf::zeroed(512);
    chain.read(at, buf.clone()).await.unwrap();
    buf.to_vec()[0]
}

fn says_who(result: Result<Chain, ImageError>, kind: Kind) {
    let error = result.err().unwrap_or_else(|| panic!("{kind:?}: it was taken over")).to_string();
    assert!(error.contains("another program has changed this image"), "{kind:?}: {error}");
}

#[test]
fn what_was_answered_is_there_where_nobody_else_was() {
    for_each(async |handle, subject| {
        subject.killed(&handle).await;
        let chain = subject.successor(&handle).await.unwrap();
        assert_eq!(read(&chain, 3 * MIB).await, 3, "{:?}", subject.kind);
        chain.close().await.unwrap();
        subject.qemu_io("read -q -P 3 3M 1M");
    });
}

#[test]
fn space_that_another_program_has_used_for_something_else_is_not_used_twice() {
    for_each(async |handle, subject| {
        // Tables are there before: then both change words in them, and not the same.
        subject.qemu_io("write -q -P 1 0 64k");
        subject.killed(&handle).await;
        subject.qemu_io("write -q -P 9 9M 1M");
        match subject.successor(&handle).await {
            // There new space is behind the file's end, which was moved before: both have theirs.
            Ok(chain) if subject.kind == Kind::Qcow => {
                assert_eq!((read(&chain, 3 * MIB).await, read(&chain, 9 * MIB).await), (3, 9));
            }
            result => says_who(result, subject.kind),
        }
        subject.qemu_io("read -q -P 9 9M 1M");
    });
}

#[test]
fn a_successor_reads_the_maps_and_not_what_they_do_not_lead_to() {
    for_each(async |handle, subject| {
        if subject.kind == Kind::Vpc {
            return; // its footer is at the end of the file
        }
        subject.killed(&handle).await;
        // As an image that was allocated beforehand: full of something, and of holes.
        let file = open(&subject.path(), &Options::default()).unwrap();
        let file: Rc<dyn Storage> = Rc::new(File::new(&handle, file));
        let len = file.size();
        file.resize(len + 64 * MIB).await.unwrap();
        for at in (len..len + 16 * MIB).step_by(MIB as usize) {
            file.write(at, Buf::zeroed(MIB as usize)).await.unwrap();
        }
        let counting = Rc::new(Counting(file, Cell::new(0)));
        let chain = subject.open(&handle, counting.clone()).await.unwrap();
        let read_by_then = counting.1.get();
        assert!(read_by_then < MIB, "{:?}: {read_by_then} bytes were read", subject.kind);
        assert_eq!(read(&chain, 3 * MIB).await, 3, "{:?}", subject.kind);
        chain.close().await.unwrap();
    });
}

#[test]
fn an_image_that_was_made_anew_in_the_same_file_gets_nothing_of_the_old_one() {
    for_each(async |handle, subject| {
        subject.killed(&handle).await;
        subject.create();
        match subject.successor(&handle).await {
            // A block that was given a place and nothing else: it is as if it had never been written.
            Ok(chain) if subject.kind == Kind::Vpc => assert_eq!(read(&chain, 3 * MIB).await, 0),
            result => says_who(result, subject.kind),
        }
    });
}
