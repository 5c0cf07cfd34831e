//! A qcow2 image as a map from the disk to its storage.

use std::cell::Cell;
use std::rc::Rc;

use block::{Buf, Errno, Error, Limits, Result, Span};
use runtime::Handle;
use storage::{Io, Permits, Storage, Zeroing};

use super::entry::{Entry, Packed, Shape};
use super::health::Health;
use super::map::{Entries, Look};
use super::packed::{Unpacked, unpack};
use super::refcount::{Allocator, span};
use super::table::Tables;
use super::width::Width;
use super::{Compression, Header, prepare};
use crate::metadata::{Metadata, Reclaim, Settings, Units};
use crate::{Extent, Image, ImageError, Placement, Repair, Zeroed};

/// Blocks of metadata have so many bytes, unless clusters have fewer.
const BLOCK: u64 = 4096;
/// Rounds write blocks of counts, then the table that leads to these, then what points to clusters.
const STAGES: u8 = 3;

/// An image of version 2 or 3, open.
pub struct Qcow2 {
    pub(super) shape: Shape,
    compression: Compression,
    /// Whether what is nowhere is in another image.
    pub(super) has_backing: bool,
    /// Whether the data file alone shows the disk too.
    pub(super) raw_data: bool,
    pub(super) size: Cell<u64>,
    pub(super) metadata: Metadata,
    /// Where the disk's bytes are: the image's file, or another one.
    pub(super) data: Rc<dyn Storage>,
    pub(super) health: Rc<Health>,
    pub(super) tables: Tables,
    /// Only where the image is written.
    pub(super) allocator: Option<Rc<Allocator>>,
    /// Locks on clusters of the disk: who changes the entry of one has it.
    pub(super) units: Units,
    unpacked: Rc<Unpacked>,
    unpacking: Units,
    /// Taken by who makes the data file longer.
    pub(super) lengthening: Permits,
    limits: Limits,
    /// Bytes of the file when the image was opened.
    opened_len: u64,
}

impl Qcow2 {
    /// Opens the image with this header in `file`, and its bytes in `data` if its header says that they are in another file.
    ///
    /// # Errors
    /// It is not fit to be written, or cannot be read.
    pub async fn open(
        handle: &Handle,
        mut header: Header,
        file: Rc<dyn Storage>,
        data: Option<Rc<dyn Storage>>,
        settings: crate::Settings,
    ) -> std::result::Result<Qcow2, ImageError> {
        if header.has_data_file() != data.is_some() {
            return Err(ImageError::Refused(
                "a qcow2 image has an external data file if its header says so, and only then".to_owned(),
            ));
        }
        if settings.writable && !header.is_corrupt() {
            prepare(&file, &mut header).await?;
        }
        let shape = Shape {
            cluster_bits: header.cluster_bits,
            extended: header.has_extended_l2(),
            zeroes: header.version > 2,
            external: data.is_some(),
        };
        let opened_len = file.size();
        let metadata = Metadata::new(
            handle,
            file.clone(),
            data.iter().cloned().collect(),
            Settings {
                block: BLOCK.min(shape.cluster()) as u32,
                budget: settings.cache,
                stages: STAGES,
                lasting: settings.lasting && settings.writable,
            },
            settings.ledger,
        );
        let width = Width::new(header.refcount_order);
        let check = async |file| Box::pin(super::check(&file, Repair::No)).await;
        let taken_over = metadata.take_over(check, |found, noted| width.larger(found, noted)).await?;
        if settings.writable && header.is_corrupt() {
            // Whoever repairs it finds what guests were answered for in the image, and no ledger that nobody could use.
            if taken_over > 0 {
                metadata.flush().await?;
            }
            prepare(&file, &mut header).await?;
        }
        let health = Rc::new(Health::new(&metadata, &header, settings.writable));
        let unpacked = Rc::new(Unpacked::default());
        let tables = Tables::open(&metadata, &header, &health, shape).await?;
        let allocator = if settings.writable {
            let mut reserved = tables.reserved()?;
            reserved.add(span(0, shape.cluster())?);
            let allocator = Allocator::open(&metadata, &header, &health, &unpacked, reserved).await?;
            let reclaim: Rc<dyn Reclaim> = allocator.clone();
            metadata.on_reclaim(Rc::downgrade(&reclaim));
            Some(allocator)
        } else {
            None
        };
        let has_backing = header.backing().is_some();
        let data = data.unwrap_or(file);
        let limits = Limits {
            read_only: !settings.writable,
            fast_zero: data.limits().fast_zero || shape.zeroes || !has_backing,
            ..data.limits()
        };
        Ok(Qcow2 {
            shape,
            compression: header.compression,
            has_backing,
            raw_data: header.is_data_raw(),
            size: Cell::new(header.size()),
            metadata,
            data,
            health,
            tables,
            allocator,
            units: Units::default(),
            unpacked,
            unpacking: Units::default(),
            lengthening: Permits::new(1),
            limits,
            opened_len,
        })
    }

