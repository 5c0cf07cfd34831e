//! The driver of libblkio (`virtio-driver`): somebody else's idea of rings and requests.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost_client::Memory;
use virtio_driver::{
    EventFd, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};

use crate::disk::{Act, byte_at};
use crate::serve::Plan;

const MEMORY: u64 = 4 << 20;

/// A device with all that the driver knows.
struct Device {
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    calls: Vec<Arc<EventFd>>,
    memory: Memory,
    transport: Box<VirtioBlkTransport>,
}

impl Device {
    fn connect(path: &Path, queues: usize, queue_len: u16, event_idx: bool) -> Device {
        let mut features = VirtioFeatureFlags::VERSION_1;
        features.set(VirtioFeatureFlags::RING_EVENT_IDX, event_idx);
        let features = features.bits() | VirtioBlkFeatureFlags::all().bits();
        let transport = VhostUser::new(path.to_str().unwrap(), features).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let made = VirtioBlkQueue::setup_queues(&mut *transport, queues, queue_len).unwrap();
        let memory = Memory::new(MEMORY).unwrap();
        let (address, len) = (memory.address() as usize, MEMORY as usize);
        transport.map_mem_region(address, len, memory.as_raw_fd(), 0).unwrap();
        let calls = (0..queues).map(|queue| transport.get_completion_fd(queue)).collect();
        let mut device = Device { queues: made, calls, memory, transport };
        device.queues.iter_mut().for_each(|queue| queue.set_used_notif_enabled(true));
        device
    }

    /// Kicks, and waits for so many answers: what they belong to, and their results.
    fn finish(&mut self, queue: usize, count: usize) -> Vec<(usize, i32)> {
        if self.queues[queue].avail_notif_needed() {
            self.transport.get_submission_notifier(queue).notify().unwrap();
        }
        let (mut answers, started) = (Vec::new(), Instant::now());
        loop {
            let new = self.queues[queue].completions().map(|answer| (answer.context, answer.ret));
            answers.extend(new);
            if answers.len() >= count {
                assert_eq!(answers.len(), count);
                return answers;
            }
            assert!(started.elapsed() < Duration::from_secs(40), "no answer");
            let mut calls = [PollFd::new(&self.calls[queue], PollFlags::IN)];
            if poll(&mut calls, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })).unwrap() > 0 {
                self.calls[queue].read().unwrap();
            }
        }
    }

    fn one(&mut self, queue: usize) -> i32 {
        self.finish(queue, 1)[0].1
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 ^ (at / 512) as u8 ^ seed).collect()
}

const EIO: i32 = -5;

#[test]
fn every_kind_of_request_is_done_with_and_without_event_indices() {
    for event_idx in [false, true] {
        let served = Plan::default().serve();
        let mut device = Device::connect(&served.vhost(), 1, 128, event_idx);
        let config = device.transport.get_config().unwrap();
        assert_eq!((config.capacity.to_native(), config.blk_size.to_native()), (2048, 512));
        device.memory.slice()[..8192].copy_from_slice(&pattern(8192, 1));
        device.queues[0].write(4096, &device.memory.slice()[..8192], 0).unwrap();
        assert_eq!(device.one(0), 0);
        device.queues[0].flush(0).unwrap();
        assert_eq!(device.one(0), 0);
        device.queues[0].write_zeroes(4096, 512, true, 0).unwrap();
        assert_eq!(device.one(0), 0);
        device.queues[0].discard(4608, 512, 0).unwrap();
        assert_eq!(device.one(0), 0);
        device.queues[0].read(4096, &mut device.memory.slice()[16384..24576], 0).unwrap();
        assert_eq!(device.one(0), 0);
        let expected = [&[0; 1024], &pattern(8192, 1)[1024..]].concat();
        assert!(device.memory.get(16384, 8192) == expected);
        device.queues[0].read((1 << 20) - 512, &mut device.memory.slice()[..1024], 0).unwrap();
        assert_eq!(device.one(0), EIO);
        device.queues[0].write_zeroes(1 << 20, 512, false, 0).unwrap();
        assert_eq!(device.one(0), EIO);
        assert_eq!(served.seen().len(), 5);
    }
}

#[test]
fn every_length_and_alignment_of_memory_is_served() {
    let served = Plan::default().serve();
    let mut device = Device::connect(&served.vhost(), 1, 128, true);
    for len in [512, 1024, 1536, 4096, 4608, 65536, 131_072, 524_288] {
        for skew in [0, 1, 4, 8, 16, 511, 512, 2048, 4095] {
            let bytes = pattern(len, skew as u8);
            device.memory.slice()[skew..skew + len].copy_from_slice(&bytes);
            device.queues[0].write(512, &device.memory.slice()[skew..skew + len], 0).unwrap();
            assert_eq!(device.one(0), 0);
            let into = (2 << 20) + skew;
            device.queues[0].read(512, &mut device.memory.slice()[into..into + len], 0).unwrap();
            assert_eq!(device.one(0), 0);
            assert!(device.memory.get(into as u64, len) == bytes, "{len} bytes, {skew} off");
        }
    }
}

#[test]
fn full_queues_are_answered_in_any_order() {
    let late = |nth: usize, _: &_| match nth % 4 {
        0 => Act::Late(500),
        1 => Act::Late(10),
        _ => Act::Do,
    };
    for event_idx in [false, true] {
        let served = Plan::scripted(late).serve();
        let mut device = Device::connect(&served.vhost(), 3, 64, event_idx);
        for round in 0..40 {
            // A read takes three descriptors.
            for queue in 0..3 {
                for number in 0..21 {
                    let (at, into) = ((queue * 21 + number) * 8192, (queue * 21 + number) * 4096);
                    let piece = &mut device.memory.slice()[into..into + 4096];
                    piece.fill(round);
                    device.queues[queue].read(at as u64, piece, number).unwrap();
                }
            }
            for queue in 0..3 {
                let mut answers = device.finish(queue, 21);
                answers.sort_unstable();
                assert!(answers.iter().enumerate().all(|(number, answer)| *answer == (number, 0)));
                for number in 0..21 {
                    let (at, into) = ((queue * 21 + number) * 8192, (queue * 21 + number) * 4096);
                    let expected: Vec<u8> = (at..at + 4096).map(|at| byte_at(at as u64)).collect();
                    assert!(device.memory.get(into as u64, 4096) == expected, "round {round}");
                }
            }
        }
    }
}
