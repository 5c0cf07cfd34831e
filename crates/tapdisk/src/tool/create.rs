//! `tapdisk create`: makes an image.

use std::rc::Rc;

use anyhow::{Context, bail};
use image::{Format, Header};
use runtime::Handle;
use storage::Storage;
use storage::file::{self, File};

use super::disk::{Access, Asked, from_image};
use super::plan::{Below, Plan};
use super::target;
use crate::cli::tool::Create;
use crate::{size, state};

pub(super) async fn run(handle: &Handle, arguments: &Create) -> anyhow::Result<()> {
    let Some(mut plan) = Plan::new(arguments.format, &arguments.options)? else { return Ok(()) };
    let path = &arguments.file;
    let (name, format) = plan.backing(arguments.backing.as_deref(), arguments.backing_format)?;
    let below = match name {
        Some(name) => Some(look_below(handle, arguments, name, format).await?),
        None => None,
    };
    let bytes = match (arguments.size, plan.size()?, &below) {
        (Some(_), Some(_), _) => bail!("the size is given twice: as SIZE and by -o size"),
        (Some(bytes), None, _) | (None, Some(bytes), _) => bytes,
        (None, None, Some(Below { size: Some(bytes), .. })) => *bytes,
        (None, None, Some(_) | None) => {
            bail!("how large is the disk to be? Give SIZE, as in `tapdisk create {} 10G`", path.display())
        }
    };
    let records = state::records(arguments.places.state_dir.as_ref(), true)?;
    let (target, opened) = target::make(path, arguments.force, file::Cache::Buffered, records.as_ref())?;
    file::check_short_transfers(handle, &opened).await?;
    let file: Rc<dyn Storage> = Rc::new(File::new(handle, opened));
    let failed = || format!("cannot make {}", path.display());
    plan.make(&file, bytes, below).await.with_context(failed)?;
    file.flush().await.with_context(failed)?;
    target.finish()?;
    let (format, shown) = (arguments.format, size::show(bytes));
    crate::print(format!("Made {}: {format}, {shown}\n", path.display()).as_bytes())
}

/// Opens what is to be below, to find out whether it can be, and how large it is.
async fn look_below(
    handle: &Handle,
    arguments: &Create,
    name: String,
    format: Option<Format>,
) -> anyhow::Result<Below> {
    if arguments.unchecked {
        return Ok(Below { name, format, size: None, unique_id: None, changed: None });
    }
    let path = from_image(&arguments.file, &name);
    let layers = Asked::new(&path, format, Access::Read, &arguments.places)
        .walk(handle)
        .await
        .with_context(|| format!("{name} cannot be below {}", arguments.file.display()))?;
    let changed = std::fs::metadata(&path).and_then(|found| found.modified());
    let changed = changed.with_context(|| format!("cannot look at {}", path.display()))?;
    let header = &layers.first().context("a disk has an image")?.header;
    let unique_id = match header {
        Header::Vhd(header) => Some(header.unique_id()),
        Header::Raw { .. } | Header::Qcow(_) | Header::Qcow2(_) => None,
    };
    let (format, size) = (Some(header.format()), Some(header.size()));
    Ok(Below { name, format, size, unique_id, changed: Some(changed) })
}
