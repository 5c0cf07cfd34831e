//! VHD images against QEMU's programs, against the specification, and against a model.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use block::{Buf, Errno, Pool, Span};
use image::vhd::{self, Create, Header, Parent, Preallocation, Subformat, Vhd};
use image::{Chain, Image, ImageError, Raw, Repair, Settings};
use runtime::{Handle, RingFlags, Runtime, Uring};
use storage::file::{File, Options, open};
use storage::{Ram, Storage, Zeroing};

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
    let options = Options { create: Some(0), wait: Duration::ZERO, ..Options::default() };
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

/// A sector of the disk, read as the specification says; none if the image has none.
fn sector(bytes: &[u8], sector: usize) -> Option<&[u8]> {
    let number = |at: usize, len: usize| {
        bytes[at..at + len].iter().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte))
    };
    let second = number(16, 8);
    let (table, block) = (number(second + 16, 8), number(second + 32, 4));
    let (index, within) = (sector * 512 / block, sector % (block / 512));
    let entry = number(table + index * 4, 4);
    if entry == 0xffff_ffff {
        return None;
    }
    let bitmap = entry * 512;
    let is_set = bytes[bitmap + within / 8] & (0x80 >> (within % 8)) != 0;
    let at = bitmap + (block / 4096).next_multiple_of(512).max(512) + within * 512;
    is_set.then(|| &bytes[at..at + 512])
}

#[test]
fn qemu_reads_what_we_make() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    for subformat in [Subformat::Fixed, Subformat::Dynamic] {
        for size in [512, 10 * MIB, 10 * MIB + 512, 33_333_333, 5 << 30] {
            for preallocation in [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc] {
                if size > 40_000_000 && preallocation == Preallocation::Falloc {
                    continue;
                }
                make(&path, Create { size, subformat, preallocation, ..Create::default() }).unwrap();
                assert_eq!(size_by_qemu(&path), size.next_multiple_of(512), "{subformat:?}");
                if size < 40_000_000 {
                    judge(&std::fs::read(&path).unwrap());
                    assert!(bytes_by_qemu(&path).iter().all(|byte| *byte == 0));
                }
            }
        }
    }
}

#[test]
fn sizes_rounded_by_geometry_are_those_of_qemu() {
    let folder = folder();
    let (ours, theirs) = (folder.path().join("ours.vhd"), folder.path().join("theirs.vhd"));
    for size in [
        1,
        512,
        100_000,
        10 * MIB,
        123_456_789,
        504 * MIB,
        8 << 30,
        31 << 30,
        100 << 30,
        130 << 30,
        2040 << 30,
    ] {
        qemu("qemu-img", &["create", "-q", "-f", "vpc", text(&theirs), &size.to_string()]);
        make(&ours, Create { size, geometry: true, ..Create::default() }).unwrap();
        assert_eq!(size_by_qemu(&ours), size_by_qemu(&theirs), "{size}");
        // Programs that go by cylinders, heads and sectors see the same.
        let (ours, theirs) = (std::fs::read(&ours).unwrap(), std::fs::read(&theirs).unwrap());
        if size_of(&theirs) < 127 << 30 {
            assert_eq!(ours[56..60], theirs[56..60], "{size}");
        }
    }
}

/// The size that a footer at 0 has.
fn size_of(bytes: &[u8]) -> u64 {
    bytes[48..56].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// Seals the footer at this byte.
fn seal(bytes: &mut [u8], at: usize) {
    bytes[at + 64..at + 68].fill(0);
    let sum = !bytes[at..at + 512].iter().map(|byte| u32::from(*byte)).sum::<u32>();
    bytes[at + 64..at + 68].copy_from_slice(&sum.to_be_bytes());
}

#[test]
fn the_size_of_a_disk_is_what_qemu_takes_for_it_whoever_made_it() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    qemu("qemu-img", &["create", "-q", "-f", "vpc", text(&path), "10M"]);
    let made = std::fs::read(&path).unwrap();
    let creators: [&[u8; 4]; 12] = [
        b"vpc ", b"qemu", b"qem2", b"win ", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0", b"vs  ", b"vbox", b"conv",
        b"    ",
    ];
    for creator in creators {
        for geometry in [[1, 45, 4, 17], [255, 255, 16, 255]] {
            let mut bytes = made.clone();
            for at in [0, made.len() - 512] {
                bytes[at + 28..at + 32].copy_from_slice(creator);
                bytes[at + 48..at + 56].copy_from_slice(&(9 * MIB + 300).to_be_bytes());
                bytes[at + 56..at + 60].copy_from_slice(&geometry);
                // A version of blktap's that has no batmap for certain.
                bytes[at + 32..at + 36].copy_from_slice(&[0, 1, 0, 1]);
                seal(&mut bytes, at);
            }
            std::fs::write(&path, &bytes).unwrap();
            let by_qemu = size_by_qemu(&path);
            let at = path.clone();
            let ours = run(async move |handle| Header::read(&file(&handle, &at)).await.unwrap().size());
            assert_eq!(ours, by_qemu, "{} {geometry:?}", String::from_utf8_lossy(creator));
        }
    }
}

