//! Images over others: made, committed, put over other ones, resized, and always the same disk.

use crate::folder::Folder;

#[test]
fn an_image_over_another_is_made_as_qemu_img_makes_it() {
    let folder = Folder::new();
    folder.disk("base.raw");
    folder.qemu_img(&["convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", "base.raw", "base.vhd"]);
    for (format, qemu, below) in
        [("qcow2", "qcow2", "base.raw"), ("qcow2", "qcow2", "base.vhd"), ("qcow", "qcow", "base.raw")]
    {
        folder.tapdisk(&["create", "--force", "-f", format, "-b", below, "top"]);
        folder.same(("top", qemu), ("base.raw", "raw"));
        folder.tapdisk(&["convert", "--force", "-f", format, "top", "copy.raw"]);
        folder.same(("copy.raw", "raw"), ("base.raw", "raw"));
    }
    folder.tapdisk(&["create", "-f", "vhd", "-b", "base.vhd", "top.vhd"]);
    folder.tapdisk(&["convert", "--force", "top.vhd", "copy.raw"]);
    folder.same(("copy.raw", "raw"), ("base.raw", "raw"));
    folder.refuses(
        &["create", "-f", "raw", "-b", "base.raw", "x", "1M"],
        1,
        &["base.raw cannot be below it"],
    );
    folder.refuses(
        &["create", "-f", "qcow2", "-b", "none", "x"],
        1,
        &["none cannot be below x", "does not exist"],
    );
    folder.refuses(&["create", "-f", "qcow2", "-b", "none", "-u", "x"], 1, &["how large"]);
    folder.tapdisk(&["create", "-f", "qcow2", "-b", "later.raw", "-F", "raw", "-u", "x", "1M"]);
    assert!(!folder.names().iter().any(|name| name.ends_with(".part")), "{:?}", folder.names());
}

/// A base, and an image over it that has data, zeroes and its own end.
fn pair(folder: &Folder, size: &str) {
    folder.disk("base.raw");
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2", size]);
    folder.qemu_io("qcow2", "top.qcow2", &["write -P 9 1M 100k", "write -z 3M 1M", "write -P 8 7000k 4k"]);
}

#[test]
fn a_commit_brings_all_of_an_image_into_the_one_below() {
    for size in ["12M", "16M"] {
        let folder = Folder::new();
        pair(&folder, size);
        folder.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "before.raw"]);
        folder.tapdisk(&["commit", "top.qcow2"]);
        folder.same(("top.qcow2", "qcow2"), ("before.raw", "raw"));
        // The image below may be longer than the one above.
        let len = std::fs::metadata(folder.path("before.raw")).unwrap().len() as usize;
        let base = std::fs::read(folder.path("base.raw")).unwrap();
        assert!(base[..len] == std::fs::read(folder.path("before.raw")).unwrap());
        // A second time changes nothing.
        folder.tapdisk(&["commit", "top.qcow2"]);
        assert!(base == std::fs::read(folder.path("base.raw")).unwrap());
    }
    let folder = Folder::new();
    folder.disk("disk.raw");
    folder.refuses(&["commit", "disk.raw"], 1, &["disk.raw has no image below it"]);
}

#[test]
fn a_commit_into_the_middle_leaves_the_base_alone() {
    let folder = Folder::new();
    pair(&folder, "12M");
    let base = std::fs::read(folder.path("base.raw")).unwrap();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", "third.qcow2", "14M"]);
    folder.qemu_io("qcow2", "third.qcow2", &["write -P 6 13M 4k", "write -P 5 1100k 4k", "write -z 0 64k"]);
    folder.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "third.qcow2", "before.raw"]);
    folder.tapdisk(&["commit", "third.qcow2"]);
    folder.same(("top.qcow2", "qcow2"), ("before.raw", "raw"));
    folder.same(("third.qcow2", "qcow2"), ("before.raw", "raw"));
    assert!(base == std::fs::read(folder.path("base.raw")).unwrap());
}

