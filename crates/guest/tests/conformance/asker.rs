//! Who asks: a client of each interface, with one set of words.

use blkfront::{Abi, Front};
use block::{Errno, OpKind};
use guest::xen::DataPath;
use nbd_client::{Client, Request as NbdRequest, Style};
use vhost_client::{Driver, Request, Status, Ticket, Wish, feature};

use crate::serve::Served;

/// What can be asked of a disk, whatever the interface.
#[derive(Clone, Debug)]
pub(crate) enum Question {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Zeroes(u64, u64),
    Discard(u64, u64),
    Flush,
}

impl Question {
    pub(crate) fn kind(&self) -> OpKind {
        match self {
            Question::Read(..) => OpKind::Read,
            Question::Write(..) => OpKind::Write,
            Question::Zeroes(..) => OpKind::WriteZeroes,
            Question::Discard(..) => OpKind::Discard,
            Question::Flush => OpKind::Flush,
        }
    }
}

/// The bytes of a read, and nothing for anything else; or the number of the interface's own for the error.
pub(crate) type Told = Result<Vec<u8>, u32>;

/// What a client would like to do that the disk does not do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Refused {
    /// These bytes are beyond the end of the disk.
    BeyondTheEnd,
    /// The disk is read-only.
    ReadOnly,
}

/// A connection by one of the interfaces.
pub(crate) trait Asker {
    /// Asks without waiting; a name for the answer.
    fn send(&mut self, question: &Question) -> u64;

    /// The answer. It fails where there is none, or two.
    fn wait(&mut self, name: u64) -> Told;

    /// The number by which this interface tells of this error, after its specification and docs/errors.md.
    fn number(&self, errno: Errno, kind: OpKind) -> u32;

    /// The same for what is refused without asking the storage.
    fn refusal(&self, refused: Refused, kind: OpKind) -> u32;

    /// How the disk is asked what this is for: an interface may have no word of its own for it.
    fn arrives_as(&self, kind: OpKind) -> OpKind {
        kind
    }

    fn ask(&mut self, question: &Question) -> Told {
        let name = self.send(question);
        self.wait(name)
    }
}

/// A way to ask, by name.
pub(crate) struct Interface {
    pub(crate) name: &'static str,
    pub(crate) connect: fn(&Served) -> Box<dyn Asker>,
}

pub(crate) const INTERFACES: [Interface; 9] = [
    Interface { name: "NBD, simple replies", connect: |served| nbd(served, Style::Simple) },
    Interface { name: "NBD, structured replies", connect: |served| nbd(served, Style::Structured) },
    Interface { name: "NBD, extended headers", connect: |served| nbd(served, Style::Extended) },
    Interface { name: "virtio", connect: |served| virtio(served, feature::LINUX, 1, Table::Ring) },
    Interface {
        name: "virtio without event indices",
        connect: |served| virtio(served, feature::LINUX & !feature::EVENT_IDX, 1, Table::Ring),
    },
    Interface {
        name: "virtio, indirect descriptors",
        connect: |served| virtio(served, feature::LINUX, 1, Table::Indirect),
    },
    Interface {
        name: "virtio, three regions of memory",
        connect: |served| virtio(served, feature::LINUX, 3, Table::Indirect),
    },
    Interface {
        name: "Xen, pages that are copied",
        connect: |served| xen(served, DataPath::Copy, Abi::X86_64, Table::Ring),
    },
    Interface {
        name: "Xen, pages that are mapped, indirect requests, 32 bits",
        connect: |served| xen(served, DataPath::Map, Abi::X86_32, Table::Indirect),
    },
];

fn nbd(served: &Served, style: Style) -> Box<dyn Asker> {
    Box::new(Nbd(Client::connect(&served.nbd(), style).unwrap()))
}

struct Nbd(Client);

impl Asker for Nbd {
    fn send(&mut self, question: &Question) -> u64 {
        let request = match question {
            Question::Read(at, len) => NbdRequest::read(*at, *len as u64),
            Question::Write(at, bytes) => NbdRequest::write(*at, bytes),
            Question::Zeroes(at, len) => NbdRequest::zeroes(*at, *len),
            Question::Discard(at, len) => NbdRequest::trim(*at, *len),
            Question::Flush => NbdRequest::flush(),
        };
        self.0.send(&request).unwrap()
    }

    fn wait(&mut self, name: u64) -> Told {
        let answer = self.0.wait(name).expect("an answer");
        answer.map(|payload| payload.bytes).map_err(|errno| errno.0)
    }

    /// NBD's own numbers ("Error values"); all that it has none for is 5.
    fn number(&self, errno: Errno, _kind: OpKind) -> u32 {
        match errno {
            Errno::EPERM | Errno::EACCES | Errno::EROFS => 1,
            // 95 (ENOTSUP) is an answer to a request for fast zeroes alone.
            Errno::EINVAL | Errno::EOPNOTSUPP => 22,
            Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG => 28,
            Errno::ESHUTDOWN => 108,
            _ => 5,
        }
    }

