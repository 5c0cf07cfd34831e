//! Images of each format, ours and QEMU's, against plain bytes and QEMU's programs.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use block::Pool;
use image::qcow::{self, Qcow};
use image::qcow2::{self, Qcow2};
use image::vhd::{self, Vhd};
use image::{Backing, Chain, Format, Image, Raw, Repair, Settings, conformance};
use runtime::{Handle, RingFlags, Runtime, Uring};
use storage::conformance::Random;
use storage::file::{File, Options, open};
use storage::{Ram, Storage};

/// Steps for each image.
const STEPS: usize = 120;

/// Who makes an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Maker {
    Tapdisk,
    Qemu,
}

/// One kind of image: what `qemu-img` is told, which we make likewise.
#[derive(Clone, Debug)]
struct Kind {
    format: Format,
    size: u64,
    /// Bytes of the raw image below.
    below: u64,
    options: Vec<(&'static str, String)>,
}

fn run<T: 'static, F: Future<Output = T> + 'static>(work: impl FnOnce(Handle) -> F) -> T {
    let pool = Pool::new(1 << 20);
    let uring = Uring::open(RingFlags::Auto, &pool).unwrap();
    let runtime = Runtime::new(Box::new(uring), pool);
    runtime.block_on(work(runtime.handle().clone()))
}

fn qemu_img(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").current_dir(folder).args(arguments).output().unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "qemu-img {arguments:?}: {said}");
    said
}

fn file(handle: &Handle, path: &Path, create: Option<u64>) -> Rc<dyn Storage> {
    let options = Options { create, ..Options::default() };
    Rc::new(File::new(handle, open(path, &options).unwrap()))
}

impl Kind {
    fn qemus_name(&self) -> &'static str {
        match self.format {
            Format::Vhd => "vpc",
            Format::Raw | Format::Qcow | Format::Qcow2 => self.format.name(),
        }
    }

    fn option(&self, name: &str) -> Option<&str> {
        self.options.iter().find(|(key, _)| *key == name).map(|(_, value)| value.as_str())
    }

    fn number<T: std::str::FromStr>(&self, name: &str, default: T) -> T {
        self.option(name).and_then(|value| value.parse().ok()).unwrap_or(default)
    }

    fn has_data_file(&self) -> bool {
        self.option("data_file").is_some()
    }

    fn is(&self, name: &str) -> bool {
        self.option(name) == Some("on")
    }

    /// Makes it in this folder, as `image`.
    async fn make(&self, maker: Maker, handle: &Handle, folder: &Path) {
        if self.below > 0 {
            let mut bytes = vec![0; self.below as usize];
            let mut random = Random(self.below);
            bytes.fill_with(|| random.draw() as u8);
            std::fs::write(folder.join("below"), bytes).unwrap();
        }
        match maker {
            Maker::Qemu => {
                let size = self.size.to_string();
                let list: Vec<String> =
                    self.options.iter().map(|(name, value)| format!("{name}={value}")).collect();
                let list = list.join(",");
                let mut arguments = vec!["create", "-q", "-f", self.qemus_name()];
                if !list.is_empty() {
                    arguments.extend(["-o", &list]);
                }
                if self.below > 0 {
                    arguments.extend(["-b", "below", "-F", "raw"]);
                }
                arguments.extend(["image", &size]);
                qemu_img(folder, &arguments);
            }
            Maker::Tapdisk => self.make_ours(handle, folder).await,
        }
    }

