//! The questions, each put to every interface.

use std::collections::BTreeSet;

use block::{Errno, OpKind};

use crate::asker::{Asker, INTERFACES, Question, Refused};
use crate::disk::{Act, byte_at};
use crate::serve::{Plan, Served};

const SIZE: u64 = 1 << 20;

/// Puts questions to each interface, with a disk of its own.
fn everywhere(plan: impl Fn() -> Plan, questions: impl Fn(&mut dyn Asker, &Served, &str)) {
    for interface in &INTERFACES {
        let served = plan().serve();
        let mut asker = (interface.connect)(&served);
        questions(&mut *asker, &served, interface.name);
    }
}

/// What a fresh disk holds here.
fn fresh(at: u64, len: usize) -> Vec<u8> {
    (at..at + len as u64).map(byte_at).collect()
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 ^ (at / 512) as u8 ^ seed).collect()
}

/// One of each kind, all within the disk.
fn one_of_each() -> [Question; 5] {
    [
        Question::Read(8192, 4096),
        Question::Write(4096, pattern(4096, 7)),
        Question::Zeroes(16384, 1024),
        Question::Discard(32768, 512),
        Question::Flush,
    ]
}

#[test]
fn what_was_written_is_read_back_and_nothing_else_changes() {
    everywhere(Plan::default, |asker, _, name| {
        let places = [(0, 512), (512, 512), (4096, 8192), (SIZE - 512, 512), (300 * 512, 65536 + 512)];
        for (seed, (at, len)) in places.into_iter().enumerate() {
            let bytes = pattern(len, seed as u8);
            assert_eq!(asker.ask(&Question::Write(at, bytes.clone())), Ok(vec![]), "{name}");
            assert!(asker.ask(&Question::Read(at, len)) == Ok(bytes), "{name}: {len} bytes at {at}");
        }
        assert!(asker.ask(&Question::Read(1024, 3072)) == Ok(fresh(1024, 3072)), "{name}: before them");
        assert!(asker.ask(&Question::Read(12288, 512)) == Ok(fresh(12288, 512)), "{name}: between them");
    });
}

#[test]
fn the_disk_is_asked_just_what_the_client_asked() {
    everywhere(Plan::default, |asker, served, name| {
        for question in one_of_each() {
            assert!(asker.ask(&question).is_ok(), "{name}: {question:?}");
        }
        let seen: Vec<_> = served.seen().into_iter().map(|seen| (seen.kind, seen.at, seen.len)).collect();
        let expected = [
            (OpKind::Read, 8192, 4096),
            (OpKind::Write, 4096, 4096),
            (asker.arrives_as(OpKind::WriteZeroes), 16384, 1024),
            (OpKind::Discard, 32768, 512),
            (OpKind::Flush, 0, 0),
        ];
        assert_eq!(seen, expected, "{name}");
    });
}

#[test]
fn zeroes_read_back_as_zeroes_and_end_where_they_end() {
    everywhere(Plan::default, |asker, _, name| {
        assert_eq!(asker.ask(&Question::Zeroes(8192, 1536)), Ok(vec![]), "{name}");
        let expected = [fresh(7680, 512), vec![0; 1536], fresh(9728, 512)].concat();
        assert!(asker.ask(&Question::Read(7680, 2560)) == Ok(expected), "{name}");
    });
}

#[test]
fn each_errno_is_told_by_the_interfaces_own_number_and_by_no_other() {
    let errnos = [
        Errno::EIO,
        Errno::ENOSPC,
        Errno::EDQUOT,
        Errno::EFBIG,
        Errno::EROFS,
        Errno::EPERM,
        Errno::EACCES,
        Errno::EINVAL,
        Errno::EOPNOTSUPP,
        Errno::ENXIO,
        Errno::ENOMEM,
        Errno::ETIMEDOUT,
        Errno::ESHUTDOWN,
    ];
    let plan = move || {
        // Two of each kind for each errno: the first fails, the second does not.
        Plan::scripted(move |nth, _| match nth % 2 {
            0 => Act::Fail(errnos[nth / 10]),
            _ => Act::Do,
        })
    };
    everywhere(plan, |asker, _, name| {
        for errno in errnos {
            for question in one_of_each() {
                let expected = asker.number(errno, question.kind());
                assert_eq!(asker.ask(&question), Err(expected), "{name}: {errno} for {question:?}");
                assert!(asker.ask(&question).is_ok(), "{name}: {question:?} after {errno}");
            }
        }
    });
}

#[test]
fn beyond_the_end_nothing_is_done_and_the_storage_is_not_asked() {
    everywhere(Plan::default, |asker, served, name| {
        // Sectors are 55 bits long in two interfaces and bytes 64 in the third: all of these can be said in each.
        for (at, len) in
            [(SIZE, 512), (SIZE - 512, 1024), (0, SIZE + 512), (1 << 62, 512), (u64::MAX - 1023, 512)]
        {
            for question in [
                Question::Read(at, len as usize),
                Question::Write(at, vec![1; len as usize]),
                Question::Zeroes(at, len),
                Question::Discard(at, len),
            ] {
                let expected = asker.refusal(Refused::BeyondTheEnd, question.kind());
                let told = asker.ask(&question);
                assert_eq!(told, Err(expected), "{name}: {:?} of {len} bytes at {at}", question.kind());
            }
        }
        assert_eq!(served.seen(), [], "{name}");
        assert!(
            asker.ask(&Question::Read(SIZE - 512, 512)) == Ok(fresh(SIZE - 512, 512)),
            "{name}: to the end"
        );
    });
}

