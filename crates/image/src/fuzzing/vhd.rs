//! VHD under trial.

use std::rc::Rc;
use std::time::SystemTime;

use runtime::Handle;
use storage::{Ram, Storage};

use super::RUNTIME;
use super::subject::{SIZE, Subject, Tried, be32, be64, fill, whole};
use crate::vhd::{self, Create, Header, Parent, Subformat};
use crate::{Image, ImageError, Repair, Report, Settings};

/// The format.
pub(super) struct Vhd;

const COOKIE: &[u8] = b"conectix";
const SECOND_COOKIE: &[u8] = b"cxsparse";

impl Subject for Vhd {
    fn name(&self) -> &'static str {
        "vhd"
    }

    /// The options, counted: a dynamic image, a differencing one, a fixed one; the same with small blocks.
    fn base(&self, options: u8) -> Vec<u8> {
        RUNTIME.with(|runtime| {
            let handle = runtime.handle().clone();
            runtime.block_on(async move {
                let (subformat, parent) = match options % 3 {
                    0 => (Subformat::Dynamic, None),
                    1 => {
                        let (name, unique_id) = ("below.vhd".to_owned(), Some([7; 16]));
                        let changed = SystemTime::UNIX_EPOCH;
                        (Subformat::Differencing, Some(Parent { name, unique_id, changed }))
                    }
                    _ => (Subformat::Fixed, None),
                };
                let block = if (options / 3).is_multiple_of(2) { 1 << 16 } else { 4096 };
                let create = Create {
                    size: SIZE,
                    subformat,
                    parent,
                    block,
                    unique_id: Some([9; 16]),
                    created: SystemTime::UNIX_EPOCH,
                    ..Create::default()
                };
                let file: Rc<dyn Storage> = Rc::new(Ram::new(0));
                vhd::create(&file, &create).await.expect("it can be made");
                let header = Header::read(&file).await.expect("it was just made");
                let settings = Settings { writable: true, ..Settings::default() };
                let image = vhd::Vhd::open(&handle, header, file.clone(), settings).await;
                fill(&handle, Rc::new(image.expect("it was just made"))).await;
                whole(&*file).await
            })
        })
    }

    fn words(&self, base: &[u8]) -> Vec<usize> {
        let footer = base.len() - 512;
        // What is worth it of the footer at the end, of its copy, of the second header and its first locator, of the table.
        let mut words: Vec<usize> = (0..72).step_by(8).map(|at| footer + at).collect();
        if base.starts_with(COOKIE) {
            words.extend((0..88).step_by(8));
            let second = be64(base, 16) as usize;
            words.extend((second..second + 64).step_by(8));
            words.extend((second + 576..second + 632).step_by(8));
            let table = be64(base, second + 16) as usize;
            let entries = be32(base, second + 28) as usize;
            words.extend((table..table + entries.min(64) * 4).step_by(8));
            for entry in (table..table + entries.min(64) * 4).step_by(4) {
                let sector = be32(base, entry);
                if sector != u32::MAX {
                    words.push(sector as usize * 512);
                }
            }
        }
        words
    }

    fn seal(&self, bytes: &mut [u8]) {
        let second = be64(bytes, 16);
        let end = bytes.len().saturating_sub(512);
        for (at, len, cookie, sum_at) in
            [(0, 512, COOKIE, 64), (second as usize, 1024, SECOND_COOKIE, 36), (end, 512, COOKIE, 64)]
        {
            let part = at.checked_add(len).and_then(|to| bytes.get_mut(at..to));
            if let Some(part) = part.filter(|part| part.starts_with(cookie)) {
                part[sum_at..sum_at + 4].fill(0);
                let sum = part.iter().fold(0_u32, |sum, byte| sum + u32::from(*byte));
                part[sum_at..sum_at + 4].copy_from_slice(&(!sum).to_be_bytes());
            }
        }
    }

    fn is_breached(&self, head: &[u8], _tail: &[u8], mark: &[u8]) -> bool {
        // A fixed image begins with the guest's bytes.
        let headers =
            if head.starts_with(COOKIE) && be64(head, 16) == 512 { head.len().min(1536) } else { 0 };
        head[..headers].windows(mark.len()).any(|bytes| bytes == mark)
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
            assert!(!vhd::info(&header).is_empty());
            let image = vhd::Vhd::open(handle, header, file.clone(), settings).await?;
            Ok::<Rc<dyn Image>, ImageError>(Rc::new(image))
        })
    }

    fn check<'a>(&'a self, file: &'a Rc<dyn Storage>, repair: Repair) -> Tried<'a, Report> {
        Box::pin(vhd::check(file, repair))
    }
}
