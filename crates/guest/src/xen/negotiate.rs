//! What a front end wrote about its rings, judged: from texts to a connection, or to what is wrong with them.
//!
//! A missing `protocol` means the back end's own layout, since that is the default that blkif.h names
//! (XEN_IO_PROTO_ABI_NATIVE). Some back ends take it for 32-bit x86 instead, as guests of before 2007 wrote none; today
//! each front end writes it, and toolstacks do so too.

use std::collections::HashSet;

use ::xen::events::Port;
use ::xen::grants::GrantRef;

use super::device::RingSpec;
use super::layout::{Abi, RING_PAGES_MAX};

/// The largest `ring-page-order`: 16 pages.
pub(crate) const ORDER_MAX: u16 = RING_PAGES_MAX.ilog2() as u16;

/// What the front end was told that it may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    /// `multi-queue-max-queues`, from 1 on.
    pub(crate) queues: u16,
    /// `max-ring-page-order`, up to [`ORDER_MAX`].
    pub(crate) order: u16,
    /// `feature-persistent`.
    pub(crate) persistent: bool,
}

/// What it asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Agreed {
    pub(crate) abi: Abi,
    pub(crate) rings: Vec<RingSpec>,
    /// Both sides keep to persistent grants.
    pub(crate) persistent: bool,
}

/// What is wrong with it: what was found, and what is expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Wrong {
    #[error("the front end has not written {0}")]
    Missing(String),
    #[error("{key} is {found}: {expected} is expected")]
    Value { key: String, found: Quoted, expected: String },
    #[error("{key} is {gref}, which another page of its rings is, too")]
    Twice { key: String, gref: u32 },
}

/// Judges what `read` finds below the front end's directory. Each node is read once at most, so that it does not matter
/// when the guest changes it.
///
/// # Errors
/// What is wrong with it; or, first of all, that something cannot be read.
pub(crate) fn negotiate<E>(
    terms: &Terms,
    read: impl FnMut(&str) -> Result<Option<String>, E>,
) -> Result<Result<Agreed, Wrong>, E> {
    let mut front = Front { read };
    match front.agree(terms) {
        Ok(agreed) => Ok(Ok(agreed)),
        Err(Stop::Wrong(wrong)) => Ok(Err(wrong)),
        Err(Stop::Unread(error)) => Err(error),
    }
}

enum Stop<E> {
    Wrong(Wrong),
    Unread(E),
}

struct Front<R> {
    read: R,
}

impl<E, R: FnMut(&str) -> Result<Option<String>, E>> Front<R> {
    fn agree(&mut self, terms: &Terms) -> Result<Agreed, Stop<E>> {
        let protocol = self.text("protocol")?;
        let abi = Abi::parse(protocol.as_deref()).ok_or_else(|| {
            let expected = "x86_64-abi, x86_32-abi or arm-abi";
            wrong("protocol", protocol.as_deref().unwrap_or_default(), expected)
        })?;
        // Anything but 1 is a no: to do without is always right.
        let persistent = terms.persistent && self.text("feature-persistent")?.as_deref() == Some("1");
        let queues = match self.text("multi-queue-num-queues")? {
            None => 1,
            Some(text) => within("multi-queue-num-queues", &text, 1, terms.queues)?,
        };
        let order = match self.text("ring-page-order")? {
            None => 0,
            Some(text) => within("ring-page-order", &text, 0, terms.order.min(ORDER_MAX))?,
        };
        let mut seen = HashSet::new();
        let mut rings = Vec::new();
        for queue in 0..queues {
            // One queue has its nodes where they were before there were several.
            let prefix = if queues == 1 { String::new() } else { format!("queue-{queue}/") };
            rings.push(self.ring(&prefix, order, &mut seen)?);
        }
        Ok(Agreed { abi, rings, persistent })
    }

