//! The options of Xen, and what they mean.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use guest::xen::{DataPath, Features, OnFailedSync};
use xen::{Domain, Vdev};

#[derive(Args, Debug)]
#[command(next_help_heading = "Xen")]
pub(crate) struct XenOptions {
    /// A guest of Xen to which it is a paravirtual disk, and what the guest calls it: `3:xvdb`, `web:51728`. May be given
    /// several times
    ///
    /// DOMAIN is a number or a name, VDEV a name of a disk (xvdb, xvdb1, sda, hda, d1p0) or its number. With it there is
    /// no NBD unless `--nbd` is given too, and tapdisk ends once its last guest is gone or its last disk detached. When
    /// tapdisk dies or is stopped, the guest waits until it is started again with the same words, and then goes on:
    /// requests that were under way are done once more.
    #[arg(long = "xen", value_name = "DOMAIN:VDEV", value_parser = GuestDisk::from_str)]
    pub(crate) disks: Vec<GuestDisk>,

    /// Write the nodes of both ends into the xenstore, and remove them when the disk is detached. Without it they are a
    /// toolstack's, and tapdisk waits until they are there
    #[arg(long, requires = "disks")]
    pub(crate) create_nodes: bool,

    /// The kind of back end: a part of the path of its nodes (`backend/KIND/…`). The kernel serves `vbd` itself, QEMU
    /// `qdisk`
    #[arg(long, value_name = "KIND", default_value = KIND, value_parser = kind, requires = "disks")]
    pub(crate) xen_kind: String,

    /// What guests are offered: a list of flush-cache, barrier, discard, persistent, indirect, multi-page and
    /// multi-queue; `all` or `none` of them; `no-NAME` takes one away, from all where the list begins with it
    ///
    /// Where neither flush-cache nor barrier is offered, each write is durable before it is answered. What a guest was
    /// offered stays so as long as it has the disk, whatever a tapdisk that takes over is told.
    #[arg(long, value_name = "LIST", default_value = "all", value_parser = features, requires = "disks")]
    pub(crate) xen_features: Features,

    /// How data gets from and to a guest's memory
    #[arg(long, value_name = "HOW", value_enum, default_value_t = Data::Auto, requires = "disks", hide_short_help = true)]
    pub(crate) xen_data: Data,

    /// What becomes of a guest's disk when a sync of the image has failed
    #[arg(long, value_name = "HOW", value_enum, default_value_t = FailedSync::Fail, requires = "disks")]
    pub(crate) xen_on_failed_sync: FailedSync,
}

/// Take a disk away from a guest of Xen
///
/// The guest is asked to let go of it, and the tapdisk that serves it to answer what it has taken and to end. Unmount
/// it there first: Linux from 5.15 on loses a mounted disk at once, with what was not written yet. Older ones keep it
/// until it is unmounted, and until then this waits.
#[derive(Args, Debug)]
pub(crate) struct Detach {
    /// Whose disk, and what the guest calls it: `3:xvdb`, `web:51728`
    #[arg(value_name = "DOMAIN:VDEV", value_parser = GuestDisk::from_str)]
    pub(crate) disk: GuestDisk,

    /// The kind of back end, as `tapdisk serve` was told
    #[arg(long, value_name = "KIND", default_value = KIND, value_parser = kind)]
    pub(crate) xen_kind: String,

    /// How long to wait for the guest to let go
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub(crate) timeout: Duration,
}

/// The kind of back end that no kernel claims, and under which xl and xentop know tapdisk.
pub(crate) const KIND: &str = "vbd3";

/// One disk of one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestDisk {
    pub(crate) guest: Guest,
    pub(crate) device: Vdev,
}

/// Which guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Guest {
    Number(Domain),
    Name(String),
}

impl fmt::Display for Guest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Guest::Number(domain) => domain.fmt(formatter),
            Guest::Name(name) => formatter.write_str(name),
        }
    }
}

impl fmt::Display for GuestDisk {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.guest, self.device)
    }
}

/// Numbers of domains end before this one (DOMID_FIRST_RESERVED of xen/include/public/xen.h).
const DOMAINS: u16 = 0x7FF0;

impl FromStr for GuestDisk {
    type Err = String;

    fn from_str(text: &str) -> Result<GuestDisk, String> {
        // A domain's name may hold a colon, a device's cannot.
        let (guest, device) = text.rsplit_once(':').ok_or_else(|| {
            format!("`{text}` is not DOMAIN:VDEV, a domain's number or name and a disk of it, as 3:xvdb")
        })?;
        Ok(GuestDisk { guest: guest.parse()?, device: device.parse().map_err(|error| format!("{error}"))? })
    }
}

impl FromStr for Guest {
    type Err = String;

