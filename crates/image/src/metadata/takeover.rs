//! Taking over from a process that died: the changes that it has noted, judged by what the file has, and brought back.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use block::Span;
use storage::Storage;

use super::patched::Patched;
use super::{Change, Ledger, Metadata, Stage, round};
use crate::{ImageError, Report};

/// One word that was noted.
struct Word {
    /// What the file may have: its first value or any later one.
    possible: BTreeSet<u64>,
    last: u64,
    stage: Stage,
}

impl Metadata {
    /// Takes over what a process before this one changed, answered for and did not write. Gives how many changes there were.
    ///
    /// The image as it would be with these is looked at by `check` first, as a whole: a program that knows nothing of the
    /// ledger may have used the same space for something else, without a change to any word that the ledger names.
    ///
    /// Where the ledger is not complete, a word of stage 0 may have changed once more since it was noted, and back again. Then
    /// either value may go with what points there: `safe` is given both, that of the file first, and gives what is never too
    /// little.
    ///
    /// # Errors
    /// The ledger or the image cannot be read, or somebody else has changed the image since: then what was answered is not
    /// to be had.
    pub async fn take_over(
        &self,
        check: impl AsyncFn(Rc<dyn Storage>) -> Result<Report, ImageError>,
        safe: impl Fn(u64, u64) -> u64,
    ) -> Result<usize, ImageError> {
        let Some(ledger) = &self.0.ledger else { return Ok(0) };
        let (changes, is_whole) = read(&**ledger)?;
        if changes.is_empty() {
            return Ok(0);
        }
        let mut words = self.words(&changes)?;
        let lost = |what: String| {
            let count = changes.len();
            ImageError::Refused(format!(
                "another program has changed this image since tapdisk died while serving it: {what}. Of {count} changes of its \
                 map that guests were answered for, some are lost"
            ))
        };
        // Each was in the file when it was noted, or in its last block.
        let end = self.0.file.size().next_multiple_of(self.0.block());
        if let Some(at) = words.iter().find(|(at, word)| **at >= end && word.last != 0).map(|(at, _)| *at) {
            return Err(lost(format!("a word at {at} is behind the end of the file, at {end}")));
        }
        let mut held = Vec::new();
        let mut newer = Vec::new();
        for (at, word) in &mut words {
            let span = Span::new(*at, 8).expect("checked when it was read");
            held.push(self.load(span, word.stage).await?);
            let found = self.word(*at).expect("just loaded");
            if word.possible.contains(&found) {
                if !is_whole && word.stage == 0 {
                    word.last = safe(found, word.last);
                }
                continue;
            }
            if is_whole {
                return Err(lost(format!("the word at {at} is {found:#x}, which tapdisk has not written")));
            }
            newer.push(*at);
        }
        // What a round has written that could not be noted is newer than what could.
        newer.iter().for_each(|at| drop(words.remove(at)));
        if !is_whole {
            tracing::warn!(
                noted = changes.len(),
                newer = newer.len(),
                "the process before this one could not note all changes of the image's map, and died while it wrote them: what \
                 guests were answered for is there, of the rest any part may be"
            );
        }
        Box::pin(self.look_at(&words, check, lost)).await?;
        for (at, word) in &words {
            self.0.blocks.borrow_mut().set(*at, word.last);
        }
        self.0.notes.set(changes.len());
        round::soon(&self.0);
        Ok(changes.len())
    }

    fn words(&self, changes: &[Change]) -> Result<BTreeMap<u64, Word>, ImageError> {
        let mut words: BTreeMap<u64, Word> = BTreeMap::new();
        for Change { at, old, new, stage } in changes.iter().copied() {
            let end = at.checked_add(8).filter(|_| at % 8 == 0 && stage < self.0.settings.stages);
            if end.is_none_or(|end| end > i64::MAX as u64) {
                return Err(ImageError::Refused(format!(
                    "the record of what a process before this one left unwritten makes no sense: a word at {at}, stage {stage}"
                )));
            }
            let word =
                words.entry(at).or_insert_with(|| Word { possible: BTreeSet::new(), last: new, stage });
            word.possible.extend([old, new]);
            word.last = new;
        }
        Ok(words)
    }

    /// Whether the image makes sense with these words in it, or no less than without them.
    async fn look_at(
        &self,
        words: &BTreeMap<u64, Word>,
        check: impl AsyncFn(Rc<dyn Storage>) -> Result<Report, ImageError>,
        lost: impl FnOnce(String) -> ImageError,
    ) -> Result<(), ImageError> {
        let check = async |words: BTreeMap<u64, u64>| {
            let file = Rc::new(Patched::new(self.0.file.clone(), words, self.0.block()));
            let report = check(file.clone()).await;
            // A check goes on where reading fails, but then it says nothing of that.
            match file.failed() {
                Some(error) => Err(error.during("look whether another program has changed the image")),
                None => Ok(report),
            }
        };
        let with = check(words.iter().map(|(at, word)| (*at, word.last)).collect()).await?;
        let what = match &with {
            Ok(report) if report.is_safe() => return Ok(()),
            Ok(report) => report.notes.first().cloned().unwrap_or_default(),
            Err(error) => error.to_string(),
        };
        // It may have been so before tapdisk came.
        match (with, check(BTreeMap::new()).await?) {
            (Ok(with), Ok(without)) if with.corruptions <= without.corruptions => return Ok(()),
            (Err(_), Err(_)) => return Ok(()),
            (Ok(_) | Err(_), Ok(_)) | (Ok(_), Err(_)) => {}
        }
        Err(lost(format!("with what tapdisk has noted it would make no sense any more ({what})")))
    }
}

fn read(ledger: &dyn Ledger) -> Result<(Vec<Change>, bool), ImageError> {
    let read = ledger.changes().and_then(|changes| Ok((changes, ledger.is_whole()?)));
    read.map_err(|error| {
        ImageError::Refused(format!("what a process before this one left unwritten cannot be read: {error}"))
    })
}