#[test]
fn what_qemu_writes_is_read_and_written_on_and_read_by_qemu() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    for options in [
        "subformat=dynamic",
        "subformat=dynamic,force_size=on",
        "subformat=fixed",
        "subformat=fixed,force_size=on",
    ] {
        qemu("qemu-img", &["create", "-q", "-f", "vpc", "-o", options, text(&path), "20M"]);
        let mut model = vec![0; size_by_qemu(&path) as usize];
        for round in 0..4u64 {
            // QEMU writes here and there.
            let mut random = Random(round);
            for _ in 0..5 {
                let (at, byte) = (random.below(19 * MIB) / 512 * 512, 1 + random.below(250) as u8);
                let len = (512 + random.below(200_000) / 512 * 512).min(model.len() as u64 - at);
                qemu("qemu-io", &["-f", "vpc", "-c", &format!("write -P {byte} {at} {len}"), text(&path)]);
                model[at as usize..(at + len) as usize].fill(byte);
            }
            let at = path.clone();
            model = run(async move |handle| {
                let disk = disk(&handle, &at, true).await;
                assert!(all_of(&disk).await == model, "what QEMU wrote");
                change(&disk, &mut model, &mut random, 60).await;
                disk.close().await.unwrap();
                model
            });
            assert!(bytes_by_qemu(&path) == model, "what we wrote, {options}, round {round}");
        }
        let bytes = std::fs::read(&path).unwrap();
        judge(&bytes);
        let at = path.clone();
        let report = run(async move |handle| vhd::check(&file(&handle, &at), Repair::No).await.unwrap());
        assert!(report.is_clean(), "{report:?}");
    }
}

/// Random operations against a model, with the image opened anew between, over each size of blocks.
#[test]
fn a_dynamic_disk_is_an_array_of_bytes() {
    for (seed, block) in [4096, 8192, 65536, 512 << 10, 2 << 20].into_iter().enumerate() {
        let folder = folder();
        let path = folder.path().join("a.vhd");
        let size = 7 * MIB + 1536;
        make(&path, Create { size, block, ..Create::default() }).unwrap();
        let mut model = vec![0; size as usize];
        let mut random = Random(seed as u64);
        for round in 0..6 {
            let at = path.clone();
            (model, random) = run(async move |handle| {
                let disk = disk(&handle, &at, true).await;
                change(&disk, &mut model, &mut random, 80).await;
                match round % 3 {
                    0 => disk.close().await.unwrap(),
                    1 => disk.flush().await.unwrap(),
                    // What was answered and not flushed is the ledger's; a tool that dies has none.
                    _ => disk.close().await.unwrap(),
                }
                drop(disk);
                (model, random)
            });
            let at = path.clone();
            let expected = model.clone();
            run(async move |handle| {
                let disk = disk(&handle, &at, false).await;
                assert!(all_of(&disk).await == expected, "round {round}, blocks of {block}");
            });
            assert!(bytes_by_qemu(&path) == model, "by QEMU, round {round}, blocks of {block}");
        }
        judge(&std::fs::read(&path).unwrap());
        let at = path.clone();
        let report = run(async move |handle| vhd::check(&file(&handle, &at), Repair::No).await.unwrap());
        assert!(report.is_clean(), "{report:?}");
    }
}

