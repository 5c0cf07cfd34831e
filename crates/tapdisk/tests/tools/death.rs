//! Deaths in the middle of a rebase or a commit: the disk is what it was, at most space leaks, and doing it again completes it.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use faultfs::{FaultFs, Options};
use rustix::fs::FlockOperation;

use crate::folder::Folder;

/// How long anything is waited for that must happen.
const LONG: Duration = Duration::from_secs(40);
/// What an image is compared by: no program writes less of a cluster than this.
const PAGE: usize = 4096;

/// A store that keeps an operation, for as long as it takes to kill who asked for it.
fn mount() -> Option<FaultFs> {
    faultfs::mount_for_test(Options { async_direct_io: true, ..Options::default() })
}

fn name(fs: &FaultFs, name: &str) -> String {
    fs.path().join(name).to_str().unwrap().to_owned()
}

/// Runs it, and kills it (kill -9) while the first operation that matches the rule is under way; whether there was one. What
/// is under way then is done, as the kernel does it.
fn is_killed(fs: &FaultFs, folder: &Folder, words: &[&str], rule: &str) -> bool {
    fs.rule(rule.parse().unwrap());
    let mut child = folder.command(words).stdout(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    let status = loop {
        if fs.wait_hanging(1, Duration::from_millis(5)) {
            break None;
        }
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        assert!(started.elapsed() < LONG, "{words:?} does not end");
    };
    if status.is_none() {
        child.kill().unwrap();
    }
    fs.clear();
    fs.release();
    match status {
        Some(status) => assert!(status.success(), "{words:?}: {status}"),
        None => {
            assert!(!child.wait().unwrap().success(), "{words:?} was killed");
            wait_for_its_last(fs);
        }
    }
    status.is_none()
}

/// Linux may end a transfer after the process whose it is; until then that has the lock of the file.
fn wait_for_its_last(fs: &FaultFs) {
    let started = Instant::now();
    for entry in std::fs::read_dir(fs.path()).unwrap() {
        let file = std::fs::File::open(entry.unwrap().path()).unwrap();
        while rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            assert!(started.elapsed() < LONG, "a process that is dead still has a lock");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The disk has its bytes, and the image leaks at most.
#[track_caller]
fn is_whole(folder: &Folder, image: &str, bytes: &str, what: &str) {
    let check = std::process::Command::new("qemu-img").args(["check", "-q", "-f", "qcow2", image]).output();
    let code = check.unwrap().status.code();
    assert!(matches!(code, Some(0 | 3)), "{what}: {image} has faults ({code:?})");
    folder.qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", image, bytes]);
}

fn copy(from: &Path, to: &str) {
    std::fs::copy(from, to).unwrap();
}

/// Which operations to die in: each of the first, and some of the later ones, of each kind.
fn places() -> impl Iterator<Item = String> {
    let ops = ["write", "fsync"].into_iter();
    ops.flat_map(|op| [1, 2, 3, 5, 8, 13, 16, 19, 24].map(|nth| format!("{op}:hang:nth={nth}")))
}

#[test]
fn a_rebase_that_dies_leaves_the_disk_as_it_was_and_can_be_done_again() {
    let Some(fs) = mount() else { return };
    let folder = Folder::new();
    folder.disk("disk.raw");
    folder.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "-b",
        "disk.raw",
        "-F",
        "raw",
        "top",
        "16M",
    ]);
    folder.qemu_io("qcow2", "top", &["write -P 9 1M 100k", "write -z 3M 1M", "write -P 8 7000k 4k"]);
    let before = folder.path("before.raw").to_str().unwrap().to_owned();
    folder.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "top", "before.raw"]);
    // What is below next has other bytes nearly everywhere, and ends before.
    folder.disk("other.raw");
    folder.qemu_io("raw", "other.raw", &["write -P 77 0 11M"]);
    for name_of in ["disk.raw", "other.raw"] {
        copy(&folder.path(name_of), &name(&fs, name_of));
    }
    let top = name(&fs, "top.qcow2");
    let mut deaths = 0;
    for below in ["other.raw", ""] {
        let words = ["rebase", "-b", below, "-F", "raw", &top];
        let words: Vec<_> =
            words.into_iter().filter(|word| !below.is_empty() || !["-F", "raw"].contains(word)).collect();
        for place in places() {
            copy(&folder.path("top"), &top);
            if is_killed(&fs, &folder, &words, &place) {
                deaths += 1;
                is_whole(&folder, &top, &before, &format!("{below:?}, {place}"));
                folder.tapdisk(&words);
            }
            is_whole(&folder, &top, &before, &format!("{below:?}, after {place}"));
            let named = folder.qemu_img(&["info", "--output=json", &top]).json();
            assert_eq!(named["backing-filename"].as_str().unwrap_or_default(), below, "{place}");
        }
    }
    assert!(deaths > 15, "{deaths} deaths prove little");
}

