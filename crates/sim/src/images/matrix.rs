//! The fault matrix: a script of requests for each format, in which each operation of storage fails in each way, once and from
//! then on (FAILURES D.1).
//!
//! A run without faults counts the operations, and names each by what it touches: the names are those of the events of QEMU's
//! iotest 026, and the like for the other formats. What the file's bytes mean is told here from the bytes alone, by their
//! formats' specifications. Then there is a run for each operation, each fault, once and forever, judged like any other: the
//! guests' answers are true, all goes on when the fault has ceased, and what deaths leave is whole.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

use block::Errno;
use image::Format;

use super::bytes::Bytes;
use super::guest::{Habits, Request};
use super::model::Model;
use super::run::{Life, Plan, Trial, caught};
use super::subject::{DATA, Data, IMAGE, Kind, Past, Subject};
use super::world::{Act, Class, Event, Fault, Notes, Operation, Pace, Rule, World, apply};
use crate::dice::Dice;

/// Bytes of a thread's stack.
const STACK: usize = 32 << 20;
/// All runs of a subject are the same up to their fault.
const SEED: u64 = 26;
/// Notes of the ledger that fail, from the first on.
const NOTES: u64 = 4;
/// Of disks with more bytes, which take long to read, the first three operations of each step have to do.
const LARGE: u64 = 1 << 20;
/// One trial in so many is shown to QEMU's programs, where these are to be asked.
const ASKED: u64 = 25;
/// Steps that each format's subjects must have reached, all together.
const QCOW2: [&str; 19] = [
    "header_load",
    "reftable_load",
    "reftable_update",
    "reftable_grow",
    "reftable_switch",
    "refblock_load",
    "refblock_update",
    "refblock_alloc",
    "l1_load",
    "l1_update",
    "l2_load",
    "l2_update",
    "l2_alloc_write",
    "cluster_alloc",
    "cluster_free",
    "read_compressed",
    "read_backing",
    "write_aio",
    "flush_to_disk",
];
const QCOW: [&str; 8] = [
    "header_load",
    "l1_load",
    "l2_load",
    "l2_update",
    "cluster_alloc",
    "read_backing",
    "write_aio",
    "flush_to_disk",
];
const VHD: [&str; 13] = [
    "footer_load",
    "header_load",
    "bat_load",
    "bat_update",
    "bitmap_load",
    "bitmap_update",
    "bitmap_alloc",
    "footer_update",
    "write_zeroes",
    "cluster_alloc",
    "read_backing",
    "write_aio",
    "flush_to_disk",
];

/// What came of one subject.
#[derive(Clone, Debug)]
pub struct Row {
    /// The subject.
    pub name: &'static str,
    /// Runs with a fault.
    pub trials: u64,
    /// Deaths that were judged.
    pub deaths: u64,
    /// How many operations of the run without faults were of each step.
    pub steps: BTreeMap<&'static str, u64>,
}

/// An image, and what is done to it.
struct Case {
    name: &'static str,
    subject: Subject,
}

