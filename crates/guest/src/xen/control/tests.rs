//! The handshake, against a store within the process; the rings are a record of what was asked of them.

use std::path::PathBuf;
use std::sync::Mutex;
use std::thread::JoinHandle;

use ::xen::Domain;
use ::xen::events::Port;
use ::xen::fake::store::Store;
use ::xen::grants::GrantRef;
use ::xen::store::Kind;
use block::Errno;

use super::*;
use crate::xen::DataPath;
use crate::xen::device::RingSpec;
use crate::xen::layout::Abi;

mod owner;

const GUEST: Domain = Domain(5);
const BACK: &str = "/local/domain/0/backend/vbd3/5/51728";
const FRONT: &str = "/local/domain/5/device/vbd/51728";

#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Connect(Connection),
    Disconnect(Parting),
}

/// What a test does while a call is under way.
type Meanwhile = Box<dyn FnMut(&Call) + Send>;

#[derive(Clone, Default)]
struct Record {
    calls: Arc<Mutex<Vec<Call>>>,
    /// What connecting fails with.
    failure: Arc<Mutex<Option<String>>>,
    /// What the disk has grown to.
    size: Arc<Mutex<Option<u64>>>,
    /// What happens while something is asked of the rings.
    meanwhile: Arc<Mutex<Option<Meanwhile>>>,
}

impl Record {
    fn with(meanwhile: impl FnMut(&Call) + Send + 'static) -> Record {
        Record { meanwhile: Arc::new(Mutex::new(Some(Box::new(meanwhile)))), ..Record::default() }
    }

    fn note(&self, call: Call) {
        if let Some(meanwhile) = &mut *self.meanwhile.lock().unwrap() {
            meanwhile(&call);
        }
        self.calls.lock().unwrap().push(call);
    }

    fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }
}

impl Rings for Record {
    fn connect(&mut self, connection: Connection) -> Result<u64, String> {
        self.note(Call::Connect(connection));
        let size = self.size.lock().unwrap().unwrap_or(SIZE);
        self.failure.lock().unwrap().clone().map_or(Ok(size), Err)
    }

    fn disconnect(&mut self, how: Parting) {
        self.note(Call::Disconnect(how));
    }
}

fn settings() -> Settings {
    Settings {
        name: "disk".into(),
        domain: GUEST,
        device: 51728,
        kind: "vbd3".into(),
        create_nodes: true,
        features: Features::default(),
        queues: 2,
        block: 512,
        data: DataPath::Map,
        on_failed_sync: OnFailedSync::FailWrites,
        memory: 1 << 20,
        journals: PathBuf::from("/nowhere"),
        image: Some("/images/disk.raw".into()),
    }
}

/// Bytes of the disk.
const SIZE: u64 = 64 << 20;
const LIMITS: Limits = Limits { align: 512, preferred: 4096, read_only: false, fast_zero: true };

/// A disk that is attended to.
struct Attended {
    store: Store,
    record: Record,
    orders: Orderer,
    thread: JoinHandle<Option<End>>,
}

fn store() -> Store {
    let store = Store::new();
    store.introduce(GUEST);
    store.write("/local/domain/5", "");
    store.set_permissions("/local/domain/5", "n0 r5");
    store
}

fn attend(store: &Store, settings: Settings, limits: Limits) -> Attended {
    attend_with(store, settings, limits, Record::default())
}

fn attend_with(store: &Store, settings: Settings, limits: Limits, record: Record) -> Attended {
    attend_as(Owner::this(), store, settings, limits, record)
}

/// As another process would.
fn attend_as(ours: Owner, store: &Store, settings: Settings, limits: Limits, record: Record) -> Attended {
    let (orderer, orders) = orders().unwrap();
    let client = Client::connect(store).unwrap();
    let shape = Shape { size: SIZE, limits };
    let mut control = Control::new(Arc::new(store.clone()), settings, record.clone(), orders, shape);
    control.ours = ours;
    let thread = std::thread::spawn(move || control.run(client));
    Attended { store: store.clone(), record, orders: orderer, thread }
}

