//! What the bytes of a disk may be: after each write, zero and discard, for reads and after deaths.

use std::ops::Range;

/// What the model tells apart: the grain of all writes.
pub(crate) const GRAIN: u64 = 64;
/// Bytes of a word: each says which write it is of, and where it belongs.
const WORD: usize = 8;
/// The write that is in the image below from the start.
pub(crate) const BELOW: u32 = u32::MAX;

/// A disk.
pub(crate) struct Model {
    grains: Vec<Vec<Entry>>,
    /// Byte after the last one of the image below.
    below: u64,
    actions: Vec<Action>,
    flushes: Vec<(u64, u64)>,
}

/// What some action has made, or may have made, of a grain.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// 0 for zeroes.
    value: u32,
    action: usize,
    /// It may have been without effect, and may lose its effect.
    is_weak: bool,
}

#[derive(Clone, Copy, Debug)]
struct Action {
    begun: u64,
    /// When its end was told.
    ended: u64,
    is_ok: bool,
}

/// Changes of some bytes that are under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ActionId(usize);

/// Who looks: what ended before `from` is past, what began after `until` has not been.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    pub(crate) from: u64,
    pub(crate) until: u64,
}

/// What a change does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A write with this number.
    Write(u32),
    Zero,
    Discard,
}

impl Model {
    /// A disk of so many bytes over an image with so many.
    pub(crate) fn new(size: u64, below: u64) -> Model {
        let value = |grain: u64| if (grain + 1) * GRAIN <= below { BELOW } else { 0 };
        let first = |grain| vec![Entry { value: value(grain), action: 0, is_weak: false }];
        Model {
            grains: (0..size / GRAIN).map(first).collect(),
            below,
            actions: vec![Action { begun: 0, ended: 0, is_ok: true }],
            flushes: Vec::new(),
        }
    }

    /// A disk that shows these bytes.
    pub(crate) fn seen(bytes: &[u8], below: u64) -> Model {
        let mut model = Model::new(bytes.len() as u64, below);
        for (number, found) in bytes.chunks_exact(GRAIN as usize).enumerate() {
            if let Some(value) = read(found, number as u64) {
                model.grains[number][0].value = value;
            }
        }
        model
    }

    pub(crate) fn size(&self) -> u64 {
        self.grains.len() as u64 * GRAIN
    }

    pub(crate) fn begin(&mut self, time: u64, bytes: Range<u64>, change: Change) -> ActionId {
        let action = self.actions.len();
        self.actions.push(Action { begun: time, ended: u64::MAX, is_ok: false });
        for grain in bytes.start / GRAIN..bytes.end / GRAIN {
            let value = if (grain + 1) * GRAIN <= self.below { BELOW } else { 0 };
            let entries = &mut self.grains[grain as usize];
            match change {
                Change::Write(value) => entries.push(Entry { value, action, is_weak: false }),
                Change::Zero => entries.push(Entry { value: 0, action, is_weak: false }),
                Change::Discard => {
                    entries.push(Entry { value: 0, action, is_weak: true });
                    entries.push(Entry { value, action, is_weak: true });
                }
            }
        }
        ActionId(action)
    }

    pub(crate) fn end(&mut self, time: u64, action: ActionId, is_ok: bool) {
        let action = &mut self.actions[action.0];
        (action.ended, action.is_ok) = (time, is_ok);
    }

    /// Nothing that is under way will ever be told of any more.
    pub(crate) fn end_all(&mut self, time: u64) {
        for action in self.actions.iter_mut().filter(|action| action.ended == u64::MAX) {
            action.ended = time;
        }
    }

    /// A death has perhaps taken what no flush covers.
    pub(crate) fn lose(&mut self, time: u64) {
        let from = self.after_power_cut(time).from;
        for action in self.actions.iter_mut().skip(1).filter(|action| action.ended >= from) {
            action.is_ok = false;
        }
    }

    /// A flush has succeeded.
    pub(crate) fn flushed(&mut self, begun: u64, ended: u64) {
        self.flushes.push((begun, ended));
    }

    /// Who comes after the power was cut at this time.
    pub(crate) fn after_power_cut(&self, time: u64) -> View {
        let flushes = self.flushes.iter().filter(|(_, ended)| *ended < time);
        View { from: flushes.map(|(begun, _)| *begun).max().unwrap_or(1), until: time }
    }

    /// Who comes after the process was killed at this time.
    pub(crate) fn after_kill(&self, time: u64) -> View {
        View { from: time, until: time }
    }

    /// What a grain may hold.
    fn allowed(&self, grain: usize, view: View) -> impl Iterator<Item = u32> {
        let entries = &self.grains[grain];
        let action = |entry: &Entry| self.actions[entry.action];
        let settled = move |entry: &&Entry| {
            let action = action(entry);
            action.is_ok && !entry.is_weak && action.ended < view.from
        };
        entries
            .iter()
            .filter(move |entry| {
                let ended = action(entry).ended;
                let is_past = || {
                    let mut later = entries.iter().filter(settled);
                    later.any(|later| ended < action(later).begun)
                };
                (entry.action == 0 || action(entry).begun < view.until) && !is_past()
            })
            .map(|entry| entry.value)
    }

