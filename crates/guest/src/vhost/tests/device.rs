//! A whole device, set up as a front end does it, on a real io_uring.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use block::Pool;
use runtime::{Handle, RingFlags, Runtime, Uring};
use rustix::event::{EventfdFlags, eventfd};

use super::super::device::{Device, Settings};
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

/// A front end with one guest, whose ring 0 runs.
struct Vmm {
    handle: Handle,
    disk: Rc<ModelDisk>,
    device: Rc<Device>,
    ram: Rc<Ram>,
    driver: Driver,
    kick: OwnedFd,
    call: OwnedFd,
    err: OwnedFd,
}

impl Vmm {
    fn new(handle: &Handle, features: u64) -> Vmm {
        let disk = ModelDisk::new(MIB);
        let device = Device::new(handle, Rc::new(Handed(disk.clone())), settings());
        let ram = Rc::new(Ram::new(&[(0, MIB)]));
        let driver = Driver::new(&ram, RING, 16, 0);
        let (kick, call, err) = (bell(), bell(), bell());
        let vmm = Vmm { handle: handle.clone(), disk, device, ram, driver, kick, call, err };
        vmm.device.set_features(features).unwrap();
        vmm.device.set_memory(vmm.ram.regions()).unwrap();
        vmm
    }

    /// A ring as QEMU starts one.
    fn start(&self, base: u32) {
        let addresses = self.driver.addresses();
        self.device.set_ring_size(0, self.driver.size.into()).unwrap();
        self.device.set_ring_base(0, base).unwrap();
        self.device.set_ring_addresses(0, addresses.descriptors, addresses.avail, addresses.used).unwrap();
        self.device.set_err(0, Some(self.err.try_clone().unwrap())).unwrap();
        self.device.set_kick(0, Some(self.kick.try_clone().unwrap())).unwrap();
        self.device.set_call(0, Some(self.call.try_clone().unwrap())).unwrap();
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
