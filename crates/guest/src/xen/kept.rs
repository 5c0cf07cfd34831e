//! Pages that a front end grants again and again, which stay mapped: persistent grants.
//!
//! Both sides have said that they keep to it: a number of a grant then always stands for the same page, granted for
//! reading and writing, until the front end is disconnected. How many pages a front end uses in this way is its own
//! choice, how many stay mapped is ours: those that were not used for the longest time are unmapped.

use std::collections::HashMap;
use std::rc::Rc;

use ::xen::Domain;
use ::xen::grants::{Access, GrantRef, Grants, Mapping, Piece};
use block::Errno;

/// Pages of one ring that stay mapped, as many as Linux's back end keeps (`max_persistent_grants`).
pub(crate) const PAGES_MAX: usize = 1056;

#[derive(Default)]
pub(crate) struct Kept {
    pages: HashMap<GrantRef, Page>,
    /// Counts uses.
    clock: u64,
}

struct Page {
    mapping: Rc<Mapping>,
    used: u64,
}

impl Kept {
    /// The pages of these pieces, mapped now or before; nothing where there is no room for them beside those in use.
    ///
    /// # Errors
    /// If one of them cannot be mapped. The others stay.
    pub(crate) fn map(
        &mut self,
        grants: &dyn Grants,
        domain: Domain,
        pieces: &[Piece],
    ) -> Result<Option<Vec<Rc<Mapping>>>, Errno> {
        let mut mappings = Vec::with_capacity(pieces.len());
        for piece in pieces {
            self.clock += 1;
            let used = self.clock;
            if let Some(page) = self.pages.get_mut(&piece.gref) {
                page.used = used;
                mappings.push(page.mapping.clone());
                continue;
            }
            if self.pages.len() >= PAGES_MAX && !self.make_room() {
                return Ok(None);
            }
            let mapping = Rc::new(grants.map(domain, &[piece.gref], Access::Write)?);
            self.pages.insert(piece.gref, Page { mapping: mapping.clone(), used });
            mappings.push(mapping);
        }
        Ok(Some(mappings))
    }

    /// Unmaps some of those that nobody uses, the least lately used ones; false if all are in use.
    fn make_room(&mut self) -> bool {
        let is_idle = |page: &Page| Rc::strong_count(&page.mapping) == 1;
        let mut idle: Vec<u64> =
            self.pages.values().filter(|page| is_idle(page)).map(|page| page.used).collect();
        if idle.is_empty() {
            return false;
        }
        // Some at a time, so that this is not done for each page.
        let last = (idle.len() - 1).min(PAGES_MAX / 16);
        let (_, newest, _) = idle.select_nth_unstable(last);
        let newest = *newest;
        self.pages.retain(|_, page| !is_idle(page) || page.used > newest);
        true
    }

    /// How many pages stay mapped.
    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        self.pages.len()
    }
}