    fn from_str(text: &str) -> Result<Guest, String> {
        if text.is_empty() {
            return Err("expected the number or the name of a domain before the colon".into());
        }
        if !text.bytes().all(|digit| digit.is_ascii_digit()) {
            return Ok(Guest::Name(text.into()));
        }
        match text.parse() {
            Ok(number) if number < DOMAINS => Ok(Guest::Number(Domain(number))),
            Ok(_) | Err(_) => Err(format!("`{text}` is no domain's number: they end at {}", DOMAINS - 1)),
        }
    }
}

/// A node's name in the xenstore, and a part of paths.
fn kind(text: &str) -> Result<String, String> {
    let known = |letter: char| letter.is_ascii_alphanumeric() || letter == '-' || letter == '_';
    if text.is_empty() || text.len() > 32 || !text.chars().all(known) {
        return Err(format!("`{text}` is no kind of back end: up to 32 letters, digits, `-` and `_`"));
    }
    Ok(text.into())
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds @ 1..=86_400) => Ok(Duration::from_secs(seconds)),
        Ok(_) | Err(_) => Err(format!("`{text}` is no number of seconds from 1 to 86400 (a day)")),
    }
}

fn features(text: &str) -> Result<Features, String> {
    let mut features = if text.starts_with("no-") { Features::default() } else { NONE };
    for word in text.split(',') {
        let (name, offered) = word.strip_prefix("no-").map_or((word, true), |name| (name, false));
        let feature = match name {
            "all" if offered => {
                features = Features::default();
                continue;
            }
            "none" if text == "none" => continue,
            "flush-cache" => &mut features.flush_cache,
            "barrier" => &mut features.barrier,
            "discard" => &mut features.discard,
            "persistent" => &mut features.persistent,
            "indirect" => &mut features.indirect,
            "multi-page" => &mut features.multi_page,
            "multi-queue" => &mut features.multi_queue,
            _ => {
                return Err(format!(
                    "`{word}` is none of flush-cache, barrier, discard, persistent, indirect, multi-page, multi-queue \
                     (each also with `no-`), all and, alone, none"
                ));
            }
        };
        *feature = offered;
    }
    Ok(features)
}

