//! Images of all formats, made by QEMU's programs: served, written, left, and judged by these programs.

use std::path::{Path, PathBuf};
use std::process::Command;

use nbd_client::{Request, Style};
use tempfile::TempDir;

use crate::server::{Ask, CACHES, Server, pattern, refused, zeroes};

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;

/// Formats as qemu-img calls them, with options. Names end in what the format is.
pub(crate) const FORMS: [(&str, &str, &str); 8] = [
    ("disk.qcow", "qcow", ""),
    ("disk.v2.qcow2", "qcow2", "compat=0.10"),
    ("disk.qcow2", "qcow2", ""),
    ("small.qcow2", "qcow2", "cluster_size=512"),
    ("lazy.qcow2", "qcow2", "lazy_refcounts=on,refcount_bits=1"),
    ("parts.qcow2", "qcow2", "extended_l2=on,cluster_size=128k"),
    ("dynamic.vhd", "vpc", "subformat=dynamic,force_size=on"),
    ("fixed.vhd", "vpc", "subformat=fixed,force_size=on"),
];

/// Runs one of QEMU's programs; what it says.
#[track_caller]
pub(crate) fn qemu(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().expect("qemu-utils is installed");
    assert!(output.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Makes an image of this size.
#[track_caller]
pub(crate) fn make(path: &Path, format: &str, options: &str, size: u64) {
    let mut words = vec!["create", "-q", "-f", format];
    if !options.is_empty() {
        words.extend(["-o", options]);
    }
    let size = size.to_string();
    words.extend([path.to_str().unwrap(), &size]);
    qemu("qemu-img", &words);
}

/// The whole disk, as QEMU reads it from the file.
#[track_caller]
pub(crate) fn as_qemu_reads_it(path: &Path, format: &str) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("raw");
    qemu("qemu-img", &["convert", "-f", format, "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
    std::fs::read(raw).unwrap()
}

/// How qemu-img judges an image that it can check: 0 is whole, 3 has leaks alone.
pub(crate) fn judged(path: &Path, format: &str) -> Option<i32> {
    if format != "qcow2" {
        return None;
    }
    let output = Command::new("qemu-img").args(["check", "-q", "-f", format]).arg(path).output().unwrap();
    output.status.code()
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }
}

#[test]
fn images_of_every_format_are_read_written_and_left_whole() {
    for ((name, format, options), cache) in FORMS.into_iter().zip(CACHES.into_iter().cycle()) {
        let folder = Folder::new();
        let (image, size) = (folder.text(name), 8 * MIB);
        make(&folder.path(name), format, options, size);
        qemu("qemu-io", &["-f", format, "-c", "write -q -P 165 1M 300k", &image]);
        let mut model = vec![0; size as usize];
        model[MIB as usize..(MIB + 300 * KIB) as usize].fill(165);

        let server = Server::of(&[&image, "--cache", cache]);
        let said = format!("8 MiB, {} image", if format == "vpc" { "vhd" } else { format });
        assert!(server.stdout().contains(&said), "{name}: {}", server.stdout());
        let mut client = server.client(Style::Structured);
        assert_eq!(client.read(MIB - 4096, 8192).unwrap()[4096..], [165; 4096], "{name}");
        for (number, (at, len)) in
            [(0, 512), (MIB + 1000, 5000), (3 * MIB - 700, 70_000), (size - 513, 513), (5 * MIB, 2 * MIB)]
                .into_iter()
                .enumerate()
        {
            let bytes = pattern(at, len, number as u8);
            assert_eq!(client.write(at, &bytes), Ok(()), "{name} {at}");
            model[at as usize..(at + len) as usize].copy_from_slice(&bytes);
        }
        for (at, len) in [(MIB + 100 * KIB, 64 * KIB), (6 * MIB - 10, 1000)] {
            assert_eq!(client.done(&Request::zeroes(at, len)), Ok(()), "{name} {at}");
            model[at as usize..(at + len) as usize].fill(0);
        }
        assert_eq!(client.flush(), Ok(()), "{name}");
        assert!(client.read(0, size).unwrap()[..] == model, "{name}");
        let ended = server.stop();
        assert!(ended.status.success(), "{name}: {}", ended.stderr);
        assert!(as_qemu_reads_it(&folder.path(name), format) == model, "{name}: QEMU reads something else");
        assert!(matches!(judged(&folder.path(name), format), None | Some(0)), "{name} has leaks, or worse");
        // And once more, as it was left.
        let server = Server::of(&[&image, "--cache", cache, "--read-only"]);
        assert!(server.client(Style::Simple).read(0, size).unwrap()[..] == model, "{name}");
        assert!(server.stop().status.success());
    }
}

#[test]
fn a_chain_of_formats_is_one_disk_and_only_its_top_is_written() {
    let folder = Folder::new();
    let (base, middle, top) = (folder.text("base.vhd"), folder.text("middle.qcow"), folder.text("top.qcow2"));
    make(&folder.path("base.vhd"), "vpc", "force_size=on", 4 * MIB);
    qemu("qemu-io", &["-f", "vpc", "-c", "write -q -P 1 0 4M", &base]);
    // Names count from the folder of the image that has them, wherever the server was started.
    qemu("qemu-img", &["create", "-q", "-f", "qcow", "-u", "-b", "base.vhd", "-F", "vpc", &middle, "4M"]);
    qemu("qemu-io", &["-f", "qcow", "-c", "write -q -P 2 1M 1M", &middle]);
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-u", "-b", "middle.qcow", "-F", "qcow", &top, "5M"]);
    let before = [std::fs::read(&base).unwrap(), std::fs::read(&middle).unwrap()];

    let server = Server::of(&[&top]);
    let said = server.stdout();
    for words in
        ["5 MiB, qcow2 image", "over ", "middle.qcow: 4 MiB, qcow image", "base.vhd: 4 MiB, vhd image"]
    {
        assert!(said.contains(words), "no {words} in {said}");
    }
    let mut client = server.client(Style::Simple);
    assert_eq!(client.write(MIB + 1000, &[3; 1000]), Ok(()));
    let mut model = vec![0; 5 << 20];
    model[..4 << 20].fill(1);
    model[1 << 20..2 << 20].fill(2);
    model[(1 << 20) + 1000..(1 << 20) + 2000].fill(3);
    assert!(client.read(0, 5 * MIB).unwrap()[..] == model);
    assert!(server.stop().status.success());
    assert_eq!(judged(&folder.path("top.qcow2"), "qcow2"), Some(0));
    assert!(as_qemu_reads_it(&folder.path("top.qcow2"), "qcow2") == model);
    assert!(before == [std::fs::read(&base).unwrap(), std::fs::read(&middle).unwrap()]);
}

#[test]
fn the_top_alone_is_shown_and_written_only_with_what_it_stands_on() {
    let folder = Folder::new();
    let (base, top) = (folder.text("base.raw"), folder.text("top.qcow2"));
    std::fs::write(&base, vec![1; 1 << 20]).unwrap();
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top]);
    qemu("qemu-io", &["-f", "qcow2", "-c", "write -q -P 2 64k 64k", &top]);
    let server = Server::of(&[&top, "--no-backing", "--read-only"]);
    assert!(
        server.stdout().contains("which it names as its backing file: zeroes there"),
        "{}",
        server.stdout()
    );
    let mut client = server.client(Style::Simple);
    assert_eq!(client.read(0, 64 * KIB), Ok(zeroes(64 * KIB)));
    assert_eq!(client.read(64 * KIB, 1).unwrap()[..], [2]);
    assert!(server.stop().status.success());
    let why = refused(&["serve", &top, "--no-backing"]);
    assert!(why.contains("would keep such zeroes for good") && why.contains("--read-only"), "{why}");
}

