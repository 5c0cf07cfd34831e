//! The guard: a small process that unmounts when this one dies without having done so.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Its standard input is a pipe of which we hold the other end, so that it reads the end of it when we die, however
/// that happens. A thread of ours that waits for our own mount cannot die though, and keeps the pipe open and the
/// request unanswered; hence the second watch, for a process that is gone, a zombie, or has SIGKILL (bit 8) pending.
const SCRIPT: &str = r#"
    unmount() { umount -c -f -l "$2"; }
    dying() {
        while read -r key value rest; do
            case $key$value in
                State:[ZX] | SigPnd:*[13579bdf]??) return 0 ;;
                SigBlk:*) return 1 ;;
            esac
        done < "/proc/$1/status"
    }
    ( until dying "$@"; do sleep 2; done; unmount "$@" ) & watch=$!
    read -r word
    kill "$watch"
    [ "$word" = done ] || unmount "$@"
"#;

#[derive(Debug)]
pub(crate) struct Guard(Child);

impl Guard {
    pub(crate) fn over(mountpoint: &Path) -> io::Result<Guard> {
        let child = Command::new("sh")
            .args(["-c", SCRIPT, "faultfs-guard", &std::process::id().to_string()])
            .arg(mountpoint)
            .current_dir("/")
            .process_group(0) // A Ctrl-C meant for us is not meant for it.
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Guard(child))
    }

    /// Sends the guard home, its work being done.
    pub(crate) fn dismiss(mut self) -> io::Result<()> {
        use std::io::Write;
        if let Some(mut pipe) = self.0.stdin.take() {
            pipe.write_all(b"done\n")?;
        }
        self.0.wait().map(|_| ())
    }
}
