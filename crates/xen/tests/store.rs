//! The client of the xenstore and the fake one, put together over sockets.
#![cfg(feature = "fake")]

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use block::Errno;
use xen::Domain;
use xen::fake::store::Store;
use xen::store::{Client, Connect, ConnectError, Error, Event, Kind, Woken};

/// Nothing that ever becomes readable.
fn silence() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe().unwrap()
}

fn event(path: &str, token: &str) -> Event {
    Event { path: path.into(), token: token.into() }
}

/// A way in for another domain than domain 0.
struct As(Store, Domain);

impl Connect for As {
    fn connect(&self) -> Result<OwnedFd, ConnectError> {
        Ok(self.0.connect_as(self.1).unwrap())
    }
}

#[test]
fn values_are_written_read_listed_and_removed() {
    let store = Store::new();
    let mut client = Client::connect(&store).unwrap();
    assert_eq!(client.now().read("/a/b").unwrap(), None);
    assert_eq!(client.now().list("/a").unwrap(), None);
    client.now().write("/a/b", "5").unwrap();
    client.now().make("/a/c").unwrap();
    client.now().write("/a/d/e", "").unwrap();
    assert_eq!(client.now().read("/a/b").unwrap().as_deref(), Some("5"));
    assert_eq!(client.now().read("/a/c").unwrap().as_deref(), Some(""));
    assert_eq!(client.now().list("/a").unwrap().unwrap(), ["b", "c", "d"]);
    assert_eq!(client.now().list("/a/b").unwrap().unwrap(), Vec::<String>::new());
    client.now().remove("/a").unwrap();
    client.now().remove("/a").unwrap();
    assert_eq!(client.now().read("/a/d/e").unwrap(), None);
    assert_eq!(client.domain_path(Domain(7)).unwrap(), "/local/domain/7");
}

#[test]
fn a_value_of_the_largest_size_passes_and_a_larger_one_is_not_sent() {
    let store = Store::new();
    let mut client = Client::connect(&store).unwrap();
    let most = "x".repeat(4096 - "/a\0".len());
    client.now().write("/a", &most).unwrap();
    assert_eq!(client.now().read("/a").unwrap().unwrap(), most);
    let asked = store.requests().len();
    assert!(matches!(client.now().write("/a", &format!("{most}x")), Err(Error::TooLong { .. })));
    assert!(matches!(client.now().read(&"/a".repeat(1537)), Err(Error::TooLong { .. })));
    assert!(matches!(client.now().read("/a\0/b"), Err(Error::TooLong { .. })));
    assert_eq!(store.requests().len(), asked);
}

#[test]
fn domains_may_what_permissions_say() {
    let store = Store::new();
    store.write("/local/domain/5/device", "");
    store.set_permissions("/local/domain/5/device", "n5 r0");
    store.write("/backend", "secret");
    store.set_permissions("/backend", "n0 r6");
    let mut guest = Client::connect(&As(store.clone(), Domain(5))).unwrap();
    guest.now().write("device/state", "1").unwrap(); // its own, by a relative path
    assert_eq!(store.read("/local/domain/5/device/state").as_deref(), Some("1"));
    assert_eq!(store.permissions("/local/domain/5/device/state"), "n5 r0");
    let refused = guest.now().read("/backend").unwrap_err();
    assert!(matches!(refused, Error::Refused { errno: Errno::EACCES, .. }), "{refused}");
    assert!(refused.to_string().contains("/backend"), "{refused}");
    let mut other = Client::connect(&As(store.clone(), Domain(6))).unwrap();
    assert_eq!(other.now().read("/backend").unwrap().as_deref(), Some("secret"));
    assert!(other.now().write("/backend", "mine").is_err());
    assert!(other.now().write("/backend/below", "mine").is_err());
    let mut client = Client::connect(&store).unwrap();
    let permissions = client.now().permissions("/backend").unwrap().unwrap();
    client.now().set_permissions("/backend", &permissions[..1]).unwrap();
    assert_eq!(store.permissions("/backend"), "n0");
    assert_eq!(client.now().permissions("/nowhere").unwrap(), None);
}

