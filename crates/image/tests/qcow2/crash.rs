//! Interruptions: every state that a power cut may leave of a repair, a snapshot or a resize is one to go on from.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use block::{Buf, Errno, Error, Limits, Run, Span};
use image::qcow2::{
    Header, Qcow2, apply_snapshot, check as our_check, delete_snapshot, prepare, resize, snapshots,
    take_snapshot,
};
use image::{Chain, Repair, Settings};
use storage::conformance::Random;
use storage::{Io, Ram, Storage, Zeroing};

use crate::disk::runtime;
use crate::tools::{bytes, load, now, one_of, qemu_img, qemu_img_says, qemu_io, ram, save, scratch};

/// What changes a file.
#[derive(Clone)]
enum Event {
    Write(u64, Vec<u8>),
    Clear(Span),
    Resize(u64),
    Flush,
}

/// Memory that remembers what was done to it.
struct Recorder {
    ram: Ram,
    events: RefCell<Vec<Event>>,
    /// Writes to the header that get an error although they are done.
    late: Cell<u32>,
}

impl Recorder {
    fn new(bytes: &[u8]) -> Rc<Recorder> {
        let ram = Ram::new(bytes.len() as u64);
        now(ram.write(0, Buf::from_bytes(bytes))).unwrap();
        Rc::new(Recorder { ram, events: RefCell::default(), late: Cell::new(0) })
    }

    fn note(&self, event: Event) {
        self.events.borrow_mut().push(event);
    }
}

impl Storage for Recorder {
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
        self.note(Event::Write(at, buf.to_vec()));
        let done = self.ram.write(at, buf);
        match self.late.get() {
            left @ 1.. if at < 512 => {
                self.late.set(left - 1);
                Box::pin(async move { done.await.and(Err(Error::new(Errno::EIO, "answer in time"))) })
            }
            _ => done,
        }
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        self.note(Event::Clear(span));
        self.ram.zero(span, how)
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.note(Event::Clear(span));
        self.ram.discard(span)
    }

    fn flush(&self) -> Io<'_> {
        self.note(Event::Flush);
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
        self.note(Event::Resize(bytes));
        self.ram.resize(bytes)
    }

    fn poison(&self) -> Option<Error> {
        None
    }
}

/// Sectors are written as a whole or not at all: 512 bytes.
fn apply(bytes: &mut Vec<u8>, event: &Event, survives: &mut dyn FnMut() -> bool) {
    match event {
        Event::Flush => {}
        Event::Resize(size) => {
            if survives() {
                bytes.resize(*size as usize, 0);
            }
        }
        Event::Clear(span) => {
            for at in span.at()..span.end().min(bytes.len() as u64) {
                bytes[at as usize] = 0;
            }
        }
        Event::Write(at, new) => {
            let end = *at as usize + new.len();
            let mut from = *at as usize;
            while from < end {
                let to = ((from / 512 + 1) * 512).min(end);
                if survives() {
                    if bytes.len() < to {
                        bytes.resize(to, 0);
                    }
                    bytes[from..to].copy_from_slice(&new[from - *at as usize..to - *at as usize]);
                }
                from = to;
            }
        }
    }
}

/// States after a power cut: after each event all before the last flush, and of what came since then all, none, or some.
fn states(before: &[u8], events: &[Event], seed: u64) -> Vec<Vec<u8>> {
    let mut random = Random(seed);
    let mut all = Vec::new();
    let mut durable = before.to_vec();
    let mut since: Vec<&Event> = Vec::new();
    for event in events {
        if matches!(event, Event::Flush) {
            for event in since.drain(..) {
                apply(&mut durable, event, &mut || true);
            }
            all.push(durable.clone());
            continue;
        }
        since.push(event);
        for odds in [1, 2, 4] {
            let mut state = durable.clone();
            for event in &since {
                apply(&mut state, event, &mut || random.below(4) < odds);
            }
            all.push(state);
        }
    }
    all
}