#[test]
fn a_read_only_disk_refuses_what_would_change_it_and_takes_the_rest() {
    let plan = || Plan { read_only: true, ..Plan::default() };
    everywhere(plan, |asker, _, name| {
        for question in one_of_each() {
            let told = asker.ask(&question);
            match question {
                Question::Read(at, len) => assert!(told == Ok(fresh(at, len)), "{name}"),
                Question::Flush => assert_eq!(told, Ok(vec![]), "{name}"),
                Question::Write(..) | Question::Zeroes(..) | Question::Discard(..) => {
                    let expected = asker.refusal(Refused::ReadOnly, question.kind());
                    assert_eq!(told, Err(expected), "{name}: {:?}", question.kind());
                }
            }
        }
        assert!(
            asker.ask(&Question::Read(4096, 4096)) == Ok(fresh(4096, 4096)),
            "{name}: nothing has changed"
        );
    });
}

#[test]
fn of_many_in_flight_each_is_answered_once_by_its_own_result() {
    // Late ones, failing ones and such as are done at once, in turns that repeat at different lengths.
    let plan = || {
        Plan::scripted(|nth, _| match (nth % 7, nth % 5) {
            (0, _) => Act::Fail(Errno::EIO),
            (_, 1) => Act::Late((nth % 11) as u64 * 300),
            (_, 3) => Act::Late(50),
            _ => Act::Do,
        })
    };
    everywhere(plan, |asker, served, name| {
        let mut done = 0;
        for round in 0..20 {
            let ask = |number: u64| match number % 3 {
                0 => Question::Write(number * 4096, pattern(4096, (round * 16 + number) as u8)),
                1 => Question::Read(512 * 1024 + number * 4096, 4096),
                _ => Question::Flush,
            };
            let questions: Vec<Question> = (0..30).map(ask).collect();
            let names: Vec<u64> = questions.iter().map(|question| asker.send(question)).collect();
            // Answers are waited for in another order than they were asked for.
            let told: Vec<_> = names.iter().rev().map(|name| asker.wait(*name)).collect();
            let failed = told.iter().filter(|told| told.is_err()).count();
            let scripted = (done..done + 30).filter(|nth| nth % 7 == 0).count();
            assert_eq!(failed, scripted, "{name}: in round {round}");
            for (question, told) in questions.iter().zip(told.iter().rev()) {
                match (question, told) {
                    (_, Err(number)) => {
                        assert_eq!(*number, asker.number(Errno::EIO, question.kind()), "{name}");
                    }
                    (Question::Read(at, len), Ok(bytes)) => assert!(*bytes == fresh(*at, *len), "{name}"),
                    (_, Ok(bytes)) => assert!(bytes.is_empty(), "{name}"),
                }
            }
            done += 30;
        }
        assert_eq!(served.seen().len(), 600, "{name}");
    });
}

#[test]
fn a_request_that_storage_works_on_holds_up_no_other() {
    let plan = || Plan::scripted(|nth, _| if nth < 2 { Act::Stick } else { Act::Do });
    everywhere(plan, |asker, served, name| {
        let stuck = [asker.send(&Question::Write(0, vec![9; 4096])), asker.send(&Question::Read(4096, 4096))];
        served.until_seen(2);
        for _ in 0..100 {
            assert!(asker.ask(&Question::Read(65536, 4096)) == Ok(fresh(65536, 4096)), "{name}");
        }
        assert_eq!(asker.ask(&Question::Flush), Ok(vec![]), "{name}");
        served.release();
        assert_eq!(asker.wait(stuck[0]), Ok(vec![]), "{name}");
        assert!(asker.wait(stuck[1]) == Ok(fresh(4096, 4096)), "{name}");
        assert!(asker.ask(&Question::Read(0, 4096)) == Ok(vec![9; 4096]), "{name}");
    });
}

#[test]
fn a_request_that_the_disk_loses_is_answered_as_an_error() {
    let plan = || Plan::scripted(|nth, _| if nth % 2 == 0 { Act::Lose } else { Act::Do });
    everywhere(plan, |asker, _, name| {
        for question in one_of_each() {
            let expected = asker.number(Errno::EIO, question.kind());
            assert_eq!(asker.ask(&question), Err(expected), "{name}: {question:?}");
            assert!(asker.ask(&question).is_ok(), "{name}: {question:?}");
        }
    });
}

#[test]
fn all_interfaces_show_one_disk() {
    let served = Plan::default().serve();
    let names: BTreeSet<&str> = INTERFACES.iter().map(|interface| interface.name).collect();
    assert_eq!(names.len(), INTERFACES.len());
    // A guest has the socket to itself, so one of the virtio interfaces at a time beside all of NBD's.
    for (seed, interface) in INTERFACES.iter().enumerate() {
        let mut asker = (interface.connect)(&served);
        let bytes = pattern(8192, seed as u8);
        assert_eq!(asker.ask(&Question::Write(seed as u64 * 4096, bytes.clone())), Ok(vec![]));
        for other in INTERFACES.iter().filter(|other| other.name.starts_with("NBD")) {
            let told = (other.connect)(&served).ask(&Question::Read(seed as u64 * 4096, 8192));
            assert!(told == Ok(bytes.clone()), "{} after {}", other.name, interface.name);
        }
        let mut client = (INTERFACES[0].connect)(&served);
        assert_eq!(client.ask(&Question::Write(0, pattern(512, !seed as u8))), Ok(vec![]));
        assert!(asker.ask(&Question::Read(0, 512)) == Ok(pattern(512, !seed as u8)), "{}", interface.name);
    }
}
