//! A driver of a virtio-blk device behind a back end: it sets up memory and queues, asks, and waits for answers.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::poll::{PollContext, WatchingEvents};

use crate::arena::Arena;
use crate::config::{Config, WRITEBACK_AT};
use crate::link::{Link, feature};
use crate::request::{Answer, Request, Status, lengths};
use crate::ring::{DESCRIPTOR_LEN, INDIRECT, NEXT, Piece, Ring, WRITE, descriptor};
use crate::{Memory, Result};

/// How a driver is to be.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Queues.
    pub queues: u16,
    /// Descriptors of each queue.
    pub queue_len: u16,
    /// Features to take if they are offered.
    pub features: u64,
    /// Whether the back end is to record what it has taken and not answered.
    pub inflight: bool,
    /// Regions of memory; the pieces of a request are spread over them.
    pub regions: usize,
    /// Bytes of each region.
    pub region_len: u64,
    /// Whether regions are told one by one (`ADD_MEM_REG`) and not in a table (`SET_MEM_TABLE`).
    pub slots: bool,
    /// Whether the configuration is read first, as monitors do when they start; never again after that.
    pub reads_config: bool,
    /// How long anything may take.
    pub patience: Duration,
}

impl Default for Wish {
    /// One queue of 128, one region of 16 MiB, what Linux takes, no record, the configuration is read, a minute.
    fn default() -> Wish {
        Wish {
            queues: 1,
            queue_len: 128,
            features: feature::LINUX,
            inflight: false,
            regions: 1,
            region_len: 16 << 20,
            slots: true,
            reads_config: true,
            patience: Duration::from_secs(60),
        }
    }
}

/// The name of a request that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// A device that is set up.
pub struct Driver {
    /// The connection.
    pub link: Link,
    wish: Wish,
    regions: Vec<Region>,
    queues: Vec<Queue>,
    inflight: Option<(VhostUserInflight, File)>,
    /// Where the back end says that it has stopped a ring.
    failure: EventFd,
    tickets: u64,
    /// Answers that came while another was waited for.
    early: HashMap<Ticket, Answer>,
}

struct Region {
    memory: Arc<Memory>,
    /// Where the guest has it.
    guest: u64,
    /// Where it begins in its file.
    offset: u64,
    arena: Arena,
}

struct Queue {
    ring: Ring,
    kick: EventFd,
    call: EventFd,
    /// What is not answered, by head.
    open: HashMap<u16, Open>,
}

/// A request that is not answered.
struct Open {
    ticket: Ticket,
    descriptors: Vec<u16>,
    /// What it occupies: a table of descriptors, pieces that the device reads, and pieces that it writes.
    places: Vec<Place>,
    /// How many of the last places the device writes.
    written: usize,
}

/// Bytes in a region.
#[derive(Clone, Copy)]
struct Place {
    region: usize,
    at: u64,
    len: u64,
}

/// Regions begin somewhere in their files: a back end must look at that.
const FILE_OFFSET: u64 = 8192;
/// What room for data holds before the device writes it.
pub const UNWRITTEN: u8 = 0xdd;

