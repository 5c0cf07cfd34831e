//! The commands of the control socket: one line each, answered by one line that begins with `ok` or `error`.
//!
//! ```text
//! rule RULE                   ok ID
//! rules                       ok ID STRUCK RULE; ID STRUCK RULE; …
//! clear [ID]                  ok
//! release                     ok COUNT              lets what hangs go on
//! hanging                     ok COUNT
//! wait-hanging COUNT MS       ok, or error after MS milliseconds
//! power-cut [--seed N]        ok
//! counters                    ok reads=N read_bytes=N …
//! capacity BYTES | none       ok
//! used                        ok BYTES
//! snapshot NAME PATH          ok SIZE               copies the live file to PATH, sparsely
//! durable NAME PATH           ok SIZE               the same with what a power cut would leave
//! quit                        ok                    unmounts
//! ```

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;

use crate::content::Snapshot;
use crate::rule::bytes;
use crate::{FaultFs, RuleId};

/// Serves every connection to the socket in a thread of its own; sends on `quit` when one asks for the end.
pub fn serve(fs: &Arc<FaultFs>, listener: UnixListener, quit: Sender<()>) {
    let fs = Arc::downgrade(fs);
    thread::spawn(move || {
        for connection in listener.incoming() {
            let (fs, quit) = (fs.clone(), quit.clone());
            thread::spawn(move || {
                let talk = connection.and_then(|connection| {
                    for line in BufReader::new(connection.try_clone()?).lines() {
                        let line = line?;
                        let Some(fs) = fs.upgrade() else { break };
                        writeln!(&connection, "{}", answer(&fs, &line))?;
                        drop(fs); // So that the one who is told to quit holds the last of it, and unmounts.
                        if line.trim() == "quit" {
                            return Ok(quit.send(()).is_ok());
                        }
                    }
                    Ok(false)
                });
                if let Err(error) = talk {
                    eprintln!("faultfs: a control connection broke: {error}");
                }
            });
        }
    });
}

/// Sends one command to a socket and returns what follows `ok`, or the error.
pub fn send(socket: &Path, command: &str) -> io::Result<String> {
    let mut connection = UnixStream::connect(socket)?;
    writeln!(connection, "{command}")?;
    let mut line = String::new();
    BufReader::new(connection).read_line(&mut line)?;
    match line.trim_end().strip_prefix("ok") {
        Some(answer) => Ok(answer.trim_start().to_owned()),
        None => Err(io::Error::other(line.trim_end().to_owned())),
    }
}

/// Does what the line says and returns the line to answer.
pub fn answer(fs: &FaultFs, line: &str) -> String {
    match command(fs, line) {
        Ok(result) if result.is_empty() => "ok".into(),
        Ok(result) => format!("ok {result}"),
        Err(why) => format!("error {why}"),
    }
}

fn command(fs: &FaultFs, line: &str) -> Result<String, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["rule", rule] => {
            let rule = rule.parse().map_err(|error: crate::rule::NotARule| error.to_string())?;
            Ok(fs.rule(rule).0.to_string())
        }
        ["rules"] => {
            let rules = fs.rules().into_iter().map(|(id, rule, struck)| format!("{} {struck} {rule}", id.0));
            Ok(rules.collect::<Vec<_>>().join("; "))
        }
        ["clear"] => {
            fs.clear();
            Ok(String::new())
        }
        ["clear", id] => match fs.remove(RuleId(bytes(id)?)) {
            true => Ok(String::new()),
            false => Err(format!("there is no rule {id}")),
        },
        ["release"] => Ok(fs.release().to_string()),
        ["hanging"] => Ok(fs.hanging().to_string()),
        ["wait-hanging", count, ms] => {
            let count = usize::try_from(bytes(count)?).map_err(|error| error.to_string())?;
            match fs.wait_hanging(count, Duration::from_millis(bytes(ms)?)) {
                true => Ok(String::new()),
                false => Err(format!("only {} hang", fs.hanging())),
            }
        }
        ["power-cut"] => {
            fs.power_cut(None);
            Ok(String::new())
        }
        ["power-cut", "--seed", seed] => {
            fs.power_cut(Some(bytes(seed)?));
            Ok(String::new())
        }
        ["counters"] => Ok(counters(fs)),
        ["capacity", "none"] => {
            fs.set_capacity(None);
            Ok(String::new())
        }
        ["capacity", capacity] => {
            fs.set_capacity(Some(bytes(capacity)?));
            Ok(String::new())
        }
        ["used"] => Ok(fs.used_bytes().to_string()),
        ["snapshot", name, path] => copy(fs.snapshot(name), path),
        ["durable", name, path] => copy(fs.durable(name), path),
        ["quit"] => Ok(String::new()),
        _ => Err(format!("'{line}' is not a command")),
    }
}

fn counters(fs: &FaultFs) -> String {
    let c = fs.counters();
    let all = [
        ("reads", c.reads),
        ("read_bytes", c.read_bytes),
        ("writes", c.writes),
        ("written_bytes", c.written_bytes),
        ("fsyncs", c.fsyncs),
        ("fdatasyncs", c.fdatasyncs),
        ("fallocates", c.fallocates),
        ("truncates", c.truncates),
        ("syncdirs", c.syncdirs),
        ("struck", c.struck),
    ];
    all.map(|(name, count)| format!("{name}={count}")).join(" ")
}

fn copy(snapshot: io::Result<Snapshot>, path: &str) -> Result<String, String> {
    let copied = snapshot.and_then(|snapshot| {
        let file = File::create(path)?;
        file.set_len(snapshot.size())?;
        let mut buffer = vec![0; 1 << 20];
        for extent in snapshot.extents() {
            let mut at = extent.start;
            while at < extent.end {
                let len = (extent.end - at).min(buffer.len() as u64) as usize;
                let len = snapshot.read_at(at, &mut buffer[..len]);
                file.write_all_at(&buffer[..len], at)?;
                at += len as u64;
            }
        }
        Ok(snapshot.size())
    });
    copied.map(|size| size.to_string()).map_err(|error| error.to_string())
}
