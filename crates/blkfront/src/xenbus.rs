//! A front end's part of the handshake through the xenstore, as Linux's driver does it, and a toolstack's part.
//!
//! Sources: xen/include/public/io/xenbus.h and blkif.h; drivers/block/xen-blkfront.c of Linux 6.1.

use xen::Domain;
use xen::fake::Guest;
use xen::fake::store::Store;

use crate::driver::{Driver, RingSpec, Wish};
use crate::{Error, Result};

/// States of either end (`enum xenbus_state`).
pub mod state {
    #![allow(missing_docs)]
    pub const INITIALISING: &str = "1";
    pub const INIT_WAIT: &str = "2";
    pub const INITIALISED: &str = "3";
    pub const CONNECTED: &str = "4";
    pub const CLOSING: &str = "5";
    pub const CLOSED: &str = "6";
}

/// Where a disk is in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nodes {
    /// The front end's directory.
    pub front: String,
    /// The back end's.
    pub back: String,
    domain: Domain,
    device: u32,
}

impl Nodes {
    /// Of this virtual device of a domain.
    pub fn new(domain: Domain, device: u32, kind: &str) -> Nodes {
        let front = format!("/local/domain/{domain}/device/vbd/{device}");
        let back = format!("/local/domain/0/backend/{kind}/{domain}/{device}");
        Nodes { front, back, domain, device }
    }

    /// Writes both directories, as a toolstack does for a disk of a domain. `mode` is `w` or `r`.
    pub fn create(&self, store: &Store, mode: &str) {
        let (domain, device) = (self.domain.to_string(), self.device.to_string());
        store.write(&self.back, "");
        store.set_permissions(&self.back, &format!("n0 r{domain}"));
        store.write(&self.front, "");
        store.set_permissions(&self.front, &format!("n{domain} r0"));
        let back = [
            ("frontend", self.front.as_str()),
            ("frontend-id", &domain),
            ("online", "1"),
            ("removable", "0"),
            ("bootable", "1"),
            ("dev", "xvdb"),
            ("type", "vbd3"),
            ("mode", mode),
            ("device-type", "disk"),
            ("state", state::INITIALISING),
        ];
        let front = [
            ("backend", self.back.as_str()),
            ("backend-id", "0"),
            ("virtual-device", &device),
            ("device-type", "disk"),
            ("state", state::INITIALISING),
        ];
        for (key, value) in back {
            store.write(&format!("{}/{key}", self.back), value);
        }
        for (key, value) in front {
            store.write(&format!("{}/{key}", self.front), value);
        }
    }

    /// Asks for the disk to be taken away, as a toolstack does.
    pub fn detach(&self, store: &Store) {
        store.write(&format!("{}/online", self.back), "0");
        store.write(&format!("{}/state", self.back), state::CLOSING);
    }

    /// Has a front end that has closed begin anew, as a guest does that loads its driver once more or boots another
    /// kernel; waits for the back end to be ready for it.
    pub fn start_over(&self, store: &Store) -> Result<()> {
        let path = format!("{}/state", self.front);
        let said = store.write_as(self.domain, &path, state::INITIALISING);
        said.map_err(|errno| format!("write {path}: {errno}"))?;
        store.wait_for(&format!("{}/state", self.back), state::INIT_WAIT);
        Ok(())
    }

    /// Removes both directories.
    pub fn remove(&self, store: &Store) {
        store.remove(&self.front);
        store.remove(&self.back);
    }
}

/// What a back end has told of its disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Sectors of 512 bytes.
    pub sectors: u64,
    /// Bytes of a block.
    pub sector_size: u32,
    /// Bytes of a block of what is below.
    pub physical_sector_size: u32,
    /// `VDISK_*`: 4 is read-only.
    pub info: u32,
    /// Flushes may be sent.
    pub flush_cache: bool,
    /// Barriers may be sent.
    pub barrier: bool,
    /// Discards may be sent.
    pub discard: bool,
    /// Pages may stay granted.
    pub persistent: bool,
    /// Segments of an indirect request.
    pub indirect: usize,
}

