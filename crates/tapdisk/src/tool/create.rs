//! `tapdisk create`: makes an image.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, bail};
use image::probe::{self, Look};
use image::tool::Watch;
use image::{Format, Header, Layer};
use runtime::Handle;
use storage::Storage;
use storage::file::{self, File, Records};

use super::disk::{Asked, from_image, refuse_loop, refuse_no_path, say_if_forbidden};
use super::plan::{Apart, Below, Plan};
use super::progress::Progress;
use super::stoppable::{self, Stoppable};
use super::target;
use crate::cli::tool::Create;
use crate::{size, state};

pub(super) async fn run(handle: &Handle, arguments: &Create) -> anyhow::Result<()> {
    let Some(mut plan) = Plan::new(arguments.format, &arguments.options)? else { return Ok(()) };
    let Some(path) = &arguments.file else {
        bail!("which image is to be made? Give FILE and SIZE, as in `tapdisk create disk.raw 10G`")
    };
    let (name, format) = plan.backing(arguments.backing.as_deref(), arguments.backing_format)?;
    let below = match name {
        Some(name) => Some(look_below(handle, arguments, path, name, format).await?),
        None => None,
    };
    let mut named: Vec<PathBuf> = below.iter().map(|below| from_image(path, &below.name)).collect();
    let bytes = match (arguments.size, plan.size()?, &below) {
        (Some(_), Some(_), _) => bail!("the size is given twice: as SIZE and by -o size"),
        (Some(bytes), None, _) | (None, Some(bytes), _) => bytes,
        (None, None, Some(Below { size: Some(bytes), .. })) => *bytes,
        (None, None, Some(_) | None) => {
            bail!("how large is the disk to be? Give SIZE, as in `tapdisk create {} 10G`", path.display())
        }
    };
    target::refuse_no_room(path, arguments.format)?;
    // Where a file is filled beforehand that takes its time. Who is told to stop leaves nothing.
    let watch: Rc<dyn Watch> = Rc::new(Progress::new(bytes, false)?);
    let records = state::records(arguments.places.state_dir.as_ref(), state::For::Reading)?;
    let (target, opened) = target::make(path, arguments.force, file::Cache::Buffered, records.as_ref())?;
    file::check_short_transfers(handle, &opened).await?;
    let file: Rc<dyn Storage> = Rc::new(File::new(handle, opened));
    let failed = || format!("cannot make {}", path.display());
    let (data, mut apart) = data_file(handle, arguments, &mut plan, path, records.as_ref()).await?;
    if let Some(apart) = &mut apart {
        apart.storage = Rc::new(Stoppable { storage: apart.storage.clone(), watch: watch.clone() });
    }
    let stoppable: Rc<dyn Storage> = Rc::new(Stoppable { storage: file.clone(), watch: watch.clone() });
    named.extend(apart.as_ref().and_then(|apart| image::named(Path::new(""), &apart.name)));
    let made = plan.make(&stoppable, bytes, below, apart).await;
    stoppable::told(made, &watch).with_context(failed)?;
    file.flush().await.with_context(failed)?;
    // An image is whole when its data file is there.
    data.map_or(Ok(()), target::Target::finish)?;
    target.finish()?;
    for named in named {
        say_if_forbidden(path, &named, &arguments.places);
    }
    let (format, shown) = (arguments.format, size::show(bytes));
    crate::print(format!("Made {}: {format}, {shown}\n", path.display()).as_bytes())
}

/// Makes the file for the disk's bytes, if it is to be another one.
async fn data_file(
    handle: &Handle,
    arguments: &Create,
    plan: &mut Plan,
    image: &Path,
    records: Option<&Records>,
) -> anyhow::Result<(Option<target::Target>, Option<Apart>)> {
    let Some(name) = plan.data_file() else { return Ok((None, None)) };
    refuse_no_path(image, &name)?;
    // As QEMU has it, a relative name counts from where the process is.
    let path = image::named(Path::new(""), &name).context("it is a path")?;
    let (target, opened) = target::make(&path, arguments.force, file::Cache::Buffered, records)?;
    file::check_short_transfers(handle, &opened).await?;
    let storage: Rc<dyn Storage> = Rc::new(File::new(handle, opened));
    Ok((Some(target), Some(Apart { name, storage })))
}

/// Opens what is to be below, to find out whether it can be, and how large it is.
async fn look_below(
    handle: &Handle,
    arguments: &Create,
    image: &Path,
    name: String,
    format: Option<Format>,
) -> anyhow::Result<Below> {
    // The names in a VHD are paths whatever they look like.
    if arguments.format != Format::Vhd {
        refuse_no_path(image, &name)?;
    }
    if arguments.unchecked {
        return Ok(Below { name, format, size: None, unique_id: None, changed: None });
    }
    let path = match arguments.format {
        Format::Vhd => image.parent().unwrap_or(Path::new("")).join(&name),
        Format::Raw | Format::Qcow | Format::Qcow2 => from_image(image, &name),
    };
    let failed = || format!("{name} cannot be below {}", image.display());
    let asked = Asked::below(&path, format, &arguments.places);
    let layers = asked.walk(handle).await.with_context(failed)?;
    refuse_loop(image, &layers)?;
    let layer = layers.first().context("a disk has an image")?;
    refuse_unclear(arguments.format, layer).await.with_context(failed)?;
    let changed = std::fs::metadata(&path).and_then(|found| found.modified());
    let changed = changed.with_context(|| format!("cannot look at {}", path.display()))?;
    let header = &layer.header;
    let unique_id = match header {
        Header::Vhd(header) => Some(header.unique_id()),
        Header::Raw { .. } | Header::Qcow(_) | Header::Qcow2(_) => None,
    };
    let (format, size) = (Some(header.format()), Some(header.size()));
    Ok(Below { name, format, size, unique_id, changed: Some(changed) })
}

/// Not each format has a place for the format of the image below: who opens it would take that for another one.
async fn refuse_unclear(format: Format, below: &Layer) -> anyhow::Result<()> {
    let (path, found) = (&below.file.path, below.header.format());
    let taken = match format {
        Format::Raw | Format::Qcow2 => return Ok(()),
        // What has no unique identifier is raw.
        Format::Vhd => match found {
            Format::Raw | Format::Vhd => return Ok(()),
            Format::Qcow | Format::Qcow2 => "raw, since it is no VHD".to_owned(),
        },
        Format::Qcow => {
            let look = probe::look(&below.file.storage, path, below.file.is_block_device).await?;
            match (look, probe::is_raw_by_name(path, below.file.is_block_device)) {
                (Look::Nothing, true) if found == Format::Raw => return Ok(()),
                (Look::Of(format), false) if format == found => return Ok(()),
                (Look::Of(format), false) => format.name().to_owned(),
                (Look::Nothing | Look::Foreign(_) | Look::Unclear(_), false)
                | (Look::Of(_) | Look::Foreign(_) | Look::Nothing | Look::Unclear(_), true) => {
                    "one of another format, by its name or its header".to_owned()
                }
            }
        }
    };
    bail!(
        "a {format} image has no place for the format of the one below it ({found}), which would be taken for {taken}. A qcow2 \
         image has (-f qcow2)"
    )
}
