//! Images whose map changes, and a server that dies: what was answered is there for its successor, what was flushed for
//! anybody, and the image is whole.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nbd_client::{Errno, Style};
use rustix::fs::FlockOperation;
use tempfile::TempDir;

use crate::formats::{FORMS, KIB, MIB, as_qemu_reads_it, judged, make, qemu};
use crate::power_cut::{Random, Shape, Workload};
use crate::server::{Ask, CACHES, Server, pattern, refused, rule, wait_until};

/// Bytes of the disks.
const SIZE: u64 = 32 * MIB;

/// Groups of sectors in clusters of their own, and not much of it made durable.
const THIN: Shape = Shape { sectors: 2048, spread: SIZE / 64, flush: 40, fua: 60 };

/// Leaks are all that a crash may leave.
#[track_caller]
fn is_safe(path: &Path, format: &str, what: &str) {
    assert!(matches!(judged(path, format), None | Some(0 | 3)), "{what}: more than leaks");
}

/// An image and where its servers keep what their successors must know.
struct Subject {
    directory: TempDir,
    path: PathBuf,
    format: &'static str,
}

impl Subject {
    fn new(name: &str, format: &'static str, options: &str) -> Subject {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        make(&path, format, options, SIZE);
        Subject { directory, path, format }
    }

    fn words(&self) -> [String; 3] {
        let state = self.directory.path().join("state");
        [self.path.to_str().unwrap().into(), "--state-dir".into(), state.to_str().unwrap().into()]
    }

    fn serve(&self, cache: &str) -> Server<'static> {
        let words = self.words();
        Server::of(&[&words[0], &words[1], &words[2], "--cache", cache])
    }

    /// Linux may end a transfer after the process whose it is; until then that has the lock of the file, for which a
    /// successor waits, and QEMU does not.
    fn wait_for_the_last_transfer(&self) {
        let file = std::fs::File::open(&self.path).unwrap();
        wait_until("the dead server has no lock", || {
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        });
    }

    /// What is in the ledger, and where.
    fn ledgers(&self) -> Vec<(PathBuf, u64)> {
        let Ok(entries) = std::fs::read_dir(self.directory.path().join("state")) else { return Vec::new() };
        entries
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.file_name().to_str().unwrap().starts_with("ledger"))
            .map(|entry| (entry.path(), entry.metadata().unwrap().len()))
            .collect()
    }

    /// Writes to a new place, and dies before that is in the image by itself.
    fn with_something_in_its_ledger(&self, at: u64, bytes: &[u8]) {
        for _ in 0..10 {
            let server = self.serve("direct");
            assert_eq!(server.client(Style::Simple).write(at, bytes), Ok(()));
            server.kill();
            // A busy machine may have had time for a round of its own.
            if self.ledgers().iter().any(|(_, len)| *len > 0) {
                return;
            }
            make(&self.path, self.format, "", SIZE);
        }
        panic!("the ledger is always empty");
    }
}

#[test]
fn a_server_that_is_killed_a_hundred_times_loses_no_answered_write_and_leaves_images_whole() {
    let mut random = Random(77);
    let mut lost = 0;
    let mut subjects: Vec<(Subject, Workload)> = FORMS
        .iter()
        .filter(|(name, _, _)| *name != "fixed.vhd")
        .zip(1..)
        .map(|((name, format, options), seed)| {
            (Subject::new(name, format, options), Workload::on_zeroes(THIN, seed))
        })
        .collect();
    let count = subjects.len();
    for death in 0..100 {
        let (subject, workload) = &mut subjects[death % count];
        let cache = CACHES[death / count % 2];
        let what = format!("{}, {cache}, death {death}", subject.path.display());
        let server = subject.serve(cache);
        workload.connect(&server);
        for _ in 0..50 + random.below(250) {
            workload.step();
        }
        server.kill();
        subject.wait_for_the_last_transfer();
        workload.lose_clients();
        // Without the ledger, as after a power cut: what was flushed is there.
        is_safe(&subject.path, subject.format, &what);
        let raw = as_qemu_reads_it(&subject.path, subject.format);
        lost +=
            workload.check_without_ledger(&what, |at, len| raw[at as usize..(at + len) as usize].to_vec());
        // With it, what was answered.
        let floors = workload.expect_answered();
        let server = subject.serve(cache);
        let mut client = server.client(Style::Structured);
        workload.check(&mut client, &what);
        workload.take_as_it_is(&mut client, floors);
        if death + count >= 100 {
            let ended = server.stop();
            assert!(ended.status.success(), "{what}: {}", ended.stderr);
            is_safe(&subject.path, subject.format, &what);
            assert_eq!(subject.ledgers(), [], "{what}: an end in order leaves no ledger");
        } else {
            server.kill();
        }
    }
    assert!(lost > 0, "without a write that only the ledger has this proves little");
}

