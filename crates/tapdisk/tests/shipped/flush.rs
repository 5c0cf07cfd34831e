//! Flushes: what they promise, how often they reach the storage, and what follows when one fails.

use faultfs::{Cache, FaultFs, Options};
use nbd_client::{Client, Errno, Request, Style};

use crate::server::{
    Ask, CACHES, IMAGE, LONG, STYLES, Server, durable, mount, pattern, rule, syncs, tapdisk, zeroes,
};

#[test]
fn after_a_sync_that_failed_once_every_flush_and_write_fails_until_a_restart() {
    for (cache, style) in CACHES.into_iter().zip(STYLES) {
        let Some(fs) = mount() else { return };
        let server = Server::on(&fs, &["--cache", cache]);
        let (mut client, mut other) = (server.client(style), server.client(Style::Simple));
        assert_eq!(client.write(0, &pattern(0, 4096, 1)), Ok(()));
        rule(&fs, "fsync:EIO:once,lose");
        assert_eq!(client.flush(), Err(Errno::IO), "{cache}");
        let before = syncs(&fs);
        for client in [&mut client, &mut other] {
            assert_eq!(client.flush(), Err(Errno::IO), "{cache}: the kernel would say that all is well");
            assert_eq!(client.write(8192, &[1; 4096]), Err(Errno::IO), "{cache}");
            assert_eq!(client.done(&Request::write(0, &[1; 512]).fua()), Err(Errno::IO), "{cache}");
            assert_eq!(client.done(&Request::zeroes(0, 4096)), Err(Errno::IO), "{cache}");
            assert_eq!(client.done(&Request::trim(0, 4096)), Err(Errno::IO), "{cache}");
            // The disk under O_DIRECT still holds what was written; a page cache may show what is not there.
            let read = if cache == "direct" { Ok(pattern(0, 4096, 1)) } else { Err(Errno::IO) };
            assert_eq!(client.read(0, 4096), read, "{cache}");
        }
        assert_eq!(syncs(&fs), before, "{cache}: and the storage is not asked again");
        server.signal(rustix::process::Signal::USR1);
        server.wait_for_log("poisoned");
        let ended = server.stop();
        assert_eq!(ended.status.code(), Some(1), "{cache}");
        assert!(ended.stderr.contains("data that clients were told is written may be lost"), "{cache}");

        fs.power_cut(None);
        let server = Server::on(&fs, &["--cache", cache]);
        let mut client = server.client(style);
        assert_eq!(client.read(0, 4096), Ok(zeroes(4096)), "{cache}: it was right not to trust it");
        assert_eq!(client.write(0, &pattern(0, 4096, 2)), Ok(()), "{cache}");
        assert_eq!(client.flush(), Ok(()), "{cache}");
        assert!(server.stop().status.success());
    }
}

/// Writes, and has a sync of it fail once, as when the kernel loses what it had to write back.
fn poison(fs: &FaultFs, client: &mut Client) {
    assert_eq!(client.write(0, &pattern(0, 4096, 1)), Ok(()));
    rule(fs, "fsync:ENOSPC:once,lose");
    assert_eq!(client.flush(), Err(Errno::NOSPC));
}

