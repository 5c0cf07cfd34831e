//! Guests of Xen: what `tapdisk serve --xen` finds before it opens an image and wires up after it, and `tapdisk detach`.

use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, bail};
use guest::Disk;
use guest::xen::{End, Platform, Server, Settings};
use runtime::Handle;
use xen::evtchn::EventDevice;
use xen::gntdev::GrantDevice;
use xen::store::{Client, Connect, Host};
use xen::{Domain, Vdev};

use crate::cli::xen::{Detach, Guest, GuestDisk, KIND, XenOptions};
use crate::cli::{Image, Serve};
use crate::state;

/// Rings of a guest's disk, if nobody says how many: Linux takes no more, and one thread serves them all.
const QUEUES: u16 = 4;

/// Whom to serve; nobody, where no guest of Xen was named.
pub(crate) struct Guests {
    /// Found if there is anybody.
    platform: Option<Platform>,
    disks: Vec<Found>,
}

/// A disk of a guest that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    /// As it was asked for.
    asked: GuestDisk,
    domain: Domain,
}

/// All that is known of those guests before they are served.
pub(crate) struct Prepared {
    platform: Option<Platform>,
    disks: Vec<(GuestDisk, Settings)>,
}

impl Guests {
    /// Finds what is needed of Xen, and the guests. Nothing is changed yet.
    pub(crate) fn find(options: &XenOptions) -> anyhow::Result<Guests> {
        if options.disks.is_empty() {
            return Ok(Guests { platform: None, disks: Vec::new() });
        }
        let grants = Rc::new(GrantDevice::open().context("no guest of Xen can be served")?);
        let events = Rc::new(EventDevice::open().context("no guest of Xen can be served")?);
        let disks = resolve(&Host, options)?;
        Ok(Guests { platform: Some(Platform { grants, events, store: Arc::new(Host) }), disks })
    }

    /// How many disks there are.
    pub(crate) fn count(&self) -> usize {
        self.disks.len()
    }

    /// To whom it is served, and how that is ended, in words.
    pub(crate) fn places(&self, options: &XenOptions) -> Vec<(String, String)> {
        places(&self.disks, options)
    }

    /// Decides how each is served, with so many bytes of memory for its data.
    pub(crate) fn prepare(self, arguments: &Serve, memory: usize) -> anyhow::Result<Prepared> {
        let mut disks = Vec::new();
        for Found { asked, domain } in self.disks {
            let settings = settings(arguments, domain, asked.device, memory)?;
            disks.push((asked, settings));
        }
        Ok(Prepared { platform: self.platform, disks })
    }
}

impl Prepared {
    /// Begins to serve them, until one cannot be served. `ended` is called once for each that has ended, with the reason
    /// if it is not as it should be.
    pub(crate) fn start(
        self,
        handle: &Handle,
        disk: &Rc<dyn Disk>,
        ended: impl Fn(Option<String>) + Clone + 'static,
    ) -> (Vec<Rc<Server>>, anyhow::Result<()>) {
        let mut servers = Vec::new();
        let Some(platform) = self.platform else { return (servers, Ok(())) };
        for (asked, settings) in self.disks {
            let server = match Server::start(handle, disk.clone(), platform.clone(), settings) {
                Ok(server) => Rc::new(server),
                Err(error) => {
                    let error = anyhow::Error::from(error);
                    return (servers, Err(error.context(format!("{asked} cannot be served"))));
                }
            };
            servers.push(server.clone());
            let ended = ended.clone();
            handle.spawn(async move {
                ended(match server.ended().await {
                    End::Detached | End::GuestGone => None,
                    End::Taken => {
                        Some(format!("{asked}: a sync has failed, and the disk was taken from the guest"))
                    }
                    End::Failed(why) => Some(format!("{asked}: {why}")),
                });
            });
        }
        (servers, Ok(()))
    }
}

fn settings(arguments: &Serve, domain: Domain, device: Vdev, memory: usize) -> anyhow::Result<Settings> {
    let options = &arguments.xen;
    let image = match &arguments.image {
        Image::Path(path) => Some(std::path::absolute(path)?),
        Image::Null(_) | Image::Ram(_) => None,
    };
    Ok(Settings {
        name: arguments.image.name(),
        domain,
        device: device.number(),
        kind: options.xen_kind.clone(),
        create_nodes: options.create_nodes,
        features: options.xen_features,
        queues: arguments.queues.unwrap_or(QUEUES),
        block: arguments.block_size,
        data: options.xen_data.path(),
        on_failed_sync: options.xen_on_failed_sync.then(),
        memory,
        journals: state::journals(arguments.state_dir.as_ref())?,
        image,
    })
}

/// The disks that are meant, and whose they are.
fn resolve(store: &dyn Connect, options: &XenOptions) -> anyhow::Result<Vec<Found>> {
    let mut client = Client::connect(store)?;
    let mut found: Vec<Found> = Vec::new();
    for disk in &options.disks {
        let domain = domain(&mut client, &disk.guest)?;
        let is_same = |other: &&Found| other.domain == domain && other.asked.device == disk.device;
        if let Some(other) = found.iter().find(is_same) {
            bail!("`{disk}` and `{}` are one disk: it can be served once", other.asked);
        }
        // A guest that is gone may have left something to be cleared away.
        let state = format!("backend/{}/{domain}/{}/state", options.xen_kind, disk.device.number());
        if !client.is_introduced(domain)? && client.now().read(&state)?.is_none() {
            bail!("there is no domain {domain}: `xl list` shows those there are");
        }
        found.push(Found { asked: disk.clone(), domain });
    }
    Ok(found)
}

