//! Odd wishes: refused in words before anything is changed, or done as users of qemu-img expect.

use std::os::unix::fs::{MetadataExt, symlink};

use crate::folder::Folder;

/// `MiB`, in bytes.
const MIB: u64 = 1 << 20;

#[test]
fn the_options_of_a_format_are_told_without_an_image() {
    let folder = Folder::new();
    for (format, option) in [("raw", "preallocation"), ("qcow2", "data_file_raw"), ("vhd", "block_size")] {
        let ended = folder.tapdisk(&["create", "-f", format, "-o", "help"]);
        assert!(ended.stdout.contains(option), "{ended:?}");
    }
    folder.refuses(&["create", "-f", "qcow2"], 1, &["which image", "FILE"]);
    assert!(folder.names().is_empty());
}

#[test]
fn places_where_nothing_can_be_made_are_told() {
    let folder = Folder::new();
    symlink("nowhere", folder.path("link")).unwrap();
    let long = "x".repeat(253);
    for (target, said) in [
        ("missing/disk", "missing is no folder"),
        ("link", "link is a link to nowhere"),
        (&long, "File name too long"),
        (".", "is neither a file nor a block device"),
        ("/dev/null", "is neither a file nor a block device"),
    ] {
        let ended = folder.run(&["create", target, "1M"]);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.contains(said), "{ended:?}");
        // What the system says is said once, and nothing of what is not there.
        assert!(
            ended.stderr.matches("os error").count() <= 1 && !ended.stderr.contains("stays"),
            "{ended:?}"
        );
    }
    assert!(folder.path("link").is_symlink() && folder.names() == ["link"], "{:?}", folder.names());
}

#[test]
fn an_image_is_put_only_over_what_it_can_name() {
    let folder = Folder::new();
    folder.tapdisk(&["create", "-f", "qcow2", "base.qcow2", "1M"]);
    folder.tapdisk(&["create", "base.raw", "1M"]);
    folder.tapdisk(&["create", "unnamed", "1M"]);
    folder.tapdisk(&["create", "a: b.raw", "1M"]);
    // Blktap takes a parent without an identifier for raw: a commit would write the disk's bytes over the tables.
    folder.refuses(&["create", "-f", "vhd", "-b", "base.qcow2", "top"], 1, &["taken for raw", "-f qcow2"]);
    // Nor has qcow a place for the format.
    folder.refuses(
        &["create", "-f", "qcow", "-b", "unnamed", "-F", "raw", "top"],
        1,
        &["taken for", "-f qcow2"],
    );
    folder.refuses(
        &["create", "-f", "qcow", "-b", "base.raw", "-F", "qcow2", "top"],
        1,
        &["cannot be below"],
    );
    // QEMU takes what is before a colon for a protocol.
    for words in [
        &["create", "-f", "qcow2", "-b", "a: b.raw", "-F", "raw", "top"][..],
        &["rebase", "-u", "-b", "a: b.raw", "-F", "raw", "base.qcow2"],
        &["rebase", "-b", "a: b.raw", "-F", "raw", "base.qcow2"],
    ] {
        folder.refuses(words, 1, &["would be no path", "`./`"]);
    }
    assert_eq!(folder.names(), ["a: b.raw", "base.qcow2", "base.raw", "unnamed"]);
    for (format, qemu, name, below) in
        [("qcow2", "qcow2", "top ü.qcow2", "./a: b.raw"), ("qcow2", "qcow2", "file.qcow2", "file:a: b.raw")]
    {
        folder.tapdisk(&["create", "-f", format, "-b", below, "-F", "raw", name]);
        folder.same((name, qemu), ("./a: b.raw", "raw"));
        assert_eq!(folder.tapdisk(&["info", "--json", "--chain", name]).json().as_array().unwrap().len(), 2);
    }
    folder.tapdisk(&["create", "-f", "vhd", "-b", "a: b.raw", "top.vhd"]);
    folder.tapdisk(&["convert", "top.vhd", "copy.raw"]);
}

