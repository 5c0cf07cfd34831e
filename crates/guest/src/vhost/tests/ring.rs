//! Rings: what is taken from them, what stops them, and who is woken when (virtio 1.2, section 2.7).

use std::rc::Rc;

use super::super::queue::Taken;
use super::super::ring::{Addresses, Ring, RingError, Ways};
use super::desk::{DATA, Desk, HEADER, Outcome, RING, STATUS, TABLE, WAYS};
use super::driver::{Driver, INDIRECT, NEXT, Part, WRITE, descriptor, header};
use super::ram::{Ram, USER};

const READ: [Part; 3] = [(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)];

fn asked() -> Result<Outcome, RingError> {
    Ok(Outcome::Asked(vec!["read at 0 into [512]".into()]))
}

#[test]
fn indices_wrap_around() {
    for (size, start) in [(4, u16::MAX - 5), (1, 65530), (256, 65000)] {
        let mut desk = Desk::with(WAYS, size, start, None);
        for nth in 0..2000u16 {
            let head = desk.driver.indirect(TABLE, &READ);
            assert_eq!(desk.offer(head), asked());
            desk.answer(head, Ok(()));
            assert!(desk.queue.publish());
            assert_eq!(desk.driver.take_used(), [(head, 513)]);
            assert_eq!(desk.queue.base(), start.wrapping_add(nth + 1));
        }
    }
}

#[test]
fn answers_come_in_any_order_and_are_shown_together() {
    let mut desk = Desk::new();
    let heads: Vec<u16> = (0..5).map(|nth| desk.driver.indirect(TABLE + 64 * nth, &READ)).collect();
    for head in &heads {
        desk.driver.offer(*head);
    }
    for head in &heads {
        assert_eq!(desk.take_request().0, *head);
    }
    assert!(matches!(desk.take(), Ok(Taken::Nothing)));
    for head in [heads[3], heads[0], heads[4]] {
        desk.answer(head, Ok(()));
    }
    assert!(desk.driver.take_used().is_empty());
    assert!(desk.queue.publish());
    assert_eq!(desk.driver.take_used(), [(heads[3], 513), (heads[0], 513), (heads[4], 513)]);
    assert_eq!(desk.driver.out(), 2);
}

#[test]
fn chains_through_a_table_and_around_the_ring() {
    let mut desk = Desk::new();
    desk.ram.write(HEADER, &header(0, 0));
    let head = desk.driver.indirect(TABLE, &READ);
    assert_eq!(desk.offer(head), asked());
    // At an odd address, and across two regions.
    for table in [TABLE + 0x101, 0x40000 - 24, 0x40000 - 7] {
        let head = desk.driver.indirect(table, &READ);
        assert_eq!(desk.offer(head), asked());
    }
    // Descriptors in front of one with a table: 2.7.5.3.2, "zero or more normal chained descriptors". Its flag for
    // writing is ignored.
    desk.ram.write(TABLE, &descriptor(DATA, 512, WRITE | NEXT, 1));
    desk.ram.write(TABLE + 16, &descriptor(STATUS, 1, WRITE, 0));
    desk.driver.put_descriptor(9, HEADER, 16, NEXT, 15);
    desk.driver.put_descriptor(15, TABLE, 32, INDIRECT | WRITE, 0);
    assert_eq!(desk.offer(9), asked());
    // What a table has behind the end of the chain is nobody's business.
    desk.ram.write(TABLE + 32, &[0xff; 64]);
    desk.driver.put_descriptor(8, HEADER, 16, NEXT, 14);
    desk.driver.put_descriptor(14, TABLE, 96, INDIRECT, 0);
    assert_eq!(desk.offer(8), asked());
}

#[test]
fn a_chain_may_be_as_long_as_the_ring() {
    let mut desk = Desk::new();
    desk.ram.write(HEADER, &header(0, 0));
    let mut parts: Vec<Part> = (0..16).map(|nth| (HEADER + nth, 1, false)).collect();
    parts[15] = (STATUS, 1, true);
    parts[14] = (HEADER + 14, 2, false);
    let head = desk.driver.chain(&parts);
    assert!(matches!(desk.offer(head), Ok(Outcome::Asked(_))));
}

