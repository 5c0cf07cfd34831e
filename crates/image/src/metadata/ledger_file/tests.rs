//! Ledgers in files: deaths at any byte, rounds that fail, and what is no ledger.

use std::os::unix::fs::PermissionsExt;

use storage::conformance::Random;
use storage::file::Records;

use super::*;

struct Place {
    directory: tempfile::TempDir,
    record: Record,
}

impl Place {
    fn new() -> Place {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(&directory.path().join("state")).unwrap();
        let image = directory.path().join("disk.qcow2");
        let record = records.of(&File::create_new(&image).unwrap(), &image).unwrap();
        Place { directory, record }
    }

    fn open(&self) -> LedgerFile {
        LedgerFile::open(&self.record).unwrap()
    }

    /// What a successor finds.
    fn found(&self) -> Vec<Change> {
        self.open().changes().unwrap()
    }

    fn files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.directory.path().join("state")).unwrap();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    }
}

fn change(number: u64) -> Change {
    Change { at: number * 8, old: number, new: u64::MAX - number, stage: number as u8 % 3 }
}

fn group(numbers: std::ops::Range<u64>) -> Vec<Change> {
    numbers.map(change).collect()
}

#[test]
fn a_successor_finds_what_was_noted_and_not_what_a_round_has_written() {
    let place = Place::new();
    assert_eq!(place.found(), []);
    assert_eq!(place.files(), Vec::<PathBuf>::new(), "nothing is there before something is noted");
    let ledger = place.open();
    ledger.note(&group(0..3)).unwrap();
    ledger.note(&group(3..4)).unwrap();
    assert_eq!(place.found(), group(0..4));
    ledger.begin();
    ledger.note(&group(4..6)).unwrap();
    assert_eq!(place.found(), group(0..6), "the round may fail yet");
    ledger.end();
    assert_eq!(place.found(), group(4..6));
    ledger.begin();
    ledger.end();
    assert_eq!(place.found(), []);
    ledger.note(&group(6..7)).unwrap();
    assert_eq!(place.found(), group(6..7));
    assert_eq!(ledger.changes().unwrap(), group(6..7));
}

#[test]
fn what_a_round_that_failed_did_not_write_stays_until_one_ends_well() {
    let place = Place::new();
    let ledger = place.open();
    let rounds = FILES as u64 + 3;
    for number in 0..rounds {
        ledger.note(&group(number..number + 1)).unwrap();
        ledger.begin();
        assert_eq!(place.found(), group(0..number + 1));
    }
    ledger.note(&group(rounds..rounds + 1)).unwrap();
    // As many failures as that make it keep more than it must, but always the end of the history, and it says so.
    assert!(!ledger.end(), "what was noted last before the round is still there");
    let found = place.found();
    assert_eq!(found, group(rounds + 1 - found.len() as u64..rounds + 1));
    assert!(found.len() < rounds as usize, "and some of it is forgotten: {found:?}");
    ledger.begin();
    assert!(ledger.end());
    assert_eq!(place.found(), []);
}

#[test]
fn any_sequence_of_notes_rounds_and_deaths_gives_what_a_list_gives() {
    let mut random = Random(5);
    for _ in 0..8 {
        let place = Place::new();
        let mut ledger = place.open();
        // What was noted, how much of it when the last round began, how much is forgotten.
        let (mut noted, mut begun, mut forgotten, mut running) = (0, 0, 0, false);
        for _ in 0..150 {
            match random.below(12) {
                0..=5 => {
                    let count = 1 + random.below(5);
                    ledger.note(&group(noted..noted + count)).unwrap();
                    noted += count;
                }
                6 | 7 if !running => {
                    ledger.begin();
                    (begun, running) = (noted, true);
                }
                8..=10 if running => {
                    let is_all = ledger.end();
                    (forgotten, running) = (begun, false);
                    if is_all {
                        assert!(
                            place.found().len() as u64 <= noted - begun,
                            "it says that it has forgotten them"
                        );
                    }
                }
                11 => {
                    drop(ledger);
                    ledger = place.open();
                    running = false;
                }
                _ => {}
            }
            let found = place.found();
            let from = noted - found.len() as u64;
            assert_eq!(found, group(from..noted));
            assert!(from <= forgotten, "{from} of {noted}: {forgotten} may be forgotten");
        }
        ledger.begin();
        let is_all = ledger.end();
        ledger.begin();
        assert!(ledger.end() || !is_all, "one round makes room for the next one's notes");
        ledger.begin();
        assert!(ledger.end());
        assert_eq!(place.found(), []);
    }
}

#[test]
fn a_process_that_dies_at_any_byte_of_a_note_leaves_the_groups_before_it() {
    let place = Place::new();
    let ledger = place.open();
    let (mut ends, mut noted) = (vec![0], 0);
    for count in [3, 1, 7] {
        ledger.note(&group(noted..noted + count)).unwrap();
        noted += count;
        ends.push(std::fs::metadata(&place.files()[0]).unwrap().len());
    }
    let (path, whole) = (&place.files()[0], std::fs::read(&place.files()[0]).unwrap());
    for len in 0..=whole.len() {
        std::fs::write(path, &whole[..len]).unwrap();
        let groups = ends.iter().filter(|end| **end <= len as u64).count() - 1;
        let expected = group(0..[0, 3, 4, 11][groups]);
        assert_eq!(place.found(), expected, "{len} bytes");
        // And who comes then goes on behind them.
        let successor = place.open();
        successor.note(&group(20..22)).unwrap();
        assert_eq!(place.found(), [expected.clone(), group(20..22)].concat(), "{len} bytes");
        successor.begin();
        successor.note(&group(22..23)).unwrap();
        assert_eq!(place.found(), [expected, group(20..23)].concat(), "{len} bytes");
        successor.end();
        assert_eq!(place.found(), group(22..23), "{len} bytes");
        LedgerFile::remove(&place.record).unwrap();
    }
}