#[test]
fn a_differencing_disk_is_an_array_of_bytes_over_another() {
    for (seed, block) in [4096, 65536, 2 << 20].into_iter().enumerate() {
        let folder = folder();
        let (base, top) = (folder.path().join("base.vhd"), folder.path().join("top.vhd"));
        let size = 6 * MIB + 512;
        make(&base, Create { size: 5 * MIB, ..Create::default() }).unwrap();
        let mut random = Random(100 + seed as u64);
        let at = base.clone();
        let (below, mut random) = run(async move |handle| {
            let disk = disk(&handle, &at, true).await;
            let mut model = vec![0; 5 << 20];
            change(&disk, &mut model, &mut random, 40).await;
            disk.close().await.unwrap();
            (model, random)
        });
        let at = base.clone();
        let id = run(async move |handle| Header::read(&file(&handle, &at)).await.unwrap().unique_id());
        let changed = std::fs::metadata(&base).unwrap().modified().unwrap();
        let parent = Parent { name: "base.vhd".to_owned(), unique_id: Some(id), changed };
        let create = Create {
            size,
            block,
            subformat: Subformat::Differencing,
            parent: Some(parent),
            ..Create::default()
        };
        make(&top, create).unwrap();
        let mut model = below.clone();
        model.resize(size as usize, 0);
        for round in 0..5 {
            let (base, top) = (base.clone(), top.clone());
            (model, random) = run(async move |handle| {
                let image = open_image(&handle, file(&handle, &top), true).await.unwrap();
                let lower = open_image(&handle, file(&handle, &base), false).await.unwrap();
                let disk = Chain::over(&handle, Rc::new(image), vec![Rc::new(lower)]);
                assert!(all_of(&disk).await == model, "round {round}, blocks of {block}");
                change(&disk, &mut model, &mut random, 60).await;
                disk.close().await.unwrap();
                (model, random)
            });
        }
        let bytes = std::fs::read(&top).unwrap();
        judge(&bytes);
        for (number, expected) in model.chunks(512).enumerate() {
            let found = sector(&bytes, number).or(below.get(number * 512..(number + 1) * 512));
            assert!(found.unwrap_or(&[0; 512]) == expected, "sector {number} by the specification");
        }
        let at = top.clone();
        let report = run(async move |handle| vhd::check(&file(&handle, &at), Repair::No).await.unwrap());
        assert!(report.is_clean(), "{report:?}");
    }
}