fn cases() -> Vec<Case> {
    let qcow2 = |cluster, refcount_bits, extended, data| Kind::Qcow2 {
        cluster,
        version: 3,
        refcount_bits,
        extended,
        lazy: false,
        data,
        reserved: false,
    };
    let vhd = || Kind::Vhd { block: 4096, is_fixed: false, reserved: false };
    let plain = || qcow2(512, 16, false, Data::Here);
    let case = |name, kind: Kind, units: u64, below: u64, past| {
        let unit = match &kind {
            Kind::Qcow2 { cluster, .. } => *cluster,
            Kind::Vhd { block, .. } => u64::from(*block),
            Kind::Qcow { cluster } => u64::from(*cluster),
            Kind::Raw => 4096,
            #[cfg(test)]
            Kind::Toy(_) => 4096,
        };
        let size = unit * units;
        let below = below.min(size);
        let subject = Subject { kind, size, below, past, unit, has_ledger: true, lasting: true, cache: 1024 };
        Case { name, subject }
    };
    vec![
        case("qcow2", plain(), 160, 0, Past::Below),
        // Nearly two refcount blocks are full: the script needs another one.
        case("qcow2, wide counts", qcow2(512, 64, false, Data::Here), 160, 56_320, Past::Shared),
        case("qcow2 over raw", plain(), 160, 60_032, Past::Below),
        case("qcow2 over vhd over raw", plain(), 160, 81_920, Past::Between(Format::Vhd)),
        // Its refcount table has no entry for what comes after 2 MiB, and it has nearly as much.
        case("qcow2 with a snapshot", qcow2(512, 64, false, Data::Here), FILLED, u64::MAX, Past::Shared),
        case("qcow2, compressed", plain(), 160, 40_000 / 64 * 64, Past::Packed),
        case("qcow2, extended", qcow2(16384, 16, true, Data::Here), 12, 98_304, Past::Below),
        case("qcow2, data apart", qcow2(1024, 16, false, Data::Apart), 160, 0, Past::Below),
        case("vhd", vhd(), 24, 0, Past::Below),
        case("vhd over raw", vhd(), 24, 65_536, Past::Below),
        case("vhd over qcow over raw", vhd(), 24, 98_304, Past::Between(Format::Qcow)),
        // A table tells of 512 clusters: the last one needs a third.
        case("qcow", Kind::Qcow { cluster: 512 }, 1100, 0, Past::Below),
        case("qcow over raw", Kind::Qcow { cluster: 512 }, 160, 60_032, Past::Below),
    ]
}

/// Clusters of a disk that, with its tables, a snapshot and the life before, leaves hardly any room below 2 MiB of its file.
const FILLED: u64 = 3950;

/// What guests have asked in a life before, so that there are tables to be loaded.
fn prelude(unit: u64, size: u64) -> Vec<Request> {
    let far = size / 2 / unit * unit;
    vec![
        Request::Write(3 * unit + 64..4 * unit - 64),
        Request::Write(far + 2 * unit..far + 3 * unit),
        Request::Flush,
    ]
}

/// What guests ask, two of them side by side.
fn script(unit: u64, size: u64) -> Vec<Request> {
    let write = |from: u64, to: u64| Request::Write(from..to);
    let far = size / 2 / unit * unit;
    vec![
        write(64, unit / 2),
        write(unit, 3 * unit),
        Request::Read(0..4 * unit),
        Request::Flush,
        write(0, unit),
        Request::Zero(unit..2 * unit, true),
        Request::Discard(2 * unit..3 * unit),
        Request::Flush,
        write(far, far + unit),
        write(far + unit / 2, far + 2 * unit),
        write(size - unit, size),
        Request::Read(0..size),
        Request::Flush,
        write(4 * unit, 6 * unit),
        write(2 * unit, 3 * unit),
        Request::Discard(far..far + unit),
        Request::Flush,
        write(6 * unit, 7 * unit),
        write(unit + 64, 2 * unit - 64),
        Request::Zero(far..far + 2 * unit, false),
        Request::Read(0..size),
        Request::Flush,
    ]
}

/// Tries all of it: `all` operations, or the first of each step. QEMU's programs see some of the images, if they are to be
/// asked.
///
/// # Errors
/// What is wrong; a step that no script has reached.
pub fn rows(all: bool, ask_qemu: bool) -> Result<Vec<Row>, String> {
    let cases = cases();
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, Row)>, String> {
        let mut rows = Vec::new();
        while let Some((number, case)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|number| Some((number, cases.get(number)?)))
        {
            let row = case.run(all, ask_qemu).map_err(|what| format!("{}: {what}", case.name))?;
            rows.push((number, row));
        }
        Ok(rows)
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let done: Vec<Result<Vec<(usize, Row)>, String>> = std::thread::scope(|scope| {
        // Without optimisations the futures of an image that is opened take more than a thread has at first.
        let start = |_| std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
        let threads: Vec<_> = (0..threads).map(start).collect();
        let told = |_| "a thread has panicked".to_owned();
        let join = |thread: std::io::Result<std::thread::ScopedJoinHandle<'_, _>>| {
            thread.map_err(|error| error.to_string())?.join().map_err(told)?
        };
        threads.into_iter().map(join).collect()
    });
    let mut rows: Vec<(usize, Row)> =
        done.into_iter().collect::<Result<Vec<_>, String>>()?.into_iter().flatten().collect();
    rows.sort_by_key(|(number, _)| *number);
    let rows: Vec<Row> = rows.into_iter().map(|(_, row)| row).collect();
    for (format, must) in [("qcow2", &QCOW2[..]), ("qcow", &QCOW[..]), ("vhd", &VHD[..])] {
        let of = |row: &&Row| row.name.split([' ', ',']).next() == Some(format);
        let reached: BTreeSet<&str> =
            rows.iter().filter(of).flat_map(|row| row.steps.keys().copied()).collect();
        if let Some(missing) = must.iter().find(|step| !reached.contains(**step)) {
            return Err(format!("no script of {format} has reached {missing}: only {reached:?}"));
        }
    }
    Ok(rows)
}

