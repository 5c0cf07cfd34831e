//! Where this machine's own apt gets Debian from: its sources name a mirror, and we use the same.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;

/// The address of a Debian mirror, as in this machine's sources.
pub(crate) fn of_this_machine() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let field = |name: &str| {
        let value = release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value.map(|value| value.trim_matches('"').to_owned())
    };
    if field("ID").as_deref() != Some("debian") {
        bail!("this is no Debian, whose mirror the lab needs for its kernels and QEMU");
    }
    let suite = field("VERSION_CODENAME").context("/etc/os-release names no VERSION_CODENAME")?;
    for file in files()? {
        let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        let found =
            if file.ends_with(".sources") { in_stanzas(&text, &suite) } else { in_lines(&text, &suite) };
        if let Some(mirror) = found {
            return Ok(mirror);
        }
    }
    bail!("no mirror for {suite} in /etc/apt/sources.list or /etc/apt/sources.list.d")
}

/// The files that apt itself reads, in its order.
fn files() -> Result<Vec<String>> {
    let mut files: Vec<String> = ["/etc/apt/sources.list"].map(String::from).into();
    files.retain(|file| Path::new(file).exists());
    let folder = Path::new("/etc/apt/sources.list.d");
    if folder.is_dir() {
        let mut more = Vec::new();
        for entry in fs::read_dir(folder)? {
            more.push(entry?.path().display().to_string());
        }
        more.retain(|name| name.ends_with(".list") || name.ends_with(".sources"));
        more.sort();
        files.extend(more);
    }
    Ok(files)
}

/// `deb [options] ADDRESS SUITE COMPONENT…`, one a line (sources.list(5)).
fn in_lines(text: &str, suite: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let rest = if rest.starts_with('[') { rest.split_once(']')?.1 } else { rest };
        match rest.split_whitespace().collect::<Vec<_>>()[..] {
            [address, found, ..] if found == suite => Some(address.to_owned()),
            _ => None,
        }
    })
}

/// Fields in stanzas, divided by empty lines (deb822).
fn in_stanzas(text: &str, suite: &str) -> Option<String> {
    text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| {
            let lines = stanza.lines().filter(|line| !line.starts_with('#'));
            lines
                .filter_map(|line| line.split_once(':'))
                .find(|(found, _)| *found == name)
                .map(|(_, value)| value)
        };
        let has = |name: &str, word: &str| {
            field(name).is_some_and(|value| value.split_whitespace().any(|w| w == word))
        };
        let is_wanted = has("Types", "deb") && has("Suites", suite) && !has("Enabled", "no");
        let address = field("URIs")?.split_whitespace().next()?;
        is_wanted.then(|| address.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_stands_in_the_lines_of_the_suite() {
        let text = "# deb http://old.example/debian bookworm main\n\
                    deb-src http://source.example/debian bookworm main\n\
                    deb http://security.example/debian-security bookworm-security main\n\
                    deb [arch=amd64 signed-by=/a key] http://mirror.example/debian bookworm main contrib\n";
        assert_eq!(in_lines(text, "bookworm").as_deref(), Some("http://mirror.example/debian"));
        assert_eq!(in_lines(text, "trixie"), None);
    }

    #[test]
    fn the_mirror_stands_in_the_stanza_of_the_suite() {
        let text = "Types: deb\nURIs: http://security.example/debian\nSuites: bookworm-security\nComponents: main\n\n\
                    Types: deb\n# a remark: URIs\nURIs: http://mirror.example/debian\n\
                    Suites: bookworm bookworm-updates\nComponents: main\n";
        assert_eq!(in_stanzas(text, "bookworm").as_deref(), Some("http://mirror.example/debian"));
        assert_eq!(in_stanzas(&text.replace("deb\n#", "deb\nEnabled: no\n#"), "bookworm"), None);
    }
}
