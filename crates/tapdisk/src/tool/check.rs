//! `tapdisk check`: looks for what makes no sense in an image.

use std::process::ExitCode;
use std::rc::Rc;

use anyhow::Context;
use image::{Format, Report, qcow, qcow2, vhd};
use runtime::Handle;
use storage::Storage;
use storage::file::{self, File};

use super::disk::{Access, Asked};
use crate::cli::tool::{Check, Repair};

/// Exit statuses, as those of qemu-img.
const FAILED: u8 = 1;
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const NOTHING_TO_CHECK: u8 = 63;

pub(super) async fn run(handle: &Handle, arguments: &Check) -> anyhow::Result<ExitCode> {
    let source = &arguments.source;
    let access = if arguments.repair.is_some() { Access::Write } else { Access::ReadAlone };
    let asked = Asked::new(&source.file, source.format, access, &source.places);
    // Not by way of its header, which a check may find fault with.
    let opened = file::open(&source.file, &asked.file()?)?;
    let is_block_device = opened.is_block_device;
    // A check would take what is not in the image yet for leaks.
    asked.refuse_pending(&opened)?;
    let file: Rc<dyn Storage> = Rc::new(File::new(handle, opened));
    let format = asked.format_of(&file, is_block_device).await?;
    let repair = match arguments.repair {
        None => image::Repair::No,
        Some(Repair::Leaks) => image::Repair::Leaks,
        Some(Repair::All) => image::Repair::All,
    };
    let report = match format {
        Format::Raw => {
            eprintln!("tapdisk: {}: there is nothing to check in a raw image", source.file.display());
            return Ok(ExitCode::from(NOTHING_TO_CHECK));
        }
        Format::Qcow => qcow::check(&file, repair).await,
        Format::Qcow2 => qcow2::check(&file, repair).await,
        Format::Vhd if is_block_device => vhd::check_device(&file, repair).await,
        Format::Vhd => vhd::check(&file, repair).await,
    };
    let report = report.with_context(|| format!("cannot check {}", source.file.display()))?;
    if arguments.repair.is_some() {
        file.flush().await.with_context(|| format!("the repair of {} may be lost", source.file.display()))?;
    }
    let text = if arguments.output.is_json() {
        let mut object = serde_json::to_value(&report)?;
        object["filename"] = source.file.display().to_string().into();
        object["format"] = format.name().into();
        format!("{object:#}\n")
    } else {
        describe(&report)
    };
    crate::print(text.as_bytes())?;
    Ok(status(&report))
}

fn status(report: &Report) -> ExitCode {
    ExitCode::from(match report {
        Report { check_errors: 1.., .. } => FAILED,
        Report { corruptions: 1.., .. } => CORRUPT,
        Report { leaks: 1.., .. } => LEAKS,
        Report { .. } => 0,
    })
}

fn describe(report: &Report) -> String {
    let mut text = String::new();
    for note in &report.notes {
        text.push_str(&format!("{note}\n"));
    }
    for (count, what) in [
        (report.corruptions_fixed, "faults were put right"),
        (report.leaks_fixed, "leaks were given back"),
        (
            report.corruptions,
            "faults: data may be wrong or lost. `--repair all` makes the image consistent, at their cost",
        ),
        (report.leaks, "leaks: space that nothing uses, which harms nobody. `--repair leaks` gives it back"),
        (report.check_errors, "parts could not be checked, since reading them failed"),
    ] {
        if count > 0 {
            text.push_str(&format!("{count} {what}\n"));
        }
    }
    if report.is_clean() {
        text.push_str("The image is sound\n");
    }
    let Report { allocated_clusters, total_clusters, fragmented_clusters, compressed_clusters, .. } = *report;
    let percent = |part: u64, whole: u64| if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 };
    text.push_str(&format!(
        "{allocated_clusters} of {total_clusters} clusters are allocated ({:.2}%), of these {:.2}% fragmented, {:.2}% compressed\n",
        percent(allocated_clusters, total_clusters),
        percent(fragmented_clusters, allocated_clusters),
        percent(compressed_clusters, allocated_clusters)
    ));
    text.push_str(&format!("The image ends at byte {}\n", report.image_end_offset));
    text
}
