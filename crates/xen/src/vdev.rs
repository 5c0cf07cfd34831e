//! A virtual device's number: what a guest's disk is called in the xenstore, and the names that people call it by.
//!
//! Source: xen-vbd-interface(7) of Xen.

use std::fmt;
use std::str::FromStr;

/// A virtual device's number. Its text is the name that stands for it, as `xvdb`, and the number where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vdev(u32);

/// Why a text is no virtual device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VdevError {
    /// It is neither a name nor a number.
    #[error("`{0}` is no virtual device: expected xvdb, xvdb1, sda, hda, d1p0 or a number such as 51728")]
    Unknown(String),
    /// There is no number for a disk this far back.
    #[error("`{text}` is beyond the last disk of its kind, {last}")]
    Disk {
        /// What was given.
        text: String,
        /// The last one there is.
        last: String,
    },
    /// There is no number for a partition this far back.
    #[error("`{text}` is beyond the last partition of a disk of its kind, {last}")]
    Partition {
        /// What was given.
        text: String,
        /// The last one there is.
        last: u32,
    },
    /// Numbers from here on have no meaning yet.
    #[error("`{0}` is no virtual device's number: those from 0x20000000 on are reserved")]
    Reserved(String),
}

/// What comes before the letter of a disk. It is a hint to the guest: all of them are disks of Xen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Xvd,
    Sd,
    Hd,
}

/// The numbers of disks and partitions that the long form holds.
const LONG_DISK_MAX: u32 = (1 << 20) - 1;
const LONG_PARTITION_MAX: u32 = 255;

impl Kind {
    const ALL: [Kind; 3] = [Kind::Xvd, Kind::Sd, Kind::Hd];

    fn prefix(self) -> &'static str {
        match self {
            Kind::Xvd => "xvd",
            Kind::Sd => "sd",
            Kind::Hd => "hd",
        }
    }

    /// The last disk and the last partition of it.
    fn last(self) -> (u32, u32) {
        match self {
            Kind::Xvd => (LONG_DISK_MAX, LONG_PARTITION_MAX),
            Kind::Sd => (15, 15),
            Kind::Hd => (3, 63),
        }
    }

    /// "Concrete encoding in the VBD interface". Both numbers are within `last`.
    fn number(self, disk: u32, partition: u32) -> u32 {
        match self {
            Kind::Xvd if disk > 15 || partition > 15 => 1 << 28 | disk << 8 | partition,
            Kind::Xvd => 202 << 8 | disk << 4 | partition,
            Kind::Sd => 8 << 8 | disk << 4 | partition,
            Kind::Hd if disk < 2 => 3 << 8 | disk << 6 | partition,
            Kind::Hd => 22 << 8 | (disk - 2) << 6 | partition,
        }
    }
}

impl Vdev {
    /// The device of this number.
    ///
    /// # Errors
    /// If the number is reserved.
    pub fn new(number: u32) -> Result<Vdev, VdevError> {
        if number < 2 << 28 { Ok(Vdev(number)) } else { Err(VdevError::Reserved(number.to_string())) }
    }

    /// Its number, as the xenstore has it.
    pub fn number(self) -> u32 {
        self.0
    }

    /// The name that stands for this number, if there is one.
    pub fn name(self) -> Option<String> {
        let number = self.0;
        let (kind, disk, partition) = match number >> 8 {
            _ if number >> 28 == 1 => (Kind::Xvd, number >> 8 & LONG_DISK_MAX, number & LONG_PARTITION_MAX),
            202 => (Kind::Xvd, number >> 4 & 15, number & 15),
            8 => (Kind::Sd, number >> 4 & 15, number & 15),
            3 => (Kind::Hd, number >> 6 & 3, number & 63),
            22 => (Kind::Hd, (number >> 6 & 3) + 2, number & 63),
            _ => return None,
        };
        // The long form of what has a short one, and disks that IDE does not have: the name would stand for another.
        if disk > kind.last().0 || kind.number(disk, partition) != number {
            return None;
        }
        let partition = if partition == 0 { String::new() } else { partition.to_string() };
        Some(format!("{}{}{partition}", kind.prefix(), letters(disk)))
    }
}