/// What a ring says to this, where descriptors 0 to 2 hold a good request that is offered next.
fn error(spoil: impl FnOnce(&mut Desk)) -> RingError {
    let mut desk = Desk::new();
    desk.ram.write(HEADER, &header(0, 0));
    let head = desk.driver.chain(&READ);
    assert_eq!(head, 0);
    spoil(&mut desk);
    desk.offer(head).unwrap_err()
}

#[test]
fn chains_that_make_no_sense_stop_the_ring() {
    let size = 16;
    assert_eq!(error(|d| d.driver.put_descriptor(0, HEADER, 16, NEXT, 0)), RingError::Circle(16));
    assert_eq!(error(|d| d.driver.put_descriptor(2, STATUS, 1, WRITE | NEXT, 1)), RingError::Circle(16));
    assert_eq!(
        error(|d| d.driver.put_descriptor(0, HEADER, 16, NEXT, 16)),
        RingError::Next { next: 16, size }
    );
    let next = u16::MAX;
    assert_eq!(
        error(|d| d.driver.put_descriptor(1, DATA, 512, WRITE | NEXT, next)),
        RingError::Next { next, size }
    );
    assert_eq!(error(|d| d.driver.put_descriptor(0, DATA, 512, WRITE | NEXT, 2)), RingError::Header(0));
    assert_eq!(error(|d| d.driver.put_descriptor(2, STATUS, 1, 0, 0)), RingError::Order);
}

#[test]
fn tables_that_make_no_sense_stop_the_ring() {
    let with_table = |len: u32, flags: u16, spoil: &dyn Fn(&Desk)| {
        error(|desk| {
            desk.ram.write(TABLE, &descriptor(HEADER, 16, NEXT, 1));
            desk.ram.write(TABLE + 16, &descriptor(DATA, 512, NEXT | WRITE, 2));
            desk.ram.write(TABLE + 32, &descriptor(STATUS, 1, WRITE, 0));
            desk.driver.put_descriptor(0, TABLE, len, flags, 3);
            spoil(desk);
        })
    };
    for len in [0, 1, 15, 17, 47, 16 * 1025, u32::MAX, u32::MAX - 15] {
        assert_eq!(with_table(len, INDIRECT, &|_| {}), RingError::Table(len));
    }
    assert_eq!(with_table(48, INDIRECT | NEXT, &|_| {}), RingError::NotLast);
    assert_eq!(with_table(32, INDIRECT, &|_| {}), RingError::Next { next: 2, size: 2 });
    let spoil = |at: u64, bytes: Vec<u8>| move |desk: &Desk| desk.ram.write(at, &bytes);
    let nested = spoil(TABLE + 16, descriptor(DATA, 512, INDIRECT, 0));
    assert_eq!(with_table(48, INDIRECT, &nested), RingError::Nested);
    let circle = spoil(TABLE + 32, descriptor(STATUS, 1, WRITE | NEXT, 1));
    assert_eq!(with_table(48, INDIRECT, &circle), RingError::Circle(3));
    for at in [0x7fff0, 0x80000, u64::MAX - 15, u64::MAX - 47] {
        let outside = |desk: &Desk| desk.driver.put_descriptor(0, at, 48, INDIRECT, 0);
        let error = with_table(48, INDIRECT, &outside);
        assert!(error.to_string().starts_with("a table of descriptors: 48 bytes at"), "{error}");
    }
}

#[test]
fn a_table_that_was_not_negotiated_stops_the_ring() {
    let mut desk = Desk::with(Ways { indirect: false, event_idx: false }, 16, 0, None);
    let head = desk.driver.indirect(TABLE, &READ);
    assert_eq!(desk.offer(head), Err(RingError::Indirect));
}

