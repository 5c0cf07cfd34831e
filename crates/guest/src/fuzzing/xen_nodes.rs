//! Any values of the nodes that a front end of Xen writes about its rings.
//!
//! The first three bytes are what it was told that it may ask for; then there is a line for each node, as in
//! `ring-ref=8`.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use crate::xen::{Abi, RingSpec, Terms, negotiate};

/// Judges these nodes. What is agreed on is what was written and was allowed, all that is allowed is agreed on, and what is
/// told of the rest is short.
pub fn xen_nodes(bytes: &[u8]) {
    let Some((&[queues, order, persistent], text)) = bytes.split_first_chunk() else { return };
    let terms = Terms {
        queues: u16::from(queues).max(1),
        order: u16::from(order % 5),
        persistent: persistent % 2 == 1,
    };
    let text = String::from_utf8_lossy(text);
    let nodes: BTreeMap<&str, &str> = text.split('\n').filter_map(|line| line.split_once('=')).collect();
    let read = RefCell::new(BTreeSet::new());
    let Ok(judged) = negotiate(&terms, |key| {
        assert!(read.borrow_mut().insert(key.to_owned()), "{key} is read twice");
        Ok::<_, Infallible>(nodes.get(key).map(|value| (*value).to_owned()))
    });
    // Four nodes for all rings, and for each an event channel and at most 16 pages or two names for one.
    let reads = read.borrow().len();
    assert!(reads <= 4 + usize::from(terms.queues) * 18, "{reads} nodes are read");
    let node = |key: &str| nodes.get(key).copied();
    match (judged, expected(&terms, &nodes)) {
        (Ok(agreed), Some(rings)) => {
            assert_eq!(agreed.rings, rings);
            assert_eq!(agreed.persistent, terms.persistent && node("feature-persistent") == Some("1"));
            let abi = match node("protocol") {
                Some("x86_64-abi" | "arm-abi") => Abi::X86_64,
                Some("x86_32-abi") => Abi::X86_32,
                _ => Abi::Native,
            };
            assert_eq!(agreed.abi, abi);
        }
        (Err(wrong), None) => {
            let told = wrong.to_string();
            assert!(told.len() < 600 && !told.contains('\n'), "{told}");
        }
        (judged, expected) => panic!("{judged:?} instead of {expected:?}"),
    }
}

/// What there is to be agreed on, by blkif.h: written down once more, and in another way.
fn expected(terms: &Terms, nodes: &BTreeMap<&str, &str>) -> Option<Vec<RingSpec>> {
    let node = |key: &str| nodes.get(key).copied();
    if !matches!(node("protocol"), None | Some("x86_64-abi" | "x86_32-abi" | "arm-abi")) {
        return None;
    }
    let queues = node("multi-queue-num-queues").map_or(Some(1), digits)?;
    let order = node("ring-page-order").map_or(Some(0), digits)?;
    if queues == 0 || queues > u64::from(terms.queues) || order > u64::from(terms.order) {
        return None;
    }
    let mut seen = BTreeSet::new();
    let mut rings = Vec::new();
    for queue in 0..queues {
        let within = |key: &str| match queues {
            1 => node(key),
            _ => node(&format!("queue-{queue}/{key}")),
        };
        let mut refs = Vec::new();
        for page in 0..1 << order {
            let numbered = within(&format!("ring-ref{page}"));
            let text = if order == 0 { within("ring-ref").or(numbered) } else { numbered };
            let gref = u32::try_from(digits(text?)?).ok()?;
            refs.push(seen.insert(gref).then_some(::xen::grants::GrantRef(gref))?);
        }
        let port = u32::try_from(digits(within("event-channel")?)?).ok().filter(|port| *port > 0)?;
        rings.push(RingSpec { refs, port: ::xen::events::Port(port) });
    }
    Some(rings)
}

/// A number of digits and nothing else.
fn digits(text: &str) -> Option<u64> {
    let mut number = None;
    for letter in text.chars() {
        let digit = u64::from(letter.to_digit(10)?);
        number = Some(number.unwrap_or(0_u64).checked_mul(10)?.checked_add(digit)?);
    }
    number.filter(|number| *number <= u64::from(u32::MAX))
}
