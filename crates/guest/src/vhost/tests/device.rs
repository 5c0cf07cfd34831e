//! A whole device, set up as a front end does it, on a real io_uring.

use std::cell::Cell;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::fence;
use std::time::Duration;

use block::{Errno, OpKind, Pool};
use runtime::{Handle, RingFlags, Runtime, Uring};
use rustix::event::{EventfdFlags, eventfd};

use super::super::device::{Device, Settings, Violation};
use super::super::memory::RegionSpec;
use super::disk::{Handed, ModelDisk};
use super::driver::{Driver, header};
use super::ram::Ram;

const MIB: u64 = 1 << 20;
const FLUSH: u64 = 1 << 9;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT_DESC: u64 = 1 << 28;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;

/// Where tests put things in the guest's memory.
const RING: u64 = 0x1000;
const OTHER_RING: u64 = 0x4000;
const HEADER: u64 = 0x20000;
const DATA: u64 = 0x30000;
const STATUS: u64 = 0x28000;

fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Handle) -> F) {
    let pool = Pool::new(64 << 10);
    let uring = Uring::open(RingFlags::Auto, &pool).expect("these tests need io_uring");
    let runtime = Runtime::new(Box::new(uring), pool);
    let future = test(runtime.handle().clone());
    runtime.block_on(future);
    assert_eq!(runtime.handle().panics(), 0);
}

fn settings() -> Settings {
    Settings { name: "disk".into(), queues: 2, block: 512, id: "serial".into(), pin_memory: false }
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn ring_bell(bell: &OwnedFd) {
    rustix::io::write(bell, &1u64.to_ne_bytes()).unwrap();
}

/// How often it was rung since the last time.
fn rings(bell: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(bell, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(errno) => {
            assert_eq!(errno, rustix::io::Errno::AGAIN);
            0
        }
    }
}

/// A front end with one guest, which uses one ring.
struct Vmm {
    handle: Handle,
    disk: Rc<ModelDisk>,
    device: Rc<Device>,
    ram: Rc<Ram>,
    ring: u32,
    driver: Driver,
    kick: OwnedFd,
    call: OwnedFd,
    err: OwnedFd,
}

impl Vmm {
    fn new(handle: &Handle, features: u64) -> Vmm {
        let disk = ModelDisk::new(MIB);
        let device = Device::new(handle, Rc::new(Handed(disk.clone())), settings(), Rc::default());
        let ram = Rc::new(Ram::new(&[(0, MIB)]));
        let driver = Driver::new(&ram, RING, 16, 0);
        let (kick, call, err) = (bell(), bell(), bell());
        let vmm = Vmm { handle: handle.clone(), disk, device, ram, ring: 0, driver, kick, call, err };
        // As monitors do first of all; the guest is shown what they have read.
        vmm.device.config(0, 60).unwrap();
        vmm.device.set_features(features).unwrap();
        vmm.device.set_memory(vmm.ram.regions()).unwrap();
        vmm
    }

    /// The same guest's other ring.
    fn other(&self) -> Vmm {
        let (kick, call, err) = (bell(), bell(), bell());
        let driver = Driver::new(&self.ram, OTHER_RING, 16, 0);
        let (handle, disk) = (self.handle.clone(), self.disk.clone());
        let (device, ram) = (self.device.clone(), self.ram.clone());
        Vmm { handle, disk, device, ram, ring: 1, driver, kick, call, err }
    }

    /// A new process that serves the same disk to the same guest.
    fn successor(&mut self, features: u64) {
        self.device =
            Device::new(&self.handle, Rc::new(Handed(self.disk.clone())), settings(), Rc::default());
        self.device.set_features(features).unwrap();
    }

    /// A ring as QEMU starts one.
    fn start(&self, base: u32) {
        let addresses = self.driver.addresses();
        let ring = self.ring;
        self.device.set_ring_size(ring, self.driver.size.into()).unwrap();
        self.device.set_ring_base(ring, base).unwrap();
        self.device.set_ring_addresses(ring, addresses.descriptors, addresses.avail, addresses.used).unwrap();
        self.device.set_err(ring, Some(self.err.try_clone().unwrap())).unwrap();
        self.device.set_kick(ring, Some(self.kick.try_clone().unwrap())).unwrap();
        self.device.set_call(ring, Some(self.call.try_clone().unwrap())).unwrap();
    }

    /// A request of this kind, with its data `at` in memory.
    fn offer(&mut self, nth: u64, kind: u32, sector: u64, len: u32) -> u16 {
        let (head_at, status_at) = (HEADER + 16 * nth, STATUS + nth);
        self.ram.write(head_at, &header(kind, sector));
        self.ram.write(status_at, &[0xee]);
        let mut parts = vec![(head_at, 16, false)];
        if len > 0 {
            parts.push((DATA + 4096 * nth, len, kind == 0));
        }
        parts.push((status_at, 1, true));
        let head = self.driver.chain(&parts);
        self.driver.offer(head);
        head
    }

    fn kick(&self) {
        ring_bell(&self.kick);
    }

    /// Waits for a number of used elements.
    async fn used(&mut self, count: usize) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        for _ in 0..2000 {
            used.extend(self.driver.take_used());
            if used.len() >= count {
                return used;
            }
            self.handle.sleep(Duration::from_millis(1)).await;
        }
        panic!("{} of {count} answers in two seconds", used.len());
    }

    /// Waits until something is so.
    async fn until(&self, is_so: impl Fn(&Vmm) -> bool) {
        for _ in 0..2000 {
            if is_so(self) {
                return;
            }
            self.handle.sleep(Duration::from_millis(1)).await;
        }
        panic!("not so after two seconds");
    }

    /// Waits until the disk has so many requests that wait.
    async fn waiting(&self, count: usize) {
        self.until(|vmm| vmm.disk.waiting.borrow().len() == count).await;
    }

    /// Time enough for what is not to happen.
    async fn pause(&self) {
        self.handle.sleep(Duration::from_millis(20)).await;
    }

    fn status(&self, nth: u64) -> u8 {
        self.ram.read(STATUS + nth, 1)[0]
    }
}

