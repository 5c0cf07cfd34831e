//! Where a server can be reached, and by whom.

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};

use guest::listen::{Address, ListenError, Listener};

#[test]
fn only_the_owner_can_reach_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let _listener = Listener::unix(&path).unwrap();
    let found = fs::symlink_metadata(&path).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o7777, 0o600);
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_socket_that_nobody_listens_on_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left behind, as by a process that was killed");
    let _listener = Listener::unix(&path).unwrap();
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_socket_in_use_is_refused_and_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let first = Listener::unix(&path).unwrap();
    let error = Listener::unix(&path).err().unwrap();
    assert!(matches!(error, ListenError::Live(_)), "{error}");
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    UnixStream::connect(&path).unwrap();
    drop(first);
    assert!(!path.exists());
}

#[test]
fn a_socket_whose_owner_is_busy_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let _owner = Listener::unix(&path).unwrap();
    // More clients than may wait to be accepted; nobody accepts them.
    let clients: Vec<_> = (0..200)
        .map_while(|_| {
            let flags = rustix::net::SocketFlags::NONBLOCK;
            let (family, kind) = (rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM);
            let socket = rustix::net::socket_with(family, kind, flags, None).unwrap();
            let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
            rustix::net::connect(&socket, &address).ok().map(|()| socket)
        })
        .collect();
    assert!(clients.len() < 200);
    assert!(matches!(Listener::unix(&path), Err(ListenError::Live(_))));
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("precious");
    fs::write(&path, "data").unwrap();
    assert!(matches!(Listener::unix(&path), Err(ListenError::NotASocket(_))));
    assert_eq!(fs::read(&path).unwrap(), b"data");
    let link = directory.path().join("link");
    symlink(&path, &link).unwrap();
    assert!(matches!(Listener::unix(&link), Err(ListenError::NotASocket(_))));
    assert!(matches!(Listener::unix(directory.path()), Err(ListenError::NotASocket(_))));
}

#[test]
fn a_socket_is_removed_only_while_it_is_ours() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let first = Listener::unix(&path).unwrap();
    fs::remove_file(&path).unwrap();
    drop(first); // removed by somebody else before: nothing to do
    let second = Listener::unix(&path).unwrap();
    // Not removed but moved away, so that its inode is not used again.
    fs::rename(&path, directory.path().join("moved")).unwrap();
    let theirs = UnixListener::bind(&path).unwrap();
    drop(second);
    assert!(path.exists(), "another took the path");
    drop(theirs);
}

#[test]
fn paths_that_cannot_be_are_told_as_such() {
    let directory = tempfile::tempdir().unwrap();
    let long = directory.path().join("x".repeat(200));
    assert!(matches!(Listener::unix(&long), Err(ListenError::PathTooLong(_))));
    let error = Listener::unix(&directory.path().join("not here/socket")).err().unwrap();
    assert!(error.to_string().contains("bind: No such file or directory"), "{error}");
}

#[test]
fn starting_many_at_once_starts_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    for _ in 0..20 {
        drop(UnixListener::bind(&path).unwrap()); // stale
        let starting: Vec<_> = (0..8)
            .map(|_| {
                let path = path.clone();
                std::thread::spawn(move || Listener::unix(&path))
            })
            .collect();
        let started: Vec<_> = starting.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect();
        assert_eq!(started.len(), 1);
        UnixStream::connect(&path).unwrap();
    }
}

#[test]
fn other_hosts_are_kept_out_unless_they_are_let_in() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:10809", "[::ffff:192.0.2.1]:10809"] {
        let error = Listener::tcp(address.parse().unwrap(), false).err().unwrap();
        assert!(matches!(error, ListenError::Remote(_)), "{error}");
        assert!(error.to_string().contains("--allow-remote"), "{error}");
    }
    let open = Listener::tcp("0.0.0.0:0".parse().unwrap(), true).unwrap();
    TcpStream::connect(("127.0.0.1", open.port().unwrap())).unwrap();
}

#[test]
fn loopback_is_reached_by_both_families() {
    for host in ["127.0.0.1", "::1"] {
        let address = Address::Tcp { host: host.into(), port: 0 };
        match Listener::bind(&address, false).as_deref() {
            Ok([listener]) => {
                TcpStream::connect((host, listener.port().unwrap())).unwrap();
            }
            Ok(_) => panic!("one address, one listener"),
            // A host without IPv6 is no failure of ours.
            Err(error) => assert!(host == "::1" && error.to_string().contains("assign requested"), "{error}"),
        }
    }
    let address = Address::Tcp { host: "no.such.host.invalid".into(), port: 1 };
    assert!(matches!(Listener::bind(&address, true), Err(ListenError::Unknown { .. })));
}

#[test]
fn addresses_are_read_as_they_are_written() {
    let tcp = |host: &str, port| Address::Tcp { host: host.into(), port };
    for (text, address) in [
        ("unix:/run/disk.sock", Address::Unix("/run/disk.sock".into())),
        ("unix:a:b", Address::Unix("a:b".into())),
        ("tcp:127.0.0.1:10809", tcp("127.0.0.1", 10809)),
        ("tcp:localhost:0", tcp("localhost", 0)),
        ("tcp:[::1]:10809", tcp("::1", 10809)),
        ("tcp:::1:10809", tcp("::1", 10809)),
    ] {
        assert_eq!(text.parse::<Address>().unwrap(), address, "{text}");
    }
    for text in ["", "unix:", "/run/disk.sock", "tcp:10809", "tcp::10809", "tcp:host:65536", "udp:host:1"] {
        assert!(text.parse::<Address>().is_err(), "{text}");
    }
}

#[test]
fn uris_are_what_clients_take() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a socket?");
    let listener = Listener::unix(&path).unwrap();
    let directory = directory.path().display();
    assert_eq!(listener.uri(""), format!("nbd+unix:///?socket={directory}/a%20socket%3F"));
    assert_eq!(listener.uri("a disk"), format!("nbd+unix:///a%20disk?socket={directory}/a%20socket%3F"));
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap(), false).unwrap();
    let port = listener.port().unwrap();
    assert_eq!(listener.uri(""), format!("nbd://127.0.0.1:{port}"));
    assert_eq!(listener.uri("d"), format!("nbd://127.0.0.1:{port}/d"));
}
