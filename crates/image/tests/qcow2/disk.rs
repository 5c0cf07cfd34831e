//! Open images against a model of bytes and against QEMU: random requests, side by side and over reopenings, for the product
//! of what images can be.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use block::{Buf, Result, Span};
use image::qcow2::{Header, Qcow2};
use image::{Chain, Image, Raw, Settings};
use runtime::{BoxFuture, Handle, RingFlags, Runtime, Uring, join_all};
use storage::conformance::Random;
use storage::file::{Cache, Options, open};
use storage::{File, Storage, Zeroing};

use crate::tools::{check, is_long, qemu_img, qemu_img_says, scratch};

/// A way to make an image; words as `qemu-img create -o` knows them.
#[derive(Clone, Debug)]
struct Make {
    options: String,
    cluster: u64,
    size: u64,
    /// Bytes of the raw image below, if there is one.
    below: Option<u64>,
    /// What is in it at first: made by `qemu-img convert -c`.
    compressed: bool,
    snapshot: bool,
    data_file: bool,
}

impl Make {
    fn new(cluster: u64, size: u64) -> Make {
        let options = format!("cluster_size={cluster}");
        Make { options, cluster, size, below: None, compressed: false, snapshot: false, data_file: false }
    }

    fn with(&self, option: &str) -> Make {
        Make { options: format!("{},{option}", self.options), ..self.clone() }
    }
}

pub(crate) fn runtime() -> Runtime {
    let pool = block::Pool::new(64 << 20);
    let uring = Uring::open(RingFlags::Auto, &pool).unwrap();
    Runtime::new(Box::new(uring), pool)
}

/// Bytes that compress well and differ everywhere.
fn text(len: u64, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = Vec::with_capacity(len as usize);
    while (bytes.len() as u64) < len {
        let run = 1 + random.below(3000) as usize;
        let byte = if random.below(4) == 0 { 0 } else { random.draw() as u8 };
        bytes.extend((0..run).map(|at| if at % 64 == 0 { at as u8 } else { byte }));
    }
    bytes.truncate(len as usize);
    bytes
}

fn file(handle: &Handle, path: &Path, read_only: bool) -> Rc<dyn Storage> {
    let options = Options { read_only, cache: Cache::Buffered, ..Options::default() };
    Rc::new(File::new(handle, open(path, &options).unwrap()))
}

/// An image in a folder of its own, and what its disk should hold.
struct Subject {
    make: Make,
    dir: tempfile::TempDir,
    model: Vec<u8>,
    /// What the snapshot should hold.
    kept: Option<Vec<u8>>,
}

impl Subject {
    fn new(make: Make) -> Subject {
        let dir = scratch();
        let mut model = vec![0; make.size as usize];
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let (image, below, source) = (path("image"), path("below"), path("source"));
        let mut create = vec!["create", "-q", "-f", "qcow2"];
        let (size, data_file) =
            (make.size.to_string(), format!("{},data_file={}", make.options, path("data")));
        create.extend(["-o", if make.data_file { &data_file } else { &make.options }]);
        if let Some(len) = make.below {
            let bytes = text(len, 5);
            std::fs::write(&below, &bytes).unwrap();
            let len = len.min(make.size) as usize;
            model[..len].copy_from_slice(&bytes[..len]);
            create.extend(["-b", &below, "-F", "raw"]);
        }
        create.extend([&image[..], &size]);
        if make.compressed {
            // Some clusters are there, some are zero, some are only below.
            let bytes = text(make.size, 6);
            for (at, piece) in
                bytes.chunks(3 * make.cluster as usize).enumerate().filter(|(at, _)| at % 2 == 0)
            {
                let at = at * 3 * make.cluster as usize;
                model[at..at + piece.len()].copy_from_slice(piece);
            }
            std::fs::write(&source, &model).unwrap();
            let mut convert = vec!["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", &make.options];
            if make.below.is_some() {
                convert.extend(["-B", &below, "-F", "raw"]);
            }
            convert.extend([&source[..], &image]);
            qemu_img(&convert);
        } else {
            qemu_img(&create);
        }
        let subject = Subject { make, dir, model, kept: None };
        subject.judge();
        subject
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self) -> String {
        self.path("image").to_str().unwrap().to_owned()
    }

    fn snapshot(&mut self, name: &str) {
        qemu_img(&["snapshot", "-c", name, &self.image()]);
        self.kept = Some(self.model.clone());
    }