#[test]
fn a_differencing_image_names_its_parent_as_blktap_does() {
    run(async |_| {
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        let changed = std::time::UNIX_EPOCH + Duration::from_secs(946_684_800 + 77);
        let parent = Parent { name: "../vm/base.vhd".to_owned(), unique_id: Some([5; 16]), changed };
        let create = Create {
            size: MIB,
            subformat: Subformat::Differencing,
            parent: Some(parent.clone()),
            ..Create::default()
        };
        vhd::create(&ram, &create).await.unwrap();
        let backing = Header::read(&ram).await.unwrap().backing().unwrap();
        assert_eq!(backing.name, "../vm/base.vhd");
        assert_eq!(backing.others, ["base.vhd"]);
        assert_eq!(backing.unique_id, Some([5; 16]));
        let head = Buf::zeroed(4096);
        ram.read(0, head.clone()).await.unwrap();
        let head = head.to_vec();
        // Of the second header: the parent's identifier and time; the platforms of three locators.
        assert_eq!(head[512 + 40..512 + 56], [5; 16]);
        assert_eq!(head[512 + 56..512 + 60], [0, 0, 0, 77]);
        let platforms: Vec<&[u8]> = (0..3).map(|number| &head[512 + 576 + number * 24..][..4]).collect();
        assert_eq!(platforms, [b"MacX", b"W2ku", b"W2ru"]);
        // A parent that is a raw disk has no identifier.
        let create = Create { parent: Some(Parent { unique_id: None, ..parent }), ..create };
        vhd::create(&ram, &create).await.unwrap();
        let backing = Header::read(&ram).await.unwrap().backing().unwrap();
        assert_eq!((backing.format, backing.unique_id), (Some(image::Format::Raw), None));
    });
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

#[test]
fn either_footer_is_enough_and_the_other_is_put_right() {
    run(async |handle| {
        let (ram, model) = sample(&handle, Create { size: 3 * MIB, ..Create::default() }).await;
        let whole = contents(&ram).await;
        let last = whole.len() - 512;
        for (at, filling) in [(0, 0), (last, 0), (last, 0xc7), (last, 0x11)] {
            let mut bytes = whole.clone();
            bytes[at..at + 512].fill(filling);
            let damaged = stored(&bytes).await;
            let header = Header::read(&damaged).await.unwrap();
            assert_eq!(header.notes().len(), 1, "it is told");
            assert_eq!(header.notes()[0].contains("0xc7"), filling == 0xc7);
            let image = open_image(&handle, damaged.clone(), false).await.unwrap();
            let disk = Chain::new(&handle, Rc::new(image));
            assert!(all_of(&disk).await == model);
            assert!(contents(&damaged).await == bytes, "what is only read is left as it is");
            let report = vhd::check(&damaged, Repair::No).await.unwrap();
            assert!(report.is_safe() && !report.is_clean(), "{report:?}");
            let report = vhd::check(&damaged, Repair::Leaks).await.unwrap();
            assert!(report.is_clean() && report.leaks_fixed == 1, "{report:?}");
            assert!(contents(&damaged).await == whole, "as it was before");
        }
        let mut bytes = whole.clone();
        bytes[..8].fill(0);
        bytes[last..].fill(0);
        let error = Header::read(&stored(&bytes).await).await.unwrap_err();
        assert!(matches!(error, ImageError::Invalid(_)), "{error}");
    });
}

#[test]
fn an_image_that_lost_its_end_gets_a_footer_when_it_is_opened_to_be_written() {
    run(async |handle| {
        let (ram, model) = sample(&handle, Create { size: 3 * MIB, ..Create::default() }).await;
        let whole = contents(&ram).await;
        for cut in [1, 511, 512] {
            let damaged = stored(&whole[..whole.len() - cut]).await;
            let image = open_image(&handle, damaged.clone(), true).await.unwrap();
            let disk = Chain::new(&handle, Rc::new(image));
            assert!(all_of(&disk).await == model, "{cut}");
            disk.close().await.unwrap();
            assert!(contents(&damaged).await == whole, "{cut}");
        }
        // More than the footer is lost.
        let damaged = stored(&whole[..whole.len() - (3 << 20)]).await;
        let error = open_image(&handle, damaged, true).await.err().unwrap();
        assert!(error.to_string().contains("cut off"), "{error}");
    });
}

#[test]
fn a_guest_cannot_make_a_fixed_image_another_one() {
    run(async |handle| {
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        vhd::create(&ram, &Create { size: MIB, subformat: Subformat::Fixed, ..Create::default() })
            .await
            .unwrap();
        let trap: Rc<dyn Storage> = Rc::new(Ram::new(0));
        let parent =
            Parent { name: "/etc/shadow".to_owned(), unique_id: None, changed: std::time::UNIX_EPOCH };
        let create = Create {
            size: MIB,
            subformat: Subformat::Differencing,
            parent: Some(parent),
            ..Create::default()
        };
        vhd::create(&trap, &create).await.unwrap();
        let trap = contents(&trap).await;
        let image = open_image(&handle, ram.clone(), true).await.unwrap();
        let disk = Chain::new(&handle, Rc::new(image));
        disk.write(0, Buf::from_bytes(&trap)).await.unwrap();
        disk.close().await.unwrap();
        let header = Header::read(&ram).await.unwrap();
        assert_eq!(header.subformat(), Subformat::Fixed);
        assert!(header.backing().is_none());
        // The same in the last sector of a dynamic image that is cut off there.
        let (dynamic, _) = sample(&handle, Create { size: 3 * MIB, ..Create::default() }).await;
        let mut bytes = contents(&dynamic).await;
        let last = bytes.len() - 512;
        bytes[last..].copy_from_slice(&trap[..512]);
        let header = Header::read(&stored(&bytes).await).await.unwrap();
        assert_eq!(header.subformat(), Subformat::Dynamic);
    });
}

#[test]
fn images_that_make_no_sense_are_refused_in_words_and_never_served() {
    run(async |handle| {
        let (ram, _) = sample(&handle, Create { size: 3 * MIB, block: 65536, ..Create::default() }).await;
        let whole = contents(&ram).await;
        let values = [
            0u64,
            1,
            2,
            511,
            512,
            513,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_fffe,
            0xffff_ffff,
            1 << 40,
            u64::MAX,
        ];
        let mut refused = 0;
        // Fields of the copy of the footer and of the second header, by place and length.
        let fields =
            [(16, 8), (32, 4), (48, 8), (56, 4), (60, 4), (12, 4), (528, 8), (536, 4), (540, 4), (544, 4)];
        for (at, len) in fields {
            for value in values {
                let mut bytes = whole.clone();
                bytes[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
                seal(&mut bytes, 0);
                bytes[512 + 36..512 + 40].fill(0);
                let sum = !bytes[512..1536].iter().map(|byte| u32::from(*byte)).sum::<u32>();
                bytes[512 + 36..512 + 40].copy_from_slice(&sum.to_be_bytes());
                let damaged = stored(&bytes).await;
                refused += usize::from(try_all(&handle, damaged).await.is_err());
            }
        }
        assert!(refused > 60, "{refused}");
        // Entries of the table.
        for value in [0u32, 1, 3, 4, 5, 8, 0x7fff_ffff, 0xffff_fffe] {
            let mut bytes = whole.clone();
            bytes[1536 + 8..1536 + 12].copy_from_slice(&value.to_be_bytes());
            assert!(try_all(&handle, stored(&bytes).await).await.is_err(), "{value:#x}");
            let report = vhd::check(&stored(&bytes).await, Repair::No).await.unwrap();
            assert!(report.corruptions > 0, "{value:#x}: {report:?}");
            let damaged = stored(&bytes).await;
            let report = vhd::check(&damaged, Repair::All).await.unwrap();
            assert!(report.corruptions_fixed > 0 && report.is_safe(), "{value:#x}: {report:?}");
            try_all(&handle, damaged.clone()).await.unwrap();
            assert!(
                vhd::check(&damaged, Repair::All).await.unwrap().corruptions_fixed == 0,
                "once is enough"
            );
        }
        // Two blocks in one place.
        let mut bytes = whole.clone();
        let used: Vec<usize> = (0..48).filter(|number| bytes[1536 + number * 4] != 0xff).collect();
        bytes.copy_within(1536 + used[0] * 4..1536 + used[0] * 4 + 4, 1536 + used[1] * 4);
        let error = try_all(&handle, stored(&bytes).await).await.unwrap_err();
        assert!(error.contains("lies over"), "{error}");
        // Every byte of the headers, changed: opened or refused, and no panic.
        for at in (0..1536).step_by(3) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x5a;
            drop(try_all(&handle, stored(&bytes).await).await);
            let mut bytes = whole[..at].to_vec();
            bytes.push(0);
            assert!(try_all(&handle, stored(&bytes).await).await.is_err());
        }
    });
}

/// Opens an image, reads and writes it here and there, checks it.
async fn try_all(handle: &Handle, storage: Rc<dyn Storage>) -> Result<(), String> {
    let told = |error: ImageError| error.to_string();
    let header = Header::read(&storage).await.map_err(told)?;
    vhd::info(&header);
    header.backing();
    vhd::check(&storage, Repair::No).await.map_err(told)?;
    let image = open_image(handle, storage.clone(), true).await.map_err(told)?;
    let disk = Chain::new(handle, Rc::new(image));
    for at in [0, disk.size() / 2, disk.size().saturating_sub(4096)] {
        let len = 4096.min(disk.size() - at) as usize;
        if len > 0 {
            let buf = Buf::zeroed(len);
            disk.read(at, buf.clone()).await.map_err(|error| error.to_string())?;
            disk.write(at, buf).await.map_err(|error| error.to_string())?;
        }
    }
    disk.close().await.map_err(|error| error.to_string())
}

#[test]
fn a_disabled_image_is_told_of_and_not_served() {
    run(async |handle| {
        let (ram, _) = sample(&handle, Create { size: 3 * MIB, ..Create::default() }).await;
        let mut bytes = contents(&ram).await;
        let last = bytes.len() - 512;
        for at in [0, last] {
            bytes[at..at + 8].copy_from_slice(b"v_poison");
            seal(&mut bytes, at);
        }
        let disabled = stored(&bytes).await;
        let header = Header::read(&disabled).await.unwrap();
        assert!(header.is_disabled() && vhd::is(&bytes) && vhd::is_fixed(&bytes));
        let error = open_image(&handle, disabled.clone(), false).await.err().unwrap();
        assert!(error.to_string().contains("v_poison"), "{error}");
        assert!(vhd::check(&disabled, Repair::All).await.unwrap().is_clean());
        assert!(contents(&disabled).await == bytes, "its mark is kept");
    });
}

#[test]
fn hidden_and_suspended_images_keep_their_marks() {
    run(async |handle| {
        let (ram, _) = sample(&handle, Create { size: 30 * MIB, ..Create::default() }).await;
        let mut bytes = contents(&ram).await;
        let last = bytes.len() - 512;
        for at in [0, last] {
            bytes[at + 84..at + 86].fill(1);
            bytes[at + 300] = 0x77; // a reserved byte
            seal(&mut bytes, at);
        }
        let marked = stored(&bytes).await;
        let image = open_image(&handle, marked.clone(), true).await.unwrap();
        let disk = Chain::new(&handle, Rc::new(image));
        let before = marked.size();
        disk.write(0, Buf::from_bytes(&vec![1; 30 << 20])).await.unwrap();
        disk.close().await.unwrap();
        assert!(marked.size() > before, "blocks were added");
        let after = contents(&marked).await;
        assert_eq!(after[after.len() - 512..], bytes[..512]);
        assert_eq!(Header::read(&marked).await.unwrap().notes().len(), 2);
    });
}

#[test]
fn images_of_virtual_pc_before_2004_have_a_shorter_footer() {
    run(async |handle| {
        for subformat in [Subformat::Fixed, Subformat::Dynamic] {
            let (ram, model) =
                sample(&handle, Create { size: 3 * MIB, subformat, ..Create::default() }).await;
            let whole = contents(&ram).await;
            let short = stored(&whole[..whole.len() - 1]).await;
            assert!(Header::read(&short).await.unwrap().notes().is_empty());
            let image = open_image(&handle, short.clone(), true).await.unwrap();
            let disk = Chain::new(&handle, Rc::new(image));
            assert!(all_of(&disk).await == model);
            disk.close().await.unwrap();
            let report = vhd::check(&short, Repair::No).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
        }
    });
}

#[test]
fn a_block_that_was_given_a_place_and_nothing_else_reads_as_nothing() {
    run(async |handle| {
        let (ram, model) = sample(&handle, Create { size: 30 * MIB, ..Create::default() }).await;
        let whole = contents(&ram).await;
        let image = open_image(&handle, ram.clone(), false).await.unwrap();
        let absent = (0..15).find(|block| {
            let span = Span::new(block * 2 * MIB, 512).unwrap();
            image.mapped(span).is_some_and(|extent| matches!(extent, image::Extent::Zero { .. })) && {
                let entry = (1536 + block * 4) as usize;
                whole[entry..entry + 4] == [0xff; 4]
            }
        });
        let absent = absent.expect("not every block is written") as usize;
        for more in [0, 512, 512 + 4096] {
            // As blktap leaves it on a file system where it does not write zeroes beforehand, killed before the data came.
            let mut bytes = whole[..whole.len() - 512].to_vec();
            let place = (bytes.len() / 512) as u32;
            bytes[1536 + absent * 4..1536 + absent * 4 + 4].copy_from_slice(&place.to_be_bytes());
            bytes.resize(bytes.len() + more, 0);
            for writable in [false, true] {
                let left = stored(&bytes).await;
                let image = open_image(&handle, left.clone(), writable).await.unwrap();
                let disk = Chain::new(&handle, Rc::new(image));
                assert!(all_of(&disk).await == model, "{more} {writable}");
                if writable {
                    let at = absent as u64 * 2 * MIB;
                    disk.write(at + 100, Buf::from_bytes(&[9; 1000])).await.unwrap();
                    disk.close().await.unwrap();
                    let mut expected = model.clone();
                    expected[at as usize + 100..][..1000].fill(9);
                    let image = open_image(&handle, left.clone(), false).await.unwrap();
                    assert!(all_of(&Chain::new(&handle, Rc::new(image))).await == expected);
                    judge(&contents(&left).await);
                }
            }
            let report = vhd::check(&stored(&bytes).await, Repair::No).await.unwrap();
            assert!(report.is_safe(), "{report:?}");
            let left = stored(&bytes).await;
            assert!(vhd::check(&left, Repair::Leaks).await.unwrap().is_safe());
            let report = vhd::check(&left, Repair::No).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
        }
    });
}

#[test]
fn what_the_bitmap_leaves_out_is_zero_whatever_is_there() {
    run(async |handle| {
        // As blktap leaves it on a block device: old bytes under clear bits.
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        vhd::create(
            &ram,
            &Create { size: 2 * MIB, preallocation: Preallocation::Metadata, ..Create::default() },
        )
        .await
        .unwrap();
        let mut bytes = contents(&ram).await;
        let place = bytes[1536..1540].iter().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte)) * 512;
        bytes[place..place + 512].fill(0);
        bytes[place] = 0b0100_0000;
        bytes[place + 512..place + 512 + (2 << 20)].fill(0xee);
        let foreign = stored(&bytes).await;
        let image = open_image(&handle, foreign.clone(), true).await.unwrap();
        let disk = Chain::new(&handle, Rc::new(image));
        let mut model = vec![0; 2 << 20];
        model[512..1024].fill(0xee);
        assert!(all_of(&disk).await == model);
        // A part of a sector: the rest of it is not what was there.
        disk.write(2000, Buf::from_bytes(&[1; 100])).await.unwrap();
        model[2000..2100].fill(1);
        assert!(all_of(&disk).await == model);
        let mut random = Random(3);
        change(&disk, &mut model, &mut random, 200).await;
        disk.close().await.unwrap();
        let bytes = contents(&foreign).await;
        for (number, expected) in model.chunks(512).enumerate() {
            assert!(sector(&bytes, number).unwrap_or(&[0; 512]) == expected, "sector {number}");
        }
    });
}

