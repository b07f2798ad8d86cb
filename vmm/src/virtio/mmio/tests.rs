use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::ending::Cause;
use crate::virtio::testing::{Guest, REGIONS, eventfd, memory};
use crate::virtio::{ActivateError, read_bytes};

/// A device that notes what happens to it.
#[derive(Default)]
struct Record {
    activated: Option<Activation>,
    resets: usize,
    config: Vec<u8>,
    fails: Option<fn() -> ActivateError>,
}

#[derive(Clone, Default)]
struct Probe(Arc<Mutex<Record>>);

impl VirtioDevice for Probe {
    fn device_id(&self) -> u32 {
        42
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 64]
    }

    fn features(&self) -> u64 {
        0b101
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut record = self.0.lock().unwrap();
        record.config = [&[offset as u8], data].concat();
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut record = self.0.lock().unwrap();
        assert!(record.activated.is_none(), "activated twice");
        if let Some(error) = record.fails {
            return Err(error());
        }
        record.activated = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        let mut record = self.0.lock().unwrap();
        record.activated = None;
        record.resets += 1;
    }
}

fn transport(probe: &Probe) -> MmioTransport {
    let memory = GuestMemory::new(memory());
    let ending = Arc::new(Ending::new().unwrap());
    let starter = Arc::new(Starter::new().unwrap());
    MmioTransport::new(Box::new(probe.clone()), memory, eventfd(), ending, starter).unwrap()
}

