//! An opened qcow image: where the disk's bytes are, and places for new ones.

use std::cell::{Cell, RefCell};
use std::future::ready;
use std::rc::Rc;

use block::{Buf, Errno, Error, Limits, Result, Span};
use flate2::{Decompress, FlushDecompress};
use runtime::Handle;
use storage::{Io, Storage, Zeroing};

use super::entry::{Entry, Geometry, Nonsense};
use super::space::Space;
use super::{Header, POINTERS, STAGES};
use crate::metadata::{self, Loaded, Metadata, UnitLock, Units};
use crate::{Extent, Image, ImageError, Placement, Repair, Settings, Zeroed};

/// A placement of new clusters has no more bytes than this, or one cluster.
const PLACED_MAX: u64 = 2 << 20;
/// Blocks of tables have as many bytes as a cluster, and no more than a page.
const BLOCK_MAX: u64 = 4096;

/// A disk in a qcow image.
pub struct Qcow {
    pub(super) metadata: Metadata,
    pub(super) file: Rc<dyn Storage>,
    pub(super) geometry: Cell<Geometry>,
    pub(super) size: Cell<u64>,
    /// What the image does not say is below, not zero.
    pub(super) has_backing: bool,
    writable: bool,
    pub(super) space: Space,
    /// Clusters of the disk that are being given a place.
    pub(super) clusters: Units,
    /// Entries of the L1 table that are being given a table.
    pub(super) tables: Units,
    /// What was last unpacked: its entry and the bytes.
    unpacked: RefCell<Option<(u64, Rc<[u8]>)>>,
}

/// A run of clusters with entries of one kind, by bytes of the disk.
enum Run {
    /// They follow each other in the file.
    Data { at: u64, len: u64 },
    /// The image says nothing of them.
    Empty { len: u64 },
    /// One compressed cluster.
    Packed { len: u64 },
}

/// New clusters that are not shown yet.
struct Pending {
    place: u64,
    clusters: u64,
    /// Byte of the first one's entry.
    entry_at: u64,
    /// The entries stay in memory, and nobody else gives these clusters a place.
    _loaded: Loaded,
    _guard: UnitLock,
}

impl Qcow {
    /// Opens the image that this header is of.
    ///
    /// # Errors
    /// It is encrypted, or what a process before this one left cannot be taken over.
    pub async fn open(
        handle: &Handle,
        header: Header,
        file: Rc<dyn Storage>,
        settings: Settings,
    ) -> std::result::Result<Qcow, ImageError> {
        header.readable()?;
        let Settings { writable, cache, ledger, lasting } = settings;
        let of_metadata = metadata::Settings {
            block: header.geometry.cluster().min(BLOCK_MAX) as u32,
            budget: cache,
            stages: STAGES,
            lasting: lasting && writable,
        };
        let ledger = ledger.filter(|_| writable);
        let metadata = Metadata::new(handle, file.clone(), Vec::new(), of_metadata, ledger);
        let header = match metadata
            .take_over(async |file| Box::pin(super::check(&file, Repair::No)).await, |_, noted| noted)
            .await?
        {
            0 => header,
            // The size and the place of a table may be among what was taken over.
            _ => {
                metadata.flush().await?;
                Header::read(&file).await?
            }
        };
        Ok(Qcow {
            space: Space::new(header.geometry.cluster(), file.size()),
            metadata,
            size: Cell::new(header.size()),
            has_backing: header.backing().is_some(),
            geometry: Cell::new(header.geometry),
            writable,
            file,
            clusters: Units::default(),
            tables: Units::default(),
            unpacked: RefCell::default(),
        })
    }

    pub(super) fn nonsense(&self, what: Nonsense, cluster: u64) -> Error {
        let at = cluster << self.geometry.get().cluster_bits;
        Error::new(
            Errno::EIO,
            format!("find byte {at} of the disk: the qcow image is damaged: its map {what}"),
        )
    }

    pub(super) fn may_change(&self) -> Result<()> {
        match self.writable {
            true => Ok(()),
            false => Err(Error::new(Errno::EROFS, "change a qcow image that was opened to be read")),
        }
    }

    /// The L2 table for a cluster, if the L1 table's block is in memory.
    pub(super) fn table(&self, cluster: u64) -> Option<Result<Option<u64>>> {
        let geometry = self.geometry.get();
        let word = self.metadata.word(geometry.l1_word(cluster).0)?;
        let table = geometry.table(geometry.l1_entry(word), self.file.size());
        Some(table.map_err(|what| self.nonsense(what, cluster)))
    }

