//! Taking a disk from a guest, as a toolstack does it: both ends are asked through the xenstore, and the back end tells.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use ::xen::Domain;
use ::xen::store::{Client, Connect, Error};
use rustix::event::EventfdFlags;

use super::negotiate::Quoted;
use super::nodes::{Nodes, Server, State};
use super::situation::Said;

/// How often to look whether the process that serves it still lives: it dies without a word in the store.
const LOOK: Duration = Duration::from_millis(250);

/// Why a disk was not detached: what was found, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// The xenstore does not do its part.
    #[error(transparent)]
    Store(#[from] Error),
    /// There can be no descriptor.
    #[error("the wait for its end is not possible: {0}")]
    Wait(std::io::Error),
    /// There is no such disk.
    #[error("there is no disk at {path}")]
    Absent {
        /// Where it should be.
        path: String,
    },
    /// The guest keeps it.
    #[error(
        "the guest has not let go of it within {seconds} s (its end is in state {state}): unmount it there. It is \
         still asked to, and tapdisk ends when it has"
    )]
    InUse {
        /// How long was waited.
        seconds: u64,
        /// What the front end says.
        state: String,
    },
    /// The guest has let go of it.
    #[error(
        "the guest has let go of it, and process {server} has not within {seconds} s: it waits for the storage, and ends \
         when that has answered"
    )]
    Storage {
        /// How long was waited.
        seconds: u64,
        /// Who waits.
        server: u32,
    },
    /// Nobody attends to it.
    #[error(
        "nobody serves it: {server}, and the guest has not let go of it. Start tapdisk once more as before, and it will be \
         detached when the guest does; or remove {path} and the guest's {front} with xenstore-rm"
    )]
    Unserved {
        /// Who should.
        server: String,
        /// The back end's directory.
        path: String,
        /// The front end's.
        front: String,
    },
}

/// Takes a disk from a guest, and waits until it is gone. Where it is not in time, the guest remains asked to let go.
///
/// # Errors
/// If there is no such disk, the guest keeps it, or nobody serves it.
pub fn detach(
    store: &dyn Connect,
    domain: Domain,
    device: u32,
    kind: &str,
    timeout: Duration,
) -> Result<(), DetachError> {
    let end = Instant::now() + timeout;
    let mut client = Client::connect(store)?;
    let mut nodes = Nodes::find(&mut client, domain, device, kind)?;
    if let Some(path) = client.now().read(&nodes.back("frontend"))? {
        nodes.frontend = path;
    }
    // What libxl writes. A back end that has closed already is not asked to close.
    let is_there = client.transaction(|view| {
        let Some(state) = view.read(&nodes.back("state"))? else { return Ok(false) };
        view.write(&nodes.back("online"), "0")?;
        if state != State::Closed.text() {
            view.write(&nodes.back("state"), State::Closing.text())?;
        }
        Ok(true)
    })?;
    if !is_there {
        return Err(DetachError::Absent { path: nodes.backend });
    }
    client.watch(&nodes.back("state"), "back")?;
    let nothing =
        rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| DetachError::Wait(errno.into()))?;
    loop {
        while client.event().is_some() {}
        if is_over(&mut client, &nodes)? {
            return Ok(());
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(why_not(&mut client, &nodes, timeout));
        }
        client.wait(nothing.as_fd(), Some(left.min(LOOK)))?;
    }
}

/// Whether nothing is left to be waited for. What a server has left that is no more is seen to here.
fn is_over(client: &mut Client, nodes: &Nodes) -> Result<bool, Error> {
    client.transaction(|view| {
        let Some(state) = view.read(&nodes.back("state"))? else { return Ok(true) };
        let online = view.read(&nodes.back("online"))?;
        if online.as_deref() != Some("0") {
            // Somebody has attached it anew already.
            return Ok(true);
        }
        let are_removed = nodes.are_ours(view)?;
        if state == State::Closed.text() && !are_removed {
            return Ok(true);
        }
        let is_served = match nodes.server(view)? {
            Server::Alive(_) => true,
            Server::Unknown => !are_removed,
            Server::Gone(_) | Server::Other(_) => false,
        };
        if is_served || !has_let_go(Said::new(view.read(&nodes.front("state"))?.as_deref())) {
            return Ok(false);
        }
        if are_removed {
            nodes.remove(view)?
        } else {
            view.write(&nodes.back("state"), State::Closed.text())?
        }
        Ok(true)
    })
}

/// Whether a front end at this state has nothing of the disk any more, or never had.
fn has_let_go(front: Said) -> bool {
    match front {
        Said::Absent | Said::State(State::Initialising | State::Closed) => true,
        Said::Nonsense
        | Said::State(
            State::InitWait
            | State::Initialised
            | State::Connected
            | State::Closing
            | State::Reconfiguring
            | State::Reconfigured,
        ) => false,
    }
}

