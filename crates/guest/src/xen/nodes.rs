//! The nodes of a disk in the xenstore: where they are, and how both ends' directories are made and removed.

use ::xen::store::{Access, Client, Error, Permission, View};
use ::xen::{Domain, Vdev};

use super::Settings;
use super::negotiate::number;

/// The states of xenbus (xen/include/public/io/xenbus.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum State {
    Initialising = 1,
    InitWait = 2,
    Initialised = 3,
    Connected = 4,
    Closing = 5,
    Closed = 6,
    Reconfiguring = 7,
    Reconfigured = 8,
}

impl State {
    pub(crate) const ALL: [State; 8] = [
        State::Initialising,
        State::InitWait,
        State::Initialised,
        State::Connected,
        State::Closing,
        State::Closed,
        State::Reconfiguring,
        State::Reconfigured,
    ];

    /// `None` for what is no state, among that 0 (unknown).
    pub(crate) fn parse(text: &str) -> Option<State> {
        State::ALL.into_iter().find(|state| state.text() == text)
    }

    /// As it is written.
    pub(crate) fn text(self) -> &'static str {
        match self {
            State::Initialising => "1",
            State::InitWait => "2",
            State::Initialised => "3",
            State::Connected => "4",
            State::Closing => "5",
            State::Closed => "6",
            State::Reconfiguring => "7",
            State::Reconfigured => "8",
        }
    }
}

/// The directories of both ends of one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Nodes {
    pub(crate) backend: String,
    pub(crate) frontend: String,
    /// The domain that we are in.
    own: Domain,
    /// The guest.
    domain: Domain,
    device: u32,
}

/// That the directories were made by us is said in the back end's, where no guest can write.
const CREATED: &str = "tapdisk/created";
/// What is served.
pub(crate) const IMAGE: &str = "tapdisk/image";
/// The number of the process that serves.
pub(crate) const SERVER: &str = "kthread-pid";
/// The same process, as an [`Owner`].
const OWNER: &str = "tapdisk/owner";

/// A process, told from others that had or will have its number by when it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) pid: u32,
    /// Ticks of the clock from boot (proc(5), starttime of stat).
    started: u64,
}

impl Owner {
    /// This process.
    pub(crate) fn this() -> Owner {
        let pid = std::process::id();
        Owner::living(pid).unwrap_or(Owner { pid, started: 0 })
    }

    /// The process of this number. One that has died, and waits for nobody but its parent, is none.
    pub(crate) fn living(pid: u32) -> Option<Owner> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command's name, in parentheses, may hold anything. What follows it are the fields from the third on.
        let mut fields = stat.rsplit(')').next()?.split_whitespace();
        if matches!(fields.next()?, "Z" | "X") {
            return None;
        }
        Some(Owner { pid, started: fields.nth(18)?.parse().ok()? })
    }

    fn parse(text: &str) -> Option<Owner> {
        let (pid, started) = text.split_once(' ')?;
        Some(Owner { pid: pid.parse().ok()?, started: started.parse().ok()? })
    }

    fn text(self) -> String {
        format!("{} {}", self.pid, self.started)
    }
}

/// Who serves a disk, as far as can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    /// Nobody has said that he does.
    Unknown,
    /// A process of this number, and it is no more.
    Gone(u32),
    /// A process that lives, and goes by our name.
    Alive(Owner),
    /// There is a process of this number, of another name: not one of us.
    Other(u32),
}

impl Nodes {
    /// Where the nodes of a disk are, if nobody says otherwise.
    ///
    /// # Errors
    /// If the store fails.
    pub(crate) fn find(client: &mut Client, domain: Domain, device: u32, kind: &str) -> Result<Nodes, Error> {
        // A path that does not begin at the root is in our own directory. Domain 0 may have been told nothing of itself.
        let own = client.now().read("domid")?.and_then(|text| text.parse().ok()).map_or(Domain(0), Domain);
        let ours = client.domain_path(own)?;
        let theirs = client.domain_path(domain)?;
        Ok(Nodes {
            backend: format!("{ours}/backend/{kind}/{domain}/{device}"),
            frontend: format!("{theirs}/device/vbd/{device}"),
            own,
            domain,
            device,
        })
    }

    /// A node of the back end.
    pub(crate) fn back(&self, key: &str) -> String {
        format!("{}/{key}", self.backend)
    }

    /// A node of the front end.
    pub(crate) fn front(&self, key: &str) -> String {
        format!("{}/{key}", self.frontend)
    }

    /// Whether the back end's directory was made by us, or by a predecessor.
    ///
    /// # Errors
    /// If the store fails.
    pub(crate) fn are_ours(&self, view: &mut View<'_>) -> Result<bool, Error> {
        Ok(view.read(&self.back(CREATED))?.is_some())
    }

