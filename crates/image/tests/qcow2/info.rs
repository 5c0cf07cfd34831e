//! What images tell of themselves, and what is done to them before they are written, against `qemu-img info`.

use image::qcow2::{Header, bitmaps, incompatible, info as our_info, prepare, snapshots};
use serde_json::{Map, Value, json};

use crate::tools::{bytes, check, info, load, now, qemu_img, qemu_io, save, scratch};

#[test]
fn facts_have_qemu_imgs_keys_and_values() {
    let folder = scratch();
    let path = folder.path().join("image");
    let data = folder.path().join("data");
    let data = format!("data_file={},data_file_raw=on", data.display());
    for options in [
        "compat=0.10",
        "compat=1.1",
        "lazy_refcounts=on,extended_l2=on,refcount_bits=64,compression_type=zstd",
        &data,
    ] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), "10M"]);
        let header = now(Header::read(&load(&path))).unwrap();
        let facts: Map<String, Value> = our_info(&header).into_iter().collect();
        assert_eq!(Value::Object(facts), info(&path)["format-specific"]["data"], "{options}");
    }
}

#[test]
fn snapshots_and_bitmaps_are_told_as_qemu_img_tells_them() {
    let folder = scratch();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    for version in ["0.10", "1.1"] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &format!("compat={version}"), name, "10M"]);
        if version == "1.1" {
            for (bitmap, more) in [("one", "--enable"), ("another one", "--disable")] {
                qemu_img(&["bitmap", "--add", more, "-g", "4096", name, bitmap]);
            }
        }
        for snapshot in ["first", "", "with spaces and \u{e4}"] {
            qemu_img(&["snapshot", "-c", snapshot, name]);
        }
        let file = load(&path);
        let header = now(Header::read(&file)).unwrap();
        let theirs = info(&path);
        let mine = now(snapshots(&file, &header)).unwrap();
        assert_eq!(mine.len(), 3);
        for (mine, theirs) in mine.iter().zip(theirs["snapshots"].as_array().unwrap()) {
            let mut theirs = theirs.clone();
            theirs.as_object_mut().unwrap().remove("icount");
            assert_eq!(mine.info(), theirs);
            assert_eq!((mine.size, mine.l1_entries), (Some(10 << 20), 1));
        }
        let mine: Vec<Value> =
            now(bitmaps(&file, &header)).unwrap().iter().map(|bitmap| bitmap.info()).collect();
        let theirs = &theirs["format-specific"]["data"]["bitmaps"];
        assert_eq!(mine, theirs.as_array().cloned().unwrap_or_default());
    }
}

#[test]
fn bitmaps_that_should_follow_are_in_use_from_the_first_write_on() {
    let folder = scratch();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "10M"]);
    qemu_img(&["bitmap", "--add", "--enable", name, "following"]);
    qemu_img(&["bitmap", "--add", "--disable", name, "frozen"]);
    let file = load(&path);
    let mut header = now(Header::read(&file)).unwrap();
    now(prepare(&file, &mut header)).unwrap();
    assert_eq!(now(Header::read(&file)).unwrap(), header);
    save(&file, &path);
    let told = &info(&path)["format-specific"]["data"]["bitmaps"];
    assert_eq!(told[0]["flags"], json!(["in-use", "auto"]));
    assert_eq!(told[1]["flags"], json!([]));
    assert_eq!(check(&path)["code"], 0);
    // Where they cannot be told apart all are given up.
    let at = header.extensions.bitmaps.unwrap().at;
    let odd = load(&path);
    now(odd.write(at + 16, block::Buf::from_bytes(&[9]))).unwrap();
    let mut header = now(Header::read(&odd)).unwrap();
    now(prepare(&odd, &mut header)).unwrap();
    assert_eq!((header.autoclear, header.extensions.bitmaps), (0, None));
    assert_eq!(now(Header::read(&odd)).unwrap(), header);
}

#[test]
fn marks_of_features_that_only_others_know_are_cleared_and_nothing_else_is_touched() {
    let folder = scratch();
    let path = folder.path().join("image");
    qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "10M"]);
    let file = load(&path);
    let mut header = now(Header::read(&file)).unwrap();
    let before = bytes(&file);
    now(prepare(&file, &mut header)).unwrap();
    assert!(bytes(&file) == before);
    now(file.write(88, block::Buf::from_bytes(&[0x80]))).unwrap();
    header = now(Header::read(&file)).unwrap();
    assert_eq!(header.autoclear, 1 << 63);
    now(prepare(&file, &mut header)).unwrap();
    assert!(bytes(&file) == before);
}

#[test]
fn a_dirty_image_is_repaired_first_and_a_corrupt_one_is_not_written() {
    let folder = scratch();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", name, "10M"]);
    // QEMU dies before it has written its counts.
    let said = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "flush", "-c", "abort", name])
        .output()
        .unwrap();
    assert!(!said.status.success());
    let file = load(&path);
    let mut header = now(Header::read(&file)).unwrap();
    assert!(header.is_dirty());
    assert!(check(&path)["corruptions"] > 0);
    now(prepare(&file, &mut header)).unwrap();
    assert!(!header.is_dirty());
    save(&file, &path);
    assert_eq!(check(&path)["code"], 0);
    qemu_io(&path, &["read -P 7 0 1M", "read -P 0 1M 9M"]);

    header.incompatible |= incompatible::CORRUPT;
    now(header.write_fields(&file)).unwrap();
    let before = bytes(&file);
    let error = now(prepare(&file, &mut header)).unwrap_err();
    assert!(error.to_string().contains("--repair all"), "{error}");
    assert!(bytes(&file) == before);
    // The check clears the mark, for there is nothing wrong.
    assert!(now(image::qcow2::check(&file, image::Repair::All)).unwrap().is_clean());
    assert!(!now(Header::read(&file)).unwrap().is_corrupt());
}
