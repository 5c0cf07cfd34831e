//! A driver of a disk behind a back end: rings, requests, and answers that are waited for.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use xen::PAGE;
use xen::events::Port;
use xen::fake::Guest;
use xen::grants::{Access, GrantRef};

use crate::abi::Abi;
use crate::pages::{Page, Pages};
use crate::request::{Request, SECTOR, Segment, TABLE_LEN};
use crate::ring::Ring;
use crate::{Error, Result};

/// What room for data holds before the back end writes it, and what is around it for ever.
pub const UNWRITTEN: u8 = 0xdd;

/// How a driver is to be.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Whose layout of bytes.
    pub abi: Abi,
    /// Pages of each ring: 2 to the power of this.
    pub order: u32,
    /// Rings.
    pub queues: usize,
    /// Whether pages stay granted and are used again and again.
    pub persistent: bool,
    /// Where the counters of rings begin.
    pub begin_at: u32,
    /// How long anything may take.
    pub patience: Duration,
}

impl Default for Wish {
    /// As Linux on x86_64: one ring of one page, the pages of requests granted for each.
    fn default() -> Wish {
        let (abi, patience) = (Abi::X86_64, Duration::from_secs(60));
        Wish { abi, order: 0, queues: 1, persistent: false, begin_at: 0, patience }
    }
}

/// What the back end is told of a ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingSpec {
    /// Its pages, in order.
    pub refs: Vec<GrantRef>,
    /// The event channel of it.
    pub port: Port,
}

/// The name of a request that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// What a request was answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How it ended, as in [`crate::status`].
    pub status: i16,
    /// What is in the memory for what was to be read.
    pub bytes: Vec<u8>,
}

/// A disk's driver, with rings in a guest's memory.
pub struct Driver {
    guest: Guest,
    wish: Wish,
    pages: Pages,
    queues: Vec<Queue>,
    tickets: u64,
    /// Answers that came while another was waited for.
    early: HashMap<Ticket, Answer>,
}

struct Queue {
    ring: Ring,
    pages: Vec<Page>,
    port: Port,
    open: Vec<Open>,
}

/// A request without an answer.
struct Open {
    ticket: Ticket,
    id: u64,
    echo: u8,
    is_read: bool,
    /// What is in each of its pages, and which part of that is its data.
    data: Vec<(Page, Vec<u8>, std::ops::Range<usize>)>,
    tables: Vec<Page>,
}

impl Driver {
    /// Sets up rings. All of the guest's memory is the driver's.
    pub fn new(guest: Guest, wish: &Wish) -> Result<Driver> {
        let mut pages = Pages::new(guest.clone(), wish.persistent);
        let mut queues = Vec::new();
        for _ in 0..wish.queues {
            let of_ring: Result<Vec<Page>> =
                (0..1 << wish.order).map(|_| pages.take(Access::Write)).collect();
            let of_ring = of_ring?;
            let numbers = of_ring.iter().map(|page| page.number).collect();
            let mut ring = Ring::new(guest.clone(), numbers, wish.abi);
            ring.begin_at(wish.begin_at);
            queues.push(Queue { ring, pages: of_ring, port: guest.offer(), open: Vec::new() });
        }
        Ok(Driver { guest, wish: wish.clone(), pages, queues, tickets: 0, early: HashMap::new() })
    }

    /// The guest that it runs in.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// How it was wished for.
    pub fn wish(&self) -> &Wish {
        &self.wish
    }

    /// What a back end has to know.
    pub fn specs(&self) -> Vec<RingSpec> {
        let spec = |queue: &Queue| RingSpec {
            refs: queue.pages.iter().map(|page| page.gref).collect(),
            port: queue.port,
        };
        self.queues.iter().map(spec).collect()
    }

    /// Keeps pages granted from now on, or not; before the first request.
    pub fn set_persistent(&mut self, is_persistent: bool) {
        self.wish.persistent = is_persistent;
        self.pages.set_persistent(is_persistent);
    }

    /// A ring, for what no request can say.
    pub fn ring(&mut self, queue: usize) -> &mut Ring {
        &mut self.queues[queue].ring
    }

    /// Tells the back end to look at a ring, whether it wants to be told or not.
    pub fn kick(&self, queue: usize) {
        self.guest.ring(self.queues[queue].port);
    }

    /// How often the back end has rung since this was last asked, other than while an answer was waited for.
    pub fn calls(&self, queue: usize) -> u64 {
        self.guest.rung(self.queues[queue].port)
    }

    /// Requests without an answer.
    pub fn open(&mut self) -> Result<usize> {
        self.collect()?;
        Ok(self.queues.iter().map(|queue| queue.open.len()).sum())
    }

    /// Whether a ring has no room for another request.
    pub fn is_full(&mut self, queue: usize) -> Result<bool> {
        self.collect()?;
        Ok(self.queues[queue].ring.is_full())
    }

    /// Makes a request, and tells the back end of it if it wants that.
    pub fn send(&mut self, queue: usize, request: &Request) -> Result<Ticket> {
        let ticket = self.prepare(queue, request)?;
        self.publish(queue);
        Ok(ticket)
    }

    /// Shows the back end what was prepared.
    pub fn publish(&mut self, queue: usize) {
        let queue = &mut self.queues[queue];
        if queue.ring.publish() {
            self.guest.ring(queue.port);
        }
    }

