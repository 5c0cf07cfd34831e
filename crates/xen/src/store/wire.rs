//! Messages of the xenstore's wire protocol, and how they are told apart in a stream of bytes.

use block::Errno;

/// Bytes of what follows a header, at most (`XENSTORE_PAYLOAD_MAX`).
pub(crate) const PAYLOAD_MAX: usize = 4096;
/// Bytes of an absolute path, at most (`XENSTORE_ABS_PATH_MAX`).
pub(crate) const PATH_MAX: usize = 3072;
/// `struct xsd_sockmsg`: four numbers of 32 bits, as the machine has them.
pub(crate) const HEADER_LEN: usize = 16;

macro_rules! kinds {
    ($($name:ident = $number:literal,)*) => {
        /// What a message asks for or answers (`enum xsd_sockmsg_type`): those that are spoken here.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)] // as in xs_wire.h
        pub enum Kind { $($name = $number,)* }

        impl Kind {
            pub(crate) fn new(number: u32) -> Option<Kind> {
                match number {
                    $($number => Some(Kind::$name),)*
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    Directory = 1,
    Read = 2,
    GetPerms = 3,
    Watch = 4,
    Unwatch = 5,
    TransactionStart = 6,
    TransactionEnd = 7,
    GetDomainPath = 10,
    Write = 11,
    Mkdir = 12,
    Rm = 13,
    SetPerms = 14,
    WatchEvent = 15,
    Error = 16,
    IsDomainIntroduced = 17,
}

/// A message: a header and what follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// A [`Kind`], or a number that we do not know.
    pub(crate) kind: u32,
    /// Which request it is, or answers.
    pub(crate) request: u32,
    /// The transaction that it is a part of; 0 for none.
    pub(crate) transaction: u32,
    pub(crate) payload: Vec<u8>,
}

impl Message {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let header = [self.kind, self.request, self.transaction, self.payload.len() as u32];
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.payload.len());
        bytes.extend(header.iter().flat_map(|number| number.to_ne_bytes()));
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    pub(crate) fn kind(&self) -> Option<Kind> {
        Kind::new(self.kind)
    }
}

/// A message that announces more bytes than there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message of {0} bytes: at most {PAYLOAD_MAX} are allowed")]
pub(crate) struct TooLong(pub(crate) u32);

/// What came of a stream and is no whole message yet.
#[derive(Debug, Default)]
pub(crate) struct Inbox(Vec<u8>);

impl Inbox {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Takes the first message, if all of it is there.
    pub(crate) fn take(&mut self) -> Result<Option<Message>, TooLong> {
        let Some((header, rest)) = self.0.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let number = |index: usize| {
            let [a, b, c, d] = [0, 1, 2, 3].map(|byte| header[4 * index + byte]);
            u32::from_ne_bytes([a, b, c, d])
        };
        let (kind, request, transaction, len) = (number(0), number(1), number(2), number(3));
        if len as usize > PAYLOAD_MAX {
            return Err(TooLong(len));
        }
        let Some(payload) = rest.get(..len as usize) else { return Ok(None) };
        let message = Message { kind, request, transaction, payload: payload.to_vec() };
        self.0.drain(..HEADER_LEN + len as usize);
        Ok(Some(message))
    }
}

/// The text before the first NUL, or all of it.
pub(crate) fn text(payload: &[u8]) -> String {
    let end = payload.iter().position(|byte| *byte == 0).unwrap_or(payload.len());
    String::from_utf8_lossy(&payload[..end]).into_owned()
}

/// The texts that a NUL each ends.
pub(crate) fn texts(payload: &[u8]) -> Vec<String> {
    let payload = payload.strip_suffix(&[0]).unwrap_or(payload);
    if payload.is_empty() {
        return Vec::new();
    }
    payload.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned()).collect()
}

/// The errno that an error's payload names. One that we do not know is EIO: it stays an error.
pub(crate) fn errno(payload: &[u8]) -> Errno {
    Errno::from_name(&text(payload)).unwrap_or(Errno::EIO)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A read of "a" as xs_wire.h lays it out, written down by hand for a machine with the low byte first.
    #[cfg(target_endian = "little")]
    const READ: [u8; 18] = [2, 0, 0, 0, 7, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0, 0, b'a', 0];

    #[test]
    #[cfg(target_endian = "little")]
    fn a_message_looks_as_the_header_file_says() {
        let message = Message { kind: 2, request: 7, transaction: 9, payload: b"a\0".to_vec() };
        assert_eq!(message.bytes(), READ);
        assert_eq!(message.kind(), Some(Kind::Read));
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn messages_are_found_however_their_bytes_arrive() {
        let mut inbox = Inbox::default();
        for byte in READ {
            assert_eq!(inbox.take(), Ok(None));
            inbox.push(&[byte]);
        }
        inbox.push(&READ[..17]);
        assert_eq!(inbox.take().unwrap().unwrap().bytes(), READ);
        assert_eq!(inbox.take(), Ok(None));
        inbox.push(&READ[17..]);
        assert_eq!(inbox.take().unwrap().unwrap().bytes(), READ);
    }

    #[test]
    fn nobody_is_believed_who_announces_too_much() {
        let mut inbox = Inbox::default();
        inbox.push(&Message { kind: 2, request: 0, transaction: 0, payload: vec![0; 4096] }.bytes());
        assert_eq!(inbox.take().unwrap().unwrap().payload.len(), 4096);
        inbox.push(&[0; 12]);
        inbox.push(&4097_u32.to_ne_bytes());
        assert_eq!(inbox.take(), Err(TooLong(4097)));
    }

    #[test]
    fn an_error_that_nobody_knows_is_no_success() {
        assert_eq!(errno(b"ENOENT\0"), Errno::ENOENT);
        assert_eq!(errno(b"EAGAIN\0"), Errno::EAGAIN);
        for unknown in [&b"EWHAT\0"[..], b"", b"\0", b"\xff\xff"] {
            assert_eq!(errno(unknown), Errno::EIO);
        }
    }

    #[test]
    fn lists_end_with_a_nul_or_are_empty() {
        assert_eq!(texts(b""), Vec::<String>::new());
        assert_eq!(texts(b"a\0b\0"), ["a", "b"]);
        assert_eq!(texts(b"a\0b"), ["a", "b"]);
        assert_eq!(text(b"5\0garbage"), "5");
    }
}
