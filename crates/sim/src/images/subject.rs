//! What is put to the test: an image of some format and some options, and how it is opened.

use std::rc::Rc;
use std::time::{Duration, SystemTime};

use block::Buf;
use image::qcow::{self, Qcow};
use image::qcow2::{self, Qcow2};
use image::vhd::{self, Vhd};
use image::{Backing, Chain, Format, Image, ImageError, Raw, Repair, Report, Settings};
use runtime::Handle;
use storage::Storage;

use super::bytes::Bytes;
use super::model::{BELOW, GRAIN, pattern};
use super::recorder::{Book, Recorder, runtime};
#[cfg(test)]
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

/// Formats with their options; sizes in bytes.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Raw,
    /// For trying the trial.
    #[cfg(test)]
    Toy(Flaw),
    Qcow2 {
        cluster: u64,
        version: u32,
        refcount_bits: u32,
        extended: bool,
        lazy: bool,
        data: Data,
        reserved: bool,
    },
    Vhd {
        block: u32,
        is_fixed: bool,
        reserved: bool,
    },
    Qcow {
        cluster: u32,
    },
}

/// Where the bytes of a qcow2 disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    Here,
    /// In a file of their own.
    Apart,
    /// In one that shows the disk by itself.
    Raw,
}

impl Kind {
    fn draw(dice: &mut Dice) -> Kind {
        match dice.below(20) {
            0 => Kind::Raw,
            1..=10 => Kind::draw_qcow2(dice),
            11..=15 => Kind::Vhd {
                block: dice.pick(&[4096, 4096, 8192, 65536]),
                is_fixed: dice.percent(5),
                reserved: dice.percent(5),
            },
            16.. => Kind::Qcow { cluster: dice.pick(&[512, 512, 1024, 4096, 4096, 65536]) },
        }
    }

    fn draw_qcow2(dice: &mut Dice) -> Kind {
        let version = if dice.percent(20) { 2 } else { 3 };
        let extended = version == 3 && dice.percent(20);
        let clusters: &[u64] = if extended {
            &[16384, 16384, 32768]
        } else {
            &[512, 512, 512, 1024, 1024, 2048, 4096, 4096, 65536]
        };
        let data = dice.pick(&[Data::Here, Data::Here, Data::Here, Data::Here, Data::Apart, Data::Raw]);
        Kind::Qcow2 {
            cluster: dice.pick(clusters),
            version,
            refcount_bits: if version == 2 { 16 } else { dice.pick(&[16, 16, 1, 2, 4, 8, 32, 64]) },
            extended,
            lazy: version == 3 && dice.percent(15),
            data: if version == 3 { data } else { Data::Here },
            reserved: dice.percent(10),
        }
    }

    /// What is written to as one, in bytes.
    fn unit(&self) -> u64 {
        match self {
            Kind::Raw => 4096,
            #[cfg(test)]
            Kind::Toy(_) => toy::CLUSTER,
            Kind::Qcow2 { cluster, .. } => *cluster,
            Kind::Vhd { block, .. } => u64::from(*block),
            Kind::Qcow { cluster } => u64::from(*cluster),
        }
    }

    fn may_be_over_another(&self) -> bool {
        match self {
            Kind::Raw | Kind::Vhd { is_fixed: true, .. } => false,
            Kind::Qcow2 { data, reserved, .. } => *data != Data::Raw && !reserved,
            Kind::Vhd { reserved, .. } => !reserved,
            Kind::Qcow { .. } => true,
            #[cfg(test)]
            Kind::Toy(_) => true,
        }
    }
}

impl Subject {
    pub(crate) fn draw(dice: &mut Dice) -> Subject {
        Subject::of(Kind::draw(dice), dice)
    }

