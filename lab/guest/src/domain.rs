//! Scripts for a domain of Xen's, and their answers, through xenstore: a domain without a network or a second console
//! has that from its start.
//!
//! Below `data/lab` of the domain: `ready` once it listens; `ask/0`, `ask/1`, … and then `asked`, `NUMBER PARTS`, from
//! dom0; `answer/0`, … and then `answered`, `NUMBER STATUS PARTS`, from the domain.

use crate::xenstore::Store;
use anyhow::{Context, Result, bail, ensure};
use std::io::{Read, Write};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// A domain's node may hold 2048 bytes, with its name and permissions (xenstored's quota).
const PART: usize = 1500;
/// Less than what the host waits for dom0, so that dom0 can be asked why.
const PATIENCE: Duration = Duration::from_secs(200);

fn put(store: &mut Store, folder: &str, bytes: &[u8]) -> Result<usize> {
    for (number, part) in bytes.chunks(PART).enumerate() {
        store.write(&format!("{folder}/{number}"), part)?;
    }
    Ok(bytes.len().div_ceil(PART))
}

fn get(store: &mut Store, folder: &str, parts: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for number in 0..parts {
        let part = store.read(&format!("{folder}/{number}"))?;
        bytes.extend(part.with_context(|| format!("{folder}/{number} is missing"))?);
    }
    Ok(bytes)
}

/// The numbers at a path; none while it is not there.
fn numbers<const COUNT: usize>(store: &mut Store, path: &str) -> Result<Option<[i64; COUNT]>> {
    let Some(value) = store.read(path)? else { return Ok(None) };
    let value = String::from_utf8(value)?;
    let numbers: Result<Vec<i64>, _> = value.split(' ').map(str::parse).collect();
    let numbers = numbers.with_context(|| format!("{path} is `{value}`"))?;
    let numbers = <[i64; COUNT]>::try_from(numbers);
    Ok(Some(numbers.map_err(|found| anyhow::anyhow!("{path} has {} numbers", found.len()))?))
}

/// The domain's end.
pub(crate) struct Ear {
    store: Store,
    last: i64,
}

impl Ear {
    /// Listens, and says so.
    pub(crate) fn open(greeting: &str) -> Result<Ear> {
        let mut store = Store::open()?;
        store.watch("data/lab/asked")?;
        store.write("data/lab/ready", greeting.as_bytes())?;
        Ok(Ear { store, last: 0 })
    }

    /// The next script.
    pub(crate) fn receive(&mut self) -> Result<Vec<u8>> {
        loop {
            if let Some([number, parts]) = numbers(&mut self.store, "data/lab/asked")?
                && number != self.last
            {
                self.last = number;
                return get(&mut self.store, "data/lab/ask", usize::try_from(parts)?);
            }
            self.store.wait()?;
        }
    }

    pub(crate) fn answer(&mut self, status: i32, said: &[u8]) -> Result<()> {
        let parts = put(&mut self.store, "data/lab/answer", said)?;
        self.store.write("data/lab/answered", format!("{} {status} {parts}", self.last).as_bytes())
    }
}

/// `in DOMAIN`, in dom0: has the script at standard input run there, says what it said, and ends as it ended.
pub(crate) fn run(words: &[String]) -> Result<ExitCode> {
    let [domain] = words else { bail!("expected DOMAIN, found {words:?}") };
    let base = format!("/local/domain/{domain}/data/lab");
    let mut script = Vec::new();
    std::io::stdin().read_to_end(&mut script)?;
    let (sender, receiver) = mpsc::channel();
    // A connection can't be waited for with a limit: a thread of its own can.
    thread::spawn(move || sender.send(ask(&base, &script)));
    match receiver.recv_timeout(PATIENCE) {
        Ok(answer) => {
            let (status, said) = answer?;
            std::io::stdout().write_all(&said)?;
            Ok(ExitCode::from(u8::try_from(status).context("a strange status")?))
        }
        Err(RecvTimeoutError::Timeout) => bail!("domain {domain} does not answer"),
        Err(error) => Err(error).context("ask a domain"),
    }
}

fn ask(base: &str, script: &[u8]) -> Result<(i64, Vec<u8>)> {
    let mut store = Store::open()?;
    store.watch(&format!("{base}/ready"))?;
    while store.read(&format!("{base}/ready"))?.is_none() {
        store.wait()?;
    }
    let number = numbers(&mut store, &format!("{base}/asked"))?.map_or(1, |[number, _]: [i64; 2]| number + 1);
    let parts = put(&mut store, &format!("{base}/ask"), script)?;
    store.watch(&format!("{base}/answered"))?;
    store.write(&format!("{base}/asked"), format!("{number} {parts}").as_bytes())?;
    loop {
        if let Some([answered, status, parts]) = numbers(&mut store, &format!("{base}/answered"))?
            && answered == number
        {
            let said = get(&mut store, &format!("{base}/answer"), usize::try_from(parts)?)?;
            store.remove(&format!("{base}/ask"))?;
            store.remove(&format!("{base}/answer"))?;
            ensure!((0..256).contains(&status), "a strange status: {status}");
            return Ok((status, said));
        }
        store.wait()?;
    }
}
