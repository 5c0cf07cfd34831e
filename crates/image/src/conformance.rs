//! What every image must do, put to it as questions; the expected answers come from a plain array of bytes.

use block::{Buf, Result, Span};
use runtime::{BoxFuture, join_all};
use storage::conformance::Random;
use storage::{Storage, Zeroing};

use crate::Chain;

/// Bytes of the longest request.
const LONGEST: u64 = 200_000;
/// Requests that are made side by side at the most.
const DEPTH: u64 = 8;
/// In so many steps one closes the image and opens it anew.
const REOPEN: u64 = 40;

/// Compares a disk with an array of bytes over `steps` steps drawn from `seed`; in between the disk is closed, and `open`
/// opens it anew. What it shows at first is `bytes`; what it shows at the end comes back, when it is closed.
///
/// # Panics
/// At the first difference, and where anything fails.
pub async fn check(
    mut open: impl AsyncFnMut() -> Chain,
    mut bytes: Vec<u8>,
    seed: u64,
    steps: usize,
) -> Vec<u8> {
    let mut random = Random(seed);
    let mut disk = open().await;
    assert_eq!(disk.size(), bytes.len() as u64, "another size");
    compare(&disk, &bytes, "at first").await;
    for step in 0..steps {
        let context = format!("step {step} of seed {seed}");
        match random.below(REOPEN) {
            0 => {
                expect(disk.close().await, &context);
                drop(disk);
                disk = open().await;
                compare(&disk, &bytes, &format!("{context}, opened anew")).await;
            }
            1 | 2 => expect(disk.flush().await, &context),
            3..=5 => discard(&disk, &mut bytes, &mut random, &context).await,
            6..=8 => extents(&disk, &bytes, &mut random, &context).await,
            9..=15 => {
                let span = random.span(bytes.len() as u64, LONGEST);
                let found = read(&disk, span).await;
                assert!(found == bytes[range(span)], "{context}: other bytes in {span:?}");
            }
            _ => change(&disk, &mut bytes, &mut random, &context).await,
        }
    }
    expect(disk.close().await, "the end");
    drop(disk);
    let disk = open().await;
    compare(&disk, &bytes, "at the end").await;
    expect(disk.close().await, "the very end");
    bytes
}

/// Writes and zeroes, one or several next to each other at the same time: also within one unit of the image.
async fn change(disk: &Chain, bytes: &mut [u8], random: &mut Random, context: &str) {
    let whole = random.span(bytes.len() as u64, LONGEST);
    let count = if random.below(2) == 0 { 1 } else { 1 + random.below(DEPTH) };
    let (mut rest, mut parts): (Span, Vec<BoxFuture<'_, Result<()>>>) = (whole, Vec::new());
    for number in (1..=count).rev() {
        let (part, others) = rest.split_at(rest.at() + rest.len() / number);
        rest = others;
        if part.is_empty() {
            continue;
        }
        let into = &mut bytes[range(part)];
        match random.below(6) {
            0 => {
                into.fill(0);
                let how = Zeroing { unmap: random.below(2) == 0, fast: false };
                parts.push(disk.zero(part, how));
            }
            kind => {
                // Zeroes are bytes as any others.
                into.fill_with(|| if kind == 1 { 0 } else { random.draw() as u8 });
                parts.push(disk.write(part.at(), Buf::from_bytes(into)));
            }
        }
    }
    for result in join_all(parts).await {
        expect(result, context);
    }
    let found = read(disk, whole).await;
    assert!(found == bytes[range(whole)], "{context}: other bytes in {whole:?} after {count} changes");
}

/// Discarded bytes may be anything: what they are then is what they stay.
async fn discard(disk: &Chain, bytes: &mut [u8], random: &mut Random, context: &str) {
    let span = random.span(bytes.len() as u64, LONGEST);
    expect(disk.discard(span).await, context);
    let found = read(disk, span).await;
    bytes[range(span)].copy_from_slice(&found);
}

async fn extents(disk: &Chain, bytes: &[u8], random: &mut Random, context: &str) {
    let span = random.span(bytes.len() as u64, LONGEST);
    let runs = disk.extents(span).await.unwrap_or_else(|error| panic!("{context}: {error}"));
    let mut at = span.at();
    for run in runs {
        assert!(run.len > 0, "{context}: an empty run");
        let end = at + run.len;
        assert!(end <= span.end(), "{context}: runs beyond the request");
        let zeroes = bytes[at as usize..end as usize].iter().all(|byte| *byte == 0);
        assert!(!run.zero || zeroes, "{context}: data at {at} is said to be zero");
        at = end;
    }
    assert!(at > span.at(), "{context}: no run at all");
}

async fn compare(disk: &Chain, bytes: &[u8], context: &str) {
    let whole = Span::new(0, bytes.len() as u64).expect("a disk");
    let found = read(disk, whole).await;
    if let Some(at) = found.iter().zip(bytes).position(|(found, byte)| found != byte) {
        panic!("{context}: byte {at} is {:#x} and should be {:#x}", found[at], bytes[at]);
    }
}

async fn read(disk: &Chain, span: Span) -> Vec<u8> {
    let buf = Buf::zeroed(span.len() as usize);
    buf.fill(0xa5);
    expect(disk.read(span.at(), buf.clone()).await, "reading");
    buf.to_vec()
}

fn range(span: Span) -> std::ops::Range<usize> {
    span.at() as usize..span.end() as usize
}

fn expect(result: Result<()>, context: &str) {
    result.unwrap_or_else(|error| panic!("{context}: {error}"));
}
