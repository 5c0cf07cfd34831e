//! How the two ends of a disk stand to each other, and what is to be done about it.
//!
//! The states are those of xenbus; what follows from them is what Linux's back end does (xen-blkback/xenbus.c:
//! frontend_changed, xenbus_probe_backend.c), with an answer to each surprise. Nothing here is remembered: whoever comes
//! anew, after a restart or after a lost connection, finds the same way on.

use super::nodes::State;

/// What a node of a state says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// There is no such node.
    Absent,
    /// No state that there is.
    Nonsense,
    State(State),
}

impl Said {
    pub(crate) fn new(text: Option<&str>) -> Said {
        match text {
            None => Said::Absent,
            Some(text) => State::parse(text).map_or(Said::Nonsense, Said::State),
        }
    }
}

/// What is found in the store, and what this process has of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Situation {
    /// The store knows the guest: it is not dying.
    pub(crate) guest_lives: bool,
    pub(crate) back: Said,
    pub(crate) front: Said,
    /// The disk is to stay (`online`): a front end that has closed may come again.
    pub(crate) online: bool,
    /// We serve the front end's rings.
    pub(crate) connected: bool,
    /// What the front end may ask for was written by this process.
    pub(crate) offered: bool,
    /// The front end's directory was there before.
    pub(crate) front_was_there: bool,
    /// No front end is to be connected any more, since a sync has failed.
    pub(crate) retired: bool,
    /// What a predecessor has left of a disk that is closing cannot be gone on with.
    pub(crate) given_up: bool,
}

/// What is to be done next. Each is followed by another look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing before something changes.
    Wait,
    /// Tell what the front end may ask for, then state 2.
    Offer,
    /// Connect to what the front end wrote, then state 4.
    Connect,
    /// Go on with the rings that a predecessor has served; the state is 4 already.
    TakeOver,
    /// State 5: the front end is to close.
    Close,
    /// Let go of the rings that the front end has given up, then state 6.
    Closed,
    /// The disk is to go: let go of what there is, state 6, and end.
    Detach,
    /// The guest is gone: let go of what there is, and end.
    Bury,
}

/// What to do in this situation.
pub(crate) fn judge(situation: &Situation) -> Step {
    if !situation.guest_lives {
        return Step::Bury;
    }
    let back = match situation.back {
        // A toolstack has removed it, whatever the front end thinks.
        Said::Absent => return Step::Detach,
        Said::Nonsense => State::Reconfigured,
        Said::State(state) => state,
    };
    let front = match situation.front {
        Said::Absent if situation.front_was_there || back >= State::Connected => return Step::Detach,
        Said::Absent if !situation.online && back == State::Closing => return Step::Detach,
        Said::Absent => return if situation.offered { Step::Wait } else { Step::Offer },
        Said::Nonsense => State::Reconfigured,
        Said::State(state) => state,
    };
    let is_to_go = !situation.online || situation.retired;
    if is_to_go && is_let_go(back, front) {
        return Step::Detach;
    }
    match back {
        // Where a toolstack begins.
        State::Initialising => unless_retired(situation, Step::Offer),
        State::InitWait | State::Initialised => match front {
            State::Initialising | State::InitWait if !situation.offered => {
                unless_retired(situation, Step::Offer)
            }
            State::Initialising | State::InitWait => unless_retired(situation, Step::Wait),
            // Connected: two changes in one, of which the first was missed.
            State::Initialised | State::Connected => unless_retired(situation, Step::Connect),
            State::Closing => Step::Close,
            State::Closed => Step::Closed,
            State::Reconfiguring | State::Reconfigured => Step::Wait,
        },
        State::Connected => match front {
            State::Initialised | State::Connected if !situation.connected => Step::TakeOver,
            State::Initialised | State::Connected if situation.retired => Step::Close,
            State::Closing => Step::Close,
            // A guest that has started anew without a word has forgotten its rings.
            State::Closed | State::Initialising => Step::Closed,
            // Initialised again: as Linux does, only a front end that closes first can bring other rings.
            State::Initialised
            | State::Connected
            | State::InitWait
            | State::Reconfiguring
            | State::Reconfigured => Step::Wait,
        },
        State::Closing => match front {
            State::Closed | State::Initialising => Step::Closed,
            State::Connected | State::Closing if !situation.connected && !situation.given_up => {
                Step::TakeOver
            }
            // It may go on asking until it has closed.
            State::InitWait
            | State::Initialised
            | State::Connected
            | State::Closing
            | State::Reconfiguring
            | State::Reconfigured => Step::Wait,
        },
        State::Closed if situation.connected => Step::Closed,
        State::Closed => match front {
            State::Initialising => unless_retired(situation, Step::Offer),
            State::InitWait
            | State::Initialised
            | State::Connected
            | State::Closing
            | State::Closed
            | State::Reconfiguring
            | State::Reconfigured => Step::Wait,
        },
        State::Reconfiguring | State::Reconfigured if situation.connected || situation.offered => Step::Wait,
        State::Reconfiguring | State::Reconfigured => unless_retired(situation, Step::Offer),
    }
}

