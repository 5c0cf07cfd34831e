//! The program inside a machine of the lab. As its first process it starts the machine and then does as the host asks;
//! as `guest verify …` it writes to a disk and verifies what it reads back.
//!
//! It is linked statically: the machine's first file system has hardly more than this and busybox.

mod agent;
mod block;
mod direct;
mod domain;
mod init;
mod verify;
mod worker;
mod xenstore;

use anyhow::{Result, bail};
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(code) => code,
        Err(error) => {
            println!("guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[String]) -> Result<ExitCode> {
    match words {
        [command, rest @ ..] if command == "in" => domain::run(rest),
        [command, rest @ ..] if command == "read" => direct::read(rest),
        [command, rest @ ..] if command == "sectors" => direct::sectors(rest),
        [command, rest @ ..] if command == "verify" => verify::run(rest),
        [command, rest @ ..] if command == "write" => direct::write(rest),
        // The kernel hands down words of its command line that it does not know.
        _ if std::process::id() == 1 => {
            init::run(words.iter().any(|word| word == init::SECOND)).map(|never| match never {})
        }
        _ => bail!("expected `guest in`, `read`, `sectors`, `verify` or `write`, or to be the first process"),
    }
}