    /// Makes a request that the back end does not see yet. Waits for an answer if the ring is full.
    pub fn prepare(&mut self, queue: usize, request: &Request) -> Result<Ticket> {
        let due = Instant::now() + self.wish.patience;
        while self.queues[queue].ring.is_full() {
            self.collect()?;
            if self.queues[queue].ring.is_full() {
                self.listen(queue, due)?;
            }
        }
        let (mut data, mut segments) = (Vec::new(), Vec::new());
        let mut from = 0;
        let access = if request.is_read() { Access::Write } else { Access::Read };
        for (first, last) in request.segments() {
            let page = self.pages.take_for_data(access)?;
            let mut content = vec![UNWRITTEN; PAGE];
            // A segment that makes no sense has no data.
            let start = (usize::from(first) * SECTOR).min(PAGE);
            let end = ((usize::from(last) + 1) * SECTOR).clamp(start, PAGE).min(start + request.len() - from);
            if !request.is_read() {
                content[start..end].copy_from_slice(&request.out[from..from + end - start]);
            }
            from += end - start;
            self.guest.write(page.number * PAGE, &content);
            data.push((page, content, start..end));
            segments.push(Segment { gref: page.gref, first, last });
        }
        let mut tables = Vec::new();
        if request.is_indirect {
            for part in segments.chunks(TABLE_LEN) {
                let page = self.pages.take_for_data(Access::Read)?;
                let bytes: Vec<u8> = part.iter().flat_map(|segment| segment.bytes()).collect();
                self.guest.write(page.number * PAGE, &bytes);
                tables.push(page);
            }
        }
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        // No two alike, and all of the 64 bits are used.
        let id = request.id.unwrap_or(self.tickets.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let refs: Vec<GrantRef> = tables.iter().map(|page| page.gref).collect();
        let bytes = request.bytes(self.wish.abi, id, &segments, &refs);
        let (echo, is_read) = (request.echo(), request.is_read());
        let queue = &mut self.queues[queue];
        queue.ring.offer(&bytes);
        queue.open.push(Open { ticket, id, echo, is_read, data, tables });
        Ok(ticket)
    }

    /// Puts any bytes into a ring as a request; who answers it answers what nobody asked.
    pub fn offer_raw(&mut self, queue: usize, bytes: &[u8]) {
        self.queues[queue].ring.offer(bytes);
        self.publish(queue);
    }

    /// Makes a request and waits for its answer.
    pub fn ask(&mut self, request: &Request) -> Result<Answer> {
        let ticket = self.send(0, request)?;
        self.wait(ticket)
    }

    /// Waits for the answer of a request. The back end has to ring for it.
    pub fn wait(&mut self, ticket: Ticket) -> Result<Answer> {
        let due = Instant::now() + self.wish.patience;
        loop {
            self.collect()?;
            if let Some(answer) = self.early.remove(&ticket) {
                return Ok(answer);
            }
            let is_there = |queue: &Queue| queue.open.iter().any(|open| open.ticket == ticket);
            let queue = self.queues.iter().position(is_there).ok_or("no such request is open")?;
            self.listen(queue, due)?;
        }
    }

    /// Waits for the answers of all these, in their order.
    pub fn wait_all(&mut self, tickets: &[Ticket]) -> Result<Vec<Answer>> {
        tickets.iter().map(|ticket| self.wait(*ticket)).collect()
    }

    /// Waits until a back end rings, unless there is an answer already.
    fn listen(&self, queue: usize, due: Instant) -> Result<()> {
        let queue = &self.queues[queue];
        if queue.ring.arm() {
            return Ok(());
        }
        let left = due.saturating_duration_since(Instant::now());
        if self.guest.wait(queue.port, left) > 0 {
            return Ok(());
        }
        match queue.ring.arm() {
            true => Err("the back end has answered and does not ring".into()),
            false => Err("the back end does not answer".into()),
        }
    }

    /// Takes the answers that are there.
    fn collect(&mut self) -> Result<()> {
        for queue in &mut self.queues {
            while let Some((id, operation, status)) = queue.ring.take()? {
                let found = queue.open.iter().position(|open| open.id == id);
                let nth =
                    found.ok_or_else(|| Error::from(format!("an answer to {id:#x}, which nobody asked")))?;
                let open = queue.open.remove(nth);
                if operation != open.echo {
                    return Err(format!("operation {} is answered as {operation}", open.echo).into());
                }
                let bytes = finish(&self.guest, &mut self.pages, &open)?;
                self.early.insert(open.ticket, Answer { status, bytes });
            }
        }
        Ok(())
    }

    /// Ends everything, once the back end has let go of it: of the rings and of all pages that stayed granted.
    pub fn close(mut self) -> Result<()> {
        self.collect()?;
        for queue in std::mem::take(&mut self.queues) {
            self.guest.close(queue.port);
            for open in queue.open {
                for page in open.data.iter().map(|(page, ..)| page).chain(&open.tables) {
                    self.pages.give_back(*page)?;
                }
            }
            for page in queue.pages {
                self.pages.give_back(page)?;
            }
        }
        self.pages.forget_kept()
    }
}

/// Takes the pages of an answered request back; what was read into them.
fn finish(guest: &Guest, pages: &mut Pages, open: &Open) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for (page, before, range) in &open.data {
        let now = guest.read(page.number * PAGE, PAGE);
        let is_same = |range: std::ops::Range<usize>| now[range.clone()] == before[range];
        if !is_same(0..range.start) || !is_same(range.end..PAGE) {
            return Err(format!("the back end has written around sectors of page {}", page.number).into());
        }
        if open.is_read {
            bytes.extend(&now[range.clone()]);
        } else if !is_same(range.clone()) {
            return Err(format!("the back end has written page {}, which it was to read", page.number).into());
        }
        pages.give_back_data(*page)?;
    }
    for page in &open.tables {
        pages.give_back_data(*page)?;
    }
    Ok(bytes)
}
