//! Checks: exit statuses as those of qemu-img, and repairs.

use std::os::unix::fs::FileExt;

use crate::folder::{FORMATS, Folder};

/// Sets the count of a cluster of a qcow2 image with clusters of 64 KiB, whose first refcount block is where the first entry
/// of the table says.
fn set_count(folder: &Folder, name: &str, cluster: u64, count: u16) {
    let file = std::fs::File::options().read(true).write(true).open(folder.path(name)).unwrap();
    let long = |at| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = long(long(48));
    file.write_all_at(&count.to_be_bytes(), block + cluster * 2).unwrap();
}

#[test]
fn the_exit_status_says_what_was_found() {
    let folder = Folder::new();
    folder.disk("disk.raw");
    for (format, qemu, options) in FORMATS {
        let name = format!("sound.{format}");
        folder.qemu_img(&[&["convert", "-f", "raw", "-O", qemu], options, &["disk.raw", &name]].concat());
        let expected = if format == "raw" { 63 } else { 0 };
        assert_eq!(folder.run(&["check", "-f", format, &name]).code, Some(expected), "{format}");
    }
    folder.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "disk.raw", "leaky.qcow2"]);
    let end = std::fs::metadata(folder.path("leaky.qcow2")).unwrap().len().div_ceil(65536);
    std::fs::copy(folder.path("leaky.qcow2"), folder.path("broken.qcow2")).unwrap();
    // A cluster at its end that nothing refers to.
    let leaky = std::fs::File::options().write(true).open(folder.path("leaky.qcow2")).unwrap();
    leaky.set_len((end + 1) * 65536).unwrap();
    set_count(&folder, "leaky.qcow2", end, 1);
    set_count(&folder, "broken.qcow2", end - 1, 0);
    for (name, code) in [("leaky.qcow2", 3), ("broken.qcow2", 2)] {
        let qemu =
            std::process::Command::new("qemu-img").arg("check").arg(folder.path(name)).output().unwrap();
        assert_eq!(qemu.status.code(), Some(code), "{name}");
        let ended = folder.run(&["check", "--json", name]);
        assert_eq!(ended.code, Some(code), "{ended:?}");
        let found = ended.json();
        assert_eq!((found["format"].as_str(), found["filename"].as_str()), (Some("qcow2"), Some(name)));
        let count = |key: &str| found[key].as_u64().unwrap();
        assert_eq!((count("leaks"), count("corruptions") > 0), (u64::from(code == 3), code == 2), "{found}");
        // Nothing was changed.
        assert_eq!(folder.run(&["check", name]).code, Some(code));
    }
    // Giving back leaks does not touch what is broken.
    assert_eq!(folder.run(&["check", "--repair", "leaks", "broken.qcow2"]).code, Some(2));
    let repaired = folder.tapdisk(&["check", "-r", "leaks", "leaky.qcow2"]);
    assert!(repaired.stdout.contains("1 leaks were given back"), "{repaired:?}");
    folder.tapdisk(&["check", "--repair", "all", "broken.qcow2"]);
    for name in ["leaky.qcow2", "broken.qcow2"] {
        folder.tapdisk(&["check", name]);
        folder.same(("disk.raw", "raw"), (name, "qcow2"));
    }
}

#[test]
fn what_is_no_image_is_no_clean_one() {
    let folder = Folder::new();
    std::fs::write(folder.path("noise"), [7; 4096]).unwrap();
    std::fs::write(folder.path("empty"), "").unwrap();
    folder.refuses(&["check", "noise"], 1, &["noise begins like no image"]);
    folder.refuses(&["check", "-f", "qcow2", "noise"], 1, &["cannot check noise", "no qcow2 image"]);
    folder.refuses(&["check", "empty"], 1, &["empty"]);
    folder.refuses(&["check", "missing"], 1, &["missing does not exist"]);
}
