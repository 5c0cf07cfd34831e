//! A program we run and wait for, with its words and its time bounded.

use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Set by Ctrl-C: from then on nothing new is started, so that the sweep finds everything.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Said once, by the handler of Ctrl-C.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// Waits for the end of the process if Ctrl-C was pressed: its handler cleans up and ends us.
fn stay_if_interrupted() {
    while INTERRUPTED.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_secs(1));
    }
}

/// The root of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("lab lies in the workspace").to_owned()
}

/// Cargo's target folder: where this very program was built.
pub fn target() -> Result<PathBuf> {
    let program = std::env::current_exe().context("find the target folder")?;
    Ok(program.ancestors().nth(2).context("this program was not built by cargo")?.to_owned())
}

/// A command in the root of the workspace.
pub fn command<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(root());
    command
}

/// Cargo as it was called.
pub fn cargo<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    command(&cargo, arguments)
}

/// How a command is shown to the reader.
pub fn words(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Starts a program, unless we are about to end.
pub fn start(command: &mut Command) -> Result<Child> {
    stay_if_interrupted();
    command.spawn().with_context(|| format!("run {}", words(command)))
}

/// Runs it with our own terminal; its words appear as they come.
pub fn run(command: &mut Command) -> Result<()> {
    println!("     $ {}", words(command));
    let status = start(command)?.wait()?;
    stay_if_interrupted();
    ensure!(status.success(), "`{}` failed: {status}", words(command));
    Ok(())
}

/// Runs it, shows what it prints as it comes, and also returns that.
pub fn run_and_hear(command: &mut Command) -> Result<String> {
    println!("     $ {}", words(command));
    let mut child = start(command.stdout(Stdio::piped()))?;
    let mut heard = String::new();
    for line in BufReader::new(child.stdout.take().expect("it was piped")).split(b'\n') {
        let line = line?;
        std::io::stdout().write_all(&[line.as_slice(), b"\n"].concat())?;
        heard.push_str(&String::from_utf8_lossy(&line));
        heard.push('\n');
    }
    let status = child.wait()?;
    stay_if_interrupted();
    ensure!(status.success(), "`{}` failed: {status}", words(command));
    Ok(heard)
}

/// Runs tests, shows what they say, and fails if there was none: a filter that matches nothing is no success.
pub fn test(command: &mut Command) -> Result<()> {
    let heard = run_and_hear(command)?;
    let count: u64 = heard.lines().filter_map(tests_passed).sum();
    ensure!(count > 0, "`{}` ran no test", words(command));
    println!("     {count} tests passed");
    Ok(())
}

/// `test result: ok. 12 passed; 0 failed; …`.
fn tests_passed(line: &str) -> Option<u64> {
    line.strip_prefix("test result: ok. ")?.split(' ').next()?.parse().ok()
}

/// How a quiet command ended and what it said.
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// What it said.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

impl Ended {
    /// Both streams, for the eye.
    pub fn said(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// Runs it quietly for at most `limit`, then kills it. A process that the kernel does not let go of is left
/// behind: waiting for it would be waiting for the very fault that is being tested.
pub fn within(limit: Duration, command: &mut Command) -> Result<Ended> {
    let mut child = start(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let stdout = gather(child.stdout.take().expect("it was piped"));
    let stderr = gather(child.stderr.take().expect("it was piped"));
    let Some(status) = wait(&mut child, limit)? else {
        child.kill()?;
        wait(&mut child, Duration::from_secs(2))?;
        bail!("`{}` took more than {limit:?}", words(command));
    };
    stay_if_interrupted();
    // A descendant may keep the pipe open longer than the child lives.
    let patience = Duration::from_secs(5);
    let words_of = |words: mpsc::Receiver<Vec<u8>>| {
        String::from_utf8_lossy(&words.recv_timeout(patience).unwrap_or_default()).into_owned()
    };
    Ok(Ended { status, stdout: words_of(stdout), stderr: words_of(stderr) })
}

fn gather(mut stream: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = stream.read_to_end(&mut bytes);
        if read.is_ok() { sender.send(bytes) } else { Ok(()) }
    });
    receiver
}

/// Waits for a child, at most so long.
pub fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() > limit {
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// What a quiet command printed; it must end well within two minutes.
pub fn output(command: &mut Command) -> Result<String> {
    output_within(Duration::from_secs(120), command)
}

/// What a quiet command printed; it must end well within `limit`.
pub fn output_within(limit: Duration, command: &mut Command) -> Result<String> {
    let ended = within(limit, command)?;
    ensure!(ended.status.success(), "`{}` failed: {}: {}", words(command), ended.status, ended.said().trim());
    Ok(ended.stdout)
}

/// Waits until something becomes true.
pub fn until(limit: Duration, what: &str, mut is_true: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !is_true()? {
        stay_if_interrupted();
        ensure!(start.elapsed() < limit, "waited {limit:?} until {what}");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Waits until something has been false for `quiet`.
pub fn wait_while(
    limit: Duration,
    quiet: Duration,
    what: &str,
    mut is_true: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let start = Instant::now();
    let mut last = Instant::now();
    while last.elapsed() < quiet {
        stay_if_interrupted();
        ensure!(start.elapsed() < limit, "after {limit:?} still {what}");
        thread::sleep(Duration::from_millis(50));
        if is_true()? {
            last = Instant::now();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_without_a_test_is_no_success() {
        let said = |passed| {
            let line = format!("test result: ok. {passed} passed; 0 failed; 0 ignored");
            test(&mut command("echo", [line]))
        };
        assert!(said(0).is_err());
        assert!(said(3).is_ok());
    }

    #[test]
    fn what_takes_too_long_is_ended() {
        let start = Instant::now();
        assert!(within(Duration::from_millis(100), &mut command("sleep", ["60"])).is_err());
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
