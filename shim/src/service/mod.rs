//! PLACEHOLDER of the frontend helper until the core's own file replaces it.

use tokio::net::UnixListener;

use crate::context::ShimContext;

/// Serves until shutdown.
///
/// # Errors
/// None yet.
pub async fn serve(context: ShimContext, listener: UnixListener) -> anyhow::Result<()> {
    let _keep = (context, listener);
    std::future::pending::<()>().await;
    Ok(())
}