#[test]
fn a_guest_writes_and_reads() {
    for event_idx in [0, EVENT_IDX] {
        run(|handle| async move {
            let mut vmm = Vmm::new(&handle, VERSION_1 | FLUSH | event_idx);
            vmm.start(0);
            vmm.ram.write(DATA, &[0x5a; 4096]);
            let head = vmm.offer(0, 1, 8, 4096);
            vmm.kick();
            assert_eq!(vmm.used(1).await, [(head, 1)]);
            assert_eq!(vmm.status(0), 0);
            assert_eq!(vmm.disk.bytes.borrow()[4096..8192], [0x5a; 4096]);
            assert!(rings(&vmm.call) > 0);
            let head = vmm.offer(1, 0, 9, 1024);
            vmm.kick();
            assert_eq!(vmm.used(1).await, [(head, 1025)]);
            assert_eq!((vmm.status(1), vmm.ram.read(DATA + 4096, 1024)), (0, vec![0x5a; 1024]));
            assert_eq!(vmm.device.ring_base(0).await.unwrap(), 2);
            vmm.device.stop().await;
            assert_eq!(rings(&vmm.err), 0);
        });
    }
}

#[test]
fn a_ring_is_looked_at_when_it_starts() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1 | FLUSH);
        vmm.offer(0, 0, 0, 512);
        vmm.start(0);
        assert_eq!(vmm.used(1).await.len(), 1);
        vmm.device.stop().await;
    });
}

#[test]
fn a_call_is_made_when_a_ring_starts_for_what_died_with_a_predecessor() {
    run(|handle| async move {
        let vmm = Vmm::new(&handle, VERSION_1);
        vmm.start(0);
        vmm.until(|vmm| rings(&vmm.call) == 1).await;
        vmm.device.stop().await;
    });
}

#[test]
fn answers_that_come_together_make_one_call() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1);
        vmm.start(0);
        vmm.until(|vmm| rings(&vmm.call) == 1).await;
        for nth in 0..5 {
            vmm.offer(nth, 0, 0, 512);
        }
        vmm.kick();
        assert_eq!(vmm.used(5).await.len(), 5);
        vmm.pause().await;
        assert_eq!(rings(&vmm.call), 1);
        vmm.device.stop().await;
    });
}

#[test]
fn a_ring_that_is_not_enabled_waits() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1 | PROTOCOL_FEATURES);
        vmm.offer(0, 0, 0, 512);
        vmm.start(0);
        vmm.kick();
        vmm.pause().await;
        assert!(vmm.disk.asked.borrow().is_empty());
        vmm.device.enable(0, true).unwrap();
        assert_eq!(vmm.used(1).await.len(), 1);
        vmm.device.enable(0, false).unwrap();
        vmm.offer(1, 0, 0, 512);
        vmm.kick();
        vmm.pause().await;
        assert_eq!(vmm.disk.asked.borrow().len(), 1);
        assert_eq!(vmm.device.ring_base(0).await.unwrap(), 1, "it was not taken");
        vmm.device.stop().await;
    });
}

#[test]
fn a_ring_starts_whatever_comes_last() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1);
        vmm.device.set_memory(Vec::new()).unwrap();
        vmm.offer(0, 0, 0, 512);
        vmm.start(0);
        vmm.pause().await;
        assert!(vmm.disk.asked.borrow().is_empty());
        for (spec, fd) in vmm.ram.regions() {
            vmm.device.add_memory(spec, fd).unwrap();
        }
        assert_eq!(vmm.used(1).await.len(), 1);
        assert_eq!(rings(&vmm.err), 0, "that it waited is no error");
        vmm.device.stop().await;
    });
}

#[test]
fn a_blocking_eventfd_holds_up_nobody_and_is_kicked_again_and_again() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1 | EVENT_IDX);
        vmm.kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        vmm.start(0);
        for nth in 0..20 {
            vmm.offer(nth % 4, 0, 0, 512);
            vmm.kick();
            assert_eq!(vmm.used(1).await.len(), 1);
            // Long enough that the thread sleeps, and must be kicked.
            vmm.handle.sleep(Duration::from_millis(2)).await;
        }
        vmm.device.stop().await;
    });
}

#[test]
fn eventfds_stay_as_the_front_end_made_them() {
    // The flag is the front end's too, which may wait in read(2).
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1);
        let blocking = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        (vmm.kick, vmm.call, vmm.err) = (blocking(), blocking(), blocking());
        vmm.start(0);
        vmm.pause().await;
        for fd in [&vmm.kick, &vmm.call, &vmm.err] {
            assert!(!rustix::fs::fcntl_getfl(fd).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
        }
        // It has been called, so that this does not wait.
        assert_eq!(rings(&vmm.call), 1);
        vmm.device.stop().await;
    });
}