impl Driver {
    /// Connects and sets up everything.
    pub fn connect(socket: &Path, wish: &Wish) -> Result<Driver> {
        let mut link = Link::connect(socket, wish.queues, wish.features, wish.patience)?;
        if wish.reads_config {
            link.config()?;
        }
        let mut regions = Vec::new();
        for number in 0..wish.regions {
            let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC)?;
            let file = File::from(file);
            let offset = number as u64 * FILE_OFFSET;
            file.set_len(offset + wish.region_len)?;
            let memory = Arc::new(Memory::of(file, offset, wish.region_len)?);
            // Far from each other, in falling order, and nowhere that this process has them.
            let guest = (wish.regions - number) as u64 * 0x1_0000_0000;
            regions.push(Region { memory, guest, offset, arena: Arena::new(0, wish.region_len) });
        }
        let has_event_idx = link.features() & feature::EVENT_IDX != 0;
        let mut queues = Vec::new();
        for _ in 0..wish.queues {
            let region = &mut regions[0];
            let at = region.arena.take(Ring::bytes(wish.queue_len), 4096, 0).ok_or("no room for a queue")?;
            let ring = Ring::new(region.memory.clone(), at, wish.queue_len, has_event_idx);
            let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
            queues.push(Queue { ring, kick, call, open: HashMap::new() });
        }
        let inflight = match wish.inflight {
            true => Some(link.make_inflight(wish.queues, wish.queue_len)?),
            false => None,
        };
        let (failure, tickets, early) = (EventFd::new(EFD_NONBLOCK)?, 0, HashMap::new());
        let mut driver =
            Driver { link, wish: wish.clone(), regions, queues, inflight, failure, tickets, early };
        driver.set_up()?;
        Ok(driver)
    }

    /// Connects again, to a back end that knows nothing of the one before but what the record says.
    pub fn reconnect(&mut self, socket: &Path) -> Result<()> {
        self.link.close()?;
        self.link = Link::connect(socket, self.wish.queues, self.wish.features, self.wish.patience)?;
        self.set_up()
    }

    /// Forgets all requests and sets everything up anew on the same connection, as another driver of the same guest:
    /// the firmware first, then the kernel, then a kernel that was booted anew.
    pub fn start_over(&mut self, features: u64) -> Result<()> {
        self.link.agree(features)?;
        let has_event_idx = self.link.features() & feature::EVENT_IDX != 0;
        for queue in &mut self.queues {
            for place in queue.open.drain().flat_map(|(_, open)| open.places) {
                self.regions[place.region].arena.give_back(place.at, place.len);
            }
            queue.ring.reset(has_event_idx);
        }
        if self.inflight.is_some() {
            self.inflight = Some(self.link.make_inflight(self.wish.queues, self.wish.queue_len)?);
        }
        // The memory is the monitor's and stays.
        self.set_record()?;
        self.set_rings()
    }

    /// Has the back end stop all rings and forget them (`RESET_DEVICE`).
    pub fn reset(&mut self) -> Result<()> {
        Ok(self.link.talk().reset_device()?)
    }

    /// Everything that a back end does not know yet.
    fn set_up(&mut self) -> Result<()> {
        self.set_record()?;
        self.share_memory()?;
        self.set_rings()
    }

    fn set_record(&mut self) -> Result<()> {
        if let Some((inflight, file)) = &self.inflight {
            self.link.talk().set_inflight_fd(inflight, file.as_raw_fd())?;
        }
        Ok(())
    }

    fn set_rings(&mut self) -> Result<()> {
        for number in 0..self.queues.len() {
            // Where the device stopped to answer: what it had taken before is in the record, if there is one.
            self.set_ring(number, self.queues[number].ring.used_index())?;
        }
        for number in 0..self.queues.len() {
            self.link.talk().set_vring_enable(number, true)?;
        }
        Ok(())
    }

    /// Tells the back end of the memory, again if it knows.
    pub fn share_memory(&mut self) -> Result<()> {
        let infos: Vec<_> = self.regions.iter().map(Region::info).collect();
        if self.wish.slots && self.link.protocol().contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            for info in infos {
                self.link.talk().add_mem_region(&info)?;
            }
        } else {
            self.link.talk().set_mem_table(&infos)?;
        }
        Ok(())
    }

    /// Replaces the table of regions by the same one, as a guest whose memory changes elsewhere does.
    pub fn replace_memory(&mut self) -> Result<()> {
        let infos: Vec<_> = self.regions.iter().map(Region::info).collect();
        self.link.talk().set_mem_table(&infos)?;
        Ok(())
    }

    /// Adds a region while the others are in use; its number.
    pub fn add_region(&mut self) -> Result<usize> {
        let memory = Arc::new(Memory::new(self.wish.region_len)?);
        let guest = (self.regions.len() as u64 + 1) * 0x1_0000_0000;
        let arena = Arena::new(0, self.wish.region_len);
        let region = Region { memory, guest, offset: 0, arena };
        self.link.talk().add_mem_region(&region.info())?;
        self.regions.push(region);
        Ok(self.regions.len() - 1)
    }

    /// Takes the region back that came last, and unmaps it here. Nothing may lie in it that a device is to write.
    pub fn remove_region(&mut self) -> Result<()> {
        let region = self.regions.pop().ok_or("no region")?;
        self.link.talk().remove_mem_region(&region.info())?;
        Ok(())
    }

    /// Sets up a ring, which the back end takes from `base` on, and lets it begin.
    pub fn start_ring(&mut self, queue: usize, base: u16) -> Result<()> {
        self.set_ring(queue, base)?;
        self.link.talk().set_vring_enable(queue, true)?;
        Ok(())
    }

    fn set_ring(&mut self, number: usize, base: u16) -> Result<()> {
        let queue = &self.queues[number];
        let [desc_table_addr, avail_ring_addr, used_ring_addr] = queue.ring.addresses();
        let config = VringConfigData {
            queue_max_size: queue.ring.len(),
            queue_size: queue.ring.len(),
            flags: 0,
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            log_addr: None,
        };
        let frontend = self.link.talk();
        frontend.set_vring_num(number, queue.ring.len())?;
        frontend.set_vring_base(number, base)?;
        frontend.set_vring_addr(number, &config)?;
        frontend.set_vring_kick(number, &queue.kick)?;
        frontend.set_vring_call(number, &queue.call)?;
        Ok(())
    }

    /// Stops a ring (`GET_VRING_BASE`); says from where on it would go on.
    pub fn stop_ring(&mut self, queue: usize) -> Result<u16> {
        Ok(self.link.talk().get_vring_base(queue)?.try_into()?)
    }

    /// Lets the back end look at a ring, or not (`SET_VRING_ENABLE`).
    pub fn enable(&mut self, queue: usize, is_on: bool) -> Result<()> {
        Ok(self.link.talk().set_vring_enable(queue, is_on)?)
    }

    /// How often the device has called since this was last asked, other than while an answer was waited for.
    pub fn calls(&self, queue: usize) -> Result<u64> {
        rings_of(&self.queues[queue].call)
    }

    /// Lets the back end say that it has stopped a ring (`SET_VRING_ERR`).
    pub fn listen_for_failures(&mut self, queue: usize) -> Result<()> {
        Ok(self.link.talk().set_vring_err(queue, &self.failure)?)
    }

    /// How often it has said so since this was last asked.
    pub fn failures(&self) -> Result<u64> {
        rings_of(&self.failure)
    }

    /// The head of a request that is not answered.
    pub fn head_of(&self, ticket: Ticket) -> Option<u16> {
        self.found(ticket).map(|(_, head)| head)
    }

    fn found(&self, ticket: Ticket) -> Option<(usize, u16)> {
        self.queues.iter().enumerate().find_map(|(number, queue)| {
            queue.open.iter().find(|(_, open)| open.ticket == ticket).map(|(head, _)| (number, *head))
        })
    }

    /// Says another address for a piece of a request that is prepared and whose descriptors are in the ring.
    pub fn move_piece(&mut self, ticket: Ticket, nth: usize, address: u64) -> Result<()> {
        let (number, head) = self.found(ticket).ok_or("no such request")?;
        let queue = &self.queues[number];
        let index = queue.open[&head].descriptors[nth];
        queue.ring.move_to(index, address);
        Ok(())
    }

    /// What the device says of itself.
    pub fn config(&mut self) -> Result<Config> {
        self.link.config()
    }

    /// Switches the device's write cache.
    pub fn set_writeback(&mut self, is_on: bool) -> Result<()> {
        self.link.set_config(WRITEBACK_AT, &[u8::from(is_on)])
    }

    /// The ring of a queue, for what no request can say.
    pub fn ring(&mut self, queue: usize) -> &mut Ring {
        &mut self.queues[queue].ring
    }

    /// Tells the device to look at a ring.
    pub fn kick(&self, queue: usize) -> Result<()> {
        Ok(self.queues[queue].kick.write(1)?)
    }

    /// Requests without an answer.
    pub fn open(&mut self) -> Result<usize> {
        self.collect()?;
        Ok(self.queues.iter().map(|queue| queue.open.len()).sum())
    }

    /// Makes a request, and tells the device of it.
    pub fn send(&mut self, queue: usize, request: &Request) -> Result<Ticket> {
        let ticket = self.prepare(queue, request)?;
        self.publish(queue)?;
        Ok(ticket)
    }

    /// Shows the device what was prepared, and kicks it if it wants that.
    pub fn publish(&mut self, queue: usize) -> Result<()> {
        let queue = &mut self.queues[queue];
        queue.ring.publish();
        if queue.ring.must_kick() {
            queue.kick.write(1)?;
        }
        Ok(())
    }

    /// Makes a request that the device does not see yet.
    pub fn prepare(&mut self, queue: usize, request: &Request) -> Result<Ticket> {
        let (mut places, mut pieces) = (Vec::new(), Vec::new());
        let mut from = 0;
        for len in lengths(&request.out_cuts, request.out.len()) {
            let place = self.place(places.len(), len, request.skew)?;
            self.regions[place.region].memory.put(place.at, &request.out[from..from + len]);
            places.push(place);
            pieces.push(self.piece(place, false));
            from += len;
        }
        let read = places.len();
        let mut fill = vec![UNWRITTEN; request.room];
        fill.push(Status::UNWRITTEN.0);
        let mut from = 0;
        for len in lengths(&request.in_cuts, fill.len()) {
            let place = self.place(places.len(), len, request.skew)?;
            self.regions[place.region].memory.put(place.at, &fill[from..from + len]);
            places.push(place);
            pieces.push(self.piece(place, true));
            from += len;
        }
        let written = places.len() - read;
        let chain = match request.is_indirect {
            false => pieces,
            true => {
                let table: Vec<u8> = chained(&pieces, |index| index as u16 + 1)
                    .flat_map(|(piece, flags, next)| descriptor(piece, flags, next))
                    .collect();
                let place = self.place(places.len(), table.len(), 0)?;
                self.regions[place.region].memory.put(place.at, &table);
                places.insert(0, place);
                vec![self.piece(place, false)]
            }
        };
        let queue = &mut self.queues[queue];
        let descriptors = queue.ring.take(chain.len()).ok_or("the ring is full")?;
        for (index, (piece, flags, next)) in chained(&chain, |index| descriptors[index + 1]).enumerate() {
            let flags = if request.is_indirect { INDIRECT } else { flags };
            queue.ring.describe(descriptors[index], piece, flags, next);
        }
        let head = descriptors[0];
        queue.ring.offer(head);
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        queue.open.insert(head, Open { ticket, descriptors, places, written });
        Ok(ticket)
    }

    /// Room for the nth piece of a request.
    fn place(&mut self, nth: usize, len: usize, skew: u64) -> Result<Place> {
        let region = nth % self.regions.len();
        let align = if len >= 512 { 512 } else { DESCRIPTOR_LEN };
        let at = self.regions[region].arena.take(len as u64, align, skew).ok_or("no room for data")?;
        Ok(Place { region, at, len: len as u64 })
    }

    fn piece(&self, place: Place, is_written: bool) -> Piece {
        let address = self.regions[place.region].guest + place.at;
        Piece { address, len: place.len as u32, is_written }
    }

    /// Waits for the answer to a request.
    pub fn wait(&mut self, ticket: Ticket) -> Result<Answer> {
        let limit = Instant::now() + self.wish.patience;
        loop {
            self.queues.iter().for_each(|queue| queue.ring.ask_for_a_call());
            if let Some(answer) = self.answer(ticket)? {
                return Ok(answer);
            }
            if self.is_left_alone()? {
                return self.answer(ticket)?.ok_or_else(|| "the back end has hung up".into());
            }
            if Instant::now() >= limit {
                return Err(format!("no answer in {:?}", self.wish.patience).into());
            }
        }
    }

    /// Waits for the answers to these requests; they are in the same order.
    pub fn wait_all(&mut self, tickets: &[Ticket]) -> Result<Vec<Answer>> {
        tickets.iter().map(|ticket| self.wait(*ticket)).collect()
    }

    /// The answer to a request, if it is there.
    pub fn answer(&mut self, ticket: Ticket) -> Result<Option<Answer>> {
        self.collect()?;
        Ok(self.early.remove(&ticket))
    }

    /// Asks and waits for the answer.
    pub fn ask(&mut self, request: &Request) -> Result<Answer> {
        let ticket = self.send(0, request)?;
        self.wait(ticket)
    }

    /// Waits a while for the device to call; true if the back end has hung up.
    fn is_left_alone(&self) -> Result<bool> {
        let (hung_up, calls) = (self.queues.len(), PollContext::<usize>::new()?);
        calls.add_fd_with_events(self.link.socket(), WatchingEvents::empty(), hung_up)?;
        for (number, queue) in self.queues.iter().enumerate() {
            calls.add(&queue.call, number)?;
        }
        let events = calls.wait_timeout(Duration::from_millis(200))?;
        let mut is_left_alone = false;
        for event in events.iter() {
            match self.queues.get(event.token()) {
                Some(queue) => drop(queue.call.read()?),
                None => is_left_alone = true,
            }
        }
        Ok(is_left_alone)
    }

    /// Takes all answers that are there.
    fn collect(&mut self) -> Result<()> {
        for queue in &mut self.queues {
            while let Some(used) = queue.ring.used() {
                let head = u16::try_from(used.id)?;
                let open = queue.open.remove(&head).ok_or_else(|| {
                    format!("an answer to what is not asked: {used:?}; answered before, or never asked")
                })?;
                let mut bytes = Vec::new();
                for place in &open.places[open.places.len() - open.written..] {
                    bytes.extend(self.regions[place.region].memory.get(place.at, place.len as usize));
                }
                let status = Status(bytes.pop().ok_or("a request without a status")?);
                for place in open.places {
                    // What the device only reads may lie in a region that is gone.
                    if let Some(region) = self.regions.get_mut(place.region) {
                        region.arena.give_back(place.at, place.len);
                    }
                }
                queue.ring.give_back(&open.descriptors);
                self.early.insert(open.ticket, Answer { status, used: used.len, bytes });
            }
        }
        Ok(())
    }
}

impl Region {
    fn info(&self) -> vhost::VhostUserMemoryRegionInfo {
        Link::region_info(&self.memory, self.guest, self.offset)
    }
}

/// How often an eventfd was written since it was last read.
fn rings_of(eventfd: &EventFd) -> Result<u64> {
    match eventfd.read() {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(0),
        count => Ok(count?),
    }
}

/// Pieces with their flags, each but the last with its successor.
fn chained(pieces: &[Piece], next: impl Fn(usize) -> u16) -> impl Iterator<Item = (Piece, u16, u16)> {
    pieces.iter().enumerate().map(move |(index, piece)| {
        let flags = if piece.is_written { WRITE } else { 0 };
        match index + 1 < pieces.len() {
            true => (*piece, flags | NEXT, next(index)),
            false => (*piece, flags, 0),
        }
    })
}