#[test]
fn a_rebase_changes_what_is_below_and_not_the_disk() {
    let folder = Folder::new();
    pair(&folder, "16M");
    folder.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "before.raw"]);
    // Shorter, longer and other bytes than the old one.
    folder.disk("other.raw");
    folder.qemu_io("raw", "other.raw", &["write -P 77 2M 3M", "write -P 78 10M 4k"]);
    let other = std::fs::File::options().write(true).open(folder.path("other.raw")).unwrap();
    other.set_len(11 << 20).unwrap();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "large.qcow2", "32M"]);
    folder.qemu_io("qcow2", "large.qcow2", &["write -P 79 0 32M"]);
    for (name, format) in [("other.raw", "raw"), ("large.qcow2", "qcow2"), ("base.raw", "raw")] {
        folder.tapdisk(&["rebase", "-b", name, "-F", format, "top.qcow2"]);
        folder.same(("top.qcow2", "qcow2"), ("before.raw", "raw"));
        let info = folder.qemu_img(&["info", "--output=json", "top.qcow2"]).json();
        let below = (info["backing-filename"].as_str(), info["backing-filename-format"].as_str());
        assert_eq!(below, (Some(name), Some(format)));
    }
    folder.tapdisk(&["rebase", "-b", "", "top.qcow2"]);
    assert!(
        folder.qemu_img(&["info", "--output=json", "top.qcow2"]).json().get("backing-filename").is_none()
    );
    folder.same(("top.qcow2", "qcow2"), ("before.raw", "raw"));
    // Only a name.
    folder.tapdisk(&["rebase", "-u", "-b", "nowhere.raw", "-F", "raw", "top.qcow2"]);
    assert_eq!(folder.tapdisk(&["info", "--json", "top.qcow2"]).json()["backing-filename"], "nowhere.raw");
    folder.refuses(&["rebase", "-b", "base.raw", "top.qcow2"], 1, &["top.qcow2 cannot be opened", "`-u`"]);
}

#[test]
fn what_snapshots_show_is_not_changed_from_below() {
    let folder = Folder::new();
    pair(&folder, "16M");
    folder.qemu_img(&["snapshot", "-c", "kept", "top.qcow2"]);
    folder.qemu_io("qcow2", "top.qcow2", &["write -P 91 0 2M"]);
    folder.qemu_img(&["create", "-q", "-f", "raw", "other.raw", "16M"]);
    let all = ["top.qcow2", "base.raw"].map(|name| std::fs::read(folder.path(name)).unwrap());
    for words in [&["commit"][..], &["rebase", "-b", "other.raw", "-F", "raw"], &["rebase", "-b", ""]] {
        folder.refuses(&[words, &["top.qcow2"]].concat(), 1, &["has 1 snapshot within", "snapshot -l"]);
    }
    assert!(all == ["top.qcow2", "base.raw"].map(|name| std::fs::read(folder.path(name)).unwrap()));
    // The same bytes under another name.
    std::fs::rename(folder.path("base.raw"), folder.path("moved.raw")).unwrap();
    folder.tapdisk(&["rebase", "-u", "-b", "moved.raw", "-F", "raw", "top.qcow2"]);
    // Without it nothing is in the way.
    folder.tapdisk(&["snapshot", "-d", "kept", "top.qcow2"]);
    folder.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "before.raw"]);
    folder.tapdisk(&["rebase", "-b", "other.raw", "-F", "raw", "top.qcow2"]);
    folder.tapdisk(&["commit", "top.qcow2"]);
    folder.same(("other.raw", "raw"), ("before.raw", "raw"));
}

#[test]
fn a_disk_gets_the_size_that_it_is_told() {
    let folder = Folder::new();
    folder.disk("disk.raw");
    let size = std::fs::metadata(folder.path("disk.raw")).unwrap().len();
    for (format, qemu) in [("raw", "raw"), ("qcow", "qcow"), ("qcow2", "qcow2"), ("vhd", "vpc")] {
        folder.tapdisk(&["convert", "--force", "-O", format, "disk.raw", "copy"]);
        folder.tapdisk(&["resize", "-f", format, "copy", "+1M"]);
        let info = folder.qemu_img(&["info", "--output=json", "-f", qemu, "copy"]).json();
        assert_eq!(info["virtual-size"].as_u64(), Some(size + (1 << 20)), "{format}");
        folder.same(("disk.raw", "raw"), ("copy", qemu));
        folder.refuses(&["resize", "-f", format, "copy", "1M"], 1, &["--shrink"]);
    }
    for format in ["raw", "qcow2"] {
        folder.tapdisk(&["convert", "--force", "-O", format, "disk.raw", "copy"]);
        folder.tapdisk(&["resize", "--shrink", "-f", format, "copy", "5M"]);
        folder.tapdisk(&["resize", "-f", format, "copy", "6M"]);
        folder.qemu_img(&["check", "-f", "qcow2", "copy"].map(|word| {
            if format == "raw" && word == "check" {
                "info"
            } else if word == "qcow2" {
                format
            } else {
                word
            }
        }));
        let mut expected = std::fs::read(folder.path("disk.raw")).unwrap();
        expected.truncate(5 << 20);
        expected.resize(6 << 20, 0);
        std::fs::write(folder.path("expected.raw"), expected).unwrap();
        folder.same(("expected.raw", "raw"), ("copy", format));
    }
}

