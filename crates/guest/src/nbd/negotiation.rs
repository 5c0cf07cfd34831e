//! The handshake of a connection ("Fixed newstyle negotiation"): bytes in, bytes out, no I/O.

use std::rc::Rc;

use super::export::{Export, Exports};
use super::wire::{self, Fields, Style, allocation, handshake, info, option, option_reply};

/// An option's data is stored up to this many bytes: room for the longest names that the protocol allows, times
/// four. What is longer is skipped, and answered with an error.
const OPTION_LEN_STORED: u32 = 4 * wire::STRING_LEN_MAX as u32;
/// An option that announces more bytes than any payload may have is an attack ("Size constraints").
const OPTION_LEN_MAX: u32 = wire::PAYLOAD_LEN_MAX;
/// Options that one client may send. libnbd's longest dance needs about ten.
const OPTIONS_MAX: u32 = 1024;

/// What client and server agreed on, when transmission begins.
pub(crate) struct Agreed {
    pub(crate) export: Rc<Export>,
    pub(crate) style: Style,
    /// Whether the client selected `base:allocation` for this export, and so may ask for block status.
    pub(crate) allocation: bool,
    /// Bytes, as the client was told. NBD has no way to tell it of more.
    pub(crate) size: u64,
}

/// Why a client is disconnected during the handshake: what was found, and what was expected.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Violation {
    #[error("client flags {0:#x} have bits that were not offered")]
    ClientFlags(u32),
    #[error("an option began with {0:#018x} instead of IHAVEOPT")]
    Magic(u64),
    #[error("option {0} from a client that does not speak fixed newstyle, which knows only EXPORT_NAME")]
    NotFixed(u32),
    #[error("option {option} with {len} bytes of data, at most {OPTION_LEN_MAX} are skipped")]
    TooLong { option: u32, len: u32 },
    #[error("more than {OPTIONS_MAX} options")]
    TooMany,
    #[error("EXPORT_NAME after extended headers were agreed on")]
    NameAfterExtended,
    #[error("EXPORT_NAME of an export that does not exist")]
    UnknownName,
}

/// How far a call of [`Negotiation::feed`] got.
pub(crate) enum Progress {
    /// All input is used up and more is needed.
    Starved,
    /// One option is answered; there may be more input.
    Answered,
    /// The handshake is over, and what input is left belongs to the transmission phase.
    Transmit(Agreed),
    /// The client wants to end here.
    Abort,
}

/// What the next bytes are.
#[derive(Clone, Copy)]
enum Phase {
    ClientFlags,
    Header,
    Data {
        option: u32,
    },
    /// Data of this option that is not stored.
    Skip {
        option: u32,
        left: u32,
    },
}

/// The server's side of the handshake.
pub(crate) struct Negotiation {
    exports: Rc<Exports>,
    phase: Phase,
    /// What has come of the client flags, of a header or of an option's data.
    held: Vec<u8>,
    /// Bytes that `held` must reach before it can be looked at.
    need: usize,
    fixed: bool,
    no_zeroes: bool,
    style: Style,
    /// The export for which `base:allocation` is selected.
    allocation: Option<Rc<Export>>,
    options: u32,
}

impl Negotiation {
    pub(crate) fn new(exports: Rc<Exports>) -> Negotiation {
        Negotiation {
            exports,
            phase: Phase::ClientFlags,
            held: Vec::new(),
            need: 4,
            fixed: false,
            no_zeroes: false,
            style: Style::Simple,
            allocation: None,
            options: 0,
        }
    }