impl Attended {
    fn start() -> Attended {
        attend(&store(), settings(), LIMITS)
    }

    fn back(&self, key: &str, value: &str) {
        self.store.wait_for(&format!("{BACK}/{key}"), value);
    }

    fn read(&self, key: &str) -> Option<String> {
        self.store.read(&format!("{BACK}/{key}"))
    }

    /// The front end writes.
    fn front(&self, key: &str, value: &str) {
        self.store.write_as(GUEST, &format!("{FRONT}/{key}"), value).unwrap();
    }

    /// A toolstack writes.
    fn toolstack(&self, key: &str, value: &str) {
        self.store.write(&format!("{BACK}/{key}"), value);
    }

    fn ring(&self, gref: &str, port: &str) {
        for (key, value) in [
            ("ring-ref", gref),
            ("event-channel", port),
            ("protocol", "x86_64-abi"),
            ("feature-persistent", "1"),
        ] {
            self.front(key, value);
        }
    }

    /// The front end does its part until it is connected.
    fn handshake(&self) {
        self.back("state", "2");
        self.ring("8", "15");
        self.front("state", "3");
        self.back("state", "4");
        self.front("state", "4");
    }

    fn end(self) -> (Option<End>, Vec<Call>) {
        let end = self.thread.join().unwrap();
        (end, self.record.calls())
    }

    fn failure(self) -> String {
        match self.end() {
            (Some(End::Failed(why)), _) => why,
            other => panic!("{other:?}"),
        }
    }
}

fn connection(gref: u32, port: u32) -> Connection {
    Connection {
        domain: GUEST,
        abi: Abi::X86_64,
        rings: vec![RingSpec { refs: vec![GrantRef(gref)], port: Port(port) }],
        offered: Offered { flush_cache: true, barrier: true, discard: true, indirect: 256, block: 512 },
        persistent: true,
        start: Start::Fresh,
    }
}

#[test]
fn a_disk_is_made_connected_and_detached_and_leaves_nothing_behind() {
    let disk = Attended::start();
    disk.back("state", "2");
    assert_eq!(disk.store.permissions(BACK), "n0 r5");
    assert_eq!(disk.store.permissions(FRONT), "n5 r0");
    assert_eq!(disk.store.permissions(&format!("{BACK}/state")), "n0 r5");
    assert_eq!(disk.store.permissions(&format!("{FRONT}/state")), "n5 r0");
    for (path, value) in [
        ("backend", BACK),
        ("backend-id", "0"),
        ("virtual-device", "51728"),
        ("device-type", "disk"),
        ("state", "1"),
    ] {
        assert_eq!(disk.store.read_as(GUEST, &format!("{FRONT}/{path}")).as_deref(), Ok(value), "{path}");
    }
    for (key, value) in [
        ("frontend", FRONT),
        ("frontend-id", "5"),
        ("online", "1"),
        ("mode", "w"),
        ("dev", "xvdb"),
        ("type", "vbd3"),
        ("params", "aio:/images/disk.raw"),
        ("max-ring-page-order", "4"),
        ("multi-queue-max-queues", "2"),
    ] {
        assert_eq!(disk.read(key).as_deref(), Some(value), "{key}");
    }
    assert_eq!(disk.read("sectors"), None);
    disk.handshake();
    for (key, value) in [
        ("sectors", "131072"), // 64 MiB in units of 512 bytes
        ("sector-size", "512"),
        ("physical-sector-size", "512"),
        ("info", "0"),
        ("feature-barrier", "1"),
        ("feature-flush-cache", "1"),
        ("feature-discard", "1"),
        ("discard-granularity", "4096"),
        ("discard-alignment", "0"),
        ("discard-secure", "0"),
        ("feature-persistent", "1"),
        ("feature-max-indirect-segments", "256"),
        ("hotplug-status", "connected"),
        ("physical-device-path", "/images/disk.raw"),
        ("kthread-pid", &std::process::id().to_string()),
    ] {
        assert_eq!(disk.read(key).as_deref(), Some(value), "{key}");
    }
    disk.toolstack("online", "0");
    disk.toolstack("state", "5");
    disk.front("state", "6");
    disk.store.wait_for_absence(BACK);
    assert_eq!(disk.store.read(FRONT), None);
    let (end, calls) = disk.end();
    assert_eq!(end, Some(End::Detached));
    assert_eq!(calls, [Call::Connect(connection(8, 15)), Call::Disconnect(Parting::Closed)]);
}