#[test]
fn descriptors_that_are_no_eventfds_are_refused() {
    run(|handle| async move {
        let vmm = Vmm::new(&handle, VERSION_1);
        let (reader, _writer) = std::io::pipe().unwrap();
        let file: OwnedFd = std::fs::File::open("/dev/zero").unwrap().into();
        for fd in [OwnedFd::from(reader), file] {
            let device = &vmm.device;
            let fd = || Some(fd.try_clone().unwrap());
            for refused in [device.set_kick(0, fd()), device.set_call(0, fd()), device.set_err(0, fd())] {
                let reason = refused.unwrap_err().to_string();
                assert!(reason.contains("an eventfd is expected"), "{reason}");
            }
        }
        assert!(matches!(vmm.device.set_kick(0, None), Err(Violation::NoKick(0))));
        vmm.device.set_call(0, None).unwrap();
        vmm.device.set_err(0, None).unwrap();
    });
}

#[test]
fn a_ring_that_makes_no_sense_stops_alone() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1);
        let mut other = vmm.other();
        vmm.start(0);
        other.start(0);
        vmm.disk.waits.set(true);
        let head = vmm.offer(0, 0, 0, 512);
        vmm.kick();
        vmm.waiting(1).await;
        // The same head again, behind a good request.
        vmm.driver.offer(head);
        vmm.offer(1, 0, 0, 512);
        vmm.kick();
        vmm.until(|vmm| rings(&vmm.err) == 1).await;
        // What was taken before is answered.
        vmm.disk.step();
        assert_eq!(vmm.used(1).await, [(head, 513)]);
        vmm.disk.waits.set(false);
        other.offer(2, 0, 0, 512);
        other.kick();
        assert_eq!(other.used(1).await.len(), 1);
        vmm.kick();
        vmm.pause().await;
        assert_eq!((rings(&vmm.err), rings(&other.err)), (0, 0), "it is told once");
        assert_eq!(vmm.driver.take_used(), []);
        // The front end may start it anew.
        assert_eq!(vmm.device.ring_base(0).await.unwrap(), 1);
        vmm.driver = Driver::new(&vmm.ram, RING, 16, 0);
        vmm.start(0);
        vmm.offer(0, 0, 0, 512);
        vmm.kick();
        assert_eq!(vmm.used(1).await.len(), 1);
        vmm.device.stop().await;
    });
}

#[test]
fn a_ring_whose_task_panics_stops_alone() {
    let pool = Pool::new(64 << 10);
    let uring = Uring::open(RingFlags::Auto, &pool).expect("these tests need io_uring");
    let runtime = Runtime::new(Box::new(uring), pool);
    let handle = runtime.handle().clone();
    runtime.block_on(async move {
        let mut vmm = Vmm::new(&handle, VERSION_1);
        let mut other = vmm.other();
        vmm.start(0);
        other.start(0);
        vmm.disk.panics.set(true);
        let head = vmm.offer(0, 0, 0, 512);
        vmm.offer(1, 0, 0, 512);
        vmm.kick();
        vmm.until(|vmm| rings(&vmm.err) == 1).await;
        vmm.disk.panics.set(false);
        assert_eq!(vmm.used(1).await, [(head, 1)], "an error, and nothing more is taken");
        // Kicked once more, it is left alone, and the thread has time for others and to sleep.
        vmm.kick();
        other.offer(2, 0, 0, 512);
        other.kick();
        assert_eq!(other.used(1).await.len(), 1);
        vmm.pause().await;
        assert_eq!((vmm.driver.take_used(), rings(&vmm.err)), (vec![], 0));
        assert_eq!(vmm.device.ring_base(0).await.unwrap(), 1);
        vmm.device.stop().await;
        assert_eq!(handle.panics(), 1);
    });
}

#[test]
fn a_ring_that_cannot_start_is_told() {
    run(|handle| async move {
        let vmm = Vmm::new(&handle, VERSION_1);
        vmm.device.set_ring_size(0, 16).unwrap();
        vmm.device.set_err(0, Some(vmm.err.try_clone().unwrap())).unwrap();
        vmm.device.set_ring_addresses(0, 16, 32, 64).unwrap();
        vmm.device.set_kick(0, Some(vmm.kick.try_clone().unwrap())).unwrap();
        vmm.until(|vmm| rings(&vmm.err) == 1).await;
        // With what was wrong set right, it starts.
        let addresses = vmm.driver.addresses();
        vmm.device.set_ring_addresses(0, addresses.descriptors, addresses.avail, addresses.used).unwrap();
        vmm.device.set_call(0, Some(vmm.call.try_clone().unwrap())).unwrap();
        vmm.until(|vmm| rings(&vmm.call) == 1).await;
        vmm.device.stop().await;
    });
}

#[test]
fn stopping_waits_for_the_disk_and_tells_the_base() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1);
        vmm.start(0);
        vmm.disk.waits.set(true);
        for nth in 0..3 {
            vmm.offer(nth, 0, 0, 512);
        }
        vmm.kick();
        vmm.waiting(3).await;
        let (device, disk, later) = (vmm.device.clone(), vmm.disk.clone(), handle.clone());
        handle.spawn(async move {
            later.sleep(Duration::from_millis(5)).await;
            while disk.step() {
                later.yield_now().await;
            }
        });
        assert_eq!(device.ring_base(0).await.unwrap(), 3);
        assert_eq!(vmm.driver.take_used().len(), 3, "all of it is published");
        // Stopped: nothing is taken.
        vmm.offer(3, 0, 0, 512);
        vmm.kick();
        vmm.pause().await;
        assert_eq!(vmm.disk.asked.borrow().len(), 3);
        assert_eq!(vmm.device.ring_base(0).await.unwrap(), 3, "asked again");
        vmm.disk.waits.set(false);
        vmm.start(3);
        assert_eq!(vmm.used(1).await.len(), 1);
        vmm.device.stop().await;
    });
}

