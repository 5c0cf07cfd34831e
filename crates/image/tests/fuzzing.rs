//! What the fuzzers have collected, and new inputs for a while, put to the formats by an ordinary test.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use image::fuzzing::{TARGETS, Target, mutate, shapes};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use storage::conformance::Random;

/// Addresses that the whole test may have; a trial that asks for more memory ends it.
const MEMORY_MAX: u64 = 3 << 30;
/// New inputs for each target, unless `FUZZ_RUNS` says how many.
const RUNS: u64 = 250;

/// After so many that fail it is enough.
const FAILURES_MAX: usize = 20;

/// One after the other, in little memory.
static TURN: Mutex<()> = Mutex::new(());

fn with_little_memory(trial: impl FnOnce()) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let limit = Rlimit { current: Some(MEMORY_MAX), maximum: getrlimit(Resource::As).maximum };
    setrlimit(Resource::As, limit).unwrap();
    trial();
}

fn folder(collection: &str, target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz").join(collection).join(target.name)
}

/// All inputs that were collected, with their names.
fn collected(target: &Target) -> Vec<(String, Vec<u8>)> {
    let mut inputs = Vec::new();
    for collection in ["corpus", "regressions"] {
        let Ok(files) = std::fs::read_dir(folder(collection, target)) else { continue };
        for file in files {
            let path = file.unwrap().path();
            inputs.push((path.display().to_string(), std::fs::read(&path).unwrap()));
        }
    }
    inputs.sort();
    inputs
}

/// Whether an input breaks a rule, of which it is told then.
fn fails(target: &Target, name: &str, bytes: &[u8]) -> bool {
    let failed = std::panic::catch_unwind(|| (target.run)(bytes)).is_err();
    if failed {
        let bytes: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        eprintln!("{} fails with {name}: {bytes}", target.name);
    }
    failed
}

#[test]
fn images_keep_their_rules_with_all_that_was_collected() {
    with_little_memory(|| {
        for target in TARGETS {
            let inputs = collected(target);
            assert!(inputs.len() >= 20, "only {} files for {}", inputs.len(), target.name);
            let failed = inputs.iter().filter(|(name, bytes)| fails(target, name, bytes)).count();
            assert_eq!(failed, 0, "of {} inputs", inputs.len());
        }
    });
}

/// `WRITE_CORPUS=1 cargo test -p image --test fuzzing` writes them.
#[test]
fn the_known_shapes_are_in_the_corpus_as_they_are_made() {
    for target in TARGETS {
        let folder = folder("corpus", target);
        for (name, bytes) in shapes(target.name) {
            if std::env::var_os("WRITE_CORPUS").is_some() {
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::write(folder.join(name), &bytes).unwrap();
            }
            let stored = std::fs::read(folder.join(name)).unwrap_or_default();
            assert!(stored == bytes, "{name} of {} is not what it is made as", target.name);
        }
    }
}

#[test]
fn images_keep_their_rules_with_new_inputs() {
    let number = |name, otherwise| match std::env::var(name) {
        Ok(number) => number.parse().unwrap(),
        Err(_) => otherwise,
    };
    let wanted = std::env::var("FUZZ_TARGET").ok();
    with_little_memory(|| {
        for target in TARGETS.iter().filter(|target| wanted.as_ref().is_none_or(|name| name == target.name)) {
            let corpus: Vec<Vec<u8>> = collected(target).into_iter().map(|(_, bytes)| bytes).collect();
            let seed = number("FUZZ_SEED", 1);
            let fails = |run: &u64| {
                let bytes = mutate(&mut Random(seed << 32 | run), &corpus);
                fails(target, &format!("run {run} of seed {seed}"), &bytes)
            };
            let failed: Vec<u64> = (0..number("FUZZ_RUNS", RUNS)).filter(fails).take(FAILURES_MAX).collect();
            assert_eq!(failed, [0; 0], "of seed {seed}");
        }
    });
}