    /// One of this kind.
    pub(crate) fn of(kind: Kind, dice: &mut Dice) -> Subject {
        let unit = kind.unit();
        // So many that there are several tables, if the units are small.
        let units = if unit > 4096 { dice.between(3, 10) } else { dice.between(6, 160) };
        let size = unit * units + dice.pick(&[0, 0, 512, 1536]) % unit;
        let below = if kind.may_be_over_another() {
            dice.pick(&[0, size, size / 2 / 512 * 512, size + 4096])
        } else {
            0
        };
        let below = below.saturating_sub(dice.pick(&[0, 0, 0, GRAIN, 512]));
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
        let name = || (self.below > 0).then(|| "below".to_owned());
        match &self.kind {
            Kind::Raw => files.image.resize(self.size).await.map_err(ImageError::Io),
            #[cfg(test)]
            Kind::Toy(_) => toy::create(&files.image, self.size).await,
            Kind::Qcow2 { cluster, version, refcount_bits, extended, lazy, data, reserved } => {
                let apart = || qcow2::DataFile {
                    name: "data".into(),
                    storage: files.data.clone(),
                    raw: *data == Data::Raw,
                };
                let backing =
                    |name| Backing { name, format: Some(Format::Raw), others: Vec::new(), unique_id: None };
                let options = qcow2::Create {
                    size: self.size,
                    cluster_size: *cluster,
                    version: *version,
                    refcount_bits: *refcount_bits,
                    extended_l2: *extended,
                    lazy_refcounts: *lazy,
                    backing: name().map(backing),
                    data_file: (*data != Data::Here).then(apart),
                    preallocation: if *reserved {
                        qcow2::Preallocation::Metadata
                    } else {
                        qcow2::Preallocation::Off
                    },
                    ..qcow2::Create::default()
                };
                qcow2::create(&files.image, &options).await
            }
            Kind::Vhd { block, is_fixed, reserved } => {
                // The same time in all runs; a VHD knows none before 2000.
                let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_143_000_000);
                let parent = |name| vhd::Parent { name, unique_id: None, changed: time };
                let options = vhd::Create {
                    size: self.size,
                    subformat: match (is_fixed, self.below) {
                        (true, _) => vhd::Subformat::Fixed,
                        (false, 0) => vhd::Subformat::Dynamic,
                        (false, 1..) => vhd::Subformat::Differencing,
                    },
                    block: *block,
                    parent: name().map(parent),
                    preallocation: if *reserved {
                        vhd::Preallocation::Metadata
                    } else {
                        vhd::Preallocation::Off
                    },
                    unique_id: Some([7; 16]),
                    created: time,
                    ..vhd::Create::default()
                };
                vhd::create(&files.image, &options).await
            }
            Kind::Qcow { cluster } => {
                let options = qcow::Create { size: self.size, backing: name(), cluster_size: Some(*cluster) };
                qcow::create(&files.image, &options).await
            }
        }
    }

    /// Opens it for writing, over what is below.
    pub(crate) async fn open(&self, handle: &Handle, world: &Rc<World>) -> Result<Chain, ImageError> {
        let Files { image, data, base } = Files::new(world);
        let ledger =
            self.has_ledger.then(|| Box::new(Book(world.clone())) as Box<dyn image::metadata::Ledger>);
        let settings = Settings { writable: true, cache: self.cache, ledger, lasting: self.lasting };
        let top: Rc<dyn Image> = match &self.kind {
            Kind::Raw => Rc::new(Raw::new(image)),
            #[cfg(test)]
            Kind::Toy(flaw) => Rc::new(Toy::open(image, settings.ledger, *flaw).await?),
            Kind::Qcow2 { data: whose, .. } => {
                let header = qcow2::Header::read(&image).await?;
                let data = (*whose != Data::Here).then_some(data);
                Rc::new(Qcow2::open(handle, header, image, data, settings).await?)
            }
            Kind::Vhd { .. } => {
                let header = vhd::Header::read(&image).await?;
                Rc::new(Vhd::open(handle, header, image, settings).await?)
            }
            Kind::Qcow { .. } => {
                let header = qcow::Header::read(&image).await?;
                Rc::new(Qcow::open(handle, header, image, settings).await?)
            }
        };
        let below = if self.below > 0 { vec![Rc::new(Raw::new(base)) as Rc<dyn Image>] } else { vec![] };
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
            Kind::Qcow2 { .. } => qcow2::check(&files.image, repair).await.map(Some),
            #[cfg(test)]
            Kind::Toy(_) => toy::check(&files.image, repair).await.map(Some),
            Kind::Vhd { .. } => vhd::check(&files.image, repair).await.map(Some),
            Kind::Qcow { .. } => qcow::check(&files.image, repair).await.map(Some),
        }
    }

    /// Whether a repair gives back all that is wasted; in a VHD there is no word for space between blocks.
    pub(crate) fn gives_back_leaks(&self) -> bool {
        !matches!(self.kind, Kind::Vhd { .. })
    }

    /// Whether what was answered is there after the death of the process.
    pub(crate) fn outlives_its_process(&self) -> bool {
        self.lasting || matches!(self.kind, Kind::Raw)
    }
}

struct Files {
    image: Rc<dyn Storage>,
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
