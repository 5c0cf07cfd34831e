//! Failures: told, with an exit status, and nothing that looks whole is left behind.

use std::process::Stdio;
use std::time::{Duration, Instant};

use faultfs::{FaultFs, Options};
use nbd_client::{Client, Request, Style};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal};

use crate::folder::Folder;

/// How long anything is waited for that must happen.
const LONG: Duration = Duration::from_secs(40);

/// A store that fails on command. The kernel tells a short write past the page cache, at the end of the space, as EIO.
fn mount() -> Option<FaultFs> {
    faultfs::mount_for_test(Options { async_direct_io: true, ..Options::default() })
}

fn name(fs: &FaultFs, name: &str) -> String {
    fs.path().join(name).to_str().unwrap().to_owned()
}

fn left(fs: &FaultFs) -> Vec<String> {
    let entries = std::fs::read_dir(fs.path()).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_full_store_is_told_and_nothing_is_left_there() {
    let folder = Folder::new();
    folder.disk("disk.raw");
    let Some(fs) = mount() else { return };
    let target = name(&fs, "copy");
    let all_fail = |said: &str| {
        for words in [&["raw"][..], &["qcow"], &["qcow2"], &["qcow2", "-c"], &["vhd"]] {
            let all = [&["convert", "-O"], words, &["disk.raw", &target]].concat();
            folder.refuses(&all, 1, &["was not made, nothing is left of it", said]);
            assert_eq!(left(&fs), [""; 0], "{words:?}");
        }
    };
    let rule = fs.rule("write:ENOSPC:1M..".parse().unwrap());
    all_fail("ENOSPC");
    fs.remove(rule);
    fs.set_capacity(Some(1 << 20));
    all_fail("copy.part");
}

#[test]
fn bytes_that_cannot_be_read_are_not_copied_as_something_else() {
    let Some(fs) = mount() else { return };
    let folder = Folder::new();
    folder.disk("disk.raw");
    let source = name(&fs, "source.raw");
    std::fs::copy(folder.path("disk.raw"), &source).unwrap();
    let map = folder.tapdisk(&["map", "--json", "disk.raw"]).json();
    // Not at an end, where its format is looked for.
    let data = map.as_array().unwrap().iter().filter(|run| run["data"] == true).nth(1).unwrap();
    let at = data["start"].as_u64().unwrap();
    fs.rule(format!("read:EIO:{at}..{}", at + 512).parse().unwrap());
    for words in [&["-O", "raw"][..], &["-O", "qcow2"], &["-O", "qcow2", "-c"]] {
        let all = [&["convert", "-T", "none"], words, &[&source, "copy"]].concat();
        folder.refuses(&all, 1, &["copy was not made", "cannot read what is to be copied", "EIO"]);
        assert_eq!(folder.names(), ["disk.raw"]);
    }
}

#[test]
fn a_failed_sync_of_the_copy_is_told() {
    let Some(fs) = mount() else { return };
    let folder = Folder::new();
    folder.disk("disk.raw");
    let target = name(&fs, "copy");
    for format in ["raw", "qcow", "qcow2", "vhd"] {
        for after in 0..4 {
            let rule = fs.rule(format!("fsync:EIO:after={after}").parse().unwrap());
            let ended = folder.run(&["convert", "-O", format, "disk.raw", &target]);
            let was_met = fs.struck(rule).unwrap() > 0;
            fs.remove(rule);
            if was_met {
                assert_eq!(ended.code, Some(1), "{format}, after {after}: {ended:?}");
                assert!(ended.stderr.contains("EIO") || ended.stderr.contains("error 5"), "{ended:?}");
                assert_eq!(left(&fs), [""; 0], "{format}, after {after}");
            } else {
                assert!(after > 0 && ended.code == Some(0), "{format}, after {after}: {ended:?}");
                std::fs::remove_file(&target).unwrap();
            }
        }
    }
}

/// Whether a process has yet to be told of a signal (proc_pid_status(5)).
fn has_pending_signals(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap();
    pending.trim().bytes().any(|digit| digit != b'0')
}

/// Tells a command to stop whose write to a place of this store hangs.
fn is_told_to_stop(fs: &FaultFs, folder: &Folder, rule: &str, words: &[&str]) {
    fs.rule(rule.parse().unwrap());
    let child = folder.command(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    assert!(fs.wait_hanging(1, LONG));
    rustix::process::kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    // What hangs it waits for: the kernel has its memory.
    let started = Instant::now();
    while has_pending_signals(child.id()) {
        assert!(started.elapsed() < LONG, "the signal was not heard");
        std::thread::sleep(Duration::from_millis(2));
    }
    fs.clear();
    fs.release();
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(130), "{words:?}: {said}");
    assert!(said.contains("told to stop"), "{words:?}: {said}");
    assert_eq!(left(fs), [""; 0], "{words:?}");
}

#[test]
fn told_to_stop_it_leaves_nothing() {
    // A process whose thread waits for storage within a call would not hear of the signal.
    let Some(fs) = mount() else { return };
    let folder = Folder::new();
    folder.disk("disk.raw");
    let target = name(&fs, "copy");
    is_told_to_stop(&fs, &folder, "write:hang:1M..", &["convert", "-t", "none", "disk.raw", &target]);
    let full = "preallocation=full";
    let words = ["convert", "-t", "none", "-O", "qcow2", "-o", full, "disk.raw", &target];
    is_told_to_stop(&fs, &folder, "write:hang:2M..", &words);
}

#[test]
fn a_new_image_that_is_being_filled_can_be_stopped_and_leaves_nothing() {
    let Some(fs) = mount() else { return };
    let folder = Folder::new();
    let target = name(&fs, "copy");
    let apart = format!("preallocation=full,data_file={}", name(&fs, "data"));
    for (format, options) in [
        ("raw", "preallocation=full"),
        ("qcow2", "preallocation=full"),
        ("qcow2", &apart),
        ("vhd", "preallocation=full"),
        ("vhd", "preallocation=full,subformat=fixed"),
    ] {
        let words = ["create", "-f", format, "-o", options, &target, "16M"];
        is_told_to_stop(&fs, &folder, "write:hang:2M..", &words);
    }
}

#[test]
fn an_image_in_use_is_refused_by_the_name_of_who_has_it() {
    let folder = Folder::new();
    folder.disk("disk.raw");
    folder.tapdisk(&["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    folder.tapdisk(&["create", "-f", "qcow2", "-b", "disk.qcow2", "top.qcow2"]);
    let held = std::fs::File::open(folder.path("disk.qcow2")).unwrap();
    rustix::fs::flock(&held, FlockOperation::LockExclusive).unwrap();
    let us = format!("process {}", std::process::id());
    for words in [
        &["info", "disk.qcow2"][..],
        &["check", "disk.qcow2"],
        &["check", "--repair", "all", "disk.qcow2"],
        &["map", "disk.qcow2"],
        &["resize", "disk.qcow2", "+1M"],
        &["convert", "disk.qcow2", "copy.raw"],
        &["convert", "--force", "disk.raw", "disk.qcow2"],
        &["create", "--force", "disk.qcow2", "1M"],
        &["convert", "top.qcow2", "copy.raw"],
        &["commit", "top.qcow2"],
        &["rebase", "-b", "", "top.qcow2"],
        &["snapshot", "-l", "disk.qcow2"],
    ] {
        folder.refuses(words, 1, &["in use by", &us]);
    }
    drop(held);
    let held = std::fs::File::open(folder.path("disk.qcow2")).unwrap();
    rustix::fs::flock(&held, FlockOperation::LockShared).unwrap();
    folder.tapdisk(&["info", "disk.qcow2"]);
    folder.tapdisk(&["check", "disk.qcow2"]);
    folder.refuses(&["commit", "top.qcow2"], 1, &["in use by", &us]);
    assert_eq!(folder.names(), ["disk.qcow2", "disk.raw", "top.qcow2"]);
}

/// Serves an image, writes to a new place of it, and dies before that is in the image by itself; whether it did.
fn dies_with_a_ledger(folder: &Folder) -> bool {
    folder.tapdisk(&["create", "--force", "-f", "qcow2", "disk.qcow2", "16M"]);
    let words = ["serve", "disk.qcow2", "--nbd", "unix:socket", "--state-dir", "state"];
    let mut server = folder.command(&words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    let mut client = loop {
        match Client::connect(&folder.path("socket"), Style::Simple) {
            Ok(client) => break client,
            Err(error) => assert!(started.elapsed() < LONG, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    assert!(client.ask(&Request::write(3 << 20, &[7; 4096])).unwrap().is_ok());
    server.kill().unwrap();
    server.wait().unwrap();
    // A busy machine may have had time for it.
    folder.run(&["map", "--state-dir", "state", "disk.qcow2"]).code != Some(0)
}

#[test]
fn what_a_dead_server_has_not_written_is_not_left_out() {
    let folder = Folder::new();
    assert!((0..10).any(|_| dies_with_a_ledger(&folder)), "the ledger is always empty");
    let state = ["--state-dir", "state"];
    for words in [
        &["map", "disk.qcow2"][..],
        &["convert", "disk.qcow2", "copy.raw"],
        &["check", "disk.qcow2"],
        &["check", "-r", "all", "disk.qcow2"],
        &["rebase", "-u", "-b", "base.raw", "-F", "raw", "disk.qcow2"],
        &["create", "-f", "qcow2", "-b", "disk.qcow2", "-u", "top.qcow2", "16M"],
    ] {
        let ended = folder.run(&[words, &state].concat());
        // Nothing is looked at for a name alone.
        let expected = if words[0] == "create" { 0 } else { 1 };
        assert_eq!(ended.code, Some(expected), "{words:?}: {ended:?}");
        assert!(
            expected == 0 || ended.stderr.contains("a tapdisk that wrote it died"),
            "{words:?}: {ended:?}"
        );
    }
    folder.refuses(
        &[&["map", "top.qcow2"], &state[..]].concat(),
        1,
        &["disk.qcow2", "a tapdisk that wrote it died"],
    );
    // What writes the image takes it over first.
    folder.tapdisk(&[&["snapshot", "-c", "now", "disk.qcow2"], &state[..]].concat());
    let map = folder.tapdisk(&[&["map", "--json", "disk.qcow2"], &state[..]].concat()).json();
    let data = map.as_array().unwrap().iter().find(|run| run["data"] == true).unwrap();
    assert_eq!(data["start"], 3 << 20, "{map}");
    folder.tapdisk(&[&["check", "disk.qcow2"], &state[..]].concat());
    folder.qemu_io("qcow2", "disk.qcow2", &["read -P 7 3M 4k"]);
}
