//! Checks and repairs, held against those of `qemu-img check` on images that were damaged on purpose.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use block::Buf;
use image::qcow2::{Header, check as our_check};
use image::{Repair, Report};
use storage::Storage;

use crate::tools::{bytes, check, load, now, qemu_img, qemu_img_says, qemu_io, ram, save, scratch};

const CLUSTER: u64 = 64 << 10;

/// An image with data, zeroes, a compressed cluster and a snapshot, made by QEMU with these options.
fn image(folder: &Path, options: &str, snapshot: bool) -> PathBuf {
    let path = folder.join(format!("image{}", options.len()));
    let name = path.to_str().unwrap();
    let raw = folder.join("raw");
    std::fs::write(&raw, vec![0x5a; 4 << 20]).unwrap();
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw.to_str().unwrap(), name]);
    qemu_img(&["resize", "-q", "-f", "qcow2", name, "1G"]);
    qemu_io(&path, &["write -P 1 0 1M", "write -P 2 600M 300k", "write -z 700M 1M", "discard 64k 64k"]);
    if snapshot {
        qemu_img(&["snapshot", "-c", "first", name]);
        qemu_io(&path, &["write -P 3 512k 1M", "write -P 4 900M 128k"]);
        qemu_img(&["snapshot", "-c", "second", name]);
        qemu_io(&path, &["write -P 5 0 64k"]);
    }
    path
}

fn ours(file: &Rc<dyn Storage>, repair: Repair) -> Report {
    now(our_check(file, repair)).unwrap()
}

/// Our numbers beside QEMU's.
fn compare(report: &Report, theirs: &std::collections::BTreeMap<String, u64>, context: &str) {
    for (key, ours) in [
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("check-errors", report.check_errors),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
        ("image-end-offset", report.image_end_offset),
    ] {
        assert_eq!(ours, *theirs.get(key).unwrap_or(&0), "{key}, {context}: {report:#?}");
    }
}

fn word(file: &Rc<dyn Storage>, at: u64) -> u64 {
    let buf = Buf::zeroed(8);
    now(file.read(at, buf.clone())).unwrap();
    u64::from_be_bytes(buf.to_vec().try_into().unwrap())
}

fn put(file: &Rc<dyn Storage>, at: u64, word: u64) {
    now(file.write(at, Buf::from_bytes(&word.to_be_bytes()))).unwrap();
}

fn put16(file: &Rc<dyn Storage>, at: u64, count: u16) {
    now(file.write(at, Buf::from_bytes(&count.to_be_bytes()))).unwrap();
}

#[test]
fn sound_images_of_all_shapes_are_found_sound() {
    let folder = scratch();
    for (options, snapshot) in [
        ("compat=1.1", true),
        ("compat=0.10,cluster_size=4k", true),
        ("cluster_size=512", true),
        ("cluster_size=2M,compression_type=zstd", true),
        ("extended_l2=on,cluster_size=32k", true),
        ("refcount_bits=1", false),
        ("refcount_bits=64,cluster_size=1024", true),
        ("refcount_bits=8,lazy_refcounts=on,compat=1.1", true),
    ] {
        let path = image(folder.path(), options, snapshot);
        let file = load(&path);
        let before = bytes(&file);
        let report = ours(&file, Repair::No);
        assert!(report.is_clean(), "{options}: {report:#?}");
        compare(&report, &check(&path), options);
        assert_eq!(ours(&file, Repair::All), report);
        assert!(bytes(&file) == before, "{options}: a sound image is left as it is");
    }
}

