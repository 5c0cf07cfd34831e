//! A server's life: what it says when it starts, where it listens, and how it ends.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Output;

use nbd_client::{Client, Errno, Style};
use rustix::process::Signal;

use crate::server::{Ask, Bytes, CACHES, Server, mount, pattern, rule, syncs, tapdisk, wait_until, zeroes};

fn refused(words: &[&str]) -> String {
    let Output { status, stderr, .. } = tapdisk(words.iter()).output().unwrap();
    assert!(!status.success(), "{words:?} is not refused");
    String::from_utf8(stderr).unwrap()
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

#[test]
fn it_says_what_it_serves_how_and_where_and_with_what_to_try_it() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let server = Server::of(&[image.to_str().unwrap(), "--create", "1G", "--export", "data"]);
    let (said, socket) = (server.stdout(), server.socket());
    let uri = format!("nbd+unix:///data?socket={}", socket.display());
    for words in [
        "Serving disk.img: 1 GiB",
        "raw image",
        "O_DIRECT",
        "sparse",
        &format!("at  {uri}"),
        &format!("try nbdinfo '{uri}'"),
    ] {
        assert!(said.contains(words), "no {words} in {said}");
    }
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o7777, 0o600);
    assert!(server.stop().status.success());
    assert!(!socket.exists(), "the socket is removed at the end");
    let server = Server::of(&[image.to_str().unwrap(), "--cache", "buffered"]);
    assert!(server.stdout().contains("buffered"), "{}", server.stdout());
}

#[test]
fn without_an_address_it_listens_on_a_socket_named_after_the_image() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let mut command = tapdisk(["serve", image.to_str().unwrap(), "--create", "8M"]);
    command.env("XDG_RUNTIME_DIR", directory.path());
    let socket = directory.path().join("tapdisk-disk.img.sock");
    let server = Server::run(command, directory, None);
    server.wait_ready();
    assert!(server.stdout().contains(socket.to_str().unwrap()), "{}", server.stdout());
    assert_eq!(Client::connect(&socket, Style::Simple).unwrap().read(0, 512), Ok(zeroes(512)));
    assert!(server.stop().status.success());
}

/// The size that a client is told when it connects.
fn told(server: &Server<'_>) -> u64 {
    server.client(Style::Structured).size()
}

#[test]
fn told_to_grow_it_takes_in_what_was_added_to_the_image() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("disk.img");
    let image = std::fs::File::create_new(&path).unwrap();
    for cache in CACHES {
        image.set_len(10_000).unwrap();
        let server = Server::of(&[path.to_str().unwrap(), "--cache", cache]);
        let mut old = server.client(Style::Structured);
        assert_eq!((old.size(), told(&server)), (10_000, 10_000));
        server.signal(Signal::HUP);
        server.wait_for_log("nothing was added");
        for (from, to) in [(10_000, 10_240), (10_240, 1 << 20), ((1 << 20), (1 << 20) + 77)] {
            image.set_len(to).unwrap();
            assert_eq!(told(&server), from, "{cache}: nobody has said so yet");
            server.signal(Signal::HUP);
            server.wait_for_log(&format!("old={from} new={to}"));
            let mut new = server.client(Style::Structured);
            assert_eq!((new.size(), old.size()), (to, 10_000), "{cache}");
            assert_eq!(new.write(to - 100, &[cache.len() as u8; 100]), Ok(()), "{cache}");
            assert_eq!(new.flush(), Ok(()));
            assert_eq!(new.write(to - 99, &[1; 100]), Err(Errno::NOSPC), "{cache}: beyond the end");
            // Who connected before keeps to what it was told.
            assert_eq!(old.write(9_900, &[2; 100]), Ok(()), "{cache}");
            assert_eq!(old.write(9_901, &[1; 100]), Err(Errno::NOSPC), "{cache}");
            assert_eq!(old.read(10_000, 1), Err(Errno::INVAL), "{cache}");
            assert_eq!(new.read(9_900, 100), Ok(Bytes(vec![2; 100])), "{cache}");
        }
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes[1_048_553..] == [cache.len() as u8; 100] && bytes[9_900..10_000] == [2; 100]);
        image.set_len(5_000).unwrap();
        server.signal(Signal::HUP);
        server.wait_for_log("shrunk to 5000 bytes, 1048653 are served");
        assert_eq!(told(&server), 1_048_653);
        image.set_len(1_048_653).unwrap();
        assert!(server.stop().status.success());
        image.set_len(0).unwrap();
    }
}

