//! The time in a pod is the host's.

use std::{
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    cri::{NAMESPACE, PodContainer, container},
    host, wait,
};
use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};

use super::SLEEP;
use crate::context::Context;

/// How wrong a pod's clock may be.
const TOLERANCE: f64 = 1.0;

/// How far the host's clock is set, in seconds.
const STEP: f64 = 5000.0;

/// How long a pod stands still.
const PAUSE: Duration = Duration::from_secs(5);

pub fn right(suite: &Context) -> Result<()> {
    let (containerd, cri) = suite.cri_and_containerd()?;
    let pod = cri.pod()?;
    let main = pod.start(container(&SLEEP))?;
    ensure_right(&main, "at first")?;

    let task = |what| containerd.run_ctr(&["--namespace", NAMESPACE, "task", what, &main.id]);
    task("pause")?.ok()?;
    thread::sleep(PAUSE);
    task("resume")?.ok()?;
    ensure_right(&main, "after a pause")?;

    if let Some(vmm) = host::shim_of(&pod.id).and_then(|shim| host::vmm_of(&shim)) {
        let pid = vmm.pid.to_string();
        host::run(&["kill", "-STOP", &pid])?;
        thread::sleep(PAUSE);
        host::run(&["kill", "-CONT", &pid])?;
        ensure_right(&main, "after the VM stood still")?;
    }

    let clock = HostClock::now();
    for step in [STEP, 0.0] {
        clock.set(step)?;
        wait::until("the pod's clock to follow the host's", || {
            ensure_right(&main, "").ok()
        })
        .with_context(|| format!("the host's clock was set to {step} s ahead"))?;
    }
    Ok(())
}

/// Seconds since the Unix epoch.
fn host_time() -> f64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0.0, |time| time.as_secs_f64())
}

/// The container's time lies between the question and the answer.
fn ensure_right(container: &PodContainer<'_>, when: &str) -> Result<()> {
    let asked = host_time();
    // busybox knows whole seconds: it is this time or up to one second later.
    let told = container.exec(&["date", "+%s"])?.ok()?;
    let answered = host_time();
    let time: f64 = told.parse().with_context(|| format!("{told:?}"))?;
    ensure!(
        (asked - 1.0 - TOLERANCE..=answered + TOLERANCE).contains(&time),
        "{when}: the pod has {time}, the host had {asked} and then {answered}"
    );
    Ok(())
}

/// The host's clock at a moment. Dropped, it is set right again.
struct HostClock {
    time: f64,
    moment: Instant,
}

impl HostClock {
    fn now() -> Self {
        Self {
            time: host_time(),
            moment: Instant::now(),
        }
    }

    /// Sets it ahead of the right time by this many seconds.
    fn set(&self, ahead: f64) -> Result<()> {
        let time = Duration::from_secs_f64(self.time + self.moment.elapsed().as_secs_f64() + ahead);
        clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(time))
            .context("setting the host's clock")
    }
}

impl Drop for HostClock {
    fn drop(&mut self) {
        // It was to be set before, which has failed then.
        let _ = self.set(0.0);
    }
}
