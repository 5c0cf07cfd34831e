//! Errors of the storage: each reaches the requests that it struck, as what it is, and no others.

use faultfs::{FaultFs, Options};
use nbd_client::{Client, Errno, Request, Style};
use rustix::process::{Resource, Rlimit};

use crate::server::{
    Ask, Bytes, CACHES, IMAGE, STYLES, Server, durable, mount, pattern, rule, stored, wait_until, zeroes,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Does something in both styles of reply, with and without the page cache, each time without faults at first.
fn everywhere(fs: &FaultFs, test: impl Fn(&mut Client, &str)) {
    for cache in CACHES {
        let server = Server::on(fs, &["--cache", cache]);
        for style in STYLES {
            let mut client = server.client(style);
            test(&mut client, &format!("{cache}, {style:?}"));
            fs.clear();
        }
        assert!(server.stop().status.success());
    }
}

/// Writes a first pattern everywhere.
fn fill(client: &mut Client) {
    for at in (0..8 * MIB).step_by(MIB as usize) {
        assert_eq!(client.write(at, &pattern(at, MIB, 1)), Ok(()));
    }
}

#[test]
fn a_failed_read_or_write_is_told_to_its_request_and_to_no_other() {
    let Some(fs) = mount() else { return };
    everywhere(&fs, |client, how| {
        fill(client);
        let (bad_read, bad_write) = (MIB + 64 * KIB, 3 * MIB + 128 * KIB);
        rule(&fs, "read:EIO:1088K..1092K");
        rule(&fs, "write:EIO:3200K..3204K");
        let new = pattern(0, 64 * KIB, 2);
        let mut requests = Vec::new();
        for number in 0..32 {
            requests.push(Request::read(MIB + number * 32 * KIB, 32 * KIB));
            requests.push(Request::write(3 * MIB + number * 64 * KIB, &new));
        }
        for (request, answer) in requests.iter().zip(client.all(&requests)) {
            let bytes = request.at..request.at + request.len;
            match request.command {
                0 if bytes.contains(&bad_read) => assert_eq!(answer, Err(Errno::IO), "{how}"),
                0 => assert_eq!(Bytes(answer.unwrap().bytes), pattern(request.at, 32 * KIB, 1), "{how}"),
                _ if bytes.contains(&bad_write) => assert_eq!(answer, Err(Errno::IO), "{how}"),
                _ => assert!(answer.is_ok(), "{how}: the write at {}: {answer:?}", request.at),
            }
        }
        fs.clear();
        for request in requests.iter().filter(|request| request.command == 1) {
            let found = stored(&fs, request.at, 64 * KIB);
            let is_new = found == new;
            let is_old = found == pattern(request.at, 64 * KIB, 1);
            assert!(is_new || (is_old && request.at == bad_write), "{how}: {}", request.at);
        }
    });
}

#[test]
fn of_many_requests_in_flight_only_the_one_that_failed_is_answered_with_an_error() {
    let Some(fs) = mount() else { return };
    everywhere(&fs, |client, how| {
        fill(client);
        let new = pattern(0, 4096, 9);
        for (fault, is_read) in [("read:EIO:nth=17", true), ("write:EIO:nth=5", false)] {
            let struck = rule(&fs, fault);
            let requests: Vec<_> = (0..40)
                .map(|number| number * 8 * KIB)
                .map(|at| if is_read { Request::read(at, 4096) } else { Request::write(at, &new) })
                .collect();
            let answers = client.all(&requests);
            let failed: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().err()).collect();
            assert_eq!(failed, [&Errno::IO], "{how}");
            assert_eq!(fs.struck(struck), Some(1), "{how}");
            fs.clear();
            for (request, answer) in requests.iter().zip(answers).filter(|(_, answer)| answer.is_ok()) {
                let expected = if is_read { pattern(request.at, 4096, 1) } else { new.clone() };
                let found =
                    if is_read { Bytes(answer.unwrap().bytes) } else { stored(&fs, request.at, 4096) };
                assert_eq!(found, expected, "{how}");
            }
        }
    });
}

#[test]
fn an_error_in_the_middle_of_a_long_request_fails_the_whole_request() {
    let Some(fs) = mount() else { return };
    everywhere(&fs, |client, how| {
        fill(client);
        // The kernel asks a FUSE file system for a megabyte at a time.
        for part in ["0..512", "1536K..1537K", "3145216..3M"] {
            rule(&fs, &format!("read+write:EIO:{part}"));
            assert_eq!(client.read(0, 3 * MIB), Err(Errno::IO), "{how} {part}");
            let new = pattern(0, 3 * MIB, 7);
            assert_eq!(client.write(0, &new), Err(Errno::IO), "{how} {part}");
            fs.clear();
            assert_eq!(client.write(0, &new), Ok(()), "{how} {part}");
            assert_eq!(client.read(0, 3 * MIB), Ok(new), "{how} {part}");
        }
    });
}

