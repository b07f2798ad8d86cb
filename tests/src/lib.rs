//! What the end-to-end suites, the benches and the demonstration share.
//!
//! They run inside the testbed (or on a host with hardware KVM), against real containerd and the built
//! binaries in the payload. [`containerd`] starts a private containerd with its own root, state and socket; [`ctr`] runs
//! `ctr` against it with a time limit, [`events`] what it tells; [`host`] looks at what husk has left on the host; [`spec`] makes OCI specs;
//! [`task`] asks a shim itself; [`cri`] is a kubelet, [`streams`] what `kubectl exec`, `attach` and `port-forward` do through it.

pub mod busybox;
pub mod containerd;
pub mod cri;
pub mod ctr;
pub mod docker;
pub mod events;
pub mod host;
pub mod podman;
pub mod runtime;
pub mod side_by_side;
pub mod spdy;
pub mod spec;
pub mod streams;
pub mod task;
pub mod timing;
pub mod wait;