impl fmt::Display for Vdev {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => formatter.write_str(&name),
            None => self.0.fmt(formatter),
        }
    }
}

impl FromStr for Vdev {
    type Err = VdevError;

    fn from_str(text: &str) -> Result<Vdev, VdevError> {
        let unknown = || VdevError::Unknown(text.into());
        if text.starts_with(|first: char| first.is_ascii_digit()) {
            return number(text).ok_or_else(unknown)?.and_then(Vdev::new).map_err(|_reserved| {
                // In the words of whoever gave it.
                VdevError::Reserved(text.into())
            });
        }
        let named = Kind::ALL.into_iter().find_map(|kind| {
            let rest = text.strip_prefix(kind.prefix())?;
            let digits = rest.trim_start_matches(|letter: char| letter.is_ascii_lowercase());
            let disk = disk_of(&rest[..rest.len() - digits.len()])?;
            let partition =
                if digits.is_empty() { 0 } else { decimal(digits).filter(|number| *number > 0)? };
            Some((kind, disk, partition))
        });
        let (kind, disk, partition) = named.or_else(|| abstract_form(text)).ok_or_else(unknown)?;
        let (last_disk, last_partition) = kind.last();
        if disk > u64::from(last_disk) {
            let last = format!("{}{}", kind.prefix(), letters(last_disk));
            return Err(VdevError::Disk { text: text.into(), last });
        }
        if partition > u64::from(last_partition) {
            return Err(VdevError::Partition { text: text.into(), last: last_partition });
        }
        Ok(Vdev(kind.number(disk as u32, partition as u32)))
    }
}

/// `d1` and `d1p2`.
fn abstract_form(text: &str) -> Option<(Kind, u64, u64)> {
    let (disk, partition) = match text.strip_prefix('d')?.split_once('p') {
        Some((disk, partition)) => (disk, decimal(partition)?),
        None => (text.strip_prefix('d')?, 0),
    };
    Some((Kind::Xvd, decimal(disk)?, partition))
}

/// A number as people write it in a guest's configuration: decimal, hexadecimal (0x) or octal (0).
fn number(text: &str) -> Option<Result<u32, VdevError>> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text, 10),
    };
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return None;
    }
    // What does not fit is beyond all that has a meaning.
    Some(u32::from_str_radix(digits, radix).map_err(|_overflow| VdevError::Reserved(text.into())))
}

/// Digits only, and no needless zeroes; what does not fit is as large as can be.
fn decimal(digits: &str) -> Option<u64> {
    let plain = digits.bytes().all(|digit| digit.is_ascii_digit()) && !digits.is_empty();
    let plain = plain && (digits == "0" || !digits.starts_with('0'));
    plain.then(|| digits.parse().unwrap_or(u64::MAX))
}

/// a is 0, z is 25, aa is 26; what does not fit is as large as can be.
fn disk_of(letters: &str) -> Option<u64> {
    let count = letters.bytes().fold(0_u64, |count, letter| {
        count.saturating_mul(26).saturating_add(u64::from(letter.saturating_sub(b'a')) + 1)
    });
    count.checked_sub(1)
}

