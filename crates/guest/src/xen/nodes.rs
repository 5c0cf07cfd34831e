//! The nodes of a disk in the xenstore: where they are, and how both ends' directories are made and removed.

use ::xen::store::{Access, Client, Error, Permission, View};
use ::xen::{Domain, Vdev};

use super::Settings;

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

    /// Makes both directories and fills them, as a toolstack would.
    ///
    /// # Errors
    /// If the store fails.
    pub(crate) fn create(
        &self,
        client: &mut Client,
        settings: &Settings,
        read_only: bool,
    ) -> Result<(), Error> {
        let permit = |domain, access| Permission { domain, access };
        // Who may use them first: what is made below inherits that, and the guest owns its own from the start.
        client.transaction(|view| {
            for (path, owner, reader) in
                [(&self.backend, self.own, self.domain), (&self.frontend, self.domain, self.own)]
            {
                view.remove(path)?;
                view.make(path)?;
                view.set_permissions(path, &[permit(owner, Access::None), permit(reader, Access::Read)])?;
            }
            // Who dies between this and what follows can be told from a toolstack.
            view.write(&self.back(CREATED), "1")
        })?;
        let (device, domain) = (self.device.to_string(), self.domain.to_string());
        let image = identity(settings);
        let back = [
            (CREATED, "1"),
            ("frontend", &self.frontend),
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
            for (key, value) in back {
                view.write(&self.back(key), value)?;
            }
            for (key, value) in front {
                view.write(&self.front(key), value)?;
            }
            view.write(&self.back("state"), State::Initialising.text())?;
            view.write(&self.front("state"), State::Initialising.text())
        })
    }

    /// Removes both directories.
    ///
    /// # Errors
    /// If the store fails.
    pub(crate) fn remove(&self, client: &mut Client) -> Result<(), Error> {
        client.transaction(|view| {
            view.remove(&self.frontend)?;
            view.remove(&self.backend)
        })
    }
}

/// What is served, in words that a successor can compare.
pub(crate) fn identity(settings: &Settings) -> String {
    settings.image.as_ref().map_or_else(|| settings.name.clone(), |path| path.display().to_string())
}

/// How a guest calls a device; its number where that has no name.
pub(crate) fn name(device: u32) -> String {
    Vdev::new(device).map_or_else(|_| device.to_string(), |device| device.to_string())
}
