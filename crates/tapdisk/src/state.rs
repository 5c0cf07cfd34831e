//! Where it is kept, outside of the process, what a successor must know.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Once;

use anyhow::Context;
use storage::file::Records;

/// A command asks for records more than once.
static SAID: Once = Once::new();

/// What records are wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum For {
    /// Serving a disk that is written: without them it is served all the same, and that is said.
    Serving,
    /// Serving a disk that is only read.
    ServingReadOnly,
    /// Changing an image: never without a look at what its last server may have left there.
    Changing,
    /// Reading one, or making a new one.
    Reading,
}

/// The records of failed syncs and of what images lack, in the directory of this process's state.
///
/// # Errors
/// The directory cannot be used, and it was asked for or there is no going without.
pub(crate) fn records(asked: Option<&PathBuf>, what_for: For) -> anyhow::Result<Option<Records>> {
    let why = match directory(asked) {
        Err(why) => why,
        Ok(directory) => match Records::open(&directory) {
            Ok(records) => return Ok(Some(records)),
            Err(error) if asked.is_some() => {
                return Err(error).with_context(|| format!("cannot use {}", directory.display()));
            }
            Err(error) if what_for == For::Changing => {
                let what = format!(
                    "cannot see in {} whether a server of this image has died and left something there; --state-dir says \
                     where that server kept its state",
                    directory.display()
                );
                return Err(error).context(what);
            }
            Err(error) => format!("{} cannot be used: {error}", directory.display()),
        },
    };
    match what_for {
        For::Serving => tracing::warn!(
            why,
            "a failed sync cannot be recorded for the next process, nor what an image's map lacks; --state-dir says where \
             they can"
        ),
        For::Changing | For::Reading => SAID.call_once(|| {
            eprintln!(
                "tapdisk: {why}: what a server that died may have left for its successor is not looked for; --state-dir says \
                 where"
            );
        }),
        For::ServingReadOnly => {}
    }
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
