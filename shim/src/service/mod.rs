//! The shim's ttrpc services: the Task API, as containerd 1.7 (v2) and 2.x (v3) call it, the Sandbox API, and one of husk's own.
//!
//! The two versions of the Task API have the same messages, so one implementation is registered under both names.

mod guest;
mod sandbox_api;
mod stats;
mod task;
mod tasks;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    future::Future,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use containerd_shim_protos::{sandbox_async, shim_async::create_task};
use husk_protocol::shim::create_guest;
use tokio::net::UnixListener;
use tracing::info;
use ttrpc::{
    r#async::TtrpcContext,
    asynchronous::{Server, Service, transport::Listener},
};

pub use guest::GuestService;
pub use sandbox_api::SandboxService;
pub use task::TaskService;
pub use tasks::Tasks;

use crate::{
    context::ShimContext,
    error::TaskError,
    share::Share,
    spec::BundleSpec,
    vm::{Driver, process::HuskVmm},
    vmm_users::VmmUsers,
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
    let users = context.config.user_namespace.then(VmmUsers::make).flatten();
    let users = users.filter(|users| {
        root_of_engine(&context.bundle).is_none_or(|root| users.can_show(&context.engine, &root))
    });
    let share = Share::new(
        context.pod.share(),
        context.pod.served(),
        users,
        context.engine.clone(),
    );
    let tasks = Tasks::start(context, share, driver);
    let mut server = Server::new()
        .add_listener(Listener::from(listener))
        .register_service(services(&tasks, V3))
        .register_service(services(&tasks, V2))
        .register_service(sandbox_async::create_sandbox(Arc::new(
            SandboxService::new(Arc::clone(&tasks)),
        )))
        .register_service(create_guest(Arc::new(GuestService::new(&tasks))));
    server.start().await?;
    tasks.shut_down().await;
    info!("shut down");
    // containerd keeps its connection until we are gone, so its closing cannot be waited for.
    tokio::time::sleep(LAST_ANSWERS).await;
    Ok(())
}

/// The root file system that the pod's first container has from an engine that mounts it itself, as Docker and CRI-O do; containerd's is in the
/// bundle, and mounted by us.
fn root_of_engine(bundle: &Path) -> Option<PathBuf> {
    let root = BundleSpec::load(bundle).ok()?.root_path();
    (!root.starts_with(bundle)).then_some(root)
}

fn services(tasks: &Arc<Tasks>, name: &str) -> HashMap<String, Service> {
    let service = Arc::new(TaskService::new(Arc::clone(tasks)));
    create_task(service)
        .into_values()
        .map(|service| (name.to_owned(), service))
        .collect()
}

/// Runs a change to its end, whatever becomes of the handler that asked for it: ttrpc drops one when its client disconnects or its
/// deadline passes, at whatever await it stands.
async fn to_the_end<T: Send + 'static>(
    change: impl Future<Output = Result<T, TaskError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(change).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(TaskError::failed(format!("the shim failed: {error}")).into()),
    }
}

/// What a handler gets besides its request; it needs nothing of it.
type Call<'a> = &'a TtrpcContext;