    /// Who serves it.
    ///
    /// # Errors
    /// If the store fails.
    pub(crate) fn server(&self, view: &mut View<'_>) -> Result<Server, Error> {
        let Some(pid) = view.read(&self.back(SERVER))?.and_then(|pid| number(&pid)) else {
            return Ok(Server::Unknown);
        };
        let owner = view.read(&self.back(OWNER))?.and_then(|text| Owner::parse(&text));
        let Some(living) = Owner::living(pid) else { return Ok(Server::Gone(pid)) };
        Ok(match owner.filter(|owner| owner.pid == pid) {
            Some(owner) if owner == living => Server::Alive(living),
            Some(_) => Server::Gone(pid),
            None if goes_by_our_name(pid) => Server::Alive(living),
            None => Server::Other(pid),
        })
    }

    /// Takes the disk for a process, unless another one serves it: that one is told then.
    ///
    /// # Errors
    /// If the store fails.
    pub(crate) fn claim(&self, view: &mut View<'_>, ours: Owner) -> Result<Option<Owner>, Error> {
        match self.server(view)? {
            Server::Alive(other) if other != ours => return Ok(Some(other)),
            Server::Alive(_) | Server::Gone(_) | Server::Other(_) | Server::Unknown => {}
        }
        view.write(&self.back(SERVER), &ours.pid.to_string())?;
        view.write(&self.back(OWNER), &ours.text())?;
        Ok(None)
    }

    /// Whether it was this process that took the disk last.
    ///
    /// # Errors
    /// If the store fails.
    pub(crate) fn is_claimed_by(&self, view: &mut View<'_>, ours: Owner) -> Result<bool, Error> {
        Ok(view.read(&self.back(OWNER))?.as_deref() == Some(&*ours.text()))
    }

    /// Leaves the disk to whoever comes next.
    ///
    /// # Errors
    /// If the store fails.
    pub(crate) fn release(&self, view: &mut View<'_>) -> Result<(), Error> {
        view.remove(&self.back(SERVER))?;
        view.remove(&self.back(OWNER))
    }

    /// Makes both directories and fills them, as a toolstack would. They belong to this process then; where another one
    /// was faster, that one is told, and all is left as it is.
    ///
    /// # Errors
    /// If the store fails.
    pub(crate) fn create(
        &self,
        client: &mut Client,
        settings: &Settings,
        read_only: bool,
        ours: Owner,
    ) -> Result<Option<Owner>, Error> {
        let permit = |domain, access| Permission { domain, access };
        // Who may use them first: what is made below inherits that, and the guest owns its own from the start.
        let other = client.transaction(|view| {
            if let Some(other) = self.claim(view, ours)? {
                return Ok(Some(other));
            }
            for (path, owner, reader) in
                [(&self.backend, self.own, self.domain), (&self.frontend, self.domain, self.own)]
            {
                view.remove(path)?;
                view.make(path)?;
                view.set_permissions(path, &[permit(owner, Access::None), permit(reader, Access::Read)])?;
            }
            // Who dies between this and what follows can be told from a toolstack.
            view.write(&self.back(CREATED), "1")?;
            self.claim(view, ours)
        })?;
        if other.is_some() {
            return Ok(other);
        }
        let (device, domain) = (self.device.to_string(), self.domain.to_string());
        let image = identity(settings);
        let back = [
            ("frontend", self.frontend.as_str()),
            ("frontend-id", &domain),
            ("online", "1"),
            ("removable", "0"),
            ("bootable", "1"),
            ("dev", &name(self.device)),
            ("type", &settings.kind),
            ("device-type", "disk"),
            ("mode", if read_only { "r" } else { "w" }),
            ("params", &format!("aio:{image}")),
        ];
        let front = [
            ("backend", self.backend.as_str()),
            ("backend-id", &self.own.to_string()),
            ("virtual-device", &device),
            ("device-type", "disk"),
        ];
        client.transaction(|view| {
            // Not if they have been removed meanwhile.
            if !self.is_claimed_by(view, ours)? {
                return Ok(());
            }
            for (key, value) in back {
                view.write(&self.back(key), value)?;
            }
            for (key, value) in front {
                view.write(&self.front(key), value)?;
            }
            view.write(&self.back("state"), State::Initialising.text())?;
            view.write(&self.front("state"), State::Initialising.text())
        })?;
        Ok(None)
    }

    /// Removes both directories, and the one of the guest's disks if this was the last.
    ///
    /// # Errors
    /// If the store fails.
    pub(crate) fn remove(&self, view: &mut View<'_>) -> Result<(), Error> {
        view.remove(&self.frontend)?;
        view.remove(&self.backend)?;
        let Some((disks, _)) = self.backend.rsplit_once('/') else { return Ok(()) };
        match view.list(disks)? {
            Some(others) if others.iter().all(String::is_empty) => view.remove(disks),
            Some(_) | None => Ok(()),
        }
    }
}

/// Whether a process has the name that this one has.
fn goes_by_our_name(pid: u32) -> bool {
    let name = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok();
    name(pid).is_some() && name(pid) == name(std::process::id())
}

/// What is served, in words that a successor can compare.
pub(crate) fn identity(settings: &Settings) -> String {
    settings.image.as_ref().map_or_else(|| settings.name.clone(), |path| path.display().to_string())
}

/// How a guest calls a device; its number where that has no name.
pub(crate) fn name(device: u32) -> String {
    Vdev::new(device).map_or_else(|_| device.to_string(), |device| device.to_string())
}