#[test]
fn each_errno_of_the_storage_is_told_by_its_number_of_nbd() {
    let Some(fs) = mount() else { return };
    everywhere(&fs, |client, how| {
        fill(client);
        // "Error values" of the protocol: EDQUOT and EFBIG are told as ENOSPC, read-only as EPERM, the rest as EIO.
        for (errno, told) in [
            ("EIO", Errno::IO),
            ("ENOSPC", Errno::NOSPC),
            ("EDQUOT", Errno::NOSPC),
            ("EFBIG", Errno::NOSPC),
            ("EROFS", Errno::PERM),
            ("EPERM", Errno::PERM),
            ("EACCES", Errno::PERM),
            ("EINVAL", Errno::INVAL),
            ("ENXIO", Errno::IO),
            ("ENODEV", Errno::IO),
            ("ETIMEDOUT", Errno::IO),
            ("ESTALE", Errno::IO),
            ("EREMOTEIO", Errno::IO),
        ] {
            rule(&fs, &format!("read+write:{errno}"));
            assert_eq!(client.read(0, 4096), Err(told), "{how} {errno}");
            assert_eq!(client.write(0, &[5; 4096]), Err(told), "{how} {errno}");
            fs.clear();
            assert_eq!(client.read(0, 4096), Ok(pattern(0, 4096, 1)), "{how} {errno}");
        }
    });
}

#[test]
fn a_full_disk_is_told_as_such_and_nothing_is_acknowledged_falsely() {
    for cache in CACHES {
        let Some(fs) = mount() else { return };
        fs.set_capacity(Some(2 * MIB));
        let server = Server::on(&fs, &["--cache", cache]);
        let mut client = server.client(Style::Structured);
        let part = 64 * KIB;
        let bytes = |at| pattern(at, part, 3);
        let contents: Vec<_> = (0..64).map(|number| (number * part, bytes(number * part))).collect();
        let requests: Vec<_> = contents.iter().map(|(at, bytes)| Request::write(*at, bytes)).collect();
        let answers = client.all(&requests);
        let written: Vec<u64> = requests
            .iter()
            .zip(&answers)
            .filter_map(|(request, answer)| match answer {
                Ok(_) => Some(request.at),
                Err(Errno::NOSPC) => None,
                Err(other) => panic!("{cache}: {other:?}"),
            })
            .collect();
        assert!(written.len() as u64 <= 2 * MIB / part, "{cache}: {} parts", written.len());
        assert!(written.len() as u64 >= MIB / part, "{cache}: {} parts", written.len());
        assert_eq!(client.flush(), Ok(()), "{cache}");
        for &at in &written {
            assert_eq!(durable(&fs, at, part), bytes(at), "{cache}: acknowledged and flushed");
        }
        assert_eq!(client.write(written[0], &bytes(written[0])), Ok(()), "{cache}: it has its space");
        assert_eq!(client.read(7 * MIB, 4096), Ok(zeroes(4096)), "{cache}");
        assert_eq!(client.write(6 * MIB, &bytes(6 * MIB)), Err(Errno::NOSPC), "{cache}: still full");

        fs.set_capacity(Some(16 * MIB));
        for answer in client.all(&requests) {
            assert!(answer.is_ok(), "{cache}: {answer:?}");
        }
        assert_eq!(client.flush(), Ok(()), "{cache}");
        for (at, bytes) in contents {
            assert_eq!(client.read(at, part), Ok(bytes), "{cache}");
        }
        assert!(server.stop().status.success());
    }
}

#[test]
fn a_short_count_is_continued_or_told_as_an_error_and_never_taken_for_all() {
    let Some(fs) = mount() else { return };
    everywhere(&fs, |client, how| {
        fill(client);
        for len in [4096, 64 * KIB] {
            let (old, new) = (pattern(0, len, 1), pattern(0, len, 77));
            for (k, times) in [1, 511, 512, len - 1].into_iter().flat_map(|k| [(k, 1), (k, 2)]) {
                let what = format!("{how}, {k} of {len}, {times} times");
                rule(&fs, &format!("read:short={k}:count={times}"));
                match client.read(0, len) {
                    Ok(bytes) => assert_eq!(bytes, old, "{what}"),
                    Err(errno) => assert_eq!(errno, Errno::IO, "{what}"),
                }
                fs.clear();
                rule(&fs, &format!("write:short={k}:count={times}"));
                match client.write(0, &new) {
                    Ok(()) => assert_eq!(stored(&fs, 0, len), new, "{what}"),
                    Err(errno) => assert_eq!(errno, Errno::IO, "{what}"),
                }
                fs.clear();
                assert_eq!(client.write(0, &old), Ok(()), "{what}");
            }
        }
    });
}

