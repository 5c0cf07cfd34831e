//! Memory for the tables of images: as much as was asked for, however large the tables are.

use nbd_client::Style;
use rustix::process::Signal;

use crate::formats::{MIB, make};
use crate::server::{Ask, Server, zeroes};

/// Clusters of 4 KiB: a block of a table, 4 KiB, tells of 2 MiB of the disk.
const REACH: u64 = 2 * MIB;

#[test]
fn tables_take_no_more_memory_than_was_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    // 32 MiB of tables.
    let size = 16 << 30;
    make(&path, "qcow2", "cluster_size=4k,preallocation=metadata", size);
    let server = Server::of(&[path.to_str().unwrap(), "--cache-size", "2M"]);
    let mut client = server.client(Style::Simple);
    assert_eq!(client.read(0, 4096), Ok(zeroes(4096)));
    let before = server.resident_bytes();
    for block in 0..size / REACH {
        assert_eq!(client.read(block * REACH + REACH / 2, 512), Ok(zeroes(512)));
    }
    let after = server.resident_bytes();
    // What serving takes, and what an allocator does not give back, is not for tables.
    assert!(after < before + 8 * MIB, "from {before} to {after} bytes");
    server.signal(Signal::USR1);
    server.wait_for_log("memory for tables of images");
    let log = server.stderr();
    let told = log.rsplit_once("bytes=").map(|(_, rest)| rest.chars().take_while(char::is_ascii_digit));
    let told: u64 = told.unwrap().collect::<String>().parse().unwrap();
    assert!((MIB..=2 * MIB).contains(&told), "{told} bytes");
    assert!(server.stop().status.success());
}