    async fn make_ours(&self, handle: &Handle, folder: &Path) {
        let image = file(handle, &folder.join("image"), Some(self.size));
        image.resize(0).await.unwrap();
        let name = || (self.below > 0).then(|| "below".to_owned());
        match self.format {
            Format::Raw => image.resize(self.size).await.unwrap(),
            Format::Qcow => {
                let cluster_size = self.option("cluster_size").and_then(|value| value.parse().ok());
                let options = qcow::Create { size: self.size, backing: name(), cluster_size };
                qcow::create(&image, &options).await.unwrap();
            }
            Format::Qcow2 => {
                let backing =
                    |name| Backing { name, format: Some(Format::Raw), others: Vec::new(), unique_id: None };
                let data = self.has_data_file().then(|| qcow2::DataFile {
                    name: "data".into(),
                    storage: file(handle, &folder.join("data"), Some(self.size)),
                    raw: self.is("data_file_raw"),
                });
                let options = qcow2::Create {
                    size: self.size,
                    cluster_size: self.number("cluster_size", 65536),
                    version: if self.option("compat") == Some("0.10") { 2 } else { 3 },
                    refcount_bits: self.number("refcount_bits", 16),
                    extended_l2: self.is("extended_l2"),
                    lazy_refcounts: self.is("lazy_refcounts"),
                    backing: name().map(backing),
                    data_file: data,
                    preallocation: match self.option("preallocation") {
                        Some("metadata") => qcow2::Preallocation::Metadata,
                        _ => qcow2::Preallocation::Off,
                    },
                    ..qcow2::Create::default()
                };
                qcow2::create(&image, &options).await.unwrap();
            }
            Format::Vhd => {
                let is_fixed = self.option("subformat") == Some("fixed");
                let options = vhd::Create {
                    size: self.size,
                    subformat: match (is_fixed, self.below) {
                        (true, _) => vhd::Subformat::Fixed,
                        (false, 0) => vhd::Subformat::Dynamic,
                        (false, 1..) => vhd::Subformat::Differencing,
                    },
                    parent: name().map(|name| vhd::Parent {
                        name,
                        unique_id: None,
                        changed: std::time::SystemTime::now(),
                    }),
                    ..vhd::Create::default()
                };
                vhd::create(&image, &options).await.unwrap();
            }
        }
        image.flush().await.unwrap();
    }

    async fn open(&self, handle: &Handle, folder: &Path) -> Chain {
        // Whoever had it open before lets go of it.
        handle.turn().await;
        let image = file(handle, &folder.join("image"), None);
        let settings = Settings { writable: true, cache: 16 << 10, ..Settings::default() };
        let top: Rc<dyn Image> = match self.format {
            Format::Raw => Rc::new(Raw::new(image)),
            Format::Qcow => {
                let header = qcow::Header::read(&image).await.unwrap();
                Rc::new(Qcow::open(handle, header, image, settings).await.unwrap())
            }
            Format::Qcow2 => {
                let header = qcow2::Header::read(&image).await.unwrap();
                let data = self.has_data_file().then(|| file(handle, &folder.join("data"), None));
                Rc::new(Qcow2::open(handle, header, image, data, settings).await.unwrap())
            }
            Format::Vhd => {
                let header = vhd::Header::read(&image).await.unwrap();
                Rc::new(Vhd::open(handle, header, image, settings).await.unwrap())
            }
        };
        let mut below: Vec<Rc<dyn Image>> = Vec::new();
        if self.below > 0 {
            below.push(Rc::new(Raw::new(file(handle, &folder.join("below"), None))));
        }
        Chain::over(handle, top, below)
    }

    async fn check(&self, handle: &Handle, folder: &Path) {
        handle.turn().await;
        let image = file(handle, &folder.join("image"), None);
        let report = match self.format {
            Format::Raw => return,
            Format::Qcow => qcow::check(&image, Repair::No).await.unwrap(),
            Format::Qcow2 => qcow2::check(&image, Repair::No).await.unwrap(),
            Format::Vhd => vhd::check(&image, Repair::No).await.unwrap(),
        };
        assert!(report.is_clean(), "{self:?}: {report:?}");
    }
}

/// Puts the questions to an image of this kind, then lets QEMU look at it.
fn question(kind: Kind, maker: Maker, seed: u64) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let below = kind.below;
    let (last, model) = run(async move |handle| {
        kind.make(maker, &handle, &path).await;
        let size = kind.open(&handle, &path).await.size();
        let mut bytes = std::fs::read(path.join("below")).unwrap_or_default();
        bytes.resize(size as usize, 0);
        println!("{kind:?} by {maker:?}, {size} bytes");
        let open = async || kind.open(&handle, &path).await;
        let model = conformance::check(open, bytes, seed, STEPS).await;
        kind.check(&handle, &path).await;
        (kind, model)
    });
    let path = folder.path();
    std::fs::write(path.join("model"), &model).unwrap();
    let name = last.qemus_name();
    match last.format {
        Format::Qcow2 => assert!(qemu_img(path, &["check", "-f", name, "image"]).contains("No errors")),
        // QEMU has no check for the others.
        Format::Raw | Format::Qcow | Format::Vhd => {}
    }
    // QEMU cannot read a differencing VHD.
    if last.format != Format::Vhd || below == 0 {
        let format = if name == "vpc" { "vpc,force_size_calc=current_size" } else { name };
        let image = format!("driver={format},file.filename=image");
        qemu_img(path, &["compare", "--image-opts", "driver=raw,file.filename=model", &image]);
    }
}

