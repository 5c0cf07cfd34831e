//! New images, judged by `qemu-img check` and `info` and held against those that `qemu-img create` makes.

use std::path::Path;
use std::rc::Rc;

use image::qcow2::{Compression, Create, DataFile, Header, Preallocation, create};
use image::{Backing, Format};
use storage::{Ram, Storage};

use crate::tools::{check, info, now, qemu_img, save, scratch};

/// All combinations that make sense, with disks of a size that each can have.
fn product() -> Vec<Create> {
    let mut all = Vec::new();
    for cluster_size in [512, 16 << 10, 64 << 10, 2 << 20] {
        for version in [2, 3] {
            for refcount_bits in [1, 8, 16, 64] {
                for (extended_l2, lazy_refcounts) in [(false, false), (true, true)] {
                    for preallocation in [Preallocation::Off, Preallocation::Metadata, Preallocation::Full] {
                        // The rarer ones not with everything else.
                        let rare = (refcount_bits != 16) as u32 + (cluster_size != 65536) as u32;
                        if preallocation == Preallocation::Full && rare > 0 {
                            continue;
                        }
                        if version == 2 && (refcount_bits != 16 || extended_l2)
                            || extended_l2 && cluster_size < 16 << 10
                        {
                            continue;
                        }
                        let size = match preallocation {
                            Preallocation::Off => (3 << 30) + 512,
                            Preallocation::Metadata | Preallocation::Falloc => (2 << 20) + 1536,
                            Preallocation::Full => 700 << 10,
                        };
                        let compression =
                            if refcount_bits == 8 { Compression::Zstd } else { Compression::Zlib };
                        all.push(Create {
                            size,
                            cluster_size,
                            version,
                            refcount_bits,
                            extended_l2,
                            lazy_refcounts,
                            compression,
                            backing: None,
                            data_file: None,
                            preallocation,
                        });
                    }
                }
            }
        }
    }
    all
}

fn on_off(is: bool) -> &'static str {
    if is { "on" } else { "off" }
}

