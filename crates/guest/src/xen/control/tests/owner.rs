//! A disk has one server at a time: who that is, and what becomes of its nodes when another comes or it goes.

use std::process::{Child, Command};
use std::sync::mpsc;

use super::*;
use crate::xen::detach;

const OTHER: &str = "/images/other.raw";

/// A process that goes by our name.
pub(super) fn another_of_us() -> Child {
    let name = std::fs::read_to_string("/proc/self/comm").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join(name.trim_end());
    std::os::unix::fs::symlink("/bin/sleep", &program).unwrap();
    let child = Command::new(program).arg("60").spawn().unwrap();
    // Between fork and exec it goes by the name of the thread that it came from.
    let comm = format!("/proc/{}/comm", child.id());
    while std::fs::read_to_string(&comm).unwrap() != name {
        std::thread::yield_now();
    }
    child
}

fn end(mut process: Child) {
    process.kill().unwrap();
    process.wait().unwrap();
}

fn other_image() -> Settings {
    Settings { image: Some(OTHER.into()), ..settings() }
}

#[test]
fn who_serves_what_is_known_before_a_guest_comes() {
    for is_toolstacks in [false, true] {
        let store = store();
        let mut settings = settings();
        if is_toolstacks {
            by_toolstack(&store);
            settings = attached();
        }
        let disk = attend(&store, settings, LIMITS);
        disk.back("state", "2");
        assert_eq!(disk.read("kthread-pid"), Some(std::process::id().to_string()));
        assert_eq!(disk.read("tapdisk/image").as_deref(), Some("/images/disk.raw"));
        // The 22nd field of stat(5), counted from the end of the name.
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let started = stat.rsplit(')').next().unwrap().split(' ').nth(20).unwrap();
        assert_eq!(disk.read("tapdisk/owner"), Some(format!("{} {started}", std::process::id())));
    }
}

#[test]
fn a_disk_that_waits_for_its_guest_is_not_served_twice() {
    for (first, second) in
        [(settings(), other_image()), (attached(), Settings { create_nodes: false, ..other_image() })]
    {
        let store = store();
        if !first.create_nodes {
            by_toolstack(&store);
        }
        let process = another_of_us();
        let pid = process.id();
        let owner = Owner::living(pid).unwrap();
        let first = attend_as(owner, &store, first, LIMITS, Record::default());
        first.back("state", "2");
        let failure = attend(&store, second, LIMITS).failure();
        assert!(failure.contains(&format!("process {pid} serves")), "{failure}");
        // That one has not changed a thing.
        assert_eq!(first.read("tapdisk/image").as_deref(), Some("/images/disk.raw"));
        first.handshake();
        assert_eq!(first.record.calls(), [Call::Connect(connection(8, 15))]);
        end(process);
    }
}

/// Numbers of processes come again.
#[test]
fn a_process_that_has_a_dead_ones_number_is_not_taken_for_it() {
    let store = store();
    by_toolstack(&store);
    let process = another_of_us();
    store.write(&format!("{BACK}/kthread-pid"), &process.id().to_string());
    store.write(&format!("{BACK}/tapdisk/owner"), &format!("{} 1", process.id()));
    attend(&store, attached(), LIMITS).handshake();
    end(process);
}

#[test]
fn who_ends_leaves_a_successors_nodes_alone() {
    let store = store();
    let (go, may_go) = mpsc::channel::<()>();
    let (is_there, arrives) = mpsc::channel();
    let record = Record::with(move |call| {
        if matches!(call, Call::Disconnect(_)) {
            is_there.send(()).unwrap();
            may_go.recv().unwrap();
        }
    });
    let slow = attend_with(&store, settings(), LIMITS, record);
    slow.handshake();
    slow.toolstack("online", "0");
    slow.toolstack("state", "5");
    slow.front("state", "6");
    // While storage still works for it, somebody removes its nodes by force, and another process takes the disk.
    arrives.recv().unwrap();
    store.remove(BACK);
    store.remove(FRONT);
    let process = another_of_us();
    let owner = Owner::living(process.id()).unwrap();
    let next = attend_as(owner, &store, other_image(), LIMITS, Record::default());
    next.handshake();
    go.send(()).unwrap();
    assert_eq!(slow.end().0, Some(End::Detached));
    assert_eq!(next.read("state").as_deref(), Some("4"));
    assert_eq!(store.read(&format!("{FRONT}/state")).as_deref(), Some("4"));
    assert_eq!(next.read("tapdisk/image").as_deref(), Some(OTHER));
    next.orders.give(Order::Stop);
    assert_eq!(next.end(), (None, vec![Call::Connect(connection(8, 15))]));
    end(process);
}

