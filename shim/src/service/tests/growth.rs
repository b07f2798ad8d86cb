//! A running pod's VM grows with its containers' limits, before these hold.

use std::sync::{Arc, atomic::Ordering};

use containerd_shim_protos::{
    api::{DeleteRequest, UpdateTaskRequest},
    protobuf::well_known_types::any::Any,
    shim_async::Task as _,
};
use k8s_cri::v1 as cri;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::world::{Fault, Guest, LIMIT, World, context};
use crate::{annotations::Annotation, config::Config, sizing::Size};

const MIB: u64 = 1 << 20;

fn limits(mib: u64, quota: i64) -> Value {
    json!({ "memory": { "limit": mib * MIB }, "cpu": { "quota": quota, "period": 100_000 } })
}

/// A pod whose container has 256 MiB and one CPU, on a node that lets it grow this far.
async fn pod(grow_vcpus: u8, grow_memory_mib: u64) -> World {
    let guest = Arc::new(Guest::default());
    *guest.cpus.lock().unwrap() = 8;
    let config = Config {
        max_vcpus: 8,
        max_memory_mib: 4096,
        default_vcpus: 1,
        default_memory_mib: 512,
        grow_vcpus,
        grow_memory_mib,
        ..Config::default()
    };
    let linux = json!({ "namespaces": [{"type": "network"}], "resources": limits(256, 100_000) });
    let w = World::configured(guest, Fault::None, config, linux).await;
    w.create().await.unwrap();
    w
}