    /// Judges bytes that were read from `at` on: what they are, where they are not allowed.
    pub(crate) fn judge(&self, at: u64, bytes: &[u8], view: View) -> Result<(), String> {
        for (number, found) in bytes.chunks_exact(GRAIN as usize).enumerate() {
            let grain = at / GRAIN + number as u64;
            let value = read(found, grain);
            let is_allowed = |value| self.allowed(grain as usize, view).any(|allowed| allowed == value);
            if !value.is_some_and(is_allowed) {
                let mut allowed: Vec<String> = self.allowed(grain as usize, view).map(name).collect();
                allowed.dedup();
                return Err(format!(
                    "byte {}: {}, but there should be {}; its past: {}",
                    grain * GRAIN,
                    tell(found),
                    allowed.join(" or "),
                    self.past(grain as usize)
                ));
            }
        }
        Ok(())
    }

    fn past(&self, grain: usize) -> String {
        let tell = |entry: &Entry| {
            let Action { begun, ended, is_ok } = self.actions[entry.action];
            let weak = if entry.is_weak { "discarded to " } else { "" };
            let ended = if ended == u64::MAX { "?".to_owned() } else { ended.to_string() };
            let end = if is_ok { "ok" } else { "failed" };
            format!("{weak}{} {begun}..{ended} {end}", name(entry.value))
        };
        let entries: Vec<String> = self.grains[grain].iter().map(tell).collect();
        entries.join(", ")
    }
}

fn name(value: u32) -> String {
    match value {
        0 => "zeroes".into(),
        BELOW => "the image below".into(),
        value => format!("write {value}"),
    }
}

/// The bytes of a write with this number, from byte `at` of the disk on.
pub(crate) fn pattern(at: u64, len: u64, value: u32) -> Vec<u8> {
    let word = |word: u64| {
        let grain = (at + word * WORD as u64) / GRAIN;
        u64::from(value) << 32 | (grain & 0xffff_ffff)
    };
    (0..len / WORD as u64).flat_map(|number| word(number).to_le_bytes()).collect()
}

/// Which write a grain is of, if all of it is and it belongs there.
fn read(found: &[u8], grain: u64) -> Option<u32> {
    let mut words = found.chunks_exact(WORD).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
    let first = words.next()?;
    if words.any(|word| word != first) {
        return None;
    }
    match (first >> 32) as u32 {
        0 if first == 0 => Some(0),
        0 => None,
        value => (first & 0xffff_ffff == grain & 0xffff_ffff).then_some(value),
    }
}

/// What bytes are, in words.
fn tell(found: &[u8]) -> String {
    let words: Vec<u64> =
        found.chunks_exact(WORD).map(|word| word.try_into().map_or(0, u64::from_le_bytes)).collect();
    match words.first() {
        Some(0) if words.iter().all(|word| *word == 0) => "zeroes".into(),
        Some(first) if words.iter().all(|word| word == first) => {
            let at = (first & 0xffff_ffff) * GRAIN;
            format!("{} for byte {at} ({first:#x})", name((first >> 32) as u32))
        }
        Some(_) | None => format!("mixed {words:x?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(model: &Model, view: View) -> Vec<u32> {
        model.allowed(0, view).collect()
    }

    #[test]
    fn a_read_finds_the_last_write_or_one_beside_it() {
        let mut model = Model::new(GRAIN, 0);
        let one = model.begin(1, 0..GRAIN, Change::Write(1));
        assert_eq!(all(&model, View { from: 2, until: 3 }), [0, 1]);
        model.end(4, one, true);
        assert_eq!(
            all(&model, View { from: 2, until: 5 }),
            [0, 1],
            "the read began before the write had ended"
        );
        assert_eq!(all(&model, View { from: 5, until: 6 }), [1]);
        let failed = model.begin(7, 0..GRAIN, Change::Write(2));
        model.end(8, failed, false);
        assert_eq!(all(&model, View { from: 9, until: 10 }), [1, 2], "a failed write may have come to pass");
        let last = model.begin(11, 0..GRAIN, Change::Zero);
        model.end(12, last, true);
        assert_eq!(all(&model, View { from: 13, until: 14 }), [0], "and never comes again");
    }

    #[test]
    fn a_power_cut_takes_what_was_not_flushed() {
        let mut model = Model::new(GRAIN, GRAIN);
        let one = model.begin(1, 0..GRAIN, Change::Write(1));
        model.end(2, one, true);
        assert_eq!(all(&model, model.after_power_cut(3)), [BELOW, 1]);
        assert_eq!(all(&model, model.after_kill(3)), [1]);
        model.flushed(4, 6);
        assert_eq!(all(&model, model.after_power_cut(5)), [BELOW, 1], "the flush had not been answered");
        assert_eq!(all(&model, model.after_power_cut(7)), [1]);
        let two = model.begin(8, 0..GRAIN, Change::Discard);
        model.end(9, two, true);
        assert_eq!(all(&model, model.after_kill(10)), [1, 0, BELOW]);
    }

    #[test]
    fn bytes_say_whose_they_are() {
        let model = {
            let mut model = Model::new(4 * GRAIN, 0);
            let one = model.begin(1, 0..2 * GRAIN, Change::Write(7));
            model.end(2, one, true);
            model
        };
        let view = model.after_kill(3);
        let mut bytes = pattern(0, 2 * GRAIN, 7);
        bytes.resize(4 * GRAIN as usize, 0);
        assert_eq!(model.judge(0, &bytes, view), Ok(()));
        let moved = model.judge(GRAIN, &pattern(0, GRAIN, 7), view).unwrap_err();
        assert!(moved.contains("write 7 for byte 0"), "{moved}");
        bytes[5] ^= 1;
        assert!(model.judge(0, &bytes, view).unwrap_err().contains("mixed"));
    }
}