#[test]
fn the_batmap_stays_true() {
    run(async |handle| {
        let (ram, mut model) = sample(&handle, Create { size: 30 * MIB, ..Create::default() }).await;
        // blktap marks a full block.
        let mut bytes = contents(&ram).await;
        let block = (0..15usize).find(|block| bytes[1536 + block * 4] != 0xff).unwrap();
        let map = 1536 + 512 + 512;
        bytes[map + block / 8] = 0x80 >> (block % 8);
        let sum = !u32::from(bytes[map + block / 8]);
        bytes[map - 512 + 24..map - 512 + 28].copy_from_slice(&sum.to_be_bytes());
        judge(&bytes);
        let foreign = stored(&bytes).await;
        let image = open_image(&handle, foreign.clone(), true).await.unwrap();
        let disk = Chain::new(&handle, Rc::new(image));
        change(&disk, &mut model, &mut Random(8), 100).await;
        disk.discard(Span::new(0, 30 * MIB).unwrap()).await.unwrap();
        disk.close().await.unwrap();
        judge(&contents(&foreign).await);
        assert!(vhd::check(&foreign, Repair::No).await.unwrap().is_clean());
        // One that says too much is a corruption, and is put right.
        let mut bytes = contents(&foreign).await;
        let place =
            bytes[1536 + block * 4..][..4].iter().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte))
                * 512;
        bytes[place + 7] = 0xfe;
        let foreign = stored(&bytes).await;
        assert_eq!(vhd::check(&foreign, Repair::No).await.unwrap().corruptions, 1);
        assert_eq!(vhd::check(&foreign, Repair::All).await.unwrap().corruptions_fixed, 1);
        assert!(vhd::check(&foreign, Repair::No).await.unwrap().is_clean());
        judge(&contents(&foreign).await);
        // So is one whose checksum is wrong.
        let mut bytes = contents(&foreign).await;
        bytes[map - 512 + 24] ^= 1;
        let foreign = stored(&bytes).await;
        assert_eq!(vhd::check(&foreign, Repair::No).await.unwrap().corruptions, 1);
        assert!(vhd::check(&foreign, Repair::All).await.unwrap().is_clean());
        judge(&contents(&foreign).await);
    });
}

