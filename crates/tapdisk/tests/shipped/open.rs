//! Images: made, kept, locked, waited for; files and block devices.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nbd_client::{Request, Style};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;

use crate::server::{Ask, LONG, Server, mount, pattern, refused, rule, wait_until, zeroes};

const MIB: u64 = 1 << 20;

#[test]
fn create_makes_a_sparse_image_and_keeps_one_that_exists() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let image_text = image.to_str().unwrap();
    let why = refused(&["serve", image_text]);
    assert!(why.contains("does not exist") && why.contains("--create"), "{why}");

    let server = Server::of(&[image_text, "--create", "1G"]);
    let found = std::fs::metadata(&image).unwrap();
    assert_eq!((found.len(), found.mode() & 0o7777), (1 << 30, 0o600));
    assert!(found.blocks() * 512 < MIB, "{} blocks", found.blocks());
    assert_eq!(server.client(Style::Simple).write(4096, &pattern(0, 4096, 1)), Ok(()));
    assert!(server.stop().status.success());

    let server = Server::of(&[image_text, "--create", "2G"]);
    let said = server.stdout();
    assert!(said.contains("1 GiB") && said.contains("kept (not 2 GiB)"), "{said}");
    assert_eq!(server.client(Style::Simple).read(4096, 4096), Ok(pattern(0, 4096, 1)));
    assert!(server.stop().status.success());
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 1 << 30);
}

#[test]
fn what_is_no_image_is_refused_in_words() {
    let directory = tempfile::tempdir().unwrap();
    let empty = directory.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    for (image, named) in [
        (empty.to_str().unwrap(), "is empty"),
        (directory.path().to_str().unwrap(), "a directory"),
        ("/dev/zero", "a special file"),
        ("/nowhere/disk.img", "does not exist"),
    ] {
        let why = refused(&["serve", image]);
        assert!(why.contains(named), "{image}: {why}");
    }
    let why = refused(&["serve", "/proc/version-of-nothing", "--create", "1M"]);
    assert!(why.contains("cannot open it"), "{why}");
}

#[test]
fn storage_that_fails_while_the_image_is_made_is_told() {
    for (fault, named) in
        [("truncate:ENOSPC", "as large as asked for"), ("fsync:EIO", "durable"), ("syncdir:EIO", "durable")]
    {
        let Some(fs) = mount() else { return };
        rule(&fs, fault);
        let image = fs.path().join("disk.img");
        let why = refused(&["serve", image.to_str().unwrap(), "--create", "8M"]);
        assert!(why.contains(named), "{fault}: {why}");
    }
}

#[test]
fn a_size_that_is_no_multiple_of_anything_is_served_to_the_last_byte_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let size = MIB + 777;
    std::fs::write(&image, &*pattern(0, size, 1)).unwrap();
    for cache in crate::server::CACHES {
        let server = Server::of(&[image.to_str().unwrap(), "--cache", cache]);
        assert!(server.stdout().contains("no multiple of 512"), "{}", server.stdout());
        let mut client = server.client(Style::Structured);
        assert_eq!(client.size(), size);
        assert_eq!(client.read(MIB, 777), Ok(pattern(MIB, 777, 1)), "{cache}");
        assert_eq!(client.write(size - 5, &[7; 5]), Ok(()), "{cache}");
        assert_eq!(client.read(size - 6, 6).unwrap()[1..], [7; 5], "{cache}");
        assert_eq!(client.write(size - 5, &pattern(size - 5, 5, 1)), Ok(()), "{cache}");
        assert_eq!(client.flush(), Ok(()), "{cache}");
        assert!(server.stop().status.success(), "{cache}");
        assert_eq!(std::fs::read(&image).unwrap(), *pattern(0, size, 1), "{cache}");
    }
}

#[test]
fn readers_share_an_image_and_a_writer_has_it_alone() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    std::fs::write(&image, &*pattern(0, MIB, 1)).unwrap();
    let words = [image.to_str().unwrap(), "--read-only"];
    let readers = [Server::of(&words), Server::of(&words)];
    for reader in &readers {
        assert_eq!(reader.client(Style::Simple).read(0, 4096), Ok(pattern(0, 4096, 1)));
    }
    let writer = Server::start(&words[..1], None);
    writer.wait_for_log("the image is in use: waiting up to 30 s");
    drop(readers);
    writer.wait_ready();
    assert_eq!(writer.client(Style::Simple).write(0, &[1; 512]), Ok(()));
}