#[test]
fn after_a_crash_the_successor_knows_that_a_sync_has_failed() {
    for (cache, style) in CACHES.into_iter().zip(STYLES) {
        let Some(fs) = mount() else { return };
        let state = tempfile::tempdir().unwrap();
        let words = ["--cache", cache, "--state-dir", state.path().to_str().unwrap()];
        let server = Server::on(&fs, &words);
        poison(&fs, &mut server.client(style));
        server.kill();
        for crash in 1..=2 {
            let server = Server::on(&fs, &words);
            // The log is written by a thread of its own.
            server.wait_for_log("a sync failed at 20");
            for said in [server.stdout(), server.stderr()] {
                for what in ["a sync failed at 20", "ENOSPC", "Ctrl-C", "anew"] {
                    assert!(said.contains(what), "{cache}, crash {crash}: no {what} in {said}");
                }
            }
            let (before, mut client) = (syncs(&fs), server.client(style));
            for request in [
                Request::write(8192, &[1; 4096]),
                Request::write(0, &[1; 512]).fua(),
                Request::zeroes(0, 4096),
                Request::trim(0, 4096),
                Request::flush(),
            ] {
                assert_eq!(client.done(&request), Err(Errno::NOSPC), "{cache}, crash {crash}, {request:?}");
            }
            let read = if cache == "direct" { Ok(pattern(0, 4096, 1)) } else { Err(Errno::NOSPC) };
            assert_eq!(client.read(0, 4096), read, "{cache}, crash {crash}");
            assert_eq!(syncs(&fs), before, "{cache}: the storage is not asked again");
            server.kill();
        }
        // Who looks only learns nothing of it and changes nothing about it.
        let looks = Server::on_read_only(&fs, &words);
        assert_eq!(looks.client(style).read(0, 4096), Ok(pattern(0, 4096, 1)));
        assert!(looks.stop().status.success());

        let ended = Server::on(&fs, &words).stop();
        assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
        assert!(ended.stderr.contains("data that clients were told is written may be lost"), "{cache}");
        let server = Server::on(&fs, &words);
        let mut client = server.client(style);
        assert_eq!(client.write(0, &pattern(0, 4096, 2)), Ok(()), "{cache}");
        assert_eq!(client.flush(), Ok(()), "{cache}");
        assert_eq!(durable(&fs, 0, 4096), pattern(0, 4096, 2));
        assert!(server.stop().status.success());
        assert_eq!(std::fs::read_dir(state.path()).unwrap().count(), 0, "{cache}: nothing is left of it");
    }
}

#[test]
fn a_failed_sync_is_recorded_before_anybody_is_told() {
    let Some(fs) = mount() else { return };
    let state = tempfile::tempdir().unwrap();
    let server = Server::on(&fs, &["--state-dir", state.path().to_str().unwrap()]);
    poison(&fs, &mut server.client(Style::Simple));
    let records: Vec<_> =
        std::fs::read_dir(state.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(records.len(), 1, "{records:?}");
    let text = std::fs::read_to_string(&records[0]).unwrap();
    for what in [IMAGE, "ENOSPC", "sync"] {
        assert!(text.contains(what), "no {what} in {text}");
    }
    server.kill();
}

#[test]
fn a_new_image_under_the_name_of_a_poisoned_one_is_well() {
    let Some(fs) = mount() else { return };
    let state = tempfile::tempdir().unwrap();
    let words = ["--state-dir", state.path().to_str().unwrap()];
    let server = Server::on(&fs, &words);
    poison(&fs, &mut server.client(Style::Simple));
    server.kill();
    std::fs::remove_file(fs.path().join(IMAGE)).unwrap();
    let server = Server::on(&fs, &words);
    let mut client = server.client(Style::Simple);
    assert_eq!(client.write(0, &pattern(0, 4096, 1)), Ok(()));
    assert_eq!(client.flush(), Ok(()));
    assert!(server.stop().status.success());
}

#[test]
fn where_a_failed_sync_cannot_be_recorded_that_is_said_and_the_error_is_told() {
    let Some(fs) = mount() else { return };
    let state = tempfile::tempdir().unwrap();
    let directory = state.path().join("run");
    let server = Server::on(&fs, &["--state-dir", directory.to_str().unwrap()]);
    std::fs::remove_dir(&directory).unwrap();
    poison(&fs, &mut server.client(Style::Simple));
    server.wait_for_log("ITS SUCCESSOR WILL NOT KNOW");
    assert_eq!(server.stop().status.code(), Some(1));

    // A place that was asked for and cannot be used is an error; without any, it serves as well, and says so once.
    let image = fs.path().join(IMAGE);
    let mut command = tapdisk(["serve", image.to_str().unwrap(), "--state-dir", image.to_str().unwrap()]);
    let refused = command.output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("cannot use ") && said.contains(IMAGE), "{said}");
    let mut command = tapdisk(["serve", image.to_str().unwrap(), "--nbd"]);
    command.arg(format!("unix:{}", state.path().join("nbd.sock").display()));
    command.env_remove("XDG_RUNTIME_DIR");
    if !rustix::process::geteuid().is_root() {
        let server = Server::run(command, state, Some(&fs));
        server.wait_ready();
        server.wait_for_log("cannot be recorded");
        assert_eq!(server.stderr().matches("cannot be recorded").count(), 1, "{}", server.stderr());
    }
}

