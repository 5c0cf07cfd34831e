//! The log: one line for each failed request that says it all, a sum for a flood, nothing for what works.

use nbd_client::{Errno, Request, Style};
use serde_json::Value;

use crate::server::{Ask, Server, mount, pattern, rule, tapdisk};

/// The number that follows this name in a line of the log.
fn field(line: &str, name: &str) -> u64 {
    let (_, rest) = line.split_once(&format!("{name}=")).unwrap_or_else(|| panic!("no {name} in {line}"));
    rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

#[test]
fn a_failed_request_is_one_line_that_says_what_failed_where_and_why() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &[]);
    let mut client = server.client(Style::Simple);
    for number in 0..50 {
        assert_eq!(client.write(number * 4096, &pattern(0, 4096, 1)), Ok(()));
    }
    rule(&fs, "read:EIO");
    assert_eq!(client.read(1 << 20, 8192), Err(Errno::IO));
    let ended = server.stop();
    let failed: Vec<_> = ended.stderr.lines().filter(|line| line.contains("request failed")).collect();
    assert_eq!(failed.len(), 1, "{}", ended.stderr);
    for word in
        ["ERROR", "disk=\"disk.img\"", "operation=\"read\"", "offset=1048576", "length=8192", "errno=EIO"]
    {
        assert!(failed[0].contains(word), "no {word} in {}", failed[0]);
    }
    assert!(failed[0].contains("read 8192 bytes at 1048576 of disk.img"), "{}", failed[0]);
    assert!(ended.stderr.lines().count() < 12, "what works is not logged: {}", ended.stderr);
}

#[test]
fn a_thousand_failures_are_a_handful_of_lines_whose_counts_add_up() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &[]);
    let mut client = server.client(Style::Structured);
    rule(&fs, "write:EIO");
    for _ in 0..10 {
        let requests: Vec<_> = (0..100).map(|number| Request::write(number * 4096, &[1; 4096])).collect();
        for answer in client.all(&requests) {
            assert_eq!(answer, Err(Errno::IO));
        }
    }
    let ended = server.stop();
    let one_by_one = ended.stderr.lines().filter(|line| line.contains("request failed")).count() as u64;
    let sums = ended.stderr.lines().filter(|line| line.contains("more requests failed"));
    let summed: u64 = sums.map(|line| field(line, "count")).sum();
    assert_eq!(one_by_one + summed, 1000, "{}", ended.stderr);
    assert!(ended.stderr.lines().count() < 30, "{}", ended.stderr);
    assert!(ended.stderr.contains("write: 0 done, 1000 failed"), "{}", ended.stderr);
}

#[test]
fn each_line_of_the_json_log_is_json() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &["--log", "json"]);
    let mut client = server.client(Style::Simple);
    rule(&fs, "read:ENXIO");
    assert_eq!(client.read(4096, 512), Err(Errno::IO));
    let ended = server.stop();
    let lines: Vec<Value> =
        ended.stderr.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let failed = lines.iter().find(|line| line["message"] == "request failed").expect("it is logged");
    assert_eq!(failed["level"], "ERROR");
    assert_eq!(failed["disk"], "disk.img");
    assert_eq!(failed["operation"], "read");
    assert_eq!(failed["offset"], 4096);
    assert_eq!(failed["length"], 512);
    assert_eq!(failed["errno"], "ENXIO");
    assert!(failed["doing"].as_str().unwrap().contains("read 512 bytes at 4096 of disk.img"));
}

#[test]
fn rust_log_chooses_what_is_logged_and_a_wrong_one_is_refused() {
    let log_of = |filter: &str| {
        let directory = tempfile::tempdir().unwrap();
        let mut command = tapdisk(["serve", "ram:8M", "--nbd"]);
        command.arg(format!("unix:{}", directory.path().join("nbd.sock").display())).env("RUST_LOG", filter);
        let server = Server::run(command, directory, None);
        server.wait_ready();
        assert_eq!(server.client(Style::Simple).flush(), Ok(()));
        server.stop().stderr
    };
    assert_eq!(log_of("error"), "");
    assert!(log_of("info").contains("client connected"));
    assert!(log_of("debug").contains("DEBUG"));
    let refused = tapdisk(["serve", "ram:8M"]).env("RUST_LOG", "tapdisk=loudly").output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("RUST_LOG is not understood"));
}

#[test]
fn sigusr1_logs_what_was_done_so_far() {
    let server = Server::of(&["ram:8M"]);
    let mut client = server.client(Style::Simple);
    for number in 0..7 {
        assert_eq!(client.write(number * 4096, &[1; 4096]), Ok(()));
    }
    assert_eq!(client.flush(), Ok(()));
    server.signal(rustix::process::Signal::USR1);
    server.wait_for_log("8 accepted, 8 answered, 0 in flight, 0 held");
    server.wait_for_log("write: 7 done, 0 failed, 28672 bytes");
    server.wait_for_log("not poisoned");
    assert!(server.stop().status.success());
}