/// Ways to damage an image of [`image`] without snapshots; each tells what it is.
type Damage = (&'static str, fn(&Rc<dyn Storage>, &Header));

fn l2(file: &Rc<dyn Storage>, header: &Header, index: u64) -> u64 {
    word(file, header.l1_at + index * 8) & 0x00ff_ffff_ffff_fe00
}

fn counts(file: &Rc<dyn Storage>, header: &Header) -> u64 {
    word(file, header.refcount_table_at)
}

const DAMAGES: &[Damage] = &[
    ("a leaked cluster", |file, header| put16(file, counts(file, header) + 2 * 500, 1)),
    ("a count that is too high", |file, header| {
        let data = l2(file, header, 0);
        let cluster = (word(file, data) & 0x00ff_ffff_ffff_fe00) / CLUSTER;
        put16(file, counts(file, header) + 2 * cluster, 7);
    }),
    ("a cluster that is used twice", |file, header| {
        let table = l2(file, header, 0);
        put(file, table, word(file, table + 2 * 8));
    }),
    ("a mark that is missing", |file, header| {
        let table = l2(file, header, 0);
        put(file, table, word(file, table) & !(1 << 63));
    }),
    ("a table's mark that is missing", |file, header| {
        put(file, header.l1_at, word(file, header.l1_at) & !(1 << 63));
    }),
    ("an entry beyond the end of the file", |file, header| {
        let table = l2(file, header, 0);
        put(file, table, 1 << 63 | 1 << 40);
    }),
    ("a table that is lost", |file, header| put(file, header.l1_at, 0)),
    ("counts that are all zero", |file, header| {
        let at = counts(file, header);
        now(file.write(at, Buf::zeroed(CLUSTER as usize))).unwrap();
    }),
    ("data over the L1 table", |file, header| {
        let table = l2(file, header, 0);
        put(file, table, 1 << 63 | header.l1_at);
    }),
];

#[test]
fn damages_are_counted_as_qemu_img_counts_them() {
    let folder = scratch();
    let path = image(folder.path(), "compat=1.1", false);
    // Room for a leak.
    let sound = bytes(&load(&path));
    let damaged = folder.path().join("damaged");
    for (what, damage) in DAMAGES {
        let file = ram(&sound);
        now(file.resize(600 * CLUSTER)).unwrap();
        let header = now(Header::read(&file)).unwrap();
        damage(&file, &header);
        save(&file, &damaged);
        let report = ours(&file, Repair::No);
        assert!(!report.is_clean(), "{what}");
        let mut theirs = check(&damaged);
        if what.ends_with("end of the file") {
            // QEMU counts it twice: as out of the file, and as marked wrongly for a count of 0.
            *theirs.get_mut("corruptions").unwrap() -= 1;
            *theirs.get_mut("allocated-clusters").unwrap() -= 1;
            *theirs.get_mut("fragmented-clusters").unwrap() -= 1;
        }
        if *what == "a count that is too high" {
            // And this one also as a mark that does not fit the count. But it fits the references.
            *theirs.get_mut("corruptions").unwrap() -= 1;
        }
        compare(&report, &theirs, what);
    }
}

#[test]
fn what_is_repaired_is_sound_for_qemu_img_too() {
    let folder = scratch();
    let path = image(folder.path(), "compat=1.1", false);
    let sound = bytes(&load(&path));
    let repaired = folder.path().join("repaired");
    for (what, damage) in DAMAGES {
        let file = ram(&sound);
        now(file.resize(600 * CLUSTER)).unwrap();
        let header = now(Header::read(&file)).unwrap();
        damage(&file, &header);
        let before = ours(&file, Repair::No);
        // Leaks alone: corruptions stay.
        let copy = ram(&bytes(&file));
        let leaks = ours(&copy, Repair::Leaks);
        assert!(leaks.corruptions <= before.corruptions && leaks.leaks <= before.leaks, "{what}: {leaks:#?}");
        if before.corruptions == 0 {
            assert_eq!((leaks.leaks, leaks.leaks_fixed), (0, before.leaks), "{what}");
        }
        let report = ours(&file, Repair::All);
        assert!(report.is_clean(), "{what}: {report:#?}");
        assert_eq!(report.corruptions_fixed, before.corruptions, "{what}");
        save(&file, &repaired);
        assert_eq!(check(&repaired)["code"], 0, "{what}");
        let after = bytes(&file);
        assert_eq!(
            ours(&file, Repair::All),
            Report { notes: Vec::new(), corruptions_fixed: 0, leaks_fixed: 0, ..report }
        );
        assert!(bytes(&file) == after, "{what}: nothing is left to repair");
    }
}

/// Whatever a byte of the tables is: the check ends, and what it repairs is sound. The image has one of everything.
#[test]
fn broken_images_are_repaired_or_refused_and_never_hang() {
    let folder = scratch();
    let path = folder.path().join("odd");
    let name = path.to_str().unwrap();
    for options in ["cluster_size=512,refcount_bits=8", "cluster_size=16k,extended_l2=on"] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "300k"]);
        qemu_io(&path, &["write -P 1 0 40k", "write -z 100k 20k", "write -P 2 200k 64k"]);
        qemu_img(&["snapshot", "-c", "first", name]);
        qemu_img(&["bitmap", "--add", name, "bitmap"]);
        qemu_io(&path, &["write -P 1 0 10k"]);
        let sound = bytes(&load(&path));
        assert!(ours(&ram(&sound), Repair::No).is_clean());
        let mut random = storage::conformance::Random(11);
        // Bytes of tables are those that are neither zero nor data.
        let places: Vec<usize> =
            (0..sound.len()).filter(|at| !matches!(sound[*at], 1 | 2) || random.below(40) == 0).collect();
        let (mut clean, mut refused) = (0, 0);
        for _ in 0..600 {
            let mut image = sound.clone();
            for _ in 0..1 + random.below(4) {
                let near = if random.below(2) == 0 { 600 } else { places.len() as u64 };
                let at = places[random.below(near.min(places.len() as u64)) as usize];
                image[at] = [0, 1, 0x7f, 0x80, 0xff, random.below(256) as u8][random.below(6) as usize];
            }
            let file = ram(&image);
            let Ok(report) = now(our_check(&file, Repair::No)) else {
                refused += 1;
                continue;
            };
            assert!(bytes(&file) == image);
            let repaired = now(our_check(&file, Repair::All)).unwrap();
            clean += u32::from(repaired.is_clean());
            assert!(repaired.corruptions <= report.corruptions + report.leaks, "{report:#?} {repaired:#?}");
            let again = bytes(&file);
            let next = now(our_check(&file, Repair::All)).unwrap();
            let left = |report: &Report| (report.corruptions, report.leaks);
            assert_eq!(left(&next), left(&repaired), "{repaired:#?} {next:#?}");
            assert!(bytes(&file) == again, "a repair leaves nothing for the next: {repaired:#?} {next:#?}");
        }
        assert!(clean > 100 && refused > 10, "{options}: {clean} clean, {refused} refused");
    }
}

