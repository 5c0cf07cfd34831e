//! Where it is kept, outside of the process, what a successor must know.

use std::path::PathBuf;

use anyhow::Context;
use storage::file::Records;

/// The records of failed syncs: in the directory that was asked for, else where this user's running programs keep such
/// things. Without any, which is said, the disk is served all the same.
pub(crate) fn records(asked: Option<&PathBuf>) -> anyhow::Result<Option<Records>> {
    if let Some(directory) = asked {
        let records =
            Records::open(directory).with_context(|| format!("cannot use {}", directory.display()))?;
        return Ok(Some(records));
    }
    let runtime = if rustix::process::geteuid().is_root() {
        Some(PathBuf::from("/run"))
    } else {
        std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|directory| directory.is_absolute())
    };
    let why = match runtime.map(|directory| directory.join("tapdisk")) {
        None => "XDG_RUNTIME_DIR is not set".into(),
        Some(directory) => match Records::open(&directory) {
            Ok(records) => return Ok(Some(records)),
            Err(error) => format!("{} cannot be used: {error}", directory.display()),
        },
    };
    tracing::warn!(
        why,
        "a failed sync cannot be recorded for the next process; --state-dir says where it can"
    );
    Ok(None)
}