/// The same as options of `qemu-img create`.
fn words(options: &Create) -> String {
    let mut words = format!(
        "cluster_size={},compat={},preallocation={}",
        options.cluster_size,
        if options.version == 2 { "0.10" } else { "1.1" },
        match options.preallocation {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    );
    if options.version == 3 {
        words += &format!(
            ",refcount_bits={},extended_l2={},lazy_refcounts={},compression_type={}",
            options.refcount_bits,
            on_off(options.extended_l2),
            on_off(options.lazy_refcounts),
            options.compression.name(),
        );
    }
    words
}

fn made(options: &Create) -> Rc<dyn Storage> {
    // What was there before does not matter.
    let file: Rc<dyn Storage> = Rc::new(Ram::new(3 << 20));
    now(file.write((1 << 20) + 7, block::Buf::from_bytes(&[0xdd; 1 << 20]))).unwrap();
    now(create(&file, options)).unwrap_or_else(|error| panic!("{}: {error}", words(options)));
    file
}

fn qemu_made(path: &Path, options: &Create, more: &[&str]) {
    let (words, size) = (words(options), options.size.to_string());
    let mut arguments = vec!["create", "-q", "-u", "-f", "qcow2", "-o", &words];
    arguments.extend_from_slice(more);
    arguments.extend_from_slice(&[path.to_str().unwrap(), &size]);
    qemu_img(&arguments);
}

#[test]
fn every_combination_is_sound_and_what_qemu_img_makes() {
    let folder = scratch();
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    let all = product();
    assert!(all.len() > 50);
    for options in &all {
        let file = made(options);
        save(&file, &ours);
        qemu_made(&theirs, options, &[]);
        assert_eq!(info(&ours), info(&theirs), "{}", words(options));
        let (mine, other) = (check(&ours), check(&theirs));
        for key in ["code", "corruptions", "leaks", "check-errors", "allocated-clusters", "total-clusters"] {
            assert_eq!(
                mine.get(key).unwrap_or(&0),
                other.get(key).unwrap_or(&0),
                "{key}: {}",
                words(options)
            );
        }
        assert_eq!(mine["code"], 0, "{}", words(options));
        let header = now(Header::read(&file)).unwrap();
        assert_eq!(mine.get("image-end-offset"), Some(&file.size()), "{header:?}");
    }
}

#[test]
fn a_disk_over_another_names_it_as_qemu_does() {
    let folder = scratch();
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    for (format, name) in [
        (None, None),
        (Some(Format::Raw), Some("raw")),
        (Some(Format::Qcow), Some("qcow")),
        (Some(Format::Qcow2), Some("qcow2")),
        (Some(Format::Vhd), Some("vpc")),
    ] {
        for cluster_size in [512, 65536] {
            let long = folder.path().join("b".repeat(200)).to_str().unwrap().to_owned();
            qemu_img(&["create", "-q", "-f", name.unwrap_or("raw"), &long, "1M"]);
            let backing = Backing { name: long.clone(), format, others: Vec::new(), unique_id: None };
            let options =
                Create { size: 1 << 30, cluster_size, backing: Some(backing.clone()), ..Create::default() };
            let file = made(&options);
            assert_eq!(now(Header::read(&file)).unwrap().backing(), Some(backing));
            save(&file, &ours);
            assert_eq!(check(&ours)["code"], 0);
            if let Some(name) = name.filter(|_| cluster_size > 512) {
                qemu_made(&theirs, &options, &["-b", &long, "-F", name]);
                assert_eq!(info(&ours), info(&theirs));
            }
        }
    }
    // Only subclusters can be reserved and still show what is below.
    let backing =
        Backing { name: "below".to_owned(), format: Some(Format::Raw), others: Vec::new(), unique_id: None };
    let options = Create {
        size: 5 << 20,
        backing: Some(backing),
        preallocation: Preallocation::Metadata,
        extended_l2: true,
        ..Create::default()
    };
    std::fs::write(folder.path().join("below"), vec![7; 5 << 20]).unwrap();
    save(&made(&options), &ours);
    assert_eq!(check(&ours)["code"], 0);
    let below = folder.path().join("below");
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", ours.to_str().unwrap(), below.to_str().unwrap()]);
    let plain = Create { extended_l2: false, ..options };
    let file: Rc<dyn Storage> = Rc::new(Ram::new(0));
    assert!(now(create(&file, &plain)).unwrap_err().to_string().contains("backing file"));
}

#[test]
fn an_external_data_file_has_the_disks_bytes() {
    let folder = scratch();
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    // QEMU takes the name as it is, not from the image's folder on.
    let name = folder.path().join("the data").to_str().unwrap().to_owned();
    for raw in [false, true] {
        for preallocation in [Preallocation::Off, Preallocation::Metadata, Preallocation::Full] {
            let storage: Rc<dyn Storage> = Rc::new(Ram::new(100));
            let data_file = Some(DataFile { name: name.clone(), storage: storage.clone(), raw });
            let options = Create { size: 3 << 20, data_file, preallocation, ..Create::default() };
            let file = made(&options);
            assert_eq!(now(Header::read(&file)).unwrap().data_file(), Some(&*name));
            assert_eq!(storage.size(), 3 << 20);
            save(&file, &ours);
            save(&storage, &folder.path().join("the data"));
            let mine = (info(&ours), check(&ours));
            let more =
                format!("data_file={}/the data,data_file_raw={}", folder.path().display(), on_off(raw));
            qemu_made(&theirs, &options, &["-o", &more]);
            let other = (info(&theirs), check(&theirs));
            assert_eq!(mine.0, other.0);
            for key in
                ["code", "corruptions", "leaks", "check-errors", "allocated-clusters", "total-clusters"]
            {
                assert_eq!(mine.1.get(key), other.1.get(key), "{key}");
            }
        }
    }
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_touched() {
    let backing = Backing { name: "x".repeat(600), format: None, others: Vec::new(), unique_id: None };
    let empty = Backing { name: String::new(), ..backing.clone() };
    let long = Backing { name: "x".repeat(1024), ..backing.clone() };
    let plain = Create { size: 1 << 30, ..Create::default() };
    for (options, word) in [
        (Create { cluster_size: 256, ..plain.clone() }, "512 to 2097152"),
        (Create { cluster_size: 4 << 20, ..plain.clone() }, "512 to 2097152"),
        (Create { cluster_size: 5000, ..plain.clone() }, "power of two"),
        (Create { cluster_size: 0, ..plain.clone() }, "power of two"),
        (Create { refcount_bits: 0, ..plain.clone() }, "power of two"),
        (Create { refcount_bits: 128, ..plain.clone() }, "power of two"),
        (Create { version: 1, ..plain.clone() }, "no version 1"),
        (Create { version: 2, lazy_refcounts: true, ..plain.clone() }, "version 3"),
        (Create { version: 2, refcount_bits: 8, ..plain.clone() }, "version 3"),
        (Create { version: 2, compression: Compression::Zstd, ..plain.clone() }, "version 3"),
        (Create { cluster_size: 8192, extended_l2: true, ..plain.clone() }, "16384"),
        (Create { size: u64::MAX, ..plain.clone() }, "cannot be"),
        (Create { size: i64::MAX as u64, ..plain.clone() }, "cannot be"),
        // QEMU's documents: 128 GiB with clusters of 512 bytes.
        (Create { size: (128 << 30) + 1, cluster_size: 512, ..plain.clone() }, "137438953472"),
        (Create { backing: Some(backing), cluster_size: 512, ..plain.clone() }, "a cluster has 512"),
        (Create { backing: Some(empty), ..plain.clone() }, "1 to 1023"),
        (Create { backing: Some(long), ..plain.clone() }, "1 to 1023"),
    ] {
        let file: Rc<dyn Storage> = Rc::new(Ram::new(512));
        now(file.write(0, block::Buf::from_bytes(&[7; 512]))).unwrap();
        let error = now(create(&file, &options)).unwrap_err();
        assert_eq!(error.errno(), block::Errno::EINVAL);
        assert!(error.to_string().contains(word), "{word}: {error}");
        assert_eq!(crate::tools::bytes(&file), [7; 512]);
    }
    let most = Create { size: 128 << 30, cluster_size: 512, ..plain };
    assert_eq!(now(Header::read(&made(&most))).unwrap().size(), 128 << 30);
}

#[test]
fn sizes_are_rounded_up_and_may_be_nothing() {
    for (asked, size) in [(0, 0), (1, 512), (513, 1024)] {
        let file = made(&Create { size: asked, ..Create::default() });
        assert_eq!(now(Header::read(&file)).unwrap().size(), size);
        let folder = scratch();
        let path = folder.path().join("image");
        save(&file, &path);
        assert_eq!(check(&path)["code"], 0);
    }
}