#[test]
fn a_failed_sync_is_not_held_or_retried_whatever_the_policy() {
    for policy in ["hold", "retry:30"] {
        let Some(fs) = mount() else { return };
        let server = Server::on(&fs, &["--on-error", policy, "--on-enospc", policy]);
        let mut client = server.client(Style::Simple);
        let struck = rule(&fs, "fsync:ENOSPC:once");
        assert_eq!(client.write(0, &[1; 4096]), Ok(()));
        assert_eq!(client.flush(), Err(Errno::NOSPC), "{policy}");
        assert_eq!(client.flush(), Err(Errno::NOSPC), "{policy}: its errno is kept");
        assert_eq!(client.write(0, &[1; 4096]), Err(Errno::NOSPC), "{policy}");
        assert_eq!(fs.struck(struck), Some(1));
        assert_eq!(server.stop().status.code(), Some(1));
    }
}

#[test]
fn a_write_that_must_be_durable_fails_if_its_sync_fails() {
    for cache in CACHES {
        for request in [
            Request::write(4096, &[7; 4096]).fua(),
            Request::zeroes(4096, 4096).fua(),
            Request::trim(4096, 4096).fua(),
        ] {
            let Some(fs) = mount() else { return };
            let server = Server::on(&fs, &["--cache", cache]);
            let mut client = server.client(Style::Structured);
            assert_eq!(client.write(0, &pattern(0, 8192, 1)), Ok(()));
            assert_eq!(client.flush(), Ok(()));
            rule(&fs, "fsync:EIO:once,lose");
            assert_eq!(client.done(&request), Err(Errno::IO), "{cache}, {request:?}");
            assert_eq!(client.flush(), Err(Errno::IO), "{cache}, {request:?}");
            assert_eq!(durable(&fs, 4096, 4096), pattern(4096, 4096, 1), "{cache}: it is not durable");
            drop(server);
        }
    }
}

#[test]
fn a_full_disk_that_is_found_out_when_the_cache_is_written_back_fails_the_flush() {
    let options = Options { cache: Cache::Back, ..Options::default() };
    let Some(fs) = faultfs::mount_for_test(options) else { return };
    let server = Server::on(&fs, &["--cache", "buffered", "--on-enospc", "hold"]);
    let mut client = server.client(Style::Simple);
    fs.set_capacity(Some(0));
    assert_eq!(client.write(0, &pattern(0, 65536, 1)), Ok(()), "it is in the page cache");
    assert_eq!(client.flush(), Err(Errno::NOSPC));
    fs.set_capacity(None);
    assert_eq!(client.flush(), Err(Errno::NOSPC), "Linux told it once and has marked the pages clean");
    assert_eq!(client.write(0, &pattern(0, 512, 1)), Err(Errno::NOSPC));
    assert_eq!(client.read(0, 512), Err(Errno::NOSPC), "the page cache is not what the disk holds");
    assert_eq!(server.stop().status.code(), Some(1));
}

#[test]
fn each_flush_and_each_durable_write_reaches_the_storage() {
    for cache in CACHES {
        let Some(fs) = mount() else { return };
        let server = Server::on(&fs, &["--cache", cache]);
        let mut client = server.client(Style::Structured);
        for number in 0..5 {
            assert_eq!(client.write(number * 4096, &pattern(0, 4096, 1)), Ok(()));
            let before = syncs(&fs);
            assert_eq!(client.flush(), Ok(()));
            assert!(syncs(&fs) > before, "{cache}");
            assert_eq!(durable(&fs, number * 4096, 4096), pattern(0, 4096, 1), "{cache}");
        }
        for request in [
            Request::write(65536, &pattern(0, 4096, 2)).fua(),
            Request::zeroes(0, 4096).fua(),
            Request::trim(8192, 4096).fua(),
        ] {
            let before = syncs(&fs);
            assert_eq!(client.done(&request), Ok(()));
            assert!(syncs(&fs) > before, "{cache}, {request:?}");
        }
        assert_eq!(durable(&fs, 65536, 4096), pattern(0, 4096, 2), "{cache}");
        assert_eq!(durable(&fs, 0, 4096), zeroes(4096), "{cache}");
        let before = syncs(&fs);
        for at in 0..20 {
            assert!(client.read(at * 4096, 4096).is_ok());
        }
        assert_eq!(client.write(0, &[3; 4096]), Ok(()));
        assert_eq!(syncs(&fs), before, "{cache}: neither a read nor a plain write is synced");
        assert!(server.stop().status.success());
        assert!(syncs(&fs) > before, "{cache}: what was written is, at the end");
    }
}