#[test]
fn encrypted_images_are_refused_by_name() {
    run(async |handle| {
        let (ram, _) = sample(&handle, Create { size: 3 * MIB, ..Create::default() }).await;
        let mut bytes = contents(&ram).await;
        bytes[1536 + 512 + 29] = 1;
        let error = Header::read(&stored(&bytes).await).await.unwrap_err();
        assert!(error.to_string().contains("encrypted"), "{error}");
    });
}

#[test]
fn disks_grow_and_keep_their_bytes() {
    for (subformat, block) in [
        (Subformat::Fixed, 2 << 20),
        (Subformat::Dynamic, 2 << 20),
        (Subformat::Dynamic, 65536),
        (Subformat::Dynamic, 4096),
    ] {
        let folder = folder();
        let path = folder.path().join("a.vhd");
        let at = path.clone();
        run(async move |handle| {
            let storage = file(&handle, &at);
            vhd::create(&storage, &Create { size: 5 * MIB, subformat, block, ..Create::default() })
                .await
                .unwrap();
            let mut model = vec![0; 5 << 20];
            let mut random = Random(block.into());
            for size in [5 * MIB + 512, 5 * MIB + 512, 6 * MIB, 11 * MIB, 40 * MIB] {
                let image = open_image(&handle, storage.clone(), true).await.unwrap();
                let disk = Chain::new(&handle, Rc::new(image));
                change(&disk, &mut model, &mut random, 40).await;
                if size == 6 * MIB {
                    disk.close().await.unwrap();
                    vhd::resize(&storage, size).await.unwrap();
                    model.resize(size as usize, 0);
                    continue;
                }
                disk.resize(size).await.unwrap();
                model.resize(size as usize, 0);
                assert_eq!(disk.size(), size);
                assert!(all_of(&disk).await == model, "{subformat:?} {block} {size}");
                change(&disk, &mut model, &mut random, 40).await;
                disk.close().await.unwrap();
                judge(&contents(&storage).await);
                let report = vhd::check(&storage, Repair::No).await.unwrap();
                assert!(report.is_safe(), "{report:?}");
                let error = vhd::resize(&storage, size - 512).await.unwrap_err();
                assert!(error.to_string().contains("smaller"), "{error}");
            }
            std::fs::write(at.with_extension("model"), &model).unwrap();
        });
        let model = std::fs::read(path.with_extension("model")).unwrap();
        assert!(bytes_by_qemu(&path) == model, "by QEMU, {subformat:?} {block}");
    }
}