#[test]
fn what_was_flushed_is_in_images_after_a_power_cut() {
    let mut lost = 0;
    for (seed, (name, format, options)) in (1_u64..).zip(FORMS) {
        for (cache, is_killed_first) in CACHES.into_iter().zip([true, false]) {
            let sector_bytes = if seed % 2 == 0 { 4096 } else { 512 };
            let fs = faultfs::Options { async_direct_io: true, sector_bytes, ..faultfs::Options::default() };
            let Some(fs) = faultfs::mount_for_test(fs) else { return };
            let what = format!("{name}, {cache}, killed first: {is_killed_first}");
            let image = fs.path().join(name);
            make(&image, format, options, SIZE);
            std::fs::File::open(&image).unwrap().sync_all().unwrap();
            std::fs::File::open(fs.path()).unwrap().sync_all().unwrap();
            let words = [image.to_str().unwrap(), "--cache", cache];
            let server = Server::start(&words, Some(&fs));
            server.wait_ready();
            let mut workload = Workload::on_zeroes(Shape { flush: 15, ..THIN }, seed);
            workload.connect(&server);
            for _ in 0..300 {
                workload.step();
            }
            if is_killed_first {
                server.kill();
                fs.power_cut(Some(seed));
            } else {
                fs.power_cut(Some(seed));
                server.kill();
            }
            workload.lose_clients();
            is_safe(&image, format, &what);
            // What is not said otherwise is kept in a directory of its own: nothing is known of the time before.
            let server = Server::start(&words, Some(&fs));
            server.wait_ready();
            lost += workload.check(&mut server.client(Style::Structured), &what);
            assert!(server.stop().status.success(), "{what}");
            is_safe(&image, format, &what);
        }
    }
    assert!(lost > 0, "a power cut that takes nothing away proves nothing");
}

#[test]
fn a_successor_finds_what_only_the_ledger_has_and_leaves_none() {
    let subject = Subject::new("disk.qcow2", "qcow2", "");
    let bytes = pattern(0, 100 * KIB, 1);
    subject.with_something_in_its_ledger(3 * MIB, &bytes);
    // To be looked at it must be whole, so it has to be written first.
    let words = subject.words();
    let why = refused(&["serve", &words[0], &words[1], &words[2], "--read-only"]);
    assert!(why.contains("a tapdisk that wrote it died") && why.contains("Serve it once"), "{why}");
    let server = subject.serve("direct");
    assert_eq!(server.client(Style::Simple).read(3 * MIB, 100 * KIB), Ok(bytes));
    assert!(server.stop().status.success());
    assert_eq!(subject.ledgers(), []);
    assert_eq!(judged(&subject.path, "qcow2"), Some(0));
    let server = Server::of(&[&words[0], &words[1], &words[2], "--read-only"]);
    assert_eq!(server.client(Style::Simple).read(3 * MIB, 1), Ok(pattern(0, 1, 1)));
}

#[test]
fn what_only_the_ledger_has_is_in_an_image_that_is_marked_as_corrupt_before_it_is_refused() {
    let subject = Subject::new("disk.qcow2", "qcow2", "");
    let bytes = pattern(0, 100 * KIB, 1);
    subject.with_something_in_its_ledger(3 * MIB, &bytes);
    // As by the server that died, had it found nonsense in a table: the second of the incompatible features.
    let file = std::fs::File::options().write(true).open(&subject.path).unwrap();
    file.write_all_at(&[2], 79).unwrap();
    let words = subject.words();
    let why = refused(&["serve", &words[0], &words[1], &words[2]]);
    assert!(why.contains("marked as corrupt") && why.contains("check --repair all"), "{why}");
    assert!(!why.contains("ledger"), "{why}");
    let mut tool = Command::new(env!("CARGO_BIN_EXE_tapdisk"));
    let output = tool.args(["check", "--repair", "all"]).args(&words).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let server = subject.serve("direct");
    assert_eq!(server.client(Style::Simple).read(3 * MIB, 100 * KIB), Ok(bytes));
    assert!(server.stop().status.success());
    assert_eq!(judged(&subject.path, "qcow2"), Some(0));
}