#[test]
fn what_a_front_end_reads_is_written_before_the_state_that_makes_it_read() {
    let disk = Attended::start();
    disk.handshake();
    let requests = disk.store.requests();
    let writes: Vec<&str> = requests
        .iter()
        .filter(|(kind, _)| *kind == Kind::Write)
        .filter_map(|(_, path)| path.strip_prefix(BACK)?.strip_prefix('/'))
        .collect();
    let states: Vec<usize> = (0..writes.len()).filter(|at| writes[*at] == "state").collect();
    let [_made, offered, connected] = states[..] else { panic!("{writes:?}") };
    let at = |key: &str| writes.iter().position(|written| *written == key).unwrap();
    assert!(at("max-ring-page-order") < offered && at("multi-queue-max-queues") < offered);
    // Who serves what is known before there is a guest.
    assert!(at("kthread-pid") < offered && at("tapdisk/image") < offered);
    for key in ["sectors", "feature-flush-cache", "feature-max-indirect-segments", "hotplug-status"] {
        assert!(offered < at(key) && at(key) < connected, "{key}: {writes:?}");
    }
    disk.orders.give(Order::Stop);
    assert_eq!(disk.end().0, None);
}

/// Writes what libxl does for `backendtype=tap`.
fn by_toolstack(store: &Store) {
    store.write(BACK, "");
    store.set_permissions(BACK, "n0 r5");
    store.write(FRONT, "");
    store.set_permissions(FRONT, "n5 r0");
    for (key, value) in [
        ("frontend", FRONT),
        ("frontend-id", "5"),
        ("online", "1"),
        ("mode", "w"),
        ("physical-device-path", "/run/its/own"),
        ("state", "1"),
    ] {
        store.write(&format!("{BACK}/{key}"), value);
    }
    for (key, value) in [("backend", BACK), ("backend-id", "0"), ("virtual-device", "51728"), ("state", "1")]
    {
        store.write(&format!("{FRONT}/{key}"), value);
    }
}

fn attached() -> Settings {
    Settings { create_nodes: false, ..settings() }
}

#[test]
fn nodes_of_a_toolstack_are_waited_for_and_left_to_it() {
    let store = store();
    let disk = attend(&store, attached(), LIMITS);
    by_toolstack(&store);
    disk.handshake();
    assert_eq!(disk.read("physical-device-path").as_deref(), Some("/run/its/own"));
    disk.toolstack("online", "0");
    disk.toolstack("state", "5");
    disk.front("state", "6");
    disk.back("state", "6");
    assert_eq!(disk.end().0, Some(End::Detached));
    assert_eq!(store.read(&format!("{BACK}/state")).as_deref(), Some("6"), "the toolstack removes its own");
}