#[test]
fn images_of_qemu_grow_too() {
    let folder = folder();
    let path = folder.path().join("a.vhd");
    for options in ["subformat=dynamic", "subformat=dynamic,force_size=on", "subformat=fixed"] {
        qemu("qemu-img", &["create", "-q", "-f", "vpc", "-o", options, text(&path), "10M"]);
        qemu("qemu-io", &["-f", "vpc", "-c", "write -P 7 1M 5M", text(&path)]);
        let mut model = bytes_by_qemu(&path);
        for size in [30 * MIB, 700 * MIB] {
            let at = path.clone();
            run(async move |handle| vhd::resize(&file(&handle, &at), size).await.unwrap());
            model.resize(size as usize, 0);
            assert_eq!(size_by_qemu(&path), size);
            assert!(bytes_by_qemu(&path) == model, "{options}");
        }
        let at = path.clone();
        let report = run(async move |handle| vhd::check(&file(&handle, &at), Repair::No).await.unwrap());
        assert!(report.is_safe(), "{report:?}");
    }
}

#[test]
fn an_image_in_use_grows_as_far_as_its_table_goes() {
    run(async |handle| {
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        vhd::create(&ram, &Create { size: 5 * MIB, ..Create::default() }).await.unwrap();
        let header = Header::read(&ram).await.unwrap();
        let settings = Settings { writable: true, lasting: true, ..Settings::default() };
        let image = Vhd::open(&handle, header, ram.clone(), settings).await.unwrap();
        let disk = Chain::new(&handle, Rc::new(image));
        disk.write(0, Buf::from_bytes(&[3; 4096])).await.unwrap();
        disk.resize(6 * MIB).await.unwrap();
        assert_eq!(disk.size(), 6 * MIB);
        let error = disk.resize(7 * MIB).await.unwrap_err();
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
        assert_eq!(disk.size(), 6 * MIB);
        disk.close().await.unwrap();
        judge(&contents(&ram).await);
    });
}