#[test]
fn indices_and_heads_that_cannot_be_stop_the_ring() {
    for jump in [17, 18, 1000, 32768, u16::MAX] {
        let mut desk = Desk::with(WAYS, 16, 7, None);
        desk.ram.put16(desk.driver.avail + 2, 7u16.wrapping_add(jump));
        let found = 7u16.wrapping_add(jump);
        assert!(matches!(desk.take(), Err(RingError::Index { found: f, next: 7, size: 16 }) if f == found));
    }
    for head in [16, 17, 255, u16::MAX] {
        let mut desk = Desk::new();
        assert_eq!(desk.offer(head), Err(RingError::Head { head, size: 16 }));
    }
}

#[test]
fn a_head_that_is_out_cannot_be_made_available_again() {
    let mut desk = Desk::new();
    desk.ram.write(HEADER, &header(0, 0));
    let head = desk.driver.chain(&READ);
    assert_eq!(desk.offer(head), asked());
    desk.driver.offer(head);
    assert!(matches!(desk.take(), Err(RingError::Duplicate(0))));
    // It still has its one answer.
    desk.answer(head, Ok(()));
    desk.queue.publish();
    assert_eq!(desk.driver.take_used(), [(head, 513)]);

    // Answered, but the driver cannot know yet.
    let mut desk = Desk::new();
    let head = desk.driver.chain(&READ);
    assert_eq!(desk.offer(head), asked());
    desk.answer(head, Ok(()));
    desk.driver.offer(head);
    assert!(matches!(desk.take(), Err(RingError::Duplicate(0))));
    desk.queue.publish();
    assert_eq!(desk.driver.take_used(), [(head, 513)]);
}

#[test]
fn without_event_indices_kicks_are_silenced_while_we_look() {
    let mut desk = Desk::new();
    for nth in 0..3 {
        assert!(!desk.queue.arm());
        assert_eq!(desk.driver.used_flags(), 0);
        let head = desk.driver.indirect(TABLE + 64 * nth, &READ);
        assert_eq!(desk.offer(head), asked());
        assert_eq!(desk.driver.used_flags(), 1, "VIRTQ_USED_F_NO_NOTIFY");
    }
    assert!(!desk.queue.arm());
    assert_eq!(desk.driver.used_flags(), 0);
    let head = desk.driver.indirect(TABLE + 192, &READ);
    desk.driver.offer(head);
    assert!(desk.queue.has_news());
    assert!(desk.queue.arm(), "what came before the driver was asked to kick");
}

#[test]
fn with_event_indices_the_next_index_is_asked_for() {
    let mut desk = Desk::with(Ways { event_idx: true, ..WAYS }, 16, 65534, None);
    assert!(!desk.queue.arm());
    assert_eq!(desk.driver.avail_event(), 65534);
    for next in [65535, 0, 1] {
        let head = desk.driver.indirect(TABLE + 64 * u64::from(next & 3), &READ);
        assert_eq!(desk.offer(head), asked());
        assert!(!desk.queue.arm());
        assert_eq!(desk.driver.avail_event(), next);
    }
    assert_eq!(desk.driver.used_flags(), 0, "2.7.10: the flags are 0 where event indices are used");
}

#[test]
fn a_driver_that_wants_no_signal_gets_none() {
    let mut desk = Desk::new();
    let mut answer = |flags: u16| {
        desk.driver.put_avail_flags(flags);
        let head = desk.driver.indirect(TABLE, &READ);
        assert_eq!(desk.offer(head), asked());
        desk.answer(head, Ok(()));
        let signalled = desk.queue.publish();
        assert_eq!(desk.driver.take_used().len(), 1);
        signalled
    };
    assert!(answer(0));
    assert!(!answer(1), "VIRTQ_AVAIL_F_NO_INTERRUPT");
    assert!(answer(2), "other flags have no meaning");
    assert!(!answer(1));
    assert!(answer(0));
    assert!(!desk.queue.publish(), "nothing was answered");
}

