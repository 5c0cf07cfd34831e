//! qcow under trial.

use std::io::Write;
use std::rc::Rc;

use runtime::Handle;
use storage::{Ram, Storage};

use super::RUNTIME;
use super::subject::{POISON, SIZE, Subject, Tried, be64, fill, whole};
use crate::qcow::{self, Create, Header};
use crate::{Image, ImageError, Repair, Report, Settings};

/// The format.
pub(super) struct Qcow;

impl Subject for Qcow {
    fn name(&self) -> &'static str {
        "qcow"
    }

    /// Bits of the options: 1 and 2, the size of clusters; 4, a backing file; 8, compressed clusters; 16, blktap's header.
    fn base(&self, options: u8) -> Vec<u8> {
        let cluster_size = [4096, 512, 1024, 65536][usize::from(options % 4)];
        let backing = (options & 4 != 0).then(|| "below.raw".to_owned());
        let mut bytes = RUNTIME.with(|runtime| {
            let handle = runtime.handle().clone();
            runtime.block_on(async move {
                let file: Rc<dyn Storage> = Rc::new(Ram::new(0));
                let create = Create { size: SIZE, backing, cluster_size: Some(cluster_size) };
                qcow::create(&file, &create).await.expect("it can be made");
                let header = Header::read(&file).await.expect("it was just made");
                let settings = Settings { writable: true, ..Settings::default() };
                let image = qcow::Qcow::open(&handle, header, file.clone(), settings).await;
                fill(&handle, Rc::new(image.expect("it was just made"))).await;
                whole(&*file).await
            })
        });
        if options & 8 != 0 {
            compress(&mut bytes);
        }
        if options & 16 != 0 && options & 4 == 0 {
            of_blktap(&mut bytes);
        }
        bytes
    }

    fn words(&self, base: &[u8]) -> Vec<usize> {
        let mut words: Vec<usize> = (0..64).step_by(8).collect();
        let (l1, l1_len) = tables(base);
        for at in (l1..l1 + l1_len).step_by(8) {
            words.push(at);
            let table = be64(base, at) as usize;
            if table != 0 {
                let entries = (table..(table + (8 << base[33])).min(base.len())).step_by(8);
                let (used, free): (Vec<usize>, Vec<usize>) = entries.partition(|at| be64(base, *at) != 0);
                words.extend(used);
                words.extend(free.into_iter().take(8));
            }
        }
        words
    }

    fn seal(&self, _bytes: &mut [u8]) {}

    fn is_breached(&self, head: &[u8], _tail: &[u8], mark: &[u8]) -> bool {
        head[..head.len().min(512)].windows(mark.len()).any(|bytes| bytes == mark)
    }

    fn clears_what_is_beyond(&self) -> bool {
        true
    }

    fn has_backing<'a>(&'a self, file: &'a Rc<dyn Storage>) -> Tried<'a, bool> {
        Box::pin(async { Ok(Header::read(file).await?.backing().is_some()) })
    }

    fn open<'a>(
        &'a self,
        handle: &'a Handle,
        file: &'a Rc<dyn Storage>,
        settings: Settings,
    ) -> Tried<'a, Rc<dyn Image>> {
        Box::pin(async move {
            let header = Header::read(file).await?;
            assert_eq!(qcow::info(&header).len(), 3 + usize::from(header.xen().is_some()));
            let image = qcow::Qcow::open(handle, header, file.clone(), settings).await?;
            Ok::<Rc<dyn Image>, ImageError>(Rc::new(image))
        })
    }

    fn check<'a>(&'a self, file: &'a Rc<dyn Storage>, repair: Repair) -> Tried<'a, Report> {
        Box::pin(qcow::check(file, repair))
    }
}

/// Byte and length of the L1 table.
fn tables(base: &[u8]) -> (usize, usize) {
    let covered = 1_u64 << (base[32] + base[33]);
    (be64(base, 40) as usize, be64(base, 24).div_ceil(covered) as usize * 8)
}

/// Puts compressed clusters where the first L2 table has nothing, as QEMU lays them out: one behind the other.
fn compress(bytes: &mut Vec<u8>) {
    let cluster = 1_usize << bytes[32];
    let table = be64(bytes, tables(bytes).0) as usize;
    let free: Vec<usize> = (0..50_000 / cluster.min(16_384))
        .map(|nth| table + nth * 8)
        .filter(|at| be64(bytes, *at) == 0)
        .take(3)
        .collect();
    for (nth, at) in free.into_iter().enumerate() {
        let content: Vec<u8> = (0..cluster).map(|byte| (byte / 7 + nth) as u8 % POISON).collect();
        let mut packer = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        packer.write_all(&content).expect("memory never fails");
        let packed = packer.finish().expect("memory never fails");
        let place = bytes.len() as u64;
        let entry = 1 << 63 | (packed.len() as u64) << (63 - bytes[32]) | place;
        bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
        bytes.extend(packed);
    }
}

/// Puts blktap's header behind QEMU's: then the L1 table, a little-endian one, lies behind a page.
fn of_blktap(bytes: &mut Vec<u8>) {
    let (l1, len) = tables(bytes);
    let table = bytes[l1..l1 + len].to_vec();
    let place = bytes.len().next_multiple_of(4096);
    bytes.resize(place, 0);
    for word in table.chunks(8) {
        bytes.extend(word.iter().rev());
    }
    bytes.resize((place + len).next_multiple_of(4096), 0);
    bytes[48..64].copy_from_slice(b"XEN\xfb\0\0\0\0\0\0\x02\0\0\0\0\x01");
    bytes[40..48].copy_from_slice(&(place as u64).to_be_bytes());
}
