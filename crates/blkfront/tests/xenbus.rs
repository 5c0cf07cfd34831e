//! The front end's part of the handshake, with a back end that is played by hand.

use std::time::Duration;

use blkfront::{Abi, Front, Nodes, Watch, Wish, state};
use xen::Domain;
use xen::fake::store::Store;
use xen::fake::{Guest, World};

const GUEST: Domain = Domain(3);

struct Stage {
    world: World,
    store: Store,
    guest: Guest,
    nodes: Nodes,
}

impl Stage {
    fn new() -> Stage {
        let (world, store) = (World::new(), Store::new());
        let guest = world.domain(GUEST, 200);
        let nodes = Nodes::new(GUEST, 51728, "vbd3");
        nodes.create(&store, "w");
        Stage { world, store, guest, nodes }
    }

    /// The back end writes this.
    fn back(&self, key: &str, value: &str) {
        self.store.write(&format!("{}/{key}", self.nodes.back), value);
    }

    /// The front end has written this.
    fn front(&self, key: &str) -> Option<String> {
        self.store.read(&format!("{}/{key}", self.nodes.front))
    }

    fn prepare(&self, wish: &Wish) -> Front {
        self.back("state", state::INIT_WAIT);
        Front::prepare(&self.store, &self.guest, &self.nodes, wish).unwrap()
    }

    /// What a back end tells before it is connected.
    fn tell(&self) {
        for (key, value) in
            [("sectors", "2048"), ("sector-size", "512"), ("info", "4"), ("feature-persistent", "1")]
        {
            self.back(key, value);
        }
        self.back("state", state::CONNECTED);
    }
}

/// The names that io/blkif.h has for one ring of one page.
#[test]
fn one_ring_of_one_page_has_the_flat_layout() {
    let stage = Stage::new();
    let front = stage.prepare(&Wish::default());
    let spec = &front.driver.specs()[0];
    assert_eq!(stage.front("ring-ref"), Some(spec.refs[0].0.to_string()));
    assert_eq!(stage.front("event-channel"), Some(spec.port.0.to_string()));
    assert_eq!(stage.front("protocol").as_deref(), Some("x86_64-abi"));
    assert_eq!(stage.front("feature-persistent").as_deref(), Some("0"));
    for absent in ["ring-ref0", "ring-page-order", "multi-queue-num-queues", "queue-0"] {
        assert_eq!(stage.front(absent), None, "{absent}");
    }
    assert_eq!(stage.front("state").as_deref(), Some(state::INITIALISING), "not before it says so");
}

#[test]
fn rings_are_as_many_and_as_large_as_both_ends_bear() {
    for (max_order, max_queues, order, queues) in [(4, 4, 2, 3), (1, 2, 1, 2), (0, 8, 0, 3), (4, 1, 2, 1)] {
        let stage = Stage::new();
        stage.back("max-ring-page-order", &max_order.to_string());
        stage.back("multi-queue-max-queues", &max_queues.to_string());
        let wish = Wish { order: 2, queues: 3, abi: Abi::X86_32, persistent: true, ..Wish::default() };
        let front = stage.prepare(&wish);
        assert_eq!((front.driver.wish().order, front.driver.wish().queues), (order, queues));
        let pages = 1 << order;
        assert!(front.driver.specs().iter().all(|spec| spec.refs.len() == pages));
        let folders: Vec<String> = match queues {
            1 => vec![String::new()],
            _ => (0..queues).map(|number| format!("queue-{number}/")).collect(),
        };
        for (folder, spec) in folders.iter().zip(front.driver.specs()) {
            assert_eq!(stage.front(&format!("{folder}event-channel")), Some(spec.port.0.to_string()));
            let first = if order == 0 { "ring-ref".into() } else { format!("ring-ref{}", pages - 1) };
            let last = spec.refs.last().unwrap().0.to_string();
            assert_eq!(stage.front(&format!("{folder}{first}")), Some(last), "{folder}");
        }
        let said = (stage.front("ring-page-order"), stage.front("multi-queue-num-queues"));
        let words = |number: usize, least| (number > least).then(|| number.to_string());
        assert_eq!(said, (words(order as usize, 0), words(queues, 1)));
        assert_eq!(stage.front("event-channel").is_some(), queues == 1, "flat, or not at all");
        assert_eq!(stage.front("protocol").as_deref(), Some("x86_32-abi"));
    }
}

