//! The check of an image: whether the counts of its clusters are those of its tables, and repair.
//!
//! It takes 128 MiB for counts at most, 32 MiB for those of tables, and what a few tables have; larger images are walked through
//! several times. A repair goes in steps with syncs between, in an order by which an interruption at any point leaves an image
//! that is no worse than it was, and that another repair finishes:
//!
//! 1. entries that make no sense are taken out (what they pointed to leaks),
//! 2. counts that are too low are raised, or all counts are written anew and the header switches to them in one sector,
//! 3. entries of the disk that lead to one and the same cluster get copies of it,
//! 4. marks for writing in place are set and cleared by the counts as they are about to be,
//! 5. counts that are too high are lowered,
//! 6. the bits of the header that say that something is wrong are cleared, after another check.

mod copied;
mod counter;
mod entry;
mod misplaced;
mod rebuild;
mod shared;
mod stored;
#[cfg(test)]
mod tests;
mod walk;

use std::rc::Rc;

use block::{Result, Span};
use storage::Storage;

use super::header::{Header, autoclear, incompatible};
use crate::{ImageError, Repair, Report};
use copied::Truth;
use counter::Counter;
use stored::{Change, Differences, Stored};
use walk::{Entries, Faults, MEMORY, Walk};
pub(super) use walk::{Plan, Root};

/// Runs of free clusters that are given back at a time, to bound memory.
const FREE_MAX: usize = 1 << 20;

/// What an inspection found, besides its report.
#[derive(Debug)]
struct Found {
    report: Report,
    faults: Faults,
    counts: Differences,
}

impl Found {
    /// Whether counts may be lowered and the structure of counts be made anew: all that refers is known.
    fn all_known(&self) -> bool {
        !self.faults.lost && self.report.check_errors == 0
    }
}

/// Checks an image that nobody has open, and repairs what it is told to.
///
/// # Errors
/// The image cannot be understood at all, or the storage failed while it was repaired.
pub async fn check(file: &Rc<dyn Storage>, repair: Repair) -> Result<Report, ImageError> {
    let mut header = Header::read_for_check(file).await?;
    let first = inspect(file, &header).await?;
    if repair == Repair::No {
        return Ok(first.report);
    }
    let before = first.report.clone();
    let mut left = first;
    if !before.is_clean() {
        mend(file, &mut header, left, repair).await?;
        left = inspect(file, &header).await?;
    }
    let mut parted = 0;
    if repair == Repair::All && left.all_known() && left.counts.corruptions == left.counts.overflows {
        parted = shared::part(file, &mut header).await?;
        // Each table has one entry of L1 now, which says where on the disk its clusters are.
        let moved = misplaced::misplaced(file, &header, &mut Report::default(), true).await?;
        if parted + moved > 0 {
            settle(file, &header).await?;
            left = inspect(file, &header).await?;
        }
    }
    if left.report.is_safe() && header.incompatible & (incompatible::DIRTY | incompatible::CORRUPT) != 0 {
        header.incompatible &= !(incompatible::DIRTY | incompatible::CORRUPT);
        header.write_fields(file).await?;
        file.flush().await?;
    }
    let mut report = left.report;
    report.corruptions_fixed = before.corruptions.saturating_sub(report.corruptions);
    report.leaks_fixed = before.leaks.saturating_sub(report.leaks);
    // What was found tells more than what is left.
    report.notes = before.notes;
    if parted > 0 {
        // Before all others, of which there may be too many.
        let note = format!("{parted} entries led to clusters of others, and have copies of their own now");
        report.notes.insert(0, note);
    }
    Ok(report)
}

fn clusters(header: &Header) -> Counter {
    Counter::new(header.refcounts_per_block(), MEMORY)
}

