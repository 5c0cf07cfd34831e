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
use crate::dice::{Dice, mix};

/// The file with the image.
pub(crate) const IMAGE: usize = 0;
/// The file with its data, where that is another.
pub(crate) const DATA: usize = 1;
/// The file at the bottom.
pub(crate) const BASE: usize = 2;
/// The file of the image between.
pub(crate) const MIDDLE: usize = 3;
/// How many files there are.
pub(crate) const FILES: usize = 4;
/// Bytes that the image between has or has not as a whole.
const PIECE: u64 = 4096;
/// The write that the bottom has where the image between hides it.
const HIDDEN: u32 = 1 << 29;
/// The name of the snapshot.
const SNAPSHOT: &str = "before";

/// An image to be.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    pub(crate) kind: Kind,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// So many bytes of the disk are there from the start.
    pub(crate) below: u64,
    /// Where these are.
    pub(crate) past: Past,
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

/// Where what is there from the start is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Past {
    /// In a raw image below.
    Below,
    /// Some of it is in an image of this format below, the rest in the raw one that this is over.
    Between(Format),
    /// In the image itself, compressed.
    Packed,
    /// In the image itself, and shared with a snapshot in it.
    Shared,
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

    fn draw_past(&self, dice: &mut Dice) -> Past {
        let between = [Format::Qcow, Format::Qcow2, Format::Vhd];
        let draw = dice.below(8);
        match (self, draw) {
            #[cfg(test)]
            (Kind::Toy(_), _) => Past::Below,
            (Kind::Qcow2 { data: Data::Here, reserved: false, .. }, 0) => Past::Packed,
            (Kind::Qcow2 { data: Data::Here, reserved: false, refcount_bits: 2.., .. }, 1 | 2) => {
                Past::Shared
            }
            (_, 3 | 4) => Past::Between(dice.pick(&between)),
            (Kind::Raw | Kind::Qcow2 { .. } | Kind::Vhd { .. } | Kind::Qcow { .. }, _) => Past::Below,
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
        let past = kind.draw_past(dice);
        let (below, grain) = match past {
            Past::Below => (below, GRAIN),
            Past::Between(_) => (below, 512),
            Past::Packed | Past::Shared => (below.min(size), GRAIN),
        };
        let lasting = dice.percent(80);
        Subject {
            kind,
            size,
            below: below / grain * grain,
            past,
            unit,
            has_ledger: lasting && dice.percent(80),
            lasting,
            cache: dice.pick(&[0, 1024, 4096]),
        }
    }

    /// Whether there is an image below this one.
    fn is_over(&self) -> bool {
        self.below > 0 && matches!(self.past, Past::Below | Past::Between(_))
    }

    /// The files of a new image, durable.
    pub(crate) fn create(&self) -> Result<Vec<Bytes>, String> {
        let mut base = Bytes::new(if self.is_over() { self.below } else { 0 });
        base.write(0, &pattern(0, base.size(), BELOW));
        if let Past::Between(_) = self.past {
            for (at, len) in self.between() {
                base.write(at, &pattern(at, len, HIDDEN));
            }
        }
        let files = vec![Bytes::new(0), Bytes::new(0), base, Bytes::new(0)];
        let world = World::new(files, Notes::default(), Pace::Instant, Dice::new(0));
        let files = Files::new(&world);
        let this = self.clone();
        let runtime = runtime(&world);
        let handle = runtime.handle().clone();
        let made = runtime.block_on(async move {
            this.fill(&files).await?;
            this.fill_past(&handle, &files).await
        });
        made.map_err(|error| format!("create: {error}"))?;
        drop(runtime);
        Ok(world.files())
    }

    /// What the image between has: first bytes and lengths.
    fn between(&self) -> impl Iterator<Item = (u64, u64)> {
        let pieces =
            (0..self.below).step_by(PIECE as usize).filter(|at| mix(*at ^ self.size).is_multiple_of(2));
        pieces.map(|at| (at, PIECE.min(self.below - at)))
    }

    /// Brings what is there from the start, where that is not the raw image below.
    async fn fill_past(&self, handle: &Handle, files: &Files) -> Result<(), ImageError> {
        if self.below == 0 {
            return Ok(());
        }
        match self.past {
            Past::Below => Ok(()),
            Past::Between(format) => {
                create_between(format, self.below, &files.middle).await?;
                let top = open_between(handle, format, &files.middle, true).await?;
                let chain = Chain::over(handle, top, vec![Rc::new(Raw::new(files.base.clone()))]);
                for (at, len) in self.between() {
                    chain.write(at, Buf::from_bytes(&pattern(at, len, BELOW))).await?;
                }
                Ok(chain.close().await?)
            }
            Past::Packed => {
                let mut packer = qcow2::Packer::new(&files.image).await?;
                let failed = |error: std::io::Error| ImageError::Refused(error.to_string());
                let mut compressor = qcow2::Compressor::new(packer.compression()).map_err(failed)?;
                let cluster = packer.cluster_size();
                for number in 0..self.below.div_ceil(cluster) {
                    let at = number * cluster;
                    let mut bytes = pattern(at, cluster.min(self.below - at), BELOW);
                    bytes.resize(cluster as usize, 0);
                    let packed = compressor.pack(&bytes).map_err(failed)?;
                    packer.put(number, packed, &bytes);
                    while let Some((at, bytes)) = packer.output() {
                        let end = at + bytes.len() as u64;
                        if files.image.size() < end {
                            files.image.resize(end).await?;
                        }
                        files.image.write(at, Buf::from_bytes(&bytes)).await?;
                    }
                }
                packer.finish(&files.image).await
            }
            Past::Shared => {
                let header = qcow2::Header::read(&files.image).await?;
                let settings = Settings { writable: true, ..Settings::default() };
                let top = Qcow2::open(handle, header, files.image.clone(), None, settings).await?;
                let chain = Chain::new(handle, Rc::new(top));
                chain.write(0, Buf::from_bytes(&pattern(0, self.below, BELOW))).await?;
                chain.close().await?;
                drop(chain);
                let when = Duration::from_secs(1_143_000_000);
                qcow2::take_snapshot(&files.image, SNAPSHOT, when).await
            }
        }
    }

    /// Makes the disk what it was at the start, where a snapshot says that; whether there is one.
    pub(crate) async fn go_back(&self, world: &Rc<World>) -> Result<bool, ImageError> {
        if self.past != Past::Shared || self.below == 0 {
            return Ok(false);
        }
        qcow2::apply_snapshot(&Files::new(world).image, SNAPSHOT).await?;
        Ok(true)
    }

    async fn fill(&self, files: &Files) -> Result<(), ImageError> {
        let below = match self.past {
            Past::Below => ("below", Format::Raw),
            Past::Between(format) => ("middle", format),
            Past::Packed | Past::Shared => ("", Format::Raw),
        };
        let name = || self.is_over().then(|| below.0.to_owned());
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
                    |name| Backing { name, format: Some(below.1), others: Vec::new(), unique_id: None };
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
                    subformat: match (is_fixed, self.is_over()) {
                        (true, _) => vhd::Subformat::Fixed,
                        (false, false) => vhd::Subformat::Dynamic,
                        (false, true) => vhd::Subformat::Differencing,
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
        let Files { image, data, base, middle } = Files::new(world);
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
        let mut below = Vec::new();
        if self.is_over() {
            if let Past::Between(format) = self.past {
                below.push(open_between(handle, format, &middle, false).await?);
            }
            below.push(Rc::new(Raw::new(base)) as Rc<dyn Image>);
        }
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

/// Makes an image of so many bytes over the raw one.
async fn create_between(format: Format, size: u64, file: &Rc<dyn Storage>) -> Result<(), ImageError> {
    let name = "below".to_owned();
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_143_000_000);
    match format {
        Format::Raw => file.resize(size).await.map_err(ImageError::Io),
        Format::Qcow => {
            qcow::create(file, &qcow::Create { size, backing: Some(name), cluster_size: Some(512) }).await
        }
        Format::Qcow2 => {
            let backing = Backing { name, format: Some(Format::Raw), others: Vec::new(), unique_id: None };
            let options = qcow2::Create {
                size,
                cluster_size: 1024,
                backing: Some(backing),
                ..qcow2::Create::default()
            };
            qcow2::create(file, &options).await
        }
        Format::Vhd => {
            let options = vhd::Create {
                size,
                subformat: vhd::Subformat::Differencing,
                block: 8192,
                parent: Some(vhd::Parent { name, unique_id: None, changed: time }),
                unique_id: Some([8; 16]),
                created: time,
                ..vhd::Create::default()
            };
            vhd::create(file, &options).await
        }
    }
}

async fn open_between(
    handle: &Handle,
    format: Format,
    file: &Rc<dyn Storage>,
    writable: bool,
) -> Result<Rc<dyn Image>, ImageError> {
    let (file, settings) = (file.clone(), Settings { writable, ..Settings::default() });
    Ok(match format {
        Format::Raw => Rc::new(Raw::new(file)),
        Format::Qcow => {
            let header = qcow::Header::read(&file).await?;
            Rc::new(Qcow::open(handle, header, file, settings).await?)
        }
        Format::Qcow2 => {
            let header = qcow2::Header::read(&file).await?;
            Rc::new(Qcow2::open(handle, header, file, None, settings).await?)
        }
        Format::Vhd => {
            let header = vhd::Header::read(&file).await?;
            Rc::new(Vhd::open(handle, header, file, settings).await?)
        }
    })
}

struct Files {
    image: Rc<dyn Storage>,
    data: Rc<dyn Storage>,
    base: Rc<dyn Storage>,
    middle: Rc<dyn Storage>,
}

impl Files {
    fn new(world: &Rc<World>) -> Files {
        let file = |number| Rc::new(Recorder::new(world, number)) as Rc<dyn Storage>;
        Files { image: file(IMAGE), data: file(DATA), base: file(BASE), middle: file(MIDDLE) }
    }
}

/// All of a disk.
pub(crate) async fn read_all(chain: &Chain, size: u64) -> block::Result<Vec<u8>> {
    let buf = Buf::zeroed(size as usize);
    buf.fill(0xa5);
    chain.read(0, buf.clone()).await?;
    Ok(buf.to_vec())
}
