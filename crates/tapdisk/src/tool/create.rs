//! `tapdisk create`: makes an image.

use std::rc::Rc;

use anyhow::{Context, bail};
use block::{Buf, Span};
use image::Format;
use runtime::Handle;
use storage::file::{self, File};
use storage::{Storage, Zeroing};

use super::options::{self, Wishes};
use super::target;
use crate::cli::tool::{Create, Pairs};
use crate::size;

/// Bytes of zeroes written at a time where all of a file is to be written.
const ZEROES: u64 = 1 << 20;

/// What is asked of a new image.
pub(super) struct Plan {
    format: Format,
    wishes: Wishes,
}

impl Plan {
    /// As the command line says; `None` where it asks for help with the options, which is printed.
    ///
    /// # Errors
    /// An option makes no sense.
    pub(super) fn new(format: Format, given: &[Pairs]) -> anyhow::Result<Option<Plan>> {
        match Wishes::new(format, given)? {
            Some(wishes) => Ok(Some(Plan { format, wishes })),
            None => crate::print(options::help(format).as_bytes()).map(|()| None),
        }
    }

    /// Makes a disk of so many bytes in this file, whatever is there. Nothing of it is durable before a flush.
    ///
    /// # Errors
    /// An option makes no sense, or the file fails.
    pub(super) async fn make(mut self, file: &Rc<dyn Storage>, bytes: u64) -> anyhow::Result<()> {
        match self.format {
            Format::Raw => self.make_raw(file, bytes).await,
            format @ (Format::Qcow | Format::Qcow2 | Format::Vhd) => bail!("{format} cannot be made"),
        }
    }

    async fn make_raw(&mut self, file: &Rc<dyn Storage>, bytes: u64) -> anyhow::Result<()> {
        let words =
            [("off", Preallocation::Off), ("falloc", Preallocation::Falloc), ("full", Preallocation::Full)];
        let preallocation = self.wishes.choice("preallocation", &words)?.unwrap_or(Preallocation::Off);
        file.resize(0).await?;
        file.resize(bytes).await?;
        let whole = Span::new(0, bytes).context("a disk is smaller than 8 EiB")?;
        match preallocation {
            Preallocation::Off => Ok(()),
            Preallocation::Falloc => Ok(file.zero(whole, Zeroing { unmap: false, fast: true }).await?),
            Preallocation::Full => write_zeroes(file, whole).await,
        }
    }
}

#[derive(Clone, Copy)]
enum Preallocation {
    Off,
    Falloc,
    Full,
}

async fn write_zeroes(file: &Rc<dyn Storage>, whole: Span) -> anyhow::Result<()> {
    let zeroes = Buf::zeroed(ZEROES as usize);
    let mut rest = whole;
    while !rest.is_empty() {
        let (piece, others) = rest.split_at(rest.at() + ZEROES);
        file.write(piece.at(), zeroes.slice(0, piece.len() as usize)).await?;
        rest = others;
    }
    Ok(())
}

pub(super) async fn run(handle: &Handle, arguments: &Create) -> anyhow::Result<()> {
    let Some(mut plan) = Plan::new(arguments.format, &arguments.options)? else { return Ok(()) };
    let path = &arguments.file;
    let bytes = match (arguments.size, plan.wishes.size("size")?) {
        (Some(bytes), None) | (None, Some(bytes)) => bytes,
        (Some(_), Some(_)) => bail!("the size is given twice: as SIZE and by -o size"),
        (None, None) => {
            bail!("how large is the disk to be? Give SIZE, as in `tapdisk create {} 10G`", path.display())
        }
    };
    let (target, opened) = target::make(path, arguments.force, file::Cache::Buffered)?;
    let file: Rc<dyn Storage> = Rc::new(File::new(handle, opened));
    let failed = || format!("cannot make {}", path.display());
    plan.make(&file, bytes).await.with_context(failed)?;
    file.flush().await.with_context(failed)?;
    target.finish()?;
    let (format, shown) = (arguments.format, size::show(bytes));
    crate::print(format!("Made {}: {format}, {shown}\n", path.display()).as_bytes())
}