    /// The first run of a span, as far as the blocks of its tables are in memory.
    fn run(&self, span: Span) -> Option<Result<Run>> {
        let geometry = self.geometry.get();
        let first = span.at() >> geometry.cluster_bits;
        let last = (span.end() - 1) >> geometry.cluster_bits;
        let table_first = geometry.l1_word(first).1;
        let end = (last + 1).min(table_first + (1 << geometry.l2_bits));
        let table = match self.table(first)? {
            Ok(Some(table)) => table,
            Ok(None) => return Some(Ok(Run::Empty { len: self.until(span, end) })),
            Err(error) => return Some(Err(error)),
        };
        let file_len = self.file.size();
        let look = |cluster: u64| -> Option<std::result::Result<Entry, Nonsense>> {
            let word = self.metadata.word(table + (cluster - table_first) * 8)?;
            Some(geometry.entry(word, file_len))
        };
        let entry = match look(first)? {
            Ok(entry) => entry,
            Err(what) => return Some(Err(self.nonsense(what, first))),
        };
        let mut next = first + 1;
        let mut extend = |follows: &dyn Fn(u64) -> Entry| {
            while next < end && look(next) == Some(Ok(follows(next - first))) {
                next += 1;
            }
            self.until(span, next)
        };
        Some(Ok(match entry {
            Entry::Empty => Run::Empty { len: extend(&|_| Entry::Empty) },
            Entry::Data(at) => {
                let len = extend(&|nth| Entry::Data(at + (nth << geometry.cluster_bits)));
                Run::Data { at: at + span.at() % geometry.cluster(), len }
            }
            Entry::Packed(_) => Run::Packed { len: self.until(span, first + 1) },
        }))
    }

    /// Bytes from the span's first to this cluster, or to its end.
    fn until(&self, span: Span, cluster: u64) -> u64 {
        (cluster << self.geometry.get().cluster_bits).min(span.end()) - span.at()
    }

    /// Brings the entries of a span's first clusters into memory: all that are in one L2 table.
    pub(super) async fn load(&self, span: Span) -> Result<Vec<Loaded>> {
        loop {
            let geometry = self.geometry.get();
            let first = span.at() >> geometry.cluster_bits;
            let last = (span.end() - 1) >> geometry.cluster_bits;
            let (word_at, table_first) = geometry.l1_word(first);
            let word = Span::new(word_at, 8).expect("within the L1 table");
            let mut loaded = vec![self.metadata.load(word, POINTERS).await?];
            if let Some(table) = self.table(first).transpose()?.flatten() {
                let end = (last + 1).min(table_first + (1 << geometry.l2_bits));
                let entries = Span::new(table + (first - table_first) * 8, (end - first) * 8);
                loaded.push(self.metadata.load(entries.expect("within an L2 table"), POINTERS).await?);
            }
            // Else the L1 table has got another place meanwhile.
            if self.geometry.get() == geometry {
                return Ok(loaded);
            }
        }
    }

    /// The first run of a span.
    async fn find(&self, span: Span) -> Result<Run> {
        if let Some(run) = self.run(span) {
            return run;
        }
        let _loaded = self.load(span).await?;
        self.run(span).expect("its blocks were just loaded")
    }

    fn extent(&self, run: Run) -> Extent {
        match run {
            Run::Data { at, len } => match self.file.size().saturating_sub(at) {
                // The last cluster of a file need not be there as a whole.
                0 => Extent::Zero { len },
                there => Extent::Data { at, len: len.min(there), pin: None },
            },
            Run::Empty { len } if self.has_backing => Extent::Below { len },
            Run::Empty { len } => Extent::Zero { len },
            Run::Packed { len } => Extent::Packed { len, pin: None },
        }
    }

    async fn place_at(&self, span: Span) -> Result<Placement> {
        self.may_change()?;
        let geometry = self.geometry.get();
        let first = span.at() >> geometry.cluster_bits;
        loop {
            self.metadata.admit().await?;
            let loaded = self.load(span).await?;
            let Some(table) = self.table(first).expect("its block was just loaded")? else {
                self.make_table(first).await?;
                continue;
            };
            if let Run::Data { at, len } = self.run(span).expect("its blocks were just loaded")? {
                let end = Span::new(at, len).expect("within the file").end();
                // The last cluster of a file need not be there as a whole.
                self.metadata.extend(end.next_multiple_of(geometry.cluster())).await?;
                return Ok(Placement::shown(at, len, None));
            }
            let count = self.new_clusters(span);
            let guard = self.clusters.lock(first..first + count).await;
            // Another may have given them their places meanwhile.
            if self.new_clusters(span) < count {
                continue;
            }
            let place = self.space.take(&self.metadata, count << geometry.cluster_bits).await?;
            let pending = Pending {
                place: place.at,
                clusters: count,
                entry_at: table + (first - geometry.l1_word(first).1) * 8,
                _loaded: loaded.into_iter().next_back().expect("the L2 table's blocks"),
                _guard: guard,
            };
            let len = self.until(span, first + count);
            let before = span.at() % geometry.cluster();
            return Ok(Placement {
                at: place.at + before,
                len,
                before,
                after: (count << geometry.cluster_bits) - before - len,
                blank: place.blank,
                pin: None,
                keep: Some(Box::new(pending)),
            });
        }
    }