#[test]
fn a_watch_fires_at_once_and_for_all_below_and_not_for_its_neighbours() {
    let store = Store::new();
    let mut client = Client::connect(&store).unwrap();
    let (read, _write) = silence();
    client.watch("/a/state", "mine").unwrap();
    assert_eq!(client.wait(read.as_fd(), None).unwrap(), Woken::Event);
    assert_eq!(client.event(), Some(event("/a/state", "mine")));
    assert_eq!(client.event(), None);
    store.write("/a/states", "1");
    store.write("/a/other", "1");
    store.write("/a/state/below", "1");
    assert_eq!(client.wait(read.as_fd(), None).unwrap(), Woken::Event);
    assert_eq!(client.event(), Some(event("/a/state/below", "mine")));
    store.remove("/a");
    assert_eq!(client.wait(read.as_fd(), None).unwrap(), Woken::Event);
    assert_eq!(client.event(), Some(event("/a/state", "mine")), "its removal with one above");
    client.unwatch("/a/state", "mine").unwrap();
    store.write("/a/state", "1");
    client.now().read("/a").unwrap();
    assert_eq!(client.event(), None);
}

#[test]
fn the_end_of_a_domain_is_told() {
    let store = Store::new();
    store.introduce(Domain(5));
    let mut client = Client::connect(&store).unwrap();
    let (read, _write) = silence();
    client.watch("@releaseDomain", "gone").unwrap();
    assert_eq!(client.wait(read.as_fd(), None).unwrap(), Woken::Event);
    assert_eq!(client.event(), Some(event("@releaseDomain", "gone")));
    assert!(client.is_introduced(Domain(5)).unwrap());
    store.release(Domain(5));
    assert_eq!(client.wait(read.as_fd(), None).unwrap(), Woken::Event);
    assert!(!client.is_introduced(Domain(5)).unwrap());
}

#[test]
fn a_wait_ends_with_its_time_or_with_the_other_descriptor() {
    let store = Store::new();
    let mut client = Client::connect(&store).unwrap();
    let (read, write) = silence();
    assert_eq!(client.wait(read.as_fd(), Some(Duration::from_millis(1))).unwrap(), Woken::Timeout);
    rustix::io::write(&write, b"x").unwrap();
    assert_eq!(client.wait(read.as_fd(), None).unwrap(), Woken::Other);
}

#[test]
fn a_flood_of_events_takes_no_memory() {
    let store = Store::new();
    let mut client = Client::connect(&store).unwrap();
    client.watch("/guest", "mine").unwrap();
    client.watch("/quiet", "other").unwrap();
    for round in 0..3 {
        for index in 0..2000 {
            store.write("/guest/state", &format!("{round}"));
            store.write(&format!("/guest/{index}"), "");
        }
    }
    store.write("/quiet", "");
    client.now().read("/quiet").unwrap(); // comes after all events
    let events: Vec<Event> = std::iter::from_fn(|| client.event()).collect();
    assert!(events.len() <= 130, "{} events", events.len());
    assert!(events.contains(&event("/guest/state", "mine")));
    assert!(events.contains(&event("/quiet", "other")), "a flood of one watch drowns no other");
    for (index, event) in events.iter().enumerate() {
        assert!(!events[..index].contains(event), "{event:?} twice");
    }
}

#[test]
fn a_transaction_is_seen_at_once_or_not_at_all() {
    let store = Store::new();
    let mut client = Client::connect(&store).unwrap();
    let result = client.transaction(|view| {
        view.write("/a", "1")?;
        assert_eq!(view.read("/a")?.as_deref(), Some("1"));
        assert_eq!(store.read("/a"), None);
        view.read("/a\0").map(drop)
    });
    assert!(matches!(result, Err(Error::TooLong { .. })));
    assert_eq!(store.read("/a"), None, "a transaction whose work fails changes nothing");
    client.transaction(|view| view.write("/a", "2")).unwrap();
    assert_eq!(store.read("/a").as_deref(), Some("2"));
}

#[test]
fn a_transaction_in_the_way_of_others_is_done_anew() {
    let store = Store::new();
    let mut client = Client::connect(&store).unwrap();
    store.write("/count", "0");
    let mut tries = 0;
    client
        .transaction(|view| {
            let count: u32 = view.read("/count")?.unwrap().parse().unwrap();
            tries += 1;
            if tries <= 2 {
                store.write("/count", &(count + 10).to_string());
            }
            view.write("/count", &(count + 1).to_string())
        })
        .unwrap();
    assert_eq!((tries, store.read("/count").as_deref()), (3, Some("21")));
    store.write("/unrelated", "");
    let mut tries = 0;
    let contended = client.transaction(|view| {
        tries += 1;
        store.write("/count", "0");
        view.write("/count", "1")
    });
    assert!(matches!(contended, Err(Error::Contended)), "{contended:?}");
    assert_eq!(tries, 100);
}