/// Moves what waits to those that are held, as for space.
fn hold(disk: &ModelDisk) {
    let mut waiting = disk.waiting.borrow_mut();
    disk.held.borrow_mut().extend(waiting.drain(..));
}

#[test]
fn what_is_held_is_told_its_error_where_nothing_remembers_it() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1);
        vmm.start(0);
        vmm.disk.waits.set(true);
        let head = vmm.offer(0, 1, 0, 512);
        vmm.kick();
        vmm.waiting(1).await;
        hold(&vmm.disk);
        assert_eq!(vmm.device.ring_base(0).await.unwrap(), 1);
        assert_eq!(vmm.driver.take_used(), [(head, 1)]);
        assert_eq!(vmm.status(0), 1);
    });
}

#[test]
fn what_is_held_stays_in_the_in_flight_region_for_a_successor() {
    run(|handle| async move {
        let features = VERSION_1 | FLUSH | INDIRECT_DESC | EVENT_IDX;
        let mut vmm = Vmm::new(&handle, features);
        let (fd, len, offset) = vmm.device.make_inflight(2, 16).unwrap();
        let inflight = || fd.try_clone().unwrap();
        vmm.device.set_inflight(inflight(), len, offset, 2, 16).unwrap();
        vmm.start(0);
        vmm.disk.waits.set(true);
        vmm.ram.write(DATA, &[0x77; 512]);
        let held = vmm.offer(0, 1, 4, 512);
        vmm.kick();
        vmm.waiting(1).await;
        hold(&vmm.disk);
        vmm.disk.waits.set(false);
        let done = vmm.offer(1, 0, 0, 512);
        vmm.kick();
        assert_eq!(vmm.used(1).await, [(done, 513)]);
        assert_eq!(vmm.device.ring_base(0).await.unwrap(), 2);
        assert_eq!(vmm.driver.take_used(), [], "it is neither answered nor lost");
        // The same process goes on, as when a machine is paused.
        vmm.disk.waits.set(true);
        vmm.start(2);
        vmm.waiting(1).await;
        hold(&vmm.disk);
        vmm.device.stop().await;
        assert_eq!(vmm.driver.take_used(), []);
        // Another one does, which is told the used index for the base, as after a death.
        vmm.disk.waits.set(false);
        vmm.successor(features);
        vmm.device.set_inflight(inflight(), len, offset, 2, 16).unwrap();
        vmm.device.set_memory(vmm.ram.regions()).unwrap();
        vmm.start(1);
        assert_eq!(vmm.used(1).await, [(held, 1)]);
        assert_eq!((vmm.status(0), vmm.disk.bytes.borrow()[2048]), (0, 0x77));
        vmm.offer(2, 0, 4, 512);
        vmm.kick();
        assert_eq!(vmm.used(1).await.len(), 1);
        assert_eq!(vmm.device.ring_base(0).await.unwrap(), 3);
    });
}

#[test]
fn a_turn_is_shorter_where_requests_are_long() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1 | INDIRECT_DESC);
        vmm.driver = Driver::new(&vmm.ram, RING, 64, 0);
        // One table for all: a header, 126 pieces of a sector, a status.
        vmm.ram.write(HEADER, &header(0, 0));
        let data = [(DATA, 512, true); 126];
        let parts = [&[(HEADER, 16, false)][..], &data, &[(STATUS, 1, true)]].concat();
        for _ in 0..64 {
            let head = vmm.driver.indirect(DATA + 0x10000, &parts);
            vmm.driver.offer(head);
        }
        vmm.disk.waits.set(true);
        vmm.start(0);
        let mut turns = Vec::new();
        let mut before = 0;
        while before < 64 {
            handle.yield_now().await;
            let taken = vmm.disk.asked.borrow().len();
            turns.push(taken - before);
            before = taken;
        }
        // 1024 pieces are eight of these.
        assert_eq!(turns.iter().max(), Some(&8), "{turns:?}");
        vmm.disk.waits.set(false);
        while vmm.disk.step() {}
        assert_eq!(vmm.used(64).await.len(), 64);
        vmm.device.stop().await;
    });
}

#[test]
fn memory_may_be_replaced_while_requests_are_out() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1);
        vmm.start(0);
        vmm.disk.waits.set(true);
        vmm.disk.bytes.borrow_mut()[..512].fill(0x33);
        let head = vmm.offer(0, 0, 0, 512);
        vmm.kick();
        vmm.waiting(1).await;
        // The same guest in other memory: what is out keeps the old.
        let old = vmm.ram.clone();
        let ram = Rc::new(Ram::new(&[(0, MIB)]));
        ram.write(0, &old.read(0, 0x40000));
        vmm.device.set_memory(ram.regions()).unwrap();
        (vmm.ram, vmm.driver.ram) = (ram.clone(), ram);
        vmm.disk.step();
        assert_eq!(vmm.used(1).await, [(head, 513)], "the ring has moved");
        assert_eq!((old.read(DATA, 512), old.read(STATUS, 1)), (vec![0x33; 512], vec![0]));
        vmm.disk.waits.set(false);
        vmm.offer(1, 0, 0, 512);
        vmm.kick();
        assert_eq!(vmm.used(1).await.len(), 1);
        assert_eq!(vmm.ram.read(DATA + 4096, 512), [0x33; 512]);
        assert_eq!(rings(&vmm.err), 0);
        // A ring whose memory goes away stops.
        let (spec, _) = vmm.ram.regions().remove(0);
        vmm.device.set_memory(Vec::new()).unwrap();
        vmm.until(|vmm| rings(&vmm.err) == 1).await;
        assert!(matches!(vmm.device.remove_memory(spec), Err(Violation::NoRegion(_))));
        vmm.device.stop().await;
    });
}