    /// How many clusters from the span's first on need a new place, as many as one placement takes. Their entries are in
    /// memory.
    fn new_clusters(&self, span: Span) -> u64 {
        let geometry = self.geometry.get();
        let most = PLACED_MAX.max(geometry.cluster());
        let mut rest = span.split_at((span.at() & !(geometry.cluster() - 1)).saturating_add(most)).0;
        let first = rest.at() >> geometry.cluster_bits;
        let table_end = geometry.l1_word(first).1 + (1 << geometry.l2_bits);
        let mut end = first;
        while !rest.is_empty() && end < table_end {
            match self.run(rest) {
                Some(Ok(Run::Empty { len } | Run::Packed { len })) => {
                    rest = rest.split_at(rest.at() + len).1;
                    end = rest.at().div_ceil(geometry.cluster());
                }
                Some(Ok(Run::Data { .. }) | Err(_)) | None => break,
            }
        }
        end - first
    }

    /// Gives the clusters around this one an L2 table, unless somebody else does.
    async fn make_table(&self, cluster: u64) -> Result<()> {
        let index = cluster >> self.geometry.get().l2_bits;
        let _guard = self.tables.lock(index..index + 1).await;
        // Not before it is locked: the L1 table may be elsewhere by now.
        let geometry = self.geometry.get();
        let word_at = geometry.l1_word(cluster).0;
        let word = Span::new(word_at, 8).expect("within the L1 table");
        let _loaded = self.metadata.load(word, POINTERS).await?;
        if self.table(cluster).expect("its block was just loaded")?.is_some() {
            return Ok(());
        }
        let len = geometry.l2_len().next_multiple_of(geometry.cluster());
        let place = self.space.take(&self.metadata, len).await?;
        // At once, so that a lack of space is this request's and not that of a later flush.
        if let Err(error) = self.metadata.write_through(place.at, &vec![0; len as usize]).await {
            self.space.give_back(place.at, len);
            return Err(error.during("write a new L2 table"));
        }
        // It is empty: whether it is there or not makes no difference to the disk.
        self.metadata.set(&[(word_at, geometry.l1_entry(place.at))]);
        Ok(())
    }

    /// The content of the compressed cluster that this entry is of.
    pub(super) async fn inflate(&self, entry: u64, packed: Span) -> Result<Rc<[u8]>> {
        if let Some((of, bytes)) = &*self.unpacked.borrow()
            && *of == entry
        {
            return Ok(bytes.clone());
        }
        let there = packed.split_at(self.file.size()).0;
        let buf = self.metadata.handle().pool().take(there.len() as usize);
        self.file.read(there.at(), buf.clone()).await?;
        let mut bytes = vec![0; self.geometry.get().cluster() as usize];
        // Without zlib's header. QEMU compresses with a window of 4 KiB, which any window can read.
        let mut inflater = Decompress::new(false);
        let ended = inflater.decompress(&buf.to_vec(), &mut bytes, FlushDecompress::Finish);
        if ended.is_err() || inflater.total_out() != bytes.len() as u64 {
            let (at, len) = (packed.at(), packed.len());
            let doing =
                format!("unpack the {len} bytes at {at} of the qcow image: they give no whole cluster");
            return Err(Error::new(Errno::EIO, doing));
        }
        let bytes: Rc<[u8]> = bytes.into();
        *self.unpacked.borrow_mut() = Some((entry, bytes.clone()));
        Ok(bytes)
    }

    async fn unpack_at(&self, at: u64, buf: Buf) -> Result<()> {
        let span = Span::of(at, &buf);
        let geometry = self.geometry.get();
        let cluster = at >> geometry.cluster_bits;
        let _loaded = self.load(span).await?;
        // It was compressed when it was looked up, and may have been written since.
        let Some(table) = self.table(cluster).expect("its block was just loaded")? else {
            return Err(Error::new(Errno::EIO, "unpack a cluster whose table is gone"));
        };
        let word = self.metadata.word(table + (cluster - geometry.l1_word(cluster).1) * 8);
        let entry = word.expect("its block was just loaded");
        match geometry.entry(entry, self.file.size()).map_err(|what| self.nonsense(what, cluster))? {
            Entry::Packed(packed) => {
                let bytes = self.inflate(entry, packed).await?;
                let skip = (at % geometry.cluster()) as usize;
                let part = bytes.get(skip..skip + buf.len());
                buf.put(0, part.expect("an extent of one cluster"));
                Ok(())
            }
            Entry::Data(place) => self.file.read(place + at % geometry.cluster(), buf).await,
            Entry::Empty => Err(Error::new(Errno::EIO, "unpack a cluster that is gone")),
        }
    }

