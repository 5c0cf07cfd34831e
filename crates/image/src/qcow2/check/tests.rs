//! Tests that need little memory for counts, so that a small image is walked through many times.

use storage::Ram;

use super::*;
use crate::qcow2::{Create, Preallocation, create, take_snapshot};

fn now<T>(io: impl Future<Output = T>) -> T {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(io).as_mut().poll(&mut cx) {
        std::task::Poll::Ready(result) => result,
        std::task::Poll::Pending => panic!("memory never waits"),
    }
}

#[test]
fn an_image_that_is_walked_through_many_times_is_checked_and_repaired_as_any() {
    let file: Rc<dyn Storage> = Rc::new(Ram::new(0));
    let options = Create {
        size: 4 << 20,
        cluster_size: 512,
        preallocation: Preallocation::Metadata,
        ..Create::default()
    };
    now(create(&file, &options)).unwrap();
    let header = now(Header::read(&file)).unwrap();
    let mut counter = clusters(&header);
    let mut walks = 1;
    loop {
        now(sweep_once(&file, &header, &mut counter));
        if !counter.advance() {
            break;
        }
        walks += 1;
    }
    assert!(walks > 5, "{walks}");
    let report = now(check(&file, Repair::No)).unwrap();
    assert!(report.is_clean(), "{report:#?}");
    assert_eq!((report.allocated_clusters, report.fragmented_clusters), (8192, 0));

    // A leak and a lost count in each block of counts.
    let len = header.refcount_table_clusters as usize * 512;
    let table = now(super::super::bytes::read(&file, header.refcount_table_at, len)).unwrap();
    let blocks: Vec<u64> = walk::words(&table).filter(|at| *at != 0).collect();
    assert_eq!(blocks.len(), 33);
    for at in &blocks[..32] {
        now(super::super::bytes::write(&file, *at, &[0, 7, 0, 0])).unwrap();
    }
    let report = now(check(&file, Repair::No)).unwrap();
    // Each wrong count of data makes its mark wrong too; the first two clusters and the blocks' have none.
    assert_eq!(report.leaks, 32);
    assert!((32..=96).contains(&report.corruptions), "{report:#?}");
    let fixed = now(check(&file, Repair::All)).unwrap();
    assert!(fixed.is_clean() && fixed.leaks_fixed == 32, "{fixed:#?}");

    // No blocks at all: they are made anew.
    now(super::super::bytes::write(&file, header.refcount_table_at, &vec![0; len])).unwrap();
    assert!(now(check(&file, Repair::All)).unwrap().is_clean());
    now(take_snapshot(&file, "one", std::time::Duration::ZERO)).unwrap();
    let report = now(check(&file, Repair::No)).unwrap();
    assert!(report.is_clean(), "{report:#?}");
}

async fn sweep_once(file: &Rc<dyn Storage>, header: &Header, counter: &mut Counter) {
    let (mut report, plan) = (Report::default(), Plan::default());
    let mut walk = Walk::new(file, header, &mut report, &plan);
    walk.references(counter, Entries::Known, None).await.unwrap();
}