/// Looks and changes nothing.
async fn inspect(file: &Rc<dyn Storage>, header: &Header) -> Result<Found> {
    let plan = Plan::default();
    let mut report =
        Report { total_clusters: header.size.div_ceil(header.cluster_size()), ..Report::default() };
    let mut stored = Stored::read(file, header).await?;
    let mut counter = clusters(header);
    let mut counts = Differences::default();
    let mut faults = Faults::default();
    let mut entries = Entries::Note;
    let mut marks = 0;
    loop {
        let mut walk = Walk::new(file, header, &mut report, &plan);
        walk.references(&mut counter, entries, Some(&stored.table)).await?;
        join(&mut faults, walk.faults);
        entries = Entries::Known;
        let differs = |cluster: u64, count: u64, references: u64| {
            report.note(|| match count > references {
                true => {
                    format!("cluster {cluster} leaks: its count is {count}, its references are {references}")
                }
                false => format!(
                    "cluster {cluster} is not safe: its count is {count}, its references are {references}"
                ),
            });
        };
        let found = stored.compare(&counter, Change::No, differs).await?;
        report.check_errors += found.unread;
        report.leaks += found.leaks;
        report.corruptions += found.corruptions;
        add(&mut counts, found);
        let mut walk = Walk::new(file, header, &mut report, &plan);
        let active = walk.active();
        marks += walk.marks(&mut stored, active, Truth::References(&counter), false).await?;
        if !counter.advance() {
            break;
        }
    }
    report.corruptions += marks;
    report.corruptions += misplaced::misplaced(file, header, &mut report, false).await?;
    let within = shared::within_l1(file, header).await;
    if within > 0 {
        report.corruptions += within;
        report.note(|| {
            format!("{within} L2 tables lie in the clusters of the L1 table, which cannot be told apart")
        });
        (faults.lost, faults.hopeless) = (true, true);
    }
    report.image_end_offset = counts.end;
    Ok(Found { report, faults, counts })
}

fn join(all: &mut Faults, more: Faults) {
    all.entries += more.entries;
    all.lost |= more.lost;
    all.hopeless |= more.hopeless;
    all.rebuild |= more.rebuild;
    all.bitmaps |= more.bitmaps;
}

fn add(all: &mut Differences, more: Differences) {
    all.leaks += more.leaks;
    all.corruptions += more.corruptions;
    all.rebuild |= more.rebuild;
    all.overflows += more.overflows;
    all.end = all.end.max(more.end);
    all.unread += more.unread;
}

/// Repairs what was found.
async fn mend(
    file: &Rc<dyn Storage>,
    header: &mut Header,
    found: Found,
    repair: Repair,
) -> Result<(), ImageError> {
    if header.extensions.forget_bitmaps() {
        // They are not consistent, so that their clusters count as leaks: nothing should point there when these are free.
        header.write(file).await?;
        file.flush().await?;
    }
    let mut known = found.all_known();
    if repair == Repair::All && !found.faults.hopeless {
        if found.faults.bitmaps {
            header.autoclear &= !autoclear::BITMAPS;
            header.extensions.bitmaps = None;
            header.write(file).await?;
            file.flush().await?;
        }
        if found.faults.entries > 0 {
            let mut scratch = Report::default();
            let plan = Plan::default();
            let mut walk = Walk::new(file, header, &mut scratch, &plan);
            walk.references(&mut clusters(header), Entries::Fix, None).await?;
            file.flush().await?;
        }
        known = found.report.check_errors == 0;
    }
    if repair == Repair::All && known && (found.faults.rebuild || found.counts.rebuild) {
        rebuild::rebuild(file, header, &Plan::default()).await?;
    } else if repair == Repair::All && found.report.corruptions > 0 {
        sweep(file, header, &Plan::default(), Change::Raise).await?;
    }
    // Where something that refers is not known, what it refers to only seems to leak.
    if known {
        settle(file, header).await?;
    }
    Ok(())
}

/// Sets the marks for writing in place by what refers, then gives back what nothing refers to.
///
/// # Errors
/// The storage's.
pub(super) async fn settle(file: &Rc<dyn Storage>, header: &Header) -> Result<()> {
    sweep(file, header, &Plan::default(), Change::Lower).await?;
    Ok(())
}

