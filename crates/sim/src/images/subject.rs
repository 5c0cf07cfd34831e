//! What is put to the test: an image of some format and some options, and how it is opened.

use std::rc::Rc;

use block::Buf;
use image::{Chain, Image, ImageError, Raw, Repair, Report, Settings};
use runtime::Handle;
use storage::Storage;

use super::bytes::Bytes;
use super::model::{BELOW, GRAIN, pattern};
use super::recorder::{Book, Recorder, runtime};
use super::toy::{self, Flaw, Toy};
use super::world::{Notes, Pace, World};
use crate::dice::Dice;

/// The file with the image.
pub(crate) const IMAGE: usize = 0;
/// The file with its data, where that is another.
pub(crate) const DATA: usize = 1;
/// The file below.
pub(crate) const BASE: usize = 2;

/// An image to be.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    pub(crate) kind: Kind,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Bytes of the image below, if there is one.
    pub(crate) below: u64,
    /// What is written to as one, in bytes.
    pub(crate) unit: u64,
    /// Changes are noted in a ledger.
    pub(crate) has_ledger: bool,
    /// What was answered outlives the process.
    pub(crate) lasting: bool,
    /// Bytes of memory for metadata.
    pub(crate) cache: usize,
}

/// Formats with their options.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Raw,
    Toy(Flaw),
}

impl Subject {
    pub(crate) fn draw(dice: &mut Dice) -> Subject {
        let kind = if dice.percent(20) { Kind::Raw } else { Kind::Toy(Flaw::None) };
        Subject::of(kind, dice)
    }

    /// One of this kind.
    pub(crate) fn of(kind: Kind, dice: &mut Dice) -> Subject {
        let unit = match kind {
            Kind::Raw => 4096,
            Kind::Toy(_) => toy::CLUSTER,
        };
        let size = unit * dice.between(6, 40) + dice.pick(&[0, 0, 512, 1536]) % unit;
        let odd = [0, 0, 0, GRAIN, 512];
        let below = match kind {
            Kind::Raw => 0,
            Kind::Toy(_) => dice.pick(&[0, size, size / 2 / 512 * 512, size + 4096]),
        };
        let below = if below > 0 { below - dice.pick(&odd) } else { 0 };
        let lasting = dice.percent(80);
        Subject {
            kind,
            size,
            below: below / GRAIN * GRAIN,
            unit,
            has_ledger: lasting && dice.percent(80),
            lasting,
            cache: dice.pick(&[0, 1024, 4096]),
        }
    }

    /// The files of a new image, durable.
    pub(crate) fn create(&self) -> Result<Vec<Bytes>, String> {
        let mut base = Bytes::new(self.below);
        base.write(0, &pattern(0, self.below, BELOW));
        let files = vec![Bytes::new(0), Bytes::new(0), base];
        let world = World::new(files, Notes::default(), Pace::Instant, Dice::new(0));
        let files = Files::new(&world);
        let this = self.clone();
        let made = runtime(&world).block_on(async move { this.fill(&files).await });
        made.map_err(|error| format!("create: {error}"))?;
        Ok(world.files())
    }

    async fn fill(&self, files: &Files) -> Result<(), ImageError> {
        match &self.kind {
            Kind::Raw => files.image.resize(self.size).await.map_err(ImageError::Io),
            Kind::Toy(_) => toy::create(&files.image, self.size).await,
        }
    }

    /// Opens it for writing, over what is below.
    pub(crate) async fn open(&self, handle: &Handle, world: &Rc<World>) -> Result<Chain, ImageError> {
        let files = Files::new(world);
        let ledger =
            self.has_ledger.then(|| Box::new(Book(world.clone())) as Box<dyn image::metadata::Ledger>);
        let settings = Settings { writable: true, cache: self.cache, ledger, lasting: self.lasting };
        let top: Rc<dyn Image> = match &self.kind {
            Kind::Raw => Rc::new(Raw::new(files.image)),
            Kind::Toy(flaw) => Rc::new(Toy::open(files.image, settings.ledger, *flaw).await?),
        };
        let below =
            if self.below > 0 { vec![Rc::new(Raw::new(files.base)) as Rc<dyn Image>] } else { vec![] };
        Ok(Chain::over(handle, top, below))
    }

    /// What a check finds; `None` for a format that has nothing to check.
    pub(crate) async fn check(
        &self,
        world: &Rc<World>,
        repair: Repair,
    ) -> Result<Option<Report>, ImageError> {
        let files = Files::new(world);
        match &self.kind {
            Kind::Raw => Ok(None),
            Kind::Toy(_) => toy::check(&files.image, repair).await.map(Some),
        }
    }

    /// Whether what was answered is there after the death of the process.
    pub(crate) fn outlives_its_process(&self) -> bool {
        self.lasting || matches!(self.kind, Kind::Raw)
    }
}

struct Files {
    image: Rc<dyn Storage>,
    #[expect(dead_code, reason = "no format with a data file is tried yet")]
    data: Rc<dyn Storage>,
    base: Rc<dyn Storage>,
}

impl Files {
    fn new(world: &Rc<World>) -> Files {
        let file = |number| Rc::new(Recorder::new(world, number)) as Rc<dyn Storage>;
        Files { image: file(IMAGE), data: file(DATA), base: file(BASE) }
    }
}

/// All of a disk.
pub(crate) async fn read_all(chain: &Chain, size: u64) -> block::Result<Vec<u8>> {
    let buf = Buf::zeroed(size as usize);
    buf.fill(0xa5);
    chain.read(0, buf.clone()).await?;
    Ok(buf.to_vec())
}
