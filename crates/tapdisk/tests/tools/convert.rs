//! Copies: every byte, no more space than needed, and images that QEMU finds sound.

use std::os::unix::fs::MetadataExt;

use crate::folder::{FORMATS, Folder};

#[test]
fn a_disk_is_the_same_in_every_format_from_every_format() {
    let folder = Folder::new();
    folder.disk("disk.raw");
    for (from, qemu_from, options) in FORMATS {
        let source = format!("source.{from}");
        let words = [&["convert", "-f", "raw", "-O", qemu_from], options, &["disk.raw", &source]].concat();
        folder.qemu_img(&words);
        for (to, qemu_to, _) in FORMATS {
            let target = format!("target.{to}");
            folder.tapdisk(&["convert", "--force", "-f", from, "-O", to, &source, &target]);
            folder.same(("disk.raw", "raw"), (&target, qemu_to));
        }
    }
}

#[test]
fn an_image_of_ours_is_read_by_qemu_and_back() {
    let folder = Folder::new();
    folder.disk("disk.raw");
    for (format, qemu, options) in [
        ("qcow", "qcow", "cluster_size=512"),
        ("qcow", "qcow", "cluster_size=64K"),
        ("qcow2", "qcow2", "cluster_size=512"),
        ("qcow2", "qcow2", "cluster_size=2M,compat=0.10"),
        ("qcow2", "qcow2", "extended_l2=on,refcount_bits=1"),
        ("qcow2", "qcow2", "preallocation=metadata"),
        ("qcow2", "qcow2", "lazy_refcounts=on,preallocation=falloc"),
        ("vhd", "vpc", "subformat=fixed"),
        ("vhd", "vpc", "block_size=4K"),
        ("raw", "raw", "preallocation=full"),
    ] {
        folder.tapdisk(&["convert", "--force", "-O", format, "-o", options, "disk.raw", "copy"]);
        folder.same(("disk.raw", "raw"), ("copy", qemu));
        folder.tapdisk(&["convert", "--force", "-f", format, "copy", "back.raw"]);
        // Some have whole sectors only.
        folder.same(("disk.raw", "raw"), ("back.raw", "raw"));
    }
}

#[test]
fn compressed_images_are_sound_whatever_their_shape() {
    let folder = Folder::new();
    folder.disk("disk.raw");
    for options in [
        "compat=1.1",
        "compat=0.10",
        "compression_type=zstd",
        "cluster_size=512",
        "cluster_size=512,refcount_bits=64,compression_type=zstd",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=2,cluster_size=16K,extended_l2=on",
    ] {
        folder.tapdisk(&["convert", "--force", "-c", "-O", "qcow2", "-o", options, "disk.raw", "copy.qcow2"]);
        folder.same(("disk.raw", "raw"), ("copy.qcow2", "qcow2"));
        let check = folder.qemu_img(&["check", "--output=json", "copy.qcow2"]).json();
        assert!(check["compressed-clusters"].as_u64().unwrap() > 0, "{options}: {check}");
        assert_eq!(check["leaks"].as_u64().unwrap_or(0), 0, "{options}");
        // And we read what we made.
        folder.tapdisk(&["convert", "--force", "copy.qcow2", "back.raw"]);
        folder.same(("disk.raw", "raw"), ("back.raw", "raw"));
    }
    folder.refuses(&["convert", "-c", "-O", "vhd", "disk.raw", "x.vhd"], 1, &["-c goes with -O qcow2"]);
}

#[test]
fn a_large_hole_takes_neither_space_nor_time() {
    let folder = Folder::new();
    let file = std::fs::File::create(folder.path("large.raw")).unwrap();
    file.set_len(1 << 40).unwrap();
    folder.qemu_io("raw", "large.raw", &["write -P 5 512G 64k"]);
    for (format, qemu, words) in [
        ("raw", "raw", &[][..]),
        ("qcow2", "qcow2", &[]),
        ("qcow2", "qcow2", &["-c"]),
        ("vhd", "vpc", &["-o", "force_size=on"]),
    ] {
        let all = [&["convert", "--force", "-O", format], words, &["large.raw", "copy"]].concat();
        folder.tapdisk(&all);
        let blocks = std::fs::metadata(folder.path("copy")).unwrap().blocks();
        assert!(blocks * 512 < 24 << 20, "{format}: {blocks} blocks");
        folder.qemu_io(qemu, "copy", &["read -P 5 512G 64k", "read -P 0 511G 64k"]);
    }
}

#[test]
fn chains_become_one_image() {
    let folder = Folder::new();
    folder.disk("base.raw");
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2", "16M"]);
    folder.qemu_io("qcow2", "top.qcow2", &["write -P 9 1M 100k", "write -z 3M 1M", "write -P 8 15M 64k"]);
    for (format, qemu, _) in FORMATS {
        folder.tapdisk(&["convert", "--force", "-O", format, "top.qcow2", "copy"]);
        folder.same(("top.qcow2", "qcow2"), ("copy", qemu));
    }
}

#[test]
fn what_exists_stays_unless_force_is_used() {
    let folder = Folder::new();
    folder.disk("disk.raw");
    std::fs::write(folder.path("precious"), "words").unwrap();
    std::fs::write(folder.path("empty"), "").unwrap();
    for words in [vec!["convert", "disk.raw", "precious"], vec!["create", "precious", "1M"]] {
        folder.refuses(&words, 1, &["precious exists", "--force"]);
        assert_eq!(std::fs::read(folder.path("precious")).unwrap(), b"words");
    }
    folder.refuses(&["convert", "--force", "disk.raw", "disk.raw"], 1, &["is what is to be copied"]);
    folder.tapdisk(&["convert", "disk.raw", "empty"]);
    folder.same(("disk.raw", "raw"), ("empty", "raw"));
    assert_eq!(folder.names(), ["disk.raw", "empty", "precious"]);
}
