//! Power cuts: what was flushed is there afterwards, what was not may be there or not, and nothing else.

use std::collections::HashMap;

use faultfs::{FaultFs, Options};
use nbd_client::{Client, Request, Style};

use crate::server::{Ask, CACHES, Server};

const SECTOR: u64 = 512;
/// Sectors that lie next to each other.
const GROUP: u64 = 32;

/// Numbers that depend on the seed alone (xorshift64*).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}

/// What one sector may hold: the values written to it in turn, of which those before `floor` are gone for good.
struct Sector {
    values: Vec<u64>,
    /// The last value whose write was answered.
    answered: usize,
    /// The last value that is surely durable.
    floor: usize,
    /// Values that a server had begun to write when it died. Its successor shows an older one, by what it knows of the map;
    /// until that is durable, who knows nothing of it may find one of these.
    begun: Vec<u64>,
    /// A write or zeroing of it is not answered: no second one is sent, so that the order is known.
    is_busy: bool,
}

#[derive(Clone, Copy)]
enum Sent {
    /// Sectors from, to, and whether they are durable when it is answered.
    Change {
        from: u64,
        to: u64,
        fua: bool,
    },
    Flush,
}

/// What is written where, and how often it is made durable.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    /// How many sectors; few of them are written again and again.
    pub(crate) sectors: u64,
    /// Bytes from the first of a group of sectors to the first of the next one.
    pub(crate) spread: u64,
    /// One request of so many is a flush.
    pub(crate) flush: u64,
    /// One write of so many is to be durable when it is answered.
    pub(crate) fua: u64,
}

impl Shape {
    /// Sectors of a small disk, one next to the other.
    const SMALL: Shape = Shape { sectors: 512, spread: GROUP * SECTOR, flush: 12, fua: 8 };

    fn at(&self, sector: u64) -> u64 {
        sector / GROUP * self.spread + sector % GROUP * SECTOR
    }
}

/// Clients that write, and what the disk may hold after that.
pub(crate) struct Workload {
    shape: Shape,
    sectors: Vec<Sector>,
    clients: Vec<Client>,
    sent: Vec<HashMap<u64, (Sent, Vec<usize>)>>,
    random: Random,
    writings: u64,
}

impl Workload {
    fn new(server: &Server<'_>, seed: u64) -> Workload {
        let mut workload = Workload::on_zeroes(Shape::SMALL, seed);
        workload.connect(server);
        workload
    }

    /// On a disk of zeroes, without a client yet.
    pub(crate) fn on_zeroes(shape: Shape, seed: u64) -> Workload {
        let fresh = || Sector { values: vec![0], answered: 0, floor: 0, begun: Vec::new(), is_busy: false };
        Workload {
            shape,
            sectors: (0..shape.sectors).map(|_| fresh()).collect(),
            clients: Vec::new(),
            sent: (0..3).map(|_| HashMap::new()).collect(),
            random: Random(seed * 2 + 1),
            writings: 0,
        }
    }

    pub(crate) fn connect(&mut self, server: &Server<'_>) {
        let style = |number| if number % 2 == 0 { Style::Simple } else { Style::Structured };
        self.clients = (0..3).map(|number| server.client(style(number))).collect();
    }

    /// The server died: what has no answer gets none.
    pub(crate) fn lose_clients(&mut self) {
        self.clients.clear();
        self.sent.iter_mut().for_each(HashMap::clear);
        self.sectors.iter_mut().for_each(|sector| sector.is_busy = false);
    }

    /// What was answered must be there from now on, wherever the server dies.
    pub(crate) fn expect_answered(&mut self) -> Vec<usize> {
        let expect = |sector: &mut Sector| std::mem::replace(&mut sector.floor, sector.answered);
        self.sectors.iter_mut().map(expect).collect()
    }

    /// What the disk holds is what was written to it last. It is durable as far as it was before.
    pub(crate) fn take_as_it_is(&mut self, client: &mut Client, floors: Vec<usize>) {
        let groups = self.sectors.chunks_mut(GROUP as usize).zip(floors.chunks(GROUP as usize));
        for (group, (sectors, floors)) in groups.enumerate() {
            let len = sectors.len() as u64 * SECTOR;
            let bytes = client.read(group as u64 * self.shape.spread, len).unwrap();
            for ((sector, floor), found) in sectors.iter_mut().zip(floors).zip(bytes.chunks(SECTOR as usize))
            {
                let value = u64::from_be_bytes(found[..8].try_into().unwrap());
                let last =
                    sector.values.iter().rposition(|written| *written == value).expect("it was checked");
                sector.begun.extend(sector.values.drain(last + 1..));
                sector.answered = last;
                sector.floor = (*floor).min(last);
            }
        }
    }

