//! A server under test: started, waited for, asked, stopped, and gone at the end whatever happens.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use faultfs::{FaultFs, Options};
use nbd_client::{Answer, Client, Errno, Request, Style};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;
use vhost_client::{Driver, Wish};

/// How long anything is waited for that must happen: much longer than it takes on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(40);

pub(crate) const CACHES: [&str; 2] = ["direct", "buffered"];
pub(crate) const STYLES: [Style; 2] = [Style::Simple, Style::Structured];

/// Waits until this is so; `what` says in the end what was waited for in vain.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < LONG, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A fault file system that lets several requests hang or wait at once; `None` where a user cannot mount it.
pub(crate) fn mount() -> Option<FaultFs> {
    faultfs::mount_for_test(Options { async_direct_io: true, ..Options::default() })
}

/// The image that [`Server::on`] serves.
pub(crate) const IMAGE: &str = "disk.img";

/// A running server.
pub(crate) struct Server<'a> {
    child: Child,
    directory: TempDir,
    stdout: Output,
    stderr: Output,
    /// Where requests may hang that the process cannot end before.
    fs: Option<&'a FaultFs>,
}

/// What a server left behind.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stderr: String,
}

/// What a process has written so far.
struct Output {
    text: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Output {
    fn of(stream: impl Read + Send + 'static) -> Output {
        let text = Arc::new(Mutex::new(String::new()));
        let into = Arc::clone(&text);
        let reader = std::thread::spawn(move || {
            let mut lines = BufReader::new(stream);
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                into.lock().unwrap().push_str(&String::from_utf8_lossy(&line));
                line.clear();
            }
        });
        Output { text, reader: Some(reader) }
    }

    fn text(&self) -> String {
        self.text.lock().unwrap().clone()
    }

    /// All of it, once the process has ended.
    fn end(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("it does not panic");
        }
        self.text()
    }
}

/// `tapdisk` with these words.
pub(crate) fn tapdisk<W: AsRef<OsStr>>(words: impl IntoIterator<Item = W>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tapdisk"));
    command.args(words).stdin(Stdio::null()).env_remove("RUST_LOG");
    command
}