/// All bytes of the disk, as QEMU reads them.
fn disk(bytes: &[u8], folder: &Path) -> Vec<u8> {
    let (image, raw) = (folder.join("state"), folder.join("state.raw"));
    save(&ram(bytes), &image);
    qemu_img(&[
        "convert",
        "-t",
        "unsafe",
        "-f",
        "qcow2",
        "-O",
        "raw",
        image.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    std::fs::read(raw).unwrap()
}

/// All bytes of each snapshot by its name, as far as the disk is large now; after all of the disk was written, if told so.
fn all_snapshots(bytes: &[u8], folder: &Path, write: bool) -> BTreeMap<String, Vec<u8>> {
    let (image, raw) = (folder.join("state"), folder.join("state.raw"));
    let file = ram(bytes);
    let header = now(Header::read(&file)).unwrap();
    let all = now(snapshots(&file, &header)).unwrap();
    save(&file, &image);
    if write {
        qemu_io(&image, &[&format!("write -P 99 0 {}", header.size())]);
    }
    let (image, to) = (image.to_str().unwrap(), raw.to_str().unwrap());
    let read = |name: &str| {
        qemu_img(&["convert", "-t", "unsafe", "-f", "qcow2", "-l", name, "-O", "raw", image, to]);
        std::fs::read(&raw).unwrap()
    };
    all.iter().map(|snapshot| (snapshot.name.clone(), read(&snapshot.name))).collect()
}

/// Goes on from each state that a cut during `how` may leave: it opens for writing, is sound then, and shows one of the disks that
/// `allowed` has.
fn survives(sound: &[u8], how: impl Fn(&Rc<dyn Storage>), allowed: &[Vec<u8>], folder: &Path, context: &str) {
    let recorder = Recorder::new(sound);
    let file: Rc<dyn Storage> = recorder.clone();
    how(&file);
    let events = recorder.events.borrow().clone();
    let states = states(sound, &events, 7);
    assert!(states.len() > 5, "{context}: {} states", states.len());
    let mut kept = all_snapshots(sound, folder, false);
    kept.insert("second".to_owned(), allowed[0].clone());
    let mut seen = BTreeSet::new();
    for (number, state) in states.iter().enumerate() {
        let context = format!("{context}, state {number} of {}", states.len());
        let file = ram(state);
        let mut header = now(Header::read(&file)).unwrap_or_else(|error| panic!("{context}: {error}"));
        let report = now(our_check(&file, Repair::No)).unwrap();
        if !report.is_safe() {
            // Only while the image says so itself.
            assert!(header.is_dirty() || header.version == 2, "{context}: {report:#?}");
        }
        now(prepare(&file, &mut header)).unwrap_or_else(|error| panic!("{context}: {error}"));
        let ready = bytes(&file);
        let report = now(our_check(&file, Repair::All)).unwrap();
        assert!(report.is_clean(), "{context}: {report:#?}");
        if number % one_of(67, 17) == 0 || number + 1 == states.len() {
            let shown = disk(&bytes(&file), folder);
            let which = allowed.iter().position(|disk| *disk == shown);
            // Who writes to it without another look changes the disk alone, not its snapshots.
            for (name, now) in all_snapshots(&ready, folder, true) {
                let len = now.len().min(kept[&name].len());
                assert!(now[..len] == kept[&name][..len], "{context}: a write reached snapshot `{name}`");
            }
            seen.insert(which.unwrap_or_else(|| {
                panic!("{context}: a disk of {} bytes that was never there", shown.len())
            }));
        }
    }
    assert!(!seen.is_empty());
}

fn made(folder: &Path, options: &str) -> Vec<u8> {
    let path = folder.join("image");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "1M"]);
    qemu_io(&path, &["write -P 1 0 100k", "write -P 2 500k 100k", "write -z 300k 64k"]);
    qemu_img(&["snapshot", "-c", "first", name]);
    qemu_io(&path, &["write -P 3 50k 100k", "write -P 4 900k 50k"]);
    bytes(&load(&path))
}

const SHAPES: &[&str] =
    &["cluster_size=512,refcount_bits=64", "cluster_size=4k,compat=0.10", "cluster_size=16k,extended_l2=on"];

/// The disk after something was done.
fn after(sound: &[u8], how: impl Fn(&Rc<dyn Storage>), folder: &Path) -> Vec<u8> {
    let file = ram(sound);
    how(&file);
    disk(&bytes(&file), folder)
}

#[test]
fn a_snapshot_is_taken_applied_and_deleted_or_not() {
    let folder = scratch();
    for options in SHAPES {
        let sound = made(folder.path(), options);
        let old = disk(&sound, folder.path());
        let take = |file: &Rc<dyn Storage>| now(take_snapshot(file, "second", Duration::ZERO)).unwrap();
        survives(&sound, take, std::slice::from_ref(&old), folder.path(), &format!("take, {options}"));
        let delete = |file: &Rc<dyn Storage>| now(delete_snapshot(file, "first")).unwrap();
        survives(&sound, delete, std::slice::from_ref(&old), folder.path(), &format!("delete, {options}"));
        let back = |file: &Rc<dyn Storage>| now(apply_snapshot(file, "first")).unwrap();
        let new = after(&sound, back, folder.path());
        assert_ne!(old, new);
        survives(&sound, back, &[old, new], folder.path(), &format!("apply, {options}"));
    }
}

