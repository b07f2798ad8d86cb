//! Where the time of one start goes.
//!
//! Every point is a `CLOCK_MONOTONIC` reading, which all processes of the host share. One line of the log carries the phases of a
//! start, one those of an end: `husk.timing {json}`, all figures in milliseconds. `make run` and `make bench` read them.

use std::sync::{Mutex, PoisonError};

use serde_json::{Map, Value, json};
use tracing::info;

/// Environment variable with which `start` tells the serving shim when it began itself: nanoseconds of `CLOCK_MONOTONIC`.
pub const STARTED: &str = "HUSK_SHIM_STARTED_NS";

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
        Self(seconds * 1_000_000_000 + nanos)
    }

    /// When containerd started the shim: `start` hands its own beginning over to the serving shim in [`STARTED`].
    pub fn shim_start() -> Self {
        let given = std::env::var(STARTED).ok().and_then(|ns| ns.parse().ok());
        given.map_or_else(Self::process_start, Self)
    }

    /// When this process was made, to the kernel's clock tick (10 ms).
    pub fn process_start() -> Self {
        let ticks_per_second = rustix::param::clock_ticks_per_second().max(1);
        crate::state::ProcessId::current()
            .map(|process| {
                Self(
                    process
                        .starttime
                        .saturating_mul(1_000_000_000 / ticks_per_second),
                )
            })
            .unwrap_or_else(|_| Self::now())
    }
}

/// The points of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Point {
    /// containerd started the shim.
    ShimStarted,
    /// The shim serves and asks for the VM.
    VmRequested,
    /// The first Create arrived.
    CreateReceived,
    /// The vCPUs run.
    VcpusRunning,
    /// The agent's connection arrived.
    AgentConnected,
    /// The sandbox is set up in the guest.
    SandboxReady,
    /// The container's files are in the share.
    RootfsReady,
    /// The container is created.
    Created,
    /// The first Start was answered.
    Started,
    /// The first init's end was known.
    Exited,
    /// The VM has gone.
    Reaped,
}

const POINTS: usize = Point::Reaped as usize + 1;

/// The points reached so far; the first of each kind counts.
#[derive(Debug, Default)]
pub struct Timeline(Mutex<[Option<Moment>; POINTS]>);

impl Timeline {
    /// This point is reached now.
    pub fn mark(&self, point: Point) {
        self.mark_at(point, Moment::now());
    }

    /// This point was reached then.
    pub fn mark_at(&self, point: Point, at: Moment) {
        let mut points = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = points.get_mut(point as usize) {
            slot.get_or_insert(at);
        }
    }

    fn between(&self, from: Point, to: Point) -> Option<f64> {
        let points = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = |point: Point| points.get(point as usize).copied().flatten();
        let (from, to) = (at(from)?, at(to)?);
        let nanos = to.0.saturating_sub(from.0);
        // Thousandths of a millisecond are finer than anything here.
        Some((nanos / 1000) as f64 / 1000.0)
    }

    fn phases(&self, id: &str, phases: &[(&str, Point, Point)]) -> Value {
        let mut fields = Map::new();
        fields.insert("id".into(), json!(id));
        for &(name, from, to) in phases {
            if let Some(ms) = self.between(from, to) {
                fields.insert(name.into(), json!(ms));
            }
        }
        Value::Object(fields)
    }

    /// The phases of the start. The first four follow one another and add up to `total`; the rest say what happened inside them.
    pub fn start_phases(&self, id: &str) -> Value {
        use Point::{
            AgentConnected, CreateReceived, Created, RootfsReady, SandboxReady, ShimStarted,
            Started, VcpusRunning, VmRequested,
        };
        self.phases(
            id,
            &[
                ("shim_start", ShimStarted, VmRequested),
                ("vm_ready", VmRequested, VcpusRunning),
                ("kernel_to_agent", VcpusRunning, AgentConnected),
                ("agent_to_process", AgentConnected, Started),
                ("total", ShimStarted, Started),
                ("create_received", ShimStarted, CreateReceived),
                ("rootfs_ready", CreateReceived, RootfsReady),
                ("sandbox_setup", AgentConnected, SandboxReady),
                ("create_in_guest", SandboxReady, Created),
                ("created_to_started", Created, Started),
            ],
        )
    }

    /// Writes the start's line.
    pub fn log_start(&self, id: &str) {
        info!("husk.timing {}", self.start_phases(id));
    }

    /// Writes the end's line.
    pub fn log_end(&self, id: &str) {
        let phases = self.phases(id, &[("exit_to_reaped", Point::Exited, Point::Reaped)]);
        info!("husk.timing {phases}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_and_the_first_mark_counts() {
        let timeline = Timeline::default();
        let ms = |n: u64| Moment(n * 1_000_000);
        timeline.mark_at(Point::ShimStarted, ms(1));
        timeline.mark_at(Point::VmRequested, ms(11));
        timeline.mark_at(Point::VcpusRunning, ms(31));
        timeline.mark_at(Point::AgentConnected, ms(131));
        timeline.mark_at(Point::Started, ms(151));
        timeline.mark_at(Point::Started, ms(999));
        let phases = timeline.start_phases("c");
        let get = |name: &str| phases[name].as_f64().unwrap();
        let sum =
            get("shim_start") + get("vm_ready") + get("kernel_to_agent") + get("agent_to_process");
        assert!((sum - get("total")).abs() < 1e-6);
        assert!((get("total") - 150.0).abs() < 1e-6);
        assert!(
            phases.get("rootfs_ready").is_none(),
            "a point that was not reached gives no phase"
        );
        assert!(Moment::process_start() <= Moment::now());
    }
}
