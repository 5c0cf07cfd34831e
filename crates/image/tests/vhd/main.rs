//! VHD images against QEMU's programs, against the specification, and against a model.

mod blktap;
mod damage;
mod model;
mod power;
mod qemu;
mod size;

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use block::{Buf, Errno, Error, Limits, Pool, Result as IoResult, Run, Span};
use image::vhd::{self, Create, Header, Parent, Preallocation, Subformat, Vhd};
use image::{Chain, Image, ImageError, Raw, Repair, Settings};
use runtime::{Handle, RingFlags, Runtime, Uring};
use storage::file::{File, Options, open};
use storage::{Io, Ram, Storage, Zeroing};

const MIB: u64 = 1 << 20;

fn run<T: 'static, F: Future<Output = T> + 'static>(test: impl FnOnce(Handle) -> F) -> T {
    let pool = Pool::new(1 << 22);
    let uring = Uring::open(RingFlags::Auto, &pool).unwrap();
    let runtime = Runtime::new(Box::new(uring), pool);
    runtime.block_on(test(runtime.handle().clone()))
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Runs one of QEMU's programs, which must succeed; gives what it printed.
fn qemu(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Bytes of the disk, as QEMU sees it.
fn size_by_qemu(path: &Path) -> u64 {
    let info = qemu("qemu-img", &["info", "-f", "vpc", "--output=json", text(path)]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    info["virtual-size"].as_u64().unwrap()
}

/// The disk's bytes, as QEMU sees them.
fn bytes_by_qemu(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("by-qemu");
    qemu("qemu-img", &["convert", "-f", "vpc", "-O", "raw", text(path), text(&raw)]);
    std::fs::read(raw).unwrap()
}

fn file(handle: &Handle, path: &Path) -> Rc<dyn Storage> {
    let options = Options { create: Some(0), wait: Duration::from_secs(1), ..Options::default() };
    if !path.exists() {
        std::fs::write(path, b"").unwrap();
    }
    let opened = open(path, &options);
    // An empty file is none that can be served.
    let opened = opened.or_else(|_| {
        std::fs::write(path, [0]).unwrap();
        open(path, &options)
    });
    Rc::new(File::new(handle, opened.unwrap()))
}

fn make(path: &Path, create: Create) -> Result<(), ImageError> {
    let path = path.to_owned();
    run(async move |handle| vhd::create(&file(&handle, &path), &create).await)
}

async fn open_image(handle: &Handle, storage: Rc<dyn Storage>, writable: bool) -> Result<Vhd, ImageError> {
    let header = Header::read(&storage).await?;
    Vhd::open(handle, header, storage, Settings { writable, ..Settings::default() }).await
}

/// The disk of an image without one below it.
async fn disk(handle: &Handle, path: &Path, writable: bool) -> Chain {
    let image = open_image(handle, file(handle, path), writable).await.unwrap();
    Chain::new(handle, Rc::new(image))
}

async fn all_of(disk: &Chain) -> Vec<u8> {
    let buf = Buf::zeroed(disk.size() as usize);
    buf.fill(0xa5);
    disk.read(0, buf.clone()).await.unwrap();
    buf.to_vec()
}

/// Splitmix64, seeded.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

/// Changes a disk and its model at random.
async fn change(disk: &Chain, model: &mut [u8], random: &mut Random, operations: usize) {
    let size = model.len() as u64;
    for _ in 0..operations {
        let longest = [512, 4096, 70_000, 300_000][random.below(4) as usize];
        let mut at = random.below(size);
        let mut len = (1 + random.below(longest)).min(size - at);
        if random.below(3) > 0 {
            at = at / 512 * 512;
            len = len.next_multiple_of(512).min(size - at);
        }
        let span = Span::new(at, len).unwrap();
        let range = at as usize..(at + len) as usize;
        match random.below(8) {
            0..=3 => {
                let byte = random.next() as u8;
                let bytes: Vec<u8> = (0..len).map(|number| byte.wrapping_add(number as u8)).collect();
                disk.write(at, Buf::from_bytes(&bytes)).await.unwrap();
                model[range].copy_from_slice(&bytes);
            }
            4 => {
                let how = Zeroing { unmap: random.below(2) == 0, fast: false };
                disk.zero(span, how).await.unwrap();
                model[range].fill(0);
            }
            5 => disk.flush().await.unwrap(),
            _ => {
                let buf = Buf::zeroed(len as usize);
                disk.read(at, buf.clone()).await.unwrap();
                assert!(buf.to_vec() == model[range], "what was read at {span:?}");
            }
        }
    }
}

/// What Microsoft's specification and blktap's `vhd-util check` ask of a file.
fn judge(bytes: &[u8]) {
    let number = |at: usize, len: usize| {
        bytes[at..at + len].iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let sum = |from: usize, len: usize, skip: usize| {
        let own: u32 = bytes[from + skip..from + skip + 4].iter().map(|byte| u32::from(*byte)).sum();
        !(bytes[from..from + len].iter().map(|byte| u32::from(*byte)).sum::<u32>() - own)
    };
    let last = bytes.len() - 512;
    assert_eq!(bytes.len() % 512, 0);
    assert_eq!(&bytes[last..last + 8], b"conectix");
    assert_eq!(number(last + 64, 4), u64::from(sum(last, 512, 64)), "checksum of the footer");
    assert_eq!(number(last + 8, 4), 2, "features");
    let (kind, size) = (number(last + 60, 4), number(last + 48, 8));
    if kind == 2 {
        assert_eq!(number(last + 16, 8), u64::MAX);
        assert_eq!(size as usize, last);
        return;
    }
    assert_eq!(bytes[..512], bytes[last..], "the copy of the footer");
    let second = number(last + 16, 8) as usize;
    assert_eq!(&bytes[second..second + 8], b"cxsparse");
    assert_eq!(number(second + 36, 4), u64::from(sum(second, 1024, 36)), "checksum of the second header");
    assert_eq!(number(second + 8, 8), u64::MAX);
    let (table, entries, block) =
        (number(second + 16, 8) as usize, number(second + 28, 4) as usize, number(second + 32, 4) as usize);
    let blocks = (size as usize).div_ceil(block);
    assert!(entries >= blocks && block.is_power_of_two() && table.is_multiple_of(512));
    let bitmap = (block / 512).div_ceil(8).next_multiple_of(512);
    let batmap = table + (entries * 4).next_multiple_of(512);
    let mut metadata = vec![(0, 512), (second, second + 1024), (table, batmap)];
    let mut marked: &[u8] = &[];
    if &bytes[last + 28..last + 31] == b"tap" {
        assert_eq!(&bytes[batmap..batmap + 8], b"tdbatmap");
        let (map, sectors) = (number(batmap + 8, 8) as usize, number(batmap + 16, 4) as usize);
        assert!(sectors * 512 * 8 >= entries && map >= batmap + 512);
        // blktap counts blocks of 2 MiB here, whatever those of the image are.
        let counted = ((size >> 24) as usize).div_ceil(512).max(1) * 512;
        let found = !bytes[map..map + counted].iter().map(|byte| u32::from(*byte)).sum::<u32>();
        assert_eq!(number(batmap + 24, 4), u64::from(found), "checksum of the batmap");
        metadata.extend([(batmap, batmap + 512), (map, map + sectors * 512)]);
        marked = &bytes[map..map + sectors * 512];
    }
    for locator in 0..8 {
        let at = second + 576 + locator * 24;
        if kind != 4 {
            assert!(bytes[at..at + 24].iter().all(|byte| *byte == 0), "locators are for differencing images");
        } else if number(at, 4) != 0 {
            let (room, len, place) = (number(at + 4, 4), number(at + 8, 4), number(at + 16, 8));
            assert!(len <= room && room.is_multiple_of(512) && place.is_multiple_of(512));
            metadata.push((place as usize, (place + room) as usize));
        }
    }
    metadata.sort_unstable();
    let headers = metadata.last().unwrap().1;
    for pair in metadata.windows(2) {
        assert!(pair[0].1 <= pair[1].0, "metadata over metadata: {pair:?}");
    }
    let mut places: Vec<usize> = Vec::new();
    for number_of in 0..entries {
        let entry = number(table + number_of * 4, 4) as usize;
        let is_marked = marked.get(number_of / 8).is_some_and(|byte| byte & (0x80 >> (number_of % 8)) != 0);
        if entry == 0xffff_ffff {
            assert!(!is_marked, "block {number_of} is marked as full and is not there");
            continue;
        }
        assert!(entry * 512 >= headers, "block {number_of} is over headers");
        assert!(entry * 512 + bitmap + block <= last, "block {number_of} is over the footer");
        if is_marked {
            assert!(bytes[entry * 512..][..block / 4096].iter().all(|byte| *byte == 0xff));
        }
        places.push(entry * 512);
    }
    places.sort_unstable();
    assert!(places.windows(2).all(|pair| pair[0] + bitmap + block <= pair[1]), "blocks over blocks");
}

/// Seals the footer at this byte.
fn seal(bytes: &mut [u8], at: usize) {
    bytes[at + 64..at + 68].fill(0);
    let sum = !bytes[at..at + 512].iter().map(|byte| u32::from(*byte)).sum::<u32>();
    bytes[at + 64..at + 68].copy_from_slice(&sum.to_be_bytes());
}

/// A dynamic image in memory with some blocks, its bytes, and the disk's.
async fn sample(handle: &Handle, create: Create) -> (Rc<dyn Storage>, Vec<u8>) {
    let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
    vhd::create(&ram, &create).await.unwrap();
    let image = open_image(handle, ram.clone(), true).await.unwrap();
    let disk = Chain::new(handle, Rc::new(image));
    let mut model = vec![0; disk.size() as usize];
    let mut random = Random(7);
    change(&disk, &mut model, &mut random, 50).await;
    disk.close().await.unwrap();
    drop(disk);
    assert_eq!(Rc::strong_count(&ram), 1, "nobody holds the file of an image that is closed");
    (ram, model)
}

async fn contents(storage: &Rc<dyn Storage>) -> Vec<u8> {
    let buf = Buf::zeroed(storage.size() as usize);
    storage.read(0, buf.clone()).await.unwrap();
    buf.to_vec()
}

async fn stored(bytes: &[u8]) -> Rc<dyn Storage> {
    let ram = Ram::new(bytes.len() as u64);
    ram.write(0, Buf::from_bytes(bytes)).await.unwrap();
    Rc::new(ram)
}

/// A new image of a disk of 1 MiB in small blocks, over `below` if that is given.
async fn empty(block: u32, below: bool) -> Vec<u8> {
    let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
    let parent = Parent { name: "x".to_owned(), unique_id: None, changed: std::time::UNIX_EPOCH };
    let create = Create {
        size: MIB,
        block,
        subformat: if below { Subformat::Differencing } else { Subformat::Dynamic },
        parent: below.then_some(parent),
        ..Create::default()
    };
    vhd::create(&ram, &create).await.unwrap();
    contents(&ram).await
}

/// The disk of an image over a raw disk that is all 0x77, if there is one.
async fn over(handle: &Handle, storage: Rc<dyn Storage>, below: bool) -> Chain {
    let image = Rc::new(open_image(handle, storage, true).await.unwrap());
    let mut others: Vec<Rc<dyn Image>> = Vec::new();
    if below {
        let ram = Ram::new(MIB);
        ram.write(0, Buf::from_bytes(&vec![0x77; 1 << 20])).await.unwrap();
        others.push(Rc::new(Raw::new(Rc::new(ram))));
    }
    Chain::over(handle, image, others)
}