/// An operation of the run without faults.
#[derive(Clone, Copy, Debug)]
struct Step {
    name: &'static str,
    file: usize,
    class: Class,
    /// So many of its file and class came before it.
    before: u64,
}

impl Case {
    fn run(&self, all: bool, ask_qemu: bool) -> Result<Row, String> {
        let files = caught(|| self.subject.create())?;
        let steps = caught(|| self.steps(files.clone()))?;
        let mut row = Row { name: self.name, trials: 0, deaths: 0, steps: BTreeMap::new() };
        for step in &steps {
            let seen = row.steps.entry(step.name).or_default();
            *seen += 1;
            let most = match all {
                false => 1,
                true if self.subject.size > LARGE => 3,
                true => u64::MAX,
            };
            if *seen > most {
                continue;
            }
            for fault in faults(step.class) {
                for times in [1, u64::MAX] {
                    let rule = Rule {
                        file: Some(step.file),
                        classes: vec![step.class],
                        within: None,
                        skip: step.before,
                        times,
                        fault: *fault,
                    };
                    self.try_one(rule, step.name, &files, &mut row, ask_qemu)?;
                }
            }
        }
        for skip in 0..if all { NOTES } else { 1 } {
            for times in [1, u64::MAX] {
                let fault = Fault::Fail(Errno::ENOSPC);
                let rule = Rule { file: None, classes: vec![Class::Note], within: None, skip, times, fault };
                self.try_one(rule, "ledger_note", &files, &mut row, ask_qemu)?;
            }
        }
        Ok(row)
    }

    fn life(
        &self,
        script: fn(u64, u64) -> Vec<Request>,
        rules: Vec<Rule>,
        killed_after: Option<u64>,
    ) -> Life {
        let script: Rc<[Request]> = script(self.subject.unit, self.subject.size).into();
        let habits = Habits {
            depth: 2,
            steps: script.len() as u64,
            script: Some(script),
            ..Habits::draw(&mut Dice::new(SEED), self.subject.unit)
        };
        Life { habits, rules, killed_after }
    }

    fn try_one(
        &self,
        rule: Rule,
        step: &str,
        files: &[Bytes],
        row: &mut Row,
        ask_qemu: bool,
    ) -> Result<(), String> {
        let told = format!("{step} ({:?})", rule);
        let plan = Plan {
            lives: vec![self.life(prelude, Vec::new(), None), self.life(script, vec![rule], None)],
            all_deaths: false,
            deaths: 1,
            ask_qemu: ask_qemu && row.trials.is_multiple_of(ASKED),
        };
        let files = Some(files.to_vec());
        let mut trial = Trial { subject: self.subject.clone(), plan, files, operations: 0, deaths: 0 };
        let result = caught(|| trial.run(&mut Dice::new(SEED)));
        row.trials += 1;
        row.deaths += trial.deaths;
        result.map_err(|what| format!("{told}: {what}"))
    }

