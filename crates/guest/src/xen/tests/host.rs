//! A guest, its disk and the device between the two, on a real io_uring.

use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use ::xen::fake::{Counts, Guest, World};
use ::xen::grants::{Access, GrantRef};
use ::xen::{Domain, PAGE};
use block::Pool;
use runtime::{Handle, RingFlags, Runtime, Uring};

use super::super::device::{ConnectError, Connection, Device, Offered, Parting, Start};
use super::super::layout::Abi;
use super::super::{DataPath, Features, OnFailedSync, Settings};
use super::disk::{Handed, ModelDisk};
use super::front::{Front, Response, Seg};

pub(super) const MIB: u64 = 1 << 20;
pub(super) const OFFERED: Offered =
    Offered { flush_cache: true, barrier: true, discard: true, indirect: 256, block: 512 };
/// Where a guest's data starts, behind its rings.
const DATA_PAGE: usize = 64;

pub(super) fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Handle) -> F) {
    let handle = run_with_panics(test);
    assert_eq!(handle, 0);
}

/// How many tasks have panicked.
pub(super) fn run_with_panics<F: Future<Output = ()> + 'static>(test: impl FnOnce(Handle) -> F) -> u64 {
    let pool = Pool::new(64 << 10);
    let uring = Uring::open(RingFlags::Auto, &pool).expect("these tests need io_uring");
    let runtime = Runtime::new(Box::new(uring), pool);
    let future = test(runtime.handle().clone());
    runtime.block_on(future);
    runtime.handle().panics()
}

/// A guest, its disk, and the device between the two.
pub(super) struct Host {
    pub(super) handle: Handle,
    pub(super) world: World,
    pub(super) guest: Guest,
    pub(super) disk: Rc<ModelDisk>,
    pub(super) device: Rc<Device>,
    pub(super) settings: Settings,
    pub(super) offered: Offered,
    pub(super) persistent: bool,
    pub(super) abi: Abi,
    directory: tempfile::TempDir,
    /// The next page of data that was not used.
    page: usize,
}

impl Host {
    pub(super) fn new(handle: &Handle, data: DataPath) -> Host {
        let world = World::new();
        let guest = world.domain(Domain(5), 4096);
        let disk = ModelDisk::new(4 * MIB);
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let settings = Settings {
            name: "disk".into(),
            domain: guest.domain(),
            device: 51728,
            kind: "vbd3".into(),
            create_nodes: false,
            features: Features::default(),
            queues: 4,
            block: 512,
            data,
            on_failed_sync: OnFailedSync::FailWrites,
            memory: 0,
            journals: directory.path().into(),
            image: None,
        };
        let device = Host::device(handle, &disk, &world, &settings);
        let (offered, persistent, abi) = (OFFERED, false, Abi::X86_64);
        let (handle, page) = (handle.clone(), DATA_PAGE);
        Host { handle, world, guest, disk, device, settings, offered, persistent, abi, directory, page }
    }

    fn device(handle: &Handle, disk: &Rc<ModelDisk>, world: &World, settings: &Settings) -> Rc<Device> {
        let disk = Rc::new(Handed(disk.clone()));
        Device::new(handle, disk, world.grants(), world.events(), Rc::new(settings.clone()))
    }

    /// A process that was killed is gone with its mappings and channels, and says nothing; another one comes.
    pub(super) async fn kill(&mut self) {
        let device = Host::device(&self.handle, &self.disk, &self.world, &self.settings);
        drop(std::mem::replace(&mut self.device, device));
        self.disk.lose();
        self.handle.turn().await;
        self.is_clean();
    }

    /// A ring in so many pages.
    pub(super) fn front(&self, first_page: usize, pages: usize) -> Front {
        Front::new(&self.guest, self.abi, first_page, pages, 0)
    }

    pub(super) async fn try_connect(&self, fronts: &[&Front], start: Start) -> Result<(), ConnectError> {
        let connection = Connection {
            domain: self.guest.domain(),
            abi: self.abi,
            rings: fronts.iter().map(|front| front.spec()).collect(),
            offered: self.offered,
            persistent: self.persistent,
            start,
        };
        self.device.connect(connection).await
    }

    pub(super) async fn connect(&self, fronts: &[&Front]) {
        self.try_connect(fronts, Start::Fresh).await.unwrap();
    }

    /// Pages with these bytes, granted.
    pub(super) fn pages(&mut self, bytes: &[u8], access: Access) -> Vec<(usize, GrantRef)> {
        bytes
            .chunks(PAGE)
            .map(|part| {
                let page = self.page;
                self.page += 1;
                self.guest.write(page * PAGE, part);
                (page, self.guest.grant(page, access))
            })
            .collect()
    }

    /// Waits for a number of responses, as a driver does, and takes them.
    pub(super) async fn responses(&self, front: &mut Front, count: usize) -> Vec<Response> {
        let mut responses = Vec::new();
        for _ in 0..2000 {
            responses.extend(front.responses());
            if responses.len() >= count {
                return responses;
            }
            self.handle.sleep(Duration::from_millis(1)).await;
        }
        panic!("{} responses after 2 s instead of {count}", responses.len());
    }

    /// Waits until the disk has so many requests that wait.
    pub(super) async fn waiting(&self, count: usize) {
        for _ in 0..2000 {
            if self.disk.waiting() == count {
                return;
            }
            self.handle.sleep(Duration::from_millis(1)).await;
        }
        panic!("{} requests wait after 2 s instead of {count}", self.disk.waiting());
    }

    /// Lets what can happen happen.
    pub(super) async fn quiet(&self) {
        for _ in 0..5 {
            self.handle.sleep(Duration::from_millis(1)).await;
        }
    }

    pub(super) async fn leave(&self, how: Parting) {
        self.device.disconnect(how).await;
        self.is_clean();
    }

    /// Nothing of the guest's is mapped or bound.
    pub(super) fn is_clean(&self) {
        let Counts { mapped, bound, .. } = self.world.counts();
        assert_eq!((mapped, bound), (0, 0));
    }

    pub(super) fn has_journal(&self) -> bool {
        self.directory.path().join("blkif-5-51728").exists()
    }
}

pub(super) fn segs(pages: &[(usize, GrantRef)]) -> Vec<Seg> {
    pages.iter().map(|(_, gref)| (*gref, 0, 7)).collect()
}