#[test]
fn an_image_is_not_changed_by_who_cannot_see_what_its_server_has_left() {
    let subject = Subject::new("disk.qcow2", "qcow2", "");
    subject.with_something_in_its_ledger(3 * MIB, &[1; 4096]);
    let words = subject.words();
    let nowhere = subject.directory.path().join("disk.qcow2/state");
    let nowhere = nowhere.to_str().unwrap();
    for tool in [&["check", "--repair", "leaks"][..], &["resize"], &["snapshot", "-c", "one"], &["map"]] {
        let size = (tool[0] == "resize").then_some("64M");
        let mut command = Command::new(env!("CARGO_BIN_EXE_tapdisk"));
        let output =
            command.args(tool).args([&words[0], "--state-dir", nowhere]).args(size).output().unwrap();
        let why = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && why.contains(nowhere), "{tool:?}: {why}");
    }
    // Where nobody has said where it is, who only reads is told, and who changes something is stopped.
    let run = |tool: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tapdisk"));
        // As an ordinary user, whose place that is.
        let command = command.uid(65534).env("XDG_RUNTIME_DIR", "/proc/nowhere").args(tool);
        command.arg(&words[0]).current_dir("/").output().unwrap()
    };
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let everyone = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(&subject.path, everyone.clone()).unwrap();
    std::fs::set_permissions(subject.directory.path(), everyone).unwrap();
    let read = run(&["map"]);
    let said = String::from_utf8(read.stderr).unwrap();
    assert!(read.status.success() && said.contains("/proc/nowhere/tapdisk cannot be used"), "{said}");
    assert_eq!(said.matches("--state-dir").count(), 1, "{said}");
    let changed = run(&["check", "--repair", "leaks"]);
    let said = String::from_utf8(changed.stderr).unwrap();
    assert!(!changed.status.success() && said.contains("--state-dir says where that server"), "{said}");
    let server = subject.serve("direct");
    assert_eq!(server.client(Style::Simple).read(3 * MIB, 4096).unwrap()[..], [1; 4096]);
    assert!(server.stop().status.success());
}

#[test]
fn a_ledger_that_is_taken_away_while_it_is_empty_is_made_anew() {
    let subject = Subject::new("disk.qcow2", "qcow2", "");
    let server = subject.serve("direct");
    let mut client = server.client(Style::Simple);
    assert_eq!(client.write(3 * MIB, &[1; 4096]), Ok(()));
    assert_eq!(client.flush(), Ok(()));
    for (path, len) in subject.ledgers() {
        assert_eq!(len, 0, "{}", path.display());
        std::fs::remove_file(path).unwrap();
    }
    assert_eq!(client.write(9 * MIB, &[2; 4096]), Ok(()));
    assert!(!server.stderr().contains("cannot be noted"), "{}", server.stderr());
    server.kill();
    let server = subject.serve("direct");
    assert_eq!(server.client(Style::Simple).read(9 * MIB, 4096).unwrap()[..], [2; 4096]);
    assert!(server.stop().status.success());
}

#[test]
fn an_image_that_another_program_has_written_since_is_refused_and_so_is_a_ledger_that_makes_no_sense() {
    let subject = Subject::new("disk.qcow2", "qcow2", "");
    subject.with_something_in_its_ledger(3 * MIB, &[1; 4096]);
    let words = subject.words();
    let words = ["serve", &words[0], &words[1], &words[2]];
    let (ledger, _) = subject.ledgers().into_iter().find(|(_, len)| *len > 0).unwrap();
    let whole = std::fs::read(&ledger).unwrap();
    let mut broken = whole.clone();
    *broken.last_mut().unwrap() ^= 1;
    std::fs::write(&ledger, broken).unwrap();
    let why = refused(&words);
    assert!(why.contains(ledger.to_str().unwrap()) && why.contains("remove it and check the image"), "{why}");
    std::fs::write(&ledger, whole).unwrap();

    qemu("qemu-io", &["-f", "qcow2", "-c", "write -q -P 9 9M 64k", "-c", "write -q -P 8 3M 4k", words[1]]);
    let why = refused(&words);
    for what in ["another program has changed this image", "ledger0-file-", "remove it and check the image"] {
        assert!(why.contains(what), "no {what} in {why}");
    }
    // Told to do without it, it serves what the other program has left.
    for (path, _) in subject.ledgers() {
        std::fs::remove_file(path).unwrap();
    }
    let server = subject.serve("direct");
    assert_eq!(server.client(Style::Simple).read(3 * MIB, 4096).unwrap()[..], [8; 4096]);
    assert!(server.stop().status.success());
}