#[test]
fn what_cannot_be_served_is_said_with_what_to_do() {
    let store = store();
    let failure = attend(&store, attached(), LIMITS).failure();
    assert!(failure.contains(BACK) && failure.contains("--create-nodes"), "{failure}");
    by_toolstack(&store);
    let failure = attend(&store, settings(), LIMITS).failure();
    assert!(failure.contains("without --create-nodes"), "{failure}");
    store.write(&format!("{BACK}/mode"), "r");
    let failure = attend(&store, attached(), LIMITS).failure();
    assert!(failure.contains("--read-only"), "{failure}");
    store.write(&format!("{BACK}/frontend-id"), "6");
    let failure = attend(&store, attached(), LIMITS).failure();
    assert!(failure.contains("frontend-id"), "{failure}");
    store.remove(BACK);
    store.write(&format!("{FRONT}/backend"), "/local/domain/0/backend/vbd/5/51728");
    let failure = attend(&store, settings(), LIMITS).failure();
    assert!(failure.contains("/backend/vbd/5/51728") && failure.contains("another device"), "{failure}");
    store.release(GUEST);
    let failure = attend(&store, settings(), LIMITS).failure();
    assert!(failure.contains("no domain 5"), "{failure}");
}

#[test]
fn a_disk_that_another_process_serves_is_not_served_twice() {
    let store = store();
    by_toolstack(&store);
    let mut other = owner::another_of_us();
    store.write(&format!("{BACK}/kthread-pid"), &other.id().to_string());
    let failure = attend(&store, attached(), LIMITS).failure();
    assert!(failure.contains(&other.id().to_string()), "{failure}");
    // Its end is waited for, though nobody has taken note of it yet.
    let disk = attend(&store, attached(), LIMITS);
    other.kill().unwrap();
    disk.handshake();
    other.wait().unwrap();
}

#[test]
fn a_guest_that_closes_comes_back() {
    let disk = Attended::start();
    disk.handshake();
    for round in 0..3 {
        disk.front("state", "5");
        disk.back("state", "5");
        disk.front("state", "6");
        disk.back("state", "6");
        disk.front("state", "1");
        disk.back("state", "2");
        disk.ring(&(20 + round).to_string(), "16");
        disk.front("state", "3");
        disk.back("state", "4");
        disk.front("state", "4");
    }
    // One that starts anew without a word.
    disk.front("state", "1");
    disk.back("state", "2");
    disk.ring("30", "17");
    disk.front("state", "3");
    disk.back("state", "4");
    disk.orders.give(Order::Stop);
    let (end, calls) = disk.end();
    assert_eq!(end, None);
    let mut expected = vec![Call::Connect(connection(8, 15))];
    for round in 0..3 {
        expected.extend([Call::Disconnect(Parting::Closed), Call::Connect(connection(20 + round, 16))]);
    }
    expected.extend([Call::Disconnect(Parting::Forget), Call::Connect(connection(30, 17))]);
    assert_eq!(calls, expected);
}

#[test]
fn a_dead_guest_ends_it_from_every_state() {
    for state in ["1", "2", "3", "4", "5", "6", "nonsense"] {
        let disk = Attended::start();
        if state == "2" {
            disk.back("state", "2");
        } else if state != "1" {
            disk.handshake();
            disk.front("state", state);
        }
        let is_connected = !["1", "2"].contains(&state);
        disk.store.remove("/local/domain/5");
        disk.store.release(GUEST);
        let store = disk.store.clone();
        let (end, calls) = disk.end();
        // Its directory may be seen to be gone before it is.
        match (end, state) {
            (Some(End::GuestGone | End::Detached), _) => {}
            (Some(End::Failed(why)), "1") if why.contains("no domain") => continue,
            other => panic!("{other:?}"),
        }
        assert_eq!(store.read(BACK), None);
        let connects = calls.iter().filter(|call| matches!(call, Call::Connect(_))).count();
        assert_eq!(
            (connects, calls.len()),
            (usize::from(is_connected), 2 * usize::from(is_connected)),
            "{calls:?}"
        );
        assert!(!calls.contains(&Call::Disconnect(Parting::Leave)));
    }
}