#[test]
fn a_second_server_waits_for_the_image_and_is_told_in_the_end_who_holds_it() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let server = Server::of(&[image.to_str().unwrap(), "--create", "8M"]);
    let second = Server::start(&[&image], None);
    second.wait_for_log("the image is in use: waiting up to 30 s");
    let ended = second.ended();
    assert_eq!(ended.status.code(), Some(1));
    let holder = format!("is in use by process {} (tapdisk)", server.pid().as_raw_nonzero());
    assert!(ended.stderr.contains(&holder), "{}", ended.stderr);
    assert!(ended.stderr.contains("waited 30 s"), "{}", ended.stderr);
    assert_eq!(server.client(Style::Simple).flush(), Ok(()), "the first goes on");
}

#[test]
fn a_restart_after_a_crash_waits_until_the_last_write_of_the_dead_is_done() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &[]);
    let mut client = server.client(Style::Simple);
    rule(&fs, "write:hang:once");
    client.send(&Request::write(0, &pattern(0, 4096, 1))).unwrap();
    assert!(fs.wait_hanging(1, LONG));
    server.signal(Signal::KILL);
    let image = fs.path().join(crate::server::IMAGE);
    let successor = Server::start(&[&image], Some(&fs));
    successor.wait_for_log("the image is in use: waiting up to 30 s");
    assert!(!successor.stdout().contains("Serving"), "{}", successor.stdout());
    assert_eq!(fs.release(), 1);
    successor.wait_ready();
    let mut client = successor.client(Style::Simple);
    assert_eq!(client.write(0, &pattern(0, 4096, 2)), Ok(()));
    assert_eq!(client.read(0, 4096), Ok(pattern(0, 4096, 2)), "nothing late lands on newer data");
    assert!(successor.stop().status.success());
}

#[test]
fn a_tool_that_looks_at_an_image_waits_for_the_last_write_of_a_dead_server() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &[]);
    let mut client = server.client(Style::Simple);
    rule(&fs, "write:hang:once");
    client.send(&Request::write(0, &pattern(0, 4096, 1))).unwrap();
    assert!(fs.wait_hanging(1, LONG));
    server.signal(Signal::KILL);
    let image = fs.path().join(crate::server::IMAGE);
    let mut tool = Command::new(env!("CARGO_BIN_EXE_tapdisk"));
    tool.args(["map", "--format", "raw"]).arg(image);
    let mut tool = tool.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(tool.try_wait().unwrap(), None, "it has not given up");
    assert_eq!(fs.release(), 1);
    let output = tool.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A loop device over a new file of 32 MiB.
struct Loop {
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Loop {
    /// `None` for an ordinary user.
    fn new() -> Option<Loop> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("not tested: only root makes loop devices");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("backing");
        std::fs::File::create(&file).unwrap().set_len(32 * MIB).unwrap();
        let path = run("losetup", &["--find", "--show", file.to_str().unwrap()]);
        Some(Loop { path: path.trim().into(), _directory: directory })
    }

    fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["--detach", self.text()]);
    }
}

fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        run("umount", &[self.0.to_str().unwrap()]);
    }
}

#[test]
fn a_block_device_is_served_and_opened_for_its_server_alone() {
    let Some(device) = Loop::new() else { return };
    let server = Server::of(&[device.text()]);
    assert!(
        server.stdout().contains("block device") && server.stdout().contains("32 MiB"),
        "{}",
        server.stdout()
    );
    let mut client = server.client(Style::Structured);
    assert_eq!(client.size(), 32 * MIB);
    assert_eq!(client.write(MIB, &pattern(0, 65536, 1)), Ok(()));
    assert_eq!(client.write(MIB + 1000, &[9; 10]), Ok(()), "not aligned");
    assert_eq!(client.done(&Request::zeroes(0, MIB)), Ok(()));
    assert_eq!(client.done(&Request::trim(2 * MIB, MIB)), Ok(()));
    assert_eq!(client.flush(), Ok(()));
    assert_eq!(client.read(MIB, 1000), Ok(pattern(0, 1000, 1)));
    assert_eq!(client.read(MIB + 1000, 10).unwrap().0, [9; 10]);
    assert_eq!(client.read(0, 4096), Ok(zeroes(4096)));
    let again = rustix::fs::open(&device.path, OFlags::RDWR | OFlags::EXCL, Mode::empty());
    assert_eq!(again.unwrap_err(), rustix::io::Errno::BUSY);
    assert!(server.stop().status.success());
}

#[test]
fn a_mounted_block_device_is_refused_until_it_is_unmounted() {
    let Some(device) = Loop::new() else { return };
    run("mkfs.ext4", &["-q", device.text()]);
    let directory = tempfile::tempdir().unwrap();
    run("mount", &[device.text(), directory.path().to_str().unwrap()]);
    let mounted = Mounted(directory.path());
    let server = Server::start(&[device.text()], None);
    server.wait_for_log("the image is in use: waiting up to 30 s");
    server.wait_for_log("mounted");
    assert!(server.stdout().is_empty());
    drop(mounted);
    wait_until("it has the device", || server.stdout().contains("Serving"));
    assert!(server.stop().status.success());
}
