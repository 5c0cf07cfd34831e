//! `tapdisk convert`: copies a disk into a new image.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, bail};
use image::tool::{self, ToolError, Watch};
use image::{Chain, Format, Image, Raw, Settings, qcow, qcow2, vhd};
use runtime::Handle;
use storage::Storage;
use storage::file::{self, File};

use super::disk::{Access, Asked, Disk};
use super::late::Late;
use super::plan::Plan;
use super::progress::Progress;
use super::target::{self, Target};
use crate::cli::tool::{Cache, Convert};
use crate::state;

pub(super) async fn run(handle: &Handle, arguments: &Convert) -> anyhow::Result<()> {
    let format = arguments.output_format;
    let Some(mut plan) = Plan::new(format, &arguments.options)? else { return Ok(()) };
    if plan.data_file().is_some() {
        bail!("-o data_file is for `tapdisk create`; then `qemu-img convert -n` fills it");
    }
    if let (Some(name), _) = plan.backing(None, None)? {
        bail!(
            "a copy has all the bytes of the disk itself: `tapdisk create -b {name}` makes an image over another"
        );
    }
    if plan.size()?.is_some() {
        bail!("-o size: a copy is as large as the disk; `tapdisk resize` makes it larger");
    }
    if arguments.compress && format != Format::Qcow2 {
        bail!("only qcow2 images can be compressed: -c goes with -O qcow2");
    }
    let source_cache = cache(arguments.source_cache);
    let asked = Asked::new(&arguments.source, arguments.format, Access::Read, &arguments.places);
    let source = Asked { cache: source_cache, ..asked }.open(handle).await?;
    refuse_own_source(&source, &arguments.target)?;
    let records = state::records(arguments.places.state_dir.as_ref(), state::For::Reading)?;
    let target_cache = cache(arguments.target_cache);
    let (target, opened) = target::make(&arguments.target, arguments.force, target_cache, records.as_ref())?;
    file::check_short_transfers(handle, &opened).await?;
    let file: Rc<dyn Storage> = Rc::new(File::new(handle, opened));
    let late: Rc<dyn Storage> = Rc::new(Late(file.clone()));
    let mut done = copy(handle, arguments, plan, &source, &target, late).await;
    if done.is_ok() {
        done = file.flush().await.map_err(|error| ToolError::Target(error).into());
    }
    match done {
        Ok(()) => target.finish(),
        Err(error) => {
            let path = arguments.target.display();
            let left = if target.is_file() { "nothing is left of it" } else { "what is on it is incomplete" };
            Err(error.context(format!("{path} was not made, {left}")))
        }
    }
}

async fn copy(
    handle: &Handle,
    arguments: &Convert,
    plan: Plan,
    source: &Disk,
    target: &Target,
    file: Rc<dyn Storage>,
) -> anyhow::Result<()> {
    let from: Rc<dyn Storage> = source.chain.clone();
    let watch: Rc<dyn Watch> = Rc::new(Progress::new(from.size(), arguments.progress)?);
    let format = plan.format();
    plan.make(&file, from.size(), None, None).await?;
    if arguments.compress {
        return Ok(tool::pack(handle, &from, &file, &watch).await?);
    }
    let (image, unit, alone) = open_new(handle, file, format).await?;
    let to = Rc::new(Chain::new(handle, image));
    if to.size() < from.size() {
        let (there, needed) = (to.size(), from.size());
        bail!("{} has {there} bytes, the disk {needed}", arguments.target.display());
    }
    let how = tool::Convert { unit, alone, blank: target.is_file() || format != Format::Raw };
    let storage: Rc<dyn Storage> = to.clone();
    tool::convert(handle, &from, &storage, how, &watch).await?;
    to.close().await.map_err(ToolError::Target)?;
    Ok(())
}

/// Opens an image that was just made; also how many bytes it allocates as one, and in how many there is one first write at a
/// time.
async fn open_new(
    handle: &Handle,
    file: Rc<dyn Storage>,
    format: Format,
) -> anyhow::Result<(Rc<dyn Image>, u64, u64)> {
    let settings = Settings { writable: true, ..Settings::default() };
    Ok(match format {
        Format::Raw => (Rc::new(Raw::new(file)), 4096, 4096),
        Format::Qcow => {
            let header = qcow::Header::read(&file).await?;
            let unit = header.cluster_size().into();
            (Rc::new(qcow::Qcow::open(handle, header, file, settings).await?), unit, unit)
        }
        Format::Qcow2 => {
            let header = qcow2::Header::read(&file).await?;
            let unit = header.cluster_size();
            (Rc::new(qcow2::Qcow2::open(handle, header, file, None, settings).await?), unit, unit)
        }
        Format::Vhd => {
            let header = vhd::Header::read(&file).await?;
            let alone = header.block().unwrap_or(4096);
            (Rc::new(vhd::Vhd::open(handle, header, file, settings).await?), 4096, alone)
        }
    })
}

/// Writing an image while it is read would lose what is behind the reader.
fn refuse_own_source(source: &Disk, target: &Path) -> anyhow::Result<()> {
    let Ok(found) = std::fs::metadata(target) else { return Ok(()) };
    for file in source.layers.iter().flat_map(|layer| std::iter::once(&layer.file).chain(&layer.data)) {
        let image = std::fs::metadata(&file.path)
            .with_context(|| format!("cannot look at {}", file.path.display()))?;
        if (image.dev(), image.ino()) == (found.dev(), found.ino()) {
            bail!("{} is what is to be copied: give the copy another name", target.display());
        }
    }
    Ok(())
}

pub(super) fn cache(cache: Cache) -> file::Cache {
    match cache {
        Cache::Buffered => file::Cache::Buffered,
        Cache::Direct => file::Cache::Direct,
    }
}