#[test]
fn a_guest_that_dies_in_use_is_forgotten() {
    let disk = Attended::start();
    disk.handshake();
    disk.store.release(GUEST);
    let (end, calls) = disk.end();
    assert_eq!(end, Some(End::GuestGone));
    assert_eq!(calls[1..], [Call::Disconnect(Parting::Forget)]);
}

#[test]
fn what_a_guest_has_left_that_died_while_nobody_served_it_is_cleared_away() {
    let disk = Attended::start();
    disk.handshake();
    disk.orders.give(Order::Stop);
    let store = disk.store.clone();
    disk.end();
    store.release(GUEST);
    store.remove("/local/domain/5");
    assert_eq!(attend(&store, settings(), LIMITS).end(), (Some(End::GuestGone), vec![]));
    assert_eq!(store.read(BACK), None);
}

#[test]
fn a_disk_that_a_toolstack_takes_away_by_force_is_answered_first() {
    let disk = Attended::start();
    disk.handshake();
    disk.store.remove(BACK);
    let (end, calls) = disk.end();
    assert_eq!(end, Some(End::Detached));
    assert_eq!(calls[1..], [Call::Disconnect(Parting::Tell)]);
}

#[test]
fn a_disk_that_no_front_end_took_is_detached_at_once() {
    let disk = Attended::start();
    disk.back("state", "2");
    disk.toolstack("online", "0");
    disk.toolstack("state", "5");
    disk.store.wait_for_absence(BACK);
    assert_eq!(disk.end(), (Some(End::Detached), vec![]));
}

#[test]
fn when_told_to_stop_all_stays_for_a_successor() {
    let disk = Attended::start();
    disk.handshake();
    let store = disk.store.clone();
    disk.orders.give(Order::Stop);
    let (end, calls) = disk.end();
    assert_eq!((end, calls.len()), (None, 1));
    assert_eq!(store.read(&format!("{BACK}/state")).as_deref(), Some("4"));
    assert_eq!(store.read(&format!("{FRONT}/state")).as_deref(), Some("4"));
}

#[test]
fn a_successor_goes_on_with_what_the_guest_was_told() {
    let first = attend(
        &store(),
        Settings {
            features: Features { barrier: false, discard: false, indirect: false, ..Features::default() },
            block: 4096,
            ..settings()
        },
        LIMITS,
    );
    first.handshake();
    let store = first.store.clone();
    first.orders.give(Order::Stop);
    first.end();
    // Other options change nothing for this guest; the image has grown meanwhile.
    store.write(&format!("{BACK}/sectors"), "1024");
    let second = attend(&store, settings(), LIMITS);
    second.back("sectors", "131072");
    assert_eq!(store.read(&format!("{BACK}/sector-size")).as_deref(), Some("4096"));
    // Only when it comes anew it is told of ours.
    second.front("state", "6");
    second.back("state", "6");
    second.front("state", "1");
    second.handshake();
    second.orders.give(Order::Stop);
    let (end, calls) = second.end();
    assert_eq!(end, None);
    let offered = Offered { flush_cache: true, barrier: false, discard: false, indirect: 0, block: 4096 };
    assert_eq!(
        calls,
        [
            Call::Connect(Connection { offered, start: Start::TakeOver, ..connection(8, 15) }),
            Call::Disconnect(Parting::Closed),
            Call::Connect(connection(8, 15)),
        ]
    );
    assert_eq!(store.read(&format!("{BACK}/sector-size")).as_deref(), Some("512"));
}

#[test]
fn a_guest_is_not_given_another_image_nor_taken_over_without_its_journal() {
    let disk = Attended::start();
    disk.handshake();
    let store = disk.store.clone();
    disk.orders.give(Order::Stop);
    disk.end();
    let other = Settings { image: Some("/images/other.raw".into()), ..settings() };
    let failure = attend(&store, other, LIMITS).failure();
    assert!(failure.contains("/images/disk.raw") && failure.contains("/images/other.raw"), "{failure}");
    let record = Record::default();
    *record.failure.lock().unwrap() = Some("there is no journal".into());
    let failure = attend_with(&store, settings(), LIMITS, record).failure();
    assert!(failure.contains("there is no journal") && failure.contains("detach"), "{failure}");
    assert_eq!(store.read(&format!("{BACK}/state")).as_deref(), Some("4"));
}

