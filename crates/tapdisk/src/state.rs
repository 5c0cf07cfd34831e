//! Where it is kept, outside of the process, what a successor must know.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use anyhow::Context;
use storage::file::Records;

/// The records of failed syncs, in the directory of this process's state. Without one, which is said, the disk is served
/// all the same.
pub(crate) fn records(asked: Option<&PathBuf>) -> anyhow::Result<Option<Records>> {
    let why = match directory(asked) {
        Err(why) => why,
        Ok(directory) => match Records::open(&directory) {
            Ok(records) => return Ok(Some(records)),
            Err(error) if asked.is_some() => {
                return Err(error).with_context(|| format!("cannot use {}", directory.display()));
            }
            Err(error) => format!("{} cannot be used: {error}", directory.display()),
        },
    };
    tracing::warn!(
        why,
        "a failed sync cannot be recorded for the next process; --state-dir says where it can"
    );
    Ok(None)
}

/// The directory for what guests have under way. Without one nobody could take over, so there has to be one.
pub(crate) fn journals(asked: Option<&PathBuf>) -> anyhow::Result<PathBuf> {
    let directory = directory(asked).map_err(|why| {
        anyhow::anyhow!("{why}: --state-dir must say where to keep what guests have under way")
    })?;
    let made = std::path::absolute(&directory).and_then(|directory| {
        DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        Ok(directory)
    });
    made.with_context(|| format!("cannot use {}", directory.display()))
}

/// The directory that was asked for, else where this user's running programs keep such things; why there is none.
fn directory(asked: Option<&PathBuf>) -> Result<PathBuf, String> {
    if let Some(directory) = asked {
        return Ok(directory.clone());
    }
    let runtime = if rustix::process::geteuid().is_root() {
        Some(PathBuf::from("/run"))
    } else {
        std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|directory| directory.is_absolute())
    };
    runtime.map(|directory| directory.join("tapdisk")).ok_or_else(|| "XDG_RUNTIME_DIR is not set".into())
}