#[test]
fn without_a_place_for_a_ledger_answered_writes_are_in_the_image() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.qcow2");
    make(&image, "qcow2", "", SIZE);
    let state = directory.path().join("state");
    let server = Server::of(&[image.to_str().unwrap(), "--state-dir", state.to_str().unwrap()]);
    std::fs::remove_dir(&state).unwrap();
    assert_eq!(server.client(Style::Simple).write(5 * MIB, &pattern(0, 4096, 1)), Ok(()));
    server.wait_for_log("cannot be noted for a successor");
    server.kill();
    is_safe(&image, "qcow2", "without a ledger");
    assert!(as_qemu_reads_it(&image, "qcow2")[5 << 20..][..4096] == pattern(0, 4096, 1)[..]);
}

#[test]
fn an_image_whose_sync_has_failed_is_served_poisoned_until_it_is_stopped_in_order() {
    for (name, format, options) in FORMS {
        let fs = faultfs::Options { async_direct_io: true, ..faultfs::Options::default() };
        let Some(fs) = faultfs::mount_for_test(fs) else { return };
        let image = fs.path().join(name);
        make(&image, format, options, SIZE);
        let state = tempfile::tempdir().unwrap();
        let words = [image.to_str().unwrap(), "--state-dir", state.path().to_str().unwrap()];
        let start = || {
            let server = Server::start(&words, Some(&fs));
            server.wait_ready();
            server
        };
        let server = start();
        let mut client = server.client(Style::Simple);
        assert_eq!(client.write(MIB, &pattern(0, 4096, 1)), Ok(()), "{name}");
        assert_eq!(client.flush(), Ok(()), "{name}");
        assert_eq!(client.write(9 * MIB, &pattern(0, 4096, 2)), Ok(()), "{name}");
        rule(&fs, "fsync:EIO:once,lose");
        assert_eq!(client.flush(), Err(Errno::IO), "{name}");
        assert_eq!(client.write(9 * MIB, &[1; 512]), Err(Errno::IO), "{name}");
        server.kill();
        if name == "fixed.vhd" {
            // Who only reads it is told, and is not kept from it where the map is all there.
            let mut tool = Command::new(env!("CARGO_BIN_EXE_tapdisk"));
            let output = tool.arg("map").args(words).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success() && said.contains("may not be what is on the disk"), "{said}");
            let reader = Server::start(&[&words[..], &["--read-only"]].concat(), Some(&fs));
            reader.wait_for_log("may not be what is on the disk");
            reader.wait_ready();
            assert!(reader.stop().status.success());
        }
        for _ in 0..2 {
            let before = std::fs::read(&image).unwrap();
            let server = start();
            assert!(server.stdout().contains("POISONED"), "{name}: {}", server.stdout());
            let mut client = server.client(Style::Simple);
            assert_eq!(client.read(MIB, 4096), Ok(pattern(0, 4096, 1)), "{name}");
            // It was answered: what the map said is said again.
            assert!(client.read(9 * MIB, 4096).is_ok(), "{name}");
            assert_eq!(client.write(MIB, &[1; 512]), Err(Errno::IO), "{name}");
            assert_eq!(client.write(20 * MIB, &[1; 512]), Err(Errno::IO), "{name}");
            assert_eq!(client.flush(), Err(Errno::IO), "{name}");
            server.kill();
            assert!(std::fs::read(&image).unwrap() == before, "{name}: nothing is written to it");
        }
        // The page cache may show what is not on the disk, so that not even the map is to be had from there.
        let why = refused(&["serve", words[0], words[1], words[2], "--cache", "buffered"]);
        assert!(why.contains("a sync failed") && why.contains("--cache direct"), "{name}: {why}");
        let ended = start().stop();
        assert_eq!(ended.status.code(), Some(1), "{name}: {}", ended.stderr);
        assert!(
            ended.stderr.contains("data that clients were told is written may be lost"),
            "{}",
            ended.stderr
        );
        let server = start();
        let mut client = server.client(Style::Simple);
        assert_eq!(client.write(9 * MIB, &pattern(0, 4096, 3)), Ok(()), "{name}");
        assert_eq!(client.flush(), Ok(()), "{name}");
        assert!(server.stop().status.success(), "{name}");
        is_safe(&image, format, name);
        assert_eq!(std::fs::read_dir(state.path()).unwrap().count(), 0, "{name}: nothing is left of it");
    }
}