    /// The operations of the script without a fault, from the opening to its last request.
    fn steps(&self, files: Vec<Bytes>) -> Result<Vec<Step>, String> {
        let mut dice = Dice::new(SEED);
        let world = World::new(files.clone(), Notes::default(), Pace::Random, dice.fork());
        let model = Rc::new(RefCell::new(Model::new(self.subject.size, self.subject.below)));
        let plan = Plan { lives: Vec::new(), all_deaths: false, deaths: 0, ask_qemu: false };
        let trial = Trial { subject: self.subject.clone(), plan, files: None, operations: 0, deaths: 0 };
        let numbers = Rc::new(Cell::new(1));
        let before = self.life(prelude, Vec::new(), None);
        trial.live(&before, &world, &model, &numbers, &mut dice)?;
        let start = world.events() as usize;
        // It is killed when all is done: what comes after that is not tried.
        let life = self.life(script, Vec::new(), Some(1 << 40));
        trial.live(&life, &world, &model, &numbers, &mut dice)?;
        let last = parts(&self.subject.kind, &world.files()[IMAGE]);
        Ok(world.log(|log, operations| self.name_all(log, start, operations, files, &last)))
    }

    fn name_all(
        &self,
        log: &[Event],
        start: usize,
        operations: &[Operation],
        mut files: Vec<Bytes>,
        last: &[(Range<u64>, Part)],
    ) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut counts: BTreeMap<(usize, Class), u64> = BTreeMap::new();
        let mut written: BTreeSet<u64> = BTreeSet::new();
        let mut now = parts(&self.subject.kind, &files[IMAGE]);
        for (time, event) in log.iter().enumerate() {
            match event {
                Event::Begun(number) if time >= start => {
                    let operation = &operations[*number];
                    let class = operation.act.class();
                    let before = counts.entry((operation.file, class)).or_default();
                    let name = name(&self.subject.kind, operation, &now, last, &mut written);
                    steps.push(Step { name, file: operation.file, class, before: *before });
                    *before += 1;
                }
                Event::Done(number) => {
                    let Operation { file, act, span, landed, .. } = &operations[*number];
                    if act.changes() {
                        apply(&mut files[*file], act, *span, landed.as_ref());
                        if *file == IMAGE {
                            now = parts(&self.subject.kind, &files[IMAGE]);
                        }
                    }
                }
                Event::Begun(_)
                | Event::Ended(..)
                | Event::Noted(_)
                | Event::NotNoted
                | Event::RoundBegun
                | Event::RoundEnded
                | Event::Guest => {}
            }
        }
        steps
    }
}

/// What may become of an operation. A storage gives no short read: it is a whole one or fails (`storage::Storage`).
fn faults(class: Class) -> &'static [Fault] {
    match class {
        Class::Read | Class::Discard => &[Fault::Fail(Errno::EIO), Fault::Delay],
        Class::Write => &[
            Fault::Fail(Errno::EIO),
            Fault::Fail(Errno::ENOSPC),
            Fault::Short(Errno::EIO),
            Fault::Short(Errno::ENOSPC),
            Fault::Delay,
        ],
        Class::Zero | Class::Resize | Class::Sync => {
            &[Fault::Fail(Errno::EIO), Fault::Fail(Errno::ENOSPC), Fault::Delay]
        }
        Class::Note => &[Fault::Fail(Errno::ENOSPC)],
    }
}

/// What bytes of an image's file are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Header,
    RefTable,
    RefBlock,
    L1,
    L2,
    Packed,
    Bat,
    Bitmap,
    Footer,
}

