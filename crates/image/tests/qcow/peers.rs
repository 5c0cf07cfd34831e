//! Images between tapdisk and QEMU's programs, on real files.

use std::path::Path;
use std::rc::Rc;

use block::Buf;
use image::Repair;
use image::qcow::{Create, check, create};
use runtime::Handle;
use storage::Storage;
use storage::file::{Cache, File, Options, open};

use crate::tools::{bytes_of, disk, disk_over, fill, pattern, qemu, qemu_reads, run, scratch, text};

/// A folder on the file system of the build, which has O_DIRECT where /tmp may not.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn file(handle: &Handle, path: &Path, cache: Cache) -> Rc<dyn Storage> {
    let options = Options { cache, ..Options::default() };
    Rc::new(File::new(handle, open(path, &options).unwrap()))
}

/// Writes compressed clusters where there is nothing.
fn compress(folder: &Path, image: &Path, model: &mut [u8]) {
    let piece = folder.join("piece");
    for nth in 0..48 {
        let at = 102_400 + nth * 4096;
        let bytes = pattern(4096, 77 + nth as u64);
        std::fs::write(&piece, &bytes).unwrap();
        model[at..at + 4096].copy_from_slice(&bytes);
        let command = format!("write -q -c -s {} {at} 4096", text(&piece));
        qemu("qemu-io", &["-f", "qcow", "-c", &command, text(image)]);
    }
}

#[test]
fn what_qemu_wrote_and_compressed_is_read_and_overwritten() {
    for (compressed, cache) in [(false, Cache::Direct), (true, Cache::Direct), (true, Cache::Buffered)] {
        let folder = folder();
        let (raw, path) = (folder.path().join("raw"), folder.path().join("image"));
        // It ends within a cluster.
        let mut model = pattern(3_000_320, 1);
        model[100_000..400_000].fill(0);
        std::fs::write(&raw, &model).unwrap();
        qemu("qemu-img", &["convert", "-f", "raw", "-O", "qcow", text(&raw), text(&path)]);
        if compressed {
            compress(folder.path(), &path, &mut model);
            std::fs::write(&raw, &model).unwrap();
        }
        let (at, raw) = (path.clone(), raw.clone());
        run(async move |handle| {
            let file = file(&handle, &at, cache);
            let found = check(&file, Repair::No).await.unwrap();
            assert!(found.is_clean(), "{found:?}");
            assert_eq!(found.compressed_clusters, if compressed { 48 } else { 0 });
            let disk = disk(&handle, &file).await;
            assert!(bytes_of(&disk).await == model);
            for (at, len, byte) in [
                (0, 10, 1),
                (4000, 200, 2),
                (8192, 4096, 3),
                (150_000, 9, 4),
                (110_592, 9000, 6),
                (3_000_000, 320, 5),
            ] {
                fill(&disk, at, len, byte).await.unwrap();
                model[at as usize..at as usize + len].fill(byte);
            }
            assert!(bytes_of(&disk).await == model);
            disk.close().await.unwrap();
            std::fs::write(&raw, &model).unwrap();
        });
        qemu(
            "qemu-img",
            &["compare", "-f", "raw", "-F", "qcow", text(&folder.path().join("raw")), text(&path)],
        );
    }
}

#[test]
fn qemu_and_tapdisk_write_one_image_in_turns() {
    let folder = folder();
    let (base, path) = (folder.path().join("base"), folder.path().join("image"));
    let below = pattern(1 << 20, 2);
    std::fs::write(&base, &below).unwrap();
    for backing in [None, Some("base".to_owned())] {
        let over = backing.is_some();
        let mut model = vec![0; 2 << 20];
        if over {
            model[..below.len()].copy_from_slice(&below);
        }
        let at = path.clone();
        std::fs::File::create(&path).unwrap().set_len(1).unwrap();
        run(async move |handle| {
            let file = file(&handle, &at, Cache::Buffered);
            create(&file, &Create { size: 2 << 20, backing, cluster_size: None }).await.unwrap();
        });
        for turn in 0..8_usize {
            let from = turn * 211_111;
            let commands = format!("write -P {} {} 70144", 100 + turn, from / 512 * 512);
            qemu("qemu-io", &["-f", "qcow", "-c", &commands, text(&path)]);
            model[from / 512 * 512..][..70144].fill(100 + turn as u8);
            let (at, below) = (path.clone(), over.then(|| below.clone()));
            let mut bytes = std::mem::take(&mut model);
            let (sender, receiver) = std::sync::mpsc::channel();
            run(async move |handle| {
                let file = file(&handle, &at, Cache::Buffered);
                let disk = disk_over(&handle, &file, below.as_deref()).await;
                assert!(bytes_of(&disk).await == bytes, "turn {turn}");
                let ours = pattern(50_001, turn as u64);
                disk.write(from as u64 + 40_000, Buf::from_bytes(&ours)).await.unwrap();
                bytes[from + 40_000..][..ours.len()].copy_from_slice(&ours);
                disk.close().await.unwrap();
                let found = check(&file, Repair::No).await.unwrap();
                assert!(found.is_clean(), "{found:?}");
                sender.send(bytes).unwrap();
            });
            model = receiver.recv().unwrap();
            assert!(qemu_reads(&path, "qcow") == model, "turn {turn}");
        }
    }
}

#[test]
fn an_encrypted_image_of_qemus_is_known_as_such() {
    let folder = scratch();
    let path = folder.path().join("image");
    let secret = ["--object", "secret,id=key,data=password"];
    let options = ["-o", "encrypt.format=aes,encrypt.key-secret=key", text(&path), "1M"];
    qemu("qemu-img", &[&["create", "-q", "-f", "qcow"], &secret[..], &options[..]].concat());
    run(async move |_| {
        let file = crate::tools::ram(&std::fs::read(path).unwrap()).await;
        assert!(image::qcow::Header::read(&file).await.unwrap().is_encrypted());
    });
}