    fn refusal(&self, refused: Refused, kind: OpKind) -> u32 {
        match (refused, kind) {
            (Refused::ReadOnly, _) => 1,
            (Refused::BeyondTheEnd, OpKind::Write | OpKind::WriteZeroes) => 28,
            (Refused::BeyondTheEnd, _) => 22,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Table {
    Ring,
    Indirect,
}

fn virtio(served: &Served, features: u64, regions: usize, table: Table) -> Box<dyn Asker> {
    let wish = Wish { features, regions, queues: 2, ..Wish::default() };
    let driver = Driver::connect(&served.vhost(), &wish).unwrap();
    Box::new(Virtio { driver, table, open: Vec::new() })
}

struct Virtio {
    driver: Driver,
    table: Table,
    /// The name of an answer is the place here of what it belongs to, and the status and bytes that are expected.
    open: Vec<(Ticket, OpKind, usize)>,
}

impl Asker for Virtio {
    fn send(&mut self, question: &Question) -> u64 {
        let (request, room) = match question {
            Question::Read(at, len) => (Request::read(*at, *len), *len),
            Question::Write(at, bytes) => (Request::write(*at, bytes), 0),
            Question::Zeroes(at, len) => (Request::zeroes(*at, *len, true), 0),
            Question::Discard(at, len) => (Request::discard(*at, *len), 0),
            Question::Flush => (Request::flush(), 0),
        };
        let request = if self.table == Table::Indirect { request.indirect() } else { request };
        let name = self.open.len();
        let ticket = self.driver.send(name % 2, &request).unwrap();
        self.open.push((ticket, question.kind(), room));
        name as u64
    }

    fn wait(&mut self, name: u64) -> Told {
        let (ticket, kind, room) = self.open[name as usize];
        let answer = self.driver.wait(ticket).expect("an answer");
        match answer.status {
            Status::OK => {
                assert_eq!(answer.used as usize, room + 1, "{kind:?}: what was read, and the status");
                Ok(answer.bytes)
            }
            Status(number) => {
                assert_eq!(answer.used, 1, "{kind:?}: only the status was written");
                Err(number.into())
            }
        }
    }

    /// VIRTIO_BLK_S_IOERR, or UNSUPP for what a disk may be unable to do.
    fn number(&self, errno: Errno, kind: OpKind) -> u32 {
        match (errno, kind) {
            (Errno::EOPNOTSUPP, OpKind::Discard | OpKind::WriteZeroes) => 2,
            _ => 1,
        }
    }

    fn refusal(&self, refused: Refused, kind: OpKind) -> u32 {
        match (refused, kind) {
            // A disk that is read-only does not offer them.
            (Refused::ReadOnly, OpKind::Discard | OpKind::WriteZeroes) => 2,
            (Refused::ReadOnly | Refused::BeyondTheEnd, _) => 1,
        }
    }
}

fn xen(served: &Served, data: DataPath, abi: Abi, table: Table) -> Box<dyn Asker> {
    let wish = blkfront::Wish { abi, queues: 2, order: 1, ..blkfront::Wish::default() };
    Box::new(Xen { front: served.xen(data, &wish), table, open: Vec::new() })
}

struct Xen {
    front: Front,
    table: Table,
    /// The name of an answer is the place here of what it belongs to.
    open: Vec<blkfront::Ticket>,
}

impl Asker for Xen {
    fn send(&mut self, question: &Question) -> u64 {
        use blkfront::Request;
        let request = match question {
            Question::Read(at, len) => Request::read(at / 512, *len),
            Question::Write(at, bytes) => Request::write(at / 512, bytes),
            Question::Zeroes(at, len) => Request::write(at / 512, &vec![0; *len as usize]),
            Question::Discard(at, len) => Request::discard(at / 512, len / 512),
            Question::Flush => Request::flush(),
        };
        let pages = match question {
            Question::Read(_, len) => len.div_ceil(4096),
            Question::Write(_, bytes) => bytes.len().div_ceil(4096),
            Question::Zeroes(_, len) => len.div_ceil(4096) as usize,
            // These have no pages, and so no table of them.
            Question::Discard(..) | Question::Flush => 0,
        };
        let must = pages > blkfront::SEGMENTS_MAX;
        let is_indirect = must || pages > 0 && self.table == Table::Indirect;
        let request = if is_indirect { request.indirect() } else { request };
        let name = self.open.len();
        self.open.push(self.front.driver.send(name % 2, &request).unwrap());
        name as u64
    }

    fn wait(&mut self, name: u64) -> Told {
        let answer = self.front.driver.wait(self.open[name as usize]).expect("an answer");
        match answer.status {
            blkfront::status::OKAY => Ok(answer.bytes),
            status => Err(status.unsigned_abs().into()),
        }
    }

    /// BLKIF_RSP_ERROR, EOPNOTSUPP for what a disk may be unable to do, and of a flush what Linux does not take for success.
    fn number(&self, errno: Errno, kind: OpKind) -> u32 {
        match (errno, kind) {
            (Errno::EOPNOTSUPP, OpKind::Discard) => 2,
            (_, OpKind::Flush) => 3,
            _ => 1,
        }
    }

    fn refusal(&self, refused: Refused, kind: OpKind) -> u32 {
        match (refused, kind) {
            // A disk that is read-only does not offer it.
            (Refused::ReadOnly, OpKind::Discard) => 2,
            (Refused::ReadOnly | Refused::BeyondTheEnd, _) => 1,
        }
    }

    /// There is no request for zeroes.
    fn arrives_as(&self, kind: OpKind) -> OpKind {
        if kind == OpKind::WriteZeroes { OpKind::Write } else { kind }
    }
}
