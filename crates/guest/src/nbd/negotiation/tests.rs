//! The handshake as the specification writes it: the numbers here are copied from its text, not from our code.

use block::Limits;
use runtime::BoxFuture;

use super::*;
use crate::{Disk, Session};

struct Still {
    size: u64,
    read_only: bool,
}

impl Disk for Still {
    fn session(&self) -> Box<dyn Session> {
        panic!("nothing is asked of the disk in a handshake");
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits { align: 512, preferred: 4096, read_only: self.read_only, fast_zero: false }
    }

    fn resized(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

fn exports() -> Rc<Exports> {
    let mut exports = Exports::new();
    exports.add("disk", "a disk", Rc::new(Still { size: 1 << 30, read_only: false })).unwrap();
    exports.add("rom", "", Rc::new(Still { size: 5, read_only: true })).unwrap();
    Rc::new(exports)
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Data of INFO and GO.
fn go(name: &str, asked: &[u16]) -> Vec<u8> {
    let mut bytes = (name.len() as u32).to_be_bytes().to_vec();
    bytes.extend(name.as_bytes());
    bytes.extend((asked.len() as u16).to_be_bytes());
    bytes.extend(asked.iter().flat_map(|kind| kind.to_be_bytes()));
    bytes
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = (name.len() as u32).to_be_bytes().to_vec();
    bytes.extend(name.as_bytes());
    bytes.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        bytes.extend((query.len() as u32).to_be_bytes());
        bytes.extend(query.as_bytes());
    }
    bytes
}

/// Option, reply type and data of each reply.
fn replies(mut bytes: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut replies = Vec::new();
    let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    while !bytes.is_empty() {
        assert_eq!(bytes[..8], 0x3e889045565a9_u64.to_be_bytes());
        let len = number(&bytes[16..20]) as usize;
        replies.push((number(&bytes[8..12]), number(&bytes[12..16]), bytes[20..20 + len].to_vec()));
        bytes = &bytes[20 + len..];
    }
    replies
}

/// A client with these flags, past its greeting.
struct Client {
    negotiation: Negotiation,
    end: Option<Result<Option<Agreed>, Violation>>,
}

impl Client {
    fn new(flags: u32) -> Client {
        let mut client = Client { negotiation: Negotiation::new(exports()), end: None };
        assert!(client.say(&flags.to_be_bytes()).is_empty());
        client
    }

    /// Says this, and hears that.
    fn say(&mut self, mut bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        loop {
            match self.negotiation.feed(&mut bytes, &mut out) {
                Ok(Progress::Starved) => break,
                Ok(Progress::Answered) => continue,
                Ok(Progress::Transmit(agreed)) => self.end = Some(Ok(Some(agreed))),
                Ok(Progress::Abort) => self.end = Some(Ok(None)),
                Err(violation) => self.end = Some(Err(violation)),
            }
            break;
        }
        out
    }

    fn ask(&mut self, number: u32, data: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
        replies(&self.say(&option(number, data)))
    }

    /// Asks, and hears nothing but this type of reply.
    fn ask_one(&mut self, number: u32, data: &[u8]) -> u32 {
        let replies = self.ask(number, data);
        assert_eq!(replies.len(), 1, "{replies:?}");
        assert_eq!(replies[0].0, number);
        replies[0].1
    }

    fn agreed(self) -> Agreed {
        self.end.unwrap().unwrap().unwrap()
    }

    fn violation(self) -> Violation {
        self.end.unwrap().err().unwrap()
    }
}

const ACK: u32 = 1;
const ERR_UNSUP: u32 = 0x8000_0001;
const ERR_INVALID: u32 = 0x8000_0003;
const ERR_UNKNOWN: u32 = 0x8000_0006;
const ERR_TOO_BIG: u32 = 0x8000_0009;
const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
/// HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, CAN_MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO
const FLAGS: u16 = 1 | 4 | 8 | 32 | 64 | 256 | 1024 | 2048;
const DF: u16 = 128;

#[test]
fn the_server_speaks_first() {
    let mut out = Vec::new();
    Negotiation::new(exports()).greet(&mut out);
    assert_eq!(out, b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn unknown_client_flags_end_the_connection() {
    let mut client = Client { negotiation: Negotiation::new(exports()), end: None };
    client.say(&7_u32.to_be_bytes());
    assert_eq!(client.violation(), Violation::ClientFlags(7));
}

#[test]
fn export_name_is_answered_without_a_header() {
    let mut client = Client::new(3);
    let mut expected = (1_u64 << 30).to_be_bytes().to_vec();
    expected.extend(FLAGS.to_be_bytes());
    assert_eq!(client.say(&option(1, b"disk")), expected);
    assert_eq!(client.agreed().style, Style::Simple);
}

#[test]
fn zeroes_follow_export_name_unless_agreed_otherwise() {
    // Not even fixed newstyle: this is the one option that such a client may send.
    let mut client = Client::new(0);
    let told = client.say(&option(1, b""));
    assert_eq!(told.len(), 8 + 2 + 124);
    assert_eq!(told[10..], [0; 124]);
    assert_eq!(client.agreed().export.name(), "disk");
}

#[test]
fn export_name_of_no_export_ends_the_connection() {
    let mut client = Client::new(1);
    assert!(client.say(&option(1, b"disc")).is_empty());
    assert_eq!(client.violation(), Violation::UnknownName);
}

#[test]
fn a_client_that_is_not_fixed_can_only_name_an_export() {
    let mut client = Client::new(2);
    client.say(&option(3, b""));
    assert_eq!(client.violation(), Violation::NotFixed(3));
}

#[test]
fn a_bad_magic_ends_the_connection() {
    let mut client = Client::new(3);
    client.say(b"IHAVEOPU\0\0\0\x03\0\0\0\0");
    assert!(matches!(client.violation(), Violation::Magic(_)));
}

#[test]
fn abort_is_acknowledged_with_or_without_data() {
    for data in [&b""[..], b"goodbye", &[0; 100_000]] {
        let mut client = Client::new(3);
        assert_eq!(client.ask_one(2, data), ACK);
        assert!(matches!(client.end, Some(Ok(None))));
    }
}

#[test]
fn list_names_every_export() {
    let mut client = Client::new(3);
    let expected =
        [(3, 2, b"\0\0\0\x04diska disk".to_vec()), (3, 2, b"\0\0\0\x03rom".to_vec()), (3, 1, vec![])];
    assert_eq!(client.ask(3, b""), expected);
    assert_eq!(client.ask_one(3, b"!"), ERR_INVALID);
}

#[test]
fn info_tells_what_is_asked_and_go_begins() {
    let mut client = Client::new(3);
    let mut export = vec![0, 0];
    export.extend((1_u64 << 30).to_be_bytes());
    export.extend(FLAGS.to_be_bytes());
    let expected = |option: u32| {
        vec![
            (option, 3, export.clone()),
            (option, 3, b"\0\x01disk".to_vec()),
            (option, 3, b"\0\x02a disk".to_vec()),
            (option, 3, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0".to_vec()),
            (option, 1, vec![]),
        ]
    };
    // 77 is unknown and ignored; the default export is the first one.
    assert_eq!(client.ask(6, &go("", &[3, 77, 1, 2])), expected(6));
    assert!(client.end.is_none());
    assert_eq!(client.ask(7, &go("disk", &[1, 2, 3])), expected(7));
    assert_eq!(client.agreed().export.name(), "disk");
}

#[test]
fn what_follows_go_is_left_alone() {
    let mut negotiation = Negotiation::new(exports());
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(option(7, &go("", &[])));
    bytes.extend(b"request");
    let mut input = &bytes[..];
    assert!(matches!(negotiation.feed(&mut input, &mut Vec::new()), Ok(Progress::Transmit(_))));
    assert_eq!(input, b"request");
}

#[test]
fn a_read_only_export_offers_no_way_to_write() {
    let mut client = Client::new(3);
    let replies = client.ask(6, &go("rom", &[2]));
    // HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, CAN_MULTI_CONN, SEND_CACHE; it has no description.
    assert_eq!(
        replies[0].2,
        [&[0, 0], &5_u64.to_be_bytes()[..], &(1_u16 | 2 | 4 | 8 | 256 | 1024).to_be_bytes()].concat()
    );
    assert_eq!(replies.len(), 2);
}

#[test]
fn df_is_offered_with_chunks_only() {
    for (number, offered) in [(8, FLAGS | DF), (11, FLAGS | DF)] {
        let mut client = Client::new(3);
        assert_eq!(client.ask_one(number, b""), ACK);
        let replies = client.ask(6, &go("", &[]));
        assert_eq!(replies[0].2[10..], offered.to_be_bytes());
    }
}

#[test]
fn malformed_info_is_invalid() {
    let mut truncated = go("disk", &[1]);
    truncated.pop();
    let mut more = go("disk", &[1]);
    more.push(0);
    for data in [&b""[..], b"\xff\xff\xff\xff", b"\0\0\0\x05disk", &truncated, &more] {
        for number in [6, 7] {
            assert_eq!(Client::new(3).ask_one(number, data), ERR_INVALID, "{data:?}");
        }
    }
}

#[test]
fn a_name_that_no_export_has_is_unknown() {
    for name in ["disc", "DISK", "disk\0", &"n".repeat(5000)] {
        let mut client = Client::new(3);
        assert_eq!(client.ask_one(7, &go(name, &[])), ERR_UNKNOWN);
        assert_eq!(client.ask(7, &go("rom", &[])).last().unwrap().1, ACK, "it may try again");
    }
    assert_eq!(Client::new(3).ask_one(7, b"\0\0\0\x02\xff\xfe\0\0"), ERR_UNKNOWN);
}

#[test]
fn options_of_others_are_unsupported() {
    let mut client = Client::new(3);
    // PEEK_EXPORT, STARTTLS, none yet.
    for number in [0, 4, 5, 12, 0xffff_ffff] {
        assert_eq!(client.ask_one(number, b"data of some kind"), ERR_UNSUP);
        assert_eq!(client.ask_one(number, &[b'x'; 60_000]), ERR_UNSUP);
    }
    assert_eq!(client.ask_one(2, b""), ACK, "and the next one is understood");
}

#[test]
fn structured_replies_and_extended_headers_take_no_data() {
    let mut client = Client::new(3);
    assert_eq!(client.ask_one(8, b"x"), ERR_INVALID);
    assert_eq!(client.ask_one(11, b"x"), ERR_INVALID);
    assert_eq!(client.ask_one(8, &[0; 20_000]), ERR_INVALID);
    client.ask(7, &go("", &[]));
    assert_eq!(client.agreed().style, Style::Simple);
}

#[test]
fn extended_headers_take_precedence_over_structured_replies() {
    let mut client = Client::new(3);
    assert_eq!(client.ask_one(8, b""), ACK);
    assert_eq!(client.ask_one(11, b""), ACK);
    assert_eq!(client.ask_one(8, b""), ERR_EXT_HEADER_REQD);
    client.ask(7, &go("", &[]));
    assert_eq!(client.agreed().style, Style::Extended);
}

#[test]
fn export_name_after_extended_headers_ends_the_connection() {
    let mut client = Client::new(3);
    client.ask(11, b"");
    client.say(&option(1, b"disk"));
    assert_eq!(client.violation(), Violation::NameAfterExtended);
}

#[test]
fn contexts_are_listed_by_name_or_wildcard() {
    let listed = [(9, 4, b"\0\0\0\0base:allocation".to_vec()), (9, 1, vec![])];
    let none = [(9, 1, vec![])];
    let mut client = Client::new(3);
    client.ask(8, b"");
    for queries in [&[][..], &["base:"], &["base:allocation"], &["qemu:", "base:"]] {
        assert_eq!(client.ask(9, &contexts("disk", queries)), listed, "{queries:?}");
    }
    for queries in [&["base:dirty"][..], &["qemu:"], &["base"], &[""]] {
        assert_eq!(client.ask(9, &contexts("disk", queries)), none, "{queries:?}");
    }
}

#[test]
fn a_selected_context_holds_for_its_export() {
    let selected = |name: &str, queries: &[&str]| {
        let mut client = Client::new(3);
        client.ask(8, b"");
        client.ask(10, &contexts(name, queries));
        client.ask(7, &go("disk", &[]));
        client.agreed().allocation
    };
    assert!(selected("disk", &["base:allocation"]));
    assert!(selected("", &["x-mine:", "base:allocation"]), "the default export is the same disk");
    assert!(!selected("rom", &["base:allocation"]));
    assert!(!selected("disk", &["base:"]), "the wildcard selects nothing");
    assert!(!selected("disk", &[]));
}

#[test]
fn contexts_are_selected_once_and_a_later_choice_replaces_them() {
    let mut client = Client::new(3);
    client.ask(8, b"");
    let both = contexts("disk", &["base:allocation", "base:allocation"]);
    assert_eq!(client.ask(10, &both), [(10, 4, b"\0\0\0\x01base:allocation".to_vec()), (10, 1, vec![])]);
    assert_eq!(client.ask_one(10, b"bad"), ERR_INVALID);
    client.ask(7, &go("disk", &[]));
    assert!(!client.agreed().allocation, "also when it fails");
}

#[test]
fn contexts_need_structured_replies_and_an_export() {
    let mut client = Client::new(3);
    assert_eq!(client.ask_one(9, &contexts("disk", &[])), ERR_INVALID);
    assert_eq!(client.ask_one(10, &contexts("disk", &[])), ERR_INVALID);
    client.ask(8, b"");
    assert_eq!(client.ask_one(9, &contexts("disc", &[])), ERR_UNKNOWN);
    // More queries promised than there is data.
    assert_eq!(client.ask_one(9, b"\0\0\0\0\xff\xff\xff\xff"), ERR_INVALID);
    assert_eq!(client.ask_one(10, b"\0\0\0\0\0\0\0\x01\0\0\0\x09base:"), ERR_INVALID);
}

#[test]
fn long_options_are_skipped_and_longer_ones_end_the_connection() {
    let mut client = Client::new(3);
    for number in [6, 7, 9, 10] {
        assert_eq!(client.ask_one(number, &[0; 16_385]), ERR_TOO_BIG);
    }
    assert!(client.negotiation.stored() <= 16_384, "and not stored");
    client.say(b"IHAVEOPT\0\0\0\x07\x02\0\0\x01");
    assert_eq!(client.violation(), Violation::TooLong { option: 7, len: 0x0200_0001 });
    let mut client = Client::new(3);
    client.say(b"IHAVEOPT\0\0\0\x01\0\0\x40\x01");
    assert_eq!(client.violation(), Violation::TooLong { option: 1, len: 0x4001 });
}

#[test]
fn a_flood_of_options_ends_the_connection() {
    let mut client = Client::new(3);
    for _ in 0..1024 {
        assert_eq!(client.ask_one(8, b""), ACK);
    }
    client.say(&option(8, b""));
    assert_eq!(client.violation(), Violation::TooMany);
}

#[test]
fn one_byte_at_a_time_comes_to_the_same() {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    for (number, data) in
        [(8, vec![]), (3, vec![]), (5, vec![1; 20_000]), (10, contexts("", &["base:allocation"]))]
    {
        bytes.extend(option(number, &data));
    }
    bytes.extend(option(7, &go("disk", &[1, 2, 3])));
    let run = |step: usize| {
        let mut client = Client { negotiation: Negotiation::new(exports()), end: None };
        let heard: Vec<u8> = bytes
            .chunks(step)
            .flat_map(|chunk| {
                let mut heard = Vec::new();
                let mut chunk = chunk;
                while !chunk.is_empty() && client.end.is_none() {
                    let mut out = Vec::new();
                    match client.negotiation.feed(&mut chunk, &mut out).unwrap() {
                        Progress::Transmit(agreed) => client.end = Some(Ok(Some(agreed))),
                        Progress::Starved | Progress::Answered => {}
                        Progress::Abort => panic!("nobody aborts"),
                    }
                    heard.extend(out);
                }
                heard
            })
            .collect();
        (heard, client.agreed().allocation)
    };
    assert_eq!(run(1), run(bytes.len()));
    assert!(run(7).1);
}