/// Counts what is planned to refer as well, in a sound image.
///
/// # Errors
/// Some count would be larger than its bits allow; then nothing has changed. The storage's.
pub(super) async fn claim(
    file: &Rc<dyn Storage>,
    header: &mut Header,
    plan: &Plan,
) -> Result<(), ImageError> {
    let found = sweep(file, header, plan, Change::No).await?;
    if found.overflows > 0 {
        return Err(ImageError::Refused(format!(
            "reference counts of {} bits are too narrow for another reference to each cluster; convert the image to one with \
             wider counts",
            header.refcount_bits()
        )));
    }
    if found.rebuild {
        // New tables lie where no block counts.
        rebuild::rebuild(file, header, plan).await?;
    } else {
        sweep(file, header, plan, Change::Raise).await?;
    }
    Ok(())
}

/// Sets the marks for writing in place by the counts, in the active tables and in planned ones.
///
/// # Errors
/// The storage's.
pub(super) async fn unmark(file: &Rc<dyn Storage>, header: &Header, plan: &Plan) -> Result<()> {
    let mut scratch = Report::default();
    let mut stored = Stored::read(file, header).await?;
    let mut walk = Walk::new(file, header, &mut scratch, plan);
    let mut roots = vec![walk.active()];
    roots.extend_from_slice(&plan.roots);
    for root in roots {
        walk.marks(&mut stored, root, Truth::Counts, true).await?;
    }
    file.flush().await
}

/// The byte after the last cluster that something uses, by the counts.
///
/// # Errors
/// The storage's.
pub(super) async fn used_end(file: &Rc<dyn Storage>, header: &Header) -> Result<u64> {
    Ok(sweep(file, header, &Plan::default(), Change::No).await?.end)
}

/// The first cluster of so many that nothing uses, by the counts, and that are not in `taken`; behind all others if need be.
///
/// # Errors
/// The storage's.
pub(super) async fn free_run(
    file: &Rc<dyn Storage>,
    header: &Header,
    clusters: u64,
    taken: &[std::ops::Range<u64>],
) -> Result<u64> {
    Stored::read(file, header).await?.free_run(clusters, taken).await
}

/// Changes counts to what refers and what is planned to. Before any is lowered the marks become what they should be then: a
/// count that is too high bears both kinds. What is lowered to nothing is given back to the file's storage.
async fn sweep(file: &Rc<dyn Storage>, header: &Header, plan: &Plan, change: Change) -> Result<Differences> {
    let mut scratch = Report::default();
    let mut stored = Stored::read(file, header).await?;
    let mut counter = clusters(header);
    let mut all = Differences::default();
    loop {
        let mut walk = Walk::new(file, header, &mut scratch, plan);
        walk.references(&mut counter, Entries::Known, Some(&stored.table)).await?;
        let active = walk.active();
        if change == Change::Lower
            && walk.marks(&mut stored, active, Truth::References(&counter), true).await? > 0
        {
            file.flush().await?;
        }
        let mut free: Vec<std::ops::Range<u64>> = Vec::new();
        let differs = |cluster: u64, _count: u64, references: u64| {
            if change != Change::Lower || references > 0 {
                return;
            }
            let full = free.len() >= FREE_MAX;
            match free.last_mut() {
                Some(run) if run.end == cluster => run.end += 1,
                // More runs than that are not worth their memory.
                Some(_) if full => {}
                Some(_) | None => free.push(cluster..cluster + 1),
            }
        };
        add(&mut all, stored.compare(&counter, change, differs).await?);
        // What is free must be so for good before its bytes are gone.
        file.flush().await?;
        for run in free {
            let at = run.start << header.cluster_bits;
            let end = (run.end << header.cluster_bits).min(file.size());
            if let Some(span) = Span::new(at, end.saturating_sub(at)).filter(|span| !span.is_empty()) {
                file.discard(span).await?;
            }
        }
        if !counter.advance() {
            return Ok(all);
        }
    }
}
