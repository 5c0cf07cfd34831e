//! Storage that fails at one operation after the other, and images whose tables make no sense: what was there stays, the
//! image stays whole, and trying again works.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::{Buf, Errno, Error, Limits, Result, Run, Span};
use image::qcow2::{Header, Qcow2, check};
use image::{Chain, Image, Raw, Repair, Settings};
use runtime::{BoxFuture, Handle, RingFlags, Runtime, Uring, join_all};
use storage::conformance::Random;
use storage::{Io, Ram, Storage, Zeroing};

use crate::tools::{bytes, check as qemu_check, now, qemu_img, ram, save, scratch};

fn runtime() -> Runtime {
    let pool = block::Pool::new(64 << 20);
    let uring = Uring::open(RingFlags::Auto, &pool).unwrap();
    Runtime::new(Box::new(uring), pool)
}

/// When operations fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Once(u64, Errno),
    From(u64, Errno),
}

/// Memory whose operations are counted, and of which some fail: reads, writes, resizes and flushes. A flush that has failed
/// poisons it, as every storage.
struct Flaky {
    ram: Ram,
    count: Cell<u64>,
    fault: Cell<Option<Fault>>,
    poison: RefCell<Option<Error>>,
    /// What failed, the first time.
    failed: Cell<Option<&'static str>>,
}

impl Flaky {
    fn new(bytes: &[u8]) -> Flaky {
        let ram = Ram::new(bytes.len() as u64);
        now(ram.write(0, Buf::from_bytes(bytes))).unwrap();
        Flaky {
            ram,
            count: Cell::new(0),
            fault: Cell::new(None),
            poison: RefCell::new(None),
            failed: Cell::new(None),
        }
    }

    fn count(&self, doing: &'static str) -> Result<()> {
        if doing != "read"
            && let Some(error) = &*self.poison.borrow()
        {
            return Err(error.clone());
        }
        let count = self.count.replace(self.count.get() + 1);
        let errno = match self.fault.get() {
            Some(Fault::Once(number, errno)) if number == count => errno,
            Some(Fault::From(number, errno)) if number <= count => errno,
            Some(_) | None => return Ok(()),
        };
        self.failed.set(self.failed.get().or(Some(doing)));
        let error = Error::new(errno, doing);
        if doing == "flush" {
            *self.poison.borrow_mut() = Some(error.clone().lasting());
        }
        Err(error)
    }
}

impl Storage for Flaky {
    fn size(&self) -> u64 {
        self.ram.size()
    }

    fn limits(&self) -> Limits {
        self.ram.limits()
    }

    fn read(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move {
            self.count("read")?;
            self.ram.read(at, buf).await
        })
    }

    fn write(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(async move {
            let result = self.count("write");
            // What fails has written a part.
            let len = if result.is_ok() { buf.len() } else { buf.len() / 2 };
            self.ram.write(at, buf.slice(0, len)).await?;
            result
        })
    }

    fn zero(&self, span: Span, how: Zeroing) -> Io<'_> {
        Box::pin(async move {
            self.count("zero")?;
            self.ram.zero(span, how).await
        })
    }

    fn discard(&self, span: Span) -> Io<'_> {
        self.ram.discard(span)
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(async move { self.count("flush") })
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
        Box::pin(async move {
            self.count("resize")?;
            self.ram.resize(bytes).await
        })
    }

    fn poison(&self) -> Option<Error> {
        self.poison.borrow().clone()
    }
}

async fn open(handle: &Handle, file: &Rc<dyn Storage>, below: &[u8], writable: bool) -> Chain {
    let header = Header::read(file).await.unwrap();
    let has_backing = header.backing().is_some();
    let settings = Settings { writable, ..Settings::default() };
    let top = Qcow2::open(handle, header, file.clone(), None, settings).await.unwrap();
    let below: Vec<Rc<dyn Image>> =
        if has_backing { vec![Rc::new(Raw::new(ram(below)))] } else { Vec::new() };
    Chain::over(handle, Rc::new(top), below)
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, usize, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
}

/// What is done while the storage fails. Together the steps need each kind of table, and give space back that is used again.
fn steps(size: u64, cluster: u64) -> Vec<Step> {
    let mut steps = vec![Step::Write(1000, 300, 1), Step::Flush];
    let piece = size / 12;
    for number in 0..6 {
        steps.push(Step::Write(number * piece, piece as usize, 2 + number as u8));
    }
    steps.extend([
        Step::Flush,
        Step::Zero(piece, cluster * 5 + 100),
        Step::Discard(3 * piece, cluster * 9),
        Step::Write(cluster, 700, 20),
        Step::Flush,
        Step::Write(3 * piece + 100, 2 * cluster as usize, 21),
    ]);
    for number in 6..12 {
        steps.push(Step::Write(number * piece + 77, piece as usize - 77, 2 + number as u8));
    }
    steps.push(Step::Flush);
    steps
}

