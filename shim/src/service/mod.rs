//! The shim's ttrpc service: the Task API, as containerd 1.7 (v2) and 2.x (v3) call it.
//!
//! The two versions have the same messages, so one implementation is registered under both names. (The Sandbox API, used with
//! `sandboxer = "shim"` only, is to be registered here beside them.)

mod stats;
mod task;
mod tasks;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, sync::Arc, time::Duration};

use containerd_shim_protos::shim_async::create_task;
use tokio::net::UnixListener;
use tracing::info;
use ttrpc::{
    r#async::TtrpcContext,
    asynchronous::{Server, Service, transport::Listener},
};

pub use task::TaskService;
pub use tasks::Tasks;

use crate::{
    context::ShimContext,
    share::Share,
    vm::{Driver, process::HuskVmm},
};

/// The name that the generated service has.
const V3: &str = "containerd.task.v3.Task";
/// The name that containerd 1.7, CRI-O and Docker call.
const V2: &str = "containerd.task.v2.Task";

/// How long the last answers may take to be written.
const LAST_ANSWERS: Duration = Duration::from_millis(20);

/// Serves the pod on this socket until containerd has shut it down.
///
/// # Errors
/// When the socket cannot be served.
pub async fn serve(context: ShimContext, listener: UnixListener) -> Result<(), ttrpc::Error> {
    let config = &context.config;
    let driver = HuskVmm {
        vmm: config.vmm.clone(),
        kernel: config.kernel.clone(),
        initramfs: config.initramfs.clone(),
        cache: config.cache,
        pod: context.sandbox_id.clone(),
    };
    serve_with(context, listener, Arc::new(driver)).await
}

/// [`serve`] with a VMM of the caller's choice.
///
/// # Errors
/// As [`serve`].
pub async fn serve_with(
    context: ShimContext,
    listener: UnixListener,
    driver: Arc<dyn Driver>,
) -> Result<(), ttrpc::Error> {
    let share = Share::new(context.pod.share(), context.pod.served());
    let tasks = Tasks::start(context, share, driver);
    let mut server = Server::new()
        .add_listener(Listener::from(listener))
        .register_service(services(&tasks, V3))
        .register_service(services(&tasks, V2));
    server.start().await?;
    tasks.shut_down().await;
    info!("shut down: no container is left");
    // containerd keeps its connection until we are gone, so its closing cannot be waited for.
    tokio::time::sleep(LAST_ANSWERS).await;
    Ok(())
}

fn services(tasks: &Arc<Tasks>, name: &str) -> HashMap<String, Service> {
    let service = Arc::new(TaskService::new(Arc::clone(tasks)));
    create_task(service)
        .into_values()
        .map(|service| (name.to_owned(), service))
        .collect()
}

/// What a handler gets besides its request; it needs nothing of it.
type Call<'a> = &'a TtrpcContext;
