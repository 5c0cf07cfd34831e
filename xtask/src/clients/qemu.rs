//! QEMU's tools: qemu-io, qemu-img.

use super::{Check, MIB, Stage, fill, same};
use crate::command::{command, output, within};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;

pub(crate) const CHECKS: &[Check] = &[
    ("qemu-io patterns are read back, also from the image", patterns),
    ("qemu-io unaligned patterns keep their neighbours", unaligned),
    ("qemu-io zeroes and discards", zeroes),
    ("qemu-io many writes in flight", in_flight),
    ("qemu-img convert to the server, compare", convert_to),
    ("qemu-img convert from the server", convert_from),
    ("qemu-img map and info agree with the image's own", map),
];

/// Runs commands of qemu-io on a raw disk. A pattern that is not found fails.
fn qemu_io(disk: &str, commands: &[String]) -> Result<()> {
    let mut qemu_io = command("qemu-io", ["-f", "raw", disk]);
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let ended = within(Duration::from_secs(60), &mut qemu_io)?;
    let said = ended.said();
    ensure!(
        ended.status.success() && !said.contains("verification failed") && !said.contains("failed:"),
        "qemu-io: {}\n{said}",
        ended.status
    );
    Ok(())
}

/// Writes through the server, reads through the server, reads the image itself.
fn written_and_read(stage: &Stage<'_>, write: &[String], read: &[String]) -> Result<()> {
    let image = stage.image(64 * MIB)?;
    let server = stage.serve(&image)?;
    qemu_io(&server.uri(), write).context("write")?;
    qemu_io(&server.uri(), read).context("read")?;
    stage.end(server)?;
    qemu_io(&image.display().to_string(), read).context("read the image")
}

fn each(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

fn patterns(stage: &Stage<'_>) -> Result<()> {
    let write = each(&[
        "write -P 0xaa 0 64k",
        "write -P 0xbb 64k 1M",
        "write -f -P 0xcc 20M 4k",
        "writev -P 0xdd 30M 512 1k 64k",
        "flush",
    ]);
    let read = each(&[
        "read -P 0xaa 0 64k",
        "read -P 0xbb 64k 1M",
        "read -P 0xcc 20M 4k",
        "readv -P 0xdd 30M 4k 61952",
        "read -P 0 40M 4M",
        "read -P 0xbb -s 1000 -l 5000 64k 64k",
    ]);
    written_and_read(stage, &write, &read)
}

fn unaligned(stage: &Stage<'_>) -> Result<()> {
    let write = each(&[
        "write -P 0x11 0 1M",
        "write -P 0x22 511 1025",
        "write -P 0x33 4095 2",
        "write -P 0x44 65535 65538",
        "write -P 0x55 1000001 1",
    ]);
    let read = each(&[
        "read -P 0x11 0 511",
        "read -P 0x22 511 1025",
        "read -P 0x11 1536 2559",
        "read -P 0x33 4095 2",
        "read -P 0x11 4097 61438",
        "read -P 0x44 65535 65538",
        "read -P 0x11 131073 868928",
        "read -P 0x55 1000001 1",
        "read -P 0x11 1000002 48574",
        "read -P 0 1M 1M",
    ]);
    written_and_read(stage, &write, &read)
}

fn zeroes(stage: &Stage<'_>) -> Result<()> {
    let write = each(&[
        "write -P 0x66 0 8M",
        "write -z 64k 64k",
        "write -z -u 1M 1M",
        "write -z 3000001 70001",
        "discard 4M 1M",
        "discard 6000001 500001",
    ]);
    // What a discard leaves is not promised, except next to it.
    let read = each(&[
        "read -P 0x66 0 64k",
        "read -P 0 64k 64k",
        "read -P 0x66 128k 917504",
        "read -P 0 1M 1M",
        "read -P 0x66 2M 902849",
        "read -P 0 3000001 70001",
        "read -P 0x66 3070002 1124302",
        "read -P 0x66 5M 757121",
        "read -P 0x66 6500002 1888606",
    ]);
    written_and_read(stage, &write, &read)
}

fn in_flight(stage: &Stage<'_>) -> Result<()> {
    let place = |number: u64| format!("{} {}", number * 300_000, 299_999 - number);
    let mut write: Vec<String> =
        (0..64).map(|number| format!("aio_write -q -P {} {}", number + 1, place(number))).collect();
    write.push("aio_flush".into());
    let read: Vec<String> =
        (0..64).map(|number| format!("read -P {} {}", number + 1, place(number))).collect();
    written_and_read(stage, &write, &read)
}

fn qemu_img(arguments: &[&str]) -> Result<String> {
    output(&mut command("qemu-img", arguments))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

fn convert_to(stage: &Stage<'_>) -> Result<()> {
    let (source, qcow2) = (stage.path("source.raw"), stage.path("source.qcow2"));
    fill(&source, 128 * MIB, 6)?;
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&source)?, text(&qcow2)?])?;
    for (from, format, how) in [(&source, "raw", &[] as &[&str]), (&qcow2, "qcow2", &["-W", "-m", "16"])] {
        let image = stage.path("disk.raw");
        fill(&image, 128 * MIB, 7)?;
        let server = stage.serve(&image)?;
        let uri = server.uri();
        let mut arguments = vec!["convert", "-n", "-f", format, "-O", "raw"];
        arguments.extend(how);
        arguments.extend([text(from)?, &uri]);
        qemu_img(&arguments)?;
        qemu_img(&["compare", "-f", "raw", "-F", "raw", text(&source)?, &uri])?;
        stage.end(server)?;
        same(&source, &image)?;
    }
    Ok(())
}