#[test]
fn what_a_longer_image_below_has_does_not_show_in_a_larger_disk() {
    let folder = Folder::new();
    pair(&folder, "8M");
    folder.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "before.raw"]);
    folder.tapdisk(&["resize", "top.qcow2", "16M"]);
    let before = std::fs::File::options().write(true).open(folder.path("before.raw")).unwrap();
    before.set_len(16 << 20).unwrap();
    folder.same(("top.qcow2", "qcow2"), ("before.raw", "raw"));
}

#[test]
fn snapshots_are_those_of_qemu_img() {
    let folder = Folder::new();
    folder.disk("disk.raw");
    folder.tapdisk(&["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    folder.tapdisk(&["snapshot", "-c", "first", "disk.qcow2"]);
    folder.qemu_io("qcow2", "disk.qcow2", &["write -P 44 0 3M"]);
    folder.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "disk.qcow2", "later.raw"]);
    folder.qemu_img(&["snapshot", "-c", "second", "disk.qcow2"]);
    let listed = folder.tapdisk(&["snapshot", "--json", "disk.qcow2"]).json();
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["first", "second"]);
    assert!(folder.tapdisk(&["snapshot", "-l", "disk.qcow2"]).stdout.contains("second"));
    let mut theirs = folder.qemu_img(&["info", "--output=json", "disk.qcow2"]).json();
    for snapshot in theirs["snapshots"].as_array_mut().unwrap() {
        // For record and replay, which is no matter of disks.
        snapshot.as_object_mut().unwrap().remove("icount");
    }
    assert_eq!(theirs["snapshots"], listed);
    folder.tapdisk(&["snapshot", "-a", "first", "disk.qcow2"]);
    folder.same(("disk.qcow2", "qcow2"), ("disk.raw", "raw"));
    folder.tapdisk(&["snapshot", "-a", "second", "disk.qcow2"]);
    folder.same(("disk.qcow2", "qcow2"), ("later.raw", "raw"));
    folder.tapdisk(&["snapshot", "-d", "first", "disk.qcow2"]);
    folder.tapdisk(&["snapshot", "-d", "second", "disk.qcow2"]);
    folder.same(("disk.qcow2", "qcow2"), ("later.raw", "raw"));
    assert_eq!(folder.tapdisk(&["snapshot", "--json", "disk.qcow2"]).json().as_array().unwrap().len(), 0);
    folder.refuses(&["snapshot", "-a", "third", "disk.qcow2"], 1, &["third"]);
    folder.refuses(&["snapshot", "-c", "first", "disk.raw"], 1, &["raw image, which has no snapshots"]);
}

#[test]
fn a_snapshot_is_meant_by_what_qemu_img_means_it_by() {
    let folder = Folder::new();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "ours.qcow2", "4M"]);
    // Their identifiers are 1, 2 and 3.
    for (name, byte) in [("2", "1"), ("1", "2"), ("x", "3")] {
        folder.qemu_io("qcow2", "ours.qcow2", &[&format!("write -P {byte} 0 1M")]);
        folder.qemu_img(&["snapshot", "-c", name, "ours.qcow2"]);
    }
    let copy = || std::fs::copy(folder.path("ours.qcow2"), folder.path("theirs.qcow2")).unwrap();
    let listed = |name: &str| folder.qemu_img(&["info", "--output=json", name]).json()["snapshots"].clone();
    for wanted in ["1", "2", "3", "x"] {
        copy();
        folder.qemu_img(&["snapshot", "-a", wanted, "theirs.qcow2"]);
        folder.tapdisk(&["snapshot", "-a", wanted, "ours.qcow2"]);
        folder.same(("ours.qcow2", "qcow2"), ("theirs.qcow2", "qcow2"));
    }
    copy();
    folder.qemu_img(&["snapshot", "-d", "1", "theirs.qcow2"]);
    folder.tapdisk(&["snapshot", "-d", "1", "ours.qcow2"]);
    assert_eq!(listed("ours.qcow2"), listed("theirs.qcow2"));
    // What is no name is an identifier.
    folder.tapdisk(&["snapshot", "-d", "3", "ours.qcow2"]);
    let left = listed("ours.qcow2");
    assert_eq!((left.as_array().unwrap().len(), &left[0]["name"]), (1, &"2".into()));
}