/// The letters of a disk.
fn letters(disk: u32) -> String {
    let mut text = String::new();
    let mut rest = disk + 1;
    while rest > 0 {
        rest -= 1;
        text.insert(0, char::from(b'a' + (rest % 26) as u8));
        rest /= 26;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<u32, VdevError> {
        text.parse().map(Vdev::number)
    }

    /// Names and numbers of xen-vbd-interface(7), of Linux's list of devices (202, 8, 3 and 22 are majors), and of what
    /// `xl block-attach` writes.
    const NAMED: [(&str, u32); 18] = [
        ("xvda", 51712),
        ("xvda1", 51713),
        ("xvdb", 51728),
        ("xvdb2", 51730),
        ("xvdp15", 51967),
        ("xvdp16", 0x1000_0f10),
        ("xvda16", 0x1000_0010),
        ("xvdq", 0x1000_1000),
        ("xvdz", 0x1000_1900),
        ("xvdaa", 0x1000_1a00),
        ("xvdtq37", 0x1002_1825),     // disk 536, partition 37
        ("xvdbgqcv255", 0x1FFF_FFFF), // the last of all
        ("sda", 2048),
        ("sda1", 2049),
        ("sdp15", 2303),
        ("hda", 768),
        ("hdb63", 895),
        ("hdc2", 5634),
    ];

    #[test]
    fn a_name_is_a_number_and_a_number_a_name() {
        for (name, number) in NAMED {
            assert_eq!(parse(name), Ok(number), "{name}");
            assert_eq!(Vdev::new(number).unwrap().to_string(), name, "{number}");
        }
    }

    #[test]
    fn other_ways_to_say_it_mean_the_same() {
        for (text, name) in [
            ("d0", "xvda"),
            ("d0p0", "xvda"),
            ("d1p2", "xvdb2"),
            ("d536p37", "xvdtq37"),
            ("51728", "xvdb"),
            ("0xca10", "xvdb"),
            ("0XCA10", "xvdb"),
            ("0145020", "xvdb"),
            ("268439552", "xvdq"),
        ] {
            assert_eq!(text.parse::<Vdev>().unwrap().to_string(), name, "{text}");
        }
        assert_eq!(parse("d1048575p255"), Ok(0x1FFF_FFFF));
    }

    #[test]
    fn a_number_without_a_name_stays_a_number() {
        // The first is a deprecated one, the second IDE's third disk on the first controller, the third the long form of
        // xvda.
        for number in [2816, 3 << 8 | 2 << 6, 1 << 28] {
            let vdev = Vdev::new(number).unwrap();
            assert_eq!((vdev.name(), vdev.to_string()), (None, number.to_string()));
            assert_eq!(parse(&number.to_string()), Ok(number));
        }
    }

    #[test]
    fn each_number_that_has_a_name_is_found_by_it() {
        for number in (0..1 << 17).chain(0x1000_0000..0x1000_4000).chain(0x1FFF_F000..0x2000_0000) {
            let vdev = Vdev::new(number).unwrap();
            assert_eq!(vdev.to_string().parse(), Ok(vdev), "{number}");
        }
    }

    #[test]
    fn what_is_no_device_is_said_to_be_none() {
        for text in [
            "",
            "xvd",
            "xvd1",
            "XVDA",
            "xvda01",
            "xvda0",
            "xvda-1",
            "xvda1a",
            "xvda 1",
            " xvda",
            "/dev/xvda",
            "d",
            "dp1",
            "d1p",
            "d01",
            "d1p02",
            "d1q2",
            "vda",
            "nvme0n1",
            "0x",
            "089",
            "1e3",
            "+5",
            "-1",
            "12a",
            "xvdä",
        ] {
            assert_eq!(parse(text), Err(VdevError::Unknown(text.into())), "{text}");
        }
    }

    #[test]
    fn what_is_beyond_the_last_is_said_with_the_last() {
        for (text, named) in [
            ("sdq", "beyond the last disk of its kind, sdp"),
            ("hde", "beyond the last disk of its kind, hdd"),
            ("d1048576", "beyond the last disk"),
            ("xvdzzzzzzzzzzzzzzzzzzzzzzzzzzzz", "beyond the last disk"),
            ("d99999999999999999999999", "beyond the last disk"),
            ("sda16", "of its kind, 15"),
            ("hda64", "of its kind, 63"),
            ("xvda256", "of its kind, 255"),
            ("xvda99999999999999999999999", "of its kind, 255"),
            ("0x20000000", "`0x20000000` is no virtual device's number"),
            ("4294967295", "reserved"),
            ("99999999999999999999", "reserved"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(text) && error.contains(named), "{text}: {error}");
        }
    }
}