/// By what it touches now, and what that is in the end.
fn name(
    kind: &Kind,
    operation: &Operation,
    now: &[(Range<u64>, Part)],
    last: &[(Range<u64>, Part)],
    written: &mut BTreeSet<u64>,
) -> &'static str {
    let span = operation.span;
    let find = |parts: &[(Range<u64>, Part)]| {
        let touched = |(range, _): &&(Range<u64>, Part)| range.start < span.end() && span.at() < range.end;
        parts.iter().find(touched).map(|(_, part)| *part)
    };
    match (operation.file, &operation.act) {
        (IMAGE, Act::Sync) => "flush_to_disk",
        (IMAGE, Act::Resize(_)) => "cluster_alloc",
        (IMAGE, Act::Discard) => "discard",
        // What nothing points to any more becomes a hole; in a VHD it is a new block.
        (IMAGE, Act::Zero) if matches!(kind, Kind::Qcow2 { .. }) => "cluster_free",
        (IMAGE, Act::Zero) => "write_zeroes",
        // As far as it goes, and no more; the table that follows is read by whole blocks.
        (IMAGE, Act::Read) if matches!(kind, Kind::Qcow { .. }) && span.at() == 0 && span.len() < 512 => {
            "header_load"
        }
        (IMAGE, Act::Read) => match find(now) {
            Some(Part::Header) => "header_load",
            Some(Part::RefTable) => "reftable_load",
            Some(Part::RefBlock) => "refblock_load",
            Some(Part::L1) => "l1_load",
            Some(Part::L2) => "l2_load",
            Some(Part::Packed) => "read_compressed",
            Some(Part::Bat) => "bat_load",
            Some(Part::Bitmap) => "bitmap_load",
            Some(Part::Footer) => "footer_load",
            None => "read_aio",
        },
        (IMAGE, Act::Write(bytes)) => {
            let is_first = written.insert(span.at());
            if bytes.starts_with(b"conectix") {
                return "footer_update";
            }
            match (find(now), find(last)) {
                (Some(Part::Header), _) if matches!(kind, Kind::Qcow2 { .. }) => "reftable_switch",
                (Some(Part::Header), _) => "header_update",
                (Some(Part::RefTable), _) => "reftable_update",
                (Some(Part::RefBlock), _) => "refblock_update",
                (Some(Part::L1), _) => "l1_update",
                (Some(Part::L2), _) => "l2_update",
                (Some(Part::Bat), _) => "bat_update",
                (Some(Part::Bitmap), _) => "bitmap_update",
                (Some(Part::Footer), _) => "footer_update",
                (None | Some(Part::Packed), Some(Part::RefTable)) => "reftable_grow",
                (None | Some(Part::Packed), Some(Part::RefBlock)) if is_first => "refblock_alloc",
                (None | Some(Part::Packed), Some(Part::RefBlock)) => "refblock_update",
                (None | Some(Part::Packed), Some(Part::L2)) if is_first => "l2_alloc_write",
                (None | Some(Part::Packed), Some(Part::L2)) => "l2_update",
                (None | Some(Part::Packed), Some(Part::Bitmap)) if is_first => "bitmap_alloc",
                (None | Some(Part::Packed), Some(Part::Bitmap)) => "bitmap_update",
                (
                    None | Some(Part::Packed),
                    None | Some(Part::Header | Part::L1 | Part::Packed | Part::Bat | Part::Footer),
                ) => "write_aio",
            }
        }
        (DATA, Act::Read) => "data_read",
        (DATA, Act::Write(_) | Act::Zero | Act::Discard) => "data_write",
        (DATA, Act::Resize(_)) => "data_alloc",
        (DATA, Act::Sync) => "data_flush",
        (_, Act::Sync) => "backing_flush",
        (_, Act::Read | Act::Write(_) | Act::Zero | Act::Discard | Act::Resize(_)) => "read_backing",
    }
}

/// What a file's bytes are for, as far as its tables say.
fn parts(kind: &Kind, file: &Bytes) -> Vec<(Range<u64>, Part)> {
    match kind {
        Kind::Qcow2 { cluster, extended, .. } => qcow2_parts(file, *cluster, *extended),
        Kind::Qcow { .. } => qcow_parts(file),
        Kind::Vhd { .. } => vhd_parts(file),
        Kind::Raw => Vec::new(),
        #[cfg(test)]
        Kind::Toy(_) => Vec::new(),
    }
}

fn bytes_at<const LEN: usize>(file: &Bytes, at: u64) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    if at.checked_add(LEN as u64).is_some_and(|end| end <= file.size()) {
        file.read(at, &mut bytes);
    }
    bytes
}

fn long(file: &Bytes, at: u64) -> u64 {
    u64::from_be_bytes(bytes_at(file, at))
}

