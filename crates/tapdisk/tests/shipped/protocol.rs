//! Requests that cannot be done: answered by the protocol's numbers, or the connection ends, and nobody else notices.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use nbd_client::{Client, Errno, Request, Style};

use crate::server::{Ask, LONG, Server, pattern, wait_until, zeroes};

const MIB: u64 = 1 << 20;
const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

#[test]
fn requests_beyond_the_end_are_answered_without_touching_anything() {
    let server = Server::of(&["ram:8M"]);
    for style in STYLES {
        let mut client = server.client(style);
        assert_eq!(client.size(), 8 * MIB);
        let block = pattern(0, 4096, 1);
        assert_eq!(client.write(8 * MIB - 4096, &block), Ok(()));
        assert_eq!(client.read(8 * MIB - 1, 1).unwrap().len(), 1, "up to the end");
        // "Error values": ENOSPC for writes beyond the end, EINVAL for the rest.
        for at in [8 * MIB, 8 * MIB - 1, u64::MAX - 4095, u64::MAX - 1, 1 << 63] {
            assert_eq!(client.read(at, 4096), Err(Errno::INVAL), "{style:?}, {at}");
            assert_eq!(client.write(at, &block), Err(Errno::NOSPC), "{style:?}, {at}");
            assert_eq!(client.done(&Request::zeroes(at, 4096)), Err(Errno::NOSPC), "{style:?}, {at}");
            assert_eq!(client.done(&Request::trim(at, 4096)), Err(Errno::INVAL), "{style:?}, {at}");
            assert_eq!(client.done(&Request::cache(at, 4096)), Err(Errno::INVAL), "{style:?}, {at}");
        }
        assert_eq!(client.read(8 * MIB - 4096, 4096), Ok(block), "{style:?}");
        assert_eq!(client.read(0, 4096), Ok(zeroes(4096)), "{style:?}: nothing wrapped around");
    }
}

#[test]
fn a_read_only_disk_refuses_changes_and_takes_everything_else() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    std::fs::write(&image, &*pattern(0, MIB, 1)).unwrap();
    let server = Server::of(&[image.to_str().unwrap(), "--read-only"]);
    assert!(server.stdout().contains("read-only"), "{}", server.stdout());
    for style in STYLES {
        let mut client = server.client(style);
        assert_eq!(client.flags() >> 1 & 1, 1, "NBD_FLAG_READ_ONLY");
        assert_eq!(client.write(0, &[0; 512]), Err(Errno::PERM));
        assert_eq!(client.done(&Request::zeroes(0, 512)), Err(Errno::PERM));
        assert_eq!(client.done(&Request::trim(0, 512)), Err(Errno::PERM));
        assert_eq!(client.read(0, MIB), Ok(pattern(0, MIB, 1)));
        assert_eq!(client.flush(), Ok(()));
        assert_eq!(client.done(&Request::cache(0, MIB)), Ok(()));
    }
    assert!(server.stop().status.success());
    assert_eq!(std::fs::read(&image).unwrap(), *pattern(0, MIB, 1));
}

#[test]
fn unknown_commands_and_flags_are_answered_as_invalid() {
    let server = Server::of(&["ram:8M"]);
    for style in STYLES {
        let mut client = server.client(style);
        for command in [8, 99, 0xffff] {
            assert_eq!(
                client.done(&Request::new(command, 0, 512)),
                Err(Errno::INVAL),
                "{style:?}, {command}"
            );
        }
        for flag in [1 << 6, 1 << 15] {
            assert_eq!(client.done(&Request::read(0, 512).flagged(flag)), Err(Errno::INVAL), "{style:?}");
            assert_eq!(
                client.done(&Request::write(0, &[1; 512]).flagged(flag)),
                Err(Errno::INVAL),
                "{style:?}"
            );
        }
        assert_eq!(client.read(0, 512), Ok(zeroes(512)), "{style:?}: it goes on");
    }
}

#[test]
fn a_payload_that_is_too_long_is_refused_and_one_that_is_much_too_long_ends_the_connection() {
    let server = Server::of(&["null:1G"]);
    let mut client = server.client(Style::Simple);
    let payload = vec![1; (32 << 20) + 512];
    assert_eq!(client.write(0, &payload[..32 << 20]), Ok(()), "32 MiB is what is advertised");
    assert_eq!(client.write(0, &payload), Err(Errno::INVAL));
    assert_eq!(client.read(0, 33 * MIB), Err(Errno::INVAL));
    assert_eq!(client.read(0, 512), Ok(zeroes(512)), "it goes on");
    assert_eq!(server.client(Style::Structured).read(0, 33 * MIB), Err(Errno::OVERFLOW));
    let header = Request { len: 1 << 31, ..Request::new(1, 0, 0) }.header(Style::Simple, 7);
    client.stream().write_all(&header).unwrap();
    assert!(client.receive().is_err());
    assert_eq!(server.client(Style::Simple).read(0, 512), Ok(zeroes(512)), "nobody else notices");
}

