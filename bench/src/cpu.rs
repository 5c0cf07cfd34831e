//! The CPU time of a process: all its threads, those of the kernel that work for it, and its children.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::param::clock_ticks_per_second;
use rustix::thread::{CpuSet, sched_setaffinity};

/// Lets this thread, and whatever it starts from now on, run on one core only.
pub(crate) fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).with_context(|| format!("pin to core {core}"))
}

/// Reads the CPU time of a server: its process and the children it had when the meter was made.
pub(crate) struct Meter {
    pids: Vec<u32>,
}

/// What the meter stood at.
pub(crate) struct Reading {
    /// From `/proc/PID/stat`: also threads that have ended, but in ticks of 10 ms.
    ticks: Duration,
    /// From `/proc/PID/task/TID/schedstat`: in nanoseconds, but only threads that live. io_uring's workers and
    /// its polling thread are threads of the process and appear here too.
    threads: HashMap<u32, Duration>,
}

impl Meter {
    /// Some servers fork for each connection, so make the meter when the client is connected.
    pub(crate) fn of(pid: u32) -> Result<Meter> {
        let mut parents = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let Some(process) = number(entry?.file_name().to_str()) else { continue };
            // A process that ends while we look is none of ours.
            if let Ok(stat) = Stat::of(process) {
                parents.push((process, stat.parent));
            }
        }
        let mut pids = vec![pid];
        let mut next = 0;
        while let Some(&parent) = pids.get(next) {
            pids.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(child, _)| *child));
            next += 1;
        }
        Ok(Meter { pids })
    }

    pub(crate) fn read(&self) -> Result<Reading> {
        let mut reading = Reading { ticks: Duration::ZERO, threads: HashMap::new() };
        for &pid in &self.pids {
            reading.ticks += Stat::of(pid)?.cpu;
            for task in fs::read_dir(format!("/proc/{pid}/task"))? {
                let Some(thread) = number(task?.file_name().to_str()) else { continue };
                // A thread that ends here is still in the ticks of its process.
                let Ok(text) = fs::read_to_string(format!("/proc/{pid}/task/{thread}/schedstat")) else {
                    continue;
                };
                let ns = text.split(' ').next().and_then(|ns| ns.parse().ok());
                reading.threads.insert(thread, Duration::from_nanos(ns.context("read schedstat")?));
            }
        }
        Ok(reading)
    }
}

impl Reading {
    /// The CPU time spent from `earlier` to now. The exact count is taken, unless threads that ended in between are
    /// missing from it: then the coarse one is larger by more than its own error of a tick at either end.
    pub(crate) fn since(&self, earlier: &Reading) -> Duration {
        let fine: Duration = self
            .threads
            .iter()
            .map(|(thread, now)| now.saturating_sub(*earlier.threads.get(thread).unwrap_or(&Duration::ZERO)))
            .sum();
        let coarse = self.ticks.saturating_sub(earlier.ticks);
        if coarse > fine + 2 * tick() { coarse } else { fine }
    }
}

/// What we need of `/proc/PID/stat`.
struct Stat {
    parent: u32,
    cpu: Duration,
}

impl Stat {
    fn of(pid: u32) -> Result<Stat> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))
            .with_context(|| format!("process {pid} is gone"))?;
        parse_stat(&text).with_context(|| format!("/proc/{pid}/stat: {text:?}"))
    }
}

/// The name of a process may contain anything, also spaces and parentheses: the fields begin after the last one.
fn parse_stat(text: &str) -> Option<Stat> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u32>().ok(); // proc(5) counts from 1, `state` is 3
    Some(Stat { parent: number(4)?, cpu: tick() * (number(14)? + number(15)?) })
}

fn tick() -> Duration {
    Duration::from_secs(1) / u32::try_from(clock_ticks_per_second()).expect("a tick is some milliseconds")
}

fn number(name: Option<&str>) -> Option<u32> {
    name?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::own_cpu;

    #[test]
    fn a_stat_line_is_parsed_whatever_the_name() {
        let stat = parse_stat("7 (a) b (c) S 42 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 1 0").unwrap();
        assert_eq!(stat.parent, 42);
        assert_eq!(stat.cpu, tick() * 200);
    }

    #[test]
    fn threads_that_ended_are_taken_from_the_ticks() {
        let reading = |ticks, threads: &[(u32, u64)]| Reading {
            ticks: Duration::from_millis(ticks),
            threads: threads.iter().map(|&(id, ms)| (id, Duration::from_millis(ms))).collect(),
        };
        let before = reading(100, &[(1, 60), (2, 43)]);
        assert_eq!(reading(110, &[(1, 64), (2, 44)]).since(&before), Duration::from_millis(5));
        assert_eq!(reading(400, &[(1, 64), (3, 1)]).since(&before), Duration::from_millis(300));
    }

    #[test]
    fn our_own_cpu_time_grows_when_we_work() {
        let meter = Meter::of(std::process::id()).unwrap();
        let before = meter.read().unwrap();
        let worked = own_cpu() + Duration::from_millis(30);
        while own_cpu() < worked {}
        assert!(meter.read().unwrap().since(&before) > Duration::from_millis(15));
    }
}
