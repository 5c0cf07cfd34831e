//! Power cuts: what was flushed is there afterwards, what was not may be there or not, and nothing else.

use std::collections::HashMap;

use faultfs::{FaultFs, Options};
use nbd_client::{Client, Request, Style};

use crate::server::{Ask, CACHES, Server};

const SECTOR: u64 = 512;
/// Few sectors, so that they are written again and again.
const SECTORS: u64 = 512;

/// Numbers that depend on the seed alone (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
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

struct Workload {
    sectors: Vec<Sector>,
    clients: Vec<Client>,
    sent: Vec<HashMap<u64, (Sent, Vec<usize>)>>,
    random: Random,
    writings: u64,
}

impl Workload {
    fn new(server: &Server<'_>, seed: u64) -> Workload {
        let style = |number| if number % 2 == 0 { Style::Simple } else { Style::Structured };
        let fresh = || Sector { values: vec![0], answered: 0, floor: 0, is_busy: false };
        Workload {
            sectors: (0..SECTORS).map(|_| fresh()).collect(),
            clients: (0..3).map(|number| server.client(style(number))).collect(),
            sent: (0..3).map(|_| HashMap::new()).collect(),
            random: Random(seed * 2 + 1),
            writings: 0,
        }
    }

    fn step(&mut self) {
        let number = self.random.below(self.clients.len() as u64) as usize;
        if self.clients[number].open() >= 8 || (self.random.below(3) == 0 && self.clients[number].open() > 0)
        {
            return self.receive(number);
        }
        if self.random.below(12) == 0 {
            // A flush covers what was answered, on any connection, before it is sent.
            let covered = self.sectors.iter().map(|sector| sector.answered).collect();
            let cookie = self.clients[number].send(&Request::flush()).unwrap();
            self.sent[number].insert(cookie, (Sent::Flush, covered));
            return;
        }
        let from = self.random.below(SECTORS);
        let to = (from + 1 + self.random.below(24)).min(SECTORS);
        let range = from as usize..to as usize;
        if self.sectors[range.clone()].iter().any(|sector| sector.is_busy) {
            return;
        }
        let fua = self.random.below(8) == 0;
        let is_zero = self.random.below(6) == 0;
        self.writings += 1;
        let value = if is_zero { 0 } else { self.writings };
        for sector in &mut self.sectors[range] {
            sector.values.push(value);
            sector.is_busy = true;
        }
        let payload = value.to_be_bytes().repeat(((to - from) * SECTOR / 8) as usize);
        let request = match is_zero {
            true => Request::zeroes(from * SECTOR, (to - from) * SECTOR),
            false => Request::write(from * SECTOR, &payload),
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
                    }
                }
            }
            Sent::Flush => {
                for (sector, covered) in self.sectors.iter_mut().zip(covered) {
                    sector.floor = sector.floor.max(covered);
                }
            }
        }
    }

    /// Compares with what a server of the remains reads.
    fn check(&self, client: &mut Client, what: &str) -> u64 {
        let mut lost = 0;
        let bytes = client.read(0, SECTORS * SECTOR).unwrap();
        for (number, (sector, found)) in self.sectors.iter().zip(bytes.chunks(SECTOR as usize)).enumerate() {
            let value = u64::from_be_bytes(found[..8].try_into().unwrap());
            assert!(
                found.chunks(8).all(|word| word == value.to_be_bytes()),
                "{what}: sector {number} is torn"
            );
            let allowed = &sector.values[sector.floor..];
            assert!(
                allowed.contains(&value),
                "{what}: sector {number} holds {value}, allowed are {allowed:?}"
            );
            lost += u64::from(value != sector.values[sector.answered]);
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