#[test]
fn what_the_back_end_tells_is_what_the_front_end_knows() {
    let stage = Stage::new();
    let mut front = stage.prepare(&Wish { persistent: true, ..Wish::default() });
    front.set_state(state::INITIALISED).unwrap();
    stage.tell();
    front.finish().unwrap();
    assert_eq!(stage.front("state").as_deref(), Some(state::CONNECTED));
    let told = &front.told;
    assert_eq!((told.sectors, told.sector_size, told.physical_sector_size, told.info), (2048, 512, 512, 4));
    assert!(told.persistent && !told.flush_cache && !told.barrier && !told.discard);
    assert!(front.driver.wish().persistent, "both want it");
    stage.back("sectors", "4096");
    front.look().unwrap();
    assert_eq!(front.told.sectors, 4096);
}

#[test]
fn pages_stay_granted_only_if_both_ends_want_it() {
    for (ours, theirs) in [(true, "0"), (false, "1")] {
        let stage = Stage::new();
        let mut front = stage.prepare(&Wish { persistent: ours, ..Wish::default() });
        stage.tell();
        stage.back("feature-persistent", theirs);
        front.finish().unwrap();
        assert!(!front.driver.wish().persistent);
    }
}

#[test]
fn a_back_end_that_closes_instead_is_an_error() {
    let stage = Stage::new();
    let mut front = stage.prepare(&Wish::default());
    stage.back("state", state::CLOSING);
    assert!(front.finish().unwrap_err().to_string().contains("\"5\""));
}

/// Which states each end goes through, the front end first.
#[test]
fn a_front_end_closes_in_each_of_the_ways_that_there_are() {
    type Way = fn(Front) -> blkfront::Result<()>;
    let ways: [(Way, &[&str]); 3] = [
        (Front::shut_down, &[state::CLOSING, state::CLOSED]),
        (Front::unload, &[state::CLOSED]),
        (Front::follow, &[state::CLOSED]),
    ];
    for (nth, (way, states)) in ways.into_iter().enumerate() {
        let stage = Stage::new();
        let mut front = stage.prepare(&Wish::default());
        stage.tell();
        front.finish().unwrap();
        let path = format!("{}/state", stage.nodes.front);
        if nth == 2 {
            stage.nodes.detach(&stage.store);
            assert_eq!(stage.store.read(&format!("{}/online", stage.nodes.back)).as_deref(), Some("0"));
        }
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| way(front));
            for state in states {
                stage.store.wait_for(&path, state);
                stage.back("state", state);
            }
            closing.join().unwrap().unwrap();
        });
        assert_eq!((stage.guest.granted(), stage.world.counts().bound), (0, 0), "everything is taken back");
        std::thread::scope(|scope| {
            let starting = scope.spawn(|| stage.nodes.start_over(&stage.store));
            stage.store.wait_for(&path, state::INITIALISING);
            stage.back("state", state::INIT_WAIT);
            starting.join().unwrap().unwrap();
        });
        stage.prepare(&Wish::default());
    }
}

#[test]
fn a_guest_may_not_write_what_is_the_back_ends_nor_read_what_is_others() {
    let stage = Stage::new();
    let path = format!("{}/sectors", stage.nodes.back);
    assert!(stage.store.write_as(GUEST, &path, "1").is_err());
    assert!(stage.store.read_as(Domain(4), &format!("{}/state", stage.nodes.front)).is_err());
    assert!(stage.store.read_as(GUEST, &format!("{}/state", stage.nodes.back)).is_ok());
}

#[test]
fn a_watch_fires_for_a_value_that_is_written_once_more() {
    let stage = Stage::new();
    let path = format!("{}/state", stage.nodes.back);
    stage.back("state", state::CONNECTED);
    let mut watch = Watch::new(&stage.store, GUEST, &path).unwrap();
    assert!(!watch.hears(Duration::from_millis(20)).unwrap());
    stage.back("state", state::CONNECTED);
    assert!(watch.hears(Duration::from_secs(30)).unwrap());
    assert!(!watch.hears(Duration::from_millis(20)).unwrap());
}