#[test]
fn a_front_end_that_writes_nonsense_is_closed_and_may_try_again() {
    let disk = Attended::start();
    for (key, value) in [
        ("ring-ref", "x"),
        ("event-channel", "0"),
        ("protocol", "vax"),
        ("ring-page-order", "31"),
        ("multi-queue-num-queues", "4000000000"),
    ] {
        disk.back("state", "2");
        disk.ring("8", "15");
        disk.front(key, value);
        disk.front("state", "3");
        disk.back("state", "5");
        disk.front("state", "6");
        disk.back("state", "6");
        disk.store.remove(&format!("{FRONT}/{key}"));
        disk.front("state", "1");
    }
    // Connected without any rings: as it ends for one that has forgotten them.
    disk.back("state", "2");
    disk.store.remove(&format!("{FRONT}/ring-ref"));
    disk.front("state", "4");
    disk.back("state", "5");
    disk.front("state", "6");
    disk.back("state", "6");
    disk.front("state", "1");
    disk.handshake();
    assert_eq!(disk.record.calls(), [Call::Connect(connection(8, 15))]);
    // What it writes once it is connected changes nothing.
    disk.front("ring-ref", "99");
    disk.front("state", "3");
    disk.front("state", "9999999999999999999999");
    disk.front("state", "7");
    disk.orders.give(Order::Resized(128 << 20));
    disk.back("sectors", "262144");
    assert_eq!(disk.read("state").as_deref(), Some("4"));
    assert_eq!(disk.record.calls().len(), 1);
}

#[test]
fn rings_that_cannot_be_mapped_close_the_disk() {
    let record = Record::default();
    *record.failure.lock().unwrap() = Some("ring 0: its pages cannot be mapped".into());
    let disk = attend_with(&store(), settings(), LIMITS, record.clone());
    disk.back("state", "2");
    disk.ring("8", "15");
    disk.front("state", "3");
    disk.back("state", "5");
    assert_eq!(disk.read("sectors"), None);
    disk.front("state", "6");
    disk.back("state", "6");
    *record.failure.lock().unwrap() = None;
    disk.front("state", "1");
    disk.handshake();
}

#[test]
fn a_disk_that_has_grown_is_told_and_one_that_is_not_connected_is_not() {
    let disk = Attended::start();
    disk.back("state", "2");
    *disk.record.size.lock().unwrap() = Some((96 << 20) + 100);
    disk.handshake();
    assert_eq!(disk.read("sectors").as_deref(), Some("196608"));
    let before = disk.store.requests().len();
    disk.orders.give(Order::Resized(128 << 20));
    disk.back("sectors", "262144");
    disk.orders.give(Order::Stop);
    let store = disk.store.clone();
    disk.end();
    let writes: Vec<_> =
        store.requests().into_iter().skip(before).filter(|(kind, _)| *kind == Kind::Write).collect();
    let expected = ["sectors", "state"].map(|key| (Kind::Write, format!("{BACK}/{key}")));
    assert_eq!(writes, expected, "the state once more, after the size");
    assert_eq!(store.read(&format!("{BACK}/state")).as_deref(), Some("4"));
}