/// A front end, and its driver while it is connected.
pub struct Front {
    store: Store,
    nodes: Nodes,
    /// Its driver.
    pub driver: Driver,
    /// What the back end has told.
    pub told: Told,
}

impl Front {
    /// Waits for the back end, and connects to it. The wish for pages, rings and persistence is what it is at most.
    pub fn connect(store: &Store, guest: &Guest, nodes: &Nodes, wish: &Wish) -> Result<Front> {
        let mut front = Front::prepare(store, guest, nodes, wish)?;
        front.set_state(state::INITIALISED)?;
        front.finish()?;
        Ok(front)
    }

    /// The first part of that: waits until the back end has told its limits, makes rings, and writes where they are. The
    /// back end does not look before the front end says that it is initialised.
    pub fn prepare(store: &Store, guest: &Guest, nodes: &Nodes, wish: &Wish) -> Result<Front> {
        let store = store.clone();
        store.wait_for(&format!("{}/state", nodes.back), state::INIT_WAIT);
        let number = |key: &str, default: u64| -> Result<u64> {
            match store.read_as(guest.domain(), &format!("{}/{key}", nodes.back)) {
                Ok(text) => Ok(text.parse()?),
                Err(_) => Ok(default),
            }
        };
        let mut wish = wish.clone();
        wish.order = wish.order.min(number("max-ring-page-order", 0)? as u32);
        wish.queues = wish.queues.min(number("multi-queue-max-queues", 1)? as usize).max(1);
        let driver = Driver::new(guest.clone(), &wish)?;
        let front = Front { store, nodes: nodes.clone(), driver, told: Told::default() };
        front.tell(&wish)?;
        Ok(front)
    }

    /// Writes where the rings are, and what it can do.
    fn tell(&self, wish: &Wish) -> Result<()> {
        let specs = self.driver.specs();
        if wish.order > 0 {
            self.write("ring-page-order", &wish.order.to_string())?;
        }
        match &specs[..] {
            [spec] => self.tell_of_ring("", wish, spec)?,
            specs => {
                self.write("multi-queue-num-queues", &specs.len().to_string())?;
                for (number, spec) in specs.iter().enumerate() {
                    self.tell_of_ring(&format!("queue-{number}/"), wish, spec)?;
                }
            }
        }
        if let Some(protocol) = wish.abi.protocol() {
            self.write("protocol", protocol)?;
        }
        self.write("feature-persistent", if wish.persistent { "1" } else { "0" })
    }

    fn tell_of_ring(&self, folder: &str, wish: &Wish, spec: &RingSpec) -> Result<()> {
        match (wish.order, &spec.refs[..]) {
            (0, [gref]) => self.write(&format!("{folder}ring-ref"), &gref.0.to_string())?,
            (_, refs) => {
                for (number, gref) in refs.iter().enumerate() {
                    self.write(&format!("{folder}ring-ref{number}"), &gref.0.to_string())?;
                }
            }
        }
        self.write(&format!("{folder}event-channel"), &spec.port.0.to_string())
    }

    /// The last part: waits until the back end is connected, and is so too.
    pub fn finish(&mut self) -> Result<()> {
        self.wait_for_state(state::CONNECTED)?;
        self.look()?;
        self.driver.set_persistent(self.driver.wish().persistent && self.told.persistent);
        self.set_state(state::CONNECTED)
    }