    /// Its metadata in memory.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Bytes of a block of metadata.
    pub(super) fn block_size(&self) -> u64 {
        BLOCK.min(self.shape.cluster())
    }

    /// Who gives out clusters.
    pub(super) fn allocator(&self) -> Result<&Allocator> {
        self.allocator.as_deref().ok_or_else(|| Error::new(Errno::EROFS, "the image was opened for reading"))
    }

    /// The entry of the cluster with this byte of the disk.
    fn look_at(&self, at: u64) -> Look<Option<Entry>> {
        let index = self.tables.index(at >> self.shape.cluster_bits);
        match self.tables.table(index.table) {
            Ok(Some(table)) => match self.entry(Entries { table: table.at, first: index }, 0) {
                Look::Found(entry) => Look::Found(Some(entry)),
                Look::Load(entries) => Look::Load(entries),
                Look::Nonsense(wrong) => Look::Nonsense(wrong),
            },
            Ok(None) => Look::Found(None),
            Err(wrong) => Look::Nonsense(wrong),
        }
    }

    pub(super) async fn unpack_bytes(&self, at: u64, into: Buf) -> Result<()> {
        let cluster = at >> self.shape.cluster_bits;
        // One unpacks it, others who want the same wait and find it.
        let _lock = self.unpacking.lock(cluster..cluster + 1).await;
        let _pin = self.metadata.pin();
        let packed = match self.find(|| self.look_at(at)).await? {
            Some(Entry::Packed(packed)) => packed,
            // It was written meanwhile.
            Some(Entry::Plain(_)) | None => return self.read_plain(at, into).await,
        };
        let bytes = match self.unpacked.get(packed) {
            Some(bytes) => bytes,
            None => {
                let bytes = self.unpack_cluster(packed).await?;
                self.unpacked.put(packed, bytes.clone());
                bytes
            }
        };
        let skip = (at & (self.shape.cluster() - 1)) as usize;
        let Some(part) = bytes.get(skip..skip + into.len()) else {
            return Err(Error::new(Errno::EINVAL, "unpack bytes of more than one cluster"));
        };
        into.put(0, part);
        Ok(())
    }

    async fn unpack_cluster(&self, packed: Packed) -> Result<Rc<[u8]>> {
        // The last sector need not be there as a whole, nor be its own.
        let place = span(packed.at, packed.len)?.split_at(self.data.size()).0;
        if place.is_empty() {
            let what = format!("a compressed cluster is at byte {}, behind the file's end", packed.at);
            return Err(self.health.corrupt(what).await);
        }
        let bytes = self.metadata.read_through(place).await?;
        match unpack(self.compression, &bytes, self.shape.cluster() as usize) {
            Ok(unpacked) => Ok(unpacked.into()),
            // It does harm to nothing else: the image may be written all the same, this cluster too.
            Err(broken) => Err(Error::new(
                Errno::EIO,
                format!("unpack a cluster, which is compressed at {place:?}: {broken}"),
            )),
        }
    }