#[test]
fn a_client_that_breaks_the_rules_is_dropped_and_nobody_else_notices() {
    let server = Server::of(&["ram:8M"]);
    let mut other = server.client(Style::Structured);
    let ends = |mut client: Client, bytes: &[u8]| {
        // It may be dropped before all is sent.
        let sent = client.stream().write_all(bytes);
        let ended = client.receive().expect_err("there is no answer to that");
        assert_ne!(ended.kind(), std::io::ErrorKind::WouldBlock, "it is not dropped; {sent:?}");
    };
    ends(server.client(Style::Simple), &[0; 28]);
    ends(server.client(Style::Extended), &Request::read(0, 512).header(Style::Simple, 1).repeat(2));
    ends(server.client(Style::Simple), &[0xff; 4096]);
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.write_all(&[0xff; 4096]).unwrap();
    let mut greeting = Vec::new();
    // A connection that is reset has ended too.
    let ended = stream.read_to_end(&mut greeting);
    assert!(greeting.len() < 4096, "{ended:?}");
    assert_eq!(other.write(0, &pattern(0, 4096, 1)), Ok(()));
    assert_eq!(other.read(0, 4096), Ok(pattern(0, 4096, 1)));
}

#[test]
fn a_client_that_leaves_in_the_middle_of_its_requests_changes_nothing_half() {
    let Some(fs) = crate::server::mount() else { return };
    let server = Server::on(&fs, &[]);
    let mut other = server.client(Style::Simple);
    let payload = pattern(0, 65536, 1);
    for cut in [0, 1, 27, 28, 29, 4096, 65563] {
        let mut client = server.client(Style::Simple);
        let whole = [&Request::write(0, &payload).header(Style::Simple, 1)[..], &payload].concat();
        client.stream().write_all(&whole[..cut]).unwrap();
        drop(client);
        assert_eq!(other.read(0, 65536), Ok(zeroes(65536)), "after {cut} bytes");
    }
    // One that leaves while the storage has its requests: they end, and nobody is told.
    crate::server::rule(&fs, "read+write:hang");
    let mut client = server.client(Style::Structured);
    for number in 0..8 {
        client.send(&Request::read(number * 4096, 4096)).unwrap();
        client.send(&Request::write(MIB + number * 4096, &payload[..4096])).unwrap();
    }
    assert!(fs.wait_hanging(16, LONG));
    drop(client);
    fs.clear();
    assert_eq!(fs.release(), 16);
    server.wait_for_log("client disconnected");
    assert_eq!(other.read(0, 4096), Ok(zeroes(4096)));
    wait_until("what was taken is done", || {
        (0..8).all(|number| *crate::server::stored(&fs, MIB + number * 4096, 4096) == payload[..4096])
    });
    assert!(server.stop().status.success());
}

#[test]
fn every_command_works_in_every_style() {
    let Some(fs) = crate::server::mount() else { return };
    let server = Server::on(&fs, &[]);
    for style in STYLES {
        let mut client = server.client(style);
        assert_eq!(client.write(0, &pattern(0, 65536, 1)), Ok(()));
        assert_eq!(client.done(&Request::write(65536, &pattern(65536, 4096, 1)).fua()), Ok(()));
        assert_eq!(client.done(&Request::zeroes(4096, 4096)), Ok(()));
        assert_eq!(client.done(&Request::zeroes(8192, 4096).flagged(2)), Ok(()), "NO_HOLE");
        assert_eq!(client.done(&Request::trim(12288, 4096)), Ok(()));
        assert_eq!(client.done(&Request::cache(0, 65536)), Ok(()));
        assert_eq!(client.flush(), Ok(()));
        let expected = [&pattern(0, 4096, 1)[..], &[0; 12288], &pattern(16384, 49152 + 4096, 1)].concat();
        assert_eq!(client.read(0, 69632).unwrap().0, expected, "{style:?}");
        assert_eq!(client.read(1000, 3).unwrap()[..], pattern(1000, 3, 1)[..], "{style:?}: not aligned");
        if style == Style::Simple {
            assert_eq!(
                client.done(&Request::status(0, 65536)),
                Err(Errno::INVAL),
                "no context was agreed on"
            );
        } else {
            let runs = client.told(&Request::status(0, 8 * MIB)).unwrap().runs;
            // NBD_STATE_HOLE and NBD_STATE_ZERO are bits 0 and 1.
            assert_eq!(runs.iter().map(|run| run.0).sum::<u64>(), 8 * MIB, "{style:?}: {runs:?}");
            assert_eq!((runs[0], runs[1].1), ((4096, 0), 3), "{style:?}: {runs:?}");
        }
    }
    assert!(server.stop().status.success());
}