    /// What QEMU says of it: whole, without a leak, with the bytes of the model.
    fn judge(&self) {
        let report = check(&self.path("image"));
        assert_eq!(report["code"], 0, "{:?}: {report:?}", self.make);
        let model = self.path("model");
        std::fs::write(&model, &self.model).unwrap();
        let model = model.to_str().unwrap();
        let (code, out, error) =
            qemu_img_says(&["compare", "-f", "qcow2", "-F", "raw", &self.image(), model]);
        assert_eq!(code, 0, "{:?}: {out}{error}", self.make);
        if let Some(kept) = &self.kept {
            let raw = self.path("kept");
            let arguments = ["convert", "-l", "one", "-O", "raw", &self.image(), raw.to_str().unwrap()];
            qemu_img(&arguments);
            assert!(std::fs::read(&raw).unwrap() == *kept, "{:?}: the snapshot has changed", self.make);
        }
        if self.make.options.contains("data_file_raw=on") {
            let data = std::fs::read(self.path("data")).unwrap();
            // One may be longer than the other by zeroes: QEMU makes whole clusters of it.
            let both = data.len().min(self.model.len());
            assert!(data[..both] == self.model[..both], "{:?}: the data file differs", self.make);
            assert!(data[both..].iter().chain(&self.model[both..]).all(|byte| *byte == 0));
        }
    }

    async fn open(make: &Make, dir: &Path, handle: &Handle, writable: bool) -> Chain {
        let storage = file(handle, &dir.join("image"), !writable);
        let header = Header::read(&storage).await.unwrap();
        let data = make.data_file.then(|| file(handle, &dir.join("data"), !writable));
        let settings = Settings { writable, ..Settings::default() };
        let top = Qcow2::open(handle, header, storage, data, settings).await.unwrap();
        let below: Vec<Rc<dyn Image>> = match make.below {
            Some(_) => vec![Rc::new(Raw::new(file(handle, &dir.join("below"), true)))],
            None => Vec::new(),
        };
        Chain::over(handle, Rc::new(top), below)
    }

    /// Some rounds of random requests on an open image, which is closed and judged afterwards.
    fn exercise(&mut self, seed: u64, rounds: u64) {
        let runtime = runtime();
        let (handle, make, dir) = (runtime.handle().clone(), self.make.clone(), self.dir.path().to_owned());
        let mut model = std::mem::take(&mut self.model);
        self.model = runtime.block_on(async move {
            let chain = Subject::open(&make, &dir, &handle, true).await;
            let mut random = Random(seed);
            for round in 0..rounds {
                some_requests(&chain, &make, &mut random, &mut model, round).await;
            }
            chain.close().await.unwrap();
            model
        });
        drop(runtime);
        self.judge();
    }
}

/// Requests for spans that do not overlap, all at once; then what they have changed is looked at.
async fn some_requests(chain: &Chain, make: &Make, random: &mut Random, model: &mut [u8], round: u64) {
    let longest =
        [make.cluster / 4, make.cluster * 3, (make.size / 8).min(3 << 20)][random.below(3) as usize].max(1);
    let mut spans: Vec<Span> = Vec::new();
    for _ in 0..1 + random.below(6) {
        let span = random.span(make.size, longest);
        if !spans.iter().any(|other| other.overlaps(span)) {
            spans.push(span);
        }
    }
    let mut requests: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
    let mut discarded = Vec::new();
    for (number, span) in spans.iter().enumerate() {
        let range = span.at() as usize..span.end() as usize;
        match random.below(8) {
            0 | 1 => {
                let how = Zeroing { unmap: random.below(2) == 0, fast: false };
                model[range].fill(0);
                requests.push(Box::pin(async move { chain.zero(*span, how).await }));
            }
            2 => {
                discarded.push(*span);
                requests.push(Box::pin(async move { chain.discard(*span).await }));
            }
            3 => requests.push(Box::pin(chain.flush())),
            _ => {
                let bytes: Vec<u8> =
                    (0..range.len()).map(|at| (at as u64 * 7 + round * 31 + number as u64) as u8).collect();
                model[range].copy_from_slice(&bytes);
                requests.push(Box::pin(chain.write(span.at(), Buf::from_bytes(&bytes))));
            }
        }
    }
    for result in join_all(requests).await {
        result.unwrap();
    }
    for span in discarded {
        // What it shows is settled by a look: each byte is what it was, or zero.
        let now = read(chain, span).await;
        let old = &mut model[span.at() as usize..span.end() as usize];
        assert!(old.iter().zip(&now).all(|(old, now)| *now == 0 || now == old), "{make:?}: {span:?}");
        old.copy_from_slice(&now);
    }
    for span in
        spans.iter().map(|span| span.align_out(1 << 16).split_at(make.size).0).filter(|span| !span.is_empty())
    {
        let (found, expected) = (read(chain, span).await, &model[span.at() as usize..span.end() as usize]);
        let first = found.iter().zip(expected).position(|(one, other)| one != other);
        assert_eq!(first, None, "{make:?}: round {round}, {spans:?}, first bad byte of {span:?}");
    }
}

