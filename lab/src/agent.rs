//! Scripts run in the machine, as the program in it serves them through a virtio-serial port (`lab/guest/src/agent.rs`
//! has the protocol).

use anyhow::{Context, Result, bail, ensure};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How a script ended and what it said, both streams in one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// 0 if it went well; 128 and more if a signal killed it.
    pub status: i32,
    /// Without the end of the last line.
    pub said: String,
}

/// The connection to the machine's program.
pub struct Agent {
    stream: UnixStream,
    /// Something went wrong, and what comes next may belong to an earlier question.
    is_lost: bool,
}

impl Agent {
    /// On a connection to QEMU's end of the port. Waits until the machine has started.
    pub fn greet(stream: UnixStream, limit: Duration) -> Result<Agent> {
        let mut agent = Agent { stream, is_lost: false };
        let end = Instant::now() + limit;
        let greeting = agent.line(end).context("wait for the machine to start")?;
        ensure!(greeting.starts_with("ready "), "the machine says `{greeting}` instead of `ready`");
        Ok(agent)
    }

    /// Runs a script in the machine's shell.
    pub fn run(&mut self, script: &str, limit: Duration) -> Result<Answer> {
        ensure!(!self.is_lost, "the machine did not answer earlier");
        self.is_lost = true;
        let answer =
            self.ask(script, Instant::now() + limit).with_context(|| format!("in the guest: {script}"))?;
        self.is_lost = false;
        Ok(answer)
    }

    fn ask(&mut self, script: &str, end: Instant) -> Result<Answer> {
        let message = format!("{}\n{script}", script.len());
        self.stream.write_all(message.as_bytes()).context("speak to the machine")?;
        let head = self.line(end)?;
        let (status, len) = head.split_once(' ').with_context(|| format!("a strange answer: {head}"))?;
        let mut said = vec![0; len.parse()?];
        self.fill(&mut said, end)?;
        let said = String::from_utf8_lossy(&said).trim_end().to_owned();
        Ok(Answer { status: status.parse()?, said })
    }

    fn line(&mut self, end: Instant) -> Result<String> {
        let mut line = Vec::new();
        loop {
            let mut byte = [0];
            self.fill(&mut byte, end)?;
            match byte {
                [b'\n'] => return Ok(String::from_utf8_lossy(&line).into_owned()),
                [letter] => line.push(letter),
            }
        }
    }

    fn fill(&mut self, bytes: &mut [u8], end: Instant) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let left = end.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "the machine does not answer");
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut bytes[done..]) {
                Ok(0) => bail!("the machine has ended"),
                Ok(count) => done += count,
                Err(error) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => {}
                Err(error) => return Err(error).context("hear the machine"),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_script_is_answered_with_its_status_and_words() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let guest = thread::spawn(move || {
            theirs.write_all(b"ready 6.12\n").unwrap();
            let mut question = [0; 7];
            theirs.read_exact(&mut question).unwrap();
            theirs.write_all(b"3 6\nhello\n").unwrap();
            question
        });
        let mut agent = Agent::greet(ours, Duration::from_secs(60)).unwrap();
        let answer = agent.run("false", Duration::from_secs(60)).unwrap();
        assert_eq!(answer, Answer { status: 3, said: "hello".into() });
        assert_eq!(&guest.join().unwrap(), b"5\nfalse");
        assert!(agent.run("true", Duration::from_secs(60)).is_err(), "its machine has ended");
    }

    #[test]
    fn who_did_not_answer_is_not_asked_again() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"ready 6.12\n").unwrap();
        let mut agent = Agent::greet(ours, Duration::from_secs(60)).unwrap();
        assert!(agent.run("sleep 9", Duration::from_millis(10)).is_err());
        theirs.write_all(b"0 0\n").unwrap();
        assert!(
            agent.run("true", Duration::from_secs(60)).is_err(),
            "that was the answer to another question"
        );
    }
}