#[test]
fn a_failed_sync_takes_the_disk_away_if_that_is_asked_for() {
    let disconnecting = Settings { on_failed_sync: OnFailedSync::Disconnect, ..settings() };
    let disk = attend(&store(), disconnecting, LIMITS);
    disk.handshake();
    disk.orders.give(Order::SyncFailed);
    disk.back("state", "5");
    disk.front("state", "6");
    let store = disk.store.clone();
    assert_eq!(disk.end().0, Some(End::Taken));
    assert_eq!(store.read(BACK), None);

    let disk = Attended::start();
    disk.handshake();
    disk.orders.give(Order::SyncFailed);
    disk.orders.give(Order::Resized(128 << 20));
    disk.back("sectors", "262144");
    assert_eq!(disk.read("state").as_deref(), Some("4"));
}

#[test]
fn features_that_are_hidden_are_not_told() {
    let features = Features {
        flush_cache: false,
        barrier: false,
        discard: false,
        persistent: false,
        indirect: false,
        multi_page: false,
        multi_queue: false,
    };
    let disk = attend(&store(), Settings { features, ..settings() }, LIMITS);
    disk.handshake();
    for (key, value) in [
        ("max-ring-page-order", "0"),
        ("multi-queue-max-queues", "1"),
        ("feature-barrier", "0"),
        ("feature-flush-cache", "0"),
        ("feature-discard", "0"),
        ("feature-persistent", "0"),
        ("feature-max-indirect-segments", "0"),
    ] {
        assert_eq!(disk.read(key).as_deref(), Some(value), "{key}");
    }
    let offered = Offered { flush_cache: false, barrier: false, discard: false, indirect: 0, block: 512 };
    let expected = Connection { offered, persistent: false, ..connection(8, 15) };
    assert_eq!(disk.record.calls(), [Call::Connect(expected)]);
}

#[test]
fn who_copies_asks_for_no_grants_that_stay() {
    for data in [DataPath::Auto, DataPath::Copy] {
        let disk = attend(&store(), Settings { data, ..settings() }, LIMITS);
        disk.handshake();
        assert_eq!(disk.read("feature-persistent").as_deref(), Some("0"));
        assert_eq!(
            disk.record.calls(),
            [Call::Connect(Connection { persistent: false, ..connection(8, 15) })]
        );
    }
}

/// A server that is being stopped connects nobody, which is no fault of the front end.
#[test]
fn a_handshake_that_meets_the_end_is_left_for_a_successor() {
    let record = Record::default();
    let (store, mut orders) = (store(), None);
    *record.failure.lock().unwrap() = Some("tapdisk ends".into());
    let disk = attend_with(&store, settings(), LIMITS, record.clone());
    disk.back("state", "2");
    disk.ring("8", "15");
    // The order is there when the rings are refused.
    let calls = record.calls.lock().unwrap();
    disk.front("state", "3");
    disk.orders.give(Order::Stop);
    drop(calls);
    let Attended { orders: given, thread, .. } = disk;
    orders.replace(given);
    assert_eq!(thread.join().unwrap(), None);
    assert_eq!(store.read(&format!("{BACK}/state")).as_deref(), Some("2"));
    *record.failure.lock().unwrap() = None;
    let successor = attend_with(&store, settings(), LIMITS, record);
    successor.back("state", "4");
}

#[test]
fn without_the_disks_thread_nothing_is_attended_to() {
    let Attended { orders, thread, .. } = Attended::start();
    drop(orders);
    assert_eq!(thread.join().unwrap(), None);
}

#[test]
fn a_read_only_disk_and_a_toolstack_without_discard_are_heeded() {
    let disk = attend(&store(), settings(), Limits { read_only: true, align: 4096, ..LIMITS });
    disk.handshake();
    assert_eq!(disk.read("info").as_deref(), Some("4"), "VDISK_READONLY");
    assert_eq!(disk.read("mode").as_deref(), Some("r"));
    assert_eq!(disk.read("feature-discard").as_deref(), Some("0"));
    assert_eq!(disk.read("physical-sector-size").as_deref(), Some("4096"));
    let store = store();
    by_toolstack(&store);
    for (key, value) in [("discard-enable", "0"), ("device-type", "cdrom"), ("removable", "1")] {
        store.write(&format!("{BACK}/{key}"), value);
    }
    let disk = attend(&store, attached(), LIMITS);
    disk.handshake();
    assert_eq!(disk.read("feature-discard").as_deref(), Some("0"));
    assert_eq!(disk.read("info").as_deref(), Some("3"), "VDISK_CDROM and VDISK_REMOVABLE");
}