#[test]
fn a_ring_waits_for_its_memory_while_that_is_cut_into_other_regions() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1);
        vmm.start(0);
        vmm.disk.waits.set(true);
        let early = vmm.offer(0, 0, 0, 512);
        vmm.kick();
        vmm.waiting(1).await;
        let (spec, _) = vmm.ram.regions().remove(0);
        vmm.device.remove_memory(spec).unwrap();
        // What was taken is answered, in the memory that is still mapped for it; nothing more is taken.
        let late = vmm.offer(1, 0, 0, 512);
        vmm.kick();
        vmm.pause().await;
        vmm.disk.step();
        assert_eq!(vmm.used(1).await, [(early, 513)]);
        vmm.pause().await;
        assert_eq!((vmm.disk.asked.borrow().len(), rings(&vmm.err)), (1, 0));
        // It comes back in two parts, the ring in the second.
        let half =
            |from: u64, len: u64| RegionSpec { guest: from, len, user: spec.user + from, offset: from };
        let fd = || vmm.ram.regions().remove(0).1;
        vmm.disk.waits.set(false);
        vmm.device.add_memory(half(0x10000, MIB - 0x10000), fd()).unwrap();
        vmm.pause().await;
        assert_eq!(vmm.disk.asked.borrow().len(), 1);
        vmm.device.add_memory(half(0, 0x10000), fd()).unwrap();
        assert_eq!(vmm.used(1).await, [(late, 513)], "without another kick");
        // A table without it is another matter, also for a ring that waits.
        vmm.device.remove_memory(half(0, 0x10000)).unwrap();
        vmm.device.set_memory(Vec::new()).unwrap();
        vmm.until(|vmm| rings(&vmm.err) == 1).await;
        vmm.device.stop().await;
    });
}

#[test]
fn memory_that_is_cut_short_stops_its_rings_and_no_others() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1);
        let mut other = Vmm::new(&handle, VERSION_1);
        vmm.start(0);
        other.start(0);
        vmm.disk.waits.set(true);
        vmm.offer(0, 1, 0, 512);
        vmm.kick();
        vmm.waiting(1).await;
        vmm.ram.file(0).set_len(0).unwrap();
        vmm.kick();
        vmm.until(|vmm| rings(&vmm.err) == 1).await;
        // It cannot be told; it does no harm.
        vmm.disk.step();
        other.offer(0, 0, 0, 512);
        other.kick();
        assert_eq!(other.used(1).await.len(), 1);
        assert_eq!((other.status(0), rings(&other.err)), (0, 0));
        vmm.device.stop().await;
        other.device.stop().await;
    });
}

#[test]
fn a_request_on_memory_that_was_cut_short_fails() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1);
        vmm.device.set_memory(Vec::new()).unwrap();
        // The ring in one file, the data in another.
        let ram = Rc::new(Ram::new(&[(0, 0x30000), (DATA, 0x10000)]));
        vmm.driver = Driver::new(&ram, RING, 16, 0);
        vmm.ram = ram;
        vmm.device.set_memory(vmm.ram.regions()).unwrap();
        vmm.start(0);
        vmm.disk.waits.set(true);
        let head = vmm.offer(0, 1, 0, 512);
        vmm.kick();
        vmm.waiting(1).await;
        vmm.ram.file(1).set_len(0).unwrap();
        // The disk takes zeroes for what is gone, and knows of nothing.
        vmm.disk.step();
        assert_eq!(vmm.used(1).await, [(head, 1)]);
        assert_eq!(vmm.status(0), 1);
        assert_eq!(rings(&vmm.err), 0);
        vmm.device.stop().await;
    });
}

/// Which of a write, a discard and a write of zeroes is durable before its answer.
async fn durable(vmm: &mut Vmm) -> Vec<bool> {
    vmm.disk.asked.borrow_mut().clear();
    for (nth, kind) in [(0, 1), (1, 11), (2, 13)] {
        let range = [0u64.to_le_bytes(), 8u64.to_le_bytes()].concat();
        vmm.ram.write(DATA + 4096 * nth, &range);
        vmm.offer(nth, kind, 0, if kind == 1 { 512 } else { 16 });
        vmm.kick();
        vmm.used(1).await;
        assert_eq!(vmm.status(nth), 0);
    }
    vmm.disk.asked.borrow().iter().map(|op| op.fua()).collect()
}

#[test]
fn whoever_believes_in_no_cache_has_each_write_made_durable() {
    const WCE: u64 = 1 << 11;
    const ERASE: u64 = 1 << 13 | 1 << 14;
    // FAILURES B.2: write-back only where flushes were negotiated and the cache is on.
    for (features, cache, expected) in [
        (FLUSH, None, false),
        (FLUSH | WCE, None, false),
        (FLUSH | WCE, Some(1), false),
        (FLUSH | WCE, Some(0), true),
        (WCE, None, true),
        (WCE, Some(1), true),
        (0, None, true),
    ] {
        run(move |handle| async move {
            let mut vmm = Vmm::new(&handle, VERSION_1 | ERASE | features);
            vmm.start(0);
            if let Some(cache) = cache {
                vmm.device.set_config(32, &[cache]).await.unwrap();
                assert_eq!(vmm.device.config(32, 1).unwrap(), [cache]);
            }
            assert_eq!(durable(&mut vmm).await, [expected; 3], "{features:#x} {cache:?}");
            vmm.device.stop().await;
        });
    }
}