fn why_not(client: &mut Client, nodes: &Nodes, timeout: Duration) -> DetachError {
    let mut view = client.now();
    let (server, front) = match (nodes.server(&mut view), view.read(&nodes.front("state"))) {
        (Ok(server), Ok(front)) => (server, front),
        (Err(error), _) | (_, Err(error)) => return error.into(),
    };
    let seconds = timeout.as_secs();
    let has_let_go = has_let_go(Said::new(front.as_deref()));
    match server {
        Server::Alive(owner) if has_let_go => DetachError::Storage { seconds, server: owner.pid },
        // Nobody may have said that he serves it: a toolstack's back end.
        Server::Alive(_) | Server::Unknown => {
            let state = front.map_or_else(|| "none".into(), |state| Quoted::new(&state).to_string());
            DetachError::InUse { seconds, state }
        }
        Server::Gone(pid) | Server::Other(pid) => {
            let (path, front) = (nodes.backend.clone(), nodes.frontend.clone());
            DetachError::Unserved { server: format!("process {pid} is gone"), path, front }
        }
    }
}

#[cfg(test)]
mod tests {
    use ::xen::fake::store::Store;

    use super::*;

    const BACK: &str = "/local/domain/0/backend/vbd3/5/51728";
    const FRONT: &str = "/local/domain/5/device/vbd/51728";

    fn store() -> Store {
        let store = Store::new();
        store.write(&format!("{BACK}/frontend"), FRONT);
        store.write(&format!("{BACK}/online"), "1");
        store.write(&format!("{BACK}/state"), "4");
        store.write(&format!("{FRONT}/state"), "4");
        store
    }

    fn try_for(store: &Store, millis: u64) -> Result<(), DetachError> {
        detach(store, Domain(5), 51728, "vbd3", Duration::from_millis(millis))
    }

    #[test]
    fn both_ends_are_asked_and_the_back_end_is_waited_for() {
        for is_removed in [false, true] {
            let store = store();
            let detached = std::thread::spawn({
                let store = store.clone();
                move || try_for(&store, 30_000)
            });
            store.wait_for(&format!("{BACK}/state"), "5");
            assert_eq!(store.read(&format!("{BACK}/online")).as_deref(), Some("0"));
            assert!(!detached.is_finished());
            if is_removed {
                store.remove(BACK);
            } else {
                store.write(&format!("{BACK}/state"), "6");
            }
            detached.join().unwrap().unwrap();
        }
    }

    #[test]
    fn a_disk_that_has_closed_is_detached_already() {
        let store = store();
        store.write(&format!("{BACK}/state"), "6");
        try_for(&store, 0).unwrap();
        assert_eq!(store.read(&format!("{BACK}/state")).as_deref(), Some("6"));
    }

    #[test]
    fn what_tapdisk_has_made_is_waited_for_until_it_is_removed() {
        let store = store();
        store.write(&format!("{BACK}/tapdisk/created"), "1");
        store.write(&format!("{BACK}/kthread-pid"), &std::process::id().to_string());
        store.write(&format!("{FRONT}/state"), "6");
        let detached = std::thread::spawn({
            let store = store.clone();
            move || try_for(&store, 30_000)
        });
        store.wait_for(&format!("{BACK}/state"), "5");
        store.write(&format!("{BACK}/state"), "6");
        std::thread::sleep(2 * LOOK);
        assert!(!detached.is_finished(), "its server has not removed it yet");
        store.remove(BACK);
        detached.join().unwrap().unwrap();
    }

    #[test]
    fn what_a_dead_server_has_left_is_seen_to_once_the_guest_has_let_go() {
        for is_ours in [true, false] {
            let store = store();
            if is_ours {
                store.write(&format!("{BACK}/tapdisk/created"), "1");
            }
            store.write(&format!("{BACK}/kthread-pid"), "4194305");
            let detached = std::thread::spawn({
                let store = store.clone();
                move || try_for(&store, 30_000)
            });
            store.wait_for(&format!("{BACK}/state"), "5");
            store.write(&format!("{FRONT}/state"), "6");
            detached.join().unwrap().unwrap();
            let left = store.read(&format!("{BACK}/state"));
            assert_eq!(left.as_deref(), if is_ours { None } else { Some("6") });
            assert_eq!(store.read(&format!("{FRONT}/state")).is_some(), !is_ours);
        }
    }

    #[test]
    fn who_waits_for_storage_is_named() {
        let store = store();
        let ours = std::process::id().to_string();
        store.write(&format!("{BACK}/kthread-pid"), &ours);
        store.remove(&format!("{FRONT}/state"));
        let error = try_for(&store, 1).unwrap_err().to_string();
        assert!(error.contains(&ours) && error.contains("storage"), "{error}");
    }

    #[test]
    fn why_it_was_not_is_said() {
        let error = try_for(&Store::new(), 0).unwrap_err().to_string();
        assert!(error.contains(BACK), "{error}");
        let store = store();
        store.write(&format!("{BACK}/kthread-pid"), &std::process::id().to_string());
        let error = try_for(&store, 1).unwrap_err().to_string();
        assert!(error.contains("unmount") && error.contains("\"4\""), "{error}");
        // No process has a number beyond 2^22 (proc(5), pid_max).
        store.write(&format!("{BACK}/kthread-pid"), "4194305");
        let error = try_for(&store, 1).unwrap_err().to_string();
        assert!(error.contains("4194305 is gone") && error.contains("Start tapdisk"), "{error}");
    }
}
