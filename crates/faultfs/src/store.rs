//! The store: the directory and its files, each as the guest sees it and as a power cut would leave it.
//!
//! What a power cut keeps: the bytes and the size of a file as of its last sync; a name as of the last sync of the
//! directory, except that syncing a new file also keeps the name under which it was created, as ext4 and XFS do.
//! With a seed, any subset of the unsynced sectors, holes and sizes is kept as well, and a beginning of the unsynced
//! changes of the directory, since a journal keeps those in order.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::SystemTime;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::content::{Change, Content, SECTOR, Snapshot};

/// Names a file for as long as anything refers to it.
pub(crate) type Inode = u64;

#[derive(Debug)]
pub(crate) struct File {
    live: Content,
    durable: Content,
    unsynced: Vec<Change>,
    opens: u64,
    pub(crate) mode: u32,
    pub(crate) modified: SystemTime,
}

#[derive(Clone, Debug)]
enum NameChange {
    Add(String, Inode),
    Remove(String),
    Rename(String, String),
}

type Names = BTreeMap<String, Inode>;

#[derive(Debug)]
pub(crate) struct Store {
    files: BTreeMap<Inode, File>,
    live_names: Names,
    durable_names: Names,
    unsynced_names: Vec<NameChange>,
    last_inode: Inode,
    capacity: Option<u64>,
}

impl Store {
    pub(crate) fn new(root: Inode, capacity: Option<u64>) -> Store {
        Store {
            files: BTreeMap::new(),
            live_names: Names::new(),
            durable_names: Names::new(),
            unsynced_names: Vec::new(),
            last_inode: root,
            capacity,
        }
    }

    // The directory.

    pub(crate) fn names(&self) -> &Names {
        &self.live_names
    }

    pub(crate) fn find(&self, name: &str) -> Result<Inode, Errno> {
        self.live_names.get(name).copied().ok_or(Errno::NOENT)
    }

    pub(crate) fn name_of(&self, inode: Inode) -> Option<&str> {
        self.live_names.iter().find(|(_, its)| **its == inode).map(|(name, _)| name.as_str())
    }

    pub(crate) fn create(&mut self, name: &str, mode: u32) -> Result<Inode, Errno> {
        if self.live_names.contains_key(name) {
            return Err(Errno::EXIST);
        }
        self.last_inode += 1;
        let file = File {
            live: Content::default(),
            durable: Content::default(),
            unsynced: Vec::new(),
            opens: 0,
            mode,
            modified: SystemTime::now(),
        };
        self.files.insert(self.last_inode, file);
        self.change_names(NameChange::Add(name.to_owned(), self.last_inode));
        Ok(self.last_inode)
    }

    pub(crate) fn unlink(&mut self, name: &str) -> Result<(), Errno> {
        self.find(name)?;
        self.change_names(NameChange::Remove(name.to_owned()));
        self.forget_unreachable();
        Ok(())
    }

    pub(crate) fn rename(&mut self, from: &str, to: &str, replace: bool) -> Result<(), Errno> {
        let inode = self.find(from)?;
        match self.find(to) {
            Ok(there) if there == inode => return Ok(()),
            Ok(_) if !replace => return Err(Errno::EXIST),
            Ok(_) | Err(_) => {}
        }
        self.change_names(NameChange::Rename(from.to_owned(), to.to_owned()));
        self.forget_unreachable();
        Ok(())
    }

    pub(crate) fn sync_names(&mut self) {
        self.unsynced_names.clear();
        self.durable_names = self.live_names.clone();
        self.forget_unreachable();
    }

    fn change_names(&mut self, change: NameChange) {
        change.apply(&mut self.live_names);
        self.unsynced_names.push(change);
    }

    // One file.

    pub(crate) fn file(&self, inode: Inode) -> Result<&File, Errno> {
        self.files.get(&inode).ok_or(Errno::STALE)
    }

    fn file_mut(&mut self, inode: Inode) -> Result<&mut File, Errno> {
        self.files.get_mut(&inode).ok_or(Errno::STALE)
    }

    pub(crate) fn open(&mut self, inode: Inode) -> Result<(), Errno> {
        self.file_mut(inode)?.opens += 1;
        Ok(())
    }