    /// What the server says first ("Newstyle negotiation").
    pub(crate) fn greet(&self, out: &mut Vec<u8>) {
        out.extend(wire::NBDMAGIC.to_be_bytes());
        out.extend(wire::IHAVEOPT.to_be_bytes());
        out.extend((handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
    }

    /// Takes bytes from the front of `input`, answers at most one option into `out`, and says how far it got.
    /// Whoever calls sends `out` before it calls again, so a client that does not read its answers gets no more.
    pub(crate) fn feed(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Result<Progress, Violation> {
        loop {
            if let Phase::Skip { option, left } = self.phase {
                let part = input.len().min(left as usize);
                *input = &input[part..];
                let left = left - part as u32;
                if left > 0 {
                    self.phase = Phase::Skip { option, left };
                    return Ok(Progress::Starved);
                }
                self.expect_header();
                return Ok(refuse_skipped(option, out));
            }
            let part = input.len().min(self.need - self.held.len());
            let (taken, rest) = input.split_at(part);
            self.held.extend_from_slice(taken);
            *input = rest;
            if self.held.len() < self.need {
                return Ok(Progress::Starved);
            }
            let mut held = std::mem::take(&mut self.held);
            match self.phase {
                Phase::ClientFlags => self.client_flags(&held)?,
                Phase::Header => self.header(&held)?,
                Phase::Data { option } => {
                    self.expect_header();
                    return self.option(option, &held, out);
                }
                Phase::Skip { .. } => unreachable!("skipped above"),
            }
            held.clear();
            self.held = held;
        }
    }

    /// Bytes of memory that the client's bytes take up.
    pub(crate) fn stored(&self) -> usize {
        self.held.capacity()
    }

    fn expect_header(&mut self) {
        self.phase = Phase::Header;
        self.need = 16;
    }

    /// "Client flags"
    fn client_flags(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        let flags = Fields(bytes).u32().unwrap_or_default();
        let (fixed, no_zeroes): (u32, u32) = (handshake::FIXED_NEWSTYLE.into(), handshake::NO_ZEROES.into());
        if flags & !(fixed | no_zeroes) != 0 {
            return Err(Violation::ClientFlags(flags));
        }
        self.fixed = flags & fixed != 0;
        self.no_zeroes = flags & no_zeroes != 0;
        self.expect_header();
        Ok(())
    }

    fn header(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        let mut fields = Fields(bytes);
        let magic = fields.u64().unwrap_or_default();
        let option = fields.u32().unwrap_or_default();
        let len = fields.u32().unwrap_or_default();
        if magic != wire::IHAVEOPT {
            return Err(Violation::Magic(magic));
        }
        if !self.fixed && option != option::EXPORT_NAME {
            return Err(Violation::NotFixed(option));
        }
        // EXPORT_NAME cannot be answered with an error, so a name that is too long ends the connection.
        let skipped_max = if option == option::EXPORT_NAME { OPTION_LEN_STORED } else { OPTION_LEN_MAX };
        if len > skipped_max {
            return Err(Violation::TooLong { option, len });
        }
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Err(Violation::TooMany);
        }
        if len > OPTION_LEN_STORED {
            self.phase = Phase::Skip { option, left: len };
        } else {
            self.phase = Phase::Data { option };
            self.need = len as usize;
        }
        Ok(())
    }

    /// "Option types"
    fn option(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Progress, Violation> {
        let mut replies = Replies { option, out };
        match option {
            option::EXPORT_NAME => return self.export_name(data, replies.out),
            option::ABORT => {
                replies.ack();
                return Ok(Progress::Abort);
            }
            option::GO => {
                if let Some(export) = self.info(data, &mut replies) {
                    return Ok(Progress::Transmit(self.agreed(export)));
                }
            }
            option::INFO => {
                self.info(data, &mut replies);
            }
            option::LIST => self.list(data, &mut replies),
            option::STRUCTURED_REPLY => self.structured_reply(data, &mut replies),
            option::EXTENDED_HEADERS => self.extended_headers(data, &mut replies),
            option::LIST_META_CONTEXT => self.list_meta_context(data, &mut replies),
            option::SET_META_CONTEXT => self.set_meta_context(data, &mut replies),
            // STARTTLS too: there is no TLS here ("NOTLS mode").
            _ => replies.error(option_reply::ERR_UNSUP, "this server does not know the option"),
        }
        Ok(Progress::Answered)
    }

    fn agreed(&self, export: Rc<Export>) -> Agreed {
        let allocation = self.allocation.as_ref().is_some_and(|selected| Rc::ptr_eq(selected, &export));
        let size = export.disk().size();
        Agreed { export, style: self.style, allocation, size }
    }

    /// `NBD_OPT_EXPORT_NAME`: the one option whose reply has no form for an error.
    fn export_name(&self, name: &[u8], out: &mut Vec<u8>) -> Result<Progress, Violation> {
        if self.style == Style::Extended {
            return Err(Violation::NameAfterExtended);
        }
        let export = self.exports.get(name).ok_or(Violation::UnknownName)?;
        out.extend(export.disk().size().to_be_bytes());
        out.extend(export.flags(self.style).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        Ok(Progress::Transmit(self.agreed(export.clone())))
    }

    /// `NBD_OPT_LIST`
    fn list(&self, data: &[u8], replies: &mut Replies<'_>) {
        if !data.is_empty() {
            return replies.error(option_reply::ERR_INVALID, "this option has no data");
        }
        for export in self.exports.iter() {
            let name_len = (export.name().len() as u32).to_be_bytes();
            replies.send(
                option_reply::SERVER,
                &[&name_len, export.name().as_bytes(), export.description().as_bytes()],
            );
        }
        replies.ack();
    }

    /// `NBD_OPT_INFO` and `NBD_OPT_GO`; the export, if the answer was a success.
    fn info(&self, data: &[u8], replies: &mut Replies<'_>) -> Option<Rc<Export>> {
        let Some((name, asked)) = info_request(data) else {
            replies.error(option_reply::ERR_INVALID, "the data is not a name and a list of requests");
            return None;
        };
        let Some(export) = self.exports.get(name) else {
            replies.error(option_reply::ERR_UNKNOWN, "there is no export of this name");
            return None;
        };
        let size = export.disk().size().to_be_bytes();
        let flags = export.flags(self.style).to_be_bytes();
        replies.send(option_reply::INFO, &[&info::EXPORT.to_be_bytes(), &size, &flags]);
        if asked.contains(&info::NAME) {
            replies.send(option_reply::INFO, &[&info::NAME.to_be_bytes(), export.name().as_bytes()]);
        }
        if asked.contains(&info::DESCRIPTION) && !export.description().is_empty() {
            let description = export.description().as_bytes();
            replies.send(option_reply::INFO, &[&info::DESCRIPTION.to_be_bytes(), description]);
        }
        if asked.contains(&info::BLOCK_SIZE) {
            let minimum = 1_u32.to_be_bytes();
            let preferred = wire::BLOCK_SIZE_PREFERRED.to_be_bytes();
            let maximum = wire::PAYLOAD_LEN_MAX.to_be_bytes();
            let kind = info::BLOCK_SIZE.to_be_bytes();
            replies.send(option_reply::INFO, &[&kind, &minimum, &preferred, &maximum]);
        }
        replies.ack();
        Some(export.clone())
    }

    /// `NBD_OPT_STRUCTURED_REPLY`
    fn structured_reply(&mut self, data: &[u8], replies: &mut Replies<'_>) {
        if !data.is_empty() {
            return replies.error(option_reply::ERR_INVALID, "this option has no data");
        }
        if self.style == Style::Extended {
            return replies
                .error(option_reply::ERR_EXT_HEADER_REQD, "extended headers are agreed on already");
        }
        self.style = Style::Structured;
        replies.ack();
    }

    /// `NBD_OPT_EXTENDED_HEADERS` (extension-ext-header)
    fn extended_headers(&mut self, data: &[u8], replies: &mut Replies<'_>) {
        if !data.is_empty() {
            return replies.error(option_reply::ERR_INVALID, "this option has no data");
        }
        self.style = Style::Extended;
        replies.ack();
    }

    /// `NBD_OPT_LIST_META_CONTEXT`
    fn list_meta_context(&self, data: &[u8], replies: &mut Replies<'_>) {
        let Some((_export, queries)) = self.meta_context(data, replies) else { return };
        let matches = |query: &&[u8]| {
            *query == allocation::NAME.as_bytes() || *query == allocation::WILDCARD.as_bytes()
        };
        if queries.is_empty() || queries.iter().any(matches) {
            // "The metadata context ID in these replies is reserved and SHOULD be set to zero".
            replies.send(option_reply::META_CONTEXT, &[&0_u32.to_be_bytes(), allocation::NAME.as_bytes()]);
        }
        replies.ack();
    }

    /// `NBD_OPT_SET_META_CONTEXT`
    fn set_meta_context(&mut self, data: &[u8], replies: &mut Replies<'_>) {
        // "Issuing this command replaces all previously-set metadata contexts (including when this command
        // fails)".
        self.allocation = None;
        let Some((export, queries)) = self.meta_context(data, replies) else { return };
        if queries.contains(&allocation::NAME.as_bytes()) {
            replies.send(
                option_reply::META_CONTEXT,
                &[&allocation::ID.to_be_bytes(), allocation::NAME.as_bytes()],
            );
            self.allocation = Some(export);
        }
        replies.ack();
    }

    /// The export and the queries of an option about metadata contexts; where there are none to be had, the
    /// client has been told.
    fn meta_context<'a>(
        &self,
        data: &'a [u8],
        replies: &mut Replies<'_>,
    ) -> Option<(Rc<Export>, Vec<&'a [u8]>)> {
        if self.style == Style::Simple {
            replies.error(option_reply::ERR_INVALID, "structured replies are to be agreed on first");
            return None;
        }
        let Some((name, queries)) = meta_context_request(data) else {
            replies.error(option_reply::ERR_INVALID, "the data is not a name and a list of queries");
            return None;
        };
        let Some(export) = self.exports.get(name) else {
            replies.error(option_reply::ERR_UNKNOWN, "there is no export of this name");
            return None;
        };
        Some((export.clone(), queries))
    }
}

/// The answer to an option whose data was too long to be stored.
fn refuse_skipped(option: u32, out: &mut Vec<u8>) -> Progress {
    let mut replies = Replies { option, out };
    match option {
        // "A server SHOULD ignore any data sent by the client rather than rejecting the request".
        option::ABORT => {
            replies.ack();
            return Progress::Abort;
        }
        option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => {
            replies.error(option_reply::ERR_INVALID, "this option has no data");
        }
        option::INFO | option::GO | option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
            replies.error(option_reply::ERR_TOO_BIG, "the option's data is too long");
        }
        _ => replies.error(option_reply::ERR_UNSUP, "this server does not know the option"),
    }
    Progress::Answered
}

/// The name and the information asked for, of the data of `NBD_OPT_INFO` and `NBD_OPT_GO`; `None` where they do
/// not fill it exactly.
fn info_request(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    let asked = (0..count).map(|_| fields.u16()).collect::<Option<Vec<u16>>>()?;
    fields.is_empty().then_some((name, asked))
}

/// The name and the queries, of the data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`; `None`
/// where they do not fill it exactly.
fn meta_context_request(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    // Ends at the latest where the data does: the count alone reserves nothing.
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.string()?);
    }
    fields.is_empty().then_some((name, queries))
}

/// The replies to one option.
struct Replies<'a> {
    option: u32,
    out: &'a mut Vec<u8>,
}

impl Replies<'_> {
    fn send(&mut self, kind: u32, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        self.out.extend(wire::OPTION_REPLY_MAGIC.to_be_bytes());
        self.out.extend(self.option.to_be_bytes());
        self.out.extend(kind.to_be_bytes());
        self.out.extend((len as u32).to_be_bytes());
        for part in parts {
            self.out.extend_from_slice(part);
        }
    }

    fn ack(&mut self) {
        self.send(option_reply::ACK, &[]);
    }

    /// "All error replies MAY have some data set, in which case that data is an error message string".
    fn error(&mut self, kind: u32, message: &str) {
        self.send(kind, &[message.as_bytes()]);
    }
}

#[cfg(test)]
mod tests;