#[test]
fn what_cannot_grow_says_so_and_is_served_on() {
    let server = Server::of(&["ram:8M"]);
    server.signal(Signal::HUP);
    server.wait_for_log("EOPNOTSUPP");
    assert_eq!(server.client(Style::Simple).read((8 << 20) - 512, 512), Ok(zeroes(512)));
    assert!(server.stop().status.success());
}

#[test]
fn a_signal_ends_it_in_order_and_after_a_flush() {
    for signal in [Signal::INT, Signal::TERM] {
        let Some(fs) = mount() else { return };
        let server = Server::on(&fs, &[]);
        let mut client = server.client(Style::Simple);
        assert_eq!(client.write(0, &pattern(0, 4096, 1)), Ok(()));
        let before = syncs(&fs);
        server.signal(signal);
        let ended = server.ended();
        assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
        assert!(syncs(&fs) > before);
        assert_eq!(crate::server::durable(&fs, 0, 4096), pattern(0, 4096, 1));
    }
}

#[test]
fn a_last_flush_that_fails_is_told_and_the_exit_status_is_not_zero() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &[]);
    assert_eq!(server.client(Style::Simple).write(0, &[1; 512]), Ok(()));
    rule(&fs, "fsync:EIO");
    let ended = server.stop();
    assert_eq!(ended.status.code(), Some(1));
    for words in ["data that clients were told is written may be lost", "the last flush", "EIO"] {
        assert!(ended.stderr.contains(words), "no {words} in {}", ended.stderr);
    }
}

#[test]
fn a_stale_socket_is_replaced_a_live_one_and_what_is_no_socket_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nbd.sock");
    drop(UnixListener::bind(&socket).unwrap());
    assert!(std::fs::metadata(&socket).unwrap().file_type().is_socket());
    let server = Server::run(tapdisk(["serve", "ram:8M", "--nbd", &unix(&socket)]), directory, None);
    server.wait_ready();
    assert_eq!(server.client(Style::Simple).flush(), Ok(()));
    let why = refused(&["serve", "ram:8M", "--nbd", &unix(&socket)]);
    assert!(why.contains("another process is listening on this socket"), "{why}");
    assert_eq!(server.client(Style::Simple).flush(), Ok(()), "the live one goes on");

    let file = server.socket().with_file_name("file");
    std::fs::write(&file, "precious").unwrap();
    let why = refused(&["serve", "ram:8M", "--nbd", &unix(&file)]);
    assert!(why.contains("no socket"), "{why}");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let long = format!("unix:/tmp/{}", "x".repeat(120));
    assert!(refused(&["serve", "ram:8M", "--nbd", &long]).contains("at most 107 bytes"));
    assert!(server.stop().status.success());
}

#[test]
fn tcp_is_for_this_host_unless_allowed() {
    let why = refused(&["serve", "ram:8M", "--nbd", "tcp:0.0.0.0:0"]);
    assert!(why.contains("--allow-remote"), "{why}");
    assert!(refused(&["serve", "ram:8M", "--nbd", "tcp:[::]:0"]).contains("--allow-remote"));
    let server = Server::of(&["ram:8M", "--nbd", "tcp:127.0.0.1:0"]);
    let said = server.stdout();
    let (_, rest) = said.split_once("nbd://").expect("the port that was chosen is told");
    let address = rest.split_whitespace().next().unwrap();
    let mut client = Client::connect_tcp(address, Style::Structured).unwrap();
    assert_eq!(client.write(0, &pattern(0, 65536, 1)), Ok(()));
    assert_eq!(server.client(Style::Simple).read(0, 65536), Ok(pattern(0, 65536, 1)), "by unix socket too");
    let ended = server.stop();
    assert!(ended.status.success(), "{}", ended.stderr);
    let server = Server::of(&["ram:8M", "--nbd", "tcp:0.0.0.0:0", "--allow-remote"]);
    assert!(server.stop().status.success());
}

#[test]
fn null_and_memory_need_no_file() {
    let server = Server::of(&["null:1G"]);
    let mut client = server.client(Style::Simple);
    assert_eq!((client.size(), client.write(0, &[1; 512])), (1 << 30, Ok(())));
    assert_eq!(client.read(0, 512), Ok(zeroes(512)), "forgotten, as it says");
    assert!(server.stdout().contains("writes are forgotten"));
    let server = Server::of(&["ram:3M"]);
    let mut client = server.client(Style::Simple);
    assert_eq!((client.size(), client.write(0, &pattern(0, 512, 1))), (3 << 20, Ok(())));
    assert_eq!(client.read(0, 512), Ok(pattern(0, 512, 1)));
    assert!(server.stdout().contains("lost when tapdisk ends"));
}