    pub(crate) fn close(&mut self, inode: Inode) -> Result<(), Errno> {
        self.file_mut(inode)?.opens -= 1;
        self.forget_unreachable();
        Ok(())
    }

    pub(crate) fn read(&self, inode: Inode, at: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; len];
        let len = self.file(inode)?.live.read(at, &mut bytes);
        bytes.truncate(len);
        Ok(bytes)
    }

    /// Writes as much of `bytes` as there is space for, as ext4 and XFS do, and says how much that was.
    pub(crate) fn write(&mut self, inode: Inode, at: u64, mut bytes: Vec<u8>) -> Result<usize, Errno> {
        let free = self.free_bytes();
        let file = self.file_mut(inode)?;
        let end = at.checked_add(bytes.len() as u64).ok_or(Errno::FBIG)?;
        let len = file.live.writable_len(at..end, free) as usize;
        if len == 0 && !bytes.is_empty() {
            return Err(Errno::NOSPC);
        }
        bytes.truncate(len);
        file.change(Change::Write { at, bytes });
        file.grow(at + len as u64);
        Ok(len)
    }

    pub(crate) fn resize(&mut self, inode: Inode, size: u64) -> Result<(), Errno> {
        self.file_mut(inode)?.change(Change::Resize(size));
        Ok(())
    }

    pub(crate) fn allocate(
        &mut self,
        inode: Inode,
        span: Range<u64>,
        mode: FallocateFlags,
    ) -> Result<(), Errno> {
        let free = self.free_bytes();
        let file = self.file_mut(inode)?;
        let needs_space =
            || if file.live.missing_bytes(span.clone()) > free { Err(Errno::NOSPC) } else { Ok(()) };
        let keep_size = mode.contains(FallocateFlags::KEEP_SIZE);
        let kind = mode.difference(FallocateFlags::KEEP_SIZE);
        if kind == FallocateFlags::PUNCH_HOLE && keep_size {
            file.change(Change::Punch(span.clone()));
        } else if kind == FallocateFlags::ZERO_RANGE {
            needs_space()?;
            file.change(Change::Zero(span.clone()));
        } else if kind.is_empty() {
            needs_space()?;
            file.change(Change::Allocate(span.clone()));
        } else {
            return Err(Errno::OPNOTSUPP);
        }
        if !keep_size {
            file.grow(span.end);
        }
        Ok(())
    }

    pub(crate) fn seek(&self, inode: Inode, to: SeekFrom) -> Result<u64, Errno> {
        let content = &self.file(inode)?.live;
        let found = match to {
            SeekFrom::Data(at) => content.next_data(at),
            SeekFrom::Hole(at) => content.next_hole(at),
            SeekFrom::Start(_) | SeekFrom::End(_) | SeekFrom::Current(_) => return Err(Errno::INVAL),
        };
        found.ok_or(Errno::NXIO)
    }

    pub(crate) fn sync(&mut self, inode: Inode) -> Result<(), Errno> {
        let file = self.file_mut(inode)?;
        for change in file.unsynced.drain(..) {
            file.durable.apply(&change);
        }
        if !self.durable_names.values().any(|its| *its == inode) {
            self.sync_names_up_to_creation_of(inode);
        }
        Ok(())
    }

    /// Forgets what was written since the last sync without undoing it: what Linux does to dirty pages whose
    /// write-back failed, which stay readable, count as clean and are never written again.
    pub(crate) fn lose_unsynced(&mut self, inode: Inode) -> Result<(), Errno> {
        self.file_mut(inode)?.unsynced.retain(|change| !matches!(change, Change::Write { .. }));
        Ok(())
    }

    fn sync_names_up_to_creation_of(&mut self, inode: Inode) {
        let created = |change: &NameChange| matches!(change, NameChange::Add(_, its) if *its == inode);
        if let Some(last) = self.unsynced_names.iter().position(created) {
            for change in self.unsynced_names.drain(..=last) {
                change.apply(&mut self.durable_names);
            }
        }
    }

    // All of it.

    pub(crate) fn capacity(&self) -> Option<u64> {
        self.capacity
    }

    pub(crate) fn set_capacity(&mut self, capacity: Option<u64>) {
        self.capacity = capacity;
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        let named: BTreeSet<Inode> = self.live_names.values().copied().collect();
        let counts = |inode: &Inode, file: &File| file.opens > 0 || named.contains(inode);
        self.files
            .iter()
            .filter(|(inode, file)| counts(inode, file))
            .map(|(_, file)| file.allocated_bytes())
            .sum()
    }

    pub(crate) fn free_bytes(&self) -> u64 {
        self.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(self.used_bytes()))
    }

    pub(crate) fn inodes(&self) -> Vec<Inode> {
        self.files.keys().copied().collect()
    }

    pub(crate) fn live_snapshot(&self, name: &str) -> Result<Snapshot, Errno> {
        Ok(Snapshot::of(&self.file(self.find(name)?)?.live))
    }

    /// The file that would have this name after a power cut now.
    pub(crate) fn durable_snapshot(&self, name: &str) -> Result<Snapshot, Errno> {
        let inode = self.durable_names.get(name).ok_or(Errno::NOENT)?;
        let mut content = self.file(*inode)?.durable.clone();
        content.trim();
        Ok(Snapshot::of(&content))
    }

    pub(crate) fn power_cut(&mut self, seed: Option<u64>) {
        let mut coin = seed.map(Coin);
        if let Some(coin) = &mut coin {
            let kept = coin.below(self.unsynced_names.len() as u64 + 1) as usize;
            for change in &self.unsynced_names[..kept] {
                change.apply(&mut self.durable_names);
            }
        }
        self.unsynced_names.clear();
        self.live_names = self.durable_names.clone();
        for file in self.files.values_mut() {
            if let Some(coin) = &mut coin {
                file.keep_some(coin);
            }
            file.unsynced.clear();
            file.durable.trim();
            file.live = file.durable.clone();
        }
        self.forget_unreachable();
    }

    fn forget_unreachable(&mut self) {
        let mut reachable: BTreeSet<Inode> = self.live_names.values().copied().collect();
        reachable.extend(self.durable_names.values());
        for change in &self.unsynced_names {
            if let NameChange::Add(_, inode) = change {
                reachable.insert(*inode);
            }
        }
        self.files.retain(|inode, file| file.opens > 0 || reachable.contains(inode));
    }
}