#[test]
fn a_transaction_is_not_in_the_way_of_what_it_has_not_touched() {
    let store = Store::new();
    let mut client = Client::connect(&store).unwrap();
    let mut tries = 0;
    client
        .transaction(|view| {
            tries += 1;
            store.write("/elsewhere/x", &tries.to_string());
            view.write("/here/y", "1")
        })
        .unwrap();
    assert_eq!(tries, 1);
}

#[test]
fn an_error_is_told_with_what_was_asked() {
    let store = Store::new();
    let mut client = Client::connect(&store).unwrap();
    store.fail(1, Errno::EACCES);
    client.now().write("/a", "1").unwrap();
    let error = client.now().write("/b", "1").unwrap_err();
    assert!(!error.is_lost());
    assert_eq!(error.to_string(), "the xenstore does not write /b: EACCES");
    assert_eq!(store.read("/b"), None);
    client.now().write("/b", "1").unwrap();
    assert_eq!(store.requests().last().unwrap(), &(Kind::Write, "/b".into()));
}

#[test]
fn a_lost_connection_is_told_as_such() {
    let store = Store::new();
    let mut client = Client::connect(&store).unwrap();
    let (read, _write) = silence();
    client.now().write("/a", "1").unwrap();
    store.disconnect();
    let error = client.wait(read.as_fd(), None).unwrap_err();
    assert!(error.is_lost(), "{error}");
    assert!(client.now().read("/a").unwrap_err().is_lost());
    store.refuse(true);
    let error = Client::connect(&Refusing(store.clone())).unwrap_err();
    assert!(error.is_lost(), "{error}");
    store.refuse(false);
    assert_eq!(Client::connect(&store).unwrap().now().read("/a").unwrap().as_deref(), Some("1"));
}

/// As the store itself: an error with a place in it.
struct Refusing(Store);

impl Connect for Refusing {
    fn connect(&self) -> Result<OwnedFd, ConnectError> {
        let error = self.0.connect().unwrap_err();
        assert_eq!(error.tried.len(), 1);
        Err(error)
    }
}

/// A store that says what it is told to say, whatever it is asked.
fn answering(answer: Vec<u8>) -> Client {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    struct Fixed(std::sync::Mutex<Option<UnixStream>>);

    impl Connect for Fixed {
        fn connect(&self) -> Result<OwnedFd, ConnectError> {
            Ok(self.0.lock().unwrap().take().unwrap().into())
        }
    }

    let (mut ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        assert!(ours.read(&mut bytes).unwrap() > 0);
        ours.write_all(&answer).unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        let rest = ours.read(&mut bytes).unwrap_or(0);
        assert_eq!(rest, 0, "nothing else is asked");
    });
    Client::connect(&Fixed(std::sync::Mutex::new(Some(theirs)))).unwrap()
}

#[test]
fn a_store_that_talks_nonsense_is_not_believed() {
    let message = |numbers: [u32; 4], payload: &[u8]| {
        let header = numbers.iter().flat_map(|number| number.to_ne_bytes());
        header.chain(payload.iter().copied()).collect::<Vec<u8>>()
    };
    for (what, answer) in [
        ("another request", message([2, 99, 0, 1], b"5")),
        ("another kind", message([11, 1, 0, 1], b"5")),
        ("an unknown kind", message([77, 1, 0, 1], b"5")),
        ("too long", message([2, 1, 0, 5000], b"5")),
        ("cut short", message([2, 1, 0, 10], b"5")),
        ("an event without a token", message([15, 0, 0, 5], b"/path")),
        ("the end", Vec::new()),
    ] {
        let mut client = answering(answer);
        let error = client.now().read("/a").unwrap_err();
        assert!(error.is_lost(), "{what}: {error}");
    }
    // An event in between is no nonsense.
    let mut answer = message([15, 0, 0, 6], b"/a\0me\0");
    answer.extend(message([2, 1, 0, 1], b"5"));
    let mut client = answering(answer);
    assert_eq!(client.now().read("/a").unwrap().as_deref(), Some("5"));
    assert_eq!(client.event(), Some(event("/a", "me")));
}