fn short(file: &Bytes, at: u64) -> u64 {
    u64::from(u32::from_be_bytes(bytes_at(file, at)))
}

/// QEMU's docs/interop/qcow2: "Header", "Host cluster management", "Cluster mapping".
fn qcow2_parts(file: &Bytes, cluster: u64, extended: bool) -> Vec<(Range<u64>, Part)> {
    const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
    let (l1_len, l1_at) = (short(file, 36) * 8, long(file, 40));
    let (table_at, table_len) = (long(file, 48), short(file, 56) * cluster);
    let mut parts = vec![
        (0..cluster, Part::Header),
        (table_at..table_at + table_len, Part::RefTable),
        (l1_at..l1_at + l1_len, Part::L1),
    ];
    let words = |at: u64, len: u64, step: usize| (at..at + len).step_by(step).map(|at| long(file, at));
    let blocks = words(table_at, table_len, 8).map(|word| word & !0x1ff).filter(|block| *block != 0);
    parts.extend(blocks.map(|block| (block..block + cluster, Part::RefBlock)));
    for table in words(l1_at, l1_len, 8).map(|word| word & PLACE).filter(|table| *table != 0) {
        parts.push((table..table + cluster, Part::L2));
        let packed = words(table, cluster, if extended { 16 } else { 8 }).filter(|word| word >> 62 & 1 == 1);
        // "Compressed Clusters Descriptor": x = 62 - (cluster_bits - 8).
        let bits = 62 - (cluster.trailing_zeros() - 8);
        parts.extend(packed.map(|word| {
            let at = word & ((1 << bits) - 1);
            (at..at + 1, Part::Packed)
        }));
    }
    parts
}

/// QEMU's block/qcow.c, `QCowHeader`: cluster_bits at 32, l2_bits at 33, l1_table_offset at 40.
fn qcow_parts(file: &Bytes) -> Vec<(Range<u64>, Part)> {
    let [cluster_bits, l2_bits] = bytes_at(file, 32);
    let (size, l1_at) = (long(file, 24), long(file, 40));
    let l2_len = 8u64 << l2_bits;
    let l1_len = size.div_ceil(1 << (cluster_bits + l2_bits)) * 8;
    // It follows the header in the same sector: what holds both is the table's.
    let mut parts = vec![(l1_at..l1_at + l1_len, Part::L1), (0..48, Part::Header)];
    let tables = (l1_at..l1_at + l1_len).step_by(8).map(|at| long(file, at)).filter(|table| *table != 0);
    parts.extend(tables.map(|table| (table..table + l2_len, Part::L2)));
    parts
}

/// Microsoft's Virtual Hard Disk Image Format Specification: "Hard Disk Footer Format", "Dynamic Disk Header Format".
fn vhd_parts(file: &Bytes) -> Vec<(Range<u64>, Part)> {
    let header_at = long(file, 16);
    let (table_at, entries) = (long(file, header_at + 16), short(file, header_at + 28));
    let block = short(file, header_at + 32).max(512);
    let bitmap = (block / 512).div_ceil(8).next_multiple_of(512);
    let last = file.size().saturating_sub(512);
    let mut parts = vec![
        (0..512, Part::Footer),
        (header_at..header_at + 1024, Part::Header),
        (table_at..table_at + entries * 4, Part::Bat),
    ];
    if bytes_at(file, last) == *b"conectix" {
        parts.push((last..last + 512, Part::Footer));
    }
    let places = (0..entries).map(|entry| short(file, table_at + entry * 4) * 512);
    let used = places.filter(|at| *at != u64::from(u32::MAX) * 512);
    parts.extend(used.map(|at| (at..at + bitmap, Part::Bitmap)));
    parts
}

#[cfg(test)]
mod tests {
    use super::super::run::catch_panics;
    use super::*;

    #[test]
    fn each_named_step_may_fail_in_each_way() {
        catch_panics();
        let rows = rows(false, false).unwrap_or_else(|what| panic!("{what}"));
        assert!(rows.iter().map(|row| row.trials).sum::<u64>() > 500, "{rows:?}");
    }
}