#[test]
fn a_raw_disk_stays_raw_whatever_its_guest_writes() {
    let folder = Folder::new();
    let (disk, header) = (folder.text("disk.img"), folder.text("header"));
    let secret = folder.text("secret.raw");
    std::fs::write(&secret, vec![0x5e; 1 << 20]).unwrap();
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &secret, "-F", "raw", &header]);
    let header = std::fs::read(header).unwrap();
    let server = Server::of(&[&disk, "--create", "1M"]);
    assert_eq!(server.client(Style::Simple).write(0, &header), Ok(()));
    assert!(server.stop().status.success());
    for words in [&[disk.as_str()][..], &[&disk, "--create", "1M"], &[&disk, "--read-only"]] {
        let server = Server::of(words);
        assert!(server.stdout().contains("raw image"), "{}", server.stdout());
        server.wait_for_log("begins like an image of the format qcow2");
        let read = server.client(Style::Simple).read(0, header.len() as u64).unwrap();
        assert!(read[..] == header[..], "{words:?}");
        assert!(server.stop().status.success());
    }
    // Without a name that says so, neither is assumed.
    let plain = folder.text("disk");
    let server = Server::of(&[&plain, "--create", "1M"]);
    assert_eq!(server.client(Style::Simple).write(0, &header), Ok(()));
    assert!(server.stop().status.success());
    let why = refused(&["serve", &plain, "--create", "1M"]);
    assert!(why.contains("--format raw or --format qcow2"), "{why}");
    let server = Server::of(&[&plain, "--format", "raw"]);
    assert!(server.client(Style::Simple).read(0, 4).unwrap()[..] == *b"QFI\xfb");
    assert!(server.stop().status.success());
}