#[test]
fn the_limit_of_2040_gib_is_told() {
    run(async |_| {
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        let most = 2040 << 30;
        vhd::create(&ram, &Create { size: most, ..Create::default() }).await.unwrap();
        assert_eq!(Header::read(&ram).await.unwrap().size(), most);
        for result in [
            vhd::resize(&ram, most + 1).await,
            vhd::create(&ram, &Create { size: most + 1, ..Create::default() }).await,
        ] {
            let error = result.unwrap_err();
            assert!(error.to_string().contains("2040 GiB"), "{error}");
        }
        assert_eq!(Header::read(&ram).await.unwrap().size(), most, "it is as it was");
    });
}

#[test]
fn requests_do_not_reach_the_footer_of_a_fixed_image() {
    run(async |handle| {
        let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
        vhd::create(&ram, &Create { size: MIB, subformat: Subformat::Fixed, ..Create::default() })
            .await
            .unwrap();
        let footer = contents(&ram).await[MIB as usize..].to_vec();
        let image = open_image(&handle, ram.clone(), true).await.unwrap();
        assert_eq!(image.size(), MIB);
        let disk = Chain::new(&handle, Rc::new(image));
        storage::conformance::check(&disk, 8, 300).await;
        disk.close().await.unwrap();
        assert!(contents(&ram).await[MIB as usize..] == footer);
    });
}

#[test]
fn disks_behave_as_storages_do() {
    run(async |handle| {
        for block in [4096, 65536, 2 << 20] {
            let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
            vhd::create(&ram, &Create { size: 3 * MIB, block, ..Create::default() }).await.unwrap();
            let disk = Chain::new(&handle, Rc::new(open_image(&handle, ram.clone(), true).await.unwrap()));
            storage::conformance::check(&disk, 7, 300).await;
            let below = Ram::new(3 * MIB);
            below.write(0, Buf::from_bytes(&vec![0; 3 << 20])).await.unwrap();
            let ram: Rc<dyn Storage> = Rc::new(Ram::new(0));
            let parent = Parent { name: "x".to_owned(), unique_id: None, changed: std::time::UNIX_EPOCH };
            let create = Create {
                size: 3 * MIB,
                block,
                subformat: Subformat::Differencing,
                parent: Some(parent),
                ..Create::default()
            };
            vhd::create(&ram, &create).await.unwrap();
            let top = open_image(&handle, ram, true).await.unwrap();
            let disk = Chain::over(&handle, Rc::new(top), vec![Rc::new(Raw::new(Rc::new(below)))]);
            storage::conformance::check(&disk, 7, 300).await;
        }
    });
}