async fn run(chain: &Chain, step: &Step) -> Result<()> {
    let span = |at, len| Span::new(at, len).unwrap();
    match *step {
        Step::Write(at, len, byte) => chain.write(at, Buf::from_bytes(&vec![byte; len])).await,
        Step::Zero(at, len) => chain.zero(span(at, len), Zeroing { unmap: true, fast: false }).await,
        Step::Discard(at, len) => chain.discard(span(at, len)).await,
        Step::Flush => chain.flush().await,
    }
}

/// What the disk should show.
struct Model {
    bytes: Vec<u8>,
    /// What some bytes may be as well, from the first one's place on: requests for them have failed.
    others: Vec<(usize, Vec<u8>)>,
}

impl Model {
    fn apply(&mut self, step: &Step, ok: bool) {
        let (at, len, new, old_too) = match *step {
            Step::Write(at, len, byte) => (at as usize, len, byte, !ok),
            Step::Zero(at, len) => (at as usize, len as usize, 0, !ok),
            Step::Discard(at, len) => (at as usize, len as usize, 0, true),
            Step::Flush => return,
        };
        let end = at + len;
        if old_too {
            self.others.push((at, self.bytes[at..end].to_vec()));
        } else {
            // Of the others what lies before and behind is left.
            for (start, bytes) in std::mem::take(&mut self.others) {
                let cut = |place: usize| place.clamp(start, start + bytes.len()) - start;
                self.others.push((start, bytes[..cut(at)].to_vec()));
                self.others.push((start + cut(end), bytes[cut(end)..].to_vec()));
            }
            self.others.retain(|(_, bytes)| !bytes.is_empty());
        }
        self.bytes[at..end].fill(new);
    }

    fn judge(&self, found: &[u8], context: &dyn Fn() -> String) {
        if found == self.bytes {
            return;
        }
        for (at, (byte, expected)) in found.iter().zip(&self.bytes).enumerate() {
            let may_be = |(start, bytes): &(usize, Vec<u8>)| {
                at.checked_sub(*start).and_then(|at| bytes.get(at)).is_some_and(|other| other == byte)
            };
            let is_right = byte == expected || self.others.iter().any(may_be);
            assert!(is_right, "{}: byte {at} is {byte} and should be {expected}", context());
        }
    }
}

async fn read_all(chain: &Chain) -> Vec<u8> {
    let buf = Buf::zeroed(chain.size() as usize);
    chain.read(0, buf.clone()).await.unwrap();
    buf.to_vec()
}

struct Case {
    image: Vec<u8>,
    below: Vec<u8>,
    /// What its disk shows.
    shows: Vec<u8>,
    cluster: u64,
    /// Where the image below is, for QEMU.
    dir: tempfile::TempDir,
}

/// Runs all steps with a fault; gives how many operations of the storage there were until then.
fn run_with(case: &Case, fault: Option<Fault>) -> u64 {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    let flaky = Rc::new(Flaky::new(&case.image));
    let storage: Rc<dyn Storage> = flaky.clone();
    let (below, shows, cluster) = (case.below.clone(), case.shows.clone(), case.cluster);
    let saved = case.dir.path().join("saved");
    runtime.block_on(async move {
        let chain = open(&handle, &storage, &below, true).await;
        flaky.count.set(0);
        flaky.fault.set(fault);
        let mut model = Model { bytes: shows.clone(), others: Vec::new() };
        for step in steps(shows.len() as u64, cluster) {
            let mut result = run(&chain, &step).await;
            model.apply(&step, result.is_ok());
            if result.is_err() && matches!(fault, Some(Fault::Once(..))) && flaky.poison().is_none() {
                // The one failure is over: the same again does it.
                result = run(&chain, &step).await;
                model.apply(&step, result.is_ok());
                assert!(result.is_ok(), "{fault:?}, {step:?}: {result:?}");
            }
            if let Err(error) = result {
                assert!(flaky.failed.get().is_some(), "{fault:?}, {step:?}: {error}");
            }
        }
        let context = || format!("{fault:?} at a {:?}", flaky.failed.get());
        let count = flaky.count.get();
        let closed = chain.close().await;
        flaky.fault.set(None);
        if flaky.poison.take().is_none() {
            model.judge(&read_all(&chain).await, &context);
            assert!(closed.is_ok() || matches!(fault, Some(Fault::From(..))), "{}: {closed:?}", context());
        }
        drop(chain);
        let report = check(&storage, Repair::No).await.unwrap();
        assert!(report.is_safe(), "{}: {report:?}", context());
        if flaky.failed.get().is_none() {
            assert!(report.is_clean(), "{}: {report:?}", context());
        }
        // Who comes later finds an image that works.
        let chain = open(&handle, &storage, &below, true).await;
        if closed.is_ok() {
            model.judge(&read_all(&chain).await, &context);
        }
        run(&chain, &Step::Write(5000, 3000, 99)).await.unwrap();
        chain.close().await.unwrap();
        let report = check(&storage, Repair::No).await.unwrap();
        assert!(report.is_safe(), "{}, and then a write: {report:?}", context());
        if fault.is_none() {
            save(&storage, &saved);
            assert_eq!(qemu_check(&saved)["code"], 0);
        }
        count
    })
}

