//! What is served: the disk with all that it stands on, how it is opened, described and left.

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use image::metadata::LedgerFile;
use image::{Chain, Format, Held, Layer, Raw};
use runtime::{Handle, Runtime};
use storage::file::{self, Record};
use storage::filter::{self, Rule};
use storage::{Null, Ram, Storage};

use crate::cli::{Cache, Image, Serve};
use crate::{size, state};

/// How long a restart waits for the process before it to let go of the image.
const LOCK_WAIT: Duration = Duration::from_secs(30);

/// What is served, and what to tell of it.
pub(crate) struct Contents {
    /// The disk.
    pub(crate) chain: Rc<Chain>,
    /// How it is used, in words; then a line for each image that it stands on.
    pub(crate) how: String,
    /// Where it is recorded what a successor must know of the files that are written.
    records: Vec<Record>,
}

impl Contents {
    /// Opens what is to be served.
    pub(crate) fn open(runtime: &Runtime, arguments: &Serve) -> anyhow::Result<Contents> {
        let handle = runtime.handle();
        match &arguments.image {
            Image::Null(bytes) => {
                let how = "nothing behind it: reads give zeroes, writes are forgotten";
                Contents::without_file(handle, Rc::new(Null::new(*bytes)), how, arguments)
            }
            Image::Ram(bytes) => {
                let how = "in memory: lost when tapdisk ends";
                Contents::without_file(handle, Rc::new(Ram::new(*bytes)), how, arguments)
            }
            Image::Path(path) => Contents::of_image(runtime, path, arguments),
        }
    }

    fn without_file(
        handle: &Handle,
        storage: Rc<dyn Storage>,
        how: &str,
        arguments: &Serve,
    ) -> anyhow::Result<Contents> {
        if let Some(format) = arguments.format.filter(|format| *format != Format::Raw) {
            anyhow::bail!("--format {format} is for images in files: {} has none", arguments.image.name());
        }
        let storage = filter::inject(handle, storage, arguments.fault.clone());
        let chain = Rc::new(Chain::new(handle, Rc::new(Raw::new(storage))));
        Ok(Contents { chain, how: how.into(), records: Vec::new() })
    }

    fn of_image(runtime: &Runtime, path: &Path, arguments: &Serve) -> anyhow::Result<Contents> {
        if let (Some(_), Some(format)) =
            (arguments.create, arguments.format.filter(|format| *format != Format::Raw))
        {
            anyhow::bail!("--create makes raw images: `tapdisk create --format {format}` makes this one");
        }
        let cache = match arguments.cache {
            Cache::Direct => file::Cache::Direct,
            Cache::Buffered => file::Cache::Buffered,
        };
        let what_for = if arguments.read_only { state::For::ServingReadOnly } else { state::For::Serving };
        let records = state::records(arguments.state_dir.as_ref(), what_for)?;
        let file = file::Options {
            read_only: arguments.read_only,
            cache,
            create: arguments.create,
            wait: LOCK_WAIT,
            records,
        };
        let options = image::Options {
            format: arguments.format,
            file,
            cache: arguments.cache_size,
            no_backing: arguments.no_backing,
            allowed: arguments.allow_folder.clone(),
            lasting: true,
            filter: Some(faults(runtime.handle(), &arguments.fault)),
        };
        let handle = runtime.handle().clone();
        let path = path.to_owned();
        let disk = runtime.block_on(async move { image::open(&handle, &path, options).await })?;
        for held in disk.written() {
            tell_of_poison(held);
        }
        for (held, error) in disk.suspect() {
            let image = held.path.display();
            tracing::warn!(
                %image, %error,
                "a sync of this image failed, and who served it then did not end in order: what is read from it may not be \
                 what is on the disk"
            );
        }
        let records = disk.written().filter_map(|held| held.record.clone()).collect();
        let how = describe(&disk.layers, arguments);
        Ok(Contents { chain: Rc::new(disk.chain), how, records })
    }

    /// The images are left in order, after a last flush of the disk that went well.
    pub(crate) async fn close(&self) -> block::Result<()> {
        self.chain.close().await.map_err(|error| error.during("leave the image in order"))
    }

    /// The failed syncs are no longer recorded: whoever knew of them has been told.
    pub(crate) fn forget_poison(&self) {
        self.records.iter().for_each(Record::forget);
    }

    /// There is nothing that a successor would have to know of the map: all is in the image.
    pub(crate) fn forget_ledger(&self) {
        for record in &self.records {
            if let Err(error) = LedgerFile::remove(record) {
                tracing::warn!(%error, "the ledger of an image that was left in order stays, without a change in it");
            }
        }
    }
}

/// Faults for drills come below the format: bytes are those of the top image's file.
fn faults(handle: &Handle, rules: &[Rule]) -> image::Filter {
    let (handle, rules) = (handle.clone(), rules.to_vec());
    Box::new(move |storage| filter::inject(&handle, storage, rules))
}

fn tell_of_poison(held: &Held) {
    if let (Some(error), Some(record)) = (&held.poison, &held.record) {
        let (image, record) = (held.path.display(), record.path());
        let record = record.display();
        tracing::error!(
            %image, %error, %record,
            "a sync of this image failed before, and whoever served it then did not end in order: flushes and writes \
             fail until tapdisk is told to stop (Ctrl-C, SIGTERM) and started anew"
        );
    }
}

/// The image, and a line for each that it stands on.
fn describe(layers: &[Layer], arguments: &Serve) -> String {
    let mut lines = layers.iter().map(|layer| {
        let (file, format) = (&layer.file, layer.header.format());
        let kind = match (format, file.is_block_device) {
            (Format::Raw, true) => "block device".into(),
            (_, true) => format!("{format} image on a block device"),
            (_, false) => format!("{format} image"),
        };
        let data = layer.data.iter().map(|data| format!(", its data in {}", data.path.display()));
        format!("{kind}{}", data.collect::<String>())
    });
    let Some((top, file)) = lines.next().zip(layers.first().map(|layer| &layer.file)) else {
        return String::new();
    };
    let io = match (&file.not_direct, file.direct) {
        (Some(why), _) => format!("through the page cache (buffered), since {why}"),
        (None, Some(align)) => format!("past the page cache (O_DIRECT), in units of {align} bytes"),
        (None, None) => "through the page cache (buffered)".into(),
    };
    let made = match arguments.create {
        Some(_) if file.created => ", made just now, sparse".into(),
        Some(asked) if asked != file.size => {
            format!(", was there already and is kept (not {})", size::show(asked))
        }
        Some(_) => ", was there already and is kept".into(),
        None => String::new(),
    };
    let mut text = format!("{top}{made}, {io}");
    for (line, layer) in lines.zip(&layers[1..]) {
        let (path, size) = (layer.file.path.display(), size::show(layer.header.size()));
        text.push_str(&format!("\n    over {path}: {size}, {line}"));
    }
    if let Some(backing) = layers.last().and_then(|layer| layer.header.backing()) {
        text.push_str(&format!(
            "\n    without {:?}, which it names as its backing file: zeroes there",
            backing.name
        ));
    }
    text
}
