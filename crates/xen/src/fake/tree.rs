//! The nodes of a fake xenstore: values, who may use them, and when each was last changed.

use std::collections::{BTreeMap, BTreeSet};

use block::Errno;

use crate::Domain;
use crate::store::{Access, Permission};

#[derive(Clone, Debug)]
struct Node {
    value: Vec<u8>,
    /// The owner first.
    permissions: Vec<Permission>,
}

/// Nodes by their absolute paths. A copy of it is what a transaction works on.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    nodes: BTreeMap<String, Node>,
}

/// A change of a tree, to be done once more where a transaction ends.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Write(String, Vec<u8>),
    Make(String),
    Remove(String),
    SetPermissions(String, Vec<Permission>),
}

impl Change {
    pub(super) fn path(&self) -> &str {
        match self {
            Change::Write(path, _)
            | Change::Make(path)
            | Change::Remove(path)
            | Change::SetPermissions(path, _) => path,
        }
    }
}

/// The domain that may do everything.
const PRIVILEGED: Domain = Domain(0);

impl Tree {
    pub(super) fn new() -> Tree {
        let root = Node {
            value: Vec::new(),
            permissions: vec![Permission { domain: PRIVILEGED, access: Access::None }],
        };
        Tree { nodes: BTreeMap::from([("/".to_owned(), root)]) }
    }

    pub(super) fn read(&self, who: Domain, path: &str) -> Result<Vec<u8>, Errno> {
        self.check(who, path, Access::Read)?;
        Ok(self.node(path)?.value.clone())
    }

    pub(super) fn list(&self, who: Domain, path: &str) -> Result<Vec<String>, Errno> {
        self.check(who, path, Access::Read)?;
        self.node(path)?;
        let prefix = if path == "/" { "/".to_owned() } else { format!("{path}/") };
        let names: BTreeSet<String> = self
            .nodes
            .keys()
            .filter_map(|known| known.strip_prefix(&prefix))
            .filter(|name| !name.is_empty())
            .map(|name| name.split('/').next().unwrap_or_default().to_owned())
            .collect();
        Ok(names.into_iter().collect())
    }

    pub(super) fn permissions(&self, who: Domain, path: &str) -> Result<Vec<Permission>, Errno> {
        self.check(who, path, Access::Read)?;
        Ok(self.node(path)?.permissions.clone())
    }

    /// Whether a domain may read a node, or could if it were there.
    pub(super) fn is_readable(&self, who: Domain, path: &str) -> bool {
        self.check(who, path, Access::Read).is_ok()
    }

    /// Makes a change. The paths that have changed by it; a removal changes all that was below, too.
    pub(super) fn change(&mut self, who: Domain, change: &Change) -> Result<Vec<String>, Errno> {
        let path = change.path();
        match change {
            Change::Write(_, value) => {
                self.check(who, path, Access::Write)?;
                self.grow(who, path);
                self.node_mut(path)?.value.clone_from(value);
            }
            Change::Make(_) if self.nodes.contains_key(path) => return Ok(Vec::new()),
            Change::Make(_) => {
                self.check(who, path, Access::Write)?;
                self.grow(who, path);
            }
            Change::Remove(_) => {
                if path == "/" {
                    return Err(Errno::EINVAL);
                }
                self.check(who, path, Access::Write)?;
                self.node(path)?;
                let gone: Vec<String> =
                    self.nodes.keys().filter(|known| is_within(known, path)).cloned().collect();
                for path in &gone {
                    self.nodes.remove(path);
                }
                return Ok(gone);
            }
            Change::SetPermissions(_, permissions) => {
                let owner = self.node(path)?.permissions.first().map(|first| first.domain);
                if who != PRIVILEGED && owner != Some(who) {
                    return Err(Errno::EACCES);
                }
                self.node_mut(path)?.permissions.clone_from(permissions);
            }
        }
        Ok(vec![path.to_owned()])
    }

    fn node(&self, path: &str) -> Result<&Node, Errno> {
        self.nodes.get(path).ok_or(Errno::ENOENT)
    }

    fn node_mut(&mut self, path: &str) -> Result<&mut Node, Errno> {
        self.nodes.get_mut(path).ok_or(Errno::ENOENT)
    }

    /// Makes a node and those above it where there are none. Each is as the one above it, and belongs to who makes it.
    fn grow(&mut self, who: Domain, path: &str) {
        if self.nodes.contains_key(path) {
            return;
        }
        let above = parent(path);
        self.grow(who, above);
        let mut permissions = self.nodes.get(above).map_or_else(Vec::new, |node| node.permissions.clone());
        if who != PRIVILEGED
            && let Some(owner) = permissions.first_mut()
        {
            owner.domain = who;
        }
        self.nodes.insert(path.to_owned(), Node { value: Vec::new(), permissions });
    }

    /// For a node that is not there the nearest one above it says who may use it.
    fn check(&self, who: Domain, path: &str, wanted: Access) -> Result<(), Errno> {
        if who == PRIVILEGED {
            return Ok(());
        }
        let mut path = path;
        let node = loop {
            match self.nodes.get(path) {
                Some(node) => break node,
                None => path = parent(path),
            }
        };
        let (Some(owner), others) = (node.permissions.first(), node.permissions.iter().skip(1)) else {
            return Err(Errno::EACCES);
        };
        let named = others.into_iter().find(|permission| permission.domain == who);
        let has = named.unwrap_or(owner).access;
        let is_allowed = owner.domain == who || has == Access::Both || has == wanted;
        if is_allowed { Ok(()) } else { Err(Errno::EACCES) }
    }
}

pub(super) fn parent(path: &str) -> &str {
    match path.rfind('/') {
        Some(0) | None => "/",
        Some(at) => &path[..at],
    }
}

/// Whether a path is this one, or below it.
pub(super) fn is_within(path: &str, above: &str) -> bool {
    above == "/" || path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}