#[test]
fn faults_can_be_asked_for_in_drills() {
    let server = Server::of(&["ram:8M", "--fault", "read:EIO:8s..16s", "--fault", "write:ENOSPC:nth=2"]);
    let mut client = server.client(Style::Structured);
    assert_eq!(client.read(0, 4096), Ok(zeroes(4096)));
    assert_eq!(client.read(4096, 512), Err(nbd_client::Errno::IO));
    assert_eq!(client.write(0, &[1; 512]), Ok(()));
    assert_eq!(client.write(0, &[1; 512]), Err(nbd_client::Errno::NOSPC));
    assert_eq!(client.write(0, &[1; 512]), Ok(()));
}

#[test]
fn bad_arguments_are_refused_in_words() {
    for (words, named) in [
        (&["serve"][..], "<IMAGE>"),
        (&["serve", "x", "--create", "1X"], "no unit of size"),
        (&["serve", "x", "--create", "1G", "--read-only"], "cannot be used with"),
        (&["serve", "ram:8M", "--nbd", "/run/x"], "expected unix:PATH or tcp:ADDRESS:PORT"),
        (&["serve", "ram:8M", "--on-error", "pray"], "none of report, hold and retry:SECONDS"),
        (&["serve", "ram:8M", "--fault", "read:EWHAT"], "no action"),
        (&["serve", "ram:8M", "--memory", "1M"], "too little"),
        (&["serve", "null:0"], "makes no disk"),
        (&["serve", "x", "--format", "qcow9"], "raw"),
        (&["serve", "ram:8M", "--xen", "3:sda16"], "beyond the last partition"),
        (&["serve", "ram:8M", "--create-nodes"], "--xen <DOMAIN:VDEV>"),
        (&["detach", "xvdb"], "is not DOMAIN:VDEV"),
        (&["server"], "serve"),
    ] {
        let why = refused(words);
        assert!(why.contains(named), "{words:?}: {why}");
    }
}

#[test]
fn help_version_completions_and_man_page_come_from_the_program() {
    let said = |words: &[&str]| {
        let Output { status, stdout, .. } = tapdisk(words.iter()).output().unwrap();
        assert!(status.success(), "{words:?}");
        String::from_utf8(stdout).unwrap()
    };
    assert_eq!(said(&["--version"]).trim(), format!("tapdisk {}", env!("CARGO_PKG_VERSION")));
    for option in ["--on-enospc", "--cache", "--create", "--memory", "--allow-remote", "--xen-features"] {
        assert!(said(&["serve", "--help"]).contains(option), "{option}");
        assert!(said(&["completions", "bash"]).contains(option), "{option}");
    }
    assert!(said(&["man"]).contains(".TH"));
    let pages = tempfile::tempdir().unwrap();
    said(&["man", "--directory", pages.path().to_str().unwrap()]);
    let page = std::fs::read_to_string(pages.path().join("tapdisk-serve.1")).unwrap();
    assert!(page.contains("on\\-enospc"), "{page}");
    let page = std::fs::read_to_string(pages.path().join("tapdisk-detach.1")).unwrap();
    assert!(page.contains("DOMAIN:VDEV"), "{page}");
}

#[test]
fn a_reader_of_its_output_who_leaves_ends_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nbd.sock");
    let mut command = tapdisk(["serve", "ram:8M", "--nbd", &unix(&socket)]);
    let mut child =
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    wait_until("it serves", || Client::connect(&socket, Style::Simple).is_ok());
    assert_eq!(Client::connect(&socket, Style::Simple).unwrap().flush(), Ok(()));
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn where_the_kernel_forbids_io_uring_it_says_so_and_what_to_do() {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
    let (deny, allow) = (SeccompAction::Errno(1), SeccompAction::Allow); // EPERM, as kernel.io_uring_disabled gives
    let io_uring_setup = 425;
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new([(io_uring_setup, vec![])].into(), allow, deny, arch).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    // A filter is of the thread that sets it and of the processes that it starts.
    let run = move || {
        seccompiler::apply_filter(&program).unwrap();
        refused(&["serve", "ram:8M"])
    };
    let why = std::thread::spawn(run).join().unwrap();
    assert!(why.contains("io_uring"), "{why}");
    assert!(why.contains("kernel.io_uring_disabled"), "{why}");
}