    async fn commit_placed(&self, placement: Placement) -> Result<()> {
        // Another request may have published it, whose answer still waits.
        let Some(keep) = placement.keep else { return self.metadata.saved().await };
        let pending = keep.downcast::<Pending>().expect("a placement of this image");
        let bits = self.geometry.get().cluster_bits;
        let words: Vec<(u64, u64)> = (0..pending.clusters)
            .map(|nth| (pending.entry_at + nth * 8, pending.place + (nth << bits)))
            .collect();
        self.metadata.set(&words);
        drop(pending);
        self.metadata.saved().await
    }

    async fn zero_at(&self, span: Span) -> Result<Zeroed> {
        self.may_change()?;
        Ok(match self.find(span).await? {
            // Of what no image below has, nothing is to be said. But over another image zeroes are written like any
            // bytes: there is no other way to say zero in this format.
            Run::Empty { len } if !self.has_backing => {
                // Another request may have discarded it, whose answer still waits.
                self.metadata.saved().await?;
                Zeroed::Done { len }
            }
            Run::Empty { len } | Run::Data { len, .. } | Run::Packed { len } => Zeroed::Write { len },
        })
    }

    async fn discard_all(&self, span: Span) -> Result<()> {
        self.may_change()?;
        let mut rest = span;
        while !rest.is_empty() {
            let len = match self.extent(self.find(rest).await?) {
                // The cluster keeps its place: see the head of this module.
                Extent::Data { at, len, .. } => {
                    self.file.discard(Span::new(at, len).expect("within the file")).await?;
                    len
                }
                Extent::Zero { len } | Extent::Below { len } | Extent::Packed { len, .. } => len,
            };
            rest = rest.split_at(rest.at() + len).1;
        }
        Ok(())
    }
}

impl Image for Qcow {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn storage(&self) -> &Rc<dyn Storage> {
        &self.file
    }

    fn limits(&self) -> Limits {
        let limits = self.file.limits();
        Limits {
            read_only: limits.read_only || !self.writable,
            fast_zero: limits.fast_zero && !self.has_backing,
            ..limits
        }
    }

    fn mapped(&self, span: Span) -> Option<Extent> {
        match self.run(span)? {
            Ok(run) => Some(self.extent(run)),
            // Told where an error can be.
            Err(_) => None,
        }
    }

    fn map(&self, span: Span) -> Io<'_, Extent> {
        Box::pin(async move { self.find(span).await.map(|run| self.extent(run)) })
    }

    fn placed(&self, span: Span) -> Option<Placement> {
        match self.run(span)? {
            Ok(Run::Data { at, len }) if self.writable => {
                let is_there = at.checked_add(len).is_some_and(|end| end <= self.file.size());
                is_there.then(|| Placement::shown(at, len, None))
            }
            Ok(Run::Data { .. } | Run::Empty { .. } | Run::Packed { .. }) | Err(_) => None,
        }
    }

    fn place(&self, span: Span) -> Io<'_, Placement> {
        Box::pin(self.place_at(span))
    }

    fn commit(&self, placement: Placement) -> Io<'_> {
        Box::pin(self.commit_placed(placement))
    }

    fn committed(&self, placement: &Placement) -> bool {
        // Another request may have published it, whose answer still waits.
        placement.keep.is_none() && self.metadata.is_saved()
    }

    fn memory(&self) -> usize {
        self.metadata.memory()
    }

    fn give_up(&self, placement: Placement) {
        let Some(keep) = placement.keep else { return };
        let pending = keep.downcast::<Pending>().expect("a placement of this image");
        self.space.give_back(pending.place, pending.clusters << self.geometry.get().cluster_bits);
    }

    fn unpack(&self, at: u64, buf: Buf) -> Io<'_> {
        Box::pin(self.unpack_at(at, buf))
    }

    fn zero(&self, span: Span, _how: Zeroing) -> Io<'_, Zeroed> {
        Box::pin(self.zero_at(span))
    }

    fn discard(&self, span: Span) -> Io<'_> {
        Box::pin(self.discard_all(span))
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(self.metadata.flush())
    }

    fn grow(&self) -> Io<'_, u64> {
        let doing = "look for a larger qcow image: its size is in its header, resize it";
        Box::pin(ready(Err(Error::new(Errno::EOPNOTSUPP, doing))))
    }

    fn resize(&self, bytes: u64) -> Io<'_> {
        Box::pin(self.resize_to(bytes))
    }

    fn close(&self) -> Io<'_> {
        Box::pin(async move {
            self.metadata.flush().await?;
            if self.writable { self.space.trim(&self.metadata).await } else { Ok(()) }
        })
    }
}