#[test]
fn a_disk_has_its_old_size_or_the_new_one() {
    let folder = scratch();
    for options in SHAPES.iter().filter(|options| !options.contains("0.10")) {
        let sound = made(folder.path(), options);
        let old = disk(&sound, folder.path());
        for size in [300 << 10, 40 << 20] {
            let change = |file: &Rc<dyn Storage>| now(resize(file, None, size)).unwrap();
            let new = if size < 1 << 20 { old[..size as usize].to_vec() } else { Vec::new() };
            let mut grown = old.clone();
            grown.resize(size as usize, 0);
            let allowed = [old.clone(), if new.is_empty() { grown } else { new }];
            survives(&sound, change, &allowed, folder.path(), &format!("{size}, {options}"));
        }
    }
}

#[test]
fn a_repair_that_is_cut_off_is_finished_by_the_next() {
    let folder = scratch();
    for options in SHAPES {
        let sound = made(folder.path(), options);
        let old = disk(&sound, folder.path());
        let header = now(Header::read(&ram(&sound))).unwrap();
        let table = header.refcount_table_at as usize;
        let block = u64::from_be_bytes(sound[table..table + 8].try_into().unwrap()) as usize;
        for (what, from, len, byte) in [
            ("counts of zero", block, header.cluster_size() as usize, 0),
            ("counts of one", block, header.cluster_size() as usize, 1),
            ("no block of counts", table, 8, 0),
            ("no counts at all", 56, 4, 0),
        ] {
            let mut damaged = sound.clone();
            damaged[from..from + len].fill(byte);
            let recorder = Recorder::new(&damaged);
            let file: Rc<dyn Storage> = recorder.clone();
            let report = now(our_check(&file, Repair::All)).unwrap();
            assert!(report.is_clean(), "{options}, {what}: {report:#?}");
            let before = now(our_check(&ram(&damaged), Repair::No)).unwrap();
            let events = recorder.events.borrow().clone();
            let states = states(&damaged, &events, 3);
            for (number, state) in states.iter().enumerate() {
                let context = format!("{options}, {what}, state {number} of {}", states.len());
                let file = ram(state);
                let cut = now(our_check(&file, Repair::No)).unwrap();
                // Marks may be wrong for a while where counts were, but nothing gets lost.
                assert!(
                    cut.corruptions <= before.corruptions + before.leaks,
                    "{context}: {cut:#?} of {before:#?}"
                );
                let report = now(our_check(&file, Repair::All)).unwrap();
                assert!(report.is_clean(), "{context}: {report:#?}");
                if number % one_of(57, 19) == 0 || number + 1 == states.len() {
                    assert!(disk(&bytes(&file), folder.path()) == old, "{context}");
                    let path = folder.path().join("state");
                    let (code, out, error) = qemu_img_says(&["check", "-f", "qcow2", path.to_str().unwrap()]);
                    assert_eq!(code, 0, "{context}: {out}{error}");
                }
            }
        }
    }
}

#[test]
fn a_header_that_gets_other_names_has_the_old_ones_or_the_new_ones() {
    let folder = scratch();
    let path = folder.path().join("image");
    for (options, len) in
        [("compat=1.1", 30), ("compat=1.1", 700), ("compat=0.10", 300), ("cluster_size=4k", 1000)]
    {
        let name = |first: char, len: usize| format!("{first}").repeat(len);
        let old = name('o', len);
        let arguments = ["create", "-q", "-u", "-f", "qcow2", "-b", &old, "-F", "raw", "-o", options];
        qemu_img(&[&arguments[..], &[path.to_str().unwrap(), "1M"]].concat());
        let sound = bytes(&load(&path));
        for new in [name('n', 20), name('n', 450), name('n', 1023), String::new()] {
            let recorder = Recorder::new(&sound);
            let file: Rc<dyn Storage> = recorder.clone();
            let mut header = now(Header::read(&file)).unwrap();
            header.backing_file = (!new.is_empty()).then(|| new.clone());
            header.extensions.backing_format = header.backing_file.as_ref().map(|_| "qcow2".to_owned());
            now(header.write(&file)).unwrap();
            assert_eq!(now(Header::read(&file)).unwrap(), header);
            let events = recorder.events.borrow().clone();
            let allowed =
                [Some((old.clone(), "raw")), header.backing_file.clone().map(|name| (name, "qcow2"))];
            for state in states(&sound, &events, 5) {
                let found = now(Header::read(&ram(&state))).unwrap();
                let format = found.extensions.backing_format.as_deref();
                let found = found.backing_file.as_ref().map(|name| (name.clone(), format.unwrap()));
                assert!(allowed.contains(&found), "{options}, {len} to {}: {found:?}", new.len());
            }
        }
    }
}