/// The number of a domain, which the xenstore knows by name.
fn domain(client: &mut Client, guest: &Guest) -> anyhow::Result<Domain> {
    let wanted = match guest {
        Guest::Number(domain) => return Ok(*domain),
        Guest::Name(name) => name,
    };
    let domains = client.now().list("/local/domain")?.unwrap_or_default();
    let mut found = Vec::new();
    for number in domains.iter().filter_map(|name| name.parse().ok()) {
        if client.now().read(&format!("/local/domain/{number}/name"))?.as_ref() == Some(wanted) {
            found.push(Domain(number));
        }
    }
    match found[..] {
        [domain] => Ok(domain),
        [] => bail!("there is no domain that is called `{wanted}`: `xl list` shows those there are"),
        [first, second, ..] => {
            bail!("domains {first} and {second} are both called `{wanted}`: give the number of one")
        }
    }
}

fn places(disks: &[Found], options: &XenOptions) -> Vec<(String, String)> {
    let kind = &options.xen_kind;
    let place = |found: &Found| {
        let (domain, device) = (found.domain, found.asked.device);
        let called = match &found.asked.guest {
            Guest::Number(_) => String::new(),
            Guest::Name(name) => format!(" ({name})"),
        };
        let option = if kind == KIND { String::new() } else { format!(" --xen-kind {kind}") };
        (
            format!("domain {domain}{called} as {device} (Xen, {kind})"),
            format!("tapdisk detach {domain}:{device}{option}"),
        )
    };
    disks.iter().map(place).collect()
}

/// `tapdisk detach`.
pub(crate) fn detach(arguments: &Detach) -> anyhow::Result<()> {
    let disk = &arguments.disk;
    let domain = domain(&mut Client::connect(&Host)?, &disk.guest)?;
    guest::xen::detach(&Host, domain, disk.device.number(), &arguments.xen_kind, arguments.timeout)
        .with_context(|| format!("{disk} cannot be detached"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use xen::fake::store::Store;

    use super::*;

    fn options(words: &[&str]) -> XenOptions {
        crate::cli::tests::serve(&[&["disk"], words].concat()).unwrap().xen
    }

    fn found(store: &Store, asked: &[&str]) -> Result<Vec<u16>, String> {
        let words: Vec<&str> = asked.iter().flat_map(|text| ["--xen", *text]).collect();
        let options = options(&words);
        let found = resolve(store, &options).map_err(|error| format!("{error:#}"))?;
        assert!(found.iter().map(|found| &found.asked).eq(&options.disks));
        Ok(found.iter().map(|found| found.domain.0).collect())
    }

    fn store() -> Store {
        let store = Store::new();
        [3, 7, 12, 13].into_iter().for_each(|domain| store.introduce(Domain(domain)));
        store.write("/local/domain/0/name", "Domain-0");
        store.write("/local/domain/3/name", "web");
        store.write("/local/domain/12/name", "twin");
        store.write("/local/domain/13/name", "twin");
        store.write("/local/domain/14/memory/target", "1");
        store.write("/local/domain/99999/name", "web");
        store
    }

    #[test]
    fn a_guest_that_is_gone_is_refused_unless_it_has_left_a_disk_of_ours() {
        let store = store();
        let error = found(&store, &["8:xvdb"]).unwrap_err();
        assert!(error.contains("there is no domain 8"), "{error}");
        store.write("/local/domain/0/backend/vbd3/8/51728/state", "4");
        assert_eq!(found(&store, &["8:xvdb"]), Ok(vec![8]));
        assert!(found(&store, &["8:xvda"]).is_err(), "that is another");
    }

    #[test]
    fn a_guest_is_found_by_its_name() {
        assert_eq!(found(&store(), &["web:xvdb", "7:xvda", "Domain-0:xvda"]), Ok(vec![3, 7, 0]));
    }

    #[test]
    fn a_name_that_is_nobodys_or_two_guests_is_refused() {
        let error = found(&store(), &["web:xvda", "we:xvdb"]).unwrap_err();
        assert!(error.contains("no domain that is called `we`"), "{error}");
        let error = found(&store(), &["twin:xvda"]).unwrap_err();
        assert!(error.contains("domains 12 and 13 are both called `twin`"), "{error}");
        let error = found(&Store::new(), &["web:xvda"]).unwrap_err();
        assert!(error.contains("no domain that is called `web`"), "{error}");
    }

    #[test]
    fn one_disk_is_served_once_whatever_it_is_called() {
        assert_eq!(found(&store(), &["web:xvda", "web:xvdb", "7:xvda"]), Ok(vec![3, 3, 7]));
        let error = found(&store(), &["web:xvdb", "7:xvda", "3:51728"]).unwrap_err();
        assert!(error.contains("`3:xvdb` and `web:xvdb` are one disk"), "{error}");
    }

    #[test]
    fn what_is_served_is_said_with_how_it_ends() {
        let places = |words: &[&str], domain: u16| {
            let options = options(words);
            let asked = options.disks[0].clone();
            super::places(&[Found { asked, domain: Domain(domain) }], &options)
        };
        assert_eq!(
            places(&["--xen", "3:51728"], 3),
            [("domain 3 as xvdb (Xen, vbd3)".into(), "tapdisk detach 3:xvdb".into())]
        );
        assert_eq!(
            places(&["--xen", "web:0x100", "--xen-kind", "mine"], 3),
            [("domain 3 (web) as 256 (Xen, mine)".into(), "tapdisk detach 3:256 --xen-kind mine".into())]
        );
    }
}