/// Whether nothing keeps a disk that is to go: the front end has closed or never begun, or we have.
fn is_let_go(back: State, front: State) -> bool {
    match back {
        State::Closed => true,
        State::Closing => match front {
            State::Closed | State::Initialising | State::InitWait | State::Reconfigured => true,
            State::Initialised | State::Connected | State::Closing | State::Reconfiguring => false,
        },
        State::Initialising | State::InitWait | State::Initialised | State::Connected => {
            front == State::Closed
        }
        State::Reconfiguring | State::Reconfigured => false,
    }
}

fn unless_retired(situation: &Situation, step: Step) -> Step {
    if situation.retired { Step::Close } else { step }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: Situation = Situation {
        guest_lives: true,
        back: Said::State(State::Initialising),
        front: Said::State(State::Initialising),
        online: true,
        connected: false,
        offered: false,
        front_was_there: true,
        retired: false,
        given_up: false,
    };

    fn at(back: u8, front: u8) -> Situation {
        let said = |state: u8| Said::new(Some(&state.to_string()));
        Situation { back: said(back), front: said(front), offered: true, ..NEW }
    }

    #[test]
    fn states_are_read_strictly() {
        assert_eq!(Said::new(None), Said::Absent);
        assert_eq!(Said::new(Some("4")), Said::State(State::Connected));
        for nonsense in ["", "0", "9", "04", "4 ", " 4", "-4", "x", "44"] {
            assert_eq!(Said::new(Some(nonsense)), Said::Nonsense, "{nonsense:?}");
        }
    }

    /// What Linux's frontend_changed does with each state of the front end, and what follows from that for us.
    #[test]
    fn each_state_of_the_front_end_has_an_answer_in_each_of_ours() {
        use Step::*;
        // The front end's states 1 to 8, for each of ours.
        for (back, steps) in [
            (1, [Offer, Offer, Offer, Offer, Offer, Offer, Offer, Offer]),
            (2, [Wait, Wait, Connect, Connect, Close, Closed, Wait, Wait]),
            (4, [Closed, Wait, TakeOver, TakeOver, Close, Closed, Wait, Wait]),
            (5, [Closed, Wait, Wait, TakeOver, TakeOver, Closed, Wait, Wait]),
            (6, [Offer, Wait, Wait, Wait, Wait, Wait, Wait, Wait]),
        ] {
            for (index, step) in steps.into_iter().enumerate() {
                let front = index as u8 + 1;
                assert_eq!(judge(&at(back, front)), step, "we are at {back}, the front end at {front}");
                let connected = Situation { connected: true, ..at(back, front) };
                let step = match (back, step) {
                    (4 | 5, TakeOver) => Wait,
                    (6, _) => Closed,
                    (_, step) => step,
                };
                assert_eq!(judge(&connected), step, "connected at {back}, the front end at {front}");
            }
        }
    }

    #[test]
    fn a_disk_that_is_to_go_goes_when_the_front_end_lets_it() {
        for (back, goes) in [
            (1, [false, false, false, false, false, true]),
            (2, [false, false, false, false, false, true]),
            (4, [false, false, false, false, false, true]),
            (5, [true, true, false, false, false, true]),
            (6, [true; 6]),
        ] {
            for (index, goes) in goes.into_iter().enumerate() {
                for connected in [false, true] {
                    let front = index as u8 + 1;
                    let situation = Situation { online: false, connected, ..at(back, front) };
                    let detaches = judge(&situation) == Step::Detach;
                    assert_eq!(detaches, goes, "we are at {back}, the front end at {front}");
                }
            }
        }
    }

    #[test]
    fn without_the_front_ends_directory_a_disk_that_was_in_use_goes() {
        for back in [1, 2, 4, 5, 6] {
            let gone = Situation { front: Said::Absent, ..at(back, 1) };
            assert_eq!(judge(&gone), Step::Detach, "{back}");
        }
        // It may come yet.
        let awaited = Situation { front: Said::Absent, front_was_there: false, ..at(2, 1) };
        assert_eq!(judge(&awaited), Step::Wait);
        let awaited = Situation { offered: false, ..awaited };
        assert_eq!(judge(&awaited), Step::Offer);
        // The toolstack gives up a disk that no front end ever saw.
        let given_up =
            Situation { online: false, back: Said::State(State::Closing), offered: true, ..awaited };
        assert_eq!(judge(&given_up), Step::Detach);
    }

    #[test]
    fn a_dead_guest_and_a_removed_directory_end_it_from_everywhere() {
        for back in 1..=8 {
            for front in 1..=8 {
                let dead = Situation { guest_lives: false, ..at(back, front) };
                assert_eq!(judge(&dead), Step::Bury);
                let removed = Situation { back: Said::Absent, ..at(back, front) };
                assert_eq!(judge(&removed), Step::Detach);
            }
        }
    }

    #[test]
    fn nonsense_of_the_front_end_changes_nothing() {
        for back in [2, 4, 5, 6] {
            for connected in [false, true] {
                let situation = Situation { front: Said::Nonsense, connected, ..at(back, 1) };
                let expected = if back == 6 && connected { Step::Closed } else { Step::Wait };
                assert_eq!(judge(&situation), expected, "{back}");
            }
        }
    }

    #[test]
    fn a_restart_offers_anew_only_to_a_front_end_that_has_not_answered_yet() {
        for (front, step) in [(1, Step::Offer), (3, Step::Connect)] {
            assert_eq!(judge(&Situation { offered: false, ..at(2, front) }), step);
        }
    }

    #[test]
    fn after_a_failed_sync_nobody_is_connected() {
        for back in 1..=8 {
            for front in 1..=8 {
                let situation = Situation { retired: true, ..at(back, front) };
                let step = judge(&situation);
                assert!(!matches!(step, Step::Offer | Step::Connect), "{back} {front}: {step:?}");
            }
        }
        // It is taken away: asked to close, and when it has, all ends.
        let connected = true;
        for (back, front, step) in [
            (2, 1, Step::Close),
            (2, 3, Step::Close),
            (4, 4, Step::Close),
            (5, 1, Step::Detach),
            (5, 4, Step::Wait),
            (5, 6, Step::Detach),
            (6, 6, Step::Detach),
        ] {
            assert_eq!(
                judge(&Situation { retired: true, connected, ..at(back, front) }),
                step,
                "{back} {front}"
            );
        }
    }

    /// Whatever the front end writes, our steps come to an end: none leads back to where it was taken.
    #[test]
    fn steps_come_to_an_end_without_the_front_end() {
        for back in 1..=8 {
            for front in 1..=8 {
                for bits in 0..16_u8 {
                    let mut now = Situation {
                        online: bits & 1 != 0,
                        connected: bits & 2 != 0,
                        offered: bits & 4 != 0,
                        retired: bits & 8 != 0,
                        ..at(back, front)
                    };
                    let mut steps = 0;
                    loop {
                        match judge(&now) {
                            Step::Wait | Step::Detach | Step::Bury => break,
                            Step::Offer => {
                                now.back = Said::State(State::InitWait);
                                now.offered = true;
                            }
                            Step::Connect => {
                                now.back = Said::State(State::Connected);
                                now.connected = true;
                            }
                            Step::TakeOver => now.connected = true,
                            Step::Close => now.back = Said::State(State::Closing),
                            Step::Closed => {
                                now.back = Said::State(State::Closed);
                                now.connected = false;
                            }
                        }
                        steps += 1;
                        assert!(steps <= 4, "{now:?}");
                    }
                }
            }
        }
    }
}