/// An image whose refcount table is almost full: a cluster of it leads to 64 blocks, each of which counts 64 clusters, which is
/// 2 MiB of the file.
fn with_a_full_table(folder: &Path) -> Vec<u8> {
    let path = folder.join("image");
    let options = "cluster_size=512,refcount_bits=64";
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), "3M"]);
    qemu_io(&path, &["write -P 1 0 1900k"]);
    bytes(&load(&path))
}

#[test]
fn a_refcount_table_that_gets_a_new_place_is_whole_after_each_cut() {
    let folder = scratch();
    let sound = with_a_full_table(folder.path());
    let recorder = Recorder::new(&sound);
    let file: Rc<dyn Storage> = recorder.clone();
    let runtime = runtime();
    let handle = runtime.handle().clone();
    runtime.block_on(async move {
        let header = Header::read(&file).await.unwrap();
        let settings = Settings { writable: true, ..Settings::default() };
        let image = Qcow2::open(&handle, header, file, None, settings).await.unwrap();
        let chain = Chain::new(&handle, Rc::new(image));
        for at in (2 << 20..(2 << 20) + (256 << 10)).step_by(16 << 10) {
            chain.write(at, Buf::from_bytes(&[7; 16 << 10])).await.unwrap();
        }
        chain.close().await.unwrap();
    });
    let table = |file: &[u8]| now(Header::read(&ram(file))).unwrap().refcount_table_at;
    let ended = bytes(&(recorder.clone() as Rc<dyn Storage>));
    assert_ne!(table(&ended), table(&sound), "it has the same place as before");
    let (old, new) = (disk(&sound, folder.path()), disk(&ended, folder.path()));
    let states = states(&sound, &recorder.events.borrow(), 11);
    for (number, state) in states.iter().enumerate() {
        let context = format!("state {number} of {}", states.len());
        let report = now(our_check(&ram(state), Repair::No)).unwrap();
        assert!(report.is_safe(), "{context}: {report:#?}");
        if number % one_of(67, 17) == 0 {
            let shown = disk(state, folder.path());
            let fits = |at: usize| shown[at] == old[at] || shown[at] == new[at];
            assert!((0..shown.len()).all(fits), "{context}");
        }
    }
}

#[test]
fn a_refcount_table_that_the_header_may_point_to_stays_when_the_image_is_closed() {
    let folder = scratch();
    let sound = with_a_full_table(folder.path());
    for times in [1, u32::MAX] {
        let recorder = Recorder::new(&sound);
        let file: Rc<dyn Storage> = recorder.clone();
        let runtime = runtime();
        let (handle, late) = (runtime.handle().clone(), recorder.clone());
        runtime.block_on(async move {
            let header = Header::read(&file).await.unwrap();
            let settings = Settings { writable: true, ..Settings::default() };
            let image = Qcow2::open(&handle, header, file, None, settings).await.unwrap();
            let chain = Chain::new(&handle, Rc::new(image));
            late.late.set(times);
            let mut places = (2 << 20..3 << 20).step_by(16 << 10);
            loop {
                let at = places.next().expect("the table is full before that");
                if let Err(error) = chain.write(at, Buf::from_bytes(&[7; 16 << 10])).await {
                    assert_eq!(error.errno(), Errno::EIO);
                    break;
                }
            }
            assert_eq!(chain.close().await.is_ok(), times == 1, "it is not in order while the header fails");
        });
        let ended = ram(&bytes(&(recorder.clone() as Rc<dyn Storage>)));
        assert_ne!(
            now(Header::read(&ended)).unwrap().refcount_table_at,
            now(Header::read(&ram(&sound))).unwrap().refcount_table_at
        );
        let report = now(our_check(&ended, Repair::No)).unwrap();
        assert!(report.is_safe(), "{times}: {report:#?}");
    }
}