impl World {
    async fn update(&self, id: &str, resources: &Value) -> ttrpc::Result<()> {
        let resources = Any {
            value: resources.to_string().into_bytes(),
            ..Default::default()
        };
        let request = UpdateTaskRequest {
            id: id.into(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        self.service.update(&context(), request).await.map(drop)
    }

    /// What the guest was asked that has to do with its size, oldest first.
    fn asked(&self) -> Vec<String> {
        let calls = self.guest.calls.lock().unwrap();
        let of_size = |call: &&String| {
            ["memory ", "online ", "update ", "create "]
                .iter()
                .any(|kind| call.starts_with(kind))
        };
        calls.iter().filter(of_size).cloned().collect()
    }

    fn size(&self) -> Size {
        self.tasks.sandbox().growth().has()
    }
}

fn size(vcpus: u8, memory_mib: u64) -> Size {
    Size { vcpus, memory_mib }
}

#[tokio::test]
async fn the_vm_grows_before_the_limit_does() {
    let w = pod(4, 2048).await;
    let plan = w.vmm.plan.get().unwrap().clone();
    assert_eq!((plan.size, plan.max), (size(1, 328), size(4, 2048)));
    let mut resources = limits(1024, 300_000);
    resources["cpu"]["cpus"] = json!("0-7");
    w.update("c", &resources).await.unwrap();
    let asked = w.asked();
    assert_eq!(asked[..3], ["create c", "memory 328 1120", "online 3"]);
    // The cpuset names the CPUs that are online by then.
    assert!(
        asked[3].starts_with("update c ") && asked[3].contains("\"0-2\""),
        "{asked:?}"
    );
    assert_eq!(w.size(), size(3, 1120));
    // Never smaller again, and up to the limit without a word to the guest.
    w.update("c", &limits(64, 50_000)).await.unwrap();
    w.update("c", &limits(1024, 300_000)).await.unwrap();
    assert_eq!(w.size(), size(3, 1120));
    assert_eq!(w.asked().len(), 6);
    // What an update does not name stays.
    w.update("c", &json!({ "cpu": { "quota": 400_000 } }))
        .await
        .unwrap();
    assert_eq!(w.asked()[6], "online 4");
}

#[tokio::test]
async fn beyond_its_maximum_the_limit_still_holds() {
    let w = pod(2, 512).await;
    w.update("c", &limits(1024, 300_000)).await.unwrap();
    assert_eq!(w.size(), size(2, 512));
    assert_eq!(w.asked()[1..3], ["memory 328 512", "online 2"]);
    w.update("c", &limits(2048, 400_000)).await.unwrap();
    // There is nothing left to ask for.
    let asked = w.asked();
    assert_eq!(asked.len(), 5, "{asked:?}");
    assert!(asked[4].contains(&(2048 * MIB).to_string()), "{asked:?}");
}

#[tokio::test]
async fn without_leave_a_vm_keeps_its_size() {
    let w = pod(0, 0).await;
    let plan = w.vmm.plan.get().unwrap().clone();
    assert_eq!((plan.size, plan.max), (size(1, 328), size(1, 328)));
    w.update("c", &limits(1024, 300_000)).await.unwrap();
    let asked = w.asked();
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(asked[1].starts_with("update c "), "{asked:?}");
}

#[tokio::test]
async fn a_further_container_makes_room_for_itself() {
    let w = pod(4, 2048).await;
    let linux = json!({ "resources": limits(512, 150_000) });
    w.create_also("d", linux.clone()).await.unwrap();
    assert_eq!(
        w.asked(),
        ["create c", "memory 328 856", "online 3", "create d"]
    );
    // One that has ended makes room for the next.
    w.guest.end("d", "", 0);
    let mut over = w.tasks.get("d").unwrap().watch("").unwrap();
    timeout(LIMIT, over.wait_for(Option::is_some))
        .await
        .unwrap()
        .unwrap();
    let request = DeleteRequest {
        id: "d".into(),
        ..Default::default()
    };
    w.service.delete(&context(), request).await.unwrap();
    w.create_also("e", linux).await.unwrap();
    assert_eq!(w.asked()[4..], ["create e"]);
    assert_eq!(w.size(), size(3, 856));
}

#[tokio::test]
async fn a_guest_that_does_not_take_it_is_asked_again() {
    let w = pod(4, 2048).await;
    w.vmm.is_full.store(true, Ordering::Relaxed);
    *w.guest.cpus.lock().unwrap() = 2;
    w.update("c", &limits(1024, 300_000)).await.unwrap();
    assert_eq!(w.size(), size(2, 328));
    w.vmm.is_full.store(false, Ordering::Relaxed);
    // Whatever it says, it is taken for no more than it was given.
    *w.guest.cpus.lock().unwrap() = u32::MAX;
    w.update("c", &limits(1024, 300_000)).await.unwrap();
    assert_eq!(w.size(), size(3, 1120));
    let asked = w.asked();
    assert_eq!(asked[4..6], ["memory 328 1120", "online 3"]);
}

#[tokio::test]
async fn the_end_of_the_vm_ends_the_wait() {
    let w = pod(4, 2048).await;
    w.guest.deaf.send_replace(true);
    let resources = limits(1024, 300_000);
    let (updated, ()) = tokio::join!(timeout(LIMIT, w.update("c", &resources)), async {
        w.called("memory 328 1120").await;
        w.vmm.die("the guest kernel panicked").await;
    });
    let error = format!("{:?}", updated.unwrap().unwrap_err());
    assert!(error.contains("the guest kernel panicked"), "{error}");
}

/// Two at a time: the VM has room for both in the end.
#[tokio::test]
async fn updates_side_by_side_add_up() {
    let w = pod(8, 4096).await;
    let linux = json!({ "resources": limits(64, 100_000) });
    w.create_also("d", linux).await.unwrap();
    let (one, other) = (limits(1024, 200_000), limits(512, 300_000));
    let (one, other) = tokio::join!(w.update("c", &one), w.update("d", &other));
    one.unwrap();
    other.unwrap();
    assert_eq!(w.size(), size(5, 1536 + 48 + 64));
}

/// Its size is the pod's, without a sandbox container that says so.
#[tokio::test]
async fn a_pod_of_the_sandbox_api_grows_beyond_its_own_size() {
    let guest = Arc::new(Guest::default());
    *guest.cpus.lock().unwrap() = 8;
    let node = Config {
        enabled_annotations: vec![Annotation::MaxVcpus, Annotation::MaxMemoryMib],
        max_vcpus: 8,
        max_memory_mib: 4096,
        ..Config::default()
    };
    let w = World::kept(guest, Fault::None, node).await;
    let annotations = [
        ("io.husk.max_vcpus", "4"),
        ("io.husk.max_memory_mib", "2048"),
    ];
    let resources = cri::LinuxContainerResources {
        memory_limit_in_bytes: 256 << 20,
        cpu_quota: 100_000,
        ..Default::default()
    };
    let config = cri::PodSandboxConfig {
        annotations: annotations.map(|(k, v)| (k.into(), v.into())).into(),
        linux: Some(cri::LinuxPodSandboxConfig {
            resources: Some(resources),
            ..Default::default()
        }),
        ..Default::default()
    };
    w.open_with(&config).await.unwrap();
    w.begin().await.unwrap();
    let plan = w.vmm.plan.get().unwrap().clone();
    assert_eq!((plan.size, plan.max), (size(1, 328), size(4, 2048)));
    // What has no limits shares what the pod has.
    w.create_also("d", json!({})).await.unwrap();
    let linux = json!({ "resources": limits(512, 150_000) });
    w.create_also("e", linux).await.unwrap();
    assert_eq!(
        w.asked(),
        ["create d", "memory 328 592", "online 2", "create e"]
    );
}