fn make(options: &str, size: u64, below: bool, snapshot: bool) -> Case {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (image, base, raw) = (path("image"), path("base"), path("raw"));
    let mut create = vec!["create", "-q", "-f", "qcow2", "-o", options];
    let bytes: Vec<u8> = (0..size / 2 + 333).map(|at| (at / 100) as u8 | 1).collect();
    std::fs::write(&base, &bytes).unwrap();
    if below {
        create.extend(["-b", &base, "-F", "raw"]);
    }
    let text = size.to_string();
    create.extend([&image[..], &text]);
    qemu_img(&create);
    if snapshot {
        let write = format!("write -P 77 0 {}", size / 2 / 512 * 512);
        let done = std::process::Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", &write, &image])
            .output()
            .unwrap();
        assert!(done.status.success());
        qemu_img(&["snapshot", "-c", "one", &image]);
    }
    qemu_img(&["convert", "-O", "raw", &image, &raw]);
    let cluster = options.split(',').find_map(|option| option.strip_prefix("cluster_size=")).unwrap();
    Case {
        image: std::fs::read(&image).unwrap(),
        below: if below { bytes } else { Vec::new() },
        shows: std::fs::read(&raw).unwrap(),
        cluster: cluster.parse().unwrap(),
        dir,
    }
}

fn run_all(case: &Case) {
    let count = run_with(case, None);
    assert!(count > 20, "{count} operations cannot be all");
    // Each of the first, and then some of them, so that all of it takes seconds.
    let stride = (count / 25).max(1);
    for number in (0..count.min(40)).chain((40..count).step_by(stride as usize)) {
        run_with(case, Some(Fault::Once(number, [Errno::ENOSPC, Errno::EIO][number as usize % 2])));
    }
    for number in (0..count).step_by(stride as usize * 2) {
        run_with(case, Some(Fault::From(number, [Errno::EIO, Errno::ENOSPC][number as usize % 2])));
    }
}

#[test]
fn no_failure_while_all_kinds_of_tables_are_made_harms_the_image() {
    // One cluster of the refcount table tells of 2 MiB of the file: it moves.
    run_all(&make("cluster_size=512,refcount_bits=64", 5 << 19, false, false));
}

#[test]
fn no_failure_while_clusters_are_copied_from_below_harms_the_image() {
    run_all(&make("cluster_size=4096", 1 << 20, true, false));
    run_all(&make("cluster_size=16384,extended_l2=on", 1 << 20, true, false));
}

#[test]
fn no_failure_while_clusters_of_a_snapshot_are_copied_harms_the_image() {
    run_all(&make("cluster_size=2048,refcount_bits=8", 1 << 20, false, true));
    run_all(&make("cluster_size=16384,extended_l2=on", 1 << 20, true, true));
}

/// The big-endian number at a byte of an image.
fn word(image: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(image[at as usize..at as usize + 8].try_into().unwrap())
}

/// An image with some data, in bytes; and where its first L2 table is.
fn with_data() -> (Vec<u8>, u64) {
    let case = make("cluster_size=4096", 1 << 20, false, false);
    let runtime = runtime();
    let handle = runtime.handle().clone();
    let file = ram(&case.image);
    let image = runtime.block_on(async move {
        let chain = open(&handle, &file, &[], true).await;
        chain.write(0, Buf::from_bytes(&[7; 20_000])).await.unwrap();
        chain.close().await.unwrap();
        bytes(&file)
    });
    let table = word(&image, word(&image, 40)) & 0x00ff_ffff_ffff_fe00;
    (image, table)
}

