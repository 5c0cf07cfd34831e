//! Memory: several regions, and regions that come and go while they are in use.

use vhost_client::{Driver, Request, Status, Wish};

use crate::disk::{Act, byte_at};
use crate::serve::Plan;

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 ^ (at / 512) as u8 ^ seed).collect()
}

#[test]
fn pieces_and_tables_may_lie_in_any_region() {
    let served = Plan::default().serve();
    for regions in [2, 5, 8] {
        for slots in [true, false] {
            let wish = Wish { regions, region_len: 1 << 20, slots, ..Wish::default() };
            let mut driver = Driver::connect(&served.vhost(), &wish).unwrap();
            // The pieces of a request are spread over the regions one by one, its table comes last.
            for count in 1..12 {
                let cuts = vec![512; count];
                let bytes = pattern(512 * count, count as u8);
                let out = [&[16][..], &cuts].concat();
                let write = Request::write(0, &bytes).cut_out(&out).indirect();
                assert_eq!(driver.ask(&write).unwrap().status, Status::OK);
                let read = Request::read(0, bytes.len()).cut_in(&cuts).indirect();
                assert!(driver.ask(&read).unwrap().bytes == bytes, "{count} pieces in {regions} regions");
            }
        }
    }
}

#[test]
fn the_table_of_regions_may_be_replaced_while_requests_are_with_storage() {
    let served = Plan::scripted(|nth, _| Act::Late((nth % 4) as u64 * 1500)).serve();
    let wish = Wish { regions: 3, slots: false, ..Wish::default() };
    let mut driver = Driver::connect(&served.vhost(), &wish).unwrap();
    for round in 0..30_u64 {
        let write = |number: u64| Request::write(number * 8192, &pattern(4096, (round + number) as u8));
        let writes: Vec<_> = (0..20).map(|number| driver.send(0, &write(number)).unwrap()).collect();
        let read = |number: u64| Request::read(512 * 1024 + number * 4096, 4096).cut_in(&[1024, 1024]);
        let reads: Vec<_> = (0..8).map(|number| driver.send(0, &read(number)).unwrap()).collect();
        driver.replace_memory().unwrap();
        for (number, ticket) in reads.into_iter().enumerate() {
            let at = 512 * 1024 + number as u64 * 4096;
            let expected: Vec<u8> = (at..at + 4096).map(byte_at).collect();
            let answer = driver.wait(ticket).unwrap();
            assert!(answer.status == Status::OK && answer.bytes == expected, "round {round}");
        }
        assert!(driver.wait_all(&writes).unwrap().iter().all(|answer| answer.status == Status::OK));
        let (number, expected) = (round % 20, pattern(4096, (round + round % 20) as u8));
        assert!(driver.ask(&Request::read(number * 8192, 4096)).unwrap().bytes == expected);
    }
}

#[test]
fn regions_come_and_go_while_requests_are_with_storage() {
    let served = Plan::scripted(|_, _| Act::Late(1000)).serve();
    let mut driver = Driver::connect(&served.vhost(), &Wish::default()).unwrap();
    for round in 0..20 {
        let before: Vec<_> =
            (0..10).map(|number| driver.send(0, &Request::read(number * 4096, 4096)).unwrap()).collect();
        driver.add_region().unwrap();
        // Every second piece lies there.
        let write = Request::write(1 << 19, &pattern(4096, round)).cut_out(&[16, 512, 512]);
        assert_eq!(driver.ask(&write).unwrap().status, Status::OK);
        let read = Request::read(1 << 19, 4096).cut_in(&[512, 512, 512]);
        let late = driver.send(0, &read).unwrap();
        assert!(driver.wait(late).unwrap().bytes == pattern(4096, round));
        driver.remove_region().unwrap();
        for (number, answer) in driver.wait_all(&before).unwrap().into_iter().enumerate() {
            let at = number as u64 * 4096;
            assert!(answer.bytes == (at..at + 4096).map(byte_at).collect::<Vec<u8>>(), "round {round}");
        }
    }
}

#[test]
fn a_region_that_goes_with_a_request_in_it_is_kept_until_that_is_done() {
    // Its memory is unmapped here; the server's mapping of it must live until the storage is done with it.
    let served = Plan::scripted(|nth, _| if nth == 0 { Act::Stick } else { Act::Do }).serve();
    let mut driver = Driver::connect(&served.vhost(), &Wish::default()).unwrap();
    driver.add_region().unwrap();
    // Header and status are in the first region, the payload in the second.
    let stuck = driver.send(0, &Request::write(0, &pattern(4096, 1))).unwrap();
    served.until_seen(1);
    driver.remove_region().unwrap();
    served.release();
    assert_eq!(driver.wait(stuck).unwrap().status, Status::OK);
    let answer = driver.ask(&Request::read(0, 4096)).unwrap();
    assert!(answer.status == Status::OK && answer.bytes == pattern(4096, 1));
}