#[test]
fn an_image_is_never_put_below_itself() {
    let folder = Folder::new();
    folder.tapdisk(&["create", "base.raw", "1M"]);
    folder.tapdisk(&["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "middle.qcow2"]);
    folder.tapdisk(&["create", "-f", "qcow2", "-b", "middle.qcow2", "top.qcow2"]);
    for words in [
        &["create", "--force", "-f", "qcow2", "-b", "top.qcow2", "top.qcow2"][..],
        &["create", "--force", "-f", "qcow2", "-b", "top.qcow2", "base.raw"],
        &["rebase", "-b", "top.qcow2", "top.qcow2"],
        &["rebase", "-b", "top.qcow2", "-F", "qcow2", "middle.qcow2"],
    ] {
        folder.refuses(words, 1, &["cannot be below itself", "is the same file"]);
    }
    let chain = folder.tapdisk(&["info", "--json", "--chain", "top.qcow2"]).json();
    assert_eq!(chain.as_array().unwrap().len(), 3);
}

#[test]
fn what_has_to_be_allowed_is_told_when_it_is_made() {
    let folder = Folder::new();
    std::fs::create_dir(folder.path("vm")).unwrap();
    folder.tapdisk(&["create", "base.raw", "1M"]);
    let words = ["create", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", "vm/top.qcow2"];
    let ended = folder.tapdisk(&words);
    assert!(ended.stderr.contains("--allow-folder"), "{ended:?}");
    folder.refuses(&["map", "vm/top.qcow2"], 1, &["--allow-folder"]);
    folder.tapdisk(&["map", "--allow-folder", ".", "vm/top.qcow2"]);
    let ended = folder.tapdisk(&[&words[..], &["--force", "--allow-folder", "."]].concat());
    assert!(ended.stderr.is_empty(), "{ended:?}");
    let ended =
        folder.tapdisk(&["create", "-f", "qcow2", "-o", "data_file=data.raw", "vm/apart.qcow2", "1M"]);
    assert!(ended.stderr.contains("data.raw is not in the folder"), "{ended:?}");
    folder.refuses(&["map", "vm/apart.qcow2"], 1, &["\"data.raw\"", "--allow-folder"]);
    folder.tapdisk(&["map", "--allow-folder", ".", "vm/apart.qcow2"]);
}

#[test]
fn only_a_qcow2_image_is_put_over_another_and_no_raw_disk_is_taken_for_one() {
    let folder = Folder::new();
    folder.tapdisk(&["create", "base.raw", "1M"]);
    folder.tapdisk(&["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"]);
    // A guest has written another format's header to its raw disk.
    std::fs::copy(folder.path("top.qcow2"), folder.path("guest.raw")).unwrap();
    let before = std::fs::read(folder.path("guest.raw")).unwrap();
    for words in [&["rebase", "-u", "-b", "other.raw", "guest.raw"][..], &["rebase", "-b", "", "guest.raw"]] {
        folder.refuses(words, 1, &["guest.raw is a raw image"]);
    }
    assert!(before == std::fs::read(folder.path("guest.raw")).unwrap());
    folder.tapdisk(&["create", "-f", "vhd", "-b", "base.raw", "top.vhd"]);
    folder.tapdisk(&["create", "-f", "qcow", "-b", "base.raw", "top.qcow"]);
    for (format, name) in [("vhd", "top.vhd"), ("qcow", "top.qcow")] {
        for words in [&["rebase", "-u", "-b", "base.raw", name][..], &["rebase", "-b", "", name]] {
            let said = format!("is a {format} image: only those of qcow2");
            folder.refuses(words, 1, &[&said, "tapdisk convert"]);
        }
    }
}

#[test]
fn sizes_may_be_taken_away_and_something_is_left() {
    let folder = Folder::new();
    folder.tapdisk(&["create", "-f", "qcow2", "disk.qcow2", "4M"]);
    folder.refuses(&["resize", "disk.qcow2", "--", "-1M"], 1, &["--shrink"]);
    folder.tapdisk(&["resize", "--shrink", "disk.qcow2", "--", "-1M"]);
    assert_eq!(folder.qemu_img(&["info", "--output=json", "disk.qcow2"]).json()["virtual-size"], 3 * MIB);
    folder.refuses(&["resize", "--shrink", "disk.qcow2", "--", "-3M"], 1, &["nothing would be left"]);
    folder.refuses(&["resize", "disk.qcow2", "+7E"], 1, &["bytes"]);
    folder.refuses(&["create", "-f", "vhd", "disk.vhd", "3T"], 1, &["a VHD has at most", "qcow2"]);
    assert_eq!(folder.names(), ["disk.qcow2"]);
}

/// A full store must fail the write that needs space, and not a flush after it.
#[test]
fn a_thin_image_has_space_for_its_first_tables() {
    let folder = Folder::new();
    // 2^40 bytes in tables of 512 entries for clusters of 4 KiB, and of 8192 for 64 KiB; 8 bytes for each; for qcow2 a table
    // and a block of counts, too.
    for (format, expected) in [("qcow", (1 << 40 >> 21) * 8), ("qcow2", (1 << 40 >> 29) * 8 + (128 << 10))] {
        folder.tapdisk(&["create", "-f", format, format, "1T"]);
        let blocks = std::fs::metadata(folder.path(format)).unwrap().blocks();
        assert!(blocks * 512 >= expected, "{format}: {blocks} blocks");
        assert!(blocks * 512 < expected + (1 << 20), "{format}: {blocks} blocks");
    }
}

#[test]
fn a_data_file_is_made_and_found_where_qemu_looks_for_it() {
    let folder = Folder::new();
    folder.disk("disk.raw");
    std::fs::create_dir(folder.path("vm")).unwrap();
    for raw in ["on", "off"] {
        let option = format!("data_file=vm/data.raw,data_file_raw={raw}");
        folder.tapdisk(&["create", "--force", "-f", "qcow2", "-o", &option, "vm/disk.qcow2", "16M"]);
        folder.qemu_img(&["convert", "-n", "-f", "raw", "-O", "qcow2", "disk.raw", "vm/disk.qcow2"]);
        folder.same(("disk.raw", "raw"), ("vm/disk.qcow2", "qcow2"));
        let theirs = folder.qemu_img(&["info", "--output=json", "vm/disk.qcow2"]).json();
        let ours = folder.tapdisk(&["info", "--json", "vm/disk.qcow2"]).json();
        assert_eq!(ours["format-specific"], theirs["format-specific"]);
        assert_eq!(theirs["format-specific"]["data"]["data-file-raw"], raw == "on");
        folder.tapdisk(&["convert", "--force", "vm/disk.qcow2", "copy.raw"]);
        folder.same(("copy.raw", "raw"), ("vm/disk.qcow2", "qcow2"));
        if raw == "on" {
            folder.same(("copy.raw", "raw"), ("vm/data.raw", "raw"));
        }
    }
    // Who works elsewhere finds it beside the image.
    std::fs::rename(folder.path("vm"), folder.path("new")).unwrap();
    folder.refuses(&["map", "new/disk.qcow2"], 1, &["the data file \"vm/data.raw\"", "does not exist"]);
    std::fs::create_dir(folder.path("new/vm")).unwrap();
    std::fs::rename(folder.path("new/data.raw"), folder.path("new/vm/data.raw")).unwrap();
    folder.tapdisk(&["convert", "--force", "new/disk.qcow2", "again.raw"]);
    folder.same(("copy.raw", "raw"), ("again.raw", "raw"));
    // Where there are two it is not guessed.
    std::fs::create_dir(folder.path("vm")).unwrap();
    std::fs::copy(folder.path("again.raw"), folder.path("vm/data.raw")).unwrap();
    folder.refuses(&["map", "--allow-folder", ".", "new/disk.qcow2"], 1, &["which is it?"]);
    folder.refuses(
        &["convert", "--force", "new/disk.qcow2", "new/vm/data.raw"],
        1,
        &["is what is to be copied"],
    );
}

#[test]
fn a_raw_data_file_has_nothing_below_it() {
    let folder = Folder::new();
    folder.tapdisk(&["create", "base.raw", "1M"]);
    let option = "data_file=data.raw,data_file_raw=on";
    folder.refuses(
        &["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "-o", option, "disk.qcow2"],
        1,
        &["a raw data file cannot show"],
    );
    assert_eq!(folder.names(), ["base.raw"]);
    folder.tapdisk(&["create", "-f", "qcow2", "-o", option, "disk.qcow2", "1M"]);
    for words in [&["rebase"][..], &["rebase", "-u"]] {
        let all = [words, &["-b", "base.raw", "-F", "raw", "disk.qcow2"]].concat();
        folder.refuses(&all, 1, &["has a raw data file"]);
    }
    folder.refuses(&["create", "-f", "qcow2", "-o", "data_file_raw=on", "x", "1M"], 1, &["no data file"]);
    folder.refuses(
        &["create", "-f", "qcow2", "-o", "data_file=data.raw", "x", "1M"],
        1,
        &["data.raw exists"],
    );
    assert_eq!(folder.names(), ["base.raw", "data.raw", "disk.qcow2"]);
}

#[test]
fn bytes_that_were_cut_off_an_image_are_an_error_and_never_zeroes() {
    let folder = Folder::new();
    // A VHD whose last block is not there at all is refused; this one ends within it.
    for (format, qemu, len) in
        [("qcow2", "qcow2", 2 * MIB), ("qcow", "qcow", 2 * MIB), ("vhd", "vpc", 3 * MIB)]
    {
        folder.qemu_img(&["create", "-q", "-f", qemu, "disk", "4M"]);
        folder.qemu_io(qemu, "disk", &["write -P 5 0 4M"]);
        let disk = std::fs::File::options().write(true).open(folder.path("disk")).unwrap();
        disk.set_len(len).unwrap();
        folder.refuses(
            &["convert", "-f", format, "disk", "copy"],
            1,
            &["copy was not made", "the file", "EIO"],
        );
        folder.refuses(&["map", "-f", format, "disk"], 1, &["cannot read the map of disk", "EIO"]);
        assert_eq!(folder.run(&["check", "-f", format, "disk"]).code, Some(2), "{format}");
        assert_eq!(folder.names(), ["disk"]);
    }
}

#[test]
fn options_that_a_copy_cannot_have_are_refused() {
    let folder = Folder::new();
    folder.tapdisk(&["create", "disk.raw", "1M"]);
    for (option, said) in [
        ("backing_file=disk.raw", "tapdisk create -b disk.raw"),
        ("size=2M", "as large as the disk"),
        ("data_file=data.raw", "tapdisk create"),
    ] {
        folder.refuses(&["convert", "-O", "qcow2", "-o", option, "disk.raw", "copy"], 1, &[said]);
    }
    assert_eq!(folder.names(), ["disk.raw"]);
}

#[test]
fn a_raw_disk_that_begins_like_another_format_is_said_to() {
    let folder = Folder::new();
    folder.tapdisk(&["create", "-f", "qcow2", "guest.raw", "1M"]);
    let ended = folder.tapdisk(&["info", "--json", "guest.raw"]);
    assert_eq!(ended.json()["format"], "raw");
    assert!(ended.stderr.contains("begins like qcow2: `-f qcow2`"), "{ended:?}");
    assert!(folder.tapdisk(&["info", "-f", "qcow2", "guest.raw"]).stderr.is_empty());
}

#[test]
fn a_name_alone_leaves_an_image_that_can_be_opened() {
    let folder = Folder::new();
    folder.tapdisk(&["create", "base.raw", "1M"]);
    folder.tapdisk(&["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"]);
    let before = std::fs::read(folder.path("top.qcow2")).unwrap();
    // As qemu-img has it; else the format that was written down would be lost, or be wrong.
    folder.refuses(&["rebase", "-u", "-b", "moved.raw", "top.qcow2"], 1, &["which format", "-F"]);
    symlink("top.qcow2", folder.path("link")).unwrap();
    for name in ["top.qcow2", "link", "./top.qcow2"] {
        folder.refuses(
            &["rebase", "-u", "-b", name, "-F", "qcow2", "top.qcow2"],
            1,
            &["cannot be below itself"],
        );
    }
    assert!(before == std::fs::read(folder.path("top.qcow2")).unwrap());
    folder.tapdisk(&["rebase", "-u", "-b", "", "top.qcow2"]);
    folder.tapdisk(&["rebase", "-u", "-b", "base.raw", "-F", "raw", "top.qcow2"]);
    folder.tapdisk(&["map", "top.qcow2"]);
}

#[test]
fn names_in_an_image_give_no_orders_to_a_terminal() {
    let folder = Folder::new();
    let name = "\u{1b}[2Jb\n.raw";
    let words = ["create", "-u", "-f", "qcow2", "-b", name, "-F", "raw", "top.qcow2", "1M"];
    folder.tapdisk(&words);
    let shown = r"\u{1b}[2Jb\n.raw";
    let is_harmless = |text: &str, lines: usize| {
        assert!(!text.contains('\u{1b}') && text.contains(shown), "{text}");
        assert_eq!(text.lines().count(), lines, "{text}");
    };
    let ended = folder.run(&["map", "top.qcow2"]);
    assert_eq!(ended.code, Some(1));
    is_harmless(&ended.stderr, 1);
    let ended = folder.run(&["serve", "top.qcow2", "--nbd", "unix:socket", "--state-dir", "state"]);
    assert_eq!(ended.code, Some(1));
    is_harmless(ended.stderr.lines().last().unwrap(), 1);
    std::fs::write(folder.path(name), vec![1; 1 << 20]).unwrap();
    is_harmless(&folder.tapdisk(&["map", "top.qcow2"]).stdout, 2);
}

#[test]
fn a_format_is_asked_for_by_the_option_that_says_it() {
    let folder = Folder::new();
    std::fs::write(folder.path("plain"), [7; 4096]).unwrap();
    folder.tapdisk(&["create", "-f", "qcow2", "top.qcow2", "1M"]);
    for words in
        [&["create", "-f", "qcow2", "-b", "plain", "new"][..], &["rebase", "-b", "plain", "top.qcow2"]]
    {
        folder.refuses(words, 1, &["plain begins like no image", "-F raw"]);
    }
    folder.refuses(&["map", "plain"], 1, &["plain begins like no image", "-f raw"]);
}

/// tmpfs has no FALLOC_FL_ZERO_RANGE.
#[test]
fn space_is_reserved_where_zeroes_cannot_be() {
    let folder = Folder::new();
    let shared = tempfile::tempdir_in("/dev/shm").unwrap();
    for format in ["raw", "qcow2", "vhd"] {
        let path = shared.path().join(format);
        let words = ["create", "-f", format, "-o", "preallocation=falloc", path.to_str().unwrap(), "4M"];
        folder.tapdisk(&words);
        let made = std::fs::metadata(&path).unwrap();
        assert!(made.blocks() * 512 >= 4 * MIB && made.len() >= 4 * MIB, "{format}: {made:?}");
        assert!(format != "raw" || std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
    }
}

#[test]
fn what_a_guest_writes_into_a_fixed_vhd_decides_nothing() {
    let folder = Folder::new();
    folder.tapdisk(&["create", "-f", "qcow2", "-o", "data_file=victim.raw", "trap", "1M"]);
    folder.tapdisk(&["create", "-f", "vhd", "-o", "subformat=fixed", "disk", "1M"]);
    let trap = std::fs::read(folder.path("trap")).unwrap();
    let mut bytes = std::fs::read(folder.path("disk")).unwrap();
    bytes[..trap.len()].copy_from_slice(&trap);
    std::fs::write(folder.path("disk"), &bytes).unwrap();
    std::fs::write(folder.path("disk.vhd"), &bytes).unwrap();
    for words in [
        &["info", "disk"][..],
        &["check", "disk"],
        &["map", "disk"],
        &["convert", "-O", "raw", "disk", "copy"],
        &["resize", "disk", "2M"],
    ] {
        folder.refuses(words, 1, &["qcow2", "VHD", "vhd or -", "says which it is"]);
    }
    assert_eq!(folder.names(), ["disk", "disk.vhd", "trap", "victim.raw"]);
    for words in [&["disk.vhd"][..], &["-f", "vhd", "disk"]] {
        let ended = folder.tapdisk(&[&["info", "--json"], words].concat());
        assert_eq!(ended.json()["format"], "vhd");
        folder.tapdisk(&[&["check"], words].concat());
        folder.tapdisk(&[&["convert", "-O", "raw"], words, &["copy"]].concat());
        assert!(std::fs::read(folder.path("copy")).unwrap() == bytes[..MIB as usize]);
        std::fs::remove_file(folder.path("copy")).unwrap();
    }
}
