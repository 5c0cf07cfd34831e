//! A guest's memory as its VMM makes it: files, read and written through system calls and so without our mappings.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use super::super::memory::{Memory, RegionSpec};

pub(super) struct Ram {
    parts: Vec<(RegionSpec, File)>,
}

/// Addresses of the front end's process are so far from the guest's.
pub(super) const USER: u64 = 0x7f12_3400_0000;

impl Ram {
    /// Memory at these addresses of the guest, with these lengths.
    pub(super) fn new(parts: &[(u64, u64)]) -> Ram {
        let part = |(guest, len): &(u64, u64)| {
            let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            let file = File::from(fd);
            file.set_len(*len).unwrap();
            (RegionSpec { guest: *guest, len: *len, user: USER.wrapping_add(*guest), offset: 0 }, file)
        };
        Ram { parts: parts.iter().map(part).collect() }
    }

    /// The same memory, for another thread.
    pub(super) fn share(&self) -> Vec<(RegionSpec, File)> {
        self.parts.iter().map(|(spec, file)| (*spec, file.try_clone().unwrap())).collect()
    }

    /// Memory that was shared.
    pub(super) fn of(parts: Vec<(RegionSpec, File)>) -> Ram {
        Ram { parts }
    }

    /// What the front end sends of it.
    pub(super) fn regions(&self) -> Vec<(RegionSpec, OwnedFd)> {
        self.parts.iter().map(|(spec, file)| (*spec, file.try_clone().unwrap().into())).collect()
    }

    pub(super) fn memory(&self) -> Memory {
        Memory::new(self.regions(), None).unwrap()
    }

    /// One part alone.
    pub(super) fn memory_of(&self, part: usize) -> Memory {
        Memory::new(vec![self.regions().swap_remove(part)], None).unwrap()
    }

    /// The file behind a part.
    pub(super) fn file(&self, part: usize) -> &File {
        &self.parts[part].1
    }

    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        self.each(at, bytes.len(), |file, at, range| file.write_all_at(&bytes[range], at).unwrap());
    }

    pub(super) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.each(at, len, |file, at, range| file.read_exact_at(&mut bytes[range], at).unwrap());
        bytes
    }

    pub(super) fn put16(&self, at: u64, number: u16) {
        self.write(at, &number.to_le_bytes());
    }

    pub(super) fn u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at, 2).try_into().unwrap())
    }

    pub(super) fn u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.read(at, 4).try_into().unwrap())
    }

    fn each(&self, at: u64, len: usize, mut each: impl FnMut(&File, u64, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < len {
            let next = at + done as u64;
            let holds =
                |part: &&(RegionSpec, File)| (part.0.guest..part.0.guest + part.0.len).contains(&next);
            let (spec, file) = self.parts.iter().find(holds).expect("the test's own memory");
            let part = (len - done).min((spec.guest + spec.len - next) as usize);
            each(file, next - spec.guest, done..done + part);
            done += part;
        }
    }
}