fn read(transport: &mut MmioTransport, offset: u64) -> u32 {
    let mut data = [0xaa; 4];
    transport.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(transport: &mut MmioTransport, offset: u64, value: u32) {
    transport.write(offset, &value.to_le_bytes());
}

#[test]
fn a_driver_brings_it_up_and_down() {
    let probe = Probe::default();
    let mut guest = Guest::start(Box::new(probe.clone()), 128);
    assert_eq!(guest.status(), 15);
    {
        let record = probe.0.lock().unwrap();
        let activation = record.activated.as_ref().unwrap();
        assert_eq!(
            activation.features,
            0b101 | RING_FEATURES | 1 << VIRTIO_F_VERSION_1
        );
        let sizes: Vec<u16> = activation
            .queues
            .iter()
            .map(|q| q.as_ref().unwrap().queue.size())
            .collect();
        assert_eq!(sizes, [128, 64]);
        assert!(
            activation.queues[0]
                .as_ref()
                .unwrap()
                .queue
                .event_idx_enabled()
        );
    }
    guest.kick(1);
    assert_eq!(guest.transport.queue_kicks()[1].read().unwrap(), 1);
    guest.kick(2);
    guest.kick(u32::MAX as usize);
    guest.write32(0x70, 0);
    assert_eq!(guest.status(), 0);
    assert!(probe.0.lock().unwrap().activated.is_none());
    assert_eq!(guest.read32(0x44), 0);
    guest.bring_up(16);
    assert!(probe.0.lock().unwrap().activated.is_some());
}

#[test]
fn interrupts_are_edges_with_a_status() {
    let probe = Probe::default();
    let mut guest = Guest::start(Box::new(probe.clone()), 16);
    let interrupt = probe
        .0
        .lock()
        .unwrap()
        .activated
        .as_ref()
        .unwrap()
        .interrupt
        .clone();
    interrupt.signal_queue(0);
    assert_eq!(guest.read32(0x60), 1);
    let generation = guest.read32(0xfc);
    interrupt.signal_config();
    assert_eq!(guest.read32(0x60), 3);
    assert_ne!(guest.read32(0xfc), generation);
    guest.write32(0x64, 1);
    assert_eq!(guest.read32(0x60), 2);
    interrupt.signal_failed();
    assert_eq!(guest.status(), 15 | 0x40);
    // A driver that reads, ors and writes does not disturb it.
    guest.write32(0x70, 15 | 0x40);
    assert_eq!(guest.status(), 15 | 0x40);
    guest.write32(0x70, 0);
    assert_eq!((guest.status(), guest.read32(0x60)), (0, 0));
}

#[test]
fn features_are_refused_without_version_1_or_unoffered() {
    for (page0, page1) in [(0b101, 0), (0b111, 1), (0, 3)] {
        let mut t = transport(&Probe::default());
        write(&mut t, 0x70, 1);
        write(&mut t, 0x70, 3);
        for (page, bits) in [(0, page0), (1, page1)] {
            write(&mut t, 0x24, page);
            write(&mut t, 0x20, bits);
        }
        write(&mut t, 0x70, 11);
        assert_eq!(read(&mut t, 0x70), 3, "{page0:#x} {page1:#x}");
    }
}

#[test]
fn rungs_cannot_be_skipped_and_queues_not_moved_while_running() {
    let probe = Probe::default();
    let mut t = transport(&probe);
    for status in [2, 3, 4, 8, 11, 15] {
        write(&mut t, 0x70, status);
        assert_eq!(read(&mut t, 0x70), 0);
    }
    let mut guest = Guest::start(Box::new(probe.clone()), 16);
    guest.write32(0x30, 0);
    guest.write32(0x44, 0);
    guest.write32(0x20, 0);
    assert_eq!((guest.read32(0x44), guest.status()), (1, 15));
    // FAILED: only a reset leads on.
    guest.write32(0x70, 0x80);
    assert_eq!(guest.status(), 0x8f);
    guest.write32(0x70, 1);
    assert_eq!(guest.status(), 0x8f);
    guest.write32(0x70, 0);
    assert_eq!(guest.status(), 0);
}

#[test]
fn a_queue_outside_memory_or_a_failed_start_asks_for_a_reset() {
    let probe = Probe::default();
    let mut guest = Guest::start(Box::new(probe.clone()), 16);
    for (register, addr) in [(0x80u64, 0x7fff_f000u32), (0x90, 0x3fff_fff0), (0xa4, 1)] {
        guest.write32(0x70, 0);
        for status in [1, 3] {
            guest.write32(0x70, status);
        }
        guest.write32(0x24, 1);
        guest.write32(0x20, 1);
        guest.write32(0x70, 11);
        guest.write32(0x30, 0);
        for (at, to) in [(0x80, 0x1000), (0x90, 0x9000), (0xa0, 0x11000)] {
            guest.write32(at, to);
        }
        guest.write32(register, addr);
        guest.write32(0x44, 1);
        guest.write32(0x70, 15);
        assert_eq!(guest.status(), 15 | 0x40, "{register:#x}");
        assert!(probe.0.lock().unwrap().activated.is_none());
    }
    probe.0.lock().unwrap().fails = Some(|| ActivateError::MissingQueue(1));
    guest.bring_up(16);
    assert_eq!(guest.status(), 15 | 0x40);
    assert_eq!(guest.ending.cause(), None);
}

/// Each part of a queue may end where its memory does, and may cross from one region into the next, but not a byte further.
#[test]
fn a_queue_may_reach_to_the_end_of_memory() {
    let probe = Probe::default();
    let mut guest = Guest::start(Box::new(probe.clone()), 16);
    let gap = REGIONS[1].0 + REGIONS[1].1 as u64;
    let end = REGIONS[2].0 + REGIONS[2].1 as u64;
    // Register, length of 16 entries, and the step of its addresses.
    for (register, len, step) in [(0x80, 256, 16), (0x90, 38, 2), (0xa0, 134, 4)] {
        for border in [gap, end] {
            let last = (border - len) / step * step;
            let start = REGIONS[2].0;
            for (at, fits) in [
                (last, true),
                (last + step, false),
                (border - step, false),
                (border, false),
                (start, true),
                (start - step, false),
                (REGIONS[1].0 - step, true),
                (0, false),
                (u64::MAX / step * step, false),
            ] {
                guest.write32(0x70, 0);
                for (register, value) in &BRING_UP[..BRING_UP.len() - 2] {
                    guest.write32(*register, *value);
                }
                guest.write32(register, at as u32);
                guest.write32(register + 4, (at >> 32) as u32);
                guest.write32(0x44, 1);
                guest.write32(0x70, 15);
                let status = if fits { 15 } else { 15 | 0x40 };
                assert_eq!(guest.status(), status, "{register:#x} {at:#x}");
                assert_eq!(probe.0.lock().unwrap().activated.is_some(), fits);
            }
        }
    }
    assert_eq!(guest.ending.cause(), None);
}

#[test]
fn what_the_host_refuses_ends_the_vm() {
    let probe = Probe::default();
    let refuse = || ActivateError::host("taking a walk")(std::io::Error::other("it rains"));
    probe.0.lock().unwrap().fails = Some(refuse);
    let mut guest = Guest::start(Box::new(probe.clone()), 16);
    // The driver has done nothing wrong.
    assert_eq!(guest.status(), 15);
    let text = "the virtio device of type 42 did not start: taking a walk: it rains";
    assert_eq!(guest.ending.cause(), Some(Cause::Failed(text.into())));
    // Nor has the driver of a device that fails later.
    probe.0.lock().unwrap().fails = None;
    let mut guest = Guest::start(Box::new(probe.clone()), 16);
    let activation = probe.0.lock().unwrap().activated.take().unwrap();
    activation.interrupt.host_failed("it rains".into());
    assert_eq!(guest.status(), 15);
    assert_eq!(guest.ending.cause(), Some(Cause::Failed("it rains".into())));
}

#[test]
fn a_driver_whose_interrupts_come_from_outside_always_looks_at_its_queues() {
    let probe = Probe::default();
    let mut guest = Guest::start(Box::new(probe.clone()), 16);
    let interrupt = |probe: &Probe| {
        let record = probe.0.lock().unwrap();
        Arc::clone(&record.activated.as_ref().unwrap().interrupt)
    };
    assert_eq!(guest.read32(0x60), 0);
    let event = interrupt(&probe).queue_event().unwrap();
    event.write(1).unwrap();
    for _ in 0..2 {
        assert_eq!(guest.read32(0x60), 1);
        // It is the driver's interrupt line, and what the driver acknowledges comes again.
        guest.wait_interrupt();
        event.write(1).unwrap();
    }
    // A change of the configuration is still seen, and only once.
    interrupt(&probe).signal_config();
    assert_eq!(guest.read32(0x60), 3);
    guest.wait_interrupt();
    assert_eq!(guest.read32(0x60), 1);
    // It ends with the device's reset.
    guest.bring_up(16);
    assert_eq!(guest.read32(0x60), 0);
    interrupt(&probe).signal_queue(0);
    assert_eq!(guest.read32(0x60), 1);
    guest.wait_interrupt();
    assert_eq!(guest.read32(0x60), 0);
}

#[test]
fn only_whole_registers_and_aligned_configuration() {
    let probe = Probe::default();
    let mut guest = Guest::start(Box::new(probe.clone()), 16);
    let t = &mut guest.transport;
    let mut byte = [9];
    t.read(0, &mut byte);
    assert_eq!(byte, [0]);
    let mut eight = [9; 8];
    t.read(0, &mut eight);
    assert_eq!(eight, [0; 8]);
    t.read(0x100, &mut eight);
    assert_eq!(eight, [1, 2, 3, 4, 5, 6, 7, 8]);
    t.read(0x108, &mut eight);
    assert_eq!(eight, [9, 10, 0, 0, 0, 0, 0, 0]);
    let mut four = [9; 4];
    t.read(0x102, &mut four);
    assert_eq!(four, [0; 4]);
    t.read(u64::MAX - 3, &mut four);
    t.write(0x104, &[1, 2]);
    assert_eq!(probe.0.lock().unwrap().config, [4, 1, 2]);
    t.write(0x103, &[1, 2]);
    assert_eq!(probe.0.lock().unwrap().config, [4, 1, 2]);
    // No shared memory region has a length.
    assert_eq!(
        (guest.read32(0xb0), guest.read32(0xb4)),
        (u32::MAX, u32::MAX)
    );
}

/// What a driver writes to bring the device up with one queue: register and value.
const BRING_UP: [(u64, u32); 12] = [
    (0x70, 1),
    (0x70, 3),
    (0x24, 1),
    (0x20, 1),
    (0x70, 11),
    (0x30, 0),
    (0x38, 16),
    (0x80, 0x1000),
    (0x90, 0x9000),
    (0xa0, 0x1_1000),
    (0x44, 1),
    (0x70, 15),
];

/// The statuses among these.
const LADDER: [u32; 4] = [1, 3, 11, 15];

/// The status never shows what was not reached, and the device runs exactly while DRIVER_OK stands without a call for reset.
fn consistent(t: &mut MmioTransport, probe: &Probe) -> Result<u32, TestCaseError> {
    let status = read(t, 0x70);
    let running = probe.0.lock().unwrap().activated.is_some();
    if status & 0x80 == 0 {
        prop_assert!(
            [0, 1, 3, 11, 15, 15 | 0x40].contains(&status),
            "{status:#x}"
        );
        prop_assert_eq!(running, status == 15);
    }
    Ok(status)
}

proptest! {
    /// Arbitrary accesses, from any point of a good start, never panic and leave the device consistent.
    #[test]
    fn arbitrary_accesses(done in 0..=BRING_UP.len(), accesses in proptest::collection::vec(
        (
            prop_oneof![4 => (0..0x48u64).prop_map(|r| r * 4), 1 => any::<u64>()],
            prop_oneof![8 => Just(4usize), 1 => 0..16usize],
            prop_oneof![
                3 => proptest::sample::select(vec![0u64, 1, 3, 11, 15, 0x80, 0x1000, 0x9000, 0x11000]),
                1 => any::<u64>(),
            ],
            any::<bool>(),
        ),
        0..60,
    )) {
        let probe = Probe::default();
        let mut t = transport(&probe);
        let mut status = 0;
        for (register, value) in &BRING_UP[..done] {
            write(&mut t, *register, *value);
            status = consistent(&mut t, &probe)?;
        }
        prop_assert_eq!(status == 15, done == BRING_UP.len());
        for (offset, len, value, is_write) in accesses {
            let mut data = [0; 16];
            data[..8].copy_from_slice(&value.to_le_bytes());
            if is_write {
                t.write(offset, &data[..len]);
            } else {
                t.read(offset, &mut data[..len]);
            }
            consistent(&mut t, &probe)?;
        }
    }

    /// The ladder, with whatever steps between: nothing is skipped, and a good run after a reset ends running.
    #[test]
    fn statuses(
        done in 0..=LADDER.len(),
        between in proptest::collection::vec(proptest::sample::select(vec![0u32, 1, 2, 3, 8, 11, 15, 0x40, 0x4f, 0x80]), 0..40),
    ) {
        let good_run = std::iter::once(0).chain(LADDER);
        let mut phase = Phase::Reset;
        for value in LADDER[..done].iter().copied().chain(between).chain(good_run) {
            match phase.next(value) {
                Step::Reset => {
                    prop_assert_eq!(value, 0);
                    phase = Phase::Reset;
                }
                Step::Go(next) => {
                    prop_assert_eq!(next.status() & phase.status(), phase.status());
                    phase = next;
                }
                Step::Negotiate => {
                    prop_assert_eq!(phase, Phase::Driver);
                    phase = Phase::Features;
                }
                Step::Activate => {
                    prop_assert_eq!(phase, Phase::Features);
                    phase = Phase::Running;
                }
                Step::Ignore => {}
            }
        }
        prop_assert_eq!(phase, Phase::Running);
    }
}