#[test]
fn a_signal_is_given_when_the_event_index_is_passed() {
    // (used index before, answers, event index, signal): 2.7.10.1, "if used_event is in the range of what was added".
    let table = [
        (10, 1, 10, true),
        (10, 1, 11, false),
        (10, 1, 9, false),
        (10, 3, 12, true),
        (10, 3, 13, false),
        (10, 3, 10, true),
        (65534, 1, 65534, true),
        (65534, 4, 65535, true),
        (65534, 4, 0, true),
        (65534, 4, 1, true),
        (65534, 4, 2, false),
        (65534, 4, 65533, false),
        (65534, 4, 40000, false),
        (0, 16, 15, true),
        (0, 16, 16, false),
    ];
    for (before, answers, event, expected) in table {
        let index: u16 = before;
        let mut desk = Desk::with(Ways { event_idx: true, ..WAYS }, 16, index.wrapping_sub(1), None);
        let answer = |desk: &mut Desk, count: u16| {
            let heads: Vec<u16> =
                (0..count).map(|nth| desk.driver.indirect(TABLE + 64 * u64::from(nth), &READ)).collect();
            for head in heads {
                assert_eq!(desk.offer(head), asked());
                desk.answer(head, Ok(()));
            }
            let signalled = desk.queue.publish();
            assert_eq!(desk.driver.take_used().len(), usize::from(count));
            signalled
        };
        desk.driver.put_used_event(event);
        assert!(answer(&mut desk, 1), "of what was signalled before nothing is known at first");
        let before = format!("from {before}, {answers} answers, event {event}");
        assert_eq!(answer(&mut desk, answers), expected, "{before}");
    }
}

#[test]
fn rings_outside_of_the_memory_are_refused() {
    let ram = Rc::new(Ram::new(&[(0x10000, 0x10000)]));
    let memory = ram.memory();
    let good = Driver::new(&ram, 0x10000, 256, 0).addresses();
    assert!(Ring::new(&memory, good, 256, WAYS).is_ok());
    let end = USER + 0x20000;
    let bad = |spoil: &dyn Fn(&mut Addresses), what: &str| {
        let mut addresses = good;
        spoil(&mut addresses);
        let error = Ring::new(&memory, addresses, 256, WAYS).err().unwrap().to_string();
        assert!(error.contains(what), "{error}");
    };
    bad(&|a| a.descriptors = end - 16 * 255, "descriptors: 4096 bytes");
    bad(&|a| a.descriptors = 0, "descriptors: 4096 bytes");
    bad(&|a| a.descriptors = u64::MAX - 15, "descriptors: 4096 bytes");
    bad(&|a| a.avail = end - 514, "available ring: 516 bytes");
    bad(&|a| a.used = end - 2048, "used ring: 2052 bytes");
    bad(&|a| a.descriptors += 8, "descriptors at 0x7f1234010008, which is no multiple of 16");
    bad(&|a| a.avail += 1, "which is no multiple of 2");
    bad(&|a| a.used += 2, "which is no multiple of 4");
    // Up to the last byte.
    let mut last = good;
    last.used = end - 2052;
    assert!(Ring::new(&memory, last, 256, WAYS).is_ok());
    assert!(Ring::new(&memory, last, 256, Ways { event_idx: true, ..WAYS }).is_err());
}

#[test]
fn a_ring_moves_with_its_memory() {
    let mut desk = Desk::new();
    desk.ram.write(HEADER, &header(0, 0));
    let (first, second) = (desk.driver.indirect(TABLE, &READ), desk.driver.indirect(TABLE + 64, &READ));
    assert_eq!(desk.offer(first), asked());
    // The same guest, elsewhere: what the driver writes from now on is there.
    let ram = Rc::new(Ram::new(&super::desk::PARTS));
    ram.write(0, &desk.ram.read(0, 0x10000));
    desk.memory = ram.memory();
    desk.driver.ram = ram.clone();
    let addresses = desk.driver.addresses();
    desk.queue.move_to(&desk.memory, addresses).unwrap();
    desk.ram = ram;
    assert_eq!(desk.offer(second), asked());
    desk.answer(first, Ok(()));
    desk.answer(second, Ok(()));
    desk.queue.publish();
    assert_eq!(desk.driver.take_used(), [(first, 513), (second, 513)]);
    let gone = Addresses { used: RING, ..addresses };
    assert!(desk.queue.move_to(&desk.memory, gone).is_err());
}