#[test]
fn short_reads_are_continued_where_they_stopped() {
    let Some(fs) = mount() else { return };
    everywhere(&fs, |client, how| {
        fill(client);
        for k in [512, 1024, 4096, 65024] {
            let short = rule(&fs, &format!("read:short={k}:count=2"));
            assert_eq!(client.read(MIB, 64 * KIB), Ok(pattern(MIB, 64 * KIB, 1)), "{how}, {k}");
            assert!(fs.struck(short) >= Some(1), "{how}, {k}");
            fs.clear();
        }
    });
}

#[test]
fn a_count_of_zero_is_an_io_error_and_never_success() {
    let Some(fs) = mount() else { return };
    everywhere(&fs, |client, how| {
        fill(client);
        rule(&fs, "read:short=0");
        assert_eq!(client.read(4096, 4096), Err(Errno::IO), "{how}");
        assert_eq!(client.read(0, 2 * MIB), Err(Errno::IO), "{how}");
        fs.clear();
        // Without O_DIRECT the ring tries for half a minute to write what is left, before it tells us.
        if how.starts_with("direct") {
            rule(&fs, "write:short=0");
            assert_eq!(client.write(4096, &[9; 4096]), Err(Errno::IO), "{how}");
            assert_eq!(client.write(0, &pattern(0, 2 * MIB, 9)), Err(Errno::IO), "{how}");
            fs.clear();
        }
        assert_eq!(client.write(4096, &pattern(4096, 4096, 1)), Ok(()), "{how}");
        assert_eq!(client.read(4096, 4096), Ok(pattern(4096, 4096, 1)), "{how}");
    });
}

#[test]
fn what_was_interrupted_is_done_again_without_the_clients_notice() {
    let Some(fs) = mount() else { return };
    everywhere(&fs, |client, how| {
        fill(client);
        let interrupted = rule(&fs, "read+write+fsync+fallocate:EINTR:count=100");
        assert_eq!(client.read(0, 8192), Ok(pattern(0, 8192, 1)), "{how}");
        assert_eq!(fs.struck(interrupted), Some(100), "{how}");
        fs.clear();
        for (fault, request) in [
            ("write:EINTR:count=100", Request::write(0, &[3; 8192])),
            ("fsync:EINTR:count=100", Request::flush()),
            ("fallocate:EINTR:count=100", Request::zeroes(0, 8192)),
        ] {
            let interrupted = rule(&fs, fault);
            assert_eq!(client.done(&request), Ok(()), "{how}, {fault}");
            assert_eq!(fs.struck(interrupted), Some(100), "{how}, {fault}");
            fs.clear();
        }
        assert_eq!(stored(&fs, 0, 8192), zeroes(8192), "{how}");
    });
}

#[test]
fn a_lack_of_memory_that_passes_is_waited_out() {
    let Some(fs) = mount() else { return };
    everywhere(&fs, |client, how| {
        fill(client);
        for errno in ["EAGAIN", "ENOMEM", "EBUSY"] {
            let lack = rule(&fs, &format!("read+write:{errno}:count=5"));
            assert_eq!(client.read(0, 4096), Ok(pattern(0, 4096, 1)), "{how}, {errno}");
            assert_eq!(fs.struck(lack), Some(5), "{how}, {errno}");
            fs.clear();
            rule(&fs, &format!("write:{errno}:count=5"));
            assert_eq!(client.write(0, &pattern(0, 4096, 1)), Ok(()), "{how}, {errno}");
            fs.clear();
        }
        rule(&fs, "fsync:EAGAIN:count=3");
        assert_eq!(client.flush(), Ok(()), "{how}: a sync that was not even begun");
    });
}

#[test]
fn zeroes_are_written_where_the_file_system_cannot_zero() {
    for cache in CACHES {
        let Some(fs) = mount() else { return };
        let server = Server::on(&fs, &["--cache", cache]);
        let mut client = server.client(Style::Structured);
        fill(&mut client);
        rule(&fs, "fallocate:EOPNOTSUPP");
        let fast = Request::zeroes(MIB, MIB).flagged(16);
        assert_eq!(client.done(&fast), Err(Errno::NOTSUP), "{cache}: fast or not at all");
        assert_eq!(client.read(MIB, MIB), Ok(pattern(MIB, MIB, 1)), "{cache}: and nothing has happened");
        for (flags, at, len) in [(0, MIB, MIB), (2, 3 * MIB, 700_000), (0, 5 * MIB + 100, 5000)] {
            assert_eq!(client.done(&Request::zeroes(at, len).flagged(flags)), Ok(()), "{cache}");
            assert_eq!(client.read(at, len), Ok(zeroes(len)), "{cache}");
            assert_eq!(client.read(at - 512, 512), Ok(pattern(at - 512, 512, 1)), "{cache}: before it");
            assert_eq!(client.read(at + len, 512), Ok(pattern(at + len, 512, 1)), "{cache}: behind it");
        }
        assert_eq!(client.done(&Request::trim(0, 64 * KIB)), Ok(()), "{cache}: a trim is a hint");
        assert_eq!(client.read(0, 64 * KIB), Ok(pattern(0, 64 * KIB, 1)), "{cache}");
        rule(&fs, "write:ENOSPC");
        assert_eq!(client.done(&Request::zeroes(6 * MIB, 4096)), Err(Errno::NOSPC), "{cache}");
        fs.clear();
        assert!(server.stop().status.success());
    }
}