#[test]
fn a_commit_that_dies_leaves_the_disk_as_it_was_and_can_be_done_again() {
    let Some(fs) = mount() else { return };
    let folder = Folder::new();
    folder.disk("disk.raw");
    let words = ["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "disk.raw", "base"];
    folder.qemu_img(&words);
    // The image below has to grow first.
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", "16M"]);
    folder.qemu_io("qcow2", "top", &["write -P 9 1M 5M", "write -z 7M 1M", "write -P 8 13M 2M"]);
    folder.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "top", "before.raw"]);
    let before = folder.path("before.raw").to_str().unwrap().to_owned();
    let new = std::fs::read(&before).unwrap();
    let mut old = std::fs::read(folder.path("disk.raw")).unwrap();
    old.resize(new.len(), 0);
    let (base, top) = (name(&fs, "base"), name(&fs, "top"));
    let mut deaths = 0;
    for place in places() {
        for (from, to) in [("base", &base), ("top", &top)] {
            copy(&folder.path(from), to);
        }
        if is_killed(&fs, &folder, &["commit", &top], &place) {
            deaths += 1;
            is_whole(&folder, &top, &before, &place);
            // The image below has its old bytes or the new ones, page by page.
            folder.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &base, "now.raw"]);
            let now = std::fs::read(folder.path("now.raw")).unwrap();
            for (at, page) in now.chunks(PAGE).enumerate() {
                let span = at * PAGE..at * PAGE + page.len();
                assert!(
                    page == &old[span.clone()] || page == &new[span],
                    "{place}: page {at} of the image below"
                );
            }
            folder.tapdisk(&["commit", &top]);
        }
        for image in [&base, &top] {
            is_whole(&folder, image, &before, &format!("after {place}"));
        }
    }
    assert!(deaths > 10, "{deaths} deaths prove little");
}

#[test]
fn a_resize_that_dies_never_shows_what_a_longer_image_below_has() {
    let Some(fs) = mount() else { return };
    let folder = Folder::new();
    folder.disk("disk.raw");
    let base = name(&fs, "disk.raw");
    copy(&folder.path("disk.raw"), &base);
    let top = name(&fs, "top.qcow2");
    let words = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "-b",
        "disk.raw",
        "-F",
        "raw",
        &top,
        "5121k",
    ];
    folder.qemu_img(&words);
    folder.qemu_io("qcow2", &top, &["write -P 9 1M 100k", "write -P 8 5120k 1k"]);
    copy(Path::new(&top), folder.path("top").to_str().unwrap());
    folder.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &top, "before.raw"]);
    let before = folder.path("before.raw").to_str().unwrap().to_owned();
    copy(Path::new(&before), folder.path("after.raw").to_str().unwrap());
    let after = folder.path("after.raw").to_str().unwrap().to_owned();
    std::fs::File::options().write(true).open(&after).unwrap().set_len(16 << 20).unwrap();
    let mut deaths = 0;
    for place in places() {
        copy(&folder.path("top"), &top);
        if is_killed(&fs, &folder, &["resize", &top, "16M"], &place) {
            deaths += 1;
            let size = folder.qemu_img(&["info", "--output=json", &top]).json()["virtual-size"].as_u64();
            let expected = if size == Some(16 << 20) { &after } else { &before };
            is_whole(&folder, &top, expected, &place);
            folder.tapdisk(&["resize", &top, "16M"]);
        }
        is_whole(&folder, &top, &after, &format!("after {place}"));
    }
    assert!(deaths > 8, "{deaths} deaths prove little");
}

#[test]
fn what_a_copy_that_died_has_left_is_removed_by_force_alone() {
    let Some(fs) = mount() else { return };
    let folder = Folder::new();
    folder.disk("disk.raw");
    let (copy, part) = (name(&fs, "copy.qcow2"), fs.path().join("copy.qcow2.part"));
    for place in ["write:hang:nth=4", "fsync:hang:nth=1"] {
        let words = ["convert", "-O", "qcow2", "disk.raw", &copy];
        assert!(is_killed(&fs, &folder, &words, place), "{place}");
        // What has its name is whole, so nothing has it.
        assert!(part.exists() && !Path::new(&copy).exists(), "{place}");
        // It may as well be somebody else's.
        let left = std::fs::read(&part).unwrap();
        folder.refuses(&words, 1, &["copy.qcow2.part", "--force"]);
        assert!(left == std::fs::read(&part).unwrap(), "{place}");
        folder.tapdisk(&[&words[..], &["--force"]].concat());
        is_whole(&folder, &copy, folder.path("disk.raw").to_str().unwrap(), place);
        assert!(!part.exists(), "{place}");
        std::fs::remove_file(&copy).unwrap();
    }
}
