//! Any bytes as a handshake.

use std::rc::Rc;

use block::Limits;
use runtime::BoxFuture;

use super::Bytes;
use crate::nbd::fuzzing::{Heard, Negotiator};
use crate::{Disk, Session};

/// A disk that nobody gets to.
struct Nothing;

impl Disk for Nothing {
    fn session(&self) -> Box<dyn Session> {
        panic!("requests in a handshake");
    }

    fn size(&self) -> u64 {
        1 << 20
    }

    fn limits(&self) -> Limits {
        Limits { align: 512, preferred: 4096, read_only: false, fast_zero: true }
    }

    fn resized(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

/// Says these bytes in one piece and in small ones: what is heard must be well formed, the same both times, and no
/// more than a client could bear.
pub fn negotiation(bytes: &[u8]) {
    let Some((&step, bytes)) = bytes.split_first() else { return };
    let whole = say(bytes, usize::MAX);
    let pieces = say(bytes, usize::from(step) + 1);
    assert_eq!(whole, pieces, "it matters how bytes arrive");
    check(&whole);
}

fn say(bytes: &[u8], step: usize) -> Heard {
    let mut negotiator = Negotiator::new(Rc::new(Nothing));
    for piece in bytes.chunks(step.min(bytes.len().max(1))) {
        if !negotiator.say(piece) {
            break;
        }
        assert!(negotiator.stored() <= 64 << 10, "{} bytes are kept", negotiator.stored());
    }
    negotiator.heard()
}

/// The replies are whole, and each is one that the specification knows.
fn check(heard: &Heard) {
    let mut bytes = Bytes(&heard.bytes);
    while !bytes.0.is_empty() {
        // The answer to EXPORT_NAME has no header: size, flags and perhaps 124 zeroes.
        if heard.is_agreed && bytes.0.starts_with(&(1_u64 << 20).to_be_bytes()) {
            assert!([10, 134].contains(&bytes.0.len()), "{} bytes", bytes.0.len());
            bytes.take(8);
            let flags = bytes.number(2).unwrap_or_default();
            assert_eq!(flags & 1, 1, "HAS_FLAGS");
            assert!(bytes.0.iter().all(|byte| *byte == 0));
            return;
        }
        assert_eq!(bytes.number(8), Some(0x0003_e889_0455_65a9));
        bytes.number(4).expect("an option");
        let kind = bytes.number(4).expect("a type");
        let known =
            matches!(kind, 1..=4 | 0x8000_0001 | 0x8000_0003 | 0x8000_0006 | 0x8000_0009 | 0x8000_000a);
        assert!(known, "reply of type {kind:#x}");
        let len = bytes.number(4).expect("a length");
        assert!(len <= 4096 && (kind != 1 || len == 0), "{len} bytes in a reply of type {kind}");
        bytes.take(len as usize).expect("as many bytes as were announced");
    }
}