    /// Reads bytes that are not compressed any more.
    async fn read_plain(&self, at: u64, into: Buf) -> Result<()> {
        let mut done = 0;
        while done < into.len() {
            let rest = span(at + done as u64, (into.len() - done) as u64)?;
            match self.find(|| self.look(rest)).await? {
                Extent::Data { at, len, pin: _pin } => {
                    self.data.read(at, into.slice(done, len as usize)).await?;
                    done += len as usize;
                }
                Extent::Zero { len } | Extent::Below { len } => {
                    into.slice(done, len as usize).fill(0);
                    done += len as usize;
                }
                Extent::Packed { .. } => {
                    return Err(Error::new(
                        Errno::EIO,
                        "read what was compressed a moment ago, and is again",
                    ));
                }
            }
        }
        Ok(())
    }

    async fn close_file(&self) -> Result<()> {
        let Some(allocator) = &self.allocator else { return Ok(()) };
        self.metadata.flush().await?;
        if self.metadata.has_retired() {
            tracing::warn!(
                "space that nothing uses any more cannot be given back: `tapdisk check --repair leaks` does it"
            );
            return Ok(());
        }
        // What was given back lowers counts, which takes another round.
        allocator.all_reclaimed().await;
        self.metadata.flush().await?;
        if !self.health.is_writable() {
            return Ok(());
        }
        allocator.settle().await?;
        self.metadata.flush().await?;
        // Not of what was there when it was opened: the counts of that are another program's word.
        let end = allocator.end().await?.max(self.opened_len);
        let file = self.metadata.file();
        if end < file.size() {
            file.resize(end)
                .await
                .map_err(|error| error.during("cut off what nothing uses at the file's end"))?;
            self.metadata.sync().await?;
        }
        Ok(())
    }
}

impl Image for Qcow2 {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn storage(&self) -> &Rc<dyn Storage> {
        &self.data
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn mapped(&self, wanted: Span) -> Option<Extent> {
        match self.look(wanted) {
            Look::Found(extent) => Some(extent),
            Look::Load(_) | Look::Nonsense(_) => None,
        }
    }

    fn map(&self, wanted: Span) -> Io<'_, Extent> {
        Box::pin(self.find(move || self.look(wanted)))
    }

    fn placed(&self, wanted: Span) -> Option<Placement> {
        self.shown(wanted)
    }

    fn place(&self, wanted: Span) -> Io<'_, Placement> {
        Box::pin(self.find_place(wanted))
    }

    fn commit(&self, placement: Placement) -> Io<'_> {
        Box::pin(self.publish(placement))
    }

    fn committed(&self, placement: &Placement) -> bool {
        // Another request may have published it, whose answer still waits.
        placement.keep.is_none() && self.metadata.is_saved()
    }

    fn memory(&self) -> usize {
        self.metadata.memory()
    }

    fn give_up(&self, placement: Placement) {
        self.give_up_place(placement);
    }

    fn unpack(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(self.unpack_bytes(at, buf))
    }

    fn zero(&self, wanted: Span, how: Zeroing) -> Io<'_, Zeroed> {
        Box::pin(self.zero_by_map(wanted, how))
    }

    fn discard(&self, wanted: Span) -> Io<'_> {
        Box::pin(self.discard_clusters(wanted))
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(self.metadata.flush())
    }

    fn grow(&self) -> Io<'_, u64> {
        let error = Error::new(
            Errno::EOPNOTSUPP,
            "a qcow2 disk grows by tapdisk resize, and by nothing from outside",
        );
        Box::pin(std::future::ready(Err(error)))
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        Box::pin(self.enlarge(bytes))
    }

    fn close(&self) -> Io<'_> {
        Box::pin(self.close_file())
    }

    /// The data may be in one file and the tables in another.
    fn poison(&self) -> Option<Error> {
        self.metadata.poison()
    }
}
