//! What clients can ask for by name: a disk, and how it is presented.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::Disk;
use crate::nbd::wire::{self, Style, export};

/// A disk under a name.
pub struct Export {
    name: String,
    description: String,
    disk: Rc<dyn Disk>,
}

/// Why a name cannot name an export: a string of NBD has at most 4096 bytes and no NUL ("Conventions").
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("an export's name has at most 4096 bytes, no NUL and is not given twice, found {0:?}")]
pub struct BadName(String);

impl Export {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// For human beings; may be empty.
    pub(crate) fn description(&self) -> &str {
        &self.description
    }

    pub(crate) fn disk(&self) -> &Rc<dyn Disk> {
        &self.disk
    }

    /// "Transmission flags": what a client may do with it, where messages look like this. Each is set because it
    /// is true:
    /// - a flush or an FUA write on one connection covers what was answered on all (CAN_MULTI_CONN), since all
    ///   connections submit to one disk and nothing is cached between;
    /// - every command that is advertised is passed to the disk, and one that the disk cannot do fails;
    /// - reads are always answered in one piece (SEND_DF), which only chunks can say.
    pub(crate) fn flags(&self, style: Style) -> u16 {
        let mut flags = export::HAS_FLAGS
            | export::SEND_FLUSH
            | export::SEND_FUA
            | export::CAN_MULTI_CONN
            | export::SEND_CACHE;
        flags |= match self.disk.limits().read_only {
            true => export::READ_ONLY,
            false => export::SEND_TRIM | export::SEND_WRITE_ZEROES | export::SEND_FAST_ZERO,
        };
        match style {
            Style::Simple => flags,
            Style::Structured | Style::Extended => flags | export::SEND_DF,
        }
    }
}

/// Everything that a server exports.
#[derive(Default)]
pub struct Exports {
    by_name: BTreeMap<String, Rc<Export>>,
    default: Option<Rc<Export>>,
}

impl Exports {
    /// No export yet.
    pub fn new() -> Exports {
        Exports::default()
    }

    /// One disk, under this name and as the default export.
    pub fn one(name: &str, description: &str, disk: Rc<dyn Disk>) -> Result<Exports, BadName> {
        let mut exports = Exports::new();
        exports.add(name, description, disk)?;
        Ok(exports)
    }

    /// Adds a disk under this name. The first one is also the default export, which the empty name names.
    pub fn add(&mut self, name: &str, description: &str, disk: Rc<dyn Disk>) -> Result<(), BadName> {
        let is_string = |text: &str| text.len() <= wire::STRING_LEN_MAX && !text.contains('\0');
        if !is_string(name) || self.by_name.contains_key(name) {
            return Err(BadName(name.into()));
        }
        let description = if is_string(description) { description.into() } else { String::new() };
        let export = Rc::new(Export { name: name.into(), description, disk });
        self.default.get_or_insert_with(|| export.clone());
        self.by_name.insert(name.into(), export);
        Ok(())
    }

    /// The export of this name; `None` where there is none.
    pub(crate) fn get(&self, name: &[u8]) -> Option<&Rc<Export>> {
        if name.is_empty() {
            return self.default.as_ref();
        }
        self.by_name.get(std::str::from_utf8(name).ok()?)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Rc<Export>> {
        self.by_name.values()
    }
}