    pub(crate) fn step(&mut self) {
        let number = self.random.below(self.clients.len() as u64) as usize;
        if self.clients[number].open() >= 8 || (self.random.below(3) == 0 && self.clients[number].open() > 0)
        {
            return self.receive(number);
        }
        if self.random.below(self.shape.flush) == 0 {
            // A flush covers what was answered, on any connection, before it is sent.
            let covered = self.sectors.iter().map(|sector| sector.answered).collect();
            let cookie = self.clients[number].send(&Request::flush()).unwrap();
            self.sent[number].insert(cookie, (Sent::Flush, covered));
            return;
        }
        let from = self.random.below(self.shape.sectors);
        let mut to = (from + 1 + self.random.below(24)).min(self.shape.sectors);
        if self.shape.spread > GROUP * SECTOR {
            to = to.min((from / GROUP + 1) * GROUP);
        }
        let range = from as usize..to as usize;
        if self.sectors[range.clone()].iter().any(|sector| sector.is_busy) {
            return;
        }
        let fua = self.random.below(self.shape.fua) == 0;
        let is_zero = self.random.below(6) == 0;
        self.writings += 1;
        let value = if is_zero { 0 } else { self.writings };
        for sector in &mut self.sectors[range] {
            sector.values.push(value);
            sector.is_busy = true;
        }
        let payload = value.to_be_bytes().repeat(((to - from) * SECTOR / 8) as usize);
        let request = match is_zero {
            true => Request::zeroes(self.shape.at(from), (to - from) * SECTOR),
            false => Request::write(self.shape.at(from), &payload),
        };
        let cookie = self.clients[number].send(&if fua { request.fua() } else { request }).unwrap();
        self.sent[number].insert(cookie, (Sent::Change { from, to, fua }, Vec::new()));
    }

    fn receive(&mut self, number: usize) {
        let (cookie, answer) = self.clients[number].receive().unwrap();
        answer.expect("nothing fails here");
        let (sent, covered) = self.sent[number].remove(&cookie).expect("it was sent");
        match sent {
            Sent::Change { from, to, fua } => {
                for sector in &mut self.sectors[from as usize..to as usize] {
                    sector.is_busy = false;
                    sector.answered = sector.values.len() - 1;
                    if fua {
                        sector.floor = sector.answered;
                        sector.begun.clear();
                    }
                }
            }
            Sent::Flush => {
                for (sector, covered) in self.sectors.iter_mut().zip(covered) {
                    sector.floor = sector.floor.max(covered);
                    sector.begun.clear();
                }
            }
        }
    }

    /// Compares with what a server of the remains reads; gives how many sectors have lost what was answered for them.
    pub(crate) fn check(&self, client: &mut Client, what: &str) -> u64 {
        self.compare(what, |_| &[], |at, len| client.read(at, len).unwrap().0)
    }

    /// The same, with bytes as they are in the image for whoever knows nothing of its ledger.
    pub(crate) fn check_without_ledger(&self, what: &str, read: impl FnMut(u64, u64) -> Vec<u8>) -> u64 {
        self.compare(what, |sector| &sector.begun, read)
    }

    fn compare(
        &self,
        what: &str,
        also: impl Fn(&Sector) -> &[u64],
        mut read: impl FnMut(u64, u64) -> Vec<u8>,
    ) -> u64 {
        let mut lost = 0;
        for (group, sectors) in self.sectors.chunks(GROUP as usize).enumerate() {
            let bytes = read(group as u64 * self.shape.spread, sectors.len() as u64 * SECTOR);
            for (number, (sector, found)) in sectors.iter().zip(bytes.chunks(SECTOR as usize)).enumerate() {
                let number = group * GROUP as usize + number;
                let value = u64::from_be_bytes(found[..8].try_into().unwrap());
                assert!(
                    found.chunks(8).all(|word| word == value.to_be_bytes()),
                    "{what}: sector {number} is torn"
                );
                let (allowed, also) = (&sector.values[sector.floor..], also(sector));
                assert!(
                    allowed.contains(&value) || also.contains(&value),
                    "{what}: sector {number} holds {value}, allowed are {allowed:?} and {also:?}"
                );
                lost += u64::from(value != sector.values[sector.answered]);
            }
        }
        lost
    }
}

fn cut_and_check(fs: &FaultFs, cache: &str, seed: u64, is_killed_first: bool) -> u64 {
    let server = Server::on(fs, &["--cache", cache]);
    let mut workload = Workload::new(&server, seed);
    for _ in 0..400 {
        workload.step();
    }
    if is_killed_first {
        server.kill();
        fs.power_cut(Some(seed));
    } else {
        fs.power_cut(Some(seed));
        server.kill();
    }
    let server = Server::on(fs, &["--cache", cache]);
    let what = format!("{cache}, seed {seed}, killed first: {is_killed_first}");
    let lost = workload.check(&mut server.client(Style::Structured), &what);
    assert!(server.stop().status.success());
    lost
}

#[test]
fn what_was_flushed_is_there_after_a_power_cut_and_the_rest_is_old_or_new() {
    let mut lost = 0;
    for cache in CACHES {
        for seed in 1..=6 {
            // Blocks of 4096 bytes make writes of sectors read, change and write whole blocks under O_DIRECT.
            let sector_bytes = if seed % 2 == 0 { 4096 } else { 512 };
            let options = Options { async_direct_io: true, sector_bytes, ..Options::default() };
            let Some(fs) = faultfs::mount_for_test(options) else { return };
            lost += cut_and_check(&fs, cache, seed, seed % 3 == 0);
        }
    }
    assert!(lost > 0, "a power cut that takes nothing away proves nothing");
}

#[test]
fn what_was_answered_before_a_crash_of_the_server_alone_is_there() {
    let Some(fs) = faultfs::mount_for_test(Options { async_direct_io: true, ..Options::default() }) else {
        return;
    };
    let server = Server::on(&fs, &[]);
    let mut workload = Workload::new(&server, 99);
    for _ in 0..300 {
        workload.step();
    }
    server.kill();
    for sector in &mut workload.sectors {
        sector.floor = sector.answered;
    }
    let server = Server::on(&fs, &[]);
    workload.check(&mut server.client(Style::Simple), "killed");
}