fn convert_from(stage: &Stage<'_>) -> Result<()> {
    let image = stage.path("disk.raw");
    fill(&image, 128 * MIB, 8)?;
    let server = stage.serve(&image)?;
    let uri = server.uri();
    let (raw, qcow2) = (stage.path("copy.raw"), stage.path("copy.qcow2"));
    qemu_img(&["convert", "-f", "raw", "-O", "raw", &uri, text(&raw)?])?;
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &uri, text(&qcow2)?])?;
    stage.end(server)?;
    same(&image, &raw)?;
    qemu_img(&["check", "-f", "qcow2", text(&qcow2)?])?;
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2", text(&image)?, text(&qcow2)?]).map(drop)
}

fn map(stage: &Stage<'_>) -> Result<()> {
    let image = stage.path("disk.raw");
    fill(&image, 128 * MIB, 9)?;
    let local = mapped(text(&image)?)?;
    let server = stage.serve(&image)?;
    let uri = server.uri();
    let served = mapped(&uri)?;
    ensure!(served == local, "{served:?} instead of {local:?}");
    let info: Value = serde_json::from_str(&qemu_img(&["info", "-f", "raw", "--output=json", &uri])?)?;
    let size = info["virtual-size"].as_u64();
    ensure!(size == Some(fs::metadata(&image)?.len()), "qemu-img info says {size:?}");
    stage.end(server)
}

/// Start, length, whether there is data, whether it reads as zeroes.
type Extent = (Option<u64>, Option<u64>, Option<bool>, Option<bool>);

fn mapped(disk: &str) -> Result<Vec<Extent>> {
    let map: Vec<Value> = serde_json::from_str(&qemu_img(&["map", "-f", "raw", "--output=json", disk])?)?;
    ensure!(map.len() > 10, "the map is too simple to compare: {map:?}");
    let extent = |entry: &Value| {
        let number = |name: &str| entry[name].as_u64();
        let flag = |name: &str| entry[name].as_bool();
        (number("start"), number("length"), flag("data"), flag("zero"))
    };
    Ok(map.iter().map(extent).collect())
}