fn both(kinds: Vec<Kind>) {
    for (seed, kind) in (0..).zip(kinds) {
        let qemu_can = kind.format != Format::Vhd || kind.below == 0;
        question(kind.clone(), Maker::Tapdisk, seed);
        if qemu_can {
            question(kind, Maker::Qemu, seed + 1000);
        }
    }
}

fn kind(format: Format, size: u64, below: u64, options: &[(&'static str, &str)]) -> Kind {
    let options = options.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    Kind { format, size, below, options }
}

#[test]
fn a_raw_image_does() {
    both(vec![kind(Format::Raw, 3_000_320, 0, &[])]);
}

#[test]
fn qcow_does() {
    both(vec![
        kind(Format::Qcow, 3_000_320, 0, &[]),
        kind(Format::Qcow, 1_000_448, 999_936, &[]),
        kind(Format::Qcow, 1_000_448, 2_000_384, &[]),
    ]);
}

#[test]
fn a_vhd_does() {
    both(vec![
        kind(Format::Vhd, 9_000_448, 0, &[("subformat", "dynamic"), ("force_size", "on")]),
        kind(Format::Vhd, 3_000_320, 0, &[("subformat", "fixed"), ("force_size", "on")]),
        kind(Format::Vhd, 9_000_448, 5_000_192, &[("force_size", "on")]),
    ]);
}

#[test]
fn qcow2_does_with_clusters_of_all_sizes() {
    let sizes = ["512", "4096", "65536", "2097152"];
    both(sizes.map(|cluster| kind(Format::Qcow2, 5_000_192, 0, &[("cluster_size", cluster)])).into());
    both(sizes.map(|cluster| kind(Format::Qcow2, 5_000_192, 3_000_320, &[("cluster_size", cluster)])).into());
}

#[test]
fn qcow2_does_with_counts_of_all_widths() {
    let widths = ["1", "2", "4", "8", "32", "64"];
    let of = |bits| {
        kind(Format::Qcow2, 2_000_384, 1_000_448, &[("refcount_bits", bits), ("cluster_size", "1024")])
    };
    both(widths.map(of).into());
}

#[test]
fn qcow2_does_with_all_else() {
    let small = ("cluster_size", "4096");
    both(vec![
        kind(Format::Qcow2, 3_000_320, 0, &[small, ("compat", "0.10")]),
        kind(Format::Qcow2, 3_000_320, 2_000_384, &[small, ("compat", "0.10")]),
        kind(Format::Qcow2, 3_000_320, 0, &[small, ("lazy_refcounts", "on")]),
        kind(Format::Qcow2, 3_000_320, 0, &[small, ("preallocation", "metadata")]),
        kind(Format::Qcow2, 3_000_320, 0, &[("extended_l2", "on"), ("cluster_size", "16384")]),
        kind(Format::Qcow2, 3_000_320, 2_000_384, &[("extended_l2", "on"), ("cluster_size", "65536")]),
        kind(Format::Qcow2, 3_000_320, 0, &[small, ("data_file", "data")]),
        kind(Format::Qcow2, 3_000_320, 2_000_384, &[small, ("data_file", "data")]),
        kind(Format::Qcow2, 3_000_320, 0, &[small, ("data_file", "data"), ("data_file_raw", "on")]),
    ]);
}

/// The questions themselves: an image that forgets is found out.
#[test]
#[should_panic(expected = "and should be")]
fn who_forgets_is_found_out() {
    let handle = run(async |handle| handle);
    let open = async || Chain::new(&handle, Rc::new(Raw::new(Rc::new(Ram::new(100_000)))));
    let mut check = std::pin::pin!(conformance::check(open, vec![0; 100_000], 1, 200));
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(check.as_mut().poll(&mut cx).is_ready(), "memory never waits");
}