#[test]
fn flushes_that_wait_together_share_a_sync_that_began_after_their_writes() {
    let Some(fs) = mount() else { return };
    let server = Server::on(&fs, &[]);
    let mut client = server.client(Style::Simple);
    assert_eq!(client.write(0, &pattern(0, 4096, 1)), Ok(()));
    let before = syncs(&fs);
    let slow = rule(&fs, "fsync:hang:once");
    let first = client.send(&Request::flush()).unwrap();
    assert!(fs.wait_hanging(1, LONG));
    let others: Vec<u64> = (0..20).map(|_| client.send(&Request::flush()).unwrap()).collect();
    assert_eq!(client.read(0, 4096), Ok(pattern(0, 4096, 1)), "reads go on meanwhile");
    assert_eq!(client.open(), 21, "no flush is answered before its sync");
    assert_eq!(fs.release(), 1);
    for cookie in others.into_iter().chain([first]) {
        assert!(client.wait(cookie).unwrap().is_ok());
    }
    assert_eq!(fs.struck(slow), Some(1));
    assert!((1..=2).contains(&(syncs(&fs) - before)), "{} syncs", syncs(&fs) - before);

    // Each write is answered before its flush is sent, so it must be durable when the flush is answered.
    let mut clients: Vec<_> = (0..8).map(|_| server.client(Style::Structured)).collect();
    rule(&fs, "fsync:delay=20");
    for round in 0..5u8 {
        let mut cookies = Vec::new();
        for (number, client) in clients.iter_mut().enumerate() {
            let at = number as u64 * 65536;
            assert_eq!(client.write(at, &pattern(at, 4096, round)), Ok(()));
            cookies.push(client.send(&Request::flush()).unwrap());
        }
        for (number, (client, cookie)) in clients.iter_mut().zip(cookies).enumerate() {
            assert!(client.wait(cookie).unwrap().is_ok());
            let at = number as u64 * 65536;
            assert_eq!(durable(&fs, at, 4096), pattern(at, 4096, round));
        }
    }
    fs.clear();
    assert!(server.stop().status.success());
}

#[test]
fn a_flush_on_one_connection_covers_what_was_answered_on_another() {
    for cache in CACHES {
        let Some(fs) = mount() else { return };
        let server = Server::on(&fs, &["--cache", cache]);
        let (mut writer, mut flusher) = (server.client(Style::Simple), server.client(Style::Structured));
        // NBD_FLAG_CAN_MULTI_CONN is bit 8.
        assert_eq!((writer.flags() >> 8 & 1, flusher.flags() >> 8 & 1), (1, 1), "{cache}");
        for number in 0..16 {
            assert_eq!(writer.write(number * 8192, &pattern(number * 8192, 8192, 4)), Ok(()));
        }
        assert_eq!(flusher.flush(), Ok(()));
        server.kill();
        fs.power_cut(None);
        let server = Server::on(&fs, &["--cache", cache]);
        assert_eq!(server.client(Style::Simple).read(0, 16 * 8192), Ok(pattern(0, 16 * 8192, 4)), "{cache}");
    }
}

#[test]
fn a_flush_of_a_read_only_disk_succeeds() {
    let Some(fs) = mount() else { return };
    assert!(Server::on(&fs, &[]).stop().status.success());
    let image = fs.path().join(crate::server::IMAGE);
    let server = Server::of(&[image.to_str().unwrap(), "--read-only"]);
    assert_eq!(server.client(Style::Simple).flush(), Ok(()));
    assert!(server.stop().status.success());
}
