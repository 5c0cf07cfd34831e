//! What a guest hears of a node of the store: events, also where the value that is written is the one that was there.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use xen::Domain;
use xen::fake::store::Store;
use xen::store::{Client, Connect, ConnectError, Woken};

use crate::Result;

/// A watch of a domain.
#[derive(Debug)]
pub struct Watch {
    client: Client,
    /// Nothing that ever becomes readable, and its other end.
    silence: (OwnedFd, OwnedFd),
}

/// A way into the store for a domain.
struct As(Store, Domain);

impl Connect for As {
    fn connect(&self) -> std::result::Result<OwnedFd, ConnectError> {
        let failed = |error| ConnectError { tried: vec![("a store within the process".into(), error)] };
        self.0.connect_as(self.1).map_err(failed)
    }
}

impl Watch {
    /// Watches a node. That it is watched is an event by itself, which is taken here.
    pub fn new(store: &Store, domain: Domain, path: &str) -> Result<Watch> {
        let mut client = Client::connect(&As(store.clone(), domain))?;
        client.watch(path, "watch")?;
        let mut watch = Watch { client, silence: rustix::pipe::pipe()? };
        match watch.hears(Duration::from_secs(30))? {
            true => Ok(watch),
            false => Err("a watch that does not fire when it is set".into()),
        }
    }

    /// Whether there is an event, for which it waits so long at most.
    pub fn hears(&mut self, patience: Duration) -> Result<bool> {
        match self.client.wait(self.silence.0.as_fd(), Some(patience))? {
            Woken::Event => Ok(self.client.event().is_some()),
            Woken::Timeout | Woken::Other => Ok(false),
        }
    }
}