#[test]
fn a_failure_to_zero_or_to_discard_is_told() {
    let Some(fs) = mount() else { return };
    everywhere(&fs, |client, how| {
        fill(client);
        for (errno, told) in [("EIO", Errno::IO), ("ENOSPC", Errno::NOSPC), ("EPERM", Errno::PERM)] {
            rule(&fs, &format!("fallocate:{errno}"));
            assert_eq!(client.done(&Request::zeroes(0, 64 * KIB)), Err(told), "{how}");
            assert_eq!(client.done(&Request::trim(0, 64 * KIB)), Err(told), "{how}");
            fs.clear();
        }
        assert_eq!(client.read(0, 64 * KIB), Ok(pattern(0, 64 * KIB, 1)), "{how}");
    });
}

#[test]
fn what_was_cut_off_the_image_is_an_error_and_never_zeroes() {
    for cache in CACHES {
        let Some(fs) = mount() else { return };
        let server = Server::on(&fs, &["--cache", cache]);
        let mut client = server.client(Style::Structured);
        fill(&mut client);
        std::fs::File::options().write(true).open(fs.path().join(IMAGE)).unwrap().set_len(MIB).unwrap();
        assert_eq!(client.read(0, MIB), Ok(pattern(0, MIB, 1)), "{cache}");
        for (at, len) in [(MIB, 512), (MIB - 512, 1024), (0, 2 * MIB), (7 * MIB, 4096)] {
            assert_eq!(client.read(at, len), Err(Errno::IO), "{cache}: {len} bytes at {at}");
        }
        assert_eq!(client.flush(), Err(Errno::IO), "{cache}: what was lost is not durable");
        let ended = server.stop();
        assert_eq!(ended.status.code(), Some(1), "{cache}");
        assert!(ended.stderr.contains("has shrunk to 1048576 bytes"), "{cache}: {}", ended.stderr);
    }
}

#[test]
fn a_file_size_limit_is_told_as_a_lack_of_space_and_ends_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    for cache in CACHES {
        let server = Server::of(&[image.to_str().unwrap(), "--create", "8M", "--cache", cache]);
        let limit = Rlimit { current: Some(MIB), maximum: Some(MIB) };
        rustix::process::prlimit(Some(server.pid()), Resource::Fsize, limit).unwrap();
        let mut client = server.client(Style::Simple);
        assert_eq!(client.write(4 * MIB, &[1; 4096]), Err(Errno::NOSPC), "{cache}");
        assert_eq!(client.write(0, &pattern(0, 4096, 1)), Ok(()), "{cache}: the process lives");
        assert_eq!(client.read(0, 4096), Ok(pattern(0, 4096, 1)), "{cache}");
        wait_until("the log names it", || server.stderr().contains("EFBIG"));
        assert!(server.stop().status.success());
    }
}

#[test]
fn an_image_whose_short_transfers_would_be_misplaced_is_refused() {
    let Some(fs) = faultfs::mount_for_test(Options::default()) else { return };
    let image = fs.path().join(IMAGE);
    for cache in CACHES {
        let words = [image.to_str().unwrap(), "--create", "8M", "--cache", cache];
        let ended = Server::start(&words, Some(&fs)).ended();
        assert_eq!(ended.status.code(), Some(1), "{cache}");
        assert!(
            ended.stderr.contains("what follows a short transfer on this file system"),
            "{}",
            ended.stderr
        );
    }
    let cached = Options { cache: faultfs::Cache::Through, ..Options::default() };
    let Some(fs) = faultfs::mount_for_test(cached) else { return };
    everywhere(&fs, |client, how| {
        fill(client);
        rule(&fs, "read:short=1024:once");
        let read = client.read(MIB, 4096);
        assert!(read == Ok(pattern(MIB, 4096, 1)) || read == Err(Errno::IO), "{how}: {read:?}");
        fs.clear();
        rule(&fs, "write:short=1024:once");
        let new = pattern(MIB, 4096, 7);
        assert!(client.write(MIB, &new) == Err(Errno::IO) || stored(&fs, MIB, 4096) == new, "{how}");
    });
}
