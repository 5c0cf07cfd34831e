//! Space of the image's file: used again, given back, and what a disk's new size makes of it.

use std::rc::Rc;

use block::{Buf, Errno, Span};
use image::qcow2::{Create, Header, Qcow2, check, create};
use image::{Chain, Extent, Image, Repair, Settings};
use runtime::{Handle, RingFlags, Runtime, Uring};
use storage::{Ram, Storage, Zeroing};

use crate::tools::{check as qemu_check, now, qemu_img, ram, save, scratch};

fn runtime() -> Runtime {
    let pool = block::Pool::new(64 << 20);
    let uring = Uring::open(RingFlags::Auto, &pool).unwrap();
    Runtime::new(Box::new(uring), pool)
}

async fn open(handle: &Handle, file: &Rc<dyn Storage>) -> Rc<Qcow2> {
    let header = Header::read(file).await.unwrap();
    let settings = Settings { writable: true, ..Settings::default() };
    Rc::new(Qcow2::open(handle, header, file.clone(), None, settings).await.unwrap())
}

fn new(size: u64, cluster_size: u64) -> Rc<dyn Storage> {
    let file: Rc<dyn Storage> = Rc::new(Ram::new(0));
    now(create(&file, &Create { size, cluster_size, ..Create::default() })).unwrap();
    file
}

fn span(at: u64, len: u64) -> Span {
    Span::new(at, len).unwrap()
}

#[test]
fn what_is_given_back_is_used_again() {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    runtime.block_on(async move {
        let file = new(64 << 20, 65536);
        let image = open(&handle, &file).await;
        let chain = Chain::new(&handle, image);
        for round in 0..40_u64 {
            let at = round % 8 * (8 << 20);
            chain.write(at, Buf::from_bytes(&vec![7; 4 << 20])).await.unwrap();
            if round % 2 == 0 {
                chain.discard(span(at, 4 << 20)).await.unwrap();
            } else {
                chain.zero(span(at, 4 << 20), Zeroing { unmap: true, fast: true }).await.unwrap();
            }
            chain.flush().await.unwrap();
        }
        // Forty times four would be 160 MiB; two lots may be on their way back at a time.
        assert!(file.size() < 16 << 20, "the file has {} bytes", file.size());
        chain.close().await.unwrap();
        let report = check(&file, Repair::No).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert!(file.size() < 2 << 20, "nothing is left of it, and yet the file has {} bytes", file.size());
    });
}

#[test]
fn free_clusters_are_found_in_an_image_that_others_have_left() {
    let dir = scratch();
    let path = dir.path().join("image");
    let image = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", image, "16M"]);
    let commands = ["write 0 8M", "discard 1M 6M"].map(|command| ["-c", command]);
    let done = std::process::Command::new("qemu-io")
        .args(["-d", "unmap", "-f", "qcow2"])
        .args(commands.as_flattened())
        .arg(image)
        .output()
        .unwrap();
    assert!(done.status.success());
    let file = ram(&std::fs::read(&path).unwrap());
    let size = file.size();
    let runtime = runtime();
    let handle = runtime.handle().clone();
    runtime.block_on(async move {
        let chain = Chain::new(&handle, open(&handle, &file).await);
        // Time for the cursor to look around.
        for number in 0..1400_u64 {
            chain.write((8 << 20) + number * 4096, Buf::from_bytes(&[9; 4096])).await.unwrap();
        }
        chain.close().await.unwrap();
        assert!(file.size() <= size + (1 << 20), "it had {size} bytes and has {}", file.size());
        let path = path.with_extension("saved");
        save(&file, &path);
        assert_eq!(qemu_check(&path)["code"], 0);
    });
}

