//! qcow2 under trial.

use std::rc::Rc;

use runtime::Handle;
use storage::{Ram, Storage};

use super::RUNTIME;
use super::subject::{SIZE, Subject, Tried, be32, be64, fill, whole};
use crate::qcow2::{self, Create, Header};
use crate::{Backing, Format, Image, ImageError, Repair, Report, Settings};

/// The format.
pub(super) struct Qcow2;

impl Subject for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    /// Bits of the options: 1 and 2, the size of clusters; 4, a backing file; 8, version 2, or with 16 extended L2 entries;
    /// 32 and 64, the width of counts; 128, a snapshot.
    fn base(&self, options: u8) -> Vec<u8> {
        let extended_l2 = options & 24 == 24;
        let cluster_size = match options % 4 {
            0 => 4096,
            _ if extended_l2 => 16 << 10,
            1 => 512,
            2 => 1024,
            _ => 65536,
        };
        let cluster_size = if extended_l2 { cluster_size.max(16 << 10) } else { cluster_size };
        let version = if options & 24 == 8 { 2 } else { 3 };
        let refcount_bits = if version == 2 { 16 } else { [16, 1, 64, 8][usize::from(options >> 5 & 3)] };
        let has_snapshot = options & 128 != 0 && refcount_bits > 1;
        let name = "below.raw".to_owned();
        let backing = Backing { name, format: Some(Format::Raw), others: Vec::new(), unique_id: None };
        let create = Create {
            size: SIZE,
            cluster_size,
            version,
            refcount_bits,
            extended_l2,
            backing: (options & 4 != 0).then_some(backing),
            ..Create::default()
        };
        RUNTIME.with(|runtime| {
            let handle = runtime.handle().clone();
            runtime.block_on(async move {
                let file: Rc<dyn Storage> = Rc::new(Ram::new(0));
                qcow2::create(&file, &create).await.expect("it can be made");
                write(&handle, &file).await;
                if has_snapshot {
                    let time = std::time::Duration::from_secs(1);
                    qcow2::take_snapshot(&file, "one", time).await.expect("it was just made");
                    write(&handle, &file).await;
                }
                whole(&*file).await
            })
        })
    }

    fn words(&self, base: &[u8]) -> Vec<usize> {
        let mut words: Vec<usize> = (0..160).step_by(8).collect();
        let cluster = 1_usize << be32(base, 20);
        let of_table = |at: usize, len: usize| (at..(at + len).min(base.len() & !7)).step_by(8);
        // The counts: the table and the first block.
        let (table, blocks) = (be64(base, 48) as usize, be64(base, be64(base, 48) as usize) as usize);
        words.extend(of_table(table, 32));
        words.extend(of_table(blocks, 64));
        let (snapshots, of_snapshots) = (be32(base, 60), be64(base, 64) as usize);
        if snapshots > 0 {
            words.extend(of_table(of_snapshots, 64));
        }
        let l1 = be64(base, 40) as usize;
        for at in of_table(l1, be32(base, 36) as usize * 8) {
            words.push(at);
            let l2 = (be64(base, at) & 0x00ff_ffff_ffff_fe00) as usize;
            if l2 != 0 {
                let (used, free): (Vec<usize>, Vec<usize>) =
                    of_table(l2, cluster).partition(|at| be64(base, *at) != 0);
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
            let mut header = Header::read(file).await?;
            if settings.writable {
                qcow2::prepare(file, &mut header).await?;
            }
            let data: Option<Rc<dyn Storage>> =
                header.has_data_file().then(|| Rc::new(Ram::new(1 << 20)) as Rc<dyn Storage>);
            let image = qcow2::Qcow2::open(handle, header, file.clone(), data, settings).await?;
            Ok::<Rc<dyn Image>, ImageError>(Rc::new(image))
        })
    }

    fn check<'a>(&'a self, file: &'a Rc<dyn Storage>, repair: Repair) -> Tried<'a, Report> {
        Box::pin(qcow2::check(file, repair))
    }
}

async fn write(handle: &Handle, file: &Rc<dyn Storage>) {
    let settings = Settings { writable: true, ..Settings::default() };
    let opened = Qcow2.open(handle, file, settings).await;
    fill(handle, opened.expect("it was just made")).await;
}