#[test]
fn a_store_that_goes_away_and_comes_back_changes_nothing_but_the_time() {
    let disk = Attended::start();
    disk.handshake();
    disk.store.refuse(true);
    disk.store.disconnect();
    disk.front("state", "5");
    disk.store.refuse(false);
    disk.back("state", "5");
    assert_eq!(disk.record.calls().len(), 1, "the rings were left alone");
    disk.front("state", "6");
    disk.back("state", "6");
}

#[test]
fn a_predecessors_disk_that_was_to_go_is_made_anew() {
    let disk = Attended::start();
    disk.handshake();
    disk.orders.give(Order::Stop);
    let store = disk.store.clone();
    disk.end();
    store.write(&format!("{BACK}/online"), "0");
    store.write(&format!("{BACK}/state"), "5");
    store.write(&format!("{FRONT}/state"), "6");
    let disk = attend(&store, settings(), LIMITS);
    store.wait_for(&format!("{FRONT}/state"), "1");
    disk.handshake();
}

/// XSA-350, and blktap's CA-125605: whatever the front end does, and however fast, each connection has its end, and an
/// orderly handshake works afterwards.
#[test]
fn a_front_end_that_flaps_gets_no_further_than_one_that_does_not() {
    let disk = Attended::start();
    disk.back("state", "2");
    disk.ring("8", "15");
    let mut seed = 1_u32;
    for _ in 0..3000 {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let state = ["1", "3", "4", "5", "6", "6", "1", "junk"][(seed >> 24) as usize % 8];
        disk.front("state", state);
        if state == "junk" {
            disk.front(&format!("state/{seed}"), "more");
        }
    }
    disk.front("state", "6");
    disk.back("state", "6");
    disk.front("state", "1");
    disk.handshake();
    disk.toolstack("online", "0");
    disk.toolstack("state", "5");
    disk.front("state", "6");
    let (end, calls) = disk.end();
    assert_eq!(end, Some(End::Detached));
    for pair in calls.chunks(2) {
        assert!(
            matches!(pair, [Call::Connect(_), Call::Disconnect(Parting::Forget | Parting::Closed)]),
            "{calls:?}"
        );
    }
}

#[test]
fn an_error_of_the_store_at_any_point_is_told_and_never_taken_for_success() {
    for after in 0..60 {
        let store = store();
        store.fail(after, Errno::EIO);
        let disk = attend(&store, settings(), LIMITS);
        let front = std::thread::spawn({
            let store = store.clone();
            move || {
                // Does its part as far as it gets.
                for (path, value) in [("ring-ref", "8"), ("event-channel", "15"), ("state", "3")] {
                    store.wait_until("a state", |read| {
                        let state = read(&format!("{BACK}/state"));
                        state.as_deref() == Some("2") || read("/over").is_some()
                    });
                    if store.read("/over").is_none() {
                        store.write(&format!("{FRONT}/{path}"), value);
                    }
                }
            }
        });
        store.wait_until("connected, or failed", |read| {
            read(&format!("{BACK}/state")).as_deref() == Some("4") || disk.thread.is_finished()
        });
        let is_connected = store.read(&format!("{BACK}/state")).as_deref() == Some("4");
        store.write("/over", "");
        front.join().unwrap();
        disk.orders.give(Order::Stop);
        match disk.end().0 {
            None => assert!(is_connected, "request {after}"),
            Some(End::Failed(why)) => assert!(why.contains("EIO"), "request {after}: {why}"),
            other => panic!("request {after}: {other:?}"),
        }
    }
}
