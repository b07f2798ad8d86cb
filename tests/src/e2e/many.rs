//! As many pods at once as a node may have.

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use husk_tests::{
    cri::{Pod, PodContainer, container, v1},
    host::{self, Traces},
    side_by_side::side_by_side,
};

use crate::{Test, context::Context, husk_test};

pub const TESTS: &[Test] = &[husk_test("forty_pods", forty)];

const PODS: usize = 40;

/// Calls at a time, as a kubelet that starts pods side by side makes them.
const AT_A_TIME: usize = 3;

/// Most memory of an idle pod with one container, in KiB: shim, VMM and what the guest has touched. The RuntimeClass's overhead.
const MOST_KIB: u64 = 96 << 10;

fn forty(suite: &Context) -> Result<()> {
    let cri = suite.cri()?;
    let before = Traces::now();
    let start = Instant::now();
    let pods = side_by_side(PODS, AT_A_TIME, |_| cri.pod())?;
    let running = side_by_side(PODS, AT_A_TIME, |number| named(&pods[number], number))?;
    let started = start.elapsed();
    side_by_side(PODS, AT_A_TIME, |number| {
        let name = running[number].sh("echo $NAME")?.ok()?;
        ensure!(name == number.to_string(), "pod {number} says {name}");
        Ok(())
    })?;
    let kib = pods.iter().map(memory).sum::<Result<u64>>()? / PODS as u64;
    println!("{PODS} pods with a container each: up in {started:.0?}, {kib} KiB a pod");
    ensure!(kib < MOST_KIB, "{kib} KiB a pod");
    drop(running);
    let pods = Mutex::new(pods);
    side_by_side(PODS, AT_A_TIME, |_| {
        let pod = pods.lock().unwrap_or_else(PoisonError::into_inner).pop();
        drop(pod);
        Ok(())
    })?;
    println!("up and gone in {:.0?}", start.elapsed());
    before.restored()
}

/// A container that knows its number.
fn named<'a>(pod: &'a Pod<'_>, number: usize) -> Result<PodContainer<'a>> {
    let mut config = container(&["sleep", "1000000"]);
    config.envs.push(v1::KeyValue {
        key: "NAME".into(),
        value: number.to_string(),
    });
    pod.start(config)
}

/// KiB that a pod takes of the host.
fn memory(pod: &Pod<'_>) -> Result<u64> {
    let shim = host::shim_of(&pod.id).context("the pod has no shim")?;
    let vmm = host::vmm_of(&shim).context("the pod has no VMM")?;
    let pss = |process: &host::Process| host::smaps(process.pid, "Pss").context("it has gone");
    Ok(pss(&shim)? + pss(&vmm)?)
}