#[test]
fn turning_the_cache_off_makes_durable_what_was_written_before() {
    run(|handle| async move {
        let vmm = Vmm::new(&handle, VERSION_1 | FLUSH | 1 << 11);
        assert_eq!(vmm.device.config(32, 1).unwrap(), [1], "a cache at first");
        vmm.device.set_config(32, &[1]).await.unwrap();
        assert_eq!(vmm.disk.flushes.get(), 0);
        vmm.device.set_config(32, &[0]).await.unwrap();
        assert_eq!(vmm.disk.flushes.get(), 1);
        vmm.device.set_config(32, &[0]).await.unwrap();
        assert_eq!(vmm.disk.flushes.get(), 1);
        for (offset, bytes) in
            [(32, vec![2]), (0, vec![0; 8]), (31, vec![1]), (250, vec![0; 10]), (32, vec![0, 1])]
        {
            let refused = vmm.device.set_config(offset, &bytes).await;
            assert!(matches!(refused, Err(Violation::ConfigChange { .. })), "{offset} {bytes:?}");
        }
        assert_eq!(vmm.device.config(32, 1).unwrap(), [0]);
        assert!(matches!(vmm.device.config(250, 7), Err(Violation::Config { offset: 250, len: 7 })));
    });
}

#[test]
fn what_is_out_when_the_cache_is_turned_off_is_durable_before_its_answer() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1 | FLUSH | 1 << 11);
        vmm.start(0);
        vmm.disk.waits.set(true);
        let (write, read) = (vmm.offer(0, 1, 0, 512), vmm.offer(1, 0, 8, 512));
        vmm.kick();
        vmm.waiting(2).await;
        let (device, over) = (vmm.device.clone(), Rc::new(Cell::new(false)));
        let said = over.clone();
        handle.spawn(async move {
            device.set_config(32, &[0]).await.unwrap();
            said.set(true);
        });
        vmm.waiting(3).await;
        assert!(vmm.disk.step() && vmm.disk.step());
        assert_eq!(vmm.used(1).await, [(read, 513)], "a read needs no sync");
        vmm.waiting(2).await;
        assert!(!over.get(), "what was answered before is not durable yet");
        assert!(vmm.disk.step());
        vmm.until(|_| over.get()).await;
        assert_eq!((vmm.disk.flushes.get(), vmm.driver.take_used()), (1, vec![]));
        assert!(vmm.disk.step());
        assert_eq!(vmm.used(1).await, [(write, 1)]);
        assert_eq!(vmm.disk.flushes.get(), 2, "one of its own, after it was written");
        vmm.disk.waits.set(false);
        vmm.device.stop().await;
    });
}

#[test]
fn a_cache_whose_content_cannot_be_made_durable_stays_on() {
    run(|handle| async move {
        let vmm = Vmm::new(&handle, VERSION_1 | FLUSH | 1 << 11);
        vmm.disk.waits.set(true);
        let (disk, later) = (vmm.disk.clone(), handle.clone());
        handle.spawn(async move {
            later.sleep(Duration::from_millis(1)).await;
            disk.fail(Errno::EIO);
        });
        let refused = vmm.device.set_config(32, &[0]).await;
        assert!(matches!(refused, Err(Violation::WriteCache(Errno::EIO))), "{refused:?}");
        assert_eq!(vmm.device.config(32, 1).unwrap(), [1]);
    });
}

#[test]
fn a_front_end_that_has_not_asked_may_believe_that_there_is_no_cache() {
    run(|handle| async move {
        const FEATURES: u64 = VERSION_1 | FLUSH | 1 << 11 | 1 << 13 | 1 << 14;
        // Of a predecessor that had no in-flight region the guest knows what we do not.
        let mut vmm = Vmm::new(&handle, FEATURES);
        vmm.successor(FEATURES);
        vmm.device.set_memory(vmm.ram.regions()).unwrap();
        vmm.start(0);
        assert_eq!(durable(&mut vmm).await, [true; 3]);
        vmm.device.config(0, 8).unwrap();
        assert_eq!(durable(&mut vmm).await, [true; 3], "the capacity does not tell");
        vmm.device.config(0, 60).unwrap();
        assert_eq!(durable(&mut vmm).await, [false; 3]);
        vmm.device.stop().await;
    });
}

#[test]
fn a_successor_knows_that_the_cache_is_off() {
    run(|handle| async move {
        const FEATURES: u64 = VERSION_1 | FLUSH | 1 << 11 | 1 << 13 | 1 << 14;
        let mut vmm = Vmm::new(&handle, FEATURES);
        let (fd, len, offset) = vmm.device.make_inflight(1, 16).unwrap();
        vmm.device.set_inflight(fd.try_clone().unwrap(), len, offset, 1, 16).unwrap();
        vmm.device.set_config(32, &[0]).await.unwrap();
        vmm.successor(FEATURES);
        vmm.device.set_inflight(fd, len, offset, 1, 16).unwrap();
        vmm.device.set_memory(vmm.ram.regions()).unwrap();
        assert_eq!(vmm.device.config(32, 1).unwrap(), [0]);
        vmm.start(0);
        assert_eq!(durable(&mut vmm).await, [true; 3]);
        vmm.device.stop().await;
    });
}