#[test]
fn a_process_that_dies_while_a_round_ends_leaves_the_end_of_the_history() {
    let place = Place::new();
    let ledger = place.open();
    ledger.note(&group(0..2)).unwrap();
    ledger.begin();
    ledger.note(&group(2..4)).unwrap();
    ledger.begin();
    ledger.note(&group(4..5)).unwrap();
    drop(ledger);
    // As `end` does it: one after the other, from the oldest on.
    for (number, left) in [(0, 2..5), (1, 4..5)] {
        File::options().write(true).open(&place.files()[number]).unwrap().set_len(0).unwrap();
        assert_eq!(place.found(), group(left));
    }
}

#[test]
fn a_byte_that_was_changed_is_an_error_that_says_what_to_do() {
    let place = Place::new();
    place.open().note(&group(0..2)).unwrap();
    place.open().note(&group(2..3)).unwrap();
    let (path, whole) = (&place.files()[0], std::fs::read(&place.files()[0]).unwrap());
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        std::fs::write(path, bytes).unwrap();
        let error = LedgerFile::open(&place.record).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "byte {at}");
        for what in ["disk.qcow2", "ledger0-file-", "remove it and check the image"] {
            assert!(error.to_string().contains(what), "byte {at}: no {what} in {error}");
        }
    }
    // What follows a whole group is a group or the beginning of one.
    std::fs::write(path, [&whole[..], &[0xff; 100]].concat()).unwrap();
    assert!(LedgerFile::open(&place.record).is_err());
    File::create(path).unwrap().set_len(FILE_MAX + 1).unwrap();
    let error = LedgerFile::open(&place.record).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("16777217 bytes"), "{error}");
}

#[test]
fn what_is_no_file_is_refused() {
    let place = Place::new();
    std::os::unix::fs::symlink("/dev/null", place.record.beside("ledger0")).unwrap();
    assert!(LedgerFile::open(&place.record).is_err(), "a link is not followed");
    LedgerFile::remove(&place.record).unwrap();
    std::fs::create_dir(place.record.beside("ledger1")).unwrap();
    assert!(LedgerFile::open(&place.record).is_err());
}

#[test]
fn the_ledger_of_an_earlier_boot_is_removed() {
    let place = Place::new();
    place.open().note(&group(0..2)).unwrap();
    let path = &place.files()[0];
    let mut bytes = Vec::new();
    push_header(&mut bytes, 1, "another-boot");
    push_group(&mut bytes, 1, 0, &group(0..2));
    std::fs::write(path, bytes).unwrap();
    assert_eq!(place.found(), []);
    assert_eq!(place.files(), Vec::<PathBuf>::new());
}

#[test]
fn a_ledger_is_for_its_owner_alone_and_goes_when_it_is_told_to() {
    let place = Place::new();
    let ledger = place.open();
    ledger.note(&group(0..1)).unwrap();
    ledger.begin();
    ledger.note(&group(1..2)).unwrap();
    let files = place.files();
    assert_eq!(files.len(), 2);
    for path in &files {
        assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o7777, 0o600);
    }
    LedgerFile::remove(&place.record).unwrap();
    assert_eq!(place.files(), Vec::<PathBuf>::new());
    LedgerFile::remove(&place.record).unwrap();
    let error = ledger.note(&group(2..3)).unwrap_err();
    assert!(error.to_string().contains("was removed while it was in use"), "{error}");
}

#[test]
fn what_finds_no_room_is_not_noted_and_what_follows_is() {
    let place = Place::new();
    let ledger = place.open();
    let too_many = group(0..FILE_MAX / CHANGE as u64 + 1);
    assert_eq!(ledger.note(&too_many).unwrap_err().kind(), ErrorKind::FileTooLarge);
    assert!(place.open().is_whole().unwrap(), "of nothing there is nothing missing");
    ledger.note(&group(0..1)).unwrap();
    assert!(place.open().is_whole().unwrap());
    let error = ledger.note(&too_many).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FileTooLarge);
    ledger.note(&group(1..2)).unwrap();
    assert_eq!(place.found(), group(0..2));
    assert!(!place.open().is_whole().unwrap(), "a successor is to know that something is missing");
    assert!(!ledger.is_whole().unwrap());

    // A round has written all of it in the end.
    ledger.begin();
    ledger.note(&group(2..3)).unwrap();
    assert!(!place.open().is_whole().unwrap(), "the round may fail yet");
    ledger.end();
    assert_eq!(place.found(), group(2..3));
    assert!(place.open().is_whole().unwrap());

    // Where there is no directory any more either.
    let place = Place::new();
    let ledger = place.open();
    std::fs::remove_dir_all(place.directory.path().join("state")).unwrap();
    assert_eq!(ledger.note(&group(0..1)).unwrap_err().kind(), ErrorKind::NotFound);
}