#[test]
fn entries_that_lead_to_one_cluster_get_their_own_by_a_repair() {
    let folder = scratch();
    for (options, snapshot) in [
        ("compat=1.1", true),
        ("compat=0.10,cluster_size=4k", false),
        ("cluster_size=512,refcount_bits=1", false),
        ("extended_l2=on,cluster_size=32k", true),
        ("cluster_size=1k,refcount_bits=64", true),
    ] {
        let path = folder.path().join("image");
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "9G"]);
        qemu_io(&path, &["write -P 1 0 100k", "write -P 2 100k 200k", "write -P 3 8G 70k"]);
        if snapshot {
            qemu_img(&["snapshot", "-c", "one", name]);
            qemu_io(&path, &["write -P 4 64k 64k"]);
        }
        let file = load(&path);
        let header = now(Header::read(&file)).unwrap();
        let (entry, cluster) = (header.l2_entry_size(), header.cluster_size());
        let l2 = word(&file, header.l1_at) & 0x00ff_ffff_ffff_fe00;
        // The disk's third cluster is the first one as well, and so is the fourth; the second L2 table is the first one.
        for (from, to, len) in
            [(l2, l2 + 2 * entry, entry), (l2, l2 + 3 * entry, entry), (header.l1_at, header.l1_at + 8, 8)]
        {
            for at in (0..len).step_by(8) {
                put(&file, to + at, word(&file, from + at));
            }
        }
        for consistent in [false, true] {
            let file = ram(&bytes(&file));
            if consistent {
                // As if somebody had wanted it so. Counts of one bit cannot say it.
                save(&file, &path);
                qemu_img_says(&["check", "-q", "-r", "all", "-f", "qcow2", name]);
                now(file.resize(0)).unwrap();
                let repaired = std::fs::read(&path).unwrap();
                now(file.resize(repaired.len() as u64)).unwrap();
                now(file.write(0, Buf::from_bytes(&repaired))).unwrap();
            }
            let report = ours(&file, Repair::All);
            assert!(report.is_clean(), "{options}: {report:#?}");
            assert!(report.notes.iter().any(|note| note.contains("copies of their own")), "{report:#?}");
            save(&file, &path);
            assert_eq!(check(&path)["code"], 0, "{options}");
            let third = |offset: u64, byte: u8| format!("read -P {byte} {offset} {cluster}");
            let table = header.l2_entries() * cluster;
            qemu_io(&path, &[&third(0, 1), &third(2 * cluster, 1), &third(3 * cluster, 1), &third(table, 1)]);
            qemu_io(&path, &[&third(table + 2 * cluster, 1), &format!("read -P 3 8G {}", 70 << 10)]);
            // Each is written to without the others, and all is well afterwards.
            qemu_io(&path, &[&format!("write -P 9 {} {cluster}", 2 * cluster), &third(0, 1)]);
            qemu_io(&path, &[&format!("write -P 8 0 {cluster}"), &third(3 * cluster, 1), &third(table, 1)]);
            assert_eq!(check(&path)["code"], 0, "{options}, after writes");
        }
    }
}

#[test]
fn in_a_data_file_each_cluster_has_the_place_that_it_has_on_the_disk() {
    let folder = scratch();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    let data = format!("data_file={}", folder.path().join("data").display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &data, name, "4M"]);
    qemu_io(&path, &["write -P 1 0 64k", "write -P 2 64k 64k", "write -P 3 1M 64k"]);
    let file = load(&path);
    let l2 = word(&file, now(Header::read(&file)).unwrap().l1_at) & 0x00ff_ffff_ffff_fe00;
    assert!(ours(&file, Repair::No).is_clean());
    let (first, second) = (word(&file, l2), word(&file, l2 + 8));
    put(&file, l2, second);
    put(&file, l2 + 8, first);
    assert_eq!(ours(&file, Repair::No).corruptions, 2);
    let report = ours(&file, Repair::All);
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 2));
    save(&file, &path);
    assert_eq!(check(&path)["code"], 0);
    qemu_io(&path, &["read -P 1 0 64k", "read -P 2 64k 64k", "read -P 3 1M 64k"]);
}