#[test]
fn what_is_in_memory_is_found_without_waiting() {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    runtime.block_on(async move {
        let file = new(64 << 20, 65536);
        let image = open(&handle, &file).await;
        let chain = Chain::new(&handle, image.clone());
        assert!(matches!(image.mapped(span(0, 64 << 20)), Some(Extent::Below { len }) if len == 64 << 20));
        assert!(image.placed(span(0, 512)).is_none());
        chain.write(1 << 20, Buf::from_bytes(&vec![7; 2 << 20])).await.unwrap();
        let Some(Extent::Data { len, .. }) = image.mapped(span((1 << 20) + 512, 4 << 20)) else {
            panic!("not there")
        };
        assert_eq!(len, (2 << 20) - 512, "one run up to the end of what was written");
        let placement = image.placed(span((1 << 20) + 512, 1 << 20)).unwrap();
        assert_eq!((placement.len, placement.before, placement.after), (1 << 20, 0, 0));
        drop(placement);
        chain.close().await.unwrap();
    });
}

#[test]
fn a_disk_grows_while_it_is_used_as_far_as_its_table_reaches() {
    let runtime = runtime();
    let handle = runtime.handle().clone();
    runtime.block_on(async move {
        // One entry of L1 tells of 2 MiB.
        let file = new((1 << 20) + 512, 4096);
        let image = open(&handle, &file).await;
        let chain = Chain::new(&handle, image.clone());
        chain.write(1 << 20, Buf::from_bytes(&[7; 512])).await.unwrap();
        // Another program may leave what it likes behind the end of the disk.
        let Some(Extent::Data { at, .. }) = image.mapped(span(1 << 20, 512)) else { panic!("not there") };
        file.write(at + 512, Buf::from_bytes(&[0xee; 3584])).await.unwrap();
        chain.resize(2 << 20).await.unwrap();
        assert_eq!(chain.size(), 2 << 20);
        let buf = Buf::zeroed(1 << 20);
        buf.fill(0xa5);
        chain.read(1 << 20, buf.clone()).await.unwrap();
        let found = buf.to_vec();
        assert!(found[..512].iter().all(|byte| *byte == 7) && found[512..].iter().all(|byte| *byte == 0));
        for refused in [1 << 20, (2 << 20) + 1] {
            assert_eq!(chain.resize(refused).await.unwrap_err().errno(), Errno::EOPNOTSUPP);
        }
        chain.close().await.unwrap();
        assert_eq!(Header::read(&file).await.unwrap().size(), 2 << 20);
        assert!(check(&file, Repair::No).await.unwrap().is_clean());
    });
}

#[test]
fn a_broken_compressed_cluster_is_an_error_and_can_be_overwritten() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(dir.path().join("raw"), vec![7; 1 << 20]).unwrap();
    for kind in ["zlib", "zstd"] {
        let options = format!("compression_type={kind}");
        let (raw, image) = (path("raw"), path(kind));
        qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, &raw, &image]);
        let mut content = std::fs::read(&image).unwrap();
        let word = |at: u64| u64::from_be_bytes(content[at as usize..at as usize + 8].try_into().unwrap());
        let table = word(word(40)) & 0x00ff_ffff_ffff_fe00;
        let broken = (word(table) & ((1 << 54) - 1)) as usize;
        content[broken..broken + 20].fill(0xff);
        let file = ram(&content);
        let runtime = runtime();
        let handle = runtime.handle().clone();
        runtime.block_on(async move {
            let chain = Chain::new(&handle, open(&handle, &file).await);
            let buf = Buf::zeroed(65536);
            assert_eq!(chain.read(0, buf.clone()).await.unwrap_err().errno(), Errno::EIO);
            // A part of it cannot be written without the rest.
            assert_eq!(chain.write(0, Buf::from_bytes(&[1; 512])).await.unwrap_err().errno(), Errno::EIO);
            chain.write(0, Buf::from_bytes(&[1; 65536])).await.unwrap();
            chain.read(0, buf.clone()).await.unwrap();
            assert_eq!(buf.to_vec(), [1; 65536]);
            chain.read(65536, buf.clone()).await.unwrap();
            assert_eq!(buf.to_vec(), [7; 65536]);
            chain.close().await.unwrap();
            assert!(check(&file, Repair::No).await.unwrap().is_clean());
        });
    }
}