    fn ring(&mut self, prefix: &str, order: u16, seen: &mut HashSet<u32>) -> Result<RingSpec, Stop<E>> {
        let mut refs = Vec::new();
        for page in 0..1_u32 << order {
            let numbered = format!("{prefix}ring-ref{page}");
            let plain = format!("{prefix}ring-ref");
            // A single page has no number. Some front ends give it one all the same.
            let (key, text) = match order {
                0 => match self.text(&plain)? {
                    Some(text) => (plain, Some(text)),
                    None => (plain, self.text(&numbered)?),
                },
                _ => {
                    let text = self.text(&numbered)?;
                    (numbered, text)
                }
            };
            let text = text.ok_or_else(|| Stop::Wrong(Wrong::Missing(key.clone())))?;
            let gref = number(&text).ok_or_else(|| wrong(&key, &text, "the number of a grant"))?;
            if !seen.insert(gref) {
                return Err(Stop::Wrong(Wrong::Twice { key, gref }));
            }
            refs.push(GrantRef(gref));
        }
        let key = format!("{prefix}event-channel");
        let text = self.text(&key)?.ok_or_else(|| Stop::Wrong(Wrong::Missing(key.clone())))?;
        let port = number(&text).filter(|port| *port != 0);
        let port = port.ok_or_else(|| wrong(&key, &text, "the number of an event channel"))?;
        Ok(RingSpec { refs, port: Port(port) })
    }

    fn text(&mut self, key: &str) -> Result<Option<String>, Stop<E>> {
        (self.read)(key).map_err(Stop::Unread)
    }
}

/// A number as the store has them: digits and nothing else. Whatever a guest writes, it is this number or none.
pub(crate) fn number(text: &str) -> Option<u32> {
    let is_plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if is_plain { text.parse().ok() } else { None }
}

fn within<E>(key: &str, text: &str, least: u16, most: u16) -> Result<u16, Stop<E>> {
    let found = number(text).and_then(|number| u16::try_from(number).ok());
    found
        .filter(|number| (least..=most).contains(number))
        .ok_or_else(|| wrong(key, text, &format!("a number from {least} to {most}")))
}

fn wrong<E>(key: &str, found: &str, expected: &str) -> Stop<E> {
    Stop::Wrong(Wrong::Value { key: key.into(), found: Quoted::new(found), expected: expected.into() })
}

/// A guest's text as it can be told: short, and in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Quoted(String);

impl Quoted {
    /// So many characters of it are told.
    const LEN_MAX: usize = 40;

    pub(crate) fn new(text: &str) -> Quoted {
        let start: String = text.chars().take(Quoted::LEN_MAX).collect();
        let is_cut = start.len() < text.len();
        Quoted(format!("{start:?}{}", if is_cut { "…" } else { "" }))
    }
}

impl std::fmt::Display for Quoted {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    use super::*;

    const TERMS: Terms = Terms { queues: 4, order: 4, persistent: true };

    fn judge(terms: &Terms, nodes: &[(&str, &str)]) -> Result<Agreed, Wrong> {
        let nodes: BTreeMap<&str, &str> = nodes.iter().copied().collect();
        let Ok(judged) =
            negotiate(terms, |key| Ok::<_, Infallible>(nodes.get(key).map(|value| (*value).to_owned())));
        judged
    }

    fn ring(refs: &[u32], port: u32) -> RingSpec {
        RingSpec { refs: refs.iter().copied().map(GrantRef).collect(), port: Port(port) }
    }

    /// What Linux 6.1 wrote, as traced in a lab with one page, no order and one queue.
    const PLAIN: [(&str, &str); 4] =
        [("ring-ref", "8"), ("event-channel", "15"), ("protocol", "x86_64-abi"), ("feature-persistent", "1")];

    fn changed(key: &'static str, value: &'static str) -> Vec<(&'static str, &'static str)> {
        let mut nodes: Vec<_> = PLAIN.into_iter().filter(|(known, _)| *known != key).collect();
        nodes.push((key, value));
        nodes
    }

    #[test]
    fn what_linux_writes_is_understood() {
        let agreed = judge(&TERMS, &PLAIN).unwrap();
        assert_eq!(agreed, Agreed { abi: Abi::X86_64, rings: vec![ring(&[8], 15)], persistent: true });
        let flat_with_order = judge(&TERMS, &changed("ring-page-order", "0")).unwrap();
        assert_eq!(flat_with_order.rings, [ring(&[8], 15)]);
        let agreed = judge(
            &TERMS,
            &[
                ("protocol", "x86_32-abi"),
                ("ring-page-order", "2"),
                ("ring-ref0", "8"),
                ("ring-ref1", "9"),
                ("ring-ref2", "4294967295"),
                ("ring-ref3", "11"),
                ("event-channel", "7"),
            ],
        );
        let rings = vec![ring(&[8, 9, u32::MAX, 11], 7)];
        assert_eq!(agreed, Ok(Agreed { abi: Abi::X86_32, rings, persistent: false }));
    }