const NONE: Features = Features {
    flush_cache: false,
    barrier: false,
    discard: false,
    persistent: false,
    indirect: false,
    multi_page: false,
    multi_queue: false,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Data {
    /// As it is faster here
    Auto,
    /// The hypervisor copies it
    Copy,
    /// The guest's pages are mapped, and the kernel reads and writes them. Should tapdisk be killed meanwhile, kernels such
    /// as 6.1 may fail later requests
    Map,
}

impl Data {
    pub(crate) fn path(self) -> DataPath {
        match self {
            Data::Auto => DataPath::Auto,
            Data::Copy => DataPath::Copy,
            Data::Map => DataPath::Map,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FailedSync {
    /// Flushes and writes fail from then on
    Fail,
    /// The disk is taken away from the guest at once, so that all of its I/O fails
    Disconnect,
}

impl FailedSync {
    pub(crate) fn then(self) -> OnFailedSync {
        match self {
            FailedSync::Fail => OnFailedSync::FailWrites,
            FailedSync::Disconnect => OnFailedSync::Disconnect,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::serve;
    use super::*;

    fn options(words: &[&str]) -> Result<XenOptions, String> {
        serve(&[&["disk"], words].concat()).map(|serve| serve.xen)
    }

    #[test]
    fn a_guest_is_a_number_or_a_name() {
        let found = options(&["--xen", "3:xvdb", "--xen", "web:1:51712", "--xen", "0:sda1"]).unwrap().disks;
        let expected = [
            (Guest::Number(Domain(3)), 51728, "3:xvdb"),
            (Guest::Name("web:1".into()), 51712, "web:1:xvda"),
            (Guest::Number(Domain(0)), 2049, "0:sda1"),
        ];
        for (disk, (guest, device, text)) in found.iter().zip(expected) {
            assert_eq!((&disk.guest, disk.device.number()), (&guest, device));
            assert_eq!(disk.to_string(), text);
        }
    }

    #[test]
    fn a_list_of_features_is_what_is_offered() {
        let all = Features::default();
        let flush_and_pages = Features { flush_cache: true, multi_page: true, ..NONE };
        for (list, expected) in [
            ("all", all),
            ("none", NONE),
            ("flush-cache,multi-page", flush_and_pages),
            ("multi-page,flush-cache,flush-cache", flush_and_pages),
            ("no-flush-cache", Features { flush_cache: false, ..all }),
            ("all,no-barrier,no-discard", Features { barrier: false, discard: false, ..all }),
            ("no-persistent,no-indirect", Features { persistent: false, indirect: false, ..all }),
            ("no-multi-page,no-multi-queue", Features { multi_page: false, multi_queue: false, ..all }),
            ("barrier,no-barrier,discard", Features { discard: true, ..NONE }),
        ] {
            assert_eq!(features(list), Ok(expected), "{list}");
        }
        for list in
            ["", "flush-cache,", "flush", "none,barrier", "no-all", "no-none", "no-", "flush-cache barrier"]
        {
            assert!(features(list).unwrap_err().contains("is none of flush-cache, barrier"), "{list}");
        }
        assert_eq!(options(&["--xen", "1:xvda"]).unwrap().xen_features, all);
    }

    #[test]
    fn words_become_what_they_mean() {
        let defaults = options(&["--xen", "1:xvda"]).unwrap();
        assert_eq!((defaults.xen_kind.as_str(), defaults.create_nodes), ("vbd3", false));
        assert_eq!(defaults.xen_data.path(), DataPath::Auto);
        assert_eq!(defaults.xen_on_failed_sync.then(), OnFailedSync::FailWrites);
        let words =
            "--xen 1:xvda --xen-kind my_kind-2 --create-nodes --xen-data map --xen-on-failed-sync disconnect";
        let given = options(&words.split(' ').collect::<Vec<_>>()).unwrap();
        assert_eq!((given.xen_kind.as_str(), given.create_nodes), ("my_kind-2", true));
        assert_eq!(given.xen_data.path(), DataPath::Map);
        assert_eq!(given.xen_on_failed_sync.then(), OnFailedSync::Disconnect);
    }

    #[test]
    fn what_is_wrong_is_said_with_what_was_expected() {
        for (words, named) in [
            ("--xen xvdb", "is not DOMAIN:VDEV"),
            ("--xen :xvdb", "the number or the name of a domain"),
            ("--xen 3:", "is no virtual device"),
            ("--xen 3:xvd", "is no virtual device"),
            ("--xen 3:sdq", "beyond the last disk"),
            ("--xen 32752:xvda", "they end at 32751"),
            ("--xen 99999:xvda", "is no domain's number"),
            ("--xen 1:xvda --xen-kind a/b", "is no kind of back end"),
            ("--xen 1:xvda --xen-kind ..", "is no kind of back end"),
            ("--xen 1:xvda --xen-kind=", "is no kind of back end"),
            ("--xen 1:xvda --xen-features flush", "is none of flush-cache"),
            ("--xen 1:xvda --xen-data fast", "[possible values: auto, copy, map]"),
            ("--xen 1:xvda --xen-on-failed-sync hope", "[possible values: fail, disconnect]"),
            // Without a guest of Xen they would do nothing.
            ("--create-nodes", "--xen <DOMAIN:VDEV>"),
            ("--xen-kind vbd3", "--xen <DOMAIN:VDEV>"),
            ("--xen-features all", "--xen <DOMAIN:VDEV>"),
            ("--xen-data auto", "--xen <DOMAIN:VDEV>"),
            ("--xen-on-failed-sync fail", "--xen <DOMAIN:VDEV>"),
        ] {
            let error = options(&words.split(' ').collect::<Vec<_>>()).unwrap_err();
            assert!(error.contains(named), "{words}: {error}");
        }
    }

    #[test]
    fn detaching_names_a_disk() {
        use clap::Parser;

        use super::super::{Cli, Command};
        let detach = |words: &str| {
            let words = words.split(' ').filter(|word| !word.is_empty());
            let parsed = Cli::try_parse_from(["tapdisk", "detach"].into_iter().chain(words));
            match parsed.map_err(|error| error.to_string())?.command {
                Command::Detach(detach) => Ok(detach),
                other @ (Command::Serve(_) | Command::Completions { .. } | Command::Man { .. }) => {
                    Err(format!("{other:?}"))
                }
            }
        };
        let given = detach("web:xvdb --xen-kind qdisk --timeout 5").unwrap();
        assert_eq!((given.disk.to_string().as_str(), given.xen_kind.as_str()), ("web:xvdb", "qdisk"));
        assert_eq!(given.timeout, Duration::from_secs(5));
        let given = detach("3:xvdb").unwrap();
        assert_eq!((given.xen_kind.as_str(), given.timeout), ("vbd3", Duration::from_secs(30)));
        for (words, named) in [
            ("", "<DOMAIN:VDEV>"),
            ("3", "is not DOMAIN:VDEV"),
            ("3:xvdb --timeout 0", "no number of seconds"),
            ("3:xvdb --timeout 86401", "no number of seconds"),
        ] {
            let error = detach(words).unwrap_err();
            assert!(error.contains(named), "{words}: {error}");
        }
    }
}