/// Lets requests meet what is wrong with an image: the ones that do fail with EIO, so do all writes from then on, reads of
/// other bytes go on, and the image is marked.
fn meets(image: &[u8], request: &Step) {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    let (file, request) = (ram(image), request.clone());
    runtime.block_on(async move {
        let chain = open(&handle, &file, &[], true).await;
        let error = run(&chain, &request).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EIO, "{error}");
        assert!(error.to_string().contains("corrupt"), "{error}");
        for later in [Step::Write(12288, 10, 1), Step::Zero(0, 4096), Step::Discard(0, 1 << 20)] {
            let error = run(&chain, &later).await.unwrap_err();
            assert_eq!(error.errno(), Errno::EIO, "{later:?}: {error}");
        }
        let buf = Buf::zeroed(3000);
        chain.read(13_000, buf.clone()).await.unwrap();
        assert_eq!(buf.to_vec(), [7; 3000]);
        chain.close().await.unwrap();
        drop(chain);
        assert!(Header::read(&file).await.unwrap().is_corrupt());
        let header = Header::read(&file).await.unwrap();
        let settings = Settings { writable: true, ..Settings::default() };
        assert!(Qcow2::open(&handle, header, file.clone(), None, settings).await.is_err());
        // Who only reads may.
        let chain = open(&handle, &file, &[], false).await;
        chain.read(13_000, buf.clone()).await.unwrap();
        assert_eq!(chain.write(13_000, buf).await.unwrap_err().errno(), Errno::EROFS);
    });
}

fn set(image: &mut [u8], at: u64, word: u64) {
    image[at as usize..at as usize + 8].copy_from_slice(&word.to_be_bytes());
}

#[test]
fn a_table_that_is_counted_as_free_is_not_written_over() {
    let (mut image, table) = with_data();
    let block = word(&image, word(&image, 48));
    // Counts of 16 bits.
    let count_at = block + table / 4096 * 2;
    image[count_at as usize..count_at as usize + 2].fill(0);
    meets(&image, &Step::Write(1 << 19, 10, 9));
}

#[test]
fn data_that_should_be_where_tables_are_is_not_written() {
    for at in [0, 40, 48] {
        let (mut image, table) = with_data();
        let target = if at == 0 { table } else { word(&image, at) };
        set(&mut image, table, target | 1 << 63);
        meets(&image, &Step::Write(100, 10, 9));
    }
}

#[test]
fn entries_that_make_no_sense_are_not_followed() {
    for word in [1 << 63 | 0x5200, 0x1234_5600] {
        let (mut image, table) = with_data();
        set(&mut image, table + 8, word);
        meets(&image, &Step::Write(4096, 10, 9));
    }
    // The second half of the disk has its L2 table far behind the end of the file, or within a cluster.
    for bad in [1 << 63 | 1 << 50, 0x200] {
        let case = make("cluster_size=4096", 4 << 20, false, false);
        let runtime = runtime();
        let handle = runtime.handle().clone();
        let mut image = case.image.clone();
        let l1 = word(&image, 40);
        set(&mut image, l1 + 8, bad);
        let file = ram(&image);
        runtime.block_on(async move {
            let chain = open(&handle, &file, &[], true).await;
            let buf = Buf::zeroed(10);
            assert_eq!(chain.read(3 << 20, buf.clone()).await.unwrap_err().errno(), Errno::EIO);
            chain.read(1000, buf).await.unwrap();
            assert!(Header::read(&file).await.unwrap().is_corrupt());
        });
    }
}

#[test]
fn requests_for_the_same_clusters_never_wait_for_each_other() {
    let case = make("cluster_size=16384,extended_l2=on", 4 << 20, false, false);
    let runtime = runtime();
    let handle = runtime.handle().clone();
    let file = ram(&case.image);
    runtime.block_on(async move {
        let chain = open(&handle, &file, &[], true).await;
        let mut random = Random(11);
        for round in 0..60_u64 {
            let mut requests: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
            for number in 0..12_u64 {
                let span = random.span(4 << 20, 3 << 20);
                let byte = (round * 12 + number) as u8;
                match random.below(6) {
                    0 => requests.push(Box::pin(chain.discard(span))),
                    1 => requests
                        .push(Box::pin(chain.zero(span, Zeroing { unmap: number % 2 == 0, fast: false }))),
                    2 => requests.push(Box::pin(chain.flush())),
                    _ => {
                        let buf = Buf::from_bytes(&vec![byte; span.len() as usize]);
                        requests.push(Box::pin(chain.write(span.at(), buf)));
                    }
                }
            }
            for result in join_all(requests).await {
                result.unwrap();
            }
        }
        chain.close().await.unwrap();
        let report = check(&file, Repair::No).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
    });
}