impl<'a> Server<'a> {
    /// Serves an image of 8 MiB on this file system, made if there is none.
    pub(crate) fn on(fs: &'a FaultFs, words: &[&str]) -> Server<'a> {
        let image = fs.path().join(IMAGE);
        let mut all = vec![image.as_os_str(), OsStr::new("--create"), OsStr::new("8M")];
        all.extend(words.iter().map(OsStr::new));
        let server = Server::start(&all, Some(fs));
        server.wait_ready();
        server
    }

    /// Serves the image on this file system to those who only look.
    pub(crate) fn on_read_only(fs: &'a FaultFs, words: &[&str]) -> Server<'a> {
        let image = fs.path().join(IMAGE);
        let mut all = vec![image.as_os_str(), OsStr::new("--read-only")];
        all.extend(words.iter().map(OsStr::new));
        let server = Server::start(&all, Some(fs));
        server.wait_ready();
        server
    }

    /// Serves an image of 8 MiB on this file system, made if there is none, to a guest as well.
    pub(crate) fn for_guest(fs: &'a FaultFs, words: &[&str]) -> Server<'a> {
        let server = Server::start_for_guest(fs, words);
        server.wait_ready();
        server
    }

    /// The same, without waiting until a guest can connect.
    pub(crate) fn start_for_guest(fs: &'a FaultFs, words: &[&str]) -> Server<'a> {
        let (image, directory) = (fs.path().join(IMAGE), tempfile::tempdir().unwrap());
        let mut all = vec![image.as_os_str(), OsStr::new("--create"), OsStr::new("8M")];
        all.extend(words.iter().map(OsStr::new));
        let socket = directory.path().join(GUEST_SOCKET);
        all.extend([OsStr::new("--vhost-user"), socket.as_os_str()]);
        Server::start_in(directory, &all, Some(fs))
    }

    /// Serves what these words say, and waits until clients can connect.
    pub(crate) fn of<W: AsRef<OsStr>>(words: &[W]) -> Server<'static> {
        let server = Server::start(words, None);
        server.wait_ready();
        server
    }

    /// Starts to serve what these words say, on a socket in a directory of its own. Where they do not say where failed
    /// syncs are recorded, the next server knows nothing of them.
    pub(crate) fn start<W: AsRef<OsStr>>(words: &[W], fs: Option<&'a FaultFs>) -> Server<'a> {
        Server::start_in(tempfile::tempdir().unwrap(), words, fs)
    }

    fn start_in<W: AsRef<OsStr>>(directory: TempDir, words: &[W], fs: Option<&'a FaultFs>) -> Server<'a> {
        let mut command = tapdisk(["serve"]);
        if !words.iter().any(|word| word.as_ref() == "--state-dir") {
            command.arg("--state-dir").arg(directory.path());
        }
        command.args(words).arg("--nbd").arg(format!("unix:{}", directory.path().join(SOCKET).display()));
        Server::run(command, directory, fs)
    }

    /// Runs a command that serves on a socket in this directory.
    pub(crate) fn run(mut command: Command, directory: TempDir, fs: Option<&'a FaultFs>) -> Server<'a> {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = Output::of(child.stdout.take().expect("piped"));
        let stderr = Output::of(child.stderr.take().expect("piped"));
        Server { child, directory, stdout, stderr, fs }
    }

    #[track_caller]
    pub(crate) fn wait_ready(&self) {
        wait_until("clients can connect", || {
            // Whoever ended before that says why.
            self.stdout().contains("Ctrl-C ends it.") || !self.is_running()
        });
        assert!(self.is_running(), "it ended: {}", self.stderr());
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join(SOCKET)
    }

    /// Where the front end of a guest connects.
    pub(crate) fn guest_socket(&self) -> PathBuf {
        self.directory.path().join(GUEST_SOCKET)
    }

    /// A guest's driver, as this wish says.
    pub(crate) fn guest(&self, wish: &Wish) -> Driver {
        Driver::connect(&self.guest_socket(), wish).unwrap()
    }

    pub(crate) fn client(&self, style: Style) -> Client {
        Client::connect(&self.socket(), style).unwrap()
    }

    /// What it has written to standard output so far.
    pub(crate) fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// What it has logged so far.
    pub(crate) fn stderr(&self) -> String {
        self.stderr.text()
    }

    #[track_caller]
    pub(crate) fn wait_for_log(&self, words: &str) {
        wait_until(&format!("the log says {words:?}"), || self.stderr().contains(words));
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    /// Whether it has neither ended nor died. Its parent has not been told yet, so nobody else has its number.
    pub(crate) fn is_running(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        !fields.starts_with(['Z', 'X'])
    }

    /// Bytes of memory that it uses.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
        pages * rustix::param::page_size() as u64
    }

    /// Waits until it ends by itself.
    #[track_caller]
    pub(crate) fn ended(mut self) -> Ended {
        wait_until("the server ends", || !self.is_running());
        let status = self.child.wait().unwrap();
        Ended { status, stderr: self.stderr.end() }
    }

    /// Tells it to stop and waits until it has.
    #[track_caller]
    pub(crate) fn stop(self) -> Ended {
        self.signal(Signal::TERM);
        self.ended()
    }

    /// Kills it as a crash would.
    #[track_caller]
    pub(crate) fn kill(self) {
        self.signal(Signal::KILL);
        assert_eq!(self.ended().status.signal(), Some(9));
    }
}

const SOCKET: &str = "nbd.sock";
const GUEST_SOCKET: &str = "guest.sock";

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let started = Instant::now();
        while started.elapsed() < LONG {
            match self.child.try_wait() {
                Ok(None) => {}
                Ok(Some(_)) => return,
                Err(error) => return eprintln!("the server under test cannot be waited for: {error}"),
            }
            if let Err(error) = self.child.kill() {
                eprintln!("the server under test cannot be killed: {error}");
            }
            if let Some(fs) = self.fs {
                fs.clear();
                fs.release();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        eprintln!("the server under test does not end");
    }
}

/// Requests of a client whose connection is expected to last.
pub(crate) trait Ask {
    /// The answer to this request, with its payload.
    fn told(&mut self, request: &Request<'_>) -> Answer;

    /// Whether this was done.
    fn done(&mut self, request: &Request<'_>) -> Result<(), Errno> {
        self.told(request).map(|_| ())
    }

    fn read(&mut self, at: u64, len: u64) -> Result<Bytes, Errno> {
        self.told(&Request::read(at, len)).map(|payload| Bytes(payload.bytes))
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.done(&Request::write(at, bytes))
    }

    fn flush(&mut self) -> Result<(), Errno> {
        self.done(&Request::flush())
    }

    /// The answers to all of these, sent before the first answer is waited for, in the order of the requests.
    fn all(&mut self, requests: &[Request<'_>]) -> Vec<Answer>;
}

impl Ask for Client {
    #[track_caller]
    fn told(&mut self, request: &Request<'_>) -> Answer {
        self.ask(request).expect("the connection lasts")
    }

    #[track_caller]
    fn all(&mut self, requests: &[Request<'_>]) -> Vec<Answer> {
        let cookies: Vec<u64> = requests.iter().map(|request| self.send(request).unwrap()).collect();
        let answers = cookies.into_iter().map(|cookie| self.wait(cookie).expect("the connection lasts"));
        answers.collect()
    }
}

/// Adds a fault.
#[track_caller]
pub(crate) fn rule(fs: &FaultFs, text: &str) -> faultfs::RuleId {
    fs.rule(text.parse().unwrap())
}

/// Bytes of a disk; where they differ from what is expected, not all of them are shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes; sectors begin with", self.0.len())?;
        self.0.chunks(512).take(16).try_for_each(|sector| write!(f, " {:?}", &sector[..2.min(sector.len())]))
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Bytes that tell where they are and which writing this is: sectors nearby are not alike.
pub(crate) fn pattern(at: u64, len: u64, writing: u8) -> Bytes {
    Bytes((at..at + len).map(|at| (at / 512) as u8 ^ (at % 251) as u8 ^ writing).collect())
}

pub(crate) fn zeroes(len: u64) -> Bytes {
    Bytes(vec![0; len as usize])
}

/// What the image holds, as the file system sees it.
pub(crate) fn stored(fs: &FaultFs, at: u64, len: u64) -> Bytes {
    Bytes(fs.snapshot(IMAGE).unwrap().bytes_at(at, len as usize))
}

/// What it would hold after a power cut.
pub(crate) fn durable(fs: &FaultFs, at: u64, len: u64) -> Bytes {
    Bytes(fs.durable(IMAGE).unwrap().bytes_at(at, len as usize))
}

/// Syncs of files so far.
pub(crate) fn syncs(fs: &FaultFs) -> u64 {
    fs.counters().fsyncs + fs.counters().fdatasyncs
}
