//! What is told of images is what qemu-img tells of them.

use serde_json::Value;

use crate::folder::Folder;

/// What both have to say the same of.
const FACTS: [&str; 10] = [
    "virtual-size",
    "actual-size",
    "cluster-size",
    "dirty-flag",
    "filename",
    "backing-filename",
    "full-backing-filename",
    "backing-filename-format",
    "encrypted",
    "snapshots",
];

fn compare(ours: &Value, theirs: &Value) {
    let mut theirs = theirs.clone();
    for snapshot in theirs.get_mut("snapshots").and_then(Value::as_array_mut).into_iter().flatten() {
        // For record and replay, which is no matter of disks.
        snapshot.as_object_mut().unwrap().remove("icount");
    }
    for key in FACTS {
        if key == "encrypted" && theirs.get(key).is_none() {
            continue; // QEMU leaves it out where it is false
        }
        assert_eq!(ours.get(key), theirs.get(key), "{key} of {ours:#} and {theirs:#}");
    }
    let format = theirs["format"].as_str().unwrap();
    assert_eq!(ours["format"].as_str().unwrap(), if format == "vpc" { "vhd" } else { format });
}

fn images(folder: &Folder) -> Vec<(&'static str, &'static str)> {
    folder.disk("base.raw");
    folder.qemu_img(&["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "base.raw", "packed.qcow2"]);
    folder.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "packed.qcow2",
        "-F",
        "qcow2",
        "middle.qcow2",
        "16M",
    ]);
    folder.qemu_io("qcow2", "middle.qcow2", &["write -P 9 1M 100k", "write -z 3M 1M", "write -P 8 15M 64k"]);
    let words = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k,compat=0.10",
        "-b",
        "middle.qcow2",
        "-F",
        "qcow2",
    ];
    folder.qemu_img(&[&words[..], &["top.qcow2", "20M"]].concat());
    folder.qemu_io("qcow2", "top.qcow2", &["write -P 3 2M 10k", "write -P 4 18M 4k"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "sub.qcow2", "8M"]);
    folder.qemu_io("qcow2", "sub.qcow2", &["write -P 3 66k 6k", "write -z 200k 4k", "write -P 4 1M 512k"]);
    folder.qemu_img(&["snapshot", "-c", "before", "sub.qcow2"]);
    folder.qemu_img(&[
        "convert",
        "-q",
        "-f",
        "raw",
        "-O",
        "vpc",
        "-o",
        "force_size=on",
        "base.raw",
        "disk.vhd",
    ]);
    folder.qemu_img(&["convert", "-q", "-f", "raw", "-O", "qcow", "base.raw", "disk.qcow"]);
    vec![
        ("base.raw", "raw"),
        ("packed.qcow2", "qcow2"),
        ("middle.qcow2", "qcow2"),
        ("top.qcow2", "qcow2"),
        ("sub.qcow2", "qcow2"),
        ("disk.vhd", "vpc"),
        ("disk.qcow", "qcow"),
    ]
}

#[test]
fn info_has_the_facts_of_qemu_img() {
    let folder = Folder::new();
    for (name, qemu) in images(&folder) {
        let ours = folder.tapdisk(&["info", "--json", name]).json();
        let theirs = folder.qemu_img(&["info", "--output=json", "-f", qemu, name]).json();
        compare(&ours, &theirs);
        if qemu == "qcow2" {
            assert_eq!(ours["format-specific"], theirs["format-specific"]);
        }
        let words = folder.tapdisk(&["info", name]).stdout;
        assert!(words.contains(&format!("filename: {name}\n")), "{words}");
    }
    let ours = folder.tapdisk(&["info", "--output=json", "--backing-chain", "top.qcow2"]).json();
    let theirs = folder.qemu_img(&["info", "--output=json", "--backing-chain", "top.qcow2"]).json();
    assert_eq!(ours.as_array().unwrap().len(), 3);
    for (ours, theirs) in ours.as_array().unwrap().iter().zip(theirs.as_array().unwrap()) {
        compare(ours, theirs);
    }
}

#[test]
fn an_image_is_told_of_without_the_one_below_it() {
    let folder = Folder::new();
    images(&folder);
    std::fs::remove_file(folder.path("middle.qcow2")).unwrap();
    assert_eq!(folder.tapdisk(&["info", "--json", "top.qcow2"]).json()["virtual-size"], 20 << 20);
    folder.refuses(&["info", "--chain", "top.qcow2"], 1, &["\"middle.qcow2\"", "does not exist"]);
}

/// The runs that have a place: where, how long, and what place.
fn stored(map: &Value) -> Vec<[&Value; 3]> {
    let runs = map.as_array().unwrap().iter().filter(|run| run["data"] == true);
    runs.map(|run| [&run["start"], &run["length"], &run["offset"]]).collect()
}

#[test]
fn the_map_is_that_of_qemu_img() {
    let folder = Folder::new();
    for (name, qemu) in images(&folder) {
        let ours = folder.tapdisk(&["map", "--json", name]).json();
        let theirs = folder.qemu_img(&["map", "--output=json", "-f", qemu, name]).json();
        if name == "sub.qcow2" {
            // QEMU tells where bytes would be that a cluster has no subcluster for.
            assert_eq!(stored(&ours), stored(&theirs), "{name}");
        } else {
            assert_eq!(ours, theirs, "{name}");
        }
    }
    let part = ["-s", "1M", "-l", "2M"];
    let ours = folder.tapdisk(&[&["map", "--json"], &part[..], &["top.qcow2"]].concat()).json();
    let theirs = folder.qemu_img(&[&["map", "--output=json"], &part[..], &["top.qcow2"]].concat()).json();
    assert_eq!(ours, theirs);
    let ours = folder.tapdisk(&["map", "middle.qcow2"]).stdout;
    assert!(
        ours.lines().any(|line| line.starts_with("0x100000 ") && line.ends_with("middle.qcow2")),
        "{ours}"
    );
    // Over its end there is nothing.
    assert_eq!(folder.tapdisk(&["map", "--json", "-s", "1G", "base.raw"]).json(), Value::Array(Vec::new()));
}