impl File {
    pub(crate) fn size(&self) -> u64 {
        self.live.size()
    }

    pub(crate) fn allocated_bytes(&self) -> u64 {
        self.live.allocated_bytes()
    }

    fn change(&mut self, change: Change) {
        self.live.apply(&change);
        self.unsynced.push(change);
        self.modified = SystemTime::now();
    }

    fn grow(&mut self, size: u64) {
        if size > self.live.size() {
            self.change(Change::Resize(size));
        }
    }

    /// Makes a random subset of the unsynced changes durable: writes by the sector, all else whole.
    fn keep_some(&mut self, coin: &mut Coin) {
        for change in &self.unsynced {
            if let Change::Write { at, bytes } = change {
                let mut at = *at;
                let mut rest = bytes.as_slice();
                while !rest.is_empty() {
                    let len = (SECTOR - at as usize % SECTOR).min(rest.len());
                    if coin.heads() {
                        self.durable.write(at, &rest[..len]);
                    }
                    at += len as u64;
                    rest = &rest[len..];
                }
            } else if coin.heads() {
                self.durable.apply(change);
            }
        }
    }
}

impl NameChange {
    fn apply(&self, names: &mut Names) {
        match self {
            NameChange::Add(name, inode) => {
                names.insert(name.clone(), *inode);
            }
            NameChange::Remove(name) => {
                names.remove(name);
            }
            NameChange::Rename(from, to) => {
                if let Some(inode) = names.remove(from) {
                    names.insert(to.clone(), inode);
                }
            }
        }
    }
}

/// Chance that a seed repeats: SplitMix64 (Steele, Lea and Flood, 2014).
struct Coin(u64);

impl Coin {
    fn heads(&mut self) -> bool {
        self.next() & 1 == 0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
