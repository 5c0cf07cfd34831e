//! Snapshots and other sizes, ours beside those of `qemu-img`.

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use image::qcow2::{Header, apply_snapshot, delete_snapshot, resize, snapshots, take_snapshot};
use storage::Storage;

use crate::tools::{bytes, check, info, load, now, qemu_img, qemu_io, save, scratch};

const SHAPES: &[&str] = &[
    "compat=1.1",
    "compat=0.10,cluster_size=4k",
    "cluster_size=512,refcount_bits=8",
    "extended_l2=on,cluster_size=16k",
    "cluster_size=2M,refcount_bits=64",
];

fn made(path: &Path, options: &str) {
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), "64M"]);
    qemu_io(path, &["write -P 1 0 1M", "write -P 2 20M 300k", "write -z 30M 1M"]);
}

/// Does something to an image of the host's; it is sound afterwards.
fn change(path: &Path, how: impl FnOnce(&Rc<dyn Storage>)) -> Header {
    let file = load(path);
    how(&file);
    save(&file, path);
    let found = check(path);
    assert_eq!(found["code"], 0, "{found:?}");
    now(Header::read(&file)).unwrap()
}

fn take(path: &Path, name: &str) {
    change(path, |file| now(take_snapshot(file, name, Duration::new(1_700_000_000, 5))).unwrap());
}

#[test]
fn snapshots_keep_what_was_there_and_can_be_applied_and_deleted() {
    let folder = scratch();
    let path = folder.path().join("image");
    for options in SHAPES {
        made(&path, options);
        take(&path, "one");
        qemu_io(&path, &["write -P 3 512k 1M", "write -P 4 50M 128k"]);
        take(&path, "two");
        let told = info(&path)["snapshots"].clone();
        let ids: Vec<&str> = (0..2).map(|number| told[number]["id"].as_str().unwrap()).collect();
        assert_eq!(
            (ids, &told[1]["name"], &told[0]["date-nsec"]),
            (vec!["1", "2"], &"two".into(), &5.into())
        );
        qemu_io(&path, &["write -P 5 0 2M", "read -P 4 50M 128k"]);
        // QEMU reads them as well as we apply them.
        let header = change(&path, |file| now(apply_snapshot(file, "one")).unwrap());
        assert!(!header.is_dirty());
        qemu_io(&path, &["read -P 1 0 1M", "read -P 0 50M 128k"]);
        qemu_io(&path, &["write -P 6 0 64k", "write -P 7 40M 64k"]);
        change(&path, |file| now(apply_snapshot(file, "2")).unwrap());
        qemu_io(&path, &["read -P 1 0 64k", "read -P 3 512k 1M", "read -P 4 50M 128k", "read -P 0 40M 64k"]);
        change(&path, |file| now(delete_snapshot(file, "one")).unwrap());
        qemu_io(&path, &["read -P 3 512k 1M", "write -P 8 512k 64k"]);
        qemu_img(&["snapshot", "-a", "two", path.to_str().unwrap()]);
        qemu_io(&path, &["read -P 3 512k 1M"]);
        let header = change(&path, |file| now(delete_snapshot(file, "two")).unwrap());
        assert_eq!((header.snapshots, header.snapshots_at), (0, 0));
        qemu_io(&path, &["read -P 3 512k 1M", "read -P 1 0 512k", "read -P 4 50M 128k", "read -P 0 30M 1M"]);
    }
}

#[test]
fn snapshots_of_qemu_are_applied_and_deleted_too_and_others_stay_as_they_are() {
    let folder = scratch();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    made(&path, "compat=1.1");
    for snapshot in ["a", "b", "c"] {
        qemu_img(&["snapshot", "-c", snapshot, name]);
        qemu_io(&path, &["write -P 9 0 64k"]);
    }
    let before = info(&path)["snapshots"].clone();
    change(&path, |file| now(delete_snapshot(file, "b")).unwrap());
    let after = info(&path)["snapshots"].clone();
    assert_eq!(after.as_array().unwrap().len(), 2);
    assert_eq!((&after[0], &after[1]), (&before[0], &before[2]));
    change(&path, |file| now(apply_snapshot(file, "a")).unwrap());
    qemu_io(&path, &["read -P 1 0 64k"]);
    take(&path, "d");
    assert_eq!(info(&path)["snapshots"][2]["id"], "4");
    for wanted in ["b", "5", ""] {
        let file = load(&path);
        let before = bytes(&file);
        let error = now(delete_snapshot(&file, wanted)).unwrap_err();
        assert!(error.to_string().contains("no snapshot"), "{error}");
        assert!(now(apply_snapshot(&file, wanted)).is_err());
        assert!(bytes(&file) == before);
    }
}