#[test]
fn nodes_that_another_process_has_taken_are_not_served_any_more() {
    let disk = Attended::start();
    disk.handshake();
    disk.toolstack("tapdisk/owner", "4194305 1");
    disk.toolstack("state", "4");
    assert_eq!(disk.store.read(&format!("{BACK}/state")).as_deref(), Some("4"));
    let (store, (end, calls)) = (disk.store.clone(), disk.end());
    assert_eq!(end, Some(End::Detached));
    assert_eq!(calls[1..], [Call::Disconnect(Parting::Tell)]);
    assert_eq!(store.read(&format!("{BACK}/state")).as_deref(), Some("4"));
}

#[test]
fn a_toolstacks_nodes_are_left_without_a_server() {
    let store = store();
    by_toolstack(&store);
    let disk = attend(&store, attached(), LIMITS);
    disk.handshake();
    disk.toolstack("online", "0");
    disk.toolstack("state", "5");
    disk.front("state", "6");
    assert_eq!(disk.end().0, Some(End::Detached));
    for key in ["kthread-pid", "tapdisk/owner"] {
        assert_eq!(store.read(&format!("{BACK}/{key}")), None, "{key}");
    }
}

#[test]
fn the_directory_of_a_guests_disks_goes_with_the_last_of_them() {
    let disks = BACK.rsplit_once('/').unwrap().0;
    for has_another in [true, false] {
        let disk = Attended::start();
        disk.handshake();
        if has_another {
            disk.store.write(&format!("{disks}/51744/state"), "4");
        }
        let store = disk.store.clone();
        disk.toolstack("online", "0");
        disk.toolstack("state", "5");
        disk.front("state", "6");
        assert_eq!(disk.end().0, Some(End::Detached));
        assert_eq!(store.read(BACK), None);
        assert_eq!(store.read(disks).is_some(), has_another);
    }
}

#[test]
fn what_a_guest_that_was_taken_over_uses_is_said_though_the_store_goes_away_meanwhile() {
    let disk = Attended::start();
    disk.handshake();
    let store = disk.store.clone();
    disk.orders.give(Order::Stop);
    disk.end();
    store.remove(&format!("{BACK}/tapdisk/image"));
    let other = store.clone();
    let record = Record::with(move |call| {
        if matches!(call, Call::Connect(_)) {
            other.disconnect();
        }
    });
    let disk = attend_with(&store, settings(), LIMITS, record);
    disk.back("tapdisk/image", "/images/disk.raw");
    assert_eq!(disk.read("kthread-pid"), Some(std::process::id().to_string()));
    disk.orders.give(Order::Stop);
    assert_eq!(disk.end().1.len(), 1, "it is taken over once");
}

#[test]
fn who_detaches_and_attaches_another_image_gets_that() {
    for _ in 0..20 {
        let disk = Attended::start();
        disk.handshake();
        let store = disk.store.clone();
        std::thread::scope(|scope| {
            let detached = scope.spawn(|| detach(&store, GUEST, 51728, "vbd3", Duration::from_secs(30)));
            disk.back("state", "5");
            disk.front("state", "6");
            detached.join().unwrap().unwrap();
        });
        let next = attend(&store, other_image(), LIMITS);
        next.handshake();
        assert_eq!(next.read("tapdisk/image").as_deref(), Some(OTHER));
        assert_eq!(disk.end().0, Some(End::Detached));
    }
}
