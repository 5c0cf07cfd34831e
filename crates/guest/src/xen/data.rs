//! The bytes of requests: in memory of our own, from where and to where the hypervisor copies them, or in the guest's
//! pages, which are mapped for as long as they are needed.
//!
//! The way by copies always works. It costs a copy and one call for all requests of a turn; mapping costs two calls for
//! each request, and in the processors that have mapped a page a flush of their translations when it is unmapped.

use std::cell::RefCell;
use std::rc::Rc;

use ::xen::grants::{Access, Direction, Grants, Mapping, Piece, Transfer};
use ::xen::{Domain, PAGE};
use block::{Buf, Errno, Pool};

use super::DataPath;
use super::kept::Kept;

/// How the bytes of one ring's requests get from and to the guest.
pub(crate) struct Data {
    grants: Rc<dyn Grants>,
    domain: Domain,
    pool: Pool,
    way: Way,
}

enum Way {
    Copy,
    /// Each request's pages are mapped, and unmapped before it is answered.
    Map,
    /// The front end keeps to persistent grants.
    Keep(RefCell<Kept>),
}

/// Where the bytes of a request are while the disk has it.
#[derive(Default)]
pub(crate) enum Place {
    /// It has none.
    #[default]
    Nowhere,
    /// In memory of our own.
    Ours(Buf),
    /// In the guest's pages, which are to be unmapped before the answer.
    Mapped(Rc<Mapping>),
    /// In pages that stay mapped.
    Kept(#[allow(dead_code, reason = "keeps them from being unmapped")] Vec<Rc<Mapping>>),
}

impl Place {
    /// Whether somebody still has a part of what is to be unmapped.
    pub(crate) fn is_in_use(&self) -> bool {
        match self {
            Place::Mapped(mapping) => Rc::strong_count(mapping) > 1,
            Place::Nowhere | Place::Ours(_) | Place::Kept(_) => false,
        }
    }
}

impl Data {
    /// The way that the settings ask for. Left to itself it is the one by copies: the one that works everywhere.
    pub(crate) fn new(
        grants: &Rc<dyn Grants>,
        domain: Domain,
        pool: &Pool,
        path: DataPath,
        persistent: bool,
    ) -> Data {
        let way = match path {
            DataPath::Auto | DataPath::Copy => Way::Copy,
            DataPath::Map if persistent => Way::Keep(RefCell::default()),
            DataPath::Map => Way::Map,
        };
        Data { grants: grants.clone(), domain, pool: pool.clone(), way }
    }

    /// Memory for the bytes of these pieces, which go the way that `direction` says. Where they are [`Place::Ours`] they
    /// are still to be copied.
    pub(crate) fn place(&self, pieces: &[Piece], len: usize, direction: Direction) -> (Buf, Place) {
        let mapped = match &self.way {
            Way::Copy => Ok(None),
            Way::Map => self.mapped(pieces, direction).map(Some),
            Way::Keep(kept) => match kept.borrow_mut().map(&*self.grants, self.domain, pieces) {
                Ok(Some(mappings)) => Ok(Some((joined(&mappings, pieces), Place::Kept(mappings)))),
                Ok(None) => Ok(None),
                Err(errno) => Err(errno),
            },
        };
        match mapped {
            Ok(Some(placed)) => placed,
            // What cannot be mapped may still be copied; and if not, that says why.
            Ok(None) | Err(_) => {
                let buf = self.pool.take(len);
                (buf.clone(), Place::Ours(buf))
            }
        }
    }

    fn mapped(&self, pieces: &[Piece], direction: Direction) -> Result<(Buf, Place), Errno> {
        // A page to write to disk from is granted for no more than that.
        let access = match direction {
            Direction::FromGuest => Access::Read,
            Direction::ToGuest => Access::Write,
        };
        let refs: Vec<_> = pieces.iter().map(|piece| piece.gref).collect();
        let mapping = Rc::new(self.grants.map(self.domain, &refs, access)?);
        Ok((contiguous(&mapping, pieces), Place::Mapped(mapping)))
    }

    /// Memory of our own.
    pub(crate) fn memory(&self, len: usize) -> Buf {
        self.pool.take(len)
    }

    /// Does all these copies.
    pub(crate) fn copy(&self, copies: &mut Copies) {
        if !copies.transfers.is_empty() {
            self.grants.copy(self.domain, &mut copies.transfers);
        }
    }
}

/// Copies that are done in one go, each for a request.
#[derive(Default)]
pub(crate) struct Copies {
    transfers: Vec<Transfer>,
    slots: Vec<u16>,
}

/// What became of a copy.
pub(crate) struct Copied {
    pub(crate) slot: u16,
    pub(crate) result: Result<(), Errno>,
    pub(crate) buf: Buf,
    /// As they were handed over.
    pub(crate) pieces: Vec<Piece>,
}

impl Copies {
    /// One more.
    pub(crate) fn add(&mut self, slot: u16, direction: Direction, buf: Buf, pieces: Vec<Piece>) {
        self.slots.push(slot);
        // It has failed until the hypervisor has said otherwise.
        self.transfers.push(Transfer { direction, buf, pieces, result: Err(Errno::EIO) });
    }

    /// What became of them, in the order in which they were added. Then there are none.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Copied> {
        let copied = |(slot, transfer): (u16, Transfer)| {
            let Transfer { direction: _, buf, pieces, result } = transfer;
            Copied { slot, result, buf, pieces }
        };
        self.slots.drain(..).zip(self.transfers.drain(..)).map(copied)
    }
}

/// The bytes of pieces whose pages are mapped one after the other. Those that lie side by side are one.
fn contiguous(mapping: &Rc<Mapping>, pieces: &[Piece]) -> Buf {
    let mut parts = Vec::new();
    let mut run: Option<(usize, usize)> = None;
    for (nth, piece) in pieces.iter().enumerate() {
        let (at, len) = (nth * PAGE + usize::from(piece.offset), usize::from(piece.len));
        run = match run {
            Some((start, end)) if end == at => Some((start, at + len)),
            Some((start, end)) => {
                parts.push(mapping.buf(start, end - start));
                Some((at, at + len))
            }
            None => Some((at, at + len)),
        };
    }
    if let Some((start, end)) = run {
        parts.push(mapping.buf(start, end - start));
    }
    one(parts)
}

/// The bytes of pieces each of whose pages is mapped by itself.
fn joined(mappings: &[Rc<Mapping>], pieces: &[Piece]) -> Buf {
    let part = |(mapping, piece): (&Rc<Mapping>, &Piece)| mapping.buf(piece.offset.into(), piece.len.into());
    one(mappings.iter().zip(pieces).map(part).collect())
}

fn one(mut parts: Vec<Buf>) -> Buf {
    if parts.len() == 1 { parts.swap_remove(0) } else { Buf::concat(parts) }
}