#[test]
fn what_cannot_have_snapshots_has_none() {
    let folder = scratch();
    let path = folder.path().join("image");
    // A count of one bit has no room for a second reference.
    made(&path, "refcount_bits=1");
    let file = load(&path);
    let error = now(take_snapshot(&file, "one", Duration::ZERO)).unwrap_err();
    assert!(error.to_string().contains("1 bits"), "{error}");
    assert!(!now(Header::read(&file)).unwrap().is_dirty());
    save(&file, &path);
    assert_eq!(check(&path)["code"], 0);
    let data = format!("data_file={}", folder.path().join("data").display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &data, path.to_str().unwrap(), "64M"]);
    let error = now(take_snapshot(&load(&path), "one", Duration::ZERO)).unwrap_err();
    assert!(error.to_string().contains("data file"), "{error}");
    // Nor is an image that is not sound touched.
    made(&path, "compat=1.1");
    let file = load(&path);
    let l1 = now(Header::read(&file)).unwrap().l1_at;
    now(file.write(l1, block::Buf::from_bytes(&[0]))).unwrap();
    let before = bytes(&file);
    assert!(now(take_snapshot(&file, "one", Duration::ZERO)).is_err());
    assert!(now(resize(&file, None, 1 << 30)).is_err());
    assert!(bytes(&file) == before);
}

#[test]
fn disks_grow_and_shrink_and_what_is_added_is_zero() {
    let folder = scratch();
    let path = folder.path().join("image");
    for options in SHAPES {
        made(&path, options);
        qemu_io(&path, &["write -P 9 63M 1M"]);
        let size = |bytes: u64| change(&path, |file| now(resize(file, None, bytes)).unwrap());
        let header = size(3 << 30);
        assert_eq!(header.size(), 3 << 30);
        qemu_io(&path, &["read -P 9 63M 1M", "read -P 0 64M 100M", "write -P 7 2G 1M", "read -P 1 0 1M"]);
        // In the middle of a cluster, with bytes behind.
        let header = size((63 << 20) + 512);
        assert_eq!(header.size(), (63 << 20) + 512);
        assert_eq!(info(&path)["virtual-size"], (63 << 20) + 512);
        size(3 << 30);
        qemu_io(&path, &["read -P 9 63M 512", "read -P 0 66060800 1M", "read -P 0 2G 1M"]);
        qemu_io(&path, &["read -P 1 0 1M", "read -P 2 20M 300k"]);
        size(0);
        // What nothing refers to any more is given back: tables are left.
        let used =
            bytes(&load(&path)).chunks(512).filter(|sector| sector.iter().any(|byte| *byte != 0)).count();
        assert!(used < 64, "{options}: {used} sectors");
        size(1 << 20);
        qemu_io(&path, &["read -P 0 0 1M"]);
    }
}

#[test]
fn snapshots_keep_what_a_disk_loses() {
    let folder = scratch();
    let path = folder.path().join("image");
    for options in SHAPES.iter().filter(|options| !options.contains("0.10")) {
        made(&path, options);
        take(&path, "large");
        change(&path, |file| now(resize(file, None, 4 << 20)).unwrap());
        take(&path, "small");
        let header = change(&path, |file| now(resize(file, None, 64 << 20)).unwrap());
        qemu_io(&path, &["read -P 1 0 1M", "read -P 0 20M 300k"]);
        assert_eq!(header.size(), 64 << 20);
        assert_eq!(change(&path, |file| now(apply_snapshot(file, "small")).unwrap()).size(), 4 << 20);
        qemu_io(&path, &["read -P 1 0 1M"]);
        assert_eq!(change(&path, |file| now(apply_snapshot(file, "large")).unwrap()).size(), 64 << 20);
        qemu_io(&path, &["read -P 1 0 1M", "read -P 2 20M 300k"]);
        let sizes = |file: &Rc<dyn Storage>| {
            let header = now(Header::read(file)).unwrap();
            now(snapshots(file, &header)).unwrap().iter().map(|snapshot| snapshot.size).collect::<Vec<_>>()
        };
        assert_eq!(sizes(&load(&path)), [Some(64 << 20), Some(4 << 20)]);
    }
    made(&path, "compat=0.10");
    take(&path, "one");
    let error = now(resize(&load(&path), None, 1 << 30)).unwrap_err();
    assert!(error.to_string().contains("version 2"), "{error}");
}