async fn read(chain: &Chain, span: Span) -> Vec<u8> {
    let buf = Buf::zeroed(span.len() as usize);
    buf.fill(0xa5);
    chain.read(span.at(), buf.clone()).await.unwrap();
    buf.to_vec()
}

/// What is tried of each: empty, below something, compressed, with a snapshot.
fn exercise_all(make: Make) {
    let (size, cluster) = (make.size, make.cluster);
    // The image below ends within a cluster of the upper one.
    let below = Some(size / 2 + cluster / 2 + 77);
    let all = [
        Make { ..make.clone() },
        Make { below, ..make.clone() },
        Make { compressed: true, ..make.clone() },
        Make { compressed: true, below, snapshot: true, ..make.clone() },
        Make { snapshot: true, ..make },
    ];
    for (seed, make) in (1..).zip(all) {
        // Narrow counts cannot count snapshots, or the compressed clusters that share a place.
        let is_narrow = |bits: u32| make.options.ends_with(&format!("refcount_bits={bits}"));
        if is_narrow(1) && (make.snapshot || make.compressed)
            || (is_narrow(2) || is_narrow(4)) && make.snapshot && make.compressed
        {
            continue;
        }
        let mut subject = Subject::new(make.clone());
        let rounds = if is_long() { 24 } else { 10 };
        subject.exercise(seed, rounds);
        if make.snapshot {
            subject.snapshot("one");
        }
        subject.exercise(seed + 100, rounds);
        if make.snapshot {
            qemu_img(&["snapshot", "-d", "one", &subject.image()]);
            subject.kept = None;
            subject.exercise(seed + 200, rounds / 2);
        }
    }
}

#[test]
fn clusters_of_64_kib_hold_what_is_written() {
    exercise_all(Make::new(65536, (5 << 20) + 1536));
    exercise_all(Make::new(65536, 2 << 20).with("compat=0.10"));
}

#[test]
fn clusters_of_512_bytes_hold_what_is_written() {
    // The refcount table grows some times: its first cluster tells of 8 MiB of the file.
    exercise_all(Make::new(512, (9 << 20) + 512));
}

#[test]
fn clusters_of_4_kib_hold_what_is_written() {
    exercise_all(Make::new(4096, (4 << 20) + 100 * 512).with("compat=0.10"));
    exercise_all(Make::new(4096, (4 << 20) + 100 * 512));
}

#[test]
fn clusters_of_2_mib_hold_what_is_written() {
    exercise_all(Make::new(2 << 20, (9 << 20) + 512));
}

#[test]
fn counts_of_all_widths_count() {
    for bits in [1, 2, 4, 8, 32, 64] {
        exercise_all(Make::new(1024, (1 << 20) + 512).with(&format!("refcount_bits={bits}")));
    }
}

#[test]
fn subclusters_hold_what_is_written() {
    exercise_all(Make::new(16384, (3 << 20) + 512).with("extended_l2=on"));
    exercise_all(Make::new(128 << 10, (5 << 20) + 1024).with("extended_l2=on"));
}

#[test]
fn clusters_compressed_with_zstandard_are_read_and_overwritten() {
    exercise_all(Make::new(65536, (3 << 20) + 1536).with("compression_type=zstd"));
    exercise_all(Make::new(32768, 2 << 20).with("compression_type=zstd,extended_l2=on"));
}

#[test]
fn lazy_counts_are_kept_all_the_same() {
    exercise_all(Make::new(65536, 4 << 20).with("lazy_refcounts=on"));
}

#[test]
fn preallocated_clusters_are_filled() {
    for how in ["metadata", "falloc", "full"] {
        for options in [format!("preallocation={how}"), format!("preallocation={how},extended_l2=on")] {
            let mut subject = Subject::new(Make::new(65536, (3 << 20) + 512).with(&options));
            subject.exercise(1, 12);
            subject.exercise(2, 12);
        }
    }
}

#[test]
fn a_data_file_holds_each_byte_at_its_place() {
    for options in ["", "data_file_raw=on,", "extended_l2=on,", "data_file_raw=on,extended_l2=on,"] {
        let mut make = Make { data_file: true, ..Make::new(65536, (5 << 20) + 1536) };
        make.options = format!("{options}{}", make.options);
        let all = if options.contains("raw") { vec![None] } else { vec![None, Some(3_000_000)] };
        for below in all {
            let mut subject = Subject::new(Make { below, ..make.clone() });
            subject.exercise(1, 12);
            subject.exercise(2, 12);
        }
    }
}