#[test]
fn a_device_that_was_reset_has_forgotten_everything() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1 | FLUSH | 1 << 11);
        let (fd, len, offset) = vmm.device.make_inflight(1, 16).unwrap();
        vmm.device.set_inflight(fd.try_clone().unwrap(), len, offset, 1, 16).unwrap();
        vmm.device.set_config(32, &[0]).await.unwrap();
        vmm.start(0);
        vmm.disk.waits.set(true);
        vmm.offer(0, 0, 0, 512);
        vmm.offer(1, 0, 0, 512);
        vmm.kick();
        vmm.waiting(2).await;
        let (disk, later) = (vmm.disk.clone(), handle.clone());
        handle.spawn(async move {
            later.sleep(Duration::from_millis(5)).await;
            while disk.step() {}
        });
        vmm.device.reset().await;
        assert!(vmm.disk.waiting.borrow().is_empty(), "the kernel is done with the memory");
        assert_eq!(vmm.driver.take_used(), [], "and nobody hears of it");
        assert_eq!((vmm.status(0), vmm.status(1)), (0xee, 0xee));
        assert_eq!(
            vmm.device.config(32, 1).unwrap(),
            [0],
            "monitors keep the guest's choice and do not say it again"
        );
        // The driver begins anew, perhaps with the same region.
        vmm.disk.waits.set(false);
        vmm.driver = Driver::new(&vmm.ram, RING, 16, 0);
        vmm.device.set_features(VERSION_1).unwrap();
        vmm.device.set_inflight(fd, len, offset, 1, 16).unwrap();
        vmm.start(0);
        let head = vmm.offer(2, 0, 0, 512);
        vmm.kick();
        assert_eq!(vmm.used(1).await, [(head, 513)]);
        let reads = vmm.disk.asked.borrow().iter().filter(|op| op.kind() == OpKind::Read).count();
        assert_eq!(reads, 3, "what was forgotten is not done again");
        vmm.device.stop().await;
    });
}

#[test]
fn a_disk_that_grows_is_larger_for_its_guest() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1);
        vmm.start(0);
        assert_eq!(vmm.device.config(0, 8).unwrap(), (MIB / 512).to_le_bytes());
        vmm.offer(0, 0, MIB / 512, 512);
        vmm.kick();
        vmm.used(1).await;
        assert_eq!(vmm.status(0), 1);
        vmm.disk.bytes.borrow_mut().resize(2 * MIB as usize, 0);
        vmm.disk.size.set(2 * MIB);
        assert_eq!(vmm.device.config(0, 8).unwrap(), (2 * MIB / 512).to_le_bytes());
        vmm.offer(1, 0, MIB / 512, 512);
        vmm.kick();
        vmm.used(1).await;
        assert_eq!(vmm.status(1), 0);
        vmm.device.stop().await;
    });
}

#[test]
fn errors_of_the_disk_are_told_once() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1 | FLUSH | 1 << 13);
        vmm.start(0);
        vmm.disk.waits.set(true);
        // FAILURES B.3, column virtio-blk.
        for (kind, errno, status) in [
            (0, Errno::EIO, 1),
            (1, Errno::ENOSPC, 1),
            (1, Errno::EDQUOT, 1),
            (1, Errno::EPERM, 1),
            (1, Errno::EOPNOTSUPP, 1),
            (4, Errno::EIO, 1),
            (4, Errno::EOPNOTSUPP, 1),
            (11, Errno::EOPNOTSUPP, 2),
            (11, Errno::EIO, 1),
            (0, Errno::ESHUTDOWN, 1),
        ] {
            vmm.ram.write(DATA, &[0u64.to_le_bytes(), 8u64.to_le_bytes()].concat());
            let len = match kind {
                4 => 0,
                11 => 16,
                _ => 512,
            };
            let head = vmm.offer(0, kind, 0, len);
            vmm.kick();
            vmm.waiting(1).await;
            vmm.disk.fail(errno);
            assert_eq!(vmm.used(1).await, [(head, 1)]);
            assert_eq!(vmm.status(0), status, "{errno} for a request of type {kind}");
        }
        vmm.device.stop().await;
    });
}

#[test]
fn what_a_front_end_may_not_do_is_refused() {
    run(|handle| async move {
        let vmm = Vmm::new(&handle, VERSION_1);
        let device = &vmm.device;
        // RING_PACKED, ACCESS_PLATFORM, the log of dirty pages.
        for bit in [34, 33, 26, 0, 63] {
            assert!(matches!(device.set_features(1 << bit), Err(Violation::Features { .. })));
        }
        device.set_features(device.features()).unwrap();
        // NOTIFY_ON_EMPTY and ANY_LAYOUT mean nothing to us.
        device.set_features(VERSION_1 | 1 << 24 | 1 << 27).unwrap();
        for len in [0, 3, 5, 2048, 32768, 65535, 65536, u32::MAX] {
            assert!(matches!(device.set_ring_size(0, len), Err(Violation::RingLen { .. })), "{len}");
        }
        device.set_ring_size(0, 1024).unwrap();
        for index in [2, 255, 65536, u32::MAX] {
            assert!(matches!(device.set_ring_size(index, 16), Err(Violation::NoRing { .. })));
            assert!(matches!(device.set_ring_base(index, 0), Err(Violation::NoRing { .. })));
            assert!(matches!(device.set_ring_addresses(index, 0, 0, 0), Err(Violation::NoRing { .. })));
            assert!(matches!(device.ring_base(index).await, Err(Violation::NoRing { .. })));
            assert!(matches!(device.enable(index, true), Err(Violation::NoRing { .. })));
            assert!(matches!(device.set_kick(index, Some(bell())), Err(Violation::NoRing { .. })));
            assert!(matches!(device.set_call(index, None), Err(Violation::NoRing { .. })));
            assert!(matches!(device.set_err(index, None), Err(Violation::NoRing { .. })));
        }
        assert!(matches!(device.set_ring_base(0, 65536), Err(Violation::RingBase { .. })));
        assert!(matches!(
            device.make_inflight(3, 16),
            Err(Violation::InflightQueues { found: 3, queues: 2 })
        ));
        assert!(matches!(device.make_inflight(0, 16), Err(Violation::Inflight(_))));
        assert!(matches!(device.make_inflight(1, 1025), Err(Violation::Inflight(_))));
        let (spec, fd) = vmm.ram.regions().remove(0);
        assert!(matches!(device.add_memory(spec, fd), Err(Violation::Map(_))), "it overlaps");
        let many = |count: usize| (0..count).map(|_| vmm.ram.regions().remove(0)).collect();
        assert!(matches!(device.set_memory(many(510)), Err(Violation::Regions(510))));
    });
}