#[test]
fn what_a_hostile_image_names_is_not_opened() {
    let folder = Folder::new();
    let top = folder.text("top.qcow2");
    std::os::unix::fs::symlink("/etc/shadow", folder.path("innocent.raw")).unwrap();
    let make = |backing: &str| {
        qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "raw", &top, "1M"]);
    };
    for (name, words) in [
        ("/etc/shadow", "which is /etc/shadow"),
        ("innocent.raw", "which is /etc/shadow"),
        ("../../etc/shadow", "which is /etc/shadow"),
        ("nbd://127.0.0.1/disk", "which is no path"),
        ("json:{\"file.filename\":\"/etc/shadow\"}", "which is no path"),
        ("top.qcow2", "a loop"),
        ("gone.raw", "gone.raw does not exist"),
    ] {
        make(name);
        let why = refused(&["serve", &top]);
        assert!(why.contains("top.qcow2 names the backing file") && why.contains(words), "{name}: {why}");
    }
    // It is the administrator's to allow it.
    let elsewhere = tempfile::tempdir().unwrap();
    let base = elsewhere.path().join("base.raw");
    std::fs::write(&base, vec![9; 1 << 20]).unwrap();
    make(base.to_str().unwrap());
    let why = refused(&["serve", &top]);
    let option = format!("--allow-folder {}", elsewhere.path().canonicalize().unwrap().display());
    assert!(why.contains(&option), "{why}");
    let server = Server::of(&[&top, "--allow-folder", elsewhere.path().to_str().unwrap()]);
    assert_eq!(server.client(Style::Simple).read(5, 1).unwrap()[..], [9]);
    assert!(server.stop().status.success());

    // Its data file is even written.
    let data = folder.text("data.raw");
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &format!("data_file={data}"), &top, "1M"]);
    qemu("qemu-img", &["amend", "-f", "qcow2", "-o", "data_file=/etc/shadow", &top]);
    let why = refused(&["serve", &top]);
    assert!(
        why.contains("names the data file \"/etc/shadow\"") && why.contains("--allow-folder /etc"),
        "{why}"
    );
}

#[test]
fn data_in_a_file_of_its_own_is_written_there() {
    let folder = Folder::new();
    let (top, data) = (folder.text("top.qcow2"), folder.text("data.raw"));
    let option = format!("data_file={data},data_file_raw=on");
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, &top, "2M"]);
    let server = Server::of(&[&top]);
    assert!(
        server.stdout().contains("its data in ") && server.stdout().contains("data.raw"),
        "{}",
        server.stdout()
    );
    assert_eq!(server.client(Style::Simple).write(MIB, &pattern(0, 70_000, 1)), Ok(()));
    assert!(server.stop().status.success());
    assert_eq!(judged(&folder.path("top.qcow2"), "qcow2"), Some(0));
    assert!(std::fs::read(&data).unwrap()[1 << 20..][..70_000] == pattern(0, 70_000, 1)[..]);
    assert!(
        as_qemu_reads_it(&folder.path("top.qcow2"), "qcow2")[1 << 20..][..70_000]
            == pattern(0, 70_000, 1)[..]
    );
}

#[test]
fn what_is_no_image_of_its_format_is_refused_in_words() {
    let folder = Folder::new();
    let plain = folder.text("plain");
    std::fs::write(&plain, vec![0; 1 << 20]).unwrap();
    let why = refused(&["serve", &plain]);
    assert!(
        why.contains("plain begins like no image of a known format") && why.contains("--format raw"),
        "{why}"
    );
    for format in ["qcow", "qcow2", "vhd"] {
        let why = refused(&["serve", &plain, "--format", format]);
        assert!(why.contains("plain: "), "{format}: {why}");
    }
    make(&folder.path("disk.vmdk"), "vmdk", "", MIB);
    let why = refused(&["serve", &folder.text("disk.vmdk")]);
    assert!(why.contains("VMDK, which is not known here"), "{why}");
    let why = refused(&["serve", "ram:1M", "--format", "qcow2"]);
    assert!(why.contains("--format qcow2 is for images in files"), "{why}");
    let why = refused(&["serve", &folder.text("new"), "--create", "1M", "--format", "qcow2"]);
    assert!(why.contains("tapdisk create --format qcow2"), "{why}");
    assert!(!folder.path("new").exists());
}

#[test]
fn who_stands_on_an_image_keeps_others_from_writing_it() {
    let folder = Folder::new();
    let (base, top) = (folder.text("base.raw"), folder.text("top.qcow2"));
    std::fs::write(&base, vec![1; 1 << 20]).unwrap();
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top]);
    let server = Server::of(&[&top]);
    let writer = Server::start(&[&base], None);
    writer.wait_for_log("which only reads it (maybe since another image stands on it)");
    assert!(server.stop().status.success());
    writer.wait_ready();
    let reader = Server::start(&[&top], None);
    reader.wait_for_log("the image is in use: waiting up to 30 s");
    assert!(writer.stop().status.success());
    reader.wait_ready();
    assert!(reader.stop().status.success());
}

#[test]
fn faults_for_drills_strike_the_file_of_the_top_image() {
    let folder = Folder::new();
    let (base, top) = (folder.text("base.raw"), folder.text("top.qcow2"));
    std::fs::write(&base, vec![1; 1 << 20]).unwrap();
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top]);
    let server = Server::of(&[&top, "--fault", "write:ENOSPC"]);
    let mut client = server.client(Style::Simple);
    assert_eq!(client.write(0, &[2; 512]), Err(nbd_client::Errno::NOSPC));
    assert_eq!(client.read(0, 512).unwrap()[..], [1; 512], "the old bytes, from below");
    drop(server);
    assert_eq!(judged(&folder.path("top.qcow2"), "qcow2"), Some(0), "nothing was written");
}
