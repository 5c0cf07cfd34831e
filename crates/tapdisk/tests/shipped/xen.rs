//! What the binary says of Xen where there is none, and how it asks for the end of a disk in a xenstore within the test.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};

use tempfile::TempDir;
use xen::Domain;
use xen::fake::store::Store;

use crate::server::tapdisk;

/// What is said by a command that fails, where the xenstore is looked for at this path; `None` on Xen itself.
fn refused(words: &[&str], store: &Path) -> Option<String> {
    if Path::new("/dev/xen/gntdev").exists() {
        eprintln!("not tested: this machine has Xen's devices");
        return None;
    }
    let output = tapdisk(words.iter()).env("XENSTORED_PATH", store).output().unwrap();
    let Output { status, stdout, stderr } = output;
    assert_eq!((status.code(), stdout.len()), (Some(1), 0), "{words:?}");
    Some(String::from_utf8(stderr).unwrap())
}

#[test]
fn where_there_is_no_xen_it_says_so_and_touches_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (image, state) = (directory.path().join("disk.img"), directory.path().join("state"));
    let (image_text, state_text) = (image.to_str().unwrap(), state.to_str().unwrap());
    let words = [
        "serve",
        image_text,
        "--create",
        "8M",
        "--state-dir",
        state_text,
        "--xen",
        "3:xvdb",
        "--create-nodes",
    ];
    let Some(why) = refused(&words, Path::new("/nowhere/store")) else { return };
    assert!(why.contains("no guest of Xen can be served: there is no /dev/xen/gntdev"), "{why}");
    assert!(!image.exists() && !state.exists());
}

#[test]
fn where_there_is_no_xenstore_nothing_is_detached_and_it_says_where_it_looked() {
    for disk in ["3:xvdb", "web:51728"] {
        let Some(why) = refused(&["detach", disk], Path::new("/nowhere/store")) else { return };
        assert!(why.contains("no xenstore") && why.contains("/nowhere/store (No such file"), "{why}");
    }
}

/// A xenstore that a process of its own reaches by a socket, as the daemon's.
struct Daemon {
    store: Store,
    socket: PathBuf,
    _directory: TempDir,
}

impl Daemon {
    fn new() -> Daemon {
        let (store, directory) = (Store::new(), tempfile::tempdir().unwrap());
        let socket = directory.path().join("store.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let of_dom0 = store.clone();
        // It ends with the test, as all threads do.
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                let server = UnixStream::from(of_dom0.connect_as(Domain(0)).unwrap());
                carry(client.try_clone().unwrap(), server.try_clone().unwrap());
                carry(server, client);
            }
        });
        Daemon { store, socket, _directory: directory }
    }

    /// With a disk that is served: `xvdb` of domain 3, which is called `web`.
    fn with_a_disk() -> Daemon {
        let daemon = Daemon::new();
        let store = &daemon.store;
        store.introduce(Domain(3));
        store.write("/local/domain/3/name", "web");
        for (key, value) in [
            ("frontend", "/local/domain/3/device/vbd/51728"),
            ("frontend-id", "3"),
            ("online", "1"),
            ("state", "4"),
        ] {
            store.write(&format!("{BACK}/{key}"), value);
        }
        for (key, value) in [("backend", BACK), ("backend-id", "0"), ("state", "4")] {
            store.write(&format!("{FRONT}/{key}"), value);
        }
        daemon
    }

    fn detach(&self, words: &[&str]) -> Child {
        let mut command = tapdisk(["detach"].iter().chain(words));
        command.env("XENSTORED_PATH", &self.socket);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }
}

const BACK: &str = "/local/domain/0/backend/vbd3/3/51728";
const FRONT: &str = "/local/domain/3/device/vbd/51728";

/// All bytes from one to the other until the end of them.
fn carry(mut from: UnixStream, mut to: UnixStream) {
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(len @ 1..) = from.read(&mut bytes) {
            if to.write_all(&bytes[..len]).is_err() {
                break;
            }
        }
        // The other end may be gone as well.
        drop(to.shutdown(Shutdown::Both));
    });
}

#[test]
fn detaching_asks_both_ends_and_waits_until_the_disk_is_closed() {
    for disk in ["3:xvdb", "web:51728"] {
        let daemon = Daemon::with_a_disk();
        let child = daemon.detach(&[disk]);
        // What a toolstack writes, and then what the server writes in the end.
        daemon.store.wait_for(&format!("{BACK}/state"), "5");
        assert_eq!(daemon.store.read(&format!("{BACK}/online")).as_deref(), Some("0"));
        daemon.store.write(&format!("{BACK}/state"), "6");
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{disk}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_disk_whose_nodes_are_removed_by_its_server_is_detached() {
    let daemon = Daemon::with_a_disk();
    let child = daemon.detach(&["web:xvdb"]);
    daemon.store.wait_for(&format!("{BACK}/state"), "5");
    daemon.store.remove(BACK);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_disk_that_is_not_there_or_not_let_go_is_said() {
    let daemon = Daemon::with_a_disk();
    for (words, named) in [
        (
            &["3:xvdc"][..],
            "3:xvdc cannot be detached: there is no disk at /local/domain/0/backend/vbd3/3/51744",
        ),
        (&["3:xvdb", "--xen-kind", "other"], "there is no disk at /local/domain/0/backend/other/3/51728"),
        (&["mail:xvdb"], "no domain that is called `mail`"),
        (&["3:xvdb", "--timeout", "1"], "the guest has not let go of it within 1 s"),
    ] {
        let output = daemon.detach(words).wait_with_output().unwrap();
        let why = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && why.contains(named), "{words:?}: {why}");
    }
}
