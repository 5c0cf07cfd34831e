//! What the guest's kernel logged, with how bad it thinks that is.

use anyhow::{Context, Result, ensure};
use lab::shell::Shell;
use std::collections::BTreeMap;

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// The lower, the worse (include/linux/kern_levels.h).
    pub(crate) level: u8,
    pub(crate) text: String,
}

/// Takes what was logged since it was last taken.
pub(crate) fn take(guest: &mut dyn Shell) -> Result<Vec<Line>> {
    let said = guest.sh("dmesg -r -c")?;
    said.lines().map(|line| parse(line).with_context(|| format!("a strange line: {line}"))).collect()
}

/// `<4>[    1.234567] text`. What goes over several lines has that on each.
fn parse(line: &str) -> Option<Line> {
    let (level, rest) = line.strip_prefix('<')?.split_once('>')?;
    let text = rest.split_once("] ").map_or(rest, |(_, text)| text);
    // The facility is in the higher bits.
    let level = level.parse::<u32>().ok()? & 7;
    Some(Line { level: u8::try_from(level).ok()?, text: text.to_owned() })
}

/// Fails if the kernel found any fault: an error, or a warning about a disk.
pub(crate) fn require_no_fault<'a>(lines: impl IntoIterator<Item = &'a Line>) -> Result<()> {
    require_none(lines, |line| line.level <= ERROR || (line.level == WARNING && is_about_disks(line)))
}

/// Fails if the kernel found an error. Warnings are in order: a file system says that it once had errors.
pub(crate) fn require_no_error<'a>(lines: impl IntoIterator<Item = &'a Line>) -> Result<()> {
    require_none(lines, |line| line.level <= ERROR)
}

const ERROR: u8 = 3;
const WARNING: u8 = 4;

fn require_none<'a>(
    lines: impl IntoIterator<Item = &'a Line>,
    is_fault: impl Fn(&Line) -> bool,
) -> Result<()> {
    let faults: Vec<&str> =
        lines.into_iter().filter(|line| is_fault(line)).map(|line| line.text.as_str()).collect();
    ensure!(faults.is_empty(), "the guest's kernel complains:\n{}", faults.join("\n"));
    Ok(())
}

fn is_about_disks(line: &Line) -> bool {
    ["I/O error", "vd", "vbd", "virtio", "blkfront", "EXT4-fs", "JBD2"]
        .iter()
        .any(|word| line.text.contains(word))
}

/// The sectors that the block layer's errors on this disk name, and how often: `I/O error, dev vdb, sector 12 op …`.
pub(crate) fn failed_sectors(lines: &[Line], disk: &str, operation: &str) -> Result<BTreeMap<u64, u32>> {
    let mut sectors = BTreeMap::new();
    for line in lines {
        ensure!(!line.text.contains("suppressed"), "the kernel left out lines: {}", line.text);
        if let Some((_, rest)) = line.text.split_once(&format!("I/O error, dev {disk}, sector "))
            && rest.contains(operation)
        {
            let sector = rest.split(' ').next().unwrap_or_default();
            let sector = sector.parse().with_context(|| format!("a strange sector: {}", line.text))?;
            *sectors.entry(sector).or_default() += 1;
        }
    }
    Ok(sectors)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ERROR: &str = "<3>[   12.345678] I/O error, dev vdb, sector 2048 op 0x1:(WRITE) flags 0x800 phys_seg 1 prio class 0";

    #[test]
    fn an_error_names_its_sector() {
        let lines = [parse(ERROR).unwrap(), parse("<6>[    1.0] vdb: vdb1").unwrap()];
        assert_eq!(lines[0].level, 3);
        assert_eq!(failed_sectors(&lines, "vdb", "WRITE").unwrap(), BTreeMap::from([(2048, 1)]));
        assert!(failed_sectors(&lines, "vdb", "READ").unwrap().is_empty());
        assert!(failed_sectors(&lines, "vda", "WRITE").unwrap().is_empty());
        assert!(require_no_fault(&lines).is_err());
        assert!(require_no_fault(&lines[1..]).is_ok());
    }

    #[test]
    fn lines_that_were_left_out_are_missed() {
        let line = parse("<4>[  12.0] __blk_mq_end_request: 12 callbacks suppressed").unwrap();
        assert!(failed_sectors(&[line], "vdb", "WRITE").is_err());
    }
}