#[test]
fn a_ring_that_runs_is_not_changed() {
    run(|handle| async move {
        let vmm = Vmm::new(&handle, VERSION_1);
        vmm.start(0);
        let device = &vmm.device;
        assert!(matches!(device.set_ring_size(0, 16), Err(Violation::Running(0))));
        assert!(matches!(device.set_ring_base(0, 0), Err(Violation::Running(0))));
        assert!(matches!(device.set_ring_addresses(0, 16, 16, 16), Err(Violation::Running(0))));
        let addresses = vmm.driver.addresses();
        device.set_ring_addresses(0, addresses.descriptors, addresses.avail, addresses.used).unwrap();
        let (fd, len, offset) = device.make_inflight(1, 16).unwrap();
        assert!(matches!(device.set_inflight(fd, len, offset, 1, 16), Err(Violation::Running(0))));
        device.stop().await;
    });
}

#[test]
fn kicks_may_come_by_another_descriptor() {
    run(|handle| async move {
        let mut vmm = Vmm::new(&handle, VERSION_1);
        vmm.start(0);
        vmm.pause().await;
        let (kick, call) = (bell(), bell());
        vmm.device.set_kick(0, Some(kick.try_clone().unwrap())).unwrap();
        vmm.device.set_call(0, Some(call.try_clone().unwrap())).unwrap();
        (vmm.kick, vmm.call) = (kick, call);
        for nth in 0..3 {
            vmm.pause().await;
            vmm.offer(nth, 0, 0, 512);
            vmm.kick();
            vmm.used(1).await;
        }
        vmm.until(|vmm| rings(&vmm.call) >= 1).await;
        vmm.device.stop().await;
    });
}

/// A driver on a thread of its own, that kicks only when it is asked to and waits for signals only: how many requests it
/// got answers to, which is `count` unless a kick or a signal was lost.
fn drive(driver: Driver, has_event_idx: bool, count: u16, kick: OwnedFd, call: OwnedFd) -> u16 {
    for nth in 0..count {
        // 2.7.13: the descriptor, the index, a barrier, then the device's wish.
        let (used_index, event) = (driver.used + 2, driver.avail_event_at());
        driver.put_used_event(nth);
        let avail = driver.avail + 4 + 2 * u64::from(nth % driver.size);
        driver.ram.put16(avail, 0);
        driver.ram.put16(driver.avail + 2, nth.wrapping_add(1));
        fence(SeqCst);
        let wants_kick =
            if has_event_idx { driver.ram.u16(event) == nth } else { driver.used_flags() & 1 == 0 };
        if wants_kick {
            ring_bell(&kick);
        }
        while driver.ram.u16(used_index) != nth.wrapping_add(1) {
            let mut polled = [rustix::event::PollFd::new(&call, rustix::event::PollFlags::IN)];
            let timeout = rustix::time::Timespec { tv_sec: 5, tv_nsec: 0 };
            if rustix::event::poll(&mut polled, Some(&timeout)).unwrap() == 0 {
                return nth;
            }
            rings(&call);
        }
        // Now and then the other side is to fall asleep; now and then it is to be met while it falls asleep.
        if nth % 200 == 0 {
            std::thread::sleep(Duration::from_millis(2));
        } else {
            (0..nth % 97 * 8).for_each(|_| std::hint::spin_loop());
        }
    }
    count
}

#[test]
fn no_kick_and_no_signal_is_lost_whether_the_thread_looks_or_sleeps() {
    for event_idx in [0, EVENT_IDX] {
        run(move |handle| async move {
            let mut vmm = Vmm::new(&handle, VERSION_1 | event_idx);
            // One request, again and again: descriptors 0 and 1.
            vmm.ram.write(HEADER, &header(4, 0));
            assert_eq!(vmm.driver.chain(&[(HEADER, 16, false), (STATUS, 1, true)]), 0);
            vmm.start(0);
            let (kick, call) = (vmm.kick.try_clone().unwrap(), vmm.call.try_clone().unwrap());
            let files = vmm.ram.share();
            let done = bell();
            let told = done.try_clone().unwrap();
            let thread = std::thread::spawn(move || {
                let driver = Driver::new(&Rc::new(Ram::of(files)), RING, 16, 0);
                let answered = drive(driver, event_idx != 0, 3000, kick, call);
                ring_bell(&told);
                answered
            });
            // No timer: it would wake the thread that is to be kicked.
            let done = handle.register(done);
            handle.readable(&done).await.unwrap();
            assert_eq!(thread.join().unwrap(), 3000, "event indices: {}", event_idx != 0);
            vmm.device.stop().await;
        });
    }
}
