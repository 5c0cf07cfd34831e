//! What the fuzzers have collected, put to the server again by an ordinary test.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// One after the other: what a target leaves open is counted in the whole process.
static TURN: Mutex<()> = Mutex::new(());

fn replay(target: &str, run: fn(&[u8])) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let mut count = 0;
    for collection in ["corpus", "regressions"] {
        let Ok(files) = std::fs::read_dir(fuzz.join(collection).join(target)) else { continue };
        for file in files {
            let path = file.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            if let Err(panic) = std::panic::catch_unwind(|| run(&bytes)) {
                eprintln!("with the bytes of {}", path.display());
                std::panic::resume_unwind(panic);
            }
            count += 1;
        }
    }
    assert!(count >= 10, "only {count} files for {target}");
}

#[test]
fn negotiation_keeps_its_rules_with_all_that_was_collected() {
    replay("nbd_negotiation", guest::fuzzing::negotiation);
}

#[test]
fn front_ends_messages_harm_nobody_with_all_that_was_collected() {
    replay("vhost_messages", guest::fuzzing::messages);
}

#[test]
fn guests_rings_harm_nobody_with_all_that_was_collected() {
    replay("vhost_rings", guest::fuzzing::rings);
}

#[test]
fn transmission_keeps_its_rules_with_all_that_was_collected() {
    replay("nbd_transmission", guest::fuzzing::transmission);
}

#[test]
fn xen_guests_rings_harm_nobody_with_all_that_was_collected() {
    replay("xen_rings", guest::fuzzing::xen_rings);
}

#[test]
fn front_ends_nodes_are_judged_by_the_rules_with_all_that_was_collected() {
    replay("xen_nodes", guest::fuzzing::xen_nodes);
}