    #[test]
    fn several_queues_have_directories_of_their_own() {
        let nodes = [
            ("multi-queue-num-queues", "2"),
            ("ring-page-order", "1"),
            ("queue-0/ring-ref0", "1"),
            ("queue-0/ring-ref1", "2"),
            ("queue-0/event-channel", "3"),
            ("queue-1/ring-ref0", "4"),
            ("queue-1/ring-ref1", "5"),
            ("queue-1/event-channel", "6"),
        ];
        assert_eq!(judge(&TERMS, &nodes).unwrap().rings, [ring(&[1, 2], 3), ring(&[4, 5], 6)]);
        assert_eq!(judge(&TERMS, &nodes[..7]), Err(Wrong::Missing("queue-1/event-channel".into())));
        let single = judge(&Terms { queues: 1, ..TERMS }, &nodes).unwrap_err();
        assert_eq!(single.to_string(), r#"multi-queue-num-queues is "2": a number from 1 to 1 is expected"#);
    }

    #[test]
    fn without_a_protocol_it_is_the_default_of_the_specification() {
        assert_eq!(judge(&TERMS, &PLAIN[..2]).unwrap().abi, Abi::Native);
    }

    #[test]
    fn grants_are_kept_only_where_both_sides_say_so() {
        let alone = Terms { persistent: false, ..TERMS };
        assert!(!judge(&alone, &PLAIN).unwrap().persistent);
        for no in ["0", "", "2", "yes", "01"] {
            assert!(!judge(&TERMS, &changed("feature-persistent", no)).unwrap().persistent, "{no:?}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_what_was_expected() {
        for (key, value, expected) in [
            ("protocol", "x86_128-abi", "x86_64-abi, x86_32-abi or arm-abi"),
            ("ring-ref", "", "the number of a grant"),
            ("ring-ref", "-1", "the number of a grant"),
            ("ring-ref", "+8", "the number of a grant"),
            ("ring-ref", " 8", "the number of a grant"),
            ("ring-ref", "8\n", "the number of a grant"),
            ("ring-ref", "0x8", "the number of a grant"),
            ("ring-ref", "4294967296", "the number of a grant"),
            ("event-channel", "0", "the number of an event channel"),
            ("event-channel", "99999999999999999999", "the number of an event channel"),
            ("ring-page-order", "5", "a number from 0 to 4"),
            ("ring-page-order", "65536", "a number from 0 to 4"),
            ("ring-page-order", "x", "a number from 0 to 4"),
            ("multi-queue-num-queues", "0", "a number from 1 to 4"),
            ("multi-queue-num-queues", "5", "a number from 1 to 4"),
            ("multi-queue-num-queues", "4294967297", "a number from 1 to 4"),
        ] {
            let error = judge(&TERMS, &changed(key, value)).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(expected), "{key} {value:?}: {error}");
        }
        for missing in ["ring-ref", "event-channel"] {
            let nodes: Vec<_> = PLAIN.into_iter().filter(|(key, _)| *key != missing).collect();
            assert_eq!(judge(&TERMS, &nodes), Err(Wrong::Missing(missing.into())));
        }
    }

    #[test]
    fn a_page_is_in_one_ring_once() {
        let nodes =
            [("ring-page-order", "1"), ("ring-ref0", "8"), ("ring-ref1", "8"), ("event-channel", "1")];
        assert_eq!(judge(&TERMS, &nodes), Err(Wrong::Twice { key: "ring-ref1".into(), gref: 8 }));
    }

    #[test]
    fn no_node_is_read_twice_and_few_are_read_at_all() {
        let mut asked: Vec<String> = Vec::new();
        let Ok(judged) = negotiate(&Terms { queues: 4, order: 4, persistent: true }, |key| {
            asked.push(key.to_owned());
            Ok::<_, Infallible>(match key {
                "multi-queue-num-queues" | "ring-page-order" => Some("4".into()),
                "protocol" | "feature-persistent" => None,
                _ => Some(asked.len().to_string()),
            })
        });
        assert_eq!(judged.unwrap().rings.len(), 4);
        let unique: HashSet<&String> = asked.iter().collect();
        assert_eq!((unique.len(), asked.len()), (4 + 4 * 17, 4 + 4 * 17));
    }

    #[test]
    fn what_a_guest_wrote_is_told_in_one_short_line() {
        let told = Quoted::new(&"a\nb\u{1b}[31m".repeat(1000)).to_string();
        assert!(told.chars().count() < 400 && !told.contains(['\n', '\u{1b}']), "{told}");
        assert!(told.ends_with('…'), "{told}");
    }
}