    /// Reads what the back end tells, as Linux does each time that its state is said to be "connected".
    pub fn look(&mut self) -> Result<()> {
        let number = |key: &str| -> Result<Option<u64>> {
            match self.of_back_end(key) {
                Some(text) => Ok(Some(text.parse().map_err(|_not_a_number| format!("{key} is {text:?}"))?)),
                None => Ok(None),
            }
        };
        let flag = |key: &str| Ok::<bool, Error>(number(key)?.unwrap_or(0) == 1);
        self.told = Told {
            sectors: number("sectors")?.ok_or("no sectors")?,
            sector_size: number("sector-size")?.ok_or("no sector-size")? as u32,
            physical_sector_size: match number("physical-sector-size")? {
                Some(bytes) => bytes as u32,
                None => number("sector-size")?.ok_or("no sector-size")? as u32,
            },
            info: number("info")?.ok_or("no info")? as u32,
            flush_cache: flag("feature-flush-cache")?,
            barrier: flag("feature-barrier")?,
            discard: flag("feature-discard")?,
            persistent: flag("feature-persistent")?,
            indirect: number("feature-max-indirect-segments")?.unwrap_or(0) as usize,
        };
        Ok(())
    }

    /// What the guest can read in the back end's directory.
    pub fn of_back_end(&self, key: &str) -> Option<String> {
        self.store.read_as(self.driver.guest().domain(), &format!("{}/{key}", self.nodes.back)).ok()
    }

    /// Writes into the front end's directory, as the guest.
    pub fn write(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("{}/{key}", self.nodes.front);
        let domain = self.driver.guest().domain();
        self.store.write_as(domain, &path, value).map_err(|errno| format!("write {path}: {errno}").into())
    }

    /// Says how far it is.
    pub fn set_state(&self, state: &str) -> Result<()> {
        self.write("state", state)
    }

    /// Waits until the back end is in this state; an error if it closes instead.
    pub fn wait_for_state(&self, wanted: &str) -> Result<()> {
        let path = format!("{}/state", self.nodes.back);
        let mut last = None;
        self.store.wait_until(&format!("{path} is {wanted}, or closing"), |read| {
            last = read(&path);
            let is_over = matches!(last.as_deref(), None | Some(state::CLOSING | state::CLOSED));
            last.as_deref() == Some(wanted) || is_over
        });
        match last.as_deref() == Some(wanted) {
            true => Ok(()),
            false => Err(format!("the back end's state is {last:?}, and not {wanted}").into()),
        }
    }

    /// Closes, as Linux does when it has been asked to or the driver is unbound: nothing may be mapped after that.
    pub fn close(self) -> Result<()> {
        self.set_state(state::CLOSING)?;
        self.set_state(state::CLOSED)?;
        self.end()
    }

    /// Closes step by step, each of which the back end follows: Mini-OS (`shutdown_blkfront`), and a Linux that was
    /// booted by another (`xenbus_reset_frontend`).
    pub fn shut_down(self) -> Result<()> {
        self.set_state(state::CLOSING)?;
        self.store.wait_until("the back end is closing", |read| {
            matches!(read(&self.back_state()).as_deref(), None | Some(state::CLOSING | state::CLOSED))
        });
        self.set_state(state::CLOSED)?;
        self.end()
    }

    /// Is unloaded: to the last state at once (`xenbus_dev_remove`).
    pub fn unload(self) -> Result<()> {
        self.set_state(state::CLOSED)?;
        self.end()
    }

    /// Does what a back end that is closing waits for. Nobody uses the disk, so it is closed at once (`blkfront_closing`).
    pub fn follow(self) -> Result<()> {
        self.store.wait_until("the back end is closing", |read| {
            matches!(read(&self.back_state()).as_deref(), None | Some(state::CLOSING | state::CLOSED))
        });
        self.unload()
    }

    /// Takes everything back once the back end has let go of it.
    fn end(self) -> Result<()> {
        self.store.wait_until("the back end is closed", |read| {
            matches!(read(&self.back_state()).as_deref(), None | Some(state::CLOSED | state::INIT_WAIT))
        });
        self.driver.close()
    }

    fn back_state(&self) -> String {
        format!("{}/state", self.nodes.back)
    }

    /// Forgets everything as a kernel that is booted anew does, without a word to the back end. Its pages stay granted.
    pub fn crash(self) -> Driver {
        self.driver
    }
}