/// An image of QEMU's whose disk of 1 MiB is full of sevens, and whose header then says that it is smaller.
fn cut_short(dir: &std::path::Path, options: &str, compressed: bool, snapshot: bool) -> Rc<dyn Storage> {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let (raw, image) = (path("raw"), path("image"));
    std::fs::write(&raw, vec![7; 1 << 20]).unwrap();
    let mut convert = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
    if compressed {
        convert.push("-c");
    }
    convert.extend([&raw[..], &image]);
    qemu_img(&convert);
    if snapshot {
        qemu_img(&["snapshot", "-c", "one", &image]);
    }
    let mut content = std::fs::read(&image).unwrap();
    content[24..32].copy_from_slice(&300_032_u64.to_be_bytes());
    ram(&content)
}

#[test]
fn what_others_have_left_beyond_a_disk_never_shows_when_it_grows() {
    let dir = scratch();
    for (options, compressed, snapshot) in [
        ("cluster_size=65536", false, false),
        ("cluster_size=65536", true, false),
        ("cluster_size=65536", false, true),
        ("cluster_size=4096,compat=0.10", false, true),
        ("cluster_size=512", true, true),
        ("cluster_size=16384,extended_l2=on", false, true),
        ("cluster_size=2M", true, true),
    ] {
        let runtime = runtime();
        let handle = runtime.handle().clone();
        let file = cut_short(dir.path(), options, compressed, snapshot);
        let saved = dir.path().join("saved");
        let grown = runtime.block_on(async move {
            let chain = Chain::new(&handle, open(&handle, &file).await);
            assert_eq!(chain.size(), 300_032);
            for size in [300_545, 700_000, 1 << 20] {
                chain.resize(size).await.unwrap();
                let size = size.next_multiple_of(512);
                assert_eq!(chain.size(), size, "in whole sectors");
                let buf = Buf::zeroed(size as usize);
                buf.fill(0xa5);
                chain.read(0, buf.clone()).await.unwrap();
                let found = buf.to_vec();
                assert!(found[..300_032].iter().all(|byte| *byte == 7), "{options}: what was there is gone");
                assert!(found[300_032..].iter().all(|byte| *byte == 0), "{options}: old bytes show");
            }
            chain.close().await.unwrap();
            file
        });
        save(&grown, &saved);
        assert_eq!(qemu_check(&saved)["code"], 0, "{options}");
        if snapshot {
            let (image, raw) = (saved.to_str().unwrap(), dir.path().join("kept"));
            qemu_img(&["convert", "-l", "one", "-f", "qcow2", "-O", "raw", image, raw.to_str().unwrap()]);
            let kept = std::fs::read(raw).unwrap();
            assert!(kept == vec![7; kept.len()] && kept.len() == 1 << 20, "{options}: the snapshot changed");
        }
    }
}

#[test]
fn a_disk_that_nobody_has_open_does_not_grow_over_bytes_that_would_show() {
    let dir = scratch();
    let saved = dir.path().join("saved");
    for (options, compressed, grows) in [
        ("cluster_size=65536", true, false),
        ("cluster_size=65536", false, true),
        ("cluster_size=4096,compat=0.10", false, true),
    ] {
        let file = cut_short(dir.path(), options, compressed, false);
        let result = now(image::qcow2::resize(&file, None, 1 << 20));
        assert_eq!(result.is_ok(), grows, "{options}, {compressed}: {result:?}");
        save(&file, &saved);
        assert_eq!(qemu_check(&saved)["code"], 0, "{options}");
        if grows {
            let beyond = format!("read -P 0 300032 {}", (1 << 20) - 300_032);
            crate::tools::qemu_io(&saved, &["read -P 7 0 300032", &beyond]);
        }
    }
}
